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

// Output pixels that are worked through together: some rows of an image, or a part of one row. Bands
// are nearly of one size.
constexpr int64_t kBandPixels = 64;
struct SignBand {
  int64_t image, top, bottom, left, right;
};
struct SignBands {
  int64_t rows, columns;            // of a band
  int64_t row_bands, column_bands;  // of an image

  explicit SignBands(const SignConv& p) {
    cut(p.ow, kBandPixels, columns, column_bands);
    cut(p.oh, std::max<int64_t>(1, kBandPixels / columns), rows, row_bands);
  }
  int64_t items(const SignConv& p) const { return p.n * row_bands * column_bands; }
  int64_t pixels() const { return rows * columns; }
  SignBand band(const SignConv& p, int64_t item) const {
    const int64_t column = item % column_bands, row = item / column_bands % row_bands;
    return {item / column_bands / row_bands, row * rows, std::min(p.oh, (row + 1) * rows),
            column * columns, std::min(p.ow, (column + 1) * columns)};
  }

 private:
  static void cut(int64_t all, int64_t most, int64_t& size, int64_t& count) {
    count = (all + most - 1) / most;
    size = (all + count - 1) / count;
    count = (all + size - 1) / size;
  }
};

// Where a part of a map, or several maps in a row, begins, and how wide it is.
struct MapPart {
  int64_t row, column, width;
};

// Pixels of an output whose taps inside the map are the rows [top, bottom) and columns [left, right)
// of the filter.
template <int kMost>
struct SignTile {
  int64_t place[kMost];  // of the first of these taps: a pixel of a part of the map
  int64_t pixel[kMost];  // of the output
  int64_t count;
  int64_t top, bottom, left, right;

  bool same_taps(const SignTile& other) const {
    return top == other.top && bottom == other.bottom && left == other.left &&
           right == other.right;
  }
};

// The tiles of at most `size` pixels of a band, those of the same taps one after another; returns their
// number. Places are those in `part`.
template <int kMost>
int64_t write_tiles(const SignConv& p, const SignBand& band, const MapPart& part,
                    SignTile<kMost>* tiles, int64_t size = kMost) {
  const auto rows_of = [&](int64_t y, int64_t& first, int64_t& last) {
    inside_taps(y * p.stride_h - p.pad_h, p.kernel_h, p.dilation_h, p.h, first, last);
  };
  const auto columns_of = [&](int64_t x, int64_t& first, int64_t& last) {
    inside_taps(x * p.stride_w - p.pad_w, p.kernel_w, p.dilation_w, p.w, first, last);
  };
  SignTile<kMost>* next = tiles;
  for (int64_t y = band.top, next_y; y < band.bottom; y = next_y) {
    int64_t top, bottom, first, last;
    rows_of(y, top, bottom);
    for (next_y = y + 1; next_y < band.bottom; ++next_y) {
      rows_of(next_y, first, last);
      if (first != top || last != bottom) break;
    }
    for (int64_t x = band.left, next_x; x < band.right; x = next_x) {
      int64_t left, right;
      columns_of(x, left, right);
      for (next_x = x + 1; next_x < band.right; ++next_x) {
        columns_of(next_x, first, last);
        if (first != left || last != right) break;
      }
      const bool none = top == bottom || left == right;
      const int64_t step = none ? 0 : p.stride_w;
      SignTile<kMost>* tile = nullptr;
      int64_t room = 0;
      for (int64_t row = y; row < next_y; ++row) {
        const int64_t map_row = row * p.stride_h - p.pad_h + top * p.dilation_h - part.row;
        const int64_t map_column = x * p.stride_w - p.pad_w + left * p.dilation_w - part.column;
        int64_t place = none ? 0 : map_row * part.width + map_column;
        int64_t pixel = (band.image * p.oh + row) * p.ow + x;
        for (const int64_t end_pixel = pixel + next_x - x; pixel < end_pixel;) {
          if (room == 0) {
            tile = next++, tile->count = 0, room = size;
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
    }
  }
  return next - tiles;
}

}  // namespace fastbandit::cpu::FB_ISA
