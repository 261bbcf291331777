// fastbandit::depthwise_conv2d and its two gradients on CUDA: checks, allocation, device, stream.
#include "cuda/depthwise_conv2d.h"

#include "conv_checks.h"
#include "cuda/conv_glue.h"

namespace fastbandit {
namespace {

Tensor depthwise_conv2d(Tensor x, Tensor weight, Pair stride, Pair padding, Pair dilation,
                        bool relu) {
  constexpr const char* kOp = "depthwise_conv2d";
  const ConvShape s = depthwise_shape(kOp, x, weight, stride, padding, dilation);
  const DeviceGuard guard(x.get_device_index());
  Tensor y = empty_map(x, s.n, s.c, s.oh, s.ow);
  if (y.numel() == 0) return y;
  const Tensor taps = torch::stable::contiguous(weight);
  const auto shape = shape_numbers(s, relu);
  check_launch(kOp, launch_depthwise_conv2d(
                        x.const_data_ptr(), dtype_code(kOp, x), taps.const_data_ptr(),
                        dtype_code(kOp, taps), nullptr, y.mutable_data_ptr(), dtype_code(kOp, y),
                        shape.data(), x.strides().data(), nullptr, y.strides().data(), 0,
                        current_stream(x)));
  return y;
}

Tensor depthwise_conv2d_backward_input(Tensor grad, Tensor x, Tensor weight, Pair stride,
                                       Pair padding, Pair dilation, bool relu) {
  constexpr const char* kOp = "depthwise_conv2d_backward_input";
  const ConvShape s = depthwise_shape(kOp, x, weight, stride, padding, dilation);
  check_grad(kOp, grad, x, s);
  const DeviceGuard guard(x.get_device_index());
  Tensor grad_x = empty_map(x, s.n, s.c, s.h, s.w);
  if (grad_x.numel() == 0) return grad_x;
  const Tensor taps = torch::stable::contiguous(weight);
  const auto shape = shape_numbers(s, relu);
  check_launch(kOp, launch_depthwise_conv2d(
                        grad.const_data_ptr(), dtype_code(kOp, grad), taps.const_data_ptr(),
                        dtype_code(kOp, taps), relu ? x.const_data_ptr() : nullptr,
                        grad_x.mutable_data_ptr(), dtype_code(kOp, grad_x), shape.data(),
                        grad.strides().data(), x.strides().data(), grad_x.strides().data(), 1,
                        current_stream(x)));
  return grad_x;
}

Tensor depthwise_conv2d_backward_weight(Tensor grad, Tensor x, Tensor weight, Pair stride,
                                        Pair padding, Pair dilation, bool relu) {
  constexpr const char* kOp = "depthwise_conv2d_backward_weight";
  const ConvShape s = depthwise_shape(kOp, x, weight, stride, padding, dilation);
  check_grad(kOp, grad, x, s);
  const DeviceGuard guard(x.get_device_index());
  const int64_t sizes[4] = {s.c, 1, s.kernel_h, s.kernel_w};
  Tensor grad_weight = empty_contiguous(weight, sizes, 4, weight.scalar_type());
  if (grad.numel() == 0) {
    torch::stable::zero_(grad_weight);
    return grad_weight;
  }
  filter_gradient(kOp, grad, x, x.strides().data(), s, relu, grad_weight);
  return grad_weight;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  library.impl("depthwise_conv2d_backward_input", TORCH_BOX(&depthwise_conv2d_backward_input));
  library.impl("depthwise_conv2d_backward_weight", TORCH_BOX(&depthwise_conv2d_backward_weight));
}

}  // namespace fastbandit
