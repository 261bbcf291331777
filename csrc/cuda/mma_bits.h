// The matrix product of single bits on tensor cores: mma.m16n8k256, counts of ones of an AND.
#pragma once

#include "cuda/pack.h"

namespace fastbandit {

// d += popcount(a & b) of a warp: a 16 x 256 bits, b 256 x 8, d 16 x 8 sums. With group = lane / 4
// and place = lane % 4 a register is 32 bits of the inner dimension, the lowest bit first: a[0] and
// a[2] of row `group` from 32 place and from 128 + 32 place, a[1] and a[3] of row group + 8; b[0]
// and b[1] of column `group`, likewise; d[0] and d[1] are row `group`, columns 2 place and
// 2 place + 1, and d[2] and d[3] row group + 8. This is the table "Matrix Fragments for
// mma.m16n8k256" of the PTX ISA (9.7.14.5.13 in PTX 9.2; its column of `a` for i < 64 lacks the
// "& 0x1F" of its other lines), and CUTLASS has the same layout since its pull request 1856.
//
// An instruction of its own on sm_80 to sm_90 only. Elsewhere the warp exchanges registers: right,
// slow, and not chosen by the launcher. The tests on the CPU run that too, and hold it to the
// manual's table, so that the kernel is tested with that layout.
__device__ __forceinline__ void mma_and_popc(int (&d)[4], const unsigned (&a)[4],
                                             const unsigned (&b)[2]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
  asm volatile(
      "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const int group = static_cast<int>(threadIdx.x % 32) / 4;
  const int place = static_cast<int>(threadIdx.x % 32) % 4;
#pragma unroll 1
  for (int peer = 0; peer < 4; ++peer) {  // 32 bits of each half of the inner dimension
    unsigned rows[4], columns[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) rows[i] = __shfl_sync(0xffffffffu, a[i], 4 * group + peer);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        columns[e][half] = __shfl_sync(0xffffffffu, b[half], 4 * (2 * place + e) + peer);
#pragma unroll
      for (int r = 0; r < 2; ++r)
        d[2 * r + e] += __popc(rows[r] & columns[e][0]) + __popc(rows[r + 2] & columns[e][1]);
    }
  }
#endif
}

}  // namespace fastbandit
