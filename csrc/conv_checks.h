// What the glue of the convolution ops shares between CPU and CUDA: argument checks, output sizes
// and layouts, and the view of a tensor as a pointer with strides.
#pragma once

#include "check.h"

#include <algorithm>
#include <utility>

namespace fastbandit {

struct ConvShape {
  int64_t n = 0, c = 0, h = 0, w = 0, oh = 0, ow = 0;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, pad_h = 0, pad_w = 0,
          dilation_h = 1, dilation_w = 1;
};

using Pair = std::vector<int64_t>;

inline void check_pair(const char* op, const char* name, const Pair& value, int64_t least) {
  FB_CHECK(value.size() == 2, op, name, ": expected two integers, got ", value.size());
  for (const int64_t number : value)
    FB_CHECK(number >= least && number <= kMostSide, op, name, ": expected integers from ", least,
             " to ", kMostSide, ", got ", number);
}

// Fills in the sizes that depend on the filter; the map of x must hold it.
//
// Every number is checked against kMostSide before it is multiplied, so nothing here overflows.
inline void fill_shape(const char* op, ConvShape& s, const Pair& stride, const Pair& padding,
                       const Pair& dilation) {
  check_pair(op, "stride", stride, 1);
  check_pair(op, "padding", padding, 0);
  check_pair(op, "dilation", dilation, 1);
  s.stride_h = stride[0], s.stride_w = stride[1];
  s.pad_h = padding[0], s.pad_w = padding[1];
  s.dilation_h = dilation[0], s.dilation_w = dilation[1];
  FB_CHECK(s.h <= kMostSide && s.w <= kMostSide, op, "x: expected at most ", kMostSide,
           " rows and columns, got ", s.h, " x ", s.w);
  FB_CHECK(s.kernel_h <= kMostSide && s.kernel_w <= kMostSide, op, "expected a filter of at most ",
           kMostSide, " rows and columns, got ", s.kernel_h, " x ", s.kernel_w);
  const int64_t span_h = s.h + 2 * s.pad_h - s.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t span_w = s.w + 2 * s.pad_w - s.dilation_w * (s.kernel_w - 1) - 1;
  FB_CHECK(span_h >= 0 && span_w >= 0, op, "x: expected a map that holds the filter (", s.kernel_h,
           " x ", s.kernel_w, " taps), got ", s.h, " x ", s.w, " before padding");
  s.oh = span_h / s.stride_h + 1;
  s.ow = span_w / s.stride_w + 1;
  check_elements(op, "x", {s.n, s.c, s.h, s.w});
  check_elements(op, "output", {s.n, s.c, s.oh, s.ow});
  check_elements(op, "filter", {s.c, s.kernel_h, s.kernel_w});
}

inline ConvShape depthwise_shape(const char* op, const Tensor& x, const Tensor& weight,
                                 const Pair& stride, const Pair& padding, const Pair& dilation) {
  FB_CHECK(x.dim() == 4, op, "x: expected [N, C, H, W], got ", shape_text(x));
  FB_CHECK(weight.dim() == 4 && weight.size(1) == 1 && weight.size(2) >= 1 && weight.size(3) >= 1,
           op, "weight: expected [C, 1, k, k], got ", shape_text(weight));
  FB_CHECK(weight.size(0) == x.size(1), op, "weight: expected one filter for each of the ",
           x.size(1), " channels of x, got ", shape_text(weight));
  check_floating(op, "x", x);
  check_dtype(op, "weight", weight, x.scalar_type());
  check_same_device(op, "weight", weight, "x", x);
  ConvShape s;
  s.n = x.size(0), s.c = x.size(1), s.h = x.size(2), s.w = x.size(3);
  s.kernel_h = weight.size(2), s.kernel_w = weight.size(3);
  fill_shape(op, s, stride, padding, dilation);
  return s;
}

inline void check_grad(const char* op, const Tensor& grad, const Tensor& x, const ConvShape& s) {
  FB_CHECK(grad.dim() == 4 && grad.size(0) == s.n && grad.size(1) == s.c &&
               grad.size(2) == s.oh && grad.size(3) == s.ow,
           op, "grad: expected [", s.n, ", ", s.c, ", ", s.oh, ", ", s.ow, "], got ",
           shape_text(grad));
  check_dtype(op, "grad", grad, x.scalar_type());
  check_same_device(op, "grad", grad, "x", x);
}

// The layout of results that follow x: as fastbandit/ops/_convolution.py decides it. A tensor of
// one channel is both; it counts as contiguous.
inline bool is_channels_last(const Tensor& x) {
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  return sizes[1] > 1 && strides[1] == 1 && sizes[1] <= strides[3] && strides[3] <= strides[2];
}

// A dense [n, c, h, w] tensor in the layout of `like`.
inline Tensor empty_map(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const int64_t sizes[4] = {n, c, h, w};
  if (!is_channels_last(like)) return empty_contiguous(like, sizes, 4, like.scalar_type());
  const int64_t strides[4] = {h * w * c, 1, w * c, c};
  return empty_strided(like, sizes, strides, 4, like.scalar_type());
}

// As in fastbandit/ops/gabor.py: a window that nobody needs, whose filters still have an address.
constexpr int64_t kMostGaborSize = (1 << 15) - 1;

struct GaborTensors {
  Tensor theta, sigma, gamma, wavelength, psi;  // [C_out] each
};

inline void check_gabor_parameters(const char* op, const GaborTensors& p, int64_t kernel_size) {
  check_floating(op, "theta", p.theta);
  FB_CHECK(p.theta.dim() == 1, op, "theta: expected [C_out], got ", shape_text(p.theta));
  const std::pair<const char*, const Tensor*> others[] = {{"sigma", &p.sigma},
                                                          {"gamma", &p.gamma},
                                                          {"wavelength", &p.wavelength},
                                                          {"psi", &p.psi}};
  for (const auto& [name, tensor] : others) {
    check_dtype(op, name, *tensor, p.theta.scalar_type());
    check_same_shape(op, name, *tensor, "theta", p.theta);
    check_same_device(op, name, *tensor, "theta", p.theta);
  }
  FB_CHECK(kernel_size >= 1 && kernel_size % 2 == 1 && kernel_size <= kMostGaborSize, op,
           "kernel_size: expected an odd integer from 1 to ", kMostGaborSize, ", got ",
           kernel_size);
}

// The convolution from 1 to C_out channels; c is C_out, the channels of x are summed before.
inline ConvShape gabor_shape(const char* op, const Tensor& x, const GaborTensors& p,
                             int64_t kernel_size, const Pair& stride, const Pair& padding,
                             const Pair& dilation) {
  FB_CHECK(x.dim() == 4, op, "x: expected [N, C, H, W], got ", shape_text(x));
  check_floating(op, "x", x);
  check_gabor_parameters(op, p, kernel_size);
  const bool half = x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
  FB_CHECK(p.theta.scalar_type() == x.scalar_type() ||
               (half && p.theta.scalar_type() == ScalarType::Float),
           op, "theta: expected ", dtype_name(x.scalar_type()), half ? " or float32" : "",
           ", got ", dtype_name(p.theta.scalar_type()));
  check_same_device(op, "theta", p.theta, "x", x);
  ConvShape s;
  s.n = x.size(0), s.c = p.theta.size(0), s.h = x.size(2), s.w = x.size(3);
  s.kernel_h = s.kernel_w = kernel_size;
  fill_shape(op, s, stride, padding, dilation);
  return s;
}

}  // namespace fastbandit
