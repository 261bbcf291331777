#pragma once

#include "cuda/augment_batch.h"

// Writes image and delta (float) and out (`dtype`), each [count, C, H, W] in the same layout. seed
// and offset come from the host, or from one int64 each on the device where those pointers are not
// null. mean, std: float [C]. An id outside [0, total) gives images of NaN.
extern "C" const char* launch_augment_start_normalize(
    float* image, float* delta, void* out, int dtype, int channels_last,
    const fastbandit::AugmentBatch* batch, int64_t seed, int64_t offset,
    const int64_t* seed_tensor, const int64_t* offset_tensor, const float* mean,
    int64_t mean_stride, const float* std, int64_t std_stride, double epsilon, int has_lower,
    double lower, int has_upper, double upper, void* stream);
