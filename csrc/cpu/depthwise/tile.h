// What the inner loops of all directions share: views, the edges of a tile, and the shapes that are
// unrolled.
#pragma once

#include "cpu/conv_problem.h"
#include "cpu/simd/simd.h"

namespace fastbandit::cpu::FB_ISA {

// Rows of a map seen by the inner loops: row r starts at data + r * row, pixels are `pixel` apart.
struct View {
  const float* data;
  int64_t row, pixel;
};

// Bit t tells whether position first + t lies in [0, size).
FB_INLINE uint64_t valid_bits(int64_t first, int64_t size) {
  const int64_t low = std::min<int64_t>(std::max<int64_t>(-first, 0), 63);
  const int64_t high = std::min<int64_t>(std::max<int64_t>(size - first, 0), 63);
  return high > low ? ((uint64_t{1} << high) - (uint64_t{1} << low)) : 0;
}

// Keeps the compiler from turning a walking pointer into one saved offset for each position.
template <class T>
FB_INLINE void opaque(T*& p) {
  __asm__("" : "+r"(p));
}

// With AVX-512 16 sums, up to 7 taps and the input in 32 registers.
constexpr int kTile = kIsa == Isa::avx512 ? 16 : 8;

// A tile looks at some positions of a row. Which of them lie in the map is known to the compiler
// (all but the first LOW and the last HIGH), or is asked at each: tests that took up to two
// fifths of the time. In the maps of a small network nearly every tile touches an edge.
template <int LOW, int HIGH>
struct Inside {
  static constexpr bool kKnown = true;
  static constexpr bool at(int t, int span, uint64_t /*valid*/) {
    return t >= LOW && t < span - HIGH;
  }
};
struct Asked {
  static constexpr bool kKnown = false;
  static FB_INLINE bool at(int t, int /*span*/, uint64_t valid) { return valid >> t & 1; }
};

// Each kind of edge costs compile time; vectors without a multiply-add are slow enough to ask.
constexpr bool kKnowsEdges = kIsa != Isa::baseline;

// How many positions lie outside on either side of a stride-1 convolution that keeps the size of
// its map; 0 where it makes no difference.
constexpr int same_padding(int k, int d, int s) {
  return kKnowsEdges && s == 1 ? (k - 1) * d / 2 : 0;
}

// Calls run(edge) for a tile whose first position is `low`, with `over` positions past the end.
// PAD: same_padding.
template <int PAD, class F>
FB_INLINE void with_edge(int64_t low, int64_t over, const F& run) {
  if (low >= 0 && over <= 0) return run(Inside<0, 0>{});
  if constexpr (PAD > 0) {
    if (low == -PAD && over <= 0) return run(Inside<PAD, 0>{});
    if (low >= 0 && over == PAD) return run(Inside<0, PAD>{});
    if (low == -PAD && over == PAD) return run(Inside<PAD, PAD>{});
  }
  run(Asked{});
}

template <int K, int D, int S>
struct Shape {};

// Calls f(K, D, S) as constants where the shape is one of the unrolled ones; else returns false.
// Each shape costs compile time three times over, so Gabor filters are unrolled only for stride 1
// and dilation 1, and the instruction sets without FMA only for stride 1.
template <bool SHARED, class F>
bool with_shape(const ConvProblem& p, const F& f) {
  if (p.kernel_h != p.kernel_w || p.stride_h != p.stride_w || p.dilation_h != p.dilation_w) {
    return false;
  }
  const int64_t d = p.kernel_w == 1 ? 1 : p.dilation_w;  // one tap has no dilation
  if (d > 2 || p.stride_w > 2) return false;
#define FB_SHAPE(K, D, S)                             \
  if (p.kernel_w == K && d == D && p.stride_w == S) { \
    f(Shape<K, D, S>{});                              \
    return true;                                      \
  }
  FB_SHAPE(3, 1, 1)
  FB_SHAPE(5, 1, 1)
  FB_SHAPE(7, 1, 1)
  if constexpr (!SHARED) {
    FB_SHAPE(1, 1, 1)
    FB_SHAPE(3, 2, 1)
    FB_SHAPE(5, 2, 1)
    FB_SHAPE(7, 2, 1)
  }
  if constexpr (!SHARED && kIsa != Isa::baseline) {
    FB_SHAPE(1, 1, 2)
    FB_SHAPE(3, 1, 2)
    FB_SHAPE(5, 1, 2)
    FB_SHAPE(7, 1, 2)
    FB_SHAPE(3, 2, 2)
    FB_SHAPE(5, 2, 2)
    FB_SHAPE(7, 2, 2)
  }
#undef FB_SHAPE
  return false;
}

}  // namespace fastbandit::cpu::FB_ISA
