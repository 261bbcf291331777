// fastbandit::gabor_filters, fastbandit::gabor_conv2d and their gradients on CUDA: what is not a
// depthwise convolution.
#include "cuda/gabor.h"

#include "cuda/depthwise_conv2d.h"
#include "cuda/element.h"
#include "cuda/pack.h"
#include "math/gabor.h"

namespace fastbandit {
namespace {

struct Parameters {
  const void* data[5];
  int64_t stride[5];
  int dtype;

  template <class C>
  __device__ __forceinline__ GaborParameters<C> at(int64_t i) const {
    return {load_element<C>(data[0], dtype, i * stride[0]),
            load_element<C>(data[1], dtype, i * stride[1]),
            load_element<C>(data[2], dtype, i * stride[2]),
            load_element<C>(data[3], dtype, i * stride[3]),
            load_element<C>(data[4], dtype, i * stride[4])};
  }
};

Parameters parameters_of(const void* const* data, const int64_t* strides, int dtype) {
  Parameters p{};
  for (int i = 0; i < 5; ++i) p.data[i] = data[i], p.stride[i] = strides[i];
  p.dtype = dtype;
  return p;
}

// One tap for each thread.
template <class C>
__global__ void __launch_bounds__(kThreads)
    gabor_filters_kernel(Parameters parameters, int64_t count, int k, void* filters, int dtype) {
  const int taps = k * k, half = k / 2;
  for (int64_t i = thread_in_grid(); i < count * taps; i += threads_of_grid()) {
    const int tap = static_cast<int>(i % taps);
    const GaborFilter<C> filter(parameters.at<C>(i / taps));
    store_element<C>(filters, dtype, i, filter.value(C(tap / k - half), C(tap % k - half)));
  }
}

struct Gradients {
  void* data[5];
};

// One filter for each thread: its taps are added in order.
template <class C>
__global__ void __launch_bounds__(kThreads)
    gabor_filters_backward_kernel(const void* __restrict__ grad, int grad_dtype, int64_t stride_c,
                                  int64_t stride_h, int64_t stride_w, Parameters parameters,
                                  int64_t count, int k, Gradients gradients) {
  const int half = k / 2;
  for (int64_t c = thread_in_grid(); c < count; c += threads_of_grid()) {
    const GaborFilter<C> filter(parameters.at<C>(c));
    GaborParameters<C> sum{C(0), C(0), C(0), C(0), C(0)};
    for (int i = 0; i < k; ++i) {
      for (int j = 0; j < k; ++j) {
        const C g = load_element<C>(grad, grad_dtype, c * stride_c + i * stride_h + j * stride_w);
        filter.add_gradient(C(i - half), C(j - half), g, sum);
      }
    }
    store_element<C>(gradients.data[0], parameters.dtype, c, sum.theta);
    store_element<C>(gradients.data[1], parameters.dtype, c, sum.sigma);
    store_element<C>(gradients.data[2], parameters.dtype, c, sum.gamma);
    store_element<C>(gradients.data[3], parameters.dtype, c, sum.wavelength);
    store_element<C>(gradients.data[4], parameters.dtype, c, sum.psi);
  }
}

struct SumArgs {
  const void* x;
  void* sum;
  int64_t n, c, h, w, stride_n, stride_c, stride_h, stride_w;
};

// Channels apart: kCount neighbouring pixels of a row for each thread, one pack for each channel.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads, kBlocks) channel_sum_planar_kernel(SumArgs a) {
  using C = compute_t<T>;
  const int64_t groups = (a.w + kCount - 1) / kCount, total = a.n * a.h * groups;
  for (int64_t item = thread_in_grid(); item < total; item += threads_of_grid()) {
    const int64_t row = item / groups, group = item % groups, n = row / a.h, h = row % a.h;
    const T* p = static_cast<const T*>(a.x) + n * a.stride_n + h * a.stride_h +
                 group * kCount * a.stride_w;
    C sum[kCount] = {};
#pragma unroll 4
    for (int64_t c = 0; c < a.c; ++c) {
      const Pack<T, kCount> pack = load_pack<kCount>(p + c * a.stride_c, 0);
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum[e] += to_compute(pack.value[e]);
    }
    C* out = static_cast<C*>(a.sum) + row * a.w + group * kCount;
#pragma unroll
    for (int e = 0; e < kCount; ++e) out[e] = sum[e];
  }
}

// Channels together: `lanes` threads for each pixel, packs of kCount channels, then a tree.
template <class T, int kCount>
__global__ void __launch_bounds__(kThreads) channel_sum_inner_kernel(SumArgs a, int lane_bits) {
  using C = compute_t<T>;
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t packs = a.c / kCount, total = a.n * a.h * a.w;
  // Whole warps go on together, so that the shuffles below name no lane that has left.
  const int64_t step = threads_of_grid() >> lane_bits;
  const int64_t turns = (total + step - 1) / step;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t pixel = turn * step + (thread_in_grid() >> lane_bits);
    C sum = C(0);
    if (pixel < total) {
      const int64_t w = pixel % a.w, row = pixel / a.w;
      const T* p = static_cast<const T*>(a.x) + row / a.h * a.stride_n + row % a.h * a.stride_h +
                   w * a.stride_w;
      for (int64_t i = lane; i < packs; i += lanes) {
        const Pack<T, kCount> pack = load_pack<kCount>(p, i);
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum += to_compute(pack.value[e]);
      }
    }
    for (int half = lanes / 2; half > 0; half /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, half);
    }
    if (pixel < total && lane == 0) static_cast<C*>(a.sum)[pixel] = sum;
  }
}

struct BackwardArgs {
  int64_t images;
  int shape[kConvFields];  // kConvN unused: the images may be many
  const void* grad;
  int dtype;
  int64_t stride_n, stride_c, stride_h, stride_w;
  const void* filters;
  void* grad_sum;
};

// One pixel for 2^lane_bits threads, which share the channels (channels-last) or are one (planar).
template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    gabor_backward_input_kernel(BackwardArgs a, int lane_bits) {
  using C = compute_t<T>;
  const int* s = a.shape;
  const int lanes = 1 << lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t total = a.images * s[kConvH] * s[kConvW];
  const int64_t step = threads_of_grid() >> lane_bits;
  const int64_t turns = (total + step - 1) / step;
  const C* filters = static_cast<const C*>(a.filters);
  const int taps = s[kConvKernelH] * s[kConvKernelW];
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t pixel = turn * step + (thread_in_grid() >> lane_bits);
    C sum = C(0);
    if (pixel < total) {
      const int w = static_cast<int>(pixel % s[kConvW]);
      const int64_t row = pixel / s[kConvW];
      const int h = static_cast<int>(row % s[kConvH]);
      const T* image = static_cast<const T*>(a.grad) + row / s[kConvH] * a.stride_n;
      for (int i = 0; i < s[kConvKernelH]; ++i) {
        const int at_h = h + s[kConvPadH] - i * s[kConvDilationH], y = at_h / s[kConvStrideH];
        if (at_h < 0 || y * s[kConvStrideH] != at_h || y >= s[kConvOutH]) continue;
        for (int j = 0; j < s[kConvKernelW]; ++j) {
          const int at_w = w + s[kConvPadW] - j * s[kConvDilationW], x = at_w / s[kConvStrideW];
          if (at_w < 0 || x * s[kConvStrideW] != at_w || x >= s[kConvOutW]) continue;
          const T* g = image + y * a.stride_h + x * a.stride_w + lane * a.stride_c;
          const C* tap = filters + i * s[kConvKernelW] + j + lane * taps;
          for (int c = lane; c < s[kConvC]; c += lanes) {
            sum += *tap * to_compute(*g);
            tap += taps * lanes;
            g += a.stride_c * lanes;
          }
        }
      }
    }
    for (int half = lanes / 2; half > 0; half /= 2) {
      sum += __shfl_xor_sync(0xffffffffu, sum, half);
    }
    if (pixel < total && lane == 0) static_cast<T*>(a.grad_sum)[pixel] = round_to_nearest<T>(sum);
  }
}

int log2_ceil(int64_t value, int limit) {
  int bits = 0;
  while (bits < limit && (int64_t{1} << bits) < value) ++bits;
  return bits;
}

template <class T>
void launch_sum(const SumArgs& a, void* stream) {
  constexpr int kCount = 16 / sizeof(T);
  const auto whole = [&](int64_t stride) { return stride % kCount == 0; };
  const bool aligned = reinterpret_cast<uintptr_t>(a.x) % 16 == 0 && whole(a.stride_n) &&
                       whole(a.stride_h);
  const int64_t pixels = a.n * a.h * a.w;
  if (a.stride_c == 1 && a.c > 1) {
    const bool packs = aligned && whole(a.stride_w) && whole(a.c);
    const int bits = log2_ceil(packs ? a.c / kCount : a.c, 5);
    const unsigned blocks = grid_size(pixels << bits, kThreads);
    if (packs) {
      FB_LAUNCH((channel_sum_inner_kernel<T, kCount>), blocks, kThreads, 0, stream, a, bits);
    } else {
      FB_LAUNCH((channel_sum_inner_kernel<T, 1>), blocks, kThreads, 0, stream, a, bits);
    }
  } else if (aligned && a.stride_w == 1 && whole(a.stride_c) && whole(a.w)) {
    FB_LAUNCH((channel_sum_planar_kernel<T, kCount>), grid_size(pixels / kCount, kThreads),
              kThreads, 0, stream, a);
  } else {
    FB_LAUNCH((channel_sum_planar_kernel<T, 1>), grid_size(pixels, kThreads), kThreads, 0, stream,
              a);
  }
}

template <class T>
void launch_backward_input(const BackwardArgs& a, void* stream) {
  const int bits = a.stride_c == 1 ? log2_ceil(a.shape[kConvC], 5) : 0;
  const int64_t pixels = a.images * a.shape[kConvH] * a.shape[kConvW];
  FB_LAUNCH((gabor_backward_input_kernel<T>), grid_size(pixels << bits, kThreads), kThreads, 0,
            stream, a, bits);
}

// body(element of the dtype); false for another dtype.
template <class Body>
bool with_element(int dtype, const Body& body) {
  if (dtype == kFloat32) body(float{});
  else if (dtype == kFloat64) body(double{});
  else if (dtype == kBFloat16) body(bfloat16{});
  else if (dtype == kFloat16) body(float16{});
  else return false;
  return true;
}

}  // namespace

FB_LAUNCHER launch_gabor_filters(const void* const* parameters, const int64_t* strides, int dtype,
                                 int64_t count, int64_t kernel_size, void* filters,
                                 int filters_dtype, void* stream) {
  const Parameters p = parameters_of(parameters, strides, dtype);
  const int k = static_cast<int>(kernel_size);
  const unsigned blocks = grid_size(count * k * k, kThreads);
  if (dtype == kFloat64) {
    FB_LAUNCH((gabor_filters_kernel<double>), blocks, kThreads, 0, stream, p, count, k, filters,
              filters_dtype);
  } else {
    FB_LAUNCH((gabor_filters_kernel<float>), blocks, kThreads, 0, stream, p, count, k, filters,
              filters_dtype);
  }
  return launch_error();
}

FB_LAUNCHER launch_gabor_filters_backward(const void* grad, int grad_dtype,
                                          const int64_t* grad_strides,
                                          const void* const* parameters, const int64_t* strides,
                                          int dtype, int64_t count, int64_t kernel_size,
                                          void* const* gradients, void* stream) {
  const Parameters p = parameters_of(parameters, strides, dtype);
  Gradients out{};
  for (int i = 0; i < 5; ++i) out.data[i] = gradients[i];
  const int k = static_cast<int>(kernel_size);
  const unsigned blocks = grid_size(count, kThreads);
  if (dtype == kFloat64) {
    FB_LAUNCH((gabor_filters_backward_kernel<double>), blocks, kThreads, 0, stream, grad,
              grad_dtype, grad_strides[0], grad_strides[1], grad_strides[2], p, count, k, out);
  } else {
    FB_LAUNCH((gabor_filters_backward_kernel<float>), blocks, kThreads, 0, stream, grad,
              grad_dtype, grad_strides[0], grad_strides[1], grad_strides[2], p, count, k, out);
  }
  return launch_error();
}

FB_LAUNCHER launch_channel_sum(const void* x, int dtype, const int64_t* sizes,
                               const int64_t* strides, void* sum, void* stream) {
  const SumArgs a{x,        sum,        sizes[0],   sizes[1],   sizes[2],
                  sizes[3], strides[0], strides[1], strides[2], strides[3]};
  const bool launched =
      with_element(dtype, [&](auto element) { launch_sum<decltype(element)>(a, stream); });
  return launched ? launch_error() : kUnknownDtype;
}

FB_LAUNCHER launch_gabor_backward_input(const void* grad, int dtype, const int64_t* shape,
                                        const int64_t* grad_strides, const void* filters,
                                        void* grad_sum, void* stream) {
  BackwardArgs a{};
  for (int i = 1; i < kConvFields; ++i) a.shape[i] = static_cast<int>(shape[i]);
  a.images = shape[kConvN];
  a.grad = grad, a.dtype = dtype, a.filters = filters, a.grad_sum = grad_sum;
  a.stride_n = grad_strides[0], a.stride_c = grad_strides[1];
  a.stride_h = grad_strides[2], a.stride_w = grad_strides[3];
  const bool launched = with_element(
      dtype, [&](auto element) { launch_backward_input<decltype(element)>(a, stream); });
  return launched ? launch_error() : kUnknownDtype;
}

}  // namespace fastbandit
