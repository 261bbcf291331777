// From the tensors of an op that makes batches to an AugmentBatch.
#pragma once

#include "augment_checks.h"
#include "cuda/augment_batch.h"

namespace fastbandit {

// The arguments are checked; the tensors outlive the result.
inline AugmentBatch augment_batch(const Tensor& images, const Tensor& ids,
                                  const std::optional<Tensor>& draws,
                                  const std::optional<Tensor>& fill, int64_t crop_padding,
                                  bool flip, int64_t cutout_length) {
  AugmentBatch batch = {};
  batch.count = ids.size(0);
  batch.total = images.size(0);
  batch.channels = static_cast<int>(images.size(1));
  batch.height = static_cast<int>(images.size(2));
  batch.width = static_cast<int>(images.size(3));
  batch.images = static_cast<const uint8_t*>(images.const_data_ptr());
  for (int d = 0; d < 4; ++d) batch.image_stride[d] = images.stride(d);
  batch.ids = static_cast<const int64_t*>(ids.const_data_ptr());
  batch.id_stride = ids.stride(0);
  if (draws) {
    batch.draws = static_cast<const int64_t*>(draws->const_data_ptr());
    batch.draw_row = draws->stride(0);
    batch.draw_step = draws->stride(1);
  }
  if (fill) {
    batch.fill = static_cast<const float*>(fill->const_data_ptr());
    batch.fill_stride = fill->stride(0);
  }
  batch.crop_padding = crop_padding;
  batch.flip = flip;
  batch.cutout_length = cutout_length;
  return batch;
}

}  // namespace fastbandit
