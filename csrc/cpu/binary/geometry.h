// Where the taps of an output pixel lie in the map.
#pragma once

#include "cpu/simd/simd.h"
#include "cpu/binary_problem.h"

namespace fastbandit::cpu::FB_ISA {

// The taps along one side that lie in a map of `size`: [first, last).
FB_INLINE void inside_taps(int64_t start, int64_t taps, int64_t dilation, int64_t size,
                           int64_t& first, int64_t& last) {
  if (start >= 0 && start + (taps - 1) * dilation < size) {  // most pixels; divisions are slow
    first = 0, last = taps;
    return;
  }
  first = start >= 0 ? 0 : std::min(taps, (-start + dilation - 1) / dilation);
  last = start >= size ? first
                       : std::max(first, std::min(taps, (size - start + dilation - 1) / dilation));
}

// Output rows that are worked through together, of one image; bands are nearly of one size.
constexpr int64_t kBandPixels = 64;
struct SignBands {
  int64_t rows, count;

  explicit SignBands(const SignConv& p) {
    rows = std::min(p.oh, std::max<int64_t>(1, kBandPixels / p.ow));
    count = (p.oh + rows - 1) / rows;
    rows = (p.oh + count - 1) / count;
    count = (p.oh + rows - 1) / rows;
  }
  int64_t items(const SignConv& p) const { return p.n * count; }
  int64_t pixels(const SignConv& p) const { return rows * p.ow; }
  int64_t begin(int64_t item) const { return item % count * rows; }
  int64_t end(const SignConv& p, int64_t item) const { return std::min(p.oh, begin(item) + rows); }
};

// Pixels of an output whose taps inside the map are the rows [top, bottom) and columns [left, right)
// of the filter.
template <int kMost>
struct SignTile {
  int64_t place[kMost];  // of the first of these taps: a pixel of the map, all images in a row
  int64_t pixel[kMost];  // of the output
  int64_t count;
  int64_t top, bottom, left, right;

  bool same_taps(const SignTile& other) const {
    return top == other.top && bottom == other.bottom && left == other.left &&
           right == other.right;
  }
};

// The tiles of at most `size` pixels of the output rows [begin, end) of an image, those of the same
// taps one after another; returns their number.
template <int kMost>
int64_t write_tiles(const SignConv& p, int64_t image, int64_t begin, int64_t end,
                    SignTile<kMost>* tiles, int64_t size = kMost) {
  const auto rows_of = [&](int64_t y, int64_t& first, int64_t& last) {
    inside_taps(y * p.stride_h - p.pad_h, p.kernel_h, p.dilation_h, p.h, first, last);
  };
  const auto columns_of = [&](int64_t x, int64_t& first, int64_t& last) {
    inside_taps(x * p.stride_w - p.pad_w, p.kernel_w, p.dilation_w, p.w, first, last);
  };
  SignTile<kMost>* tile = tiles;
  for (int64_t y = begin, next_y; y < end; y = next_y) {
    int64_t top, bottom, first, last;
    rows_of(y, top, bottom);
    for (next_y = y + 1; next_y < end; ++next_y) {
      rows_of(next_y, first, last);
      if (first != top || last != bottom) break;
    }
    for (int64_t x = 0, next_x; x < p.ow; x = next_x) {
      int64_t left, right;
      columns_of(x, left, right);
      for (next_x = x + 1; next_x < p.ow; ++next_x) {
        columns_of(next_x, first, last);
        if (first != left || last != right) break;
      }
      const bool none = top == bottom || left == right;
      const int64_t step = none ? 0 : p.stride_w;
      int64_t room = 0;
      --tile;
      for (int64_t row = y; row < next_y; ++row) {
        const int64_t map_row = image * p.h + row * p.stride_h - p.pad_h + top * p.dilation_h;
        const int64_t map_column = x * p.stride_w - p.pad_w + left * p.dilation_w;
        int64_t place = none ? image * p.h * p.w : map_row * p.w + map_column;
        int64_t pixel = (image * p.oh + row) * p.ow + x;
        for (const int64_t end_pixel = pixel + next_x - x; pixel < end_pixel;) {
          if (room == 0) {
            ++tile, tile->count = 0, room = size;
            tile->top = top, tile->bottom = bottom, tile->left = left, tile->right = right;
          }
          const int64_t count = std::min(room, end_pixel - pixel);
          for (int64_t i = tile->count; i < tile->count + count; ++i, place += step) {
            tile->place[i] = place;
            tile->pixel[i] = pixel++;
          }
          tile->count += count, room -= count;
        }
      }
      ++tile;
    }
  }
  return tile - tiles;
}

}  // namespace fastbandit::cpu::FB_ISA
