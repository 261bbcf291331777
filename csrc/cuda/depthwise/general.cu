// Depthwise convolution of any filter size, stride, dilation and type: one output for each thread.
#include "cuda/depthwise/common.h"

namespace fastbandit::depthwise {
namespace {

struct GeneralArgs {
  int64_t shape[kConvFields];
  Map from, mask;
  void* to;
  int to_dtype;
  int64_t to_n, to_c, to_h, to_w;
  const void* weight;
  int weight_dtype, backward;
  int channels_inner;  // neighbouring threads are neighbouring channels, else columns
};

// The row (side 0) or column (side 1) that tap `tap` of position `at` reads, -1 for none.
__device__ __forceinline__ int source_of(const GeneralArgs& a, int side, int at, int tap) {
  const int stride = static_cast<int>(a.shape[kConvStrideH + side]);
  const int pad = static_cast<int>(a.shape[kConvPadH + side]);
  const int reach = tap * static_cast<int>(a.shape[kConvDilationH + side]);
  if (a.backward) {
    const int from = at + pad - reach;
    if (from < 0 || from % stride != 0) return -1;
    const int source = from / stride;
    return source < static_cast<int>(a.shape[kConvOutH + side]) ? source : -1;
  }
  const int source = at * stride + reach - pad;
  return source >= 0 && source < static_cast<int>(a.shape[kConvH + side]) ? source : -1;
}

template <class C>
__global__ void __launch_bounds__(kThreads) general_kernel(GeneralArgs a) {
  const int64_t* s = a.shape;
  const int64_t height = a.backward ? s[kConvH] : s[kConvOutH];
  const int64_t width = a.backward ? s[kConvW] : s[kConvOutW], channels = s[kConvC];
  const int64_t total = s[kConvN] * channels * height * width;
  for (int64_t item = thread_in_grid(); item < total; item += threads_of_grid()) {
    int64_t n, c, h, w, rest = item;
    if (a.channels_inner) {
      c = rest % channels, rest /= channels;
      w = rest % width, rest /= width;
      h = rest % height, n = rest / height;
    } else {
      w = rest % width, rest /= width;
      h = rest % height, rest /= height;
      c = rest % channels, n = rest / channels;
    }
    const int64_t base = n * a.from.n + c * a.from.c;
    const int64_t taps = c * s[kConvKernelH] * s[kConvKernelW];
    const int kernel_h = static_cast<int>(s[kConvKernelH]);
    const int kernel_w = static_cast<int>(s[kConvKernelW]);
    C sum = C(0);
    for (int i = 0; i < kernel_h; ++i) {
      const int y = source_of(a, 0, static_cast<int>(h), i);
      if (y < 0) continue;
      for (int j = 0; j < kernel_w; ++j) {
        const int x = source_of(a, 1, static_cast<int>(w), j);
        if (x < 0) continue;
        const int64_t tap = taps + i * kernel_w + j;
        const C value = load_element<C>(a.from.data, a.from.dtype, base + y * a.from.h + x * a.from.w);
        sum += load_element<C>(a.weight, a.weight_dtype, tap) *
               relu_if<C>(!a.backward && s[kConvRelu], value);
      }
    }
    if (a.mask.data != nullptr) {
      const int64_t at = n * a.mask.n + c * a.mask.c + h * a.mask.h + w * a.mask.w;
      if (load_element<C>(a.mask.data, a.mask.dtype, at) <= C(0)) sum = C(0);
    }
    store_element<C>(a.to, a.to_dtype, n * a.to_n + c * a.to_c + h * a.to_h + w * a.to_w, sum);
  }
}

// from = grad, mask = x; a block for each tap of each channel.
template <class C>
__global__ void __launch_bounds__(kThreads, kBlocks) general_weight_kernel(GeneralArgs a) {
  __shared__ C shared[kThreads / 32];
  const int64_t* s = a.shape;
  const int64_t taps = s[kConvKernelH] * s[kConvKernelW], pixels = s[kConvOutH] * s[kConvOutW];
  const int64_t c = blockIdx.x / taps, tap = blockIdx.x % taps;
  const int64_t i = tap / s[kConvKernelW], j = tap % s[kConvKernelW];
  C sum = C(0);
  for (int64_t item = threadIdx.x; item < s[kConvN] * pixels; item += kThreads) {
    const int64_t n = item / pixels, h = item % pixels / s[kConvOutW], w = item % s[kConvOutW];
    const int64_t y = h * s[kConvStrideH] + i * s[kConvDilationH] - s[kConvPadH];
    const int64_t x = w * s[kConvStrideW] + j * s[kConvDilationW] - s[kConvPadW];
    if (y < 0 || y >= s[kConvH] || x < 0 || x >= s[kConvW]) continue;
    const C value = load_element<C>(a.mask.data, a.mask.dtype,
                                    n * a.mask.n + c * a.mask.c + y * a.mask.h + x * a.mask.w);
    sum += relu_if<C>(static_cast<int>(s[kConvRelu]), value) *
           load_element<C>(a.from.data, a.from.dtype,
                           n * a.from.n + c * a.from.c + h * a.from.h + w * a.from.w);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int w = 1; w < kThreads / 32; ++w) sum += shared[w];
    store_element<C>(a.to, a.to_dtype, blockIdx.x, sum);
  }
}

GeneralArgs general_of(const int64_t* s) {
  GeneralArgs a{};
  for (int i = 0; i < kConvFields; ++i) a.shape[i] = s[i];
  return a;
}

}  // namespace

void launch_general(const int64_t* shape, const Map& from, const Weight& weight, const Output& to,
                    int backward, void* stream) {
  GeneralArgs a = general_of(shape);
  a.from = from, a.mask = to.mask, a.to = to.data, a.to_dtype = to.dtype;
  a.to_n = to.strides[0], a.to_c = to.strides[1], a.to_h = to.strides[2], a.to_w = to.strides[3];
  a.weight = weight.data, a.weight_dtype = weight.dtype, a.backward = backward;
  a.channels_inner = to.strides[1] == 1;
  const int64_t total = shape[kConvN] * shape[kConvC] *
      (backward ? shape[kConvH] * shape[kConvW] : shape[kConvOutH] * shape[kConvOutW]);
  const unsigned blocks = grid_size(total, kThreads);
  if (to.dtype == kFloat64) {
    FB_LAUNCH((general_kernel<double>), blocks, kThreads, 0, stream, a);
  } else {
    FB_LAUNCH((general_kernel<float>), blocks, kThreads, 0, stream, a);
  }
}

const char* launch_general_weight(const int64_t* shape, const Map& grad, const Map& x,
                                  void* grad_weight, int dtype, void* stream) {
  GeneralArgs a = general_of(shape);
  a.from = grad, a.mask = x, a.to = grad_weight, a.to_dtype = dtype;
  const int64_t blocks = shape[kConvC] * shape[kConvKernelH] * shape[kConvKernelW];
  if (blocks > kIndexLimit) return "more filter taps than a grid has blocks";
  if (grad.dtype == kFloat64) {
    FB_LAUNCH((general_weight_kernel<double>), static_cast<unsigned>(blocks), kThreads, 0, stream,
              a);
  } else {
    FB_LAUNCH((general_weight_kernel<float>), static_cast<unsigned>(blocks), kThreads, 0, stream,
              a);
  }
  return launch_error();
}

}  // namespace fastbandit::depthwise
