// Gabor filters and the sums over channels around them, on CUDA. The convolution from 1 to C_out
// channels is launch_depthwise_conv2d with a channel stride of 0. All pointers on the device;
// strides (in elements) on the host.
#pragma once

#include <cstdint>

// parameters: theta, sigma, gamma, wavelength, psi, [count] each with its stride. filters:
// [count][k][k], contiguous.
extern "C" const char* launch_gabor_filters(const void* const* parameters, const int64_t* strides,
                                            int dtype, int64_t count, int64_t kernel_size,
                                            void* filters, int filters_dtype, void* stream);

// grad: [count][k][k] with strides. gradients: five arrays of [count], in the parameters' dtype.
extern "C" const char* launch_gabor_filters_backward(const void* grad, int grad_dtype,
                                                     const int64_t* grad_strides,
                                                     const void* const* parameters,
                                                     const int64_t* strides, int dtype,
                                                     int64_t count, int64_t kernel_size,
                                                     void* const* gradients, void* stream);

// sum: [n][h][w] of x [n, c, h, w] over the channels, float64 for a float64 x, else float32.
extern "C" const char* launch_channel_sum(const void* x, int dtype, const int64_t* sizes,
                                          const int64_t* strides, void* sum, void* stream);

// The gradient of the channel sum, [n][h][w] in grad's dtype: the input gradient of the convolution
// from 1 to C_out channels. shape: as in depthwise_conv2d.h, with C_out channels. filters:
// [C_out][k][k], float64 for a float64 grad, else float32.
extern "C" const char* launch_gabor_backward_input(const void* grad, int dtype,
                                                   const int64_t* shape,
                                                   const int64_t* grad_strides,
                                                   const void* filters, void* grad_sum,
                                                   void* stream);

// What becomes of the numbers for theta, sigma, gamma and wavelength, [count] each with its stride,
// all of `dtype`. intervals: the least sigma, by how much more it may be, and so for the wavelength.
// results: four arrays of [count].
extern "C" const char* launch_gabor_parameters(const void* const* numbers, const int64_t* strides,
                                               int dtype, int64_t count, const double* intervals,
                                               void* const* results, void* stream);

// grads: of the four parameters, null where there is none, which is a gradient of 0. The number for
// gamma is not read.
extern "C" const char* launch_gabor_parameters_backward(
    const void* const* grads, const int64_t* grad_strides, const void* const* numbers,
    const int64_t* strides, int dtype, int64_t count, const double* intervals,
    void* const* results, void* stream);
