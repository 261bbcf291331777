// What kernels share that stage channels-last maps in shared memory: the split of a map into the
// items of blocks, and the staging.
//
// A convolution of dilation d is d x d convolutions of dilation 1, each over every d-th pixel. An
// item is a rectangle of such a phase of one image, with the pixels around it that its taps reach;
// a block takes a few items and kChunk channels of them. A pixel is loaded once, as a part of 16
// bytes, converted to float32 and clipped once, and lies at an address that its thread's first one
// and a constant make: the inner loops have neither addresses nor tests of columns to compute.
// Rows outside of the map are neither staged nor read; columns outside are zeros.
#pragma once

#include "cuda/depthwise/common.h"

namespace fastbandit::depthwise {

constexpr int kChunk = 16;  // channels of a block
// Floats from a staged pixel to the next. Tiles side by side begin kCols pixels apart: 80 floats,
// so that two of them read different halves of the banks.
constexpr int kPitch = kChunk + 4;
// Of a block at most; small maps have fewer. Kernels name one block a multiprocessor as well, without
// which ptxas keeps to 128 registers on sm_90 and spills for it.
constexpr int kStagedThreads = 128;
constexpr int64_t kStagedBytes = 48 << 10;     // shared memory that no kernel has to ask for

// The rectangle that begins at (row, col) of the map that is written; n < 0 for none.
struct Item {
  int n, row, col;
};

struct Tiling {
  int row_bits, col_bits;  // log2 of an item's tiles of kRows x kCols pixels along h and w
  int lane_bits;           // log2 of the threads that share a tile, each with V channels
  int slots;               // items of a block
  int items;               // of all images
  int groups;              // of kChunk channels
  int threads;             // of a block
  int64_t floats;          // of staged pixels
  Divider by_group, by_phase_w, by_block_w, by_phase_h, by_block_h, by_line;

  __device__ __forceinline__ int rows(int k) const { return (kRows << row_bits) + k - 1; }
  __device__ __forceinline__ int width(int k) const { return (kCols << col_bits) + k - 1; }

  __device__ __forceinline__ Item item(int number, int dilation) const {
    if (number >= items) return {-1, 0, 0};
    int phase_h, phase_w, block_h, block_w;
    int rest = by_phase_w.divide(number, phase_w);
    rest = by_block_w.divide(rest, block_w);
    rest = by_phase_h.divide(rest, phase_h);
    const int n = by_block_h.divide(rest, block_h);
    return {n, phase_h + (block_h * kRows << row_bits) * dilation,
            phase_w + (block_w * kCols << col_bits) * dilation};
  }
};

// Where a thread's tile lies within the item of its slot, and its first channel of the chunk.
struct Place {
  int slot, row, col, channel;

  __device__ __forceinline__ Place(const Tiling& t, int v) {
    const int tile = static_cast<int>(threadIdx.x) >> t.lane_bits;
    slot = tile >> (t.row_bits + t.col_bits);
    row = ((tile >> t.col_bits) & ((1 << t.row_bits) - 1)) * kRows;
    col = (tile & ((1 << t.col_bits) - 1)) * kCols;
    channel = (static_cast<int>(threadIdx.x) & ((1 << t.lane_bits) - 1)) * v;
  }

  // The first staged pixel that the tile reads.
  __device__ __forceinline__ int first_pixel(const Tiling& t, int k) const {
    return (slot * t.rows(k) + row) * t.width(k) + col;
  }
};

// A map with its channels side by side (or one for all), strides in bytes: what a pixel adds to the
// address of its image is an int.
struct Pixels {
  const char* data;
  int64_t n;
  int h, w;

  template <class T>
  __device__ __forceinline__ const char* at(int image, int channel) const {
    return data + image * n + channel * static_cast<int>(sizeof(T));
  }
};

struct StagedArgs {
  Geometry g;
  Tiling t;
  Pixels in, mask, out;  // weight gradient: in = x, mask = grad
  const void* weight;
  int weight_dtype;
  float* partial;  // [tap][channel][split]
  int splits;
};

// The pixels that the items of a block need, as float32 at pixels[line][column][channel of the
// chunk], a line being a row of an item. kOne: the map has one channel for all, and kPitch is 1.
template <int K, class X, bool kOne>
__device__ __forceinline__ void stage(const Pixels& in, const Geometry& g, const Tiling& t,
                                      const Item* items, int c0, int used, float* pixels) {
  constexpr int kPack = kOne ? 1 : 16 / sizeof(X), kPacks = kOne ? 1 : kChunk / kPack;
  constexpr int kStep = kOne ? 1 : kPitch, kPart = kPack < 4 ? kPack : 4;
  const int lines = t.slots * t.rows(K), width = t.width(K), d = g.dilation;
  const int lane = threadIdx.x % 32, pack = lane % kPacks;
  // What a value has to exceed; none is NaN's equal or less.
  const float floor = g.relu ? 0.0f : __uint_as_float(0x7fc00000u);
  for (int line = threadIdx.x / 32; line < lines; line += t.threads / 32) {
    int row;
    const Item item = items[t.by_line.divide(line, row)];
    const int y = item.row + row * d - g.pad_h;
    if (item.n < 0 || y < 0 || y >= g.in_h) continue;
    const char* from = in.at<X>(item.n, kOne ? 0 : c0 + pack * kPack) + y * in.h;
    float* to = pixels + line * width * kStep + pack * kPack;
#pragma unroll 4
    for (int col = lane / kPacks; col < width; col += 32 / kPacks) {
      const int x = item.col + col * d - g.pad_w;
      Pack<X, kPack> loaded{};
      if (x >= 0 && x < g.in_w && pack * kPack < used) {
        loaded = *reinterpret_cast<const Pack<X, kPack>*>(from + x * in.w);
      }
#pragma unroll
      for (int part = 0; part < kPack; part += kPart) {
        Pack<float, kPart> wide;
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          const float value = to_compute(loaded.value[part + i]);
          wide.value[i] = value <= floor ? 0.0f : value;
        }
        store_pack<kPart>(to + col * kStep + part, 0, wide);
      }
    }
  }
}

// taps[tap][channel of the chunk], in reverse for the input gradient; 0 for channels beyond `used`.
template <int K>
__device__ __forceinline__ void stage_taps(const StagedArgs& a, int c0, int used, float* taps) {
  for (int i = threadIdx.x; i < K * K * kChunk; i += a.t.threads) {
    const int tap = i / kChunk, c = i % kChunk;
    const int from = a.g.flip ? K * K - 1 - tap : tap;
    taps[i] = c < used ? load_element<float>(a.weight, a.weight_dtype,
                                             int64_t{c0 + c} * K * K + from)
                       : 0.0f;
  }
}

// Calls body(r, q, tap, v, pixel) for every product of a tile of kRows x kCols pixels with K x K taps
// in V channels, in the order of the staged rows and then of the taps; a staged pixel is read once.
// row: the tile's first, of the map; from: its first staged pixel. kStep 1: one channel for all.
template <int K, int V, int kStep, class Body>
__device__ __forceinline__ void for_products(const StagedArgs& a, int row, const float* from,
                                             Body body) {
  constexpr int kWide = kStep == 1 ? 1 : V;
  const int width = a.t.width(K);
#pragma unroll
  for (int i = 0; i < kRows + K - 1; ++i) {
    const int y = row + i * a.g.dilation - a.g.pad_h;
    if (y < 0 || y >= a.g.in_h) continue;
    Pack<float, kWide> pixel[kCols + K - 1];
#pragma unroll
    for (int q = 0; q < kCols + K - 1; ++q) {
      pixel[q] = load_pack<kWide>(from + i * width * kStep + q * kStep, 0);
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (i - r < 0 || i - r >= K) continue;
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int q = 0; q < kCols; ++q) {
#pragma unroll
          for (int v = 0; v < V; ++v) {
            body(r, q, (i - r) * K + j, v, pixel[q + j].value[kWide == 1 ? 0 : v]);
          }
        }
      }
    }
  }
}

// ---- on the host ---------------------------------------------------------------------------------

// Channels of a thread: as many as keep taps and sums in registers.
template <int K>
constexpr int kVector = K == 3 ? 4 : 2;

inline int divided_up(int value, int by) { return (value + by - 1) / by; }

// False where no tiling fits. step: floats from a staged pixel to the next.
inline bool plan_tiling(const Geometry& g, int k, int v, int step, Tiling& t) {
  const int phases_h = g.dilation < g.out_h ? g.dilation : g.out_h;
  const int phases_w = g.dilation < g.out_w ? g.dilation : g.out_w;
  const int length_h = divided_up(g.out_h, g.dilation), length_w = divided_up(g.out_w, g.dilation);
  t.lane_bits = log2_ceil((g.c < kChunk ? g.c : kChunk) / v, 5);
  t.row_bits = log2_ceil(divided_up(length_h, kRows), 3);
  t.col_bits = log2_ceil(divided_up(length_w, kCols), 3);
  const auto floats = [&] {
    return int64_t{(kRows << t.row_bits) + k - 1} * ((kCols << t.col_bits) + k - 1) * step;
  };
  const int64_t most = kStagedBytes / sizeof(float) - int64_t{k} * k * kChunk;
  const auto threads = [&] { return 1 << (t.lane_bits + t.row_bits + t.col_bits); };
  while (threads() > kStagedThreads || floats() > most) {
    if (t.row_bits + t.col_bits == 0) return false;
    --(t.row_bits < t.col_bits ? t.col_bits : t.row_bits);
  }
  t.slots = 1;
  while (2 * t.slots * threads() <= kStagedThreads && 2 * t.slots * floats() <= most) t.slots *= 2;
  if (t.slots * threads() < 32) return false;
  const int blocks_h = divided_up(length_h, kRows << t.row_bits);
  const int blocks_w = divided_up(length_w, kCols << t.col_bits);
  t.groups = divided_up(g.c, kChunk);
  const int64_t of_image = int64_t{phases_h} * phases_w * blocks_h * blocks_w;
  if (of_image == 0 || g.n > (kIndexLimit / t.groups - t.slots) / of_image) return false;
  t.items = static_cast<int>(g.n * of_image);
  // Small blocks rather than idle processors.
  while (t.slots > 1 && t.slots * threads() > 32 &&
         int64_t{t.items} * t.groups < kPartialBlocks * t.slots) {
    t.slots /= 2;
  }
  t.threads = t.slots * threads();
  t.floats = t.slots * floats();
  t.by_group = Divider(t.groups);
  t.by_phase_w = Divider(phases_w), t.by_block_w = Divider(blocks_w);
  t.by_phase_h = Divider(phases_h), t.by_block_h = Divider(blocks_h);
  t.by_line = Divider((kRows << t.row_bits) + k - 1);
  return true;
}

inline Pixels pixels_of(const Map& m) {
  const int size = size_of(m.dtype);
  return {static_cast<const char*>(m.data), m.n * size, static_cast<int>(m.h * size),
          static_cast<int>(m.w * size)};
}

// Whether a pixel's offset in bytes, within its image of height x width, is an int.
inline bool int_offsets(const Map& m, int height, int width) {
  const int64_t limit = kIndexLimit / size_of(m.dtype) / (int64_t{height} + width);
  return m.h >= 0 && m.w >= 0 && m.h <= limit && m.w <= limit;
}

// Whether `count` channels lie side by side at every pixel, aligned to move as one.
inline bool packs(const Map& m, int count, int height, int width) {
  return m.c == 1 && m.n % count == 0 && m.h % count == 0 && m.w % count == 0 &&
         reinterpret_cast<uintptr_t>(m.data) % (count * size_of(m.dtype)) == 0 &&
         int_offsets(m, height, width);
}

// One channel for all of them, as a Gabor layer has it.
inline bool one_channel(const Geometry& g, const Map& in) {
  return in.c == 0 && int_offsets(in, g.in_h, g.in_w);
}

inline bool can_stage(const Geometry& g, const Map& in) {
  const int count = 16 / size_of(in.dtype);
  return one_channel(g, in) || (g.c % count == 0 && packs(in, count, g.in_h, g.in_w));
}

// body(X{}, T{}) for the types of the map that is convolved and of the other one. One channel for
// all is the float32 sum of a Gabor layer; other maps have equal types.
template <bool kOne, class Body>
bool with_staged_types(int first, int second, const Body& body) {
  if (first != (kOne ? static_cast<int>(kFloat32) : second)) return false;
  if (second == kFloat32) {
    body(float{}, float{});
  } else if (second == kBFloat16) {
    if constexpr (kOne) body(float{}, bfloat16{});
    else body(bfloat16{}, bfloat16{});
  } else if (second == kFloat16) {
    if constexpr (kOne) body(float{}, float16{});
    else body(float16{}, float16{});
  } else {
    return false;
  }
  return true;
}

// body(Constant<K>, X{}, T{}, Constant<one channel>); false where there is no such kernel.
template <class Body>
bool with_staged_kernel(int64_t k, const Geometry& g, const Map& in, int other, const Body& body) {
  bool launched = false;
  with_kernel_size(k, [&](auto size) {
    if (one_channel(g, in)) {
      launched = with_staged_types<true>(
          in.dtype, other, [&](auto x, auto t) { body(size, x, t, Constant<1>{}); });
    } else {
      launched = with_staged_types<false>(
          in.dtype, other, [&](auto x, auto t) { body(size, x, t, Constant<0>{}); });
    }
  });
  return launched;
}

inline int channels_of_a_thread(int64_t k) { return k == 3 ? kVector<3> : kVector<7>; }

inline bool plan_staged(int64_t k, const Geometry& g, const Map& in, Tiling& t) {
  const int v = channels_of_a_thread(k);
  return g.c % v == 0 &&
         plan_tiling(g, static_cast<int>(k), v, one_channel(g, in) ? 1 : kPitch, t);
}

}  // namespace fastbandit::depthwise
