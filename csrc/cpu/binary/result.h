// From counts of differing bits to results: numbers or bits.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/binary_problem.h"

namespace fastbandit::cpu::FB_ISA {

// 64 bytes that are 0 or 1, as bits.
FB_INLINE uint64_t bits_of_bytes(const uint8_t* ones) {
#if defined(FB_ISA_AVX512)
  const __m512i v = _mm512_loadu_si512(ones);
  return _mm512_test_epi8_mask(v, v);
#elif defined(FB_ISA_AVX2)
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + 32));
  const uint32_t a = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(low, 7)));
  const uint32_t b = static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(high, 7)));
  return a | static_cast<uint64_t>(b) << 32;
#else
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(ones[i]) << i;
  return word;
#endif
}

#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
// Eight counts as integers of 32 bits, sixteen as such of 16.
FB_INLINE __m256i load_counts(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
FB_INLINE __m256i load_counts(const uint16_t* p) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FB_INLINE __m256i load_counts(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FB_INLINE __m256i load_short_counts(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FB_INLINE __m256i load_short_counts(const uint16_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
#endif

// The results of `count` filters from `first` on, for pixels whose counts lie `row` apart.
template <class T, class Count>
FB_INLINE void write_numbers(const SignResult& result, int64_t pixel, int64_t pixels,
                             int64_t filters, int64_t first, int64_t count, const int32_t* sums,
                             const Count* differing, int64_t row) {
  using C = compute_t<T>;
  const C* const scale = static_cast<const C*>(result.scale) + first;
  const C* const bias = static_cast<const C*>(result.bias) + first;
  for (int64_t p = 0; p < pixels; ++p, differing += row) {
    T* const to = static_cast<T*>(result.values) + (pixel + p) * filters + first;
    const int32_t sum = sums[p];
    int64_t i = 0;
#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
    if constexpr (std::is_same_v<T, float>) {
      for (const __m256i all = _mm256_set1_epi32(sum); i + 8 <= count; i += 8) {
        const __m256i twice = _mm256_slli_epi32(load_counts(differing + i), 1);
        const __m256 dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(all, twice));
        const __m256 product = _mm256_mul_ps(_mm256_loadu_ps(scale + i), dot);
        _mm256_storeu_ps(to + i, _mm256_add_ps(product, _mm256_loadu_ps(bias + i)));
      }
    }
#endif
#pragma GCC ivdep
    for (; i < count; ++i) {
      const C dot = static_cast<C>(sum - 2 * static_cast<int32_t>(differing[i]));
      to[i] = round_to_nearest<T>(scale[i] * dot + bias[i]);
    }
  }
}

// A word of bits of the filters from `first` on, `count` <= 64 of them.
template <class Count>
FB_INLINE uint64_t reached_bits(const SignResult& result, int64_t first, int64_t count, int32_t sum,
                                const Count* differing) {
  uint64_t word = 0;
  int64_t i = 0;
#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
  if constexpr (sizeof(Count) < 4) {
    if (result.below != nullptr) {
      const int16_t* const below = result.below + first;
      const __m256i all = _mm256_set1_epi16(static_cast<int16_t>(sum));
      const auto reached = [&](int64_t at) __attribute__((always_inline)) {
        const __m256i count = load_short_counts(differing + at);
        const __m256i dot = _mm256_sub_epi16(all, _mm256_add_epi16(count, count));
        return _mm256_cmpgt_epi16(
            dot, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(below + at)));
      };
      for (; i + 32 <= count; i += 32) {
        const __m256i bytes = _mm256_permute4x64_epi64(
            _mm256_packs_epi16(reached(i), reached(i + 16)), 0xd8);
        word |= static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(bytes))) << i;
      }
    }
  }
#endif
  for (; i < count; ++i)
    word |= static_cast<uint64_t>(sum - 2 * static_cast<int32_t>(differing[i]) >=
                                  result.threshold[first + i])
            << i;
  const uint64_t mask = count == kWordBits ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
  return (word ^ result.flips[first / kWordBits]) & mask;
}

// The results of `pixels` pixels for the filters [first, first + count): `differing` are their counts,
// `row` from one pixel to the next, `sums` those of no differing bit. For bits `first` is a multiple
// of 64. Not inlined: it is the same for every tile.
template <class Count>
__attribute__((noinline)) void write_results(const SignResult& result, int64_t pixel,
                                             int64_t pixels, int64_t filters, int64_t first,
                                             int64_t count, const int32_t* sums,
                                             const Count* differing, int64_t row) {
  if (result.bits != nullptr) {
    const int64_t words = sign_words(filters);
    for (int64_t p = 0; p < pixels; ++p, differing += row) {
      uint64_t* const to = result.bits + (pixel + p) * words + first / kWordBits;
      for (int64_t i = 0; i < count; i += kWordBits)
        to[i / kWordBits] = reached_bits(result, first + i, std::min(kWordBits, count - i),
                                         sums[p], differing + i);
    }
    return;
  }
  const auto write = [&](auto number) __attribute__((always_inline)) {
    write_numbers<decltype(number)>(result, pixel, pixels, filters, first, count, sums, differing,
                                    row);
  };
  switch (result.type) {
    case Real::kFloat32: return write(float{});
    case Real::kBFloat16: return write(bfloat16{});
    case Real::kFloat16: return write(float16{});
    case Real::kFloat64: return write(double{});
  }
}

}  // namespace fastbandit::cpu::FB_ISA
