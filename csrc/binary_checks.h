// Argument checks of the ops on packed signs, for every device.
#pragma once

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

}  // namespace fastbandit
