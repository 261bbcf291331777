// fastbandit::batch_norm and its backward on the CPU: float32, channels-last.
#include "cpu/norm.h"

namespace fastbandit {
namespace {

using namespace norm;

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  constexpr const char* kOp = "batch_norm";
  const Shape shape = check_input(kOp, "x", x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "bias", bias, x);
  const int64_t c = shape.channels;
  Tensor y = empty_like(x, ScalarType::Float);
  Tensor mean = empty_contiguous(x, &c, 1, ScalarType::Float);
  Tensor inverse = empty_contiguous(x, &c, 1, ScalarType::Float);
  // About the first value: a mean that is large beside the deviation costs no digits.
  const std::vector<float> centre = repeated(shape, floats(x));
  const auto sums = channel_sums<false>(shape, {floats(x), centre.data(), nullptr});
  statistics(shape, sums, centre.data(), eps, floats_to_write(mean), floats_to_write(inverse));
  const ForwardNorm transform(shape, floats(mean), floats(inverse), floats(weight), floats(bias));
  transform.run(shape, floats(x), floats_to_write(y));
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad, Tensor x,
                                                       std::optional<Tensor> weight, Tensor mean,
                                                       Tensor inverse, double) {
  constexpr const char* kOp = "batch_norm_backward";
  x = dense_channels_last(kOp, "x", x);
  const Shape shape = check_input(kOp, "x", x);
  check_dtype(kOp, "grad", grad, ScalarType::Float);
  check_same_shape(kOp, "grad", grad, "x", x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "mean", mean, x);
  check_channels(kOp, "inverse", inverse, x);
  const int64_t c = shape.channels;
  Tensor grad_x = empty_like(x, ScalarType::Float);
  Tensor grad_weight = empty_contiguous(x, &c, 1, ScalarType::Float);
  Tensor grad_bias = empty_contiguous(x, &c, 1, ScalarType::Float);
  const Tensor dense =
      dense_channels_last(grad, [&] { return empty_like(x, ScalarType::Float); });
  const float *const g = floats(dense), *const data = floats(x);
  const BackwardNorm transform(shape, gradient_sums(shape, g, data, floats(mean)), floats(mean),
                               floats(inverse), floats(weight), floats_to_write(grad_weight),
                               floats_to_write(grad_bias));
  float* const out = floats_to_write(grad_x);
  for_all_rows(shape, [&](int64_t at, int64_t count) FB_INLINE_LAMBDA {
    transform.row(at, count, g, data, out + at);
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("batch_norm", TORCH_BOX(&batch_norm));
  library.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace fastbandit
