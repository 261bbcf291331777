// Depthwise convolution on CUDA, and the convolution from 1 to C channels that a Gabor layer is: x
// with a channel stride of 0. All pointers on the device; shapes and strides (in elements) on the
// host.
#pragma once

#include <cstdint>

namespace fastbandit {

// The numbers of `shape`, in this order.
enum ConvField {
  kConvN, kConvC, kConvH, kConvW, kConvOutH, kConvOutW, kConvKernelH, kConvKernelW, kConvStrideH,
  kConvStrideW, kConvPadH, kConvPadW, kConvDilationH, kConvDilationW, kConvRelu, kConvFields
};

}  // namespace fastbandit

// Forward (backward = 0): from = x [N, C, H, W], to = y [N, C, OH, OW].
// Input gradient (backward = 1): from = grad, to = grad_x; with relu, 0 where mask = x <= 0.
// weight: [C][kernel_h][kernel_w], contiguous. to_dtype is also that of the mask.
extern "C" const char* launch_depthwise_conv2d(const void* from, int from_dtype, const void* weight,
                                               int weight_dtype, const void* mask, void* to,
                                               int to_dtype, const int64_t* shape,
                                               const int64_t* from_strides,
                                               const int64_t* mask_strides,
                                               const int64_t* to_strides, int backward,
                                               void* stream);

// Floats of scratch memory that the weight gradient needs; 0 for shapes of the general kernel.
extern "C" int64_t depthwise_conv2d_partial_floats(int grad_dtype, const int64_t* shape,
                                                   const int64_t* grad_strides,
                                                   const int64_t* x_strides);

// grad_weight: [C][kernel_h][kernel_w], contiguous. The same bits at every run.
extern "C" const char* launch_depthwise_conv2d_backward_weight(
    const void* grad, int grad_dtype, const void* x, int x_dtype, float* partial,
    void* grad_weight, int weight_dtype, const int64_t* shape, const int64_t* grad_strides,
    const int64_t* x_strides, void* stream);
