// What the glue of the depthwise and of the Gabor convolution shares.
#pragma once

#include <array>

#include "conv_checks.h"
#include "cuda/depthwise_conv2d.h"
#include "cuda/glue.h"

namespace fastbandit {

inline std::array<int64_t, kConvFields> shape_numbers(const ConvShape& s, bool relu) {
  return {s.n,        s.c,        s.h,     s.w,     s.oh,         s.ow,         s.kernel_h, s.kernel_w,
          s.stride_h, s.stride_w, s.pad_h, s.pad_w, s.dilation_h, s.dilation_w, relu};
}

// Writes grad_weight, [C, 1, k, k] contiguous; grad is not empty. x_strides: those of x, or with 0
// for the channels where x has one channel for all filters.
inline void filter_gradient(const char* op, const Tensor& grad, const Tensor& x,
                            const int64_t* x_strides, const ConvShape& s, bool relu,
                            Tensor& grad_weight) {
  const auto shape = shape_numbers(s, relu);
  const auto grad_strides = grad.strides();
  const int64_t floats[1] = {depthwise_conv2d_partial_floats(dtype_code(op, grad), shape.data(),
                                                             grad_strides.data(), x_strides)};
  Tensor partial = empty_contiguous(grad, floats, 1, ScalarType::Float);
  float* sums = floats[0] > 0 ? static_cast<float*>(partial.mutable_data_ptr()) : nullptr;
  check_launch(op, launch_depthwise_conv2d_backward_weight(
                       grad.const_data_ptr(), dtype_code(op, grad), x.const_data_ptr(),
                       dtype_code(op, x), sums, grad_weight.mutable_data_ptr(),
                       dtype_code(op, grad_weight), shape.data(), grad_strides.data(), x_strides,
                       current_stream(grad)));
}

}  // namespace fastbandit
