// A pixel of an augmented batch on CUDA: the kernels that make batches share it.
#pragma once

#include "cuda/augment_batch.h"
#include "cuda/pack.h"
#include "math/augment.h"
#include "math/pgd.h"

namespace fastbandit {

// The id of image n. Read on the device: a captured graph takes another batch at each replay.
__device__ __forceinline__ int64_t augment_id(const AugmentBatch& batch, int64_t n) {
  return batch.ids[n * batch.id_stride];
}

__device__ __forceinline__ bool augment_id_fits(const AugmentBatch& batch, int64_t id) {
  return id >= 0 && id < batch.total;
}

__device__ __forceinline__ Augmentation augmentation_of(const AugmentBatch& batch, int64_t id) {
  return augmentation(batch.draws ? batch.draws + id * batch.draw_row : nullptr, batch.draw_step,
                      batch.crop_padding, batch.flip != 0, batch.cutout_length);
}

// Element (c, h, w) of image `id`, which is in the set, as `change` leaves it.
template <class C>
__device__ __forceinline__ C augmented_pixel(const AugmentBatch& batch, int64_t id,
                                             const Augmentation& change, int c, int h, int w) {
  if (change.painted(h, w))
    return batch.fill ? static_cast<C>(batch.fill[c * batch.fill_stride]) : C(0);
  const int64_t row = change.source_row(h);
  const int64_t column = change.source_column(w, batch.width);
  if (row < 0 || row >= batch.height || column < 0 || column >= batch.width) return C(0);
  return image_value<C>(batch.images[id * batch.image_stride[0] + c * batch.image_stride[1] +
                                     row * batch.image_stride[2] + column * batch.image_stride[3]]);
}

}  // namespace fastbandit
