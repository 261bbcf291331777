// The forward: its inner loops and its items.
#pragma once

#include "cpu/depthwise/plan.h"
#include "cpu/depthwise/scratch.h"

namespace fastbandit::cpu::FB_ISA {

// y[u] = sum_ij weight[i][j] * x[i][u * S + j * D - pad] for `count` <= T pixels from x column x0,
// all of them where the tile is Inside. BX: the input is one value for all lanes (Gabor).
template <int K, int D, int S, int T, bool RELU, bool BX, class Edge>
FB_INLINE void forward_tile(const float* const* rows, int64_t pixel, int64_t x0, int64_t width,
                            const float* weight, float* out, int64_t out_pixel, int64_t count) {
  constexpr int kSpan = (T - 1) * S + (K - 1) * D + 1;
  static_assert(kSpan <= 63, "valid_bits holds 63 positions");
  const uint64_t valid = Edge::kKnown ? 0 : valid_bits(x0, width);
  Vec sum[T];
  FB_UNROLL
  for (int u = 0; u < T; ++u) sum[u] = zero();
  for (int i = 0; i < K; ++i) {
    const float* p = rows[i];
    if (!p) continue;
    p += x0 * pixel;
    Vec tap[K];
    FB_UNROLL
    for (int j = 0; j < K; ++j) tap[j] = load(weight + (i * K + j) * kLanes);
    FB_UNROLL
    for (int t = 0; t < kSpan; ++t, p += pixel) {
      opaque(p);
      if (!Edge::at(t, kSpan, valid)) continue;
      Vec v = BX ? broadcast(*p) : load(p);
      if (RELU) v = relu(v);
      keep(v);
      FB_UNROLL
      for (int j = 0; j < K; ++j) {
        const int u = t - j * D;
        if (u >= 0 && u % S == 0 && u / S < T) sum[u / S] = fma(tap[j], v, sum[u / S]);
      }
    }
  }
  FB_UNROLL
  for (int u = 0; u < T; ++u, out += out_pixel) {
    opaque(out);
    if (Edge::kKnown || u < count) store(out, sum[u]);
  }
}

using ForwardRow = void (*)(const ConvProblem& p, const float* const* rows, int64_t pixel,
                            const float* weight, float* out, int64_t out_pixel);

template <int K, int D, int S, bool RELU, bool BX>
void forward_row(const ConvProblem& p, const float* const* rows, int64_t pixel, const float* weight,
                 float* out, int64_t out_pixel) {
  constexpr int kFull = S == 1 ? kTile : kTile / 2, kHalf = kFull / 2;
  constexpr int kPad = same_padding(K, D, S);
  for (int64_t u = 0; u < p.ow;) {
    const int64_t left = p.ow - u, x0 = u * S - p.pad_w;
    float* o = out + u * out_pixel;
    const auto run = [&](auto tile, auto edge) FB_INLINE_LAMBDA {
      forward_tile<K, D, S, tile(), RELU, BX, decltype(edge)>(
          rows, pixel, x0, p.w, weight, o, out_pixel, left);
      u += tile();
    };
    const std::integral_constant<int, kFull> full;
    const std::integral_constant<int, kHalf> half;
    if (left >= kFull) {
      with_edge<kPad>(x0, x0 + (kFull - 1) * S + (K - 1) * D + 1 - p.w,
                      [&](auto edge) FB_INLINE_LAMBDA { run(full, edge); });
    } else if (left > kHalf) {
      run(full, Asked{});
    } else if (kPad > 0 && left == kHalf && x0 == -kPad && p.w == kHalf) {
      run(half, Inside<kPad, kPad>{});  // a whole row of a small map
    } else {
      run(half, Asked{});
    }
  }
}

template <bool RELU, bool BX>
void forward_row_any(const ConvProblem& p, const float* const* rows, int64_t pixel,
                     const float* weight, float* out, int64_t out_pixel) {
  for (int64_t u = 0; u < p.ow; ++u) {
    Vec sum = zero();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      if (!rows[i]) continue;
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t x = u * p.stride_w + j * p.dilation_w - p.pad_w;
        if (x < 0 || x >= p.w) continue;
        Vec v = BX ? broadcast(rows[i][x * pixel]) : load(rows[i] + x * pixel);
        if (RELU) v = relu(v);
        sum = fma(load(weight + (i * p.kernel_w + j) * kLanes), v, sum);
      }
    }
    store(out + u * out_pixel, sum);
  }
}

template <bool RELU, bool BX, int K, int D, int S>
constexpr ForwardRow forward_row_of(Shape<K, D, S>) {
  return &forward_row<K, D, S, RELU, BX>;
}
template <bool RELU, bool BX>
ForwardRow find_forward(const ConvProblem& p) {
  ForwardRow row = &forward_row_any<RELU, BX>;
  with_shape<BX>(p, [&](auto shape) { row = forward_row_of<RELU, BX>(shape); });
  return row;
}

inline void forward_block(const ConvProblem& p, const Blocks& blocks, const Array4& x,
                          const float* packed, const Array4& y, int64_t image, int64_t block,
                          int64_t h0, int64_t h1, ForwardRow row, const float** rows) {
  const LaneSet lanes(p, blocks, image, block);
  const RowRange in = rows_in(p, h0, h1);
  const int64_t row_floats = p.w * kLanes, out_floats = p.ow * kLanes;
  float* source = scratch(kScratchIn, (in.end - in.begin) * row_floats);
  float* target = scratch(kScratchOut, (h1 - h0) * out_floats);
  gather(p, x, lanes, in.begin, in.end - in.begin, p.w, p.relu, source);
  const View view{source - in.begin * row_floats, row_floats, kLanes};
  const float* weight =
      packed + block % blocks.patterns * p.kernel_h * p.kernel_w * kLanes;
  for (int64_t h = h0; h < h1; ++h) {
    forward_pointers(p, view, h, rows);
    row(p, rows, kLanes, weight, target + (h - h0) * out_floats, kLanes);
  }
  scatter(p, y, lanes, h0, h1 - h0, p.ow, target);
}

inline void forward(const ConvProblem& p, const Array4& x, const float* packed, const Array4& y,
                    int64_t begin, int64_t end) {
  const MapItems items = forward_plan(p, x, y);
  const Blocks& blocks = items.blocks;
  const ForwardRow plain = find_forward<false, false>(p);
  const ForwardRow fused = p.relu ? find_forward<true, false>(p) : plain;
  const bool far = outgrows_cache(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h0 = item % items.pieces * items.per_piece;
    const int64_t h1 = std::min(p.oh, h0 + items.per_piece), other = item / items.pieces;
    if (!items.direct) {
      forward_block(p, blocks, x, packed, y, other / blocks.count, other % blocks.count, h0, h1,
                    plain, rows);
      continue;
    }
    const float* image = static_cast<const float*>(x.data) + other * x.n;
    float* out = static_cast<float*>(y.data) + other * y.n;
    const int64_t full = p.c / kLanes;
    const int64_t x_rows = rows_from(x, p.n, other, p.h), y_rows = rows_from(y, p.n, other, p.oh);
    for (int64_t h = h0; h < h1; ++h) {
      // The rows after the last ones that this row of y needs.
      const int64_t ahead = h * p.stride_h + (p.kernel_h - 1) * p.dilation_h - p.pad_h + 1;
      const int64_t next = std::max<int64_t>(0, ahead + p.stride_h);
      const int64_t next_end = std::min(next + p.stride_h, x_rows);
      for (int64_t b = 0; b < full; ++b) {
        if (far) {
          prefetch_rows<false>(image, x, p.c, p.w, next, next_end, b, full);
          prefetch_rows<true>(out, y, p.c, p.ow, h + 2, std::min(h + 3, y_rows), b, full);
        }
        forward_pointers(p, {image + b * kLanes, x.h, x.w}, h, rows);
        fused(p, rows, x.w, packed + b * taps, out + b * kLanes + h * y.h, y.w);
      }
    }
    if (full < blocks.count) {
      forward_block(p, blocks, x, packed, y, other, full, h0, h1, plain, rows);
    }
  }
}

}  // namespace fastbandit::cpu::FB_ISA
