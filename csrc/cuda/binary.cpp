// fastbandit::pack_sign, unpack_sign, binary_conv2d and binary_conv2d_bits on CUDA: checks,
// allocation, device, stream.
#include "cuda/binary.h"

#include <array>

#include "binary_checks.h"
#include "cuda/glue.h"
#include "pgd_checks.h"

namespace fastbandit {
namespace {

std::array<int64_t, kSignFields> numbers_of(const SignShape& s, int64_t channels, bool plus_one) {
  const ConvShape& c = s.conv;
  return {c.n,        c.h,        c.w,     c.oh,    c.ow,         channels,     c.c,      c.kernel_h,
          c.kernel_w, c.stride_h, c.stride_w, c.pad_h, c.pad_w, c.dilation_h, c.dilation_w, plus_one,
          s.depthwise};
}

const uint32_t* halves(const Tensor& bits) {
  return static_cast<const uint32_t*>(bits.const_data_ptr());
}

// A filter vector as the launchers take it.
struct Vector {
  const void* data = nullptr;
  int dtype = kFloat32;
  int64_t stride = 0;

  Vector(const char* op, const std::optional<Tensor>& tensor) {
    if (!tensor) return;
    data = tensor->const_data_ptr();
    dtype = dtype_code(op, *tensor);
    stride = tensor->stride(0);
  }
};

Tensor pack_sign(Tensor x, std::optional<Tensor> threshold) {
  constexpr const char* kOp = "pack_sign";
  check_sign_map(kOp, x, threshold);
  const DeviceGuard guard(x.get_device_index());
  const int64_t sizes[4] = {x.size(0), x.size(2), x.size(3), words_of(x.size(1))};
  Tensor bits = empty_contiguous(x, sizes, 4, ScalarType::Long);
  if (bits.numel() == 0) return bits;
  const Vector limit(kOp, threshold);
  check_launch(kOp, launch_pack_sign(x.const_data_ptr(), dtype_code(kOp, x), x.sizes().data(),
                                     x.strides().data(), limit.data, limit.dtype, limit.stride,
                                     static_cast<uint32_t*>(bits.mutable_data_ptr()),
                                     current_stream(x)));
  return bits;
}

Tensor unpack_sign(Tensor bits, int64_t channels, ScalarType dtype,
                   torch::headeronly::MemoryFormat memory_format) {
  constexpr const char* kOp = "unpack_sign";
  check_sign_bits(kOp, bits, channels);
  FB_CHECK(is_floating(dtype), kOp, "dtype: expected float32, float64, bfloat16 or float16, got ",
           dtype_name(dtype));
  const int64_t sizes[4] = {bits.size(0), channels, bits.size(1), bits.size(2)};
  check_elements(kOp, "bits", {sizes[0], sizes[1], sizes[2], sizes[3]});
  const DeviceGuard guard(bits.get_device_index());
  int64_t strides[4];
  format_strides(sizes, is_channels_last(kOp, memory_format), strides);
  Tensor x = empty_strided(bits, sizes, strides, 4, dtype);
  if (x.numel() == 0) return x;
  const Tensor source = dense(bits);
  check_launch(kOp, launch_unpack_sign(halves(source), x.mutable_data_ptr(), dtype_code(kOp, x),
                                       sizes, strides, current_stream(bits)));
  return x;
}

Tensor binary_conv2d(Tensor bits, Tensor weight_bits, int64_t channels, Pair stride, Pair padding,
                     Pair dilation, int64_t groups, bool plus_one, std::optional<Tensor> scale,
                     std::optional<Tensor> bias, ScalarType out_dtype) {
  constexpr const char* kOp = "binary_conv2d";
  const SignShape s =
      sign_conv_shape(kOp, bits, weight_bits, channels, stride, padding, dilation, groups);
  check_affine(kOp, scale, bias, out_dtype, s.conv.c, bits);
  const DeviceGuard guard(bits.get_device_index());
  const int64_t sizes[4] = {s.conv.n, s.conv.c, s.conv.oh, s.conv.ow};
  const int64_t strides[4] = {s.conv.oh * s.conv.ow * s.conv.c, 1, s.conv.ow * s.conv.c, s.conv.c};
  Tensor y = empty_strided(bits, sizes, strides, 4, out_dtype);
  if (y.numel() == 0) return y;
  const Tensor map = dense(bits), filters = dense(weight_bits);
  const Vector factor(kOp, scale), shift(kOp, bias);
  const auto shape = numbers_of(s, channels, plus_one);
  check_launch(kOp, launch_sign_conv2d(halves(map), halves(filters), shape.data(), factor.data,
                                       factor.dtype, factor.stride, shift.data, shift.dtype,
                                       shift.stride, y.mutable_data_ptr(), dtype_code(kOp, y),
                                       kSignAuto, current_stream(bits)));
  return y;
}

Tensor binary_conv2d_bits(Tensor bits, Tensor weight_bits, int64_t channels, Pair stride,
                          Pair padding, Pair dilation, int64_t groups, bool plus_one,
                          Tensor threshold, Tensor flip) {
  constexpr const char* kOp = "binary_conv2d_bits";
  const SignShape s =
      sign_conv_shape(kOp, bits, weight_bits, channels, stride, padding, dilation, groups);
  check_threshold(kOp, threshold, flip, s.conv.c, bits);
  const DeviceGuard guard(bits.get_device_index());
  const int64_t sizes[4] = {s.conv.n, s.conv.oh, s.conv.ow, words_of(s.conv.c)};
  Tensor y = empty_contiguous(bits, sizes, 4, ScalarType::Long);
  if (y.numel() == 0) return y;
  const Tensor map = dense(bits), filters = dense(weight_bits);
  const auto shape = numbers_of(s, channels, plus_one);
  const int bytes = threshold.scalar_type() == ScalarType::Short ? 2 : 4;
  check_launch(kOp, launch_sign_conv2d_bits(
                        halves(map), halves(filters), shape.data(), threshold.const_data_ptr(),
                        bytes, threshold.stride(0), flip.const_data_ptr(), flip.stride(0),
                        static_cast<uint32_t*>(y.mutable_data_ptr()), kSignAuto,
                        current_stream(bits)));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("pack_sign", TORCH_BOX(&pack_sign));
  library.impl("unpack_sign", TORCH_BOX(&unpack_sign));
  library.impl("binary_conv2d", TORCH_BOX(&binary_conv2d));
  library.impl("binary_conv2d_bits", TORCH_BOX(&binary_conv2d_bits));
}

}  // namespace fastbandit
