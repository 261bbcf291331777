#pragma once

#include <cstdint>

// Fills delta (dtype; float32 for a uint8 image) of shape [N, ...], `dims` of sizes and strides.
// seed and offset come from the host, or from one int64 each on the device where those pointers
// are not null. index: int64 [N] of image ids on the device, null for 0..N-1.
extern "C" const char* launch_random_start(void* delta, const void* image, int dtype,
                                           int image_dtype, int dims, const int64_t* sizes,
                                           const int64_t* delta_strides,
                                           const int64_t* image_strides, int64_t seed,
                                           int64_t offset, const int64_t* seed_tensor,
                                           const int64_t* offset_tensor, const int64_t* index,
                                           int64_t index_stride, double epsilon, int has_lower,
                                           double lower, int has_upper, double upper,
                                           void* stream);
