// Packed signs on CUDA: packing, unpacking, convolutions. All pointers on the device; sizes, strides
// (in elements) and shapes on the host. Bits are 32-bit halves of the ops' 64-bit words, lower half
// first, so a pixel has 2 ceil(C / 64) of them.
#pragma once

#include <cstdint>

namespace fastbandit {

// Numbers of a convolution, in this order.
enum SignField : int {
  kSignN, kSignH, kSignW, kSignOutH, kSignOutW, kSignChannels, kSignFilters, kSignKernelH,
  kSignKernelW, kSignStrideH, kSignStrideW, kSignPadH, kSignPadW, kSignDilationH, kSignDilationW,
  kSignPlusOne, kSignDepthwise, kSignFields
};

// Which kernel computes a dense convolution: by architecture and size, or a certain one.
enum SignKernel : int { kSignAuto = 0, kSignCount = 1, kSignMma = 2 };

}  // namespace fastbandit

// bits: [n][h][w][2 ceil(c / 64)] of x with sizes n, c, h, w. threshold: [c], or null.
extern "C" const char* launch_pack_sign(const void* x, int dtype, const int64_t* sizes,
                                        const int64_t* strides, const void* threshold,
                                        int threshold_dtype, int64_t threshold_stride,
                                        uint32_t* bits, void* stream);

// x: sizes n, c, h, w with strides.
extern "C" const char* launch_unpack_sign(const uint32_t* bits, void* x, int dtype,
                                          const int64_t* sizes, const int64_t* strides,
                                          void* stream);

// y: [n][out_h][out_w][filters]. scale, bias: [filters] or null; wide: product and sum in float64.
// weight: [filters][kernel_h][kernel_w][2 ceil(c / 64)], of a depthwise one with the filters last.
extern "C" const char* launch_sign_conv2d(const uint32_t* bits, const uint32_t* weight,
                                          const int64_t* shape, const void* scale, int scale_dtype,
                                          int64_t scale_stride, const void* bias, int bias_dtype,
                                          int64_t bias_stride, void* y, int dtype, int kernel,
                                          void* stream);

// y: [n][out_h][out_w][2 ceil(filters / 64)]. threshold: int16 or int32 by threshold_bytes. flip:
// bool.
extern "C" const char* launch_sign_conv2d_bits(const uint32_t* bits, const uint32_t* weight,
                                               const int64_t* shape, const void* threshold,
                                               int threshold_bytes, int64_t threshold_stride,
                                               const void* flip, int64_t flip_stride, uint32_t* y,
                                               int kernel, void* stream);
