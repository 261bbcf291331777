// Depthwise convolution of channels-last maps, staged in shared memory (staged.h): a thread sums
// 4 x 4 pixels of kVector channels in registers.
#include "cuda/depthwise/staged.h"

namespace fastbandit::depthwise {
namespace {

template <int K, class X, class T, bool kOne>
__global__ void __launch_bounds__(kStagedThreads, 1) staged_kernel(StagedArgs a) {
  constexpr int V = kVector<K>, kStep = kOne ? 1 : kPitch;
  FB_DYNAMIC_SHARED(float, taps);  // [tap][channel], then the pixels
  float* const pixels = taps + K * K * kChunk;
  __shared__ Item items[kStagedThreads];
  int group;
  const int block = a.t.by_group.divide(static_cast<int>(blockIdx.x), group);
  const int c0 = group * kChunk, used = min(kChunk, a.g.c - c0), d = a.g.dilation;
  if (static_cast<int>(threadIdx.x) < a.t.slots) {
    items[threadIdx.x] = a.t.item(block * a.t.slots + static_cast<int>(threadIdx.x), d);
  }
  stage_taps<K>(a, c0, used, taps);
  __syncthreads();
  stage<K, X, kOne>(a.in, a.g, a.t, items, c0, used, pixels);
  __syncthreads();

  const Place place(a.t, V);
  const Item item = items[place.slot];
  const int row = item.row + place.row * d, col = item.col + place.col * d;
  if (item.n < 0 || place.channel >= used || row >= a.g.out_h || col >= a.g.out_w) return;
  Pack<float, V> tap[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) tap[i] = load_pack<V>(taps + i * kChunk + place.channel, 0);

  const float* from =
      pixels + place.first_pixel(a.t, K) * kStep + (kOne ? 0 : place.channel);
  float sum[kRows][kCols][V] = {};
  for_products<K, V, kStep>(a, row, from, [&](int r, int q, int i, int v, float pixel) {
    sum[r][q][v] = fmaf(tap[i].value[v], pixel, sum[r][q][v]);
  });

  const int c = c0 + place.channel;
  if (a.mask.data != nullptr) {
    const char* mask = a.mask.at<T>(item.n, c);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kCols; ++q) {
        const int y = row + r * d, x = col + q * d;
        Pack<T, V> at{};
        if (y < a.g.out_h && x < a.g.out_w) {
          at = *reinterpret_cast<const Pack<T, V>*>(mask + (y * a.mask.h + x * a.mask.w));
        }
#pragma unroll
        for (int v = 0; v < V; ++v) {
          if (to_compute(at.value[v]) <= 0.0f) sum[r][q][v] = 0.0f;
        }
      }
    }
  }
  char* out = const_cast<char*>(a.out.at<T>(item.n, c));
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int q = 0; q < kCols; ++q) {
      const int y = row + r * d, x = col + q * d;
      Pack<T, V> rounded;
#pragma unroll
      for (int v = 0; v < V; ++v) rounded.value[v] = round_to_nearest<T>(sum[r][q][v]);
      if (y < a.g.out_h && x < a.g.out_w) {
        *reinterpret_cast<Pack<T, V>*>(out + (y * a.out.h + x * a.out.w)) = rounded;
      }
    }
  }
}

}  // namespace

bool launch_staged(int64_t k, const Geometry& g, const Map& from, const Weight& weight,
                   const Output& to, void* stream) {
  StagedArgs a{};
  const Map out{to.data, to.dtype, to.strides[0], to.strides[1], to.strides[2], to.strides[3]};
  const int v = channels_of_a_thread(k);
  if (!can_stage(g, from) || !packs(out, v, g.out_h, g.out_w)) return false;
  if (to.mask.data != nullptr && !packs(to.mask, v, g.out_h, g.out_w)) return false;
  if (!plan_staged(k, g, from, a.t)) return false;
  a.g = g, a.in = pixels_of(from), a.mask = pixels_of(to.mask), a.out = pixels_of(out);
  a.weight = weight.data, a.weight_dtype = weight.dtype;
  const unsigned blocks = (a.t.items + a.t.slots - 1) / a.t.slots * a.t.groups;
  const size_t shared = sizeof(float) * (k * k * kChunk + a.t.floats);
  return with_staged_kernel(k, g, from, to.dtype, [&](auto size, auto x, auto t, auto one) {
    FB_LAUNCH((staged_kernel<decltype(size)::value, decltype(x), decltype(t),
                             decltype(one)::value != 0>),
              blocks, a.t.threads, shared, stream, a);
  });
}

}  // namespace fastbandit::depthwise
