// The gradient of the weight: its inner loops, its items and their sum.
#pragma once

#include "cpu/depthwise/plan.h"
#include "cpu/depthwise/scratch.h"

namespace fastbandit::cpu::FB_ISA {

// sums[i][j] += sum_u grad[u] * x[i][u * S + j * D - pad] over rows [h0, h1) of the output map.
// R rows of taps are summed in registers at once, T values of grad held beside them.
template <int K, int D, int S, int R, int T, bool RELU, bool BX, class Edge>
FB_INLINE void backward_weight_tile(const float* const* rows, int64_t pixel, int64_t x0,
                                    int64_t width, const float* grad, int64_t grad_pixel,
                                    int64_t count, Vec (&sum)[R][K]) {
  constexpr int kSpan = (T - 1) * S + (K - 1) * D + 1;
  static_assert(kSpan <= 63, "valid_bits holds 63 positions");
  const uint64_t valid = Edge::kKnown ? 0 : valid_bits(x0, width);
  Vec g[T];
  FB_UNROLL
  for (int u = 0; u < T; ++u, grad += grad_pixel) {
    opaque(grad);
    g[u] = Edge::kKnown || u < count ? load(grad) : zero();
  }
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    const float* p = rows[r];
    if (!p) continue;
    p += x0 * pixel;
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
        if (u >= 0 && u % S == 0 && u / S < T) sum[r][j] = fma(g[u / S], v, sum[r][j]);
      }
    }
  }
}

template <int K, int D, int S, int R, int T, bool RELU, bool BX>
void backward_weight_rows(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1, int tap,
                          float* sums) {
  Vec sum[R][K];
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    FB_UNROLL
    for (int j = 0; j < K; ++j) sum[r][j] = load(sums + ((tap + r) * K + j) * kLanes);
  }
  for (int64_t h = h0; h < h1; ++h) {
    const float* rows[R];
    bool any = false;
    for (int r = 0; r < R; ++r) {
      const int64_t y = h * S + (tap + r) * D - p.pad_h;
      rows[r] = y >= 0 && y < p.h ? x.data + y * x.row : nullptr;
      any = any || rows[r];
    }
    if (!any) continue;
    const float* g = grad.data + h * grad.row;
    for (int64_t u = 0; u < p.ow; u += T, g += T * grad.pixel) {
      const int64_t x0 = u * S - p.pad_w;
      const auto run = [&](auto edge) FB_INLINE_LAMBDA {
        backward_weight_tile<K, D, S, R, T, RELU, BX, decltype(edge)>(
            rows, x.pixel, x0, p.w, g, grad.pixel, p.ow - u, sum);
      };
      if (p.ow - u >= T) {
        with_edge<same_padding(K, D, S)>(
            x0, x0 + (T - 1) * S + (K - 1) * D + 1 - p.w, run);
      } else {
        run(Asked{});
      }
    }
  }
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    FB_UNROLL
    for (int j = 0; j < K; ++j) store(sums + ((tap + r) * K + j) * kLanes, sum[r][j]);
  }
}

using BackwardWeightRows = void (*)(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1,
                                    float* sums);

template <int K, int D, int S, bool RELU, bool BX>
void backward_weight(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1, float* sums) {
  // With AVX-512 R x K sums, T gradients and one input in 32 registers.
  constexpr bool kMany = kIsa == Isa::avx512;
  constexpr int kRows = K <= 3 ? K : kMany ? 3 : K == 5 ? 2 : 1, kCols = kMany ? 8 : 4;
  constexpr int kRest = K % kRows;
  int tap = 0;
  for (; tap + kRows <= K; tap += kRows) {
    backward_weight_rows<K, D, S, kRows, kCols, RELU, BX>(p, x, grad, h0, h1, tap, sums);
  }
  if constexpr (kRest > 0) {
    backward_weight_rows<K, D, S, kRest, kCols, RELU, BX>(p, x, grad, h0, h1, tap, sums);
  }
}

template <bool RELU, bool BX>
void backward_weight_any(const ConvProblem& p, View x, View grad, int64_t h0, int64_t h1,
                         float* sums) {
  for (int64_t h = h0; h < h1; ++h) {
    for (int64_t i = 0; i < p.kernel_h; ++i) {
      const int64_t y = h * p.stride_h + i * p.dilation_h - p.pad_h;
      if (y < 0 || y >= p.h) continue;
      for (int64_t j = 0; j < p.kernel_w; ++j) {
        float* target = sums + (i * p.kernel_w + j) * kLanes;
        Vec even = load(target), odd = zero();
        for (int64_t u = 0; u < p.ow; ++u) {
          const int64_t at = u * p.stride_w + j * p.dilation_w - p.pad_w;
          if (at < 0 || at >= p.w) continue;
          const float* q = x.data + y * x.row + at * x.pixel;
          Vec v = BX ? broadcast(*q) : load(q);
          if (RELU) v = relu(v);
          const Vec g = load(grad.data + h * grad.row + u * grad.pixel);
          if (u & 1) {
            odd = fma(g, v, odd);
          } else {
            even = fma(g, v, even);
          }
        }
        store(target, add(even, odd));
      }
    }
  }
}

template <bool RELU, bool BX, int K, int D, int S>
constexpr BackwardWeightRows backward_weight_of(Shape<K, D, S>) {
  return &backward_weight<K, D, S, RELU, BX>;
}
template <bool RELU, bool BX>
BackwardWeightRows find_backward_weight(const ConvProblem& p) {
  BackwardWeightRows rows = &backward_weight_any<RELU, BX>;
  with_shape<BX>(p, [&](auto shape) { rows = backward_weight_of<RELU, BX>(shape); });
  return rows;
}

struct WeightItems {
  Blocks blocks;
  bool direct;
  int64_t per_unit, row_pieces;  // output rows of a unit; units of one image
  int64_t units, chunks;         // a chunk of units is summed before the second reduction

  WeightItems(const ConvProblem& p, const Array4& grad, const Array4& x)
      : blocks(p, grad), direct(in_place(p, grad, x)) {
    const int64_t row_floats = std::max<int64_t>(1, forward_row_floats(p));
    const int64_t wanted = std::max<int64_t>(1, kChunkVectors / std::max<int64_t>(1, p.ow));
    per_unit = std::max<int64_t>(1, std::min({p.oh, kScratchFloats / row_floats, wanted}));
    row_pieces = ceil_div(p.oh, per_unit);
    units = blocks.images * row_pieces;
    const int64_t vectors = blocks.images * blocks.count * p.oh * p.ow;
    chunks = std::max<int64_t>(
        1, std::min({units, kMaxChunks, ceil_div(vectors, kChunkVectors)}));
  }
  // Channels-last rows hold every channel, so one item takes all of them while they are in the
  // cache; elsewhere each block of lanes is an item of its own.
  int64_t count() const { return direct ? chunks : chunks * blocks.count; }
  int64_t partials() const { return chunks * blocks.count; }
};

inline int64_t partial_size(const ConvProblem& p, const Array4& grad, const Array4& x) {
  return WeightItems(p, grad, x).partials() * p.kernel_h * p.kernel_w * kLanes;
}

inline void backward_weight_items(const ConvProblem& p, const Array4& grad, const Array4& x,
                                  float* partial, int64_t begin, int64_t end) {
  const WeightItems items(p, grad, x);
  const Blocks& blocks = items.blocks;
  const BackwardWeightRows plain = find_backward_weight<false, false>(p);
  const BackwardWeightRows fused = p.relu ? find_backward_weight<true, false>(p) : plain;
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t chunk = items.direct ? item : item / blocks.count;
    const int64_t first = items.direct ? 0 : item % blocks.count;
    const int64_t last = items.direct ? blocks.count : first + 1;
    float* sums = partial + chunk * blocks.count * taps;
    std::fill(sums + first * taps, sums + last * taps, 0.0f);
    const int64_t unit_end = (chunk + 1) * items.units / items.chunks;
    for (int64_t unit = chunk * items.units / items.chunks; unit < unit_end; ++unit) {
      const int64_t image = unit / items.row_pieces, h0 = unit % items.row_pieces * items.per_unit;
      const int64_t h1 = std::min(p.oh, h0 + items.per_unit);
      const int64_t full = items.direct ? p.c / kLanes : 0;
      if (full > 0) {
        const float* from = static_cast<const float*>(x.data) + image * x.n;
        const float* g = static_cast<const float*>(grad.data) + image * grad.n;
        for (int64_t b = 0; b < full; ++b) {
          fused(p, {from + b * kLanes, x.h, x.w}, {g + b * kLanes, grad.h, grad.w}, h0, h1,
                sums + b * taps);
        }
      }
      for (int64_t b = std::max(first, full); b < last; ++b) {
        const LaneSet lanes(p, blocks, image, b);
        const RowRange in = rows_in(p, h0, h1);
        const int64_t x_floats = p.w * kLanes, g_floats = p.ow * kLanes;
        float* source = scratch(kScratchIn, (in.end - in.begin) * x_floats);
        float* g = scratch(kScratchOut, (h1 - h0) * g_floats);
        gather(p, x, lanes, in.begin, in.end - in.begin, p.w, p.relu, source);
        gather(p, grad, lanes, h0, h1 - h0, p.ow, false, g);
        plain(p, {source - in.begin * x_floats, x_floats, kLanes},
              {g - h0 * g_floats, g_floats, kLanes}, h0, h1, sums + b * taps);
      }
    }
  }
}

template <class T>
FB_INLINE void store_one(T* p, float value) {
  store_partial(p, 1, 1, broadcast(value));
}

inline void reduce(const ConvProblem& p, const Array4& grad, const Array4& x, const float* partial,
                   const Array4& grad_weight) {
  const WeightItems items(p, grad, x);
  const Blocks& blocks = items.blocks;
  const int64_t taps = p.kernel_h * p.kernel_w;
  with_type(p.type, [&](auto tag) {
    using T = decltype(tag);
    T* out = static_cast<T*>(grad_weight.data);
    for (int64_t tap = 0; tap < taps; ++tap) {
      T* to = out + tap / p.kernel_w * grad_weight.h + tap % p.kernel_w * grad_weight.w;
      if (blocks.flat) {
        float channel[kLanes] = {};
        for (int64_t b = 0; b < blocks.count; ++b) {
          Vec sum = zero();
          for (int64_t chunk = 0; chunk < items.chunks; ++chunk) {
            sum = add(sum, load(partial + ((chunk * blocks.count + b) * taps + tap) * kLanes));
          }
          float lanes[kLanes];
          store(lanes, sum);
          const int64_t used = std::min<int64_t>(kLanes, p.n * p.c - b * kLanes);
          for (int64_t l = 0; l < used; ++l) channel[(b * kLanes + l) % p.c] += lanes[l];
        }
        for (int64_t c = 0; c < p.c; ++c) store_one(to + c * grad_weight.n, channel[c]);
        continue;
      }
      for (int64_t b = 0; b < blocks.count; ++b) {
        Vec sum = zero();
        for (int64_t chunk = 0; chunk < items.chunks; ++chunk) {
          sum = add(sum, load(partial + ((chunk * blocks.count + b) * taps + tap) * kLanes));
        }
        const int64_t used = std::min<int64_t>(kLanes, p.c - b * kLanes);
        store_partial(to + b * kLanes * grad_weight.n, grad_weight.n, used, sum);
      }
    }
  });
}

}  // namespace fastbandit::cpu::FB_ISA
