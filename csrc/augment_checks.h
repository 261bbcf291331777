// Argument checks that the CPU and the CUDA glue of augment_images share.
#pragma once

#include "check.h"

namespace fastbandit {

// Columns of `draws`.
enum { kCropRow, kCropColumn, kFlip, kCutoutRow, kCutoutColumn, kDraws };

inline void check_augment(const char* op, const Tensor& images, const Tensor& ids,
                          const std::optional<Tensor>& draws, const std::optional<Tensor>& fill,
                          int64_t crop_padding, bool flip, int64_t cutout_length) {
  check_dtype(op, "images", images, ScalarType::Byte);
  FB_CHECK(images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0, op,
           "images: expected shape [M, C, H, W] of at least one pixel, got ", shape_text(images));
  check_elements(op, "images: an image", {images.size(1), images.size(2), images.size(3)},
                 kMostSide);
  check_dtype(op, "ids", ids, ScalarType::Long);
  FB_CHECK(ids.dim() == 1, op, "ids: expected shape [N], got ", shape_text(ids));
  check_same_device(op, "ids", ids, "images", images);
  FB_CHECK(draws || !(crop_padding || flip || cutout_length), op,
           "draws: expected a tensor with crop, flip or cutout, got None");
  if (draws) {
    check_dtype(op, "draws", *draws, ScalarType::Long);
    FB_CHECK(draws->dim() == 2 && draws->size(0) == images.size(0) && draws->size(1) == kDraws, op,
             "draws: expected shape [", images.size(0), ", 5], got ", shape_text(*draws));
    check_same_device(op, "draws", *draws, "images", images);
  }
  if (fill) {
    check_dtype(op, "cutout_fill", *fill, ScalarType::Float);
    FB_CHECK(fill->dim() == 1 && fill->size(0) == images.size(1), op,
             "cutout_fill: expected shape [", images.size(1), "], got ", shape_text(*fill));
    check_same_device(op, "cutout_fill", *fill, "images", images);
  }
  FB_CHECK(crop_padding >= 0 && crop_padding <= kMostSide, op,
           "crop_padding: expected a number of pixels from 0 to ", kMostSide, ", got ",
           crop_padding);
  FB_CHECK(cutout_length >= 0 && cutout_length <= kMostSide, op,
           "cutout_length: expected a number of pixels from 0 to ", kMostSide, ", got ",
           cutout_length);
}

}  // namespace fastbandit
