// fastbandit::depthwise_conv2d and its two gradients on CUDA.
//
// Four families, each in a file of csrc/cuda/depthwise:
//   planar   contiguous maps (stride 1 along w). A block stages tiles of several planes in shared
//            memory with 16-byte loads; each thread keeps the filter and 4 x 4 sums in registers.
//   staged   channels-last maps whose channels are a multiple of 4 (8 in half types), which is what
//            a search runs: pixels staged in shared memory, 4 x 4 sums of 2 or 4 channels a thread.
//   strided  any strides: neighbouring threads are neighbouring channels, so an access of a warp to
//            a channels-last map is contiguous; 4 x 4 sums of one channel in registers.
//   general  any filter size, stride, dilation and float64: one output for each thread.
// All but general take square filters of 3, 5 or 7 taps, stride 1 and any dilation. A thread's
// rows and columns are `dilation` apart, so the taps are neighbours in its registers whatever the
// dilation is, and only the filter size is a compile-time constant. The input gradient is the
// forward with flipped taps. The weight gradient keeps all taps of a channel in registers, adds
// the threads of a block in a fixed order, and a second kernel adds the blocks.
#include "cuda/depthwise/common.h"

namespace fastbandit {
namespace {

using namespace depthwise;

// grad_weight[c][tap] from partial[tap][c][split]: a warp for each, always in the same order.
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* __restrict__ partial, void* grad_weight, int dtype, int c,
                        int taps, int splits) {
  const int lane = threadIdx.x % 32;
  const int64_t item = thread_in_grid() / 32;  // tap * c + channel
  if (item >= int64_t{c} * taps) return;
  float value = 0.0f;
  for (int split = lane; split < splits; split += 32) value += partial[item * splits + split];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if (lane == 0) store_element<float>(grad_weight, dtype, item % c * taps + item / c, value);
}

bool unrolled(const int64_t* s) {
  const int64_t k = s[kConvKernelH];
  return (k == 3 || k == 5 || k == 7) && s[kConvKernelW] == k && s[kConvStrideH] == 1 &&
         s[kConvStrideW] == 1 && s[kConvDilationH] == s[kConvDilationW] &&
         s[kConvDilationH] < 1024;
}

Map map_of(const void* data, int dtype, const int64_t* strides) {
  return {data, dtype, strides[0], strides[1], strides[2], strides[3]};
}

Geometry geometry_of(const int64_t* s, bool backward) {
  Geometry g{};
  const auto number = [&](ConvField field) { return static_cast<int>(s[field]); };
  g.n = number(kConvN), g.c = number(kConvC), g.dilation = number(kConvDilationH);
  g.in_h = number(kConvH), g.in_w = number(kConvW);
  g.out_h = number(kConvOutH), g.out_w = number(kConvOutW);
  g.pad_h = number(kConvPadH), g.pad_w = number(kConvPadW);
  g.relu = backward ? 0 : number(kConvRelu);
  g.flip = backward;
  if (backward) {
    const int reach = g.dilation * (number(kConvKernelH) - 1);
    g.pad_h = reach - g.pad_h, g.pad_w = reach - g.pad_w;
    const int h = g.in_h, w = g.in_w;
    g.in_h = g.out_h, g.in_w = g.out_w, g.out_h = h, g.out_w = w;
  }
  return g;
}

bool small_indices(const int64_t* s) {
  if (s[kConvN] * s[kConvC] >= kIndexLimit || s[kConvH] >= (1 << 20) || s[kConvW] >= (1 << 20) ||
      s[kConvPadH] >= (1 << 20) || s[kConvPadW] >= (1 << 20))
    return false;
  const int64_t pixels = (s[kConvH] + s[kConvOutH]) * (s[kConvW] + s[kConvOutW]);
  return s[kConvN] < kIndexLimit / (pixels > 0 ? pixels : 1);
}

void sum_partials(const float* partial, void* grad_weight, int dtype, int c, int taps, int splits,
                  void* stream) {
  const int64_t threads = int64_t{c} * taps * 32;
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  FB_LAUNCH((sum_partials_kernel), blocks, kThreads, 0, stream, partial, grad_weight, dtype, c,
            taps, splits);
}

}  // namespace

FB_LAUNCHER launch_depthwise_conv2d(const void* from, int from_dtype, const void* weight,
                                    int weight_dtype, const void* mask, void* to, int to_dtype,
                                    const int64_t* shape, const int64_t* from_strides,
                                    const int64_t* mask_strides, const int64_t* to_strides,
                                    int backward, void* stream) {
  const Map in = map_of(from, from_dtype, from_strides);
  const Weight taps{weight, weight_dtype};
  const Output out{to, to_dtype, to_strides,
                   mask ? map_of(mask, to_dtype, mask_strides) : Map{}};
  if (unrolled(shape) && small_indices(shape) && known(from_dtype) && known(to_dtype)) {
    const Geometry g = geometry_of(shape, backward != 0);
    const int64_t k = shape[kConvKernelH];
    if (launch_planar(k, g, in, taps, out, stream) || launch_staged(k, g, in, taps, out, stream) ||
        launch_strided(k, g, in, taps, out, stream))
      return launch_error();
  }
  launch_general(shape, in, taps, out, backward, stream);
  return launch_error();
}

extern "C" int64_t depthwise_conv2d_partial_floats(int grad_dtype, const int64_t* shape,
                                                   const int64_t* grad_strides,
                                                   const int64_t* x_strides) {
  if (!unrolled(shape) || !small_indices(shape) || !known(grad_dtype)) return 0;
  const Geometry g = geometry_of(shape, false);
  const int64_t k = shape[kConvKernelH];
  const Map grad = map_of(nullptr, grad_dtype, grad_strides);
  const Map x = map_of(nullptr, kFloat32, x_strides);
  int64_t splits = planar_weight_splits(k, g, grad, x);
  if (splits == 0) {
    // Which of the two it is hangs on addresses, which are not known here.
    const int64_t staged = staged_weight_splits(k, g, grad, x);
    splits = strided_weight_splits(g);
    splits = staged > splits ? staged : splits;
  }
  return splits * shape[kConvC] * k * k;
}

FB_LAUNCHER launch_depthwise_conv2d_backward_weight(
    const void* grad, int grad_dtype, const void* x, int x_dtype, float* partial,
    void* grad_weight, int weight_dtype, const int64_t* shape, const int64_t* grad_strides,
    const int64_t* x_strides, void* stream) {
  const Map from = map_of(grad, grad_dtype, grad_strides), in = map_of(x, x_dtype, x_strides);
  if (partial && unrolled(shape) && small_indices(shape) && known(grad_dtype) && known(x_dtype)) {
    const Geometry g = geometry_of(shape, false);
    const int64_t k = shape[kConvKernelH];
    int splits = 0;
    if (launch_planar_weight(k, g, from, in, partial, stream)) {
      splits = planar_weight_splits(k, g, from, in);
    } else if (launch_staged_weight(k, g, from, in, partial, stream)) {
      splits = staged_weight_splits(k, g, from, in);
    } else if (launch_strided_weight(k, g, from, in, partial, stream)) {
      splits = strided_weight_splits(g);
    }
    if (splits > 0) {
      const char* error = launch_error();
      if (error) return error;
      sum_partials(partial, grad_weight, weight_dtype, g.c, static_cast<int>(k * k), splits,
                   stream);
      return launch_error();
    }
  }
  return launch_general_weight(shape, from, in, grad_weight, weight_dtype, stream);
}

}  // namespace fastbandit
