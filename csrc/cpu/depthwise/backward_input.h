// The gradient of the input: its inner loops and its items.
#pragma once

#include "cpu/depthwise/plan.h"
#include "cpu/depthwise/scratch.h"

namespace fastbandit::cpu::FB_ISA {

// grad_x[u] = sum_ij weight[i][j] * grad[i][v] with v * S + j * D = u, seen from a tile whose first
// column is a multiple of S after the padding. ADD: added to out (sums over blocks of channels).
template <int K, int D, int S, int T, bool MASK, bool ADD, class Edge>
FB_INLINE void backward_input_tile(const float* const* rows, int64_t pixel, int64_t v0,
                                   int64_t width, const float* weight, float* out,
                                   int64_t out_pixel, const float* mask, int64_t mask_pixel,
                                   int64_t first, int64_t count) {
  constexpr int kLow = (K - 1) * D / S, kSpan = kLow + (T - 1) / S + 1;
  static_assert(kSpan <= 63, "valid_bits holds 63 positions");
  const uint64_t valid = Edge::kKnown ? 0 : valid_bits(v0 - kLow, width);
  Vec sum[T];
  FB_UNROLL
  for (int u = 0; u < T; ++u) sum[u] = zero();
  for (int i = 0; i < K; ++i) {
    const float* p = rows[i];
    if (!p) continue;
    p += (v0 - kLow) * pixel;
    Vec tap[K];
    FB_UNROLL
    for (int j = 0; j < K; ++j) tap[j] = load(weight + (i * K + j) * kLanes);
    FB_UNROLL
    for (int t = 0; t < kSpan; ++t, p += pixel) {
      opaque(p);
      if (!Edge::at(t, kSpan, valid)) continue;
      Vec g = load(p);
      keep(g);
      FB_UNROLL
      for (int j = 0; j < K; ++j) {
        const int u = (t - kLow) * S + j * D;
        if (u >= 0 && u < T) sum[u] = fma(tap[j], g, sum[u]);
      }
    }
  }
  FB_UNROLL
  for (int u = 0; u < T; ++u, out += out_pixel, mask += MASK ? mask_pixel : 0) {
    opaque(out);
    if (!Edge::kKnown && (u < first || u >= count)) continue;
    Vec value = sum[u];
    if (MASK) value = where_positive(load(mask), value);
    if (ADD) value = add(load(out), value);
    store(out, value);
  }
}

using BackwardInputRow = void (*)(const ConvProblem& p, const float* const* rows, int64_t pixel,
                                  const float* weight, float* out, int64_t out_pixel,
                                  const float* mask, int64_t mask_pixel);

template <int K, int D, int S, bool MASK, bool ADD>
void backward_input_row(const ConvProblem& p, const float* const* rows, int64_t pixel,
                        const float* weight, float* out, int64_t out_pixel, const float* mask,
                        int64_t mask_pixel) {
  static_assert(kTile / 2 % S == 0);
  constexpr int kPad = same_padding(K, D, S), kHalf = kTile / 2;
  const int64_t start = -(p.pad_w % S);
  for (int64_t u = start; u < p.w;) {
    const int64_t left = p.w - u, v0 = (u + p.pad_w) / S, first = u < 0 ? -u : 0;
    float* o = out + u * out_pixel;
    const float* m = MASK ? mask + u * mask_pixel : nullptr;
    const auto run = [&](auto tile, auto edge) FB_INLINE_LAMBDA {
      backward_input_tile<K, D, S, tile(), MASK, ADD, decltype(edge)>(
          rows, pixel, v0, p.ow, weight, o, out_pixel, m, mask_pixel, first, left);
      u += tile();
    };
    const std::integral_constant<int, kTile> full;
    const std::integral_constant<int, kHalf> half;
    const int64_t low = v0 - (K - 1) * D;
    if (S == 1 && left >= kTile) {
      with_edge<kPad>(low, v0 + kTile - p.ow,
                      [&](auto edge) FB_INLINE_LAMBDA { run(full, edge); });
    } else if (left > kHalf) {
      run(full, Asked{});
    } else if (kPad > 0 && left == kHalf && low == -kPad && p.ow == kHalf) {
      run(half, Inside<kPad, kPad>{});
    } else {
      run(half, Asked{});
    }
  }
}

template <bool MASK, bool ADD>
void backward_input_row_any(const ConvProblem& p, const float* const* rows, int64_t pixel,
                            const float* weight, float* out, int64_t out_pixel, const float* mask,
                            int64_t mask_pixel) {
  for (int64_t u = 0; u < p.w; ++u) {
    Vec sum = zero();
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      if (!rows[i]) continue;
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        const int64_t from = u + p.pad_w - j * p.dilation_w;
        if (from < 0 || from % p.stride_w != 0 || from / p.stride_w >= p.ow) continue;
        const Vec g = load(rows[i] + from / p.stride_w * pixel);
        sum = fma(load(weight + (i * p.kernel_w + j) * kLanes), g, sum);
      }
    }
    if (MASK) sum = where_positive(load(mask + u * mask_pixel), sum);
    if (ADD) sum = add(load(out + u * out_pixel), sum);
    store(out + u * out_pixel, sum);
  }
}

template <bool MASK, bool ADD, int K, int D, int S>
constexpr BackwardInputRow backward_input_row_of(Shape<K, D, S>) {
  return &backward_input_row<K, D, S, MASK, ADD>;
}
// SHARED asks for the unrolled loops that the forward of the same op has.
template <bool MASK, bool ADD, bool SHARED>
BackwardInputRow find_backward_input(const ConvProblem& p) {
  BackwardInputRow row = &backward_input_row_any<MASK, ADD>;
  with_shape<SHARED>(p, [&](auto shape) { row = backward_input_row_of<MASK, ADD>(shape); });
  return row;
}

inline void backward_input_block(const ConvProblem& p, const Blocks& blocks, const Array4& grad,
                                 const Array4& x, const float* packed, const Array4& grad_x,
                                 int64_t image, int64_t block, int64_t h0, int64_t h1,
                                 BackwardInputRow row, const float** rows) {
  const LaneSet lanes(p, blocks, image, block);
  const RowRange in = rows_out(p, h0, h1);
  const int64_t row_floats = p.ow * kLanes, out_floats = p.w * kLanes;
  float* source = scratch(kScratchIn, (in.end - in.begin) * row_floats);
  float* target = scratch(kScratchOut, (h1 - h0) * out_floats);
  float* mask = nullptr;
  gather(p, grad, lanes, in.begin, in.end - in.begin, p.ow, false, source);
  if (p.relu) {
    mask = scratch(kScratchMask, (h1 - h0) * out_floats);
    gather(p, x, lanes, h0, h1 - h0, p.w, false, mask);
  }
  const View view{source - in.begin * row_floats, row_floats, kLanes};
  const float* weight =
      packed + block % blocks.patterns * p.kernel_h * p.kernel_w * kLanes;
  for (int64_t h = h0; h < h1; ++h) {
    backward_pointers(p, view, h, rows);
    const int64_t offset = (h - h0) * out_floats;
    row(p, rows, kLanes, weight, target + offset, kLanes, mask ? mask + offset : nullptr, kLanes);
  }
  scatter(p, grad_x, lanes, h0, h1 - h0, p.w, target);
}

inline void backward_input(const ConvProblem& p, const Array4& grad, const Array4& x,
                           const float* packed, const Array4& grad_x, int64_t begin, int64_t end) {
  const MapItems items = backward_input_plan(p, grad, grad_x);
  const Blocks& blocks = items.blocks;
  const bool direct_mask = !p.relu || x.c == 1, far = outgrows_cache(p);
  const BackwardInputRow row =
      p.relu ? find_backward_input<true, false, false>(p) : find_backward_input<false, false, false>(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t h0 = item % items.pieces * items.per_piece;
    const int64_t h1 = std::min(p.h, h0 + items.per_piece), other = item / items.pieces;
    if (!items.direct) {
      backward_input_block(p, blocks, grad, x, packed, grad_x, other / blocks.count,
                           other % blocks.count, h0, h1, row, rows);
      continue;
    }
    const int64_t full = direct_mask ? p.c / kLanes : 0;
    const float* image = static_cast<const float*>(grad.data) + other * grad.n;
    const float* mask = p.relu ? static_cast<const float*>(x.data) + other * x.n : nullptr;
    float* out = static_cast<float*>(grad_x.data) + other * grad_x.n;
    const int64_t x_rows = rows_from(grad_x, p.n, other, p.h);
    const int64_t grad_rows = rows_from(grad, p.n, other, p.oh);
    for (int64_t h = h0; h < h1; ++h) {
      const int64_t next = (h + p.pad_h) / p.stride_h + 2;  // the last row needed here, plus two
      const int64_t next_end = std::min(next + (h % p.stride_h == 0), grad_rows);
      for (int64_t b = 0; b < full; ++b) {
        if (far) {
          prefetch_rows<false>(image, grad, p.c, p.ow, next, next_end, b, full);
          prefetch_rows<true>(out, grad_x, p.c, p.w, h + 2, std::min(h + 3, x_rows), b, full);
        }
        backward_pointers(p, {image + b * kLanes, grad.h, grad.w}, h, rows);
        row(p, rows, grad.w, packed + b * taps, out + b * kLanes + h * grad_x.h, grad_x.w,
            mask ? mask + b * kLanes + h * x.h : nullptr, x.w);
      }
    }
    for (int64_t b = full; b < blocks.count; ++b) {
      backward_input_block(p, blocks, grad, x, packed, grad_x, other, b, h0, h1, row, rows);
    }
  }
}

}  // namespace fastbandit::cpu::FB_ISA
