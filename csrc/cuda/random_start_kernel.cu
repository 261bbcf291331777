// fastbandit::random_start on CUDA. One thread draws the four numbers of one counter.
#include "cuda/random_start.h"

#include "cuda/pack.h"
#include "layout.h"
#include "math/pgd.h"
#include "math/philox.h"

namespace fastbandit {
namespace {

struct Draw {
  int64_t seed, offset;
  const int64_t* seed_tensor;
  const int64_t* offset_tensor;
  const int64_t* index;
  int64_t index_stride;
  int64_t images, elements, quarters;  // elements of one image, counters of one image
};

// Layout of one image: the numbering of its elements, delta and image.
enum { kNumber, kDelta, kImage, kTensors };

// kContiguous: both tensors hold each image in logical order, one image after the other, and four
// elements of delta can be written at once.
template <bool kContiguous, class T>
__global__ void __launch_bounds__(kThreads)
    random_start_kernel(T* __restrict__ delta, const void* __restrict__ image, int image_dtype,
                        Draw draw, Layout<kTensors> layout, int64_t delta_step,
                        int64_t image_step, ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  const bool bounded = bounds.has_lower || bounds.has_upper;
  // Read here, not on the host: a captured graph draws anew when their values change.
  const int64_t seed = draw.seed_tensor ? *draw.seed_tensor : draw.seed;
  const int64_t offset = draw.offset_tensor ? *draw.offset_tensor : draw.offset;
  const int64_t work = draw.images * draw.quarters;
  for (int64_t i = thread_in_grid(); i < work; i += threads_of_grid()) {
    const int64_t n = i / draw.quarters;
    const int64_t quarter = i - n * draw.quarters;
    const int64_t id = draw.index ? draw.index[n * draw.index_stride] : n;
    PhiloxWords words =
        philox_quarter(philox_stream(seed, offset, id), static_cast<uint32_t>(quarter));
    const int64_t first = quarter * 4;
    if (kContiguous) {
      const int64_t base = n * draw.elements + first;
      Pack<T, 4> pack;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const C pixel = bounded ? pixel_at<T>(image, image_dtype, base + j) : C(0);
        pack.value[j] = round_toward_zero<T>(project<kSomeBounds>(
            uniform_symmetric<C>(words.word[j]) * bounds.epsilon, pixel, bounds));
      }
      store_pack<4>(delta, base / 4, pack);
    } else {
      // Not unrolled: four walks over up to eight dimensions take nvcc minutes to compile.
#pragma unroll 1
      for (int j = 0; j < 4; ++j) {
        if (first + j >= draw.elements) break;
        int64_t at[kTensors];
        layout_offsets(layout, first + j, at);
        const C pixel =
            bounded ? pixel_at<T>(image, image_dtype, n * image_step + at[kImage]) : C(0);
        delta[n * delta_step + at[kDelta]] = round_toward_zero<T>(project<kSomeBounds>(
            uniform_symmetric<C>(words.word[0]) * bounds.epsilon, pixel, bounds));
        // Moved down: words with an index that is not constant would leave their registers.
        for (int k = 1; k < 4; ++k) words.word[k - 1] = words.word[k];
      }
    }
  }
}

template <class T>
void launch(void* delta, const void* image, int image_dtype, const Draw& draw,
            const Layout<kTensors>& layout, int64_t delta_step, int64_t image_step,
            double epsilon, int has_lower, double lower, int has_upper, double upper,
            void* stream) {
  const auto bounds =
      projection_bounds<compute_t<T>>(epsilon, has_lower, lower, has_upper, upper);
  T* const out = static_cast<T*>(delta);
  const unsigned grid = grid_size(draw.images * draw.quarters, kThreads);
  const bool contiguous = layout.flat() && draw.elements % 4 == 0 && pack_aligned<4>(out) &&
                          (draw.images == 1 ||
                           (delta_step == draw.elements && image_step == draw.elements));
  if (contiguous) {
    FB_LAUNCH((random_start_kernel<true, T>), grid, kThreads, 0, stream, out, image, image_dtype,
              draw, layout, delta_step, image_step, bounds);
  } else {
    FB_LAUNCH((random_start_kernel<false, T>), grid, kThreads, 0, stream, out, image, image_dtype,
              draw, layout, delta_step, image_step, bounds);
  }
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_random_start(void* delta, const void* image, int dtype, int image_dtype,
                                int dims, const int64_t* sizes, const int64_t* delta_strides,
                                const int64_t* image_strides, int64_t seed, int64_t offset,
                                const int64_t* seed_tensor, const int64_t* offset_tensor,
                                const int64_t* index, int64_t index_stride, double epsilon,
                                int has_lower, double lower, int has_upper, double upper,
                                void* stream) {
  using namespace fastbandit;
  if (dims < 1 || dims > 64) return kTooManyDims;
  int64_t number_strides[64];
  int64_t elements = 1;
  for (int d = dims - 1; d > 0; --d) {
    number_strides[d - 1] = elements;
    elements *= sizes[d];
  }
  if (elements == 0 || sizes[0] == 0) return nullptr;
  const int64_t* strides[kTensors] = {number_strides, delta_strides + 1, image_strides + 1};
  const auto layout = merge_dims<kTensors>(dims - 1, sizes + 1, strides);
  if (!layout.fits) return kTooManyDims;
  const Draw draw{seed,  offset,       seed_tensor, offset_tensor,
                  index, index_stride, sizes[0],    elements,      (elements + 3) / 4};
  return launch_floating(dtype, [&](auto zero) {
    launch<decltype(zero)>(delta, image, image_dtype, draw, layout, delta_strides[0],
                           image_strides[0], epsilon, has_lower, lower, has_upper, upper, stream);
  });
}
