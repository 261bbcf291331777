// The kernels of pool_problem.h, compiled once for each instruction set (see cpu/isa.h).
#include <limits>
#include <type_traits>

#include "cpu/simd/simd.h"
#include "cpu/pool_problem.h"

namespace fastbandit::cpu::FB_ISA {

// Vectors of L lanes in the form of the compiler, which compares and chooses in any of them.
template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L), aligned(4), may_alias));
  typedef int32_t Int __attribute__((vector_size(4 * L), aligned(4), may_alias));
  typedef uint8_t Byte __attribute__((vector_size(L), aligned(1), may_alias));
};

// Between bytes and lanes; the compiler by itself would go lane by lane.
template <int L>
FB_INLINE typename Lanes<L>::Int load_bytes(const uint8_t* p) {
#if defined(FB_ISA_AVX512)
  if constexpr (L == 16)
    return (typename Lanes<L>::Int)_mm512_cvtepu8_epi32(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
#if defined(FB_ISA_AVX512) || defined(FB_ISA_AVX2)
  if constexpr (L == 8)
    return (typename Lanes<L>::Int)_mm256_cvtepu8_epi32(
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#endif
  return __builtin_convertvector(
      *reinterpret_cast<const typename Lanes<L>::Byte*>(p), typename Lanes<L>::Int);
}

template <int L>
FB_INLINE void store_bytes(uint8_t* p, typename Lanes<L>::Int lanes) {
#if defined(FB_ISA_AVX512)
  if constexpr (L == 16)
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)lanes));
  if constexpr (L == 8)
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_cvtepi32_epi8((__m256i)lanes));
#endif
  *reinterpret_cast<typename Lanes<L>::Byte*>(p) =
      __builtin_convertvector(lanes, typename Lanes<L>::Byte);
}

template <int L>
FB_INLINE void largest_at(const Taps& taps, const float* x, int64_t i, float* y,
                          uint8_t* which) {
  using V = Lanes<L>;
  typename V::Float best = typename V::Float{} - std::numeric_limits<float>::infinity();
  typename V::Int won = typename V::Int{} + taps.tap[0];
  for (int k = 0; k < taps.count; ++k) {
    const auto value = *reinterpret_cast<const typename V::Float*>(x + taps.at[k] + i);
    const typename V::Int takes = (value > best) | (value != value);
    best = takes ? value : best;
    won = takes ? typename V::Int{} + taps.tap[k] : won;
  }
  *reinterpret_cast<typename V::Float*>(y + i) = best;
  store_bytes<L>(which + i, won);
}

template <int L>
FB_INLINE void gather_at(const Taps& taps, const float* grad, const uint8_t* which, int64_t i,
                         float* to) {
  using V = Lanes<L>;
  typename V::Float sum{};
  for (int k = 0; k < taps.count; ++k) {
    const auto g = *reinterpret_cast<const typename V::Float*>(grad + taps.at[k] + i);
    const auto won = load_bytes<L>(which + taps.at[k] + i);
    sum += won == typename V::Int{} + taps.tap[k] ? g : typename V::Float{};
  }
  *reinterpret_cast<typename V::Float*>(to + i) = sum;
}

// f(lanes as a type, first value) for a run of `count` values.
template <class F>
FB_INLINE void for_lanes(int64_t count, const F& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(std::integral_constant<int, kLanes>{}, i);
  if (kLanes > 8 && i + 8 <= count) f(std::integral_constant<int, 8>{}, i), i += 8;
  for (; i < count; ++i) f(std::integral_constant<int, 1>{}, i);
}

inline void largest(const Taps& taps, const float* x, int64_t count, float* y, uint8_t* which) {
  for_lanes(count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    largest_at<decltype(lanes)::value>(taps, x, i, y, which);
  });
}

inline void gather(const Taps& taps, const float* grad, const uint8_t* which, int64_t count,
                   float* to) {
  for_lanes(count, [&](auto lanes, int64_t i) __attribute__((always_inline)) {
    gather_at<decltype(lanes)::value>(taps, grad, which, i, to);
  });
}

inline PoolKernels make_pool_table() { return {&largest, &gather}; }

}  // namespace fastbandit::cpu::FB_ISA

namespace fastbandit::cpu {

template <>
const PoolKernels& kernels_for<PoolKernels, FB_ISA::kIsa>() {
  static const PoolKernels table = FB_ISA::make_pool_table();
  return table;
}

}  // namespace fastbandit::cpu

#include "cpu/simd/end.h"
