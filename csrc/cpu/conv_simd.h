// Vectors of float32 for the convolution kernels, one set per instruction set.
//
// setup.py compiles each source in cpu/kernels once for each set, with FB_ISA defined as avx512, avx2
// or baseline (the portable vectors of the compiler) and FB_ISA_AVX512 or FB_ISA_AVX2. Every name
// lives in the namespace of that name, so that the same templates can be linked together once per set.
// The instruction set is chosen by a pragma here rather than by compiler flags: standard headers
// are read before it, so no inline function of the standard library is compiled for a CPU that the
// program may not run on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/isa.h"
#include "math/number.h"

#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
#include <immintrin.h>
#endif

#if defined(FB_ISA_AVX512)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
// The compiler's own header starts some intrinsics from an undefined vector on purpose.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#elif defined(FB_ISA_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#endif

#define FB_INLINE inline __attribute__((always_inline))

namespace fastbandit::cpu::FB_ISA {

#if defined(FB_ISA_AVX512)

constexpr Isa kIsa = Isa::avx512;
constexpr int kLanes = 16;
struct Vec {
  __m512 v;
};
FB_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
FB_INLINE Vec broadcast(float value) { return {_mm512_set1_ps(value)}; }
FB_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
FB_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
FB_INLINE Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
FB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// max returns its second operand when one is NaN, so NaN passes through as in torch.relu.
FB_INLINE Vec relu(Vec a) { return {_mm512_max_ps(_mm512_setzero_ps(), a.v)}; }
// a where x > 0 or x is NaN, else 0: the derivative of relu as torch defines it.
FB_INLINE Vec where_positive(Vec x, Vec a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_setzero_ps(), _CMP_NLE_UQ), a.v)};
}
FB_INLINE float horizontal_sum(Vec a) { return _mm512_reduce_add_ps(a.v); }
FB_INLINE Vec load(const bfloat16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
FB_INLINE Vec load(const float16* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
FB_INLINE void store(bfloat16* p, Vec a) {
  // Round to nearest even by hand: vcvtneps2bf16 would flush subnormal numbers.
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded =
      _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i result =
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(result));
}
FB_INLINE void store(float16* p, Vec a) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
// rows[i][j] -> rows[j][i]
FB_INLINE void transpose(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm512_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m512 s[16];
  for (int i = 0; i < 16; i += 4) {
    const auto lo0 = _mm512_castps_pd(t[i]), lo1 = _mm512_castps_pd(t[i + 2]);
    const auto hi0 = _mm512_castps_pd(t[i + 1]), hi1 = _mm512_castps_pd(t[i + 3]);
    s[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(lo0, lo1));
    s[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(lo0, lo1));
    s[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(hi0, hi1));
    s[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(hi0, hi1));
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(s[i], s[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(s[i], s[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(s[i + 8], s[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8].v = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
    r[i + 4].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12].v = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

#elif defined(FB_ISA_AVX2)

constexpr Isa kIsa = Isa::avx2;
constexpr int kLanes = 8;
struct Vec {
  __m256 v;
};
FB_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
FB_INLINE Vec broadcast(float value) { return {_mm256_set1_ps(value)}; }
FB_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
FB_INLINE void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
FB_INLINE Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
FB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
FB_INLINE Vec relu(Vec a) { return {_mm256_max_ps(_mm256_setzero_ps(), a.v)}; }
FB_INLINE Vec where_positive(Vec x, Vec a) {
  return {_mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_setzero_ps(), _CMP_NLE_UQ), a.v)};
}
FB_INLINE float horizontal_sum(Vec a) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
FB_INLINE Vec load(const bfloat16* p) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))};
}
FB_INLINE Vec load(const float16* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
FB_INLINE void store(bfloat16* p, Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(
      _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i result = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
FB_INLINE void store(float16* p, Vec a) {
  _mm_storeu_si128(
      reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
FB_INLINE void transpose(Vec (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i].v, r[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(r[i].v, r[i + 1].v);
  }
  __m256 s[8];
  for (int i = 0; i < 8; i += 4) {
    s[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    s[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    s[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    s[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    r[i + 4].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}

#else

#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // every function that takes a vector is inlined
#endif

// The compiler's own vectors: SSE2, NEON or plain scalars, whatever the target has.
constexpr Isa kIsa = Isa::baseline;
constexpr int kLanes = 8;
typedef float RawVec __attribute__((vector_size(32)));
typedef int32_t RawMask __attribute__((vector_size(32)));
struct Vec {
  RawVec v;
};
FB_INLINE Vec zero() { return {RawVec{}}; }
FB_INLINE Vec broadcast(float value) { return {RawVec{} + value}; }
FB_INLINE Vec load(const float* p) {
  Vec a;
  std::memcpy(&a.v, p, sizeof(a.v));
  return a;
}
FB_INLINE void store(float* p, Vec a) { std::memcpy(p, &a.v, sizeof(a.v)); }
FB_INLINE Vec add(Vec a, Vec b) { return {a.v + b.v}; }
FB_INLINE Vec fma(Vec a, Vec b, Vec c) { return {a.v * b.v + c.v}; }
FB_INLINE Vec relu(Vec a) {
  const RawMask drop = a.v <= RawVec{};
  return {(RawVec)((RawMask)a.v & ~drop)};
}
FB_INLINE Vec where_positive(Vec x, Vec a) {
  const RawMask drop = x.v <= RawVec{};
  return {(RawVec)((RawMask)a.v & ~drop)};
}
FB_INLINE float horizontal_sum(Vec a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
template <class T>
FB_INLINE Vec load(const T* p) {
  Vec a;
  for (int i = 0; i < kLanes; ++i) a.v[i] = to_compute(p[i]);
  return a;
}
template <class T>
FB_INLINE void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = round_to_nearest<T>(a.v[i]);
}
FB_INLINE void transpose(Vec (&r)[8]) {
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < i; ++j) {
      const float upper = r[j].v[i];
      r[j].v[i] = r[i].v[j];
      r[i].v[j] = upper;
    }
  }
}

#endif

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
#if defined(FB_ISA_AVX512)
FB_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}
FB_INLINE Vec load_first(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
}
FB_INLINE void store_first(float* p, int64_t count, Vec a) {
  _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}
#elif defined(FB_ISA_AVX2)
FB_INLINE __m256i first_lanes(int64_t count) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lane);
}
FB_INLINE Vec load_first(const float* p, int64_t count) {
  return {_mm256_maskload_ps(p, first_lanes(count))};
}
// On an AMD core (Zen 3) a masked store takes as long as six plain ones, the mask full or not.
FB_INLINE void store_first(float* p, int64_t count, Vec a) {
  if (count == kLanes) return store(p, a);
  _mm256_maskstore_ps(p, first_lanes(count), a.v);
}
#endif

}  // namespace fastbandit::cpu::FB_ISA
