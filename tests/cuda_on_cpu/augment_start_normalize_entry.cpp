// launch_augment_start_normalize from plain arguments.
#include "augment_batch_of.h"
#include "cuda/augment_start_normalize.h"

extern "C" const char* augment_start_normalize_on_cpu(
    float* image, float* delta, void* out, int dtype, int channels_last, const uint8_t* images,
    const int64_t* ids, const int64_t* draws, const float* fill, const int64_t* numbers,
    int64_t seed, int64_t offset, const int64_t* seed_tensor, const int64_t* offset_tensor,
    const float* mean, int64_t mean_stride, const float* std, int64_t std_stride, double epsilon,
    int has_lower, double lower, int has_upper, double upper) {
  const auto batch = augment_batch_of(images, ids, draws, fill, numbers);
  return launch_augment_start_normalize(image, delta, out, dtype, channels_last, &batch, seed,
                                        offset, seed_tensor, offset_tensor, mean, mean_stride, std,
                                        std_stride, epsilon, has_lower, lower, has_upper, upper,
                                        nullptr);
}
