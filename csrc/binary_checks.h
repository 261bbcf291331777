// Argument checks of the ops on packed signs, for every device.
#pragma once

#include <optional>
#include <utility>

#include "conv_checks.h"

namespace fastbandit {

// As in fastbandit/ops/binary_conv2d.py: below it the sums of the reference are exact.
constexpr int64_t kMostSignTaps = int64_t{1} << 24;

inline int64_t words_of(int64_t channels) { return (channels + 63) / 64; }

inline void check_sign_bits(const char* op, const Tensor& bits, int64_t channels) {
  FB_CHECK(channels >= 1 && channels <= kMostSide, op, "channels: expected 1 to ", kMostSide,
           ", got ", channels);
  check_dtype(op, "bits", bits, ScalarType::Long);
  FB_CHECK(bits.dim() == 4 && bits.size(3) == words_of(channels), op,
           "bits: expected [N, H, W, ", words_of(channels), "] for ", channels, " channels, got ",
           shape_text(bits));
}

struct SignShape {
  ConvShape conv;  // c is the number of filters
  bool depthwise = false;
};

inline SignShape sign_conv_shape(const char* op, const Tensor& bits, const Tensor& weight_bits,
                                 int64_t channels, const Pair& stride, const Pair& padding,
                                 const Pair& dilation, int64_t groups) {
  check_sign_bits(op, bits, channels);
  check_dtype(op, "weight_bits", weight_bits, ScalarType::Long);
  check_same_device(op, "weight_bits", weight_bits, "bits", bits);
  FB_CHECK(groups == 1 || groups == channels, op, "groups: expected 1 or ", channels, ", got ",
           groups);
  SignShape s;
  s.depthwise = groups > 1;
  FB_CHECK(weight_bits.dim() == 4 && weight_bits.size(3) == words_of(channels) &&
               weight_bits.size(1) >= 1 && weight_bits.size(2) >= 1 &&
               (s.depthwise ? weight_bits.size(0) == 1 : weight_bits.size(0) >= 1),
           op, "weight_bits: expected [", s.depthwise ? "1" : "C_out", ", kh, kw, ",
           words_of(channels), "], got ", shape_text(weight_bits));
  FB_CHECK(bits.size(1) >= 1 && bits.size(2) >= 1, op,
           "bits: expected at least one row and column, got ", shape_text(bits));
  s.conv.n = bits.size(0), s.conv.h = bits.size(1), s.conv.w = bits.size(2);
  s.conv.c = s.depthwise ? channels : weight_bits.size(0);
  s.conv.kernel_h = weight_bits.size(1), s.conv.kernel_w = weight_bits.size(2);
  fill_shape(op, s.conv, stride, padding, dilation);
  check_elements(op, "sum", {s.depthwise ? 1 : channels, s.conv.kernel_h, s.conv.kernel_w},
                 kMostSignTaps);
  return s;
}

inline void check_filters(const char* op, const char* name, const Tensor& value, int64_t filters,
                          const Tensor& bits) {
  FB_CHECK(value.dim() == 1 && value.size(0) == filters, op, name, ": expected [", filters,
           "], one for each filter, got ", shape_text(value));
  check_same_device(op, name, value, "bits", bits);
}

inline void check_sign_map(const char* op, const Tensor& x, const std::optional<Tensor>& threshold) {
  check_floating(op, "x", x);
  FB_CHECK(x.dim() == 4 && x.size(1) >= 1, op,
           "x: expected [N, C, H, W] with at least one channel, got ", shape_text(x));
  if (!threshold) return;
  FB_CHECK(threshold->scalar_type() == ScalarType::Float ||
               threshold->scalar_type() == x.scalar_type(),
           op, "threshold: expected float32 or ", dtype_name(x.scalar_type()), ", got ",
           dtype_name(threshold->scalar_type()));
  FB_CHECK(threshold->dim() == 1 && threshold->size(0) == x.size(1), op,
           "threshold: expected one for each of the ", x.size(1), " channels of x, got ",
           shape_text(*threshold));
  check_same_device(op, "threshold", *threshold, "x", x);
}

inline void check_affine(const char* op, const std::optional<Tensor>& scale,
                         const std::optional<Tensor>& bias, ScalarType out_dtype, int64_t filters,
                         const Tensor& bits) {
  FB_CHECK(is_floating(out_dtype), op,
           "out_dtype: expected float32, float64, bfloat16 or float16, got ",
           dtype_name(out_dtype));
  const bool wide = out_dtype == ScalarType::Double;
  const std::pair<const char*, const std::optional<Tensor>*> vectors[] = {{"scale", &scale},
                                                                          {"bias", &bias}};
  for (const auto& [name, value] : vectors) {
    if (!*value) continue;
    const ScalarType dtype = (*value)->scalar_type();
    FB_CHECK(dtype == ScalarType::Float || (wide && dtype == ScalarType::Double), op, name,
             ": expected float32", wide ? " or float64" : "", ", got ", dtype_name(dtype));
    check_filters(op, name, **value, filters, bits);
  }
}

inline void check_threshold(const char* op, const Tensor& threshold, const Tensor& flip,
                            int64_t filters, const Tensor& bits) {
  const ScalarType dtype = threshold.scalar_type();
  FB_CHECK(dtype == ScalarType::Short || dtype == ScalarType::Int, op,
           "threshold: expected int16 or int32, got ", dtype_name(dtype));
  check_dtype(op, "flip", flip, ScalarType::Bool);
  check_filters(op, "threshold", threshold, filters, bits);
  check_filters(op, "flip", flip, filters, bits);
}

// `tensor`, or a copy in the order of its sizes.
inline Tensor dense(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  int64_t step = 1;
  bool is_dense = true;
  for (int64_t d = tensor.dim() - 1; d >= 0; --d) {
    const size_t i = static_cast<size_t>(d);
    is_dense = is_dense && (sizes[i] == 1 || strides[i] == step);
    step *= sizes[i];
  }
  if (is_dense || step == 0) return tensor;
  Tensor copy = empty_contiguous(tensor, sizes.data(), tensor.dim(), tensor.scalar_type());
  torch::stable::copy_(copy, tensor);
  return copy;
}

}  // namespace fastbandit
