// Where a pixel of an augmented image comes from. No torch header.
#pragma once

#include "math/portable.h"

namespace fastbandit {

// What was drawn for one image; without a crop, flip or cutout these are all 0.
struct Augmentation {
  int64_t row_shift, column_shift;  // of the source against the result
  bool flip;
  int64_t top, left, length;  // of the square that is painted over

  FB_HOST_DEVICE int64_t source_row(int64_t h) const { return h + row_shift; }
  FB_HOST_DEVICE int64_t source_column(int64_t w, int64_t width) const {
    return (flip ? width - 1 - w : w) + column_shift;
  }
  FB_HOST_DEVICE bool painted(int64_t h, int64_t w) const {
    return h >= top && h < top + length && w >= left && w < left + length;
  }
};

// A number that was drawn, which the ops do not look at before. Beyond 2^40 pixels, which is beyond
// every image, it is taken for that: sums with it overflow nothing.
FB_HOST_DEVICE int64_t bounded_draw(int64_t draw) {
  constexpr int64_t kFar = int64_t{1} << 40;
  return draw < -kFar ? -kFar : draw > kFar ? kFar : draw;
}

// draws: the five numbers of the image, `stride` apart, or null.
FB_HOST_DEVICE Augmentation augmentation(const int64_t* draws, int64_t stride,
                                         int64_t crop_padding, bool flip, int64_t cutout_length) {
  Augmentation result = {0, 0, false, 0, 0, 0};
  if (crop_padding > 0) {
    result.row_shift = bounded_draw(draws[0]) - crop_padding;
    result.column_shift = bounded_draw(draws[stride]) - crop_padding;
  }
  if (flip) result.flip = draws[2 * stride] != 0;
  if (cutout_length > 0) {
    result.top = bounded_draw(draws[3 * stride]) - cutout_length / 2;
    result.left = bounded_draw(draws[4 * stride]) - cutout_length / 2;
    result.length = cutout_length;
  }
  return result;
}

}  // namespace fastbandit
