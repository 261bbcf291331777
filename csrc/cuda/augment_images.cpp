// fastbandit::augment_images on CUDA: checks, allocation, device, stream.
#include "cuda/augment_images.h"

#include "cuda/augment_glue.h"
#include "cuda/glue.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

Tensor augment_images(Tensor images, Tensor ids, std::optional<Tensor> draws,
                      std::optional<Tensor> fill, int64_t crop_padding, bool flip,
                      int64_t cutout_length, ScalarType out_dtype,
                      torch::headeronly::MemoryFormat memory_format) {
  constexpr const char* kOp = "augment_images";
  check_augment(kOp, images, ids, draws, fill, crop_padding, flip, cutout_length);
  check_out_dtype(kOp, out_dtype);
  const DeviceGuard guard(images.get_device_index());
  const bool channels_last = is_channels_last(kOp, memory_format);
  const int64_t sizes[4] = {ids.size(0), images.size(1), images.size(2), images.size(3)};
  int64_t strides[4];
  format_strides(sizes, channels_last, strides);
  Tensor out = empty_strided(images, sizes, strides, 4, out_dtype);
  const AugmentBatch batch =
      augment_batch(images, ids, draws, fill, crop_padding, flip, cutout_length);
  check_launch(kOp, launch_augment_images(out.mutable_data_ptr(), dtype_code(kOp, out),
                                          channels_last, &batch, current_stream(images)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("augment_images", TORCH_BOX(&augment_images));
}

}  // namespace fastbandit
