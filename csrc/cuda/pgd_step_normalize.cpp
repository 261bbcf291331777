// fastbandit::pgd_step_normalize_ on CUDA: checks, allocation, device, stream.
#include "cuda/pgd_step_normalize.h"

#include "cuda/glue.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

Tensor pgd_step_normalize_(Tensor delta, Tensor grad, Tensor image, Tensor mean, Tensor std,
                           double step_size, double epsilon, std::optional<double> lower,
                           std::optional<double> upper, ScalarType out_dtype,
                           torch::headeronly::MemoryFormat memory_format) {
  constexpr const char* kOp = "pgd_step_normalize_";
  check_pgd(kOp, delta, grad, image, step_size, epsilon, lower, upper);
  check_pgd_normalize(kOp, delta, mean, std, out_dtype);
  const DeviceGuard guard(delta.get_device_index());
  int64_t out_strides[4];
  const int64_t* const sizes = delta.sizes().data();
  format_strides(sizes, is_channels_last(kOp, memory_format), out_strides);
  Tensor out = empty_strided(delta, sizes, out_strides, 4, out_dtype);
  check_launch(
      kOp, launch_pgd_step_normalize(
               delta.mutable_data_ptr(), grad.const_data_ptr(), image.const_data_ptr(),
               mean.const_data_ptr(), std.const_data_ptr(), out.mutable_data_ptr(),
               dtype_code(kOp, delta), dtype_code(kOp, image), dtype_code(kOp, mean),
               dtype_code(kOp, std), dtype_code(kOp, out), sizes, delta.strides().data(),
               grad.strides().data(), image.strides().data(), out_strides, mean.stride(0),
               std.stride(0), step_size, epsilon, lower.has_value(), lower.value_or(0),
               upper.has_value(), upper.value_or(0), current_stream(delta)));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("pgd_step_normalize_", TORCH_BOX(&pgd_step_normalize_));
}

}  // namespace fastbandit
