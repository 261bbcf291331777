// fastbandit::augment_start_normalize on CUDA: checks, allocation, device, stream.
#include "cuda/augment_start_normalize.h"

#include "cuda/augment_glue.h"
#include "cuda/glue.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

std::tuple<Tensor, Tensor, Tensor> augment_start_normalize(
    Tensor images, Tensor ids, std::optional<Tensor> draws, std::optional<Tensor> fill,
    int64_t crop_padding, bool flip, int64_t cutout_length, double epsilon, int64_t seed,
    int64_t offset, std::optional<Tensor> seed_tensor, std::optional<Tensor> offset_tensor,
    std::optional<double> lower, std::optional<double> upper, Tensor mean, Tensor std,
    ScalarType out_dtype, torch::headeronly::MemoryFormat memory_format) {
  constexpr const char* kOp = "augment_start_normalize";
  check_augment(kOp, images, ids, draws, fill, crop_padding, flip, cutout_length);
  check_draw(kOp, "images", images, seed, offset, seed_tensor, offset_tensor);
  check_bounds(kOp, epsilon, lower, upper);
  check_statistics(kOp, "images", images, ScalarType::Float, mean, std);
  check_out_dtype(kOp, out_dtype);
  const DeviceGuard guard(images.get_device_index());
  const bool channels_last = is_channels_last(kOp, memory_format);
  const int64_t sizes[4] = {ids.size(0), images.size(1), images.size(2), images.size(3)};
  int64_t strides[4];
  format_strides(sizes, channels_last, strides);
  Tensor image = empty_strided(images, sizes, strides, 4, ScalarType::Float);
  Tensor delta = empty_strided(images, sizes, strides, 4, ScalarType::Float);
  Tensor out = empty_strided(images, sizes, strides, 4, out_dtype);
  const AugmentBatch batch =
      augment_batch(images, ids, draws, fill, crop_padding, flip, cutout_length);
  check_launch(kOp, launch_augment_start_normalize(
                        static_cast<float*>(image.mutable_data_ptr()),
                        static_cast<float*>(delta.mutable_data_ptr()), out.mutable_data_ptr(),
                        dtype_code(kOp, out), channels_last, &batch, seed, offset,
                        device_word(seed_tensor), device_word(offset_tensor),
                        static_cast<const float*>(mean.const_data_ptr()), mean.stride(0),
                        static_cast<const float*>(std.const_data_ptr()), std.stride(0), epsilon,
                        lower.has_value(), lower.value_or(0), upper.has_value(),
                        upper.value_or(0), current_stream(images)));
  return {std::move(image), std::move(delta), std::move(out)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("augment_start_normalize", TORCH_BOX(&augment_start_normalize));
}

}  // namespace fastbandit
