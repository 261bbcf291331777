#pragma once

#include <cstdint>

// All tensors [N, C, H, W]; mean and std [C], float32 or `dtype` as statistics_dtype says for each.
// out has its own dtype and strides, dense, NCHW or channels-last.
extern "C" const char* launch_pgd_step_normalize(
    void* delta, const void* grad, const void* image, const void* mean, const void* std, void* out,
    int dtype, int image_dtype, int mean_dtype, int std_dtype, int out_dtype, const int64_t* sizes,
    const int64_t* delta_strides, const int64_t* grad_strides, const int64_t* image_strides,
    const int64_t* out_strides, int64_t mean_stride, int64_t std_stride, double step,
    double epsilon, int has_lower, double lower, int has_upper, double upper, void* stream);
