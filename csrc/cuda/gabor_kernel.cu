// fastbandit::gabor_filters, fastbandit::gabor_conv2d and their gradients on CUDA: what is not a
// depthwise convolution.
#include "cuda/gabor.h"

#include "cuda/depthwise/staged.h"
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

// Vectors of one type, each null or [count] with a stride.
struct Four {
  const void* data[4];
  int64_t stride[4];
};

struct FourResults {
  void* data[4];
};

// One filter for each thread; with kBackward the gradients by the numbers from those by the
// parameters.
template <class C, bool kBackward>
__global__ void __launch_bounds__(kThreads)
    gabor_parameters_kernel(Four grads, Four numbers, int dtype, int64_t count,
                            GaborIntervals intervals, FourResults results) {
  for (int64_t c = thread_in_grid(); c < count; c += threads_of_grid()) {
    C value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      value[i] = numbers.data[i]
                     ? load_element<C>(numbers.data[i], dtype, c * numbers.stride[i])
                     : C(0);
    if constexpr (kBackward) {
      gabor_parameter_slopes(intervals, value);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        value[i] = grads.data[i]
                       ? value[i] * load_element<C>(grads.data[i], dtype, c * grads.stride[i])
                       : C(0);
    } else {
      gabor_parameters_of(intervals, value);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) store_element<C>(results.data[i], dtype, c, value[i]);
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
  Divider by_stride_h, by_stride_w;
};

// The output row or column that lies `at` behind the first one in steps of `by`; -1 for none.
__device__ __forceinline__ int source_of(int at, const Divider& by, int size) {
  int rest;
  if (at < 0) return -1;
  const int source = by.divide(at, rest);
  return rest == 0 && source < size ? source : -1;
}

// Any filter size, stride, layout and type. One pixel for 2^lane_bits threads, which share the channels (channels-last) or are one (planar).
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
        const int y = source_of(h + s[kConvPadH] - i * s[kConvDilationH], a.by_stride_h,
                                s[kConvOutH]);
        if (y < 0) continue;
        for (int j = 0; j < s[kConvKernelW]; ++j) {
          const int x = source_of(w + s[kConvPadW] - j * s[kConvDilationW], a.by_stride_w,
                                  s[kConvOutW]);
          if (x < 0) continue;
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

// Stride 1 and channels side by side: the depthwise convolution of the gradient with reversed taps,
// from shared memory as in depthwise/staged.cu, where a thread adds its channels into the same
// 4 x 4 sums, 16 channels of the block after another, and the threads of a tile add theirs at last.
template <int K, class T>
__global__ void __launch_bounds__(depthwise::kStagedThreads, 1)
    gabor_backward_staged_kernel(depthwise::StagedArgs a) {
  using namespace depthwise;
  constexpr int V = kVector<K>;
  FB_DYNAMIC_SHARED(float, taps);  // [tap][channel], then the pixels
  float* const pixels = taps + K * K * kChunk;
  __shared__ Item items[kStagedThreads];
  const int d = a.g.dilation;
  if (static_cast<int>(threadIdx.x) < a.t.slots) {
    items[threadIdx.x] =
        a.t.item(static_cast<int>(blockIdx.x) * a.t.slots + static_cast<int>(threadIdx.x), d);
  }
  const Place place(a.t, V);
  const float* from = pixels + place.first_pixel(a.t, K) * kPitch + place.channel;
  float sum[kRows][kCols] = {};
  Item item{};
  int row = 0, col = 0;
  bool inside = false;
  for (int c0 = 0; c0 < a.g.c; c0 += kChunk) {
    const int used = min(kChunk, a.g.c - c0);
    __syncthreads();
    stage_taps<K>(a, c0, used, taps);
    stage<K, T, false>(a.in, a.g, a.t, items, c0, used, pixels);
    __syncthreads();
    item = items[place.slot];
    row = item.row + place.row * d, col = item.col + place.col * d;
    inside = item.n >= 0 && row < a.g.out_h && col < a.g.out_w;
    if (!inside || place.channel >= used) continue;
    Pack<float, V> tap[K * K];
#pragma unroll
    for (int i = 0; i < K * K; ++i) tap[i] = load_pack<V>(taps + i * kChunk + place.channel, 0);
    for_products<K, V, kPitch>(a, row, from, [&](int r, int q, int i, int v, float pixel) {
      sum[r][q] = fmaf(tap[i].value[v], pixel, sum[r][q]);
    });
  }
  for (int half = 1 << a.t.lane_bits >> 1; half > 0; half /= 2) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kCols; ++q) sum[r][q] += __shfl_xor_sync(0xffffffffu, sum[r][q], half);
    }
  }
  if (!inside || place.channel != 0) return;
  char* out = const_cast<char*>(a.out.at<T>(item.n, 0));
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int q = 0; q < kCols; ++q) {
      const int y = row + r * d, x = col + q * d;
      if (y < a.g.out_h && x < a.g.out_w) {
        *reinterpret_cast<T*>(out + (y * a.out.h + x * a.out.w)) =
            round_to_nearest<T>(sum[r][q]);
      }
    }
  }
}

// False where that kernel does not apply.
bool launch_backward_staged(const BackwardArgs& b, void* stream) {
  using namespace depthwise;
  const int* s = b.shape;
  const int64_t k = s[kConvKernelH];
  if (s[kConvKernelW] != k || s[kConvStrideH] != 1 || s[kConvStrideW] != 1 ||
      s[kConvDilationH] != s[kConvDilationW] || s[kConvDilationH] >= 1024 || !known(b.dtype) ||
      b.images >= kIndexLimit || s[kConvH] >= 1 << 20 || s[kConvW] >= 1 << 20)
    return false;
  StagedArgs a{};
  const int reach = s[kConvDilationH] * (s[kConvKernelH] - 1);
  a.g = {static_cast<int>(b.images), s[kConvC], s[kConvOutH], s[kConvOutW], s[kConvH], s[kConvW],
         reach - s[kConvPadH], reach - s[kConvPadW], s[kConvDilationH], 0, 1};
  const Map grad{b.grad, b.dtype, b.stride_n, b.stride_c, b.stride_h, b.stride_w};
  const Map out{b.grad_sum, b.dtype, int64_t{s[kConvH]} * s[kConvW], 0, s[kConvW], 1};
  if (one_channel(a.g, grad) || !can_stage(a.g, grad) || !int_offsets(out, s[kConvH], s[kConvW]))
    return false;
  bool launched = false;
  with_kernel_size(k, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    if (!plan_staged(kSize, a.g, grad, a.t)) return;
    a.in = pixels_of(grad), a.out = pixels_of(out);
    a.weight = b.filters, a.weight_dtype = kFloat32;
    const unsigned blocks = (a.t.items + a.t.slots - 1) / a.t.slots;
    const size_t shared = sizeof(float) * (kSize * kSize * kChunk + a.t.floats);
    launched = with_staged_types<false>(b.dtype, b.dtype, [&](auto element, auto) {
      FB_LAUNCH((gabor_backward_staged_kernel<kSize, decltype(element)>), blocks, a.t.threads,
                shared, stream, a);
    });
  });
  return launched;
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

template <bool kBackward>
const char* launch_parameters(const void* const* grads, const int64_t* grad_strides,
                              const void* const* numbers, const int64_t* strides, int dtype,
                              int64_t count, const double* intervals, void* const* results,
                              void* stream) {
  Four from{}, by{};
  FourResults to{};
  for (int i = 0; i < 4; ++i) {
    from.data[i] = numbers[i], from.stride[i] = strides[i], to.data[i] = results[i];
    if (kBackward) by.data[i] = grads[i], by.stride[i] = grad_strides[i];
  }
  const GaborIntervals of{intervals[0], intervals[1], intervals[2], intervals[3]};
  const unsigned blocks = grid_size(count, kThreads);
  if (dtype == kFloat64) {
    FB_LAUNCH((gabor_parameters_kernel<double, kBackward>), blocks, kThreads, 0, stream, by, from,
              dtype, count, of, to);
  } else {
    FB_LAUNCH((gabor_parameters_kernel<float, kBackward>), blocks, kThreads, 0, stream, by, from,
              dtype, count, of, to);
  }
  return launch_error();
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

FB_LAUNCHER launch_gabor_parameters(const void* const* numbers, const int64_t* strides, int dtype,
                                    int64_t count, const double* intervals, void* const* results,
                                    void* stream) {
  return launch_parameters<false>(nullptr, nullptr, numbers, strides, dtype, count, intervals,
                                  results, stream);
}

FB_LAUNCHER launch_gabor_parameters_backward(const void* const* grads, const int64_t* grad_strides,
                                             const void* const* numbers, const int64_t* strides,
                                             int dtype, int64_t count, const double* intervals,
                                             void* const* results, void* stream) {
  return launch_parameters<true>(grads, grad_strides, numbers, strides, dtype, count, intervals,
                                 results, stream);
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
  a.by_stride_h = Divider(shape[kConvStrideH]), a.by_stride_w = Divider(shape[kConvStrideW]);
  if (launch_backward_staged(a, stream)) return launch_error();
  const bool launched = with_element(
      dtype, [&](auto element) { launch_backward_input<decltype(element)>(a, stream); });
  return launched ? launch_error() : kUnknownDtype;
}

}  // namespace fastbandit
