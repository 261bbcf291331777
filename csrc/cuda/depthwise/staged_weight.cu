// The weight gradient of a depthwise convolution of channels-last maps, staged in shared memory
// (staged.h): a thread keeps the sums of all taps of kVector channels in registers.
#include "cuda/depthwise/staged.h"

namespace fastbandit::depthwise {
namespace {

constexpr int kTaps = 8;  // sums of the threads of a block are added for so many taps at once

template <int K, class X, class T, bool kOne>
__global__ void __launch_bounds__(kStagedThreads, 1) staged_weight_kernel(StagedArgs a) {
  constexpr int V = kVector<K>, kStep = kOne ? 1 : kPitch;
  FB_DYNAMIC_SHARED(float, pixels);  // afterwards the sums of kTaps taps
  __shared__ Item items[kStagedThreads];
  int group;
  const int split = a.t.by_group.divide(static_cast<int>(blockIdx.x), group);
  const int c0 = group * kChunk, used = min(kChunk, a.g.c - c0), d = a.g.dilation;
  const Place place(a.t, V);
  const float* from =
      pixels + place.first_pixel(a.t, K) * kStep + (kOne ? 0 : place.channel);
  float sum[K * K][V] = {};
  for (int first = split * a.t.slots; first < a.t.items; first += a.splits * a.t.slots) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < a.t.slots) {
      items[threadIdx.x] = a.t.item(first + static_cast<int>(threadIdx.x), d);
    }
    __syncthreads();
    stage<K, X, kOne>(a.in, a.g, a.t, items, c0, used, pixels);
    __syncthreads();
    const Item item = items[place.slot];
    const int row = item.row + place.row * d, col = item.col + place.col * d;
    if (item.n < 0 || place.channel >= used || row >= a.g.out_h || col >= a.g.out_w) continue;
    const char* g = a.mask.at<T>(item.n, c0 + place.channel);
    float grad[kRows][kCols][V];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kCols; ++q) {
        const int y = row + r * d, x = col + q * d;
        Pack<T, V> loaded{};
        if (y < a.g.out_h && x < a.g.out_w) {
          loaded = *reinterpret_cast<const Pack<T, V>*>(g + (y * a.mask.h + x * a.mask.w));
        }
#pragma unroll
        for (int v = 0; v < V; ++v) grad[r][q][v] = to_compute(loaded.value[v]);
      }
    }
    for_products<K, V, kStep>(a, row, from, [&](int r, int q, int i, int v, float pixel) {
      sum[i][v] = fmaf(grad[r][q][v], pixel, sum[i][v]);
    });
  }

  // The tiles of the block in order, kTaps taps at a time.
  const int channels = V << a.t.lane_bits, tiles = a.t.threads >> a.t.lane_bits;
#pragma unroll
  for (int first = 0; first < K * K; first += kTaps) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kTaps; ++i) {
      if (first + i >= K * K) continue;
      Pack<float, V> mine;
#pragma unroll
      for (int v = 0; v < V; ++v) mine.value[v] = sum[first + i][v];
      store_pack<V>(pixels, i * a.t.threads + threadIdx.x, mine);
    }
    __syncthreads();
    for (int e = threadIdx.x; e < kTaps * channels; e += a.t.threads) {
      const int c = e & (channels - 1), i = e / channels;
      if (first + i >= K * K || c >= used) continue;
      float value = 0.0f;
      for (int tile = 0; tile < tiles; ++tile) {
        value += pixels[(i * tiles + tile) * channels + c];
      }
      a.partial[(int64_t{first + i} * a.g.c + c0 + c) * a.splits + split] = value;
    }
  }
}

// Blocks for each group of channels.
int splits_of(const Tiling& t) {
  const int64_t wanted = (int64_t{t.items} + t.slots - 1) / t.slots;
  const int64_t blocks = kPartialBlocks * kStagedThreads / t.threads;
  const int64_t share = (blocks + t.groups - 1) / t.groups;
  return static_cast<int>(wanted < share ? wanted : share);
}

}  // namespace

int staged_weight_splits(int64_t k, const Geometry& g, const Map& grad, const Map& x) {
  Tiling t{};
  const bool fits = packs(grad, channels_of_a_thread(k), g.out_h, g.out_w);
  return fits && plan_staged(k, g, x, t) ? splits_of(t) : 0;
}

bool launch_staged_weight(int64_t k, const Geometry& g, const Map& grad, const Map& x,
                          float* partial, void* stream) {
  StagedArgs a{};
  const int v = channels_of_a_thread(k);
  if (!can_stage(g, x) || !packs(grad, v, g.out_h, g.out_w)) return false;
  if (!plan_staged(k, g, x, a.t)) return false;
  a.g = g, a.in = pixels_of(x), a.mask = pixels_of(grad);
  a.partial = partial, a.splits = splits_of(a.t);
  const int64_t summed = int64_t{kTaps} * a.t.threads * v;
  const size_t shared = sizeof(float) * (summed > a.t.floats ? summed : a.t.floats);
  return with_staged_kernel(k, g, x, grad.dtype, [&](auto size, auto from, auto t, auto one) {
    FB_LAUNCH((staged_weight_kernel<decltype(size)::value, decltype(from), decltype(t),
                                    decltype(one)::value != 0>),
              static_cast<unsigned>(a.splits * a.t.groups), a.t.threads, shared, stream, a);
  });
}

}  // namespace fastbandit::depthwise
