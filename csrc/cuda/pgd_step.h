#pragma once

#include <cstdint>

// All pointers on the device; sizes and strides (in elements) on the host, `dims` of each.
// dtype: delta and grad; image_dtype: the same, kFloat32 or kUInt8.
extern "C" const char* launch_pgd_step(void* delta, const void* grad, const void* image, int dtype,
                                       int image_dtype, int dims, const int64_t* sizes,
                                       const int64_t* delta_strides, const int64_t* grad_strides,
                                       const int64_t* image_strides, double step, double epsilon,
                                       int has_lower, double lower, int has_upper, double upper,
                                       void* stream);
