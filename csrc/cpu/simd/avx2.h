// Vectors of AVX2; the verbs are those of portable.h.
#pragma once

namespace fastbandit::cpu::FB_ISA {

// ---- float32: Vec ----------------------------------------------------------------------------

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

// The first `count` neighbours in memory, 0 <= count <= kLanes; the other lanes are 0.
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

FB_INLINE void keep(Vec&) {}

// ---- float64: Reals, their bits as Words, comparisons as Flags ---------------------------------

constexpr int kReals = 4;
struct Reals {
  __m256d v;
  FB_INLINE Reals(__m256d v) : v(v) {}
  FB_INLINE Reals(double value) : v(_mm256_set1_pd(value)) {}
};
struct Words {
  __m256i v;
  FB_INLINE Words(__m256i v) : v(v) {}
  FB_INLINE Words(unsigned long long value)
      : v(_mm256_set1_epi64x(static_cast<long long>(value))) {}
};
struct Flags {
  __m256d m;
};
FB_INLINE Reals load_reals(const double* p) { return _mm256_load_pd(p); }
FB_INLINE Words load_words(const double* p) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
}
FB_INLINE void store(double* p, Reals a) { _mm256_store_pd(p, a.v); }
FB_INLINE Reals operator+(Reals a, Reals b) { return _mm256_add_pd(a.v, b.v); }
FB_INLINE Reals operator-(Reals a, Reals b) { return _mm256_sub_pd(a.v, b.v); }
FB_INLINE Reals operator*(Reals a, Reals b) { return _mm256_mul_pd(a.v, b.v); }
FB_INLINE Reals operator/(Reals a, Reals b) { return _mm256_div_pd(a.v, b.v); }
FB_INLINE Reals operator-(Reals a) { return _mm256_xor_pd(a.v, _mm256_set1_pd(-0.0)); }
FB_INLINE Reals fused(Reals a, Reals b, Reals c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
FB_INLINE Reals root(Reals a) { return _mm256_sqrt_pd(a.v); }
FB_INLINE Reals larger(Reals a, Reals b) { return _mm256_max_pd(a.v, b.v); }
FB_INLINE Reals smaller(Reals a, Reals b) { return _mm256_min_pd(a.v, b.v); }
FB_INLINE Flags operator>(Reals a, Reals b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
FB_INLINE Flags operator==(Reals a, Reals b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
FB_INLINE Flags operator&(Flags a, Flags b) { return {_mm256_and_pd(a.m, b.m)}; }
FB_INLINE Flags operator|(Flags a, Flags b) { return {_mm256_or_pd(a.m, b.m)}; }
FB_INLINE Flags without(Flags a, Flags b) { return {_mm256_andnot_pd(b.m, a.m)}; }
FB_INLINE Reals select(Flags c, Reals yes, Reals no) {
  return _mm256_blendv_pd(no.v, yes.v, c.m);
}
FB_INLINE Words operator+(Words a, Words b) { return _mm256_add_epi64(a.v, b.v); }
FB_INLINE Words operator-(Words a, Words b) { return _mm256_sub_epi64(a.v, b.v); }
FB_INLINE Words operator&(Words a, Words b) { return _mm256_and_si256(a.v, b.v); }
FB_INLINE Words operator|(Words a, Words b) { return _mm256_or_si256(a.v, b.v); }
FB_INLINE Words operator>>(Words a, int n) { return _mm256_srli_epi64(a.v, n); }
FB_INLINE Words operator<<(Words a, int n) { return _mm256_slli_epi64(a.v, n); }
FB_INLINE Words bits_of(Reals a) { return _mm256_castpd_si256(a.v); }
FB_INLINE Reals from_bits(Words a) { return _mm256_castsi256_pd(a.v); }
FB_INLINE Flags highest_bits(Words a) { return {_mm256_castsi256_pd(a.v)}; }
FB_INLINE void store(double* p, Flags a) { _mm256_store_pd(p, a.m); }
// As signed numbers: the upper 16 bits as a multiple of 2^48, exact beside 3 * 2^67, and the lower
// 48 beside 2^52; the only rounding is that of the last sum.
FB_INLINE Reals to_reals(Words a) {
  const __m256i high = _mm256_blend_epi16(_mm256_srai_epi32(a.v, 16), _mm256_setzero_si256(), 0x33);
  const __m256i low = _mm256_blend_epi16(a.v, _mm256_castpd_si256(_mm256_set1_pd(0x1p52)), 0x88);
  const __m256i placed = _mm256_add_epi64(high, _mm256_castpd_si256(_mm256_set1_pd(0x3p67)));
  const __m256d upper = _mm256_sub_pd(_mm256_castsi256_pd(placed), _mm256_set1_pd(0x3p67 + 0x1p52));
  return _mm256_add_pd(upper, _mm256_castsi256_pd(low));
}

}  // namespace fastbandit::cpu::FB_ISA
