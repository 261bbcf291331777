// One input channel for all lanes (Gabor): the forward on the sum over the channels, and both
// gradients from one reading of grad.
#pragma once

#include "cpu/depthwise/backward_input.h"
#include "cpu/depthwise/backward_weight.h"
#include "cpu/depthwise/forward.h"

namespace fastbandit::cpu::FB_ISA {

// Sum over the channels of rows [row, row + rows) of image n, [rows][w].
template <class T>
void channel_sum_rows(const Array4& x, int64_t n, int64_t channels, int64_t row, int64_t rows,
                      int64_t w, float* out) {
  const T* image = static_cast<const T*>(x.data) + n * x.n;
  if (x.c == 1 && channels >= kLanes) {
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = image + (row + r) * x.h;
      for (int64_t i = 0; i < w; i += kLanes) {
        // The lanes of kLanes pixels, then all horizontal sums at once by a transposition.
        const int64_t here = std::min<int64_t>(kLanes, w - i);
        Vec sum[kLanes];
        for (int64_t u = 0; u < kLanes; ++u) {
          if (u >= here) {
            sum[u] = zero();
            continue;
          }
          const T* q = p + (i + u) * x.w;
          Vec s = load(q);
          int64_t c = kLanes;
          for (; c + kLanes <= channels; c += kLanes) s = add(s, load(q + c));
          if (c < channels) s = add(s, load_first(q + c, channels - c));
          sum[u] = s;
        }
        transpose(sum);
        Vec total = sum[0];
        for (int l = 1; l < kLanes; ++l) total = add(total, sum[l]);
        if (here == kLanes) {
          store(out, total);
        } else {
          store_partial(out, 1, here, total);
        }
        out += here;
      }
    }
    return;
  }
  const bool joined = x.h == w * x.w;
  const int64_t run = joined ? rows * w : w, runs = joined ? 1 : rows;
  for (int64_t r = 0; r < runs; ++r) {
    const T* p = image + (row + r) * x.h;
    for (int64_t i = 0; i < run;) {
      const int64_t left = run - i;
      if (x.w == 1 && left >= 4 * kLanes) {
        Vec sum[4] = {zero(), zero(), zero(), zero()};
        for (int64_t c = 0; c < channels; ++c) {
          for (int u = 0; u < 4; ++u) sum[u] = add(sum[u], load(p + c * x.c + i + u * kLanes));
        }
        for (int u = 0; u < 4; ++u) store(out + u * kLanes, sum[u]);
        i += 4 * kLanes;
        out += 4 * kLanes;
        continue;
      }
      const int64_t here = std::min<int64_t>(kLanes, left);
      Vec sum = zero();
      for (int64_t c = 0; c < channels; ++c) {
        const T* q = p + c * x.c + i * x.w;
        sum = add(sum, x.w == 1 && here == kLanes ? load(q) : load_partial(q, x.w, here));
      }
      store_partial(out, 1, here, sum);
      i += here;
      out += here;
    }
  }
}

inline void channel_sum(const ConvProblem& p, const Array4& x, int64_t n, int64_t channels,
                        int64_t row, int64_t rows, float* out) {
  with_type(p.type, [&](auto tag) {
    channel_sum_rows<decltype(tag)>(x, n, channels, row, rows, p.w, out);
  });
}

inline bool written_in_place(const ConvProblem& p, const Array4& a) {
  return p.type == Real::kFloat32 && a.c == 1;
}

inline int64_t shared_rows(const ConvProblem& p) {
  return rows_per_item(p.oh, forward_row_floats(p), p.n);
}

inline int64_t shared_forward_items(const ConvProblem& p) {
  return p.n * ceil_div(p.oh, shared_rows(p));
}

inline void shared_forward(const ConvProblem& p, int64_t channels, const Array4& x,
                           const float* packed, const Array4& y, int64_t begin, int64_t end) {
  const Blocks blocks(p, y);
  const int64_t per_piece = shared_rows(p), pieces = ceil_div(p.oh, per_piece);
  const ForwardRow row = find_forward<false, true>(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes, out_floats = p.ow * kLanes;
  const int64_t full = written_in_place(p, y) ? p.c / kLanes : 0;
  for (int64_t item = begin; item < end; ++item) {
    const int64_t n = item / pieces, h0 = item % pieces * per_piece;
    const int64_t h1 = std::min(p.oh, h0 + per_piece);
    const RowRange in = rows_in(p, h0, h1);
    float* sum = scratch(kScratchPlane, (in.end - in.begin) * p.w);
    channel_sum(p, x, n, channels, in.begin, in.end - in.begin, sum);
    const View view{sum - in.begin * p.w, p.w, 1};
    float* image = static_cast<float*>(y.data) + (full ? n * y.n : 0);
    for (int64_t h = h0; full > 0 && h < h1; ++h) {
      forward_pointers(p, view, h, rows);
      for (int64_t b = 0; b < full; ++b) {
        row(p, rows, 1, packed + b * taps, image + b * kLanes + h * y.h, y.w);
      }
    }
    if (full == blocks.count) continue;
    float* target = scratch(kScratchOut, (h1 - h0) * out_floats);
    for (int64_t b = full; b < blocks.count; ++b) {
      for (int64_t h = h0; h < h1; ++h) {
        forward_pointers(p, view, h, rows);
        row(p, rows, 1, packed + b * taps, target + (h - h0) * out_floats, kLanes);
      }
      scatter(p, y, LaneSet(p, blocks, n, b), h0, h1 - h0, p.ow, target);
    }
  }
}

// grad is read once for both gradients: that of the channel sum (grad_sum, [N, H, W] in the type of
// the problem) and that of the filters (partial sums). Either may be null.
inline void shared_backward(const ConvProblem& p, int64_t channels, const Array4& grad,
                            const Array4& x, const float* packed, void* grad_sum, float* partial,
                            int64_t begin, int64_t end) {
  const WeightItems items(p, grad, grad);
  const Blocks& blocks = items.blocks;
  const BackwardWeightRows weight_rows = find_backward_weight<false, true>(p);
  const BackwardInputRow first_row = find_backward_input<false, false, true>(p);
  const BackwardInputRow next_row = find_backward_input<false, true, true>(p);
  RowPointers pointers(p.kernel_h);
  const float** rows = pointers.get();
  const int64_t taps = p.kernel_h * p.kernel_w * kLanes, g_floats = p.ow * kLanes;
  const int64_t full = written_in_place(p, grad) ? p.c / kLanes : 0;
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    float* sums = partial ? partial + chunk * blocks.count * taps : nullptr;
    if (sums) std::fill(sums, sums + blocks.count * taps, 0.0f);
    const int64_t unit_end = (chunk + 1) * items.units / items.chunks;
    for (int64_t unit = chunk * items.units / items.chunks; unit < unit_end; ++unit) {
      const int64_t n = unit / items.row_pieces, piece = unit % items.row_pieces;
      const int64_t h0 = piece * items.per_unit, h1 = std::min(p.oh, h0 + items.per_unit);
      View sum{nullptr, p.w, 1};
      if (sums) {
        const RowRange in = rows_in(p, h0, h1);
        float* plane = scratch(kScratchPlane, (in.end - in.begin) * p.w);
        channel_sum(p, x, n, channels, in.begin, in.end - in.begin, plane);
        sum.data = plane - in.begin * p.w;
      }
      // Rows of the input map that this unit writes, and the rows of grad that both parts read.
      const int64_t r0 = piece * p.h / items.row_pieces, r1 = (piece + 1) * p.h / items.row_pieces;
      RowRange need{h0, h1};
      if (grad_sum && r1 > r0) {
        const RowRange from = rows_out(p, r0, r1);
        if (from.end > from.begin) {
          need = {std::min(h0, from.begin), std::max(h1, from.end)};
        }
      }
      float* total =
          grad_sum ? scratch(kScratchOut, ceil_div((r1 - r0) * p.w, kLanes) * kLanes * kLanes)
                   : nullptr;
      const auto run = [&](int64_t b, bool input, bool weights) {
        View g;
        if (b < full) {
          g = {static_cast<const float*>(grad.data) + n * grad.n + b * kLanes, grad.h, grad.w};
        } else {
          float* source = scratch(kScratchIn, (need.end - need.begin) * g_floats);
          gather(p, grad, LaneSet(p, blocks, n, b), need.begin, need.end - need.begin, p.ow, false,
                 source);
          g = {source - need.begin * g_floats, g_floats, kLanes};
        }
        if (input && total) {
          for (int64_t r = r0; r < r1; ++r) {
            backward_pointers(p, g, r, rows);
            (b == 0 ? first_row : next_row)(p, rows, g.pixel, packed + b * taps,
                                            total + (r - r0) * p.w * kLanes, kLanes, nullptr, 0);
          }
        }
        if (weights && sums) weight_rows(p, sum, g, h0, h1, sums + b * taps);
      };
      // Where grad is read in place, both kinds read 64 bytes of every pixel at a time, which no
      // hardware prefetcher follows; the sums' kind waits less for it, and the other then finds it
      // in the cache.
      if (full > 0) {
        prefetch_rows<false>(static_cast<const float*>(grad.data) + n * grad.n, grad, p.c, p.ow,
                             need.begin, need.end, 0, 1);
      }
      for (int64_t b = 0; b < full; ++b) run(b, false, true);
      for (int64_t b = 0; b < full; ++b) run(b, true, false);
      for (int64_t b = full; b < blocks.count; ++b) run(b, true, true);
      if (!total) continue;
      with_type(p.type, [&](auto tag) {
        using T = decltype(tag);
        T* to = static_cast<T*>(grad_sum) + (n * p.h + r0) * p.w;
        const int64_t pixels = (r1 - r0) * p.w;
        for (int64_t i = 0; i < pixels; i += kLanes) {
          const int64_t here = std::min<int64_t>(kLanes, pixels - i);
          Vec lanes[kLanes];
          for (int64_t u = 0; u < kLanes; ++u) {
            lanes[u] = u < here ? load(total + (i + u) * kLanes) : zero();
          }
          transpose(lanes);
          Vec value = lanes[0];
          for (int l = 1; l < kLanes; ++l) value = add(value, lanes[l]);
          store_partial(to + i, 1, here, value);
        }
      });
    }
  }
}

}  // namespace fastbandit::cpu::FB_ISA
