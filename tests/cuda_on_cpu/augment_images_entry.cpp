// launch_augment_images from plain arguments.
#include "augment_batch_of.h"
#include "cuda/augment_images.h"

extern "C" const char* augment_images_on_cpu(void* out, int dtype, int channels_last,
                                             const uint8_t* images, const int64_t* ids,
                                             const int64_t* draws, const float* fill,
                                             const int64_t* numbers) {
  const auto batch = augment_batch_of(images, ids, draws, fill, numbers);
  return launch_augment_images(out, dtype, channels_last, &batch, nullptr);
}
