// Numbers to bits and back.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/binary_problem.h"

namespace fastbandit::cpu::FB_ISA {

// One bit for each lane of x that is at least t; none for NaN.
FB_INLINE uint32_t reached_lanes(Vec x, Vec t) {
#if defined(FB_ISA_AVX512)
  return _mm512_cmp_ps_mask(x.v, t.v, _CMP_GE_OQ);
#elif defined(FB_ISA_AVX2)
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.v, t.v, _CMP_GE_OQ)));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(x.v[i] >= t.v[i]) << i;
  return bits;
#endif
}

// 64 neighbouring channels.
template <class T>
FB_INLINE uint64_t pack_word(const T* x, const float* threshold) {
#if defined(FB_ISA_AVX2)
  if constexpr (sizeof(T) == 4) {
    // Comparisons narrowed to bytes: fewer instructions than a mask for each vector.
    __m256i bytes[2];
    FB_UNROLL
    for (int half = 0; half < 2; ++half) {
      __m256i m[4];
      FB_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int at = half * 32 + i * 8;
        const Vec t = threshold ? load(threshold + at) : zero();
        m[i] = _mm256_castps_si256(_mm256_cmp_ps(load(x + at).v, t.v, _CMP_GE_OQ));
      }
      bytes[half] = _mm256_packs_epi16(_mm256_packs_epi32(m[0], m[1]),
                                       _mm256_packs_epi32(m[2], m[3]));
      bytes[half] = _mm256_permutevar8x32_epi32(bytes[half],
                                                _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    }
    const uint32_t low = static_cast<uint32_t>(_mm256_movemask_epi8(bytes[0]));
    const uint32_t high = static_cast<uint32_t>(_mm256_movemask_epi8(bytes[1]));
    return low | static_cast<uint64_t>(high) << 32;
  }
#endif
  uint64_t word = 0;
  FB_UNROLL
  for (int i = 0; i < kWordBits; i += kLanes)
    word |= static_cast<uint64_t>(
                reached_lanes(load(x + i), threshold ? load(threshold + i) : zero()))
            << i;
  return word;
}

// The last `count` < 64 channels of a pixel.
template <class T>
FB_INLINE uint64_t pack_part(const T* x, const float* threshold, int64_t count) {
  uint64_t word = 0;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    word |= static_cast<uint64_t>(
                reached_lanes(load(x + i), threshold ? load(threshold + i) : zero()))
            << i;
  for (; i < count; ++i)
    word |= static_cast<uint64_t>(to_compute(x[i]) >= (threshold ? threshold[i] : 0.0f)) << i;
  return word;
}

// Pixels of V vectors of channels, less than a word.
template <int V, class T>
void pack_few(const SignMap& map, const T* row, uint64_t* to) {
  const float* const threshold = static_cast<const float*>(map.threshold);
  Vec t[V];
  FB_UNROLL
  for (int v = 0; v < V; ++v) t[v] = threshold ? load(threshold + v * kLanes) : zero();
  for (int64_t w = 0; w < map.w; ++w, row += map.stride_w) {
    uint64_t word = 0;
    FB_UNROLL
    for (int v = 0; v < V; ++v)
      word |= static_cast<uint64_t>(reached_lanes(load(row + v * kLanes), t[v])) << v * kLanes;
    to[w] = word;
  }
}

template <class T>
void pack_pixels(const SignMap& map, const T* row, uint64_t* to) {
  if (map.c == kLanes) return pack_few<1>(map, row, to);
  if (map.c == 2 * kLanes) return pack_few<2>(map, row, to);
  if (kLanes == 8 && map.c == 4 * kLanes) return pack_few<4>(map, row, to);
  const float* const threshold = static_cast<const float*>(map.threshold);
  for (int64_t w = 0; w < map.w; ++w, row += map.stride_w) {
    int64_t c = 0;
    for (; c + kWordBits <= map.c; c += kWordBits)
      *to++ = pack_word(row + c, threshold ? threshold + c : nullptr);
    if (c < map.c) *to++ = pack_part(row + c, threshold ? threshold + c : nullptr, map.c - c);
  }
}

// Any strides: a run of pixels at a time, a channel after another, the highest first, is shifted
// into the words, each of which is two halves so that its lanes are as wide as a float.
template <class T>
void pack_planes(const SignMap& map, const T* row, uint64_t* to) {
  using C = compute_t<T>;
  constexpr int kRun = 16;
  const C* const threshold = static_cast<const C*>(map.threshold);
  const int64_t words = sign_words(map.c);
  for (int64_t w = 0; w < map.w; w += kRun) {
    const int64_t count = std::min<int64_t>(kRun, map.w - w);
    const T* const pixels = row + w * map.stride_w;
    for (int64_t word = 0; word < words; ++word) {
      uint32_t half[2][kRun] = {};
      for (int part = 0; part < 2; ++part) {
        const int64_t begin = word * kWordBits + part * 32, end = std::min(map.c, begin + 32);
        for (int64_t c = end - 1; c >= begin; --c) {
          const T* const x = pixels + c * map.stride_c;
          const C t = threshold ? threshold[c] : C{0};
          if (map.stride_w == 1 && count == kRun) {
            for (int i = 0; i < kRun; ++i)
              half[part][i] = half[part][i] * 2 + (to_compute(x[i]) >= t ? 1u : 0u);
          } else {
            for (int64_t i = 0; i < count; ++i)
              half[part][i] = half[part][i] * 2 + (to_compute(x[i * map.stride_w]) >= t ? 1u : 0u);
          }
        }
      }
      for (int64_t i = 0; i < count; ++i)
        to[(w + i) * words + word] = half[0][i] | static_cast<uint64_t>(half[1][i]) << 32;
    }
  }
}

template <class T>
void pack_rows(const SignMap& map, int64_t begin, int64_t end) {
  const int64_t row_words = map.w * sign_words(map.c);
  for (int64_t at = begin; at < end; ++at) {
    const T* const row = static_cast<const T*>(map.values) + at / map.h * map.stride_n +
                         at % map.h * map.stride_h;
    uint64_t* const to = map.bits + at * row_words;
    if constexpr (sizeof(T) < 8) {
      if (map.stride_c == 1 && map.c > 1) {
        pack_pixels(map, row, to);
        continue;
      }
    }
    pack_planes(map, row, to);
  }
}

inline void pack_signs(const SignMap& map, int64_t begin, int64_t end) {
  switch (map.type) {
    case Real::kFloat32: return pack_rows<float>(map, begin, end);
    case Real::kBFloat16: return pack_rows<bfloat16>(map, begin, end);
    case Real::kFloat16: return pack_rows<float16>(map, begin, end);
    case Real::kFloat64: return pack_rows<double>(map, begin, end);
  }
}

// A number is made from bits: the sign in front of those of 1.
template <class U>
void unpack_rows(const SignMap& map, U one, int64_t begin, int64_t end) {
  constexpr int kSign = 8 * sizeof(U) - 1;
  const int64_t words = sign_words(map.c);
  for (int64_t at = begin; at < end; ++at) {
    U* const row =
        static_cast<U*>(map.values) + at / map.h * map.stride_n + at % map.h * map.stride_h;
    const uint64_t* const from = map.bits + at * map.w * words;
    if (map.stride_c == 1) {
      for (int64_t w = 0; w < map.w; ++w) {
        for (int64_t c = 0; c < map.c; c += 32) {
          const uint32_t minus =
              ~static_cast<uint32_t>(from[w * words + c / kWordBits] >> (c % kWordBits));
          U* const to = row + w * map.stride_w + c;
          const int64_t count = std::min<int64_t>(32, map.c - c);
          if (count == 32) {
            for (int i = 0; i < 32; ++i)
              to[i] = static_cast<U>(one | static_cast<U>(minus >> i & 1) << kSign);
          } else {
            for (int64_t i = 0; i < count; ++i)
              to[i] = static_cast<U>(one | static_cast<U>(minus >> i & 1) << kSign);
          }
        }
      }
    } else {
      for (int64_t c = 0; c < map.c; ++c) {
        U* const to = row + c * map.stride_c;
        const uint64_t* const word = from + c / kWordBits;
        for (int64_t w = 0; w < map.w; ++w)
          to[w * map.stride_w] = static_cast<U>(
              one | static_cast<U>(~word[w * words] >> (c % kWordBits) & 1) << kSign);
      }
    }
  }
}

inline void unpack_signs(const SignMap& map, int64_t begin, int64_t end) {
  switch (map.type) {
    case Real::kFloat32: return unpack_rows<uint32_t>(map, 0x3f800000u, begin, end);
    case Real::kBFloat16: return unpack_rows<uint16_t>(map, 0x3f80, begin, end);
    case Real::kFloat16: return unpack_rows<uint16_t>(map, 0x3c00, begin, end);
    case Real::kFloat64:
      return unpack_rows<uint64_t>(map, uint64_t{0x3ff} << 52, begin, end);
  }
}

}  // namespace fastbandit::cpu::FB_ISA
