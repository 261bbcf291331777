// What the launchers of the kernels that make batches are given.
#pragma once

#include <cstdint>

namespace fastbandit {

// The set of bytes [total, C, H, W] and what is taken out of it. draws: int64 [total, 5] or null;
// fill: float [C] or null. Plain data, passed to a kernel as it is.
struct AugmentBatch {
  int64_t count, total;
  int channels, height, width;
  const uint8_t* images;
  int64_t image_stride[4];
  const int64_t* ids;
  int64_t id_stride;
  const int64_t* draws;
  int64_t draw_row, draw_step;
  const float* fill;
  int64_t fill_stride;
  int64_t crop_padding, cutout_length;
  int flip;
};

}  // namespace fastbandit
