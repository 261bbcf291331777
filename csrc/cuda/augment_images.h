#pragma once

#include "cuda/augment_batch.h"

// Writes out [count, C, H, W] of `dtype`. An id outside [0, total) gives an image of NaN.
extern "C" const char* launch_augment_images(void* out, int dtype, int channels_last,
                                             const fastbandit::AugmentBatch* batch, void* stream);
