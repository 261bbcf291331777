// fastbandit::augment_start_normalize on CUDA. One thread draws the four numbers of one counter, so
// it makes four neighbouring elements of an image in C, H, W order, and all that belongs to them.
#include "cuda/augment_start_normalize.h"

#include "cuda/augment_pixel.h"
#include "math/philox.h"

namespace fastbandit {
namespace {

struct Draw {
  int64_t seed, offset;
  const int64_t* seed_tensor;
  const int64_t* offset_tensor;
};

struct Statistics {
  const float* mean;
  const float* std;
  int64_t mean_stride, std_stride;
};

// kPacked: the order in memory is that of the numbering, and four elements are one access.
template <bool kPacked, class O>
__global__ void __launch_bounds__(kThreads, kBlocks) augment_start_normalize_kernel(
    float* __restrict__ image, float* __restrict__ delta, O* __restrict__ out, AugmentBatch batch,
    int channels_last, Draw draw, Statistics statistics, ProjectionBounds<float> bounds) {
  const int plane = batch.height * batch.width;
  const int elements = batch.channels * plane;
  const int quarters = elements / 4 + (elements % 4 != 0);
  // Read here, not on the host: a captured graph draws anew when their values change.
  const int64_t seed = draw.seed_tensor ? *draw.seed_tensor : draw.seed;
  const int64_t offset = draw.offset_tensor ? *draw.offset_tensor : draw.offset;
  const int64_t work = batch.count * quarters;
  for (int64_t i = thread_in_grid(); i < work; i += threads_of_grid()) {
    const int64_t n = i / quarters;
    const int quarter = static_cast<int>(i - n * quarters);
    const int64_t id = augment_id(batch, n);
    const bool fits = augment_id_fits(batch, id);
    const Augmentation change =
        fits ? augmentation_of(batch, id) : Augmentation{0, 0, false, 0, 0, 0};
    PhiloxWords words =
        philox_quarter(philox_stream(seed, offset, id), static_cast<uint32_t>(quarter));
    Pack<float, 4> x, d;
    Pack<O, 4> result;
    int c = quarter * 4 / plane;
    int h = (quarter * 4 - c * plane) / batch.width;
    int w = quarter * 4 - c * plane - h * batch.width;
    // Unrolled, the scattered stores would take more registers than there are.
#pragma unroll(kPacked ? 4 : 1)
    for (int j = 0; j < 4; ++j) {
      if (!kPacked && j >= elements - quarter * 4) break;
      const uint32_t word = words.word[0];
      words.word[0] = words.word[1];
      words.word[1] = words.word[2];
      words.word[2] = words.word[3];
      const float zero = 0.0f;
      const float pixel = fits ? augmented_pixel<float>(batch, id, change, c, h, w) : zero / zero;
      const float start =
          project<kSomeBounds>(uniform_symmetric<float>(word) * bounds.epsilon, pixel, bounds);
      const float mean = statistics.mean[c * statistics.mean_stride];
      const float std = statistics.std[c * statistics.std_stride];
      const O normalized =
          round_to_nearest<O>(static_cast<compute_t<O>>((pixel + start - mean) / std));
      if (kPacked) {
        x.value[j] = pixel;
        d.value[j] = start;
        result.value[j] = normalized;
      } else {
        const int64_t at =
            n * elements + (channels_last ? (h * batch.width + w) * batch.channels + c
                                          : quarter * 4 + j);
        image[at] = pixel;
        delta[at] = start;
        out[at] = normalized;
      }
      if (++w < batch.width) continue;
      w = 0;
      if (++h < batch.height) continue;
      h = 0;
      ++c;
    }
    if (kPacked) {
      store_pack<4>(image, i, x);
      store_pack<4>(delta, i, d);
      store_pack<4>(out, i, result);
    }
  }
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_augment_start_normalize(
    float* image, float* delta, void* out, int dtype, int channels_last,
    const fastbandit::AugmentBatch* batch, int64_t seed, int64_t offset,
    const int64_t* seed_tensor, const int64_t* offset_tensor, const float* mean,
    int64_t mean_stride, const float* std, int64_t std_stride, double epsilon, int has_lower,
    double lower, int has_upper, double upper, void* stream) {
  using namespace fastbandit;
  if (batch->count == 0) return nullptr;
  const int64_t elements = int64_t{batch->channels} * batch->height * batch->width;
  const Draw draw{seed, offset, seed_tensor, offset_tensor};
  const Statistics statistics{mean, std, mean_stride, std_stride};
  const auto bounds = projection_bounds<float>(epsilon, has_lower, lower, has_upper, upper);
  return launch_floating(dtype, [&](auto zero) {
    using O = decltype(zero);
    O* const to = static_cast<O*>(out);
    const bool ordered = !channels_last || batch->channels == 1;
    const bool packed = ordered && elements % 4 == 0 && pack_aligned<4>(image) &&
                        pack_aligned<4>(delta) && pack_aligned<4>(to);
    const unsigned grid = grid_size(batch->count * ((elements + 3) / 4), kThreads);
    if (packed) {
      FB_LAUNCH((augment_start_normalize_kernel<true, O>), grid, kThreads, 0, stream, image, delta,
                to, *batch, channels_last, draw, statistics, bounds);
    } else {
      FB_LAUNCH((augment_start_normalize_kernel<false, O>), grid, kThreads, 0, stream, image,
                delta, to, *batch, channels_last, draw, statistics, bounds);
    }
  });
}
