// fastbandit::augment_images on CUDA. One thread writes one element, in the order of the result,
// so that the stores of a warp are one access; the bytes it reads lie close together.
#include "cuda/augment_images.h"

#include "cuda/augment_pixel.h"

namespace fastbandit {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads)
    augment_images_kernel(T* __restrict__ out, AugmentBatch batch, int channels_last) {
  using C = compute_t<T>;
  const int plane = batch.height * batch.width;
  const int elements = batch.channels * plane;
  const int64_t work = batch.count * elements;
  for (int64_t i = thread_in_grid(); i < work; i += threads_of_grid()) {
    const int64_t n = i / elements;
    const int element = static_cast<int>(i - n * elements);
    int c, pixel;
    if (channels_last) {
      pixel = element / batch.channels;
      c = element - pixel * batch.channels;
    } else {
      c = element / plane;
      pixel = element - c * plane;
    }
    const int h = pixel / batch.width;
    const int w = pixel - h * batch.width;
    const int64_t id = augment_id(batch, n);
    if (!augment_id_fits(batch, id)) {
      const C zero = C(0);
      out[i] = round_to_nearest<T>(zero / zero);
      continue;
    }
    out[i] = round_to_nearest<T>(
        augmented_pixel<C>(batch, id, augmentation_of(batch, id), c, h, w));
  }
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_augment_images(void* out, int dtype, int channels_last,
                                  const fastbandit::AugmentBatch* batch, void* stream) {
  using namespace fastbandit;
  if (batch->count == 0) return nullptr;
  const int64_t work = batch->count * batch->channels * batch->height * batch->width;
  return launch_floating(dtype, [&](auto zero) {
    using T = decltype(zero);
    FB_LAUNCH((augment_images_kernel<T>), grid_size(work, kThreads), kThreads, 0, stream,
              static_cast<T*>(out), *batch, channels_last);
  });
}
