// The matrix product of single bits on tensor cores: mma.m16n8k256, counts of ones of an AND.
#pragma once

#include "cuda/pack.h"

namespace fastbandit {

// d += popcount(a & b) of a warp: a 16 x 256 bits, b 256 x 8, d 16 x 8 sums. With group = lane / 4
// and place = lane % 4 a register is 32 bits of the inner dimension: a[0], a[2] of row `group` at
// 32 place and 128 + 32 place, a[1], a[3] of row group + 8; b[0], b[1] of column `group`; d[0], d[1]
// are row `group`, columns 2 place and 2 place + 1, and d[2], d[3] row group + 8.
//
// Native on sm_80 to sm_90; on later architectures ptxas writes it out in other instructions, so
// nobody calls it there (see the launcher).
__device__ __forceinline__ void mma_and_popc(int (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
#if !defined(__CUDACC__)
  cuda_on_cpu::mma_and_popc(d, a, b);
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

}  // namespace fastbandit
