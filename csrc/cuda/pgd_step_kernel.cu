// fastbandit::pgd_step_ on CUDA.
#include "cuda/pgd_step.h"

#include "cuda/pack.h"
#include "layout.h"
#include "math/pgd.h"

namespace fastbandit {
namespace {

constexpr int kWaves = 16;  // blocks per multiprocessor: 8 resident ones, twice

// Dense tensors of equal strides: element i of each is at i. kCount elements make one 16-byte
// access of delta; the rest of the last pack is done one by one.
template <int kCount, bool kLower, bool kUpper, class T, class X>
__global__ void __launch_bounds__(kThreads)
    pgd_step_flat_kernel(T* __restrict__ delta, const T* __restrict__ grad,
                         const X* __restrict__ image, int64_t count, compute_t<T> step,
                         ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  const int64_t packs = count / kCount;
  for (int64_t pack = thread_in_grid(); pack < packs; pack += threads_of_grid()) {
    Pack<T, kCount> d = load_pack<kCount>(delta, pack);
    const Pack<T, kCount> g = load_pack<kCount>(grad, pack);
    Pack<X, kCount> x{};
    if (kLower || kUpper) x = load_pack<kCount>(image, pack);
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      d.value[i] = round_toward_zero<T>(pgd_update<kLower, kUpper, C>(
          to_compute(d.value[i]), to_compute(g.value[i]), image_value<C>(x.value[i]), step,
          bounds));
    store_pack<kCount>(delta, pack, d);
  }
  for (int64_t i = packs * kCount + thread_in_grid(); i < count; i += threads_of_grid())
    delta[i] = round_toward_zero<T>(pgd_update<kLower, kUpper, C>(
        to_compute(delta[i]), to_compute(grad[i]),
        kLower || kUpper ? image_value<C>(image[i]) : C(0), step, bounds));
}

// Any strides: one element per thread and turn.
template <bool kLower, bool kUpper, class T, class X>
__global__ void __launch_bounds__(kThreads)
    pgd_step_strided_kernel(T* __restrict__ delta, const T* __restrict__ grad,
                            const X* __restrict__ image, Layout<3> layout, compute_t<T> step,
                            ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  for (int64_t i = thread_in_grid(); i < layout.numel; i += threads_of_grid()) {
    int64_t at[3];
    layout_offsets(layout, i, at);
    delta[at[0]] = round_toward_zero<T>(pgd_update<kLower, kUpper, C>(
        to_compute(delta[at[0]]), to_compute(grad[at[1]]),
        kLower || kUpper ? image_value<C>(image[at[2]]) : C(0), step, bounds));
  }
}

struct Arguments {
  void* delta;
  const void* grad;
  const void* image;
  Layout<3> layout;
  double step, epsilon, lower, upper;
  void* stream;
};

template <bool kLower, bool kUpper, class T, class X>
void launch(const Arguments& a) {
  using C = compute_t<T>;
  constexpr int kCount = 16 / sizeof(T);
  T* const delta = static_cast<T*>(a.delta);
  const T* const grad = static_cast<const T*>(a.grad);
  const X* const image = static_cast<const X*>(a.image);
  const C step = static_cast<C>(a.step);
  const ProjectionBounds<C> bounds{static_cast<C>(a.epsilon), static_cast<C>(a.lower),
                                   static_cast<C>(a.upper)};
  const int64_t numel = a.layout.numel;
  if (!a.layout.flat()) {
    FB_LAUNCH((pgd_step_strided_kernel<kLower, kUpper, T, X>), grid_size(numel, kThreads, kWaves),
              kThreads, 0, a.stream, delta, grad, image, a.layout, step, bounds);
  } else if (pack_aligned<kCount>(delta) && pack_aligned<kCount>(grad) &&
             pack_aligned<kCount>(image)) {
    FB_LAUNCH((pgd_step_flat_kernel<kCount, kLower, kUpper, T, X>),
              grid_size((numel + kCount - 1) / kCount, kThreads, kWaves), kThreads, 0, a.stream,
              delta, grad, image, numel, step, bounds);
  } else {
    FB_LAUNCH((pgd_step_flat_kernel<1, kLower, kUpper, T, X>), grid_size(numel, kThreads, kWaves),
              kThreads, 0, a.stream, delta, grad, image, numel, step, bounds);
  }
}

template <class T, class X>
void launch_bounded(const Arguments& a, bool has_lower, bool has_upper) {
  if (has_lower) {
    has_upper ? launch<true, true, T, X>(a) : launch<true, false, T, X>(a);
  } else {
    has_upper ? launch<false, true, T, X>(a) : launch<false, false, T, X>(a);
  }
}

template <class T>
void launch_typed(const Arguments& a, int dtype, int image_dtype, bool has_lower, bool has_upper) {
  if (image_dtype == kUInt8) {
    launch_bounded<T, uint8_t>(a, has_lower, has_upper);
  } else if (image_dtype == dtype) {
    launch_bounded<T, T>(a, has_lower, has_upper);
  } else {
    launch_bounded<T, float>(a, has_lower, has_upper);
  }
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
  const Arguments a{delta, grad,    image, merge_dims<3>(dims, sizes, strides), step,
                    epsilon, lower, upper, stream};
  if (!a.layout.fits) return kTooManyDims;
  if (a.layout.numel == 0) return nullptr;
  switch (dtype) {
    case kFloat32: launch_typed<float>(a, dtype, image_dtype, has_lower, has_upper); break;
    case kFloat64: launch_typed<double>(a, dtype, image_dtype, has_lower, has_upper); break;
    case kBFloat16: launch_typed<bfloat16>(a, dtype, image_dtype, has_lower, has_upper); break;
    case kFloat16: launch_typed<float16>(a, dtype, image_dtype, has_lower, has_upper); break;
    default: return kUnknownDtype;
  }
  return launch_error();
}
