// An AugmentBatch from plain arguments: what csrc/cuda/augment_glue.h does from torch's tensors.
#pragma once

#include "cuda/augment_batch.h"

// numbers: count, total, C, H, W, the four strides of images, the stride of ids, the two of draws,
// that of fill, crop_padding, flip, cutout_length.
inline fastbandit::AugmentBatch augment_batch_of(const uint8_t* images, const int64_t* ids,
                                                 const int64_t* draws, const float* fill,
                                                 const int64_t* numbers) {
  fastbandit::AugmentBatch batch = {};
  batch.images = images;
  batch.ids = ids;
  batch.draws = draws;
  batch.fill = fill;
  batch.count = numbers[0];
  batch.total = numbers[1];
  batch.channels = static_cast<int>(numbers[2]);
  batch.height = static_cast<int>(numbers[3]);
  batch.width = static_cast<int>(numbers[4]);
  for (int d = 0; d < 4; ++d) batch.image_stride[d] = numbers[5 + d];
  batch.id_stride = numbers[9];
  batch.draw_row = numbers[10];
  batch.draw_step = numbers[11];
  batch.fill_stride = numbers[12];
  batch.crop_padding = numbers[13];
  batch.flip = static_cast<int>(numbers[14]);
  batch.cutout_length = numbers[15];
  return batch;
}
