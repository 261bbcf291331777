// What the windows of a pooling look at, and the kernels that work through them: one table for each
// instruction set. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastbandit::cpu {

// The runs of values that a run is made of, in order, each under its tap of the window, 0 to 8.
struct Taps {
  int count = 0;
  int64_t at[9];
  int32_t tap[9];

  void add(int64_t offset, int64_t which) {
    at[count] = offset;
    tap[count++] = static_cast<int32_t>(which);
  }
};

struct PoolKernels {
  // y: the largest of the runs of x; which: the tap it lies under, the first of equal ones. NaN
  // counts as the largest, as in torch.
  void (*largest)(const Taps& taps, const float* x, int64_t count, float* y, uint8_t* which);

  // to: the sum of the gradients of those windows that the run has won.
  void (*gather)(const Taps& taps, const float* grad, const uint8_t* which, int64_t count,
                 float* to);
};

template <>
const PoolKernels& kernels_for<PoolKernels, Isa::baseline>();
template <>
const PoolKernels& kernels_for<PoolKernels, Isa::avx2>();
template <>
const PoolKernels& kernels_for<PoolKernels, Isa::avx512>();

}  // namespace fastbandit::cpu
