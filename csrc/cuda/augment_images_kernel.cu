// fastbandit::augment_images on CUDA. One thread writes one element, in the order of the result,
// so that the stores of a warp are one access; the bytes it reads lie close together.
#include "cuda/augment_images.h"

#include "cuda/pack.h"
#include "math/augment.h"
#include "math/pgd.h"

namespace fastbandit {
namespace {

struct Batch {
  int64_t count, total;
  int channels, height, width;
  int64_t image_stride[4];
  int channels_last;
  const int64_t* ids;
  int64_t id_stride;
  const int64_t* draws;
  int64_t draw_row, draw_step;
  const float* fill;
  int64_t fill_stride;
  int64_t crop_padding, cutout_length;
  int flip;
};

template <class T>
__global__ void __launch_bounds__(kThreads)
    augment_images_kernel(T* __restrict__ out, const uint8_t* __restrict__ images, Batch batch) {
  using C = compute_t<T>;
  const int plane = batch.height * batch.width;
  const int elements = batch.channels * plane;
  const int64_t work = batch.count * elements;
  for (int64_t i = thread_in_grid(); i < work; i += threads_of_grid()) {
    const int64_t n = i / elements;
    const int element = static_cast<int>(i - n * elements);
    int c, pixel;
    if (batch.channels_last) {
      pixel = element / batch.channels;
      c = element - pixel * batch.channels;
    } else {
      c = element / plane;
      pixel = element - c * plane;
    }
    const int h = pixel / batch.width;
    const int w = pixel - h * batch.width;
    // Read here, not on the host: a captured graph takes another batch at each replay.
    const int64_t id = batch.ids[n * batch.id_stride];
    if (id < 0 || id >= batch.total) {
      const C zero = C(0);
      out[i] = round_to_nearest<T>(zero / zero);
      continue;
    }
    const Augmentation change =
        augmentation(batch.draws ? batch.draws + id * batch.draw_row : nullptr, batch.draw_step,
                     batch.crop_padding, batch.flip != 0, batch.cutout_length);
    C value = C(0);
    if (change.painted(h, w)) {
      if (batch.fill) value = static_cast<C>(batch.fill[c * batch.fill_stride]);
    } else {
      const int64_t row = change.source_row(h);
      const int64_t column = change.source_column(w, batch.width);
      if (row >= 0 && row < batch.height && column >= 0 && column < batch.width)
        value = image_value<C>(
            images[id * batch.image_stride[0] + c * batch.image_stride[1] +
                   row * batch.image_stride[2] + column * batch.image_stride[3]]);
    }
    out[i] = round_to_nearest<T>(value);
  }
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_augment_images(void* out, const void* images, int dtype, int64_t total,
                                  const int64_t* sizes, const int64_t* image_strides,
                                  int channels_last, const int64_t* ids, int64_t id_stride,
                                  const int64_t* draws, int64_t draw_row, int64_t draw_step,
                                  const float* fill, int64_t fill_stride, int64_t crop_padding,
                                  int flip, int64_t cutout_length, void* stream) {
  using namespace fastbandit;
  if (sizes[0] == 0) return nullptr;
  Batch batch = {};
  batch.count = sizes[0];
  batch.total = total;
  batch.channels = static_cast<int>(sizes[1]);
  batch.height = static_cast<int>(sizes[2]);
  batch.width = static_cast<int>(sizes[3]);
  for (int d = 0; d < 4; ++d) batch.image_stride[d] = image_strides[d];
  batch.channels_last = channels_last;
  batch.ids = ids;
  batch.id_stride = id_stride;
  batch.draws = draws;
  batch.draw_row = draw_row;
  batch.draw_step = draw_step;
  batch.fill = fill;
  batch.fill_stride = fill_stride;
  batch.crop_padding = crop_padding;
  batch.cutout_length = cutout_length;
  batch.flip = flip;
  const int64_t work = sizes[0] * sizes[1] * sizes[2] * sizes[3];
  const unsigned grid = grid_size(work, kThreads);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    FB_LAUNCH((augment_images_kernel<T>), grid, kThreads, 0, stream, static_cast<T*>(out),
              static_cast<const uint8_t*>(images), batch);
  };
  switch (dtype) {
    case kFloat32: run(float{}); break;
    case kFloat64: run(double{}); break;
    case kBFloat16: run(bfloat16{}); break;
    case kFloat16: run(float16{}); break;
    default: return kUnknownDtype;
  }
  return launch_error();
}
