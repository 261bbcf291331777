// fastbandit::pgd_step_ on CUDA: checks, device, stream.
#include "cuda/pgd_step.h"

#include "cuda/glue.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

void pgd_step_(Tensor delta, Tensor grad, Tensor image, double step_size, double epsilon,
               std::optional<double> lower, std::optional<double> upper) {
  constexpr const char* kOp = "pgd_step_";
  check_pgd(kOp, delta, grad, image, step_size, epsilon, lower, upper);
  const DeviceGuard guard(delta.get_device_index());
  check_launch(kOp, launch_pgd_step(delta.mutable_data_ptr(), grad.const_data_ptr(),
                                    image.const_data_ptr(), dtype_code(kOp, delta),
                                    dtype_code(kOp, image), static_cast<int>(delta.dim()),
                                    delta.sizes().data(), delta.strides().data(),
                                    grad.strides().data(), image.strides().data(), step_size,
                                    epsilon, lower.has_value(), lower.value_or(0),
                                    upper.has_value(), upper.value_or(0), current_stream(delta)));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("pgd_step_", TORCH_BOX(&pgd_step_));
}

}  // namespace fastbandit
