// fastbandit::pgd_step_normalize_ on CUDA: the step and the model's input in one pass.
//
// The dtypes of image and result are read at run time: memory is what this waits for, and one
// kernel for each dtype of delta instead of one for each combination keeps the library small.
#include "cuda/pgd_step_normalize.h"

#include "cuda/pack.h"
#include "layout.h"
#include "math/pgd.h"

namespace fastbandit {
namespace {

enum { kDelta, kGrad, kImage, kOut, kChannel, kTensors };

struct Statistics {
  const void* mean;
  const void* std;
  int mean_dtype, std_dtype;
  int64_t mean_stride, std_stride;
};

// One value of mean or std, which are float32 or T.
template <class T>
__device__ __forceinline__ compute_t<T> statistic(const void* data, int dtype, int64_t at) {
  return pixel_at<T>(data, dtype, at);
}

template <class C>
__device__ __forceinline__ void store_result(void* out, int dtype, int64_t at, C value) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(out)[at] = static_cast<float>(value); break;
    case kFloat64: static_cast<double*>(out)[at] = static_cast<double>(value); break;
    case kBFloat16:
      static_cast<bfloat16*>(out)[at] = round_to_nearest<bfloat16>(static_cast<float>(value));
      break;
    default:
      static_cast<float16*>(out)[at] = round_to_nearest<float16>(static_cast<float>(value));
  }
}

template <class O, int kCount, class C>
__device__ __forceinline__ void store_results(void* out, int64_t pack, const C (&value)[kCount]) {
  Pack<O, kCount> rounded;
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    rounded.value[i] = round_to_nearest<O>(static_cast<compute_t<O>>(value[i]));
  store_pack<kCount>(static_cast<O*>(out), pack, rounded);
}

template <class X, int kCount, class C>
__device__ __forceinline__ void load_pixels(const void* image, int64_t pack, C (&pixel)[kCount]) {
  const Pack<X, kCount> x = load_pack<kCount>(static_cast<const X*>(image), pack);
#pragma unroll
  for (int i = 0; i < kCount; ++i) pixel[i] = image_value<C>(x.value[i]);
}

// All four tensors dense with equal strides, aligned, and a multiple of kCount elements. The
// channel of element i is i / inner % channels.
template <int kCount, class T>
__global__ void __launch_bounds__(kThreads) pgd_step_normalize_flat_kernel(
    T* __restrict__ delta, const T* __restrict__ grad, const void* __restrict__ image,
    int image_dtype, void* __restrict__ out, int out_dtype, Statistics statistics, int64_t packs,
    int64_t inner, int64_t channels, compute_t<T> step, ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  for (int64_t pack = thread_in_grid(); pack < packs; pack += threads_of_grid()) {
    Pack<T, kCount> d = load_pack<kCount>(delta, pack);
    const Pack<T, kCount> g = load_pack<kCount>(grad, pack);
    C pixel[kCount];
    if (image_dtype == kUInt8) {
      load_pixels<uint8_t>(image, pack, pixel);
    } else if (image_dtype == kFloat32) {
      load_pixels<float>(image, pack, pixel);
    } else {
      load_pixels<T>(image, pack, pixel);
    }
    int64_t position = pack * kCount % inner;
    int64_t channel = pack * kCount / inner % channels;
    C mean = statistic<T>(statistics.mean, statistics.mean_dtype, channel * statistics.mean_stride);
    C std = statistic<T>(statistics.std, statistics.std_dtype, channel * statistics.std_stride);
    C result[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      d.value[i] = round_toward_zero<T>(pgd_update<kSomeBounds, C>(
          to_compute(d.value[i]), to_compute(g.value[i]), pixel[i], step, bounds));
      // The delta as it is stored, rounding included: the model sees what the attack keeps.
      result[i] = (pixel[i] + to_compute(d.value[i]) - mean) / std;
      if (++position == inner) {
        position = 0;
        channel = channel + 1 == channels ? 0 : channel + 1;
        mean = statistic<T>(statistics.mean, statistics.mean_dtype,
                            channel * statistics.mean_stride);
        std = statistic<T>(statistics.std, statistics.std_dtype, channel * statistics.std_stride);
      }
    }
    store_pack<kCount>(delta, pack, d);
    switch (out_dtype) {
      case kFloat32: store_results<float>(out, pack, result); break;
      case kFloat64: store_results<double>(out, pack, result); break;
      case kBFloat16: store_results<bfloat16>(out, pack, result); break;
      default: store_results<float16>(out, pack, result);
    }
  }
}

// Any strides: one element per thread and turn, in the order of delta.
template <class T>
__global__ void __launch_bounds__(kThreads) pgd_step_normalize_strided_kernel(
    T* __restrict__ delta, const T* __restrict__ grad, const void* __restrict__ image,
    int image_dtype, void* __restrict__ out, int out_dtype, Statistics statistics,
    Layout<kTensors> layout, compute_t<T> step, ProjectionBounds<compute_t<T>> bounds) {
  using C = compute_t<T>;
  for (int64_t i = thread_in_grid(); i < layout.numel; i += threads_of_grid()) {
    int64_t at[kTensors];
    layout_offsets(layout, i, at);
    // Before the step: behind it ptxas spills them around the double division on sm_100.
    const C mean = statistic<T>(statistics.mean, statistics.mean_dtype,
                                at[kChannel] * statistics.mean_stride);
    const C std =
        statistic<T>(statistics.std, statistics.std_dtype, at[kChannel] * statistics.std_stride);
    const C pixel = pixel_at<T>(image, image_dtype, at[kImage]);
    const T d = round_toward_zero<T>(pgd_update<kSomeBounds, C>(
        to_compute(delta[at[kDelta]]), to_compute(grad[at[kGrad]]), pixel, step, bounds));
    delta[at[kDelta]] = d;
    store_result<C>(out, out_dtype, at[kOut], (pixel + to_compute(d) - mean) / std);
  }
}

template <class T>
void launch(void* delta_data, const void* grad_data, const void* image, int image_dtype, void* out,
            int out_dtype, const Statistics& statistics, const int64_t* sizes,
            const Layout<4>& data, const Layout<kTensors>& layout, bool channels_inner,
            double step_size, ProjectionBounds<compute_t<T>> bounds, void* stream) {
  constexpr int kCount = 16 / sizeof(T);
  T* const delta = static_cast<T*>(delta_data);
  const T* const grad = static_cast<const T*>(grad_data);
  const auto step = static_cast<compute_t<T>>(step_size);
  // A pack of the widest other type is at most two accesses of 16 bytes, aligned to the first.
  if (data.fits && data.flat() && data.numel % kCount == 0 && pack_aligned<kCount>(delta) &&
      pack_aligned<kCount>(grad) && aligned16(image) && aligned16(out)) {
    const int64_t packs = data.numel / kCount;
    const int64_t inner = channels_inner ? 1 : sizes[2] * sizes[3];
    FB_LAUNCH((pgd_step_normalize_flat_kernel<kCount, T>), grid_size(packs, kThreads), kThreads, 0,
              stream, delta, grad, image, image_dtype, out, out_dtype, statistics, packs, inner,
              sizes[1], step, bounds);
  } else {
    FB_LAUNCH((pgd_step_normalize_strided_kernel<T>), grid_size(layout.numel, kThreads), kThreads,
              0, stream, delta, grad, image, image_dtype, out, out_dtype, statistics, layout, step,
              bounds);
  }
}

}  // namespace
}  // namespace fastbandit

FB_LAUNCHER launch_pgd_step_normalize(
    void* delta, const void* grad, const void* image, const void* mean, const void* std, void* out,
    int dtype, int image_dtype, int mean_dtype, int std_dtype, int out_dtype, const int64_t* sizes,
    const int64_t* delta_strides, const int64_t* grad_strides, const int64_t* image_strides,
    const int64_t* out_strides, int64_t mean_stride, int64_t std_stride, double step,
    double epsilon, int has_lower, double lower, int has_upper, double upper, void* stream) {
  using namespace fastbandit;
  const int64_t channel_strides[4] = {0, 1, 0, 0};
  const int64_t* strides[kTensors] = {delta_strides, grad_strides, image_strides, out_strides,
                                      channel_strides};
  const int64_t* data_strides[4] = {delta_strides, grad_strides, image_strides, out_strides};
  const auto layout = merge_dims<kTensors>(4, sizes, strides);
  const auto data = merge_dims<4>(4, sizes, data_strides);
  if (layout.numel == 0) return nullptr;
  const Statistics statistics{mean, std, mean_dtype, std_dtype, mean_stride, std_stride};
  // With one pixel, or one channel, the two formats are the same and either reading is right.
  const bool channels_inner = delta_strides[1] == 1 && sizes[1] > 1;
  return launch_floating(dtype, [&](auto zero) {
    using T = decltype(zero);
    launch<T>(delta, grad, image, image_dtype, out, out_dtype, statistics, sizes, data, layout,
              channels_inner, step,
              projection_bounds<compute_t<T>>(epsilon, has_lower, lower, has_upper, upper),
              stream);
  });
}
