// fastbandit::random_start on CUDA: checks, allocation, device, stream.
#include "cuda/random_start.h"

#include "cuda/glue.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

Tensor random_start(Tensor image, double epsilon, int64_t seed, int64_t offset,
                    std::optional<Tensor> seed_tensor, std::optional<Tensor> offset_tensor,
                    std::optional<Tensor> index, std::optional<double> lower,
                    std::optional<double> upper) {
  constexpr const char* kOp = "random_start";
  check_random_start(kOp, image, epsilon, seed, offset, seed_tensor, offset_tensor, index, lower,
                     upper);
  const DeviceGuard guard(image.get_device_index());
  const bool bytes = image.scalar_type() == ScalarType::Byte;
  Tensor delta = empty_like(image, bytes ? ScalarType::Float : image.scalar_type());
  check_launch(
      kOp, launch_random_start(delta.mutable_data_ptr(), image.const_data_ptr(),
                               dtype_code(kOp, delta), dtype_code(kOp, image),
                               static_cast<int>(image.dim()), image.sizes().data(),
                               delta.strides().data(), image.strides().data(), seed, offset,
                               device_word(seed_tensor), device_word(offset_tensor),
                               device_word(index), index ? index->stride(0) : 0, epsilon,
                               lower.has_value(), lower.value_or(0), upper.has_value(),
                               upper.value_or(0), current_stream(image)));
  return delta;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("random_start", TORCH_BOX(&random_start));
}

}  // namespace fastbandit
