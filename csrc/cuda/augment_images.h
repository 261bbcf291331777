#pragma once

#include <cstdint>

// Writes out [count, C, H, W] of `dtype`, sizes = {count, C, H, W}, from uint8 images [total, C,
// H, W]. draws: int64 [total, 5] or null; fill: float [C] or null. An id outside [0, total) gives
// an image of NaN.
extern "C" const char* launch_augment_images(void* out, const void* images, int dtype,
                                             int64_t total, const int64_t* sizes,
                                             const int64_t* image_strides, int channels_last,
                                             const int64_t* ids, int64_t id_stride,
                                             const int64_t* draws, int64_t draw_row,
                                             int64_t draw_step, const float* fill,
                                             int64_t fill_stride, int64_t crop_padding, int flip,
                                             int64_t cutout_length, void* stream);
