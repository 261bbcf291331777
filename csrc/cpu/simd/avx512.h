// Vectors of AVX-512; the verbs are those of portable.h.
#pragma once

namespace fastbandit::cpu::FB_ISA {

// ---- float32: Vec ----------------------------------------------------------------------------

constexpr Isa kIsa = Isa::FB_ISA;
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

// The first `count` neighbours in memory, 0 <= count <= kLanes; the other lanes are 0.
FB_INLINE __mmask16 first_lanes(int64_t count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}
FB_INLINE Vec load_first(const float* p, int64_t count) {
  return {_mm512_maskz_loadu_ps(first_lanes(count), p)};
}
FB_INLINE void store_first(float* p, int64_t count, Vec a) {
  _mm512_mask_storeu_ps(p, first_lanes(count), a.v);
}

// Keeps a value that several products use in its register. Left alone, gcc reads it from memory in
// each of them, and an AVX-512 core loads no more vectors than it multiplies: on maps in the cache
// k = 3 took 1.4 times as long. An AVX2 core has the loads to spare, and no register.
FB_INLINE void keep(Vec& a) { __asm__("" : "+v"(a.v)); }

// ---- float64: Reals, their bits as Words, comparisons as Flags ---------------------------------

constexpr int kReals = 8;
struct Reals {
  __m512d v;
  FB_INLINE Reals(__m512d v) : v(v) {}
  FB_INLINE Reals(double value) : v(_mm512_set1_pd(value)) {}
};
struct Words {
  __m512i v;
  FB_INLINE Words(__m512i v) : v(v) {}
  FB_INLINE Words(unsigned long long value)
      : v(_mm512_set1_epi64(static_cast<long long>(value))) {}
};
struct Flags {
  __mmask8 m;
};
FB_INLINE Reals load_reals(const double* p) { return _mm512_load_pd(p); }
FB_INLINE Words load_words(const double* p) { return _mm512_load_si512(p); }
FB_INLINE void store(double* p, Reals a) { _mm512_store_pd(p, a.v); }
FB_INLINE Reals operator+(Reals a, Reals b) { return _mm512_add_pd(a.v, b.v); }
FB_INLINE Reals operator-(Reals a, Reals b) { return _mm512_sub_pd(a.v, b.v); }
FB_INLINE Reals operator*(Reals a, Reals b) { return _mm512_mul_pd(a.v, b.v); }
FB_INLINE Reals operator/(Reals a, Reals b) { return _mm512_div_pd(a.v, b.v); }
FB_INLINE Reals operator-(Reals a) { return _mm512_xor_pd(a.v, _mm512_set1_pd(-0.0)); }
FB_INLINE Reals fused(Reals a, Reals b, Reals c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
FB_INLINE Reals root(Reals a) { return _mm512_sqrt_pd(a.v); }
FB_INLINE Reals larger(Reals a, Reals b) { return _mm512_max_pd(a.v, b.v); }
FB_INLINE Reals smaller(Reals a, Reals b) { return _mm512_min_pd(a.v, b.v); }
FB_INLINE Flags operator>(Reals a, Reals b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)};
}
FB_INLINE Flags operator==(Reals a, Reals b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)};
}
FB_INLINE Flags operator&(Flags a, Flags b) { return {static_cast<__mmask8>(a.m & b.m)}; }
FB_INLINE Flags operator|(Flags a, Flags b) { return {static_cast<__mmask8>(a.m | b.m)}; }
FB_INLINE Flags without(Flags a, Flags b) { return {static_cast<__mmask8>(a.m & ~b.m)}; }
FB_INLINE Reals select(Flags c, Reals yes, Reals no) {
  return _mm512_mask_blend_pd(c.m, no.v, yes.v);
}
FB_INLINE Words operator+(Words a, Words b) { return _mm512_add_epi64(a.v, b.v); }
FB_INLINE Words operator-(Words a, Words b) { return _mm512_sub_epi64(a.v, b.v); }
FB_INLINE Words operator&(Words a, Words b) { return _mm512_and_si512(a.v, b.v); }
FB_INLINE Words operator|(Words a, Words b) { return _mm512_or_si512(a.v, b.v); }
FB_INLINE Words operator>>(Words a, int n) {
  return _mm512_srli_epi64(a.v, static_cast<unsigned>(n));
}
FB_INLINE Words operator<<(Words a, int n) {
  return _mm512_slli_epi64(a.v, static_cast<unsigned>(n));
}
FB_INLINE Words bits_of(Reals a) { return _mm512_castpd_si512(a.v); }
FB_INLINE Reals from_bits(Words a) { return _mm512_castsi512_pd(a.v); }
FB_INLINE Flags highest_bits(Words a) { return {_mm512_movepi64_mask(a.v)}; }
FB_INLINE void store(double* p, Flags a) {
  _mm512_store_si512(p, _mm512_movm_epi64(a.m));
}
// As signed numbers.
FB_INLINE Reals to_reals(Words a) { return _mm512_cvtepi64_pd(a.v); }

}  // namespace fastbandit::cpu::FB_ISA
