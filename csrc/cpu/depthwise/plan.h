// How a problem is cut into items, and what an item needs: rows, packed taps, lines asked for ahead.
#pragma once

#include "cpu/depthwise/lanes.h"
#include "cpu/depthwise/tile.h"

namespace fastbandit::cpu::FB_ISA {

constexpr int64_t kScratchFloats = 128 * 1024;  // rows of one item: half a MiB, inside L2
constexpr int64_t kChunkVectors = 8192;         // products per tap that one partial sum holds
constexpr int64_t kMaxChunks = 64;
constexpr int64_t kWantedItems = 32;  // enough to balance threads; a constant, not their number
constexpr int64_t kMaxTaps = 64;      // rows of taps whose pointers fit the small array of an item

// float32 channels-last maps are read and written where they lie.
inline bool in_place(const ConvProblem& p, const Array4& a, const Array4& b) {
  return p.type == Real::kFloat32 && a.c == 1 && b.c == 1 && p.c >= kLanes;
}

// Output rows of one item: what fits the scratch map, and enough items for every thread.
inline int64_t rows_per_item(int64_t rows, int64_t row_floats, int64_t others) {
  const int64_t fitting = std::max<int64_t>(1, kScratchFloats / std::max<int64_t>(1, row_floats));
  const int64_t pieces = ceil_div(kWantedItems, std::max<int64_t>(1, others));
  const int64_t wanted = std::max<int64_t>(4, ceil_div(rows, pieces));
  return std::max<int64_t>(1, std::min({rows, fitting, wanted}));
}

// Floats of an input row's lanes for each output row. A long stride fills the scratch map whatever
// it is; as it stands the product would overflow.
inline int64_t forward_row_floats(const ConvProblem& p) {
  return std::max(p.w * std::min(p.stride_h, kScratchFloats), p.ow) * kLanes;
}

struct MapItems {
  Blocks blocks;
  bool direct;
  int64_t rows, pieces, per_piece, count;

  // rows: of the map that is written; row_floats: of the larger of both maps, per written row
  MapItems(const ConvProblem& p, const Array4& in, const Array4& out, int64_t rows_,
           int64_t row_floats)
      : blocks(p, in), direct(in_place(p, in, out)), rows(rows_) {
    const int64_t others = direct ? p.n : blocks.images * blocks.count;
    per_piece = rows_per_item(rows, row_floats, others);
    pieces = rows > 0 ? ceil_div(rows, per_piece) : 0;
    count = others * pieces;
  }
};

inline MapItems forward_plan(const ConvProblem& p, const Array4& x, const Array4& y) {
  return MapItems(p, x, y, p.oh, forward_row_floats(p));
}
inline MapItems backward_input_plan(const ConvProblem& p, const Array4& grad,
                                    const Array4& grad_x) {
  return MapItems(p, grad, grad_x, p.h, std::max(p.w, p.ow) * kLanes);
}

inline int64_t packed_size(const ConvProblem& p, const Array4& first) {
  return Blocks(p, first).patterns * p.kernel_h * p.kernel_w * kLanes;
}

// [C, 1, kernel_h, kernel_w] -> [pattern][tap][lane], 0 where a lane has no channel.
inline void pack(const ConvProblem& p, const Array4& first, const Array4& weight, float* packed) {
  const Blocks blocks(p, first);
  const int64_t taps = p.kernel_h * p.kernel_w;
  with_type(p.type, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t b = 0; b < blocks.patterns; ++b) {
      for (int64_t tap = 0; tap < taps; ++tap, packed += kLanes) {
        const T* from = static_cast<const T*>(weight.data) + tap / p.kernel_w * weight.h +
            tap % p.kernel_w * weight.w;
        T buffer[kLanes] = {};
        for (int64_t l = 0; l < kLanes; ++l) {
          const int64_t lane = b * kLanes + l;
          if (blocks.flat) {
            buffer[l] = from[lane % p.c * weight.n];
          } else if (lane < p.c) {
            buffer[l] = from[lane * weight.n];
          }
        }
        store(packed, load(buffer));
      }
    }
  });
}

// Pointers to the rows of x that output row h needs; null where a row lies outside.
inline void forward_pointers(const ConvProblem& p, View x, int64_t h, const float** rows) {
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t y = h * p.stride_h + i * p.dilation_h - p.pad_h;
    rows[i] = y >= 0 && y < p.h ? x.data + y * x.row : nullptr;
  }
}
inline void backward_pointers(const ConvProblem& p, View grad, int64_t h, const float** rows) {
  for (int64_t i = 0; i < p.kernel_h; ++i) {
    const int64_t from = h + p.pad_h - i * p.dilation_h;
    const bool inside = from >= 0 && from % p.stride_h == 0 && from / p.stride_h < p.oh;
    rows[i] = inside ? grad.data + from / p.stride_h * grad.row : nullptr;
  }
}

// Row pointers of one filter: on the stack, or in scratch memory for enormous filters.
class RowPointers {
 public:
  explicit RowPointers(int64_t count) {
    if (count > kMaxTaps) heap_ = new const float*[static_cast<size_t>(count)];
  }
  ~RowPointers() { delete[] heap_; }
  RowPointers(const RowPointers&) = delete;
  RowPointers& operator=(const RowPointers&) = delete;
  const float** get() { return heap_ ? heap_ : stack_; }

 private:
  const float* stack_[kMaxTaps];
  const float** heap_ = nullptr;
};

struct RowRange {
  int64_t begin, end;
};
// Input rows that output rows [begin, end) need, and the other way round.
inline RowRange rows_in(const ConvProblem& p, int64_t begin, int64_t end) {
  const int64_t low = begin * p.stride_h - p.pad_h;
  const int64_t high = (end - 1) * p.stride_h + (p.kernel_h - 1) * p.dilation_h - p.pad_h + 1;
  const int64_t first = std::min(std::max<int64_t>(low, 0), p.h);
  return {first, std::max(first, std::min(high, p.h))};
}
inline RowRange rows_out(const ConvProblem& p, int64_t begin, int64_t end) {
  const int64_t low = begin + p.pad_h - (p.kernel_h - 1) * p.dilation_h;
  const int64_t high = (end - 1 + p.pad_h) / p.stride_h + 1;
  const int64_t first = std::min(low <= 0 ? 0 : ceil_div(low, p.stride_h), p.oh);
  return {first, std::max(first, std::min(high, p.oh))};
}

// Channels-last maps are read and written 64 bytes of every pixel at a time, which no hardware
// prefetcher follows from one block of channels to the next. So lines are asked for ahead, in the
// order of memory: part `part` of `parts` of rows [begin, end) of a map whose rows are dense.
// Always inline: gcc takes a function that only prefetches for one without effect and drops its calls.
template <bool WRITE>
FB_INLINE void prefetch_rows(const float* map, const Array4& a, int64_t channels, int64_t w,
                          int64_t begin, int64_t end, int64_t part, int64_t parts) {
  if (a.w != channels || a.h != w * channels || end <= begin) return;  // a view
  const int64_t floats = (end - begin) * a.h;
  const float* p = map + begin * a.h + part * floats / parts;
  const float* const last = map + begin * a.h + (part + 1) * floats / parts;
#pragma GCC unroll 4
  for (; p < last; p += 16) __builtin_prefetch(p, WRITE, 2);
}

// Rows of a map and of the images that follow it in memory: how far ahead of image n one may look.
inline int64_t rows_from(const Array4& a, int64_t images, int64_t n, int64_t h) {
  return a.n == h * a.h ? (images - n) * h : h;
}

// Whether the map that is read and the one that is written outgrow the caches together, so that it
// pays to ask for both ahead (asking for one of the two alone gains nothing, the other one waits). A
// layer's maps share the last level with the rest of its network
// (docs/decisions.md#depthwise-prefetch). The weight gradient gains nothing, so it does without.
constexpr int64_t kCachedBytes = 6 << 20;

inline bool outgrows_cache(const ConvProblem& p) {
  const int64_t pixels = p.h * p.w + p.oh * p.ow;
  return p.n * p.c * pixels * static_cast<int64_t>(sizeof(float)) > kCachedBytes;
}

}  // namespace fastbandit::cpu::FB_ISA
