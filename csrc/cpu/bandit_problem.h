// The walk of the bandit ops over rows: one table for each instruction set. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastbandit {

struct BanditTask;

namespace cpu {

// The rows [begin, end) of a task whose mean and count have these types.
using BanditRows = void (*)(const BanditTask& task, int64_t begin, int64_t end);
struct BanditKernels {
  BanditRows float_whole, float_real, double_whole, double_real;
};

template <>
const BanditKernels& kernels_for<BanditKernels, Isa::baseline>();
template <>
const BanditKernels& kernels_for<BanditKernels, Isa::avx2>();
template <>
const BanditKernels& kernels_for<BanditKernels, Isa::avx512>();

}  // namespace cpu
}  // namespace fastbandit
