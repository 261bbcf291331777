// fastbandit::pgd_step_ on CUDA.
#include "cuda/pgd_step.h"

#include "cuda/pack.h"
#include "layout.h"
#include "math/pgd.h"

namespace fastbandit {
namespace {

// Dense tensors of equal strides: element i of each is at i. kCount elements make one 16-byte
// access of delta; what is left of the last pack is done one by one.
template <int kCount, class T, class X>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pgd_step_flat_kernel(T* __restrict__ delta, const T* __restrict__ grad,
                         const X* __restrict__ image, int64_t count, compute_t<T> step,
                         ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  const bool bounded = bounds.has_lower || bounds.has_upper;
  const int64_t packs = count / kCount;
  for (int64_t pack = thread_in_grid(); pack < packs; pack += threads_of_grid()) {
    Pack<T, kCount> d = load_pack<kCount>(delta, pack);
    const Pack<T, kCount> g = load_pack<kCount>(grad, pack);
    Pack<X, kCount> x{};
    if (bounded) x = load_pack<kCount>(image, pack);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      d.value[i] = round_toward_zero<T>(
          pgd_update<kSomeBounds, C>(to_compute(d.value[i]), to_compute(g.value[i]),
                                     image_value<C>(x.value[i]), step, bounds));
    store_pack<kCount>(delta, pack, d);
  }
  for (int64_t i = packs * kCount + thread_in_grid(); i < count; i += threads_of_grid())
    delta[i] = round_toward_zero<T>(pgd_update<kSomeBounds, C>(
        to_compute(delta[i]), to_compute(grad[i]), bounded ? image_value<C>(image[i]) : C(0), step,
        bounds));
}

// Any strides and alignment: one element per thread and turn.
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    pgd_step_strided_kernel(T* __restrict__ delta, const T* __restrict__ grad,
                            const void* __restrict__ image, int image_dtype, Layout<3> layout,
                            compute_t<T> step, ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  const bool bounded = bounds.has_lower || bounds.has_upper;
  for (int64_t i = thread_in_grid(); i < layout.numel; i += threads_of_grid()) {
    int64_t at[3];
    layout_offsets(layout, i, at);
    const C pixel = bounded ? pixel_at<T>(image, image_dtype, at[2]) : C(0);
    delta[at[0]] = round_toward_zero<T>(pgd_update<kSomeBounds, C>(
        to_compute(delta[at[0]]), to_compute(grad[at[1]]), pixel, step, bounds));
  }
}

struct Arguments {
  void* delta;
  const void* grad;
  const void* image;
  int image_dtype;
  Layout<3> layout;
  double step, epsilon;
  int has_lower, has_upper;
  double lower, upper;
  void* stream;
};

// False where the pointers are not aligned to whole packs.
template <class T, class X>
bool launch_flat(const Arguments& a, ProjectionBounds<compute_t<T>> bounds) {
  constexpr int kCount = 16 / sizeof(T);
  T* const delta = static_cast<T*>(a.delta);
  const T* const grad = static_cast<const T*>(a.grad);
  const X* const image = static_cast<const X*>(a.image);
  if (!pack_aligned<kCount>(delta) || !pack_aligned<kCount>(grad) || !pack_aligned<kCount>(image))
    return false;
  FB_LAUNCH((pgd_step_flat_kernel<kCount, T, X>),
            grid_size((a.layout.numel + kCount - 1) / kCount, kThreads), kThreads, 0, a.stream,
            delta, grad, image, a.layout.numel, static_cast<compute_t<T>>(a.step), bounds);
  return true;
}

template <class T>
void launch(const Arguments& a, int dtype) {
  using C = compute_t<T>;
  const auto bounds =
      projection_bounds<C>(a.epsilon, a.has_lower, a.lower, a.has_upper, a.upper);
  if (a.layout.flat()) {
    if (a.image_dtype == kUInt8 ? launch_flat<T, uint8_t>(a, bounds)
        : a.image_dtype == dtype ? launch_flat<T, T>(a, bounds)
                                 : launch_flat<T, float>(a, bounds))
      return;
  }
  FB_LAUNCH((pgd_step_strided_kernel<T>), grid_size(a.layout.numel, kThreads), kThreads, 0,
            a.stream, static_cast<T*>(a.delta), static_cast<const T*>(a.grad), a.image,
            a.image_dtype, a.layout, static_cast<C>(a.step), bounds);
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_pgd_step(void* delta, const void* grad, const void* image, int dtype,
                            int image_dtype, int dims, const int64_t* sizes,
                            const int64_t* delta_strides, const int64_t* grad_strides,
                            const int64_t* image_strides, double step, double epsilon,
                            int has_lower, double lower, int has_upper, double upper,
                            void* stream) {
  using namespace fastbandit;
  const int64_t* strides[3] = {delta_strides, grad_strides, image_strides};
  const Arguments a{delta,     grad,  image,   image_dtype, merge_dims<3>(dims, sizes, strides),
                    step,      epsilon, has_lower, has_upper, lower,
                    upper,     stream};
  if (!a.layout.fits) return kTooManyDims;
  if (a.layout.numel == 0) return nullptr;
  return launch_floating(dtype, [&](auto zero) { launch<decltype(zero)>(a, dtype); });
}
