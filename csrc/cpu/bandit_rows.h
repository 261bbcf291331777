// The walk of the bandit ops over rows: one table for each instruction set. Knows nothing of torch.
#pragma once

#include <cstdint>

namespace fastbandit {

struct BanditTask;

namespace cpu {

// The rows [begin, end) of a task whose mean and count have these types.
using BanditRows = void (*)(const BanditTask& task, int64_t begin, int64_t end);
struct BanditKernels {
  BanditRows float_whole, float_real, double_whole, double_real;
};

const BanditKernels& bandit_kernels_baseline();
const BanditKernels& bandit_kernels_avx2();
const BanditKernels& bandit_kernels_avx512();

}  // namespace cpu
}  // namespace fastbandit
