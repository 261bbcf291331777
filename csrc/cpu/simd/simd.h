// Vectors for the kernels in cpu/kernels, one set per instruction set.
//
// setup.py compiles each source in cpu/kernels once for each set, with FB_ISA defined as avx512, avx2
// or baseline (the portable vectors of the compiler) and FB_ISA_AVX512 or FB_ISA_AVX2; those that
// count bits also as avx512vpopcntdq, which is AVX-512 and FB_ISA_AVX512VPOPCNTDQ. Every name
// lives in the namespace of that name, so that the same templates can be linked together once per set.
// The instruction set is chosen by a pragma here rather than by compiler flags: standard headers
// are read before it, so no inline function of the standard library is compiled for a CPU that the
// program may not run on. A source ends with cpu/simd/end.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "cpu/isa.h"
#include "math/number.h"

#if defined(FB_ISA_AVX512VPOPCNTDQ)
#define FB_ISA_AVX512
#endif

#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
#include <immintrin.h>
#endif

#if defined(__clang__)
// One push for all: of two target attributes clang takes the first. cpu/simd/end.h pops it.
#if defined(FB_ISA_AVX512VPOPCNTDQ)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vpopcntdq,avx2,fma,f16c"))), apply_to = function)
#elif defined(FB_ISA_AVX512)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#elif defined(FB_ISA_AVX2)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#endif
#else
#if defined(FB_ISA_AVX512VPOPCNTDQ)
#pragma GCC target("avx512vpopcntdq")
#endif
#if defined(FB_ISA_AVX512)
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// The compiler's own header starts some intrinsics from an undefined vector on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#elif defined(FB_ISA_AVX2)
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

#define FB_INLINE inline __attribute__((always_inline))
// Loops over registers, whose counts are constants.
#define FB_UNROLL _Pragma("GCC unroll 64")

#if defined(FB_ISA_AVX512)
#include "cpu/simd/avx512.h"
#elif defined(FB_ISA_AVX2)
#include "cpu/simd/avx2.h"
#else
#include "cpu/simd/portable.h"
#endif

namespace fastbandit::cpu::FB_ISA {

// The first `count` values, the other lanes 0: through a buffer, for the few partial vectors.
template <class T>
FB_INLINE Vec load_partial(const T* p, int64_t stride, int64_t count) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}
template <class T>
FB_INLINE void store_partial(T* p, int64_t stride, int64_t count, Vec a) {
  T buffer[kLanes];
  store(buffer, a);
  for (int64_t i = 0; i < count; ++i) p[i * stride] = buffer[i];
}

// The same for neighbours in memory, 0 <= count <= kLanes.
template <class T>
FB_INLINE Vec load_first(const T* p, int64_t count) {
  return load_partial(p, 1, count);
}
template <class T>
FB_INLINE void store_first(T* p, int64_t count, Vec a) {
  store_partial(p, 1, count, a);
}

// `rows` rows of `columns` values as the columns of rows of kLanes, at most that many of each; 0 in
// what is left of the new rows.
FB_INLINE void transpose_tile(const float* from, int64_t from_row, int64_t rows, int64_t columns,
                              float* to, int64_t to_row) {
  Vec tile[kLanes];
  for (int64_t i = 0; i < kLanes; ++i)
    tile[i] = i >= rows           ? zero()
              : columns == kLanes ? load(from + i * from_row)
                                  : load_first(from + i * from_row, columns);
  transpose(tile);
  for (int64_t i = 0; i < columns; ++i) store(to + i * to_row, tile[i]);
}

}  // namespace fastbandit::cpu::FB_ISA
