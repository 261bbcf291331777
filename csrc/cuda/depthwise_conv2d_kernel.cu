// fastbandit::depthwise_conv2d and its two gradients on CUDA.
//
// Three families:
//   planar   contiguous maps (stride 1 along w). A block stages tiles of several planes in shared
//            memory with 16-byte loads; each thread keeps the filter and 4 x 4 sums in registers.
//   strided  any strides, meant for channels-last: neighbouring threads are neighbouring channels,
//            so every access of a warp is contiguous; 4 x 4 sums in registers as well.
//   general  any filter size, stride, dilation and float64: one output for each thread.
// planar and strided take square filters of 3, 5 or 7 taps, stride 1 and any dilation. A thread's
// rows and columns are `dilation` apart, so the taps are neighbours in its registers whatever the
// dilation is, and only the filter size is a compile-time constant. The input gradient is the
// forward with flipped taps. The weight gradient keeps all taps of a channel in registers, adds
// the threads of a block in a fixed order, and a second kernel adds the blocks.
#include "cuda/depthwise_conv2d.h"

#include "cuda/element.h"
#include "cuda/pack.h"

namespace fastbandit {
namespace {

constexpr int kRows = 4, kCols = 4;       // sums of a thread
constexpr int kPlanarThreads = 128;
constexpr int kStridedThreads = 256;
constexpr int kTile = 32;                 // largest tile of the planar kernels, pixels
constexpr int kSharedBytes = 48 * 1024;   // what a block gets without asking
constexpr int64_t kPartialBlocks = 528;   // blocks of a weight gradient: 4 for each of 132 processors
constexpr int64_t kIndexLimit = (int64_t{1} << 31) - 1;

struct Map {
  const void* data;
  int dtype;
  int64_t n, c, h, w;  // strides
};

// One convolution of stride 1, seen from the map that is written.
struct Geometry {
  int n, c, in_h, in_w, out_h, out_w;
  int pad_h, pad_w, dilation;
  int relu;  // of the input as it is loaded
  int flip;  // taps in reverse: the input gradient
};

// kRows x kCols pixels of a thread, `dilation` apart; phases interleave.
struct Groups {
  int rows, cols;  // groups along h and w
  Divider by_cols, by_rows, by_dilation;

  static int count(int size, int dilation, int each) {
    const int phase = (size + dilation - 1) / dilation;
    return dilation * ((phase + each - 1) / each);
  }
  Groups() = default;
  Groups(int h, int w, int dilation)
      : rows(count(h, dilation, kRows)),
        cols(count(w, dilation, kCols)),
        by_cols(cols),
        by_rows(rows),
        by_dilation(dilation) {}
  // First pixel of group g along one side.
  __device__ __forceinline__ int first(int g, int each) const {
    int phase;
    const int block = by_dilation.divide(g, phase);
    return phase + block * each * static_cast<int>(by_dilation.divisor);
  }
};

// ---- planar ----------------------------------------------------------------------------------

// A staged tile: [plane][row][phase][column / dilation] as float32, zero outside the map.
struct Stage {
  int rows, row_pitch, phase_pitch, cols;
  int lane_bits;  // log2 of the threads that share a row
  int vector;     // 1: whole 16-byte accesses
  Divider by_rows;

  __host__ __device__ int floats() const { return rows * row_pitch; }
};

struct PlanarArgs {
  Geometry g;
  Map in, mask;
  void* out;
  int out_dtype;
  int64_t out_n, out_c, out_h;
  const void* weight;
  int weight_dtype;
  int planes_total, planes;  // planes of all images and channels; of one block
  int tile_h, tile_w, tiles_w;
  Stage stage;
  Groups groups;
  int out_lane_bits, out_vector;
  Divider by_units, by_channels, by_tile_h;
};

// Rows of the tile whose first pixel is (first_row, first_col) of the map; offset(plane) is where a
// plane begins, or -1.
template <class T, int V, class Offset>
__device__ __forceinline__ void stage_rows(float* tile, const Stage& s, const Map& map, int planes,
                                           int first_row, int first_col, int map_h, int map_w,
                                           int relu, const Divider& by_dilation,
                                           const Offset& offset) {
  const int lanes = 1 << s.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int begin = max(first_col, 0), end = min(first_col + s.cols, map_w);
  for (int row = threadIdx.x >> s.lane_bits; row < planes * s.rows;
       row += kPlanarThreads >> s.lane_bits) {
    int r;
    const int64_t start = offset(s.by_rows.divide(row, r));
    const int y = first_row + r;
    if (start < 0 || y < 0 || y >= map_h) continue;
    const T* source = static_cast<const T*>(map.data) + start + y * map.h;
    float* target = tile + row * s.row_pitch;
    for (int group = begin / V + lane; group * V < end; group += lanes) {
      const Pack<T, V> pack = load_pack<V>(source, group);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int col = group * V + e - first_col;
        if (col < 0 || col >= s.cols) continue;
        int phase;
        const int at = by_dilation.divide(col, phase);
        target[phase * s.phase_pitch + at] = relu_if<float>(relu, to_compute(pack.value[e]));
      }
    }
  }
}

template <class Offset>
__device__ __forceinline__ void stage_tile(float* tile, const Stage& s, const Map& map, int planes,
                                           int first_row, int first_col, int map_h, int map_w,
                                           int relu, const Divider& by_dilation,
                                           const Offset& offset) {
  const int quads = planes * s.floats() / 4;
  for (int i = threadIdx.x; i < quads; i += kPlanarThreads) {
    reinterpret_cast<float4*>(tile)[i] = make_float4(0, 0, 0, 0);
  }
  __syncthreads();
#define FB_STAGE(T, V)                                                                         \
  stage_rows<T, V>(tile, s, map, planes, first_row, first_col, map_h, map_w, relu, by_dilation, \
                   offset)
  if (map.dtype == kFloat32) {
    if (s.vector) FB_STAGE(float, 4); else FB_STAGE(float, 1);
  } else if (map.dtype == kBFloat16) {
    if (s.vector) FB_STAGE(bfloat16, 8); else FB_STAGE(bfloat16, 1);
  } else {
    if (s.vector) FB_STAGE(float16, 8); else FB_STAGE(float16, 1);
  }
#undef FB_STAGE
  __syncthreads();
}

// kSegment neighbouring floats of a staged row, from a multiple of 4.
template <int kSegment>
__device__ __forceinline__ void load_segment(const float* row, float (&segment)[kSegment]) {
#pragma unroll
  for (int i = 0; i < kSegment; i += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(row + i);
    segment[i] = quad.x, segment[i + 1] = quad.y, segment[i + 2] = quad.z, segment[i + 3] = quad.w;
  }
}

template <int K>
constexpr int segment_of() {
  return (kCols + K - 1 + 3) / 4 * 4;
}

// Staged outputs [plane][tile_h][tile_w] to memory, masked by x > 0 on the way.
template <class T, int V>
__device__ __forceinline__ void write_rows(const float* staged, const PlanarArgs& a, int plane0,
                                           int row0, int col0) {
  const int lanes = 1 << a.out_lane_bits, lane = threadIdx.x & (lanes - 1);
  const int width = min(a.tile_w, a.g.out_w - col0);
  for (int row = threadIdx.x >> a.out_lane_bits; row < a.planes * a.tile_h;
       row += kPlanarThreads >> a.out_lane_bits) {
    int r;
    const int plane = plane0 + a.by_tile_h.divide(row, r), y = row0 + r;
    if (plane >= a.planes_total || y >= a.g.out_h) continue;
    int c;
    const int n = a.by_channels.divide(plane, c);
    T* target = static_cast<T*>(a.out) + n * a.out_n + c * a.out_c + y * a.out_h + col0;
    const T* mask = a.mask.data == nullptr ? nullptr
                                           : static_cast<const T*>(a.mask.data) + n * a.mask.n +
                                                 c * a.mask.c + y * a.mask.h + col0;
    for (int group = lane; group * V < width; group += lanes) {
      Pack<T, V> keep{};
      if (mask) keep = load_pack<V>(mask, group);
      Pack<T, V> pack;
#pragma unroll
      for (int e = 0; e < V; ++e) {
        float value = staged[row * a.tile_w + group * V + e];
        if (mask && to_compute(keep.value[e]) <= 0.0f) value = 0.0f;
        pack.value[e] = round_to_nearest<T>(value);
      }
      store_pack<V>(target, group, pack);
    }
  }
}

template <int K>
__global__ void __launch_bounds__(kPlanarThreads, kBlocks) planar_kernel(PlanarArgs a) {
  constexpr int kSegment = segment_of<K>();
  FB_DYNAMIC_SHARED(float, tile);
  const int plane0 = blockIdx.x * a.planes, d = a.g.dilation;
  const int tile_row = blockIdx.y / a.tiles_w, tile_col = blockIdx.y - tile_row * a.tiles_w;
  const int row0 = tile_row * a.tile_h, col0 = tile_col * a.tile_w;

  // 1. The input tile with its halo.
  stage_tile(tile, a.stage, a.in, a.planes, row0 - a.g.pad_h, col0 - a.g.pad_w, a.g.in_h, a.g.in_w,
             a.g.relu, a.groups.by_dilation, [&](int plane) -> int64_t {
               if (plane0 + plane >= a.planes_total) return -1;
               int c;
               const int n = a.by_channels.divide(plane0 + plane, c);
               return n * a.in.n + c * a.in.c;
             });

  // 2. 4 x 4 sums of each thread.
  int rest, group_col;
  const int plane = a.by_units.divide(threadIdx.x, rest);
  const int group_row = a.groups.by_cols.divide(rest, group_col);
  const bool active = plane < a.planes && plane0 + plane < a.planes_total;
  const int row = a.groups.first(group_row, kRows), col = a.groups.first(group_col, kCols);
  float sum[kRows][kCols] = {};
  if (active) {
    int c;
    a.by_channels.divide(plane0 + plane, c);
    float tap[K * K];
#pragma unroll
    for (int i = 0; i < K * K; ++i) {
      tap[i] = load_element<float>(a.weight, a.weight_dtype,
                                   int64_t{c} * K * K + (a.g.flip ? K * K - 1 - i : i));
    }
    int phase;
    const int column = a.groups.by_dilation.divide(col, phase);
    const float* p = tile + plane * a.stage.floats() + row * a.stage.row_pitch +
                     phase * a.stage.phase_pitch + column;
#pragma unroll
    for (int i = 0; i < kRows + K - 1; ++i, p += d * a.stage.row_pitch) {
      float segment[kSegment];
      load_segment(p, segment);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (i - r < 0 || i - r >= K) continue;
#pragma unroll
        for (int j = 0; j < K; ++j) {
#pragma unroll
          for (int q = 0; q < kCols; ++q) {
            sum[r][q] = fmaf(tap[(i - r) * K + j], segment[q + j], sum[r][q]);
          }
        }
      }
    }
  }
  __syncthreads();

  // 3. Through shared memory again, so that whole rows are written at once.
  if (active) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int q = 0; q < kCols; ++q) {
        const int y = row + r * d, x = col + q * d;
        if (y < a.tile_h && x < a.tile_w) {
          tile[(plane * a.tile_h + y) * a.tile_w + x] = sum[r][q];
        }
      }
    }
  }
  __syncthreads();
  if (a.out_dtype == kFloat32) {
    if (a.out_vector) write_rows<float, 4>(tile, a, plane0, row0, col0);
    else write_rows<float, 1>(tile, a, plane0, row0, col0);
  } else if (a.out_dtype == kBFloat16) {
    if (a.out_vector) write_rows<bfloat16, 8>(tile, a, plane0, row0, col0);
    else write_rows<bfloat16, 1>(tile, a, plane0, row0, col0);
  } else {
    if (a.out_vector) write_rows<float16, 8>(tile, a, plane0, row0, col0);
    else write_rows<float16, 1>(tile, a, plane0, row0, col0);
  }
}

struct PlanarWeightArgs {
  Geometry g;  // out: the map of grad
  Map grad, x;
  float* partial;  // [tap][channel][split]
  int images;      // staged at once by a block
  int splits;      // blocks that share a channel
  int tile_h, tile_w, tiles_h, tiles_w;
  Stage grad_stage, x_stage;
  Groups groups;
  Divider by_units;
};

template <int K>
__global__ void __launch_bounds__(kPlanarThreads, kBlocks) planar_weight_kernel(PlanarWeightArgs a) {
  constexpr int kSegment = segment_of<K>();
  FB_DYNAMIC_SHARED(float, shared);
  float* const grad_tile = shared;
  float* const x_tile = shared + a.images * a.grad_stage.floats();
  const int c = blockIdx.x, split = blockIdx.y, d = a.g.dilation;

  int rest, group_col;
  const int image = a.by_units.divide(threadIdx.x, rest);
  const int group_row = a.groups.by_cols.divide(rest, group_col);
  const int row = a.groups.first(group_row, kRows), col = a.groups.first(group_col, kCols);
  int phase;
  const int column = a.groups.by_dilation.divide(col, phase);
  float sum[K * K] = {};

  // Sets of images, shared out evenly between the blocks of the channel.
  const int sets = (a.g.n + a.images - 1) / a.images;
  for (int set = split; set < sets; set += a.splits) {
    const int n0 = set * a.images;
    for (int tile = 0; tile < a.tiles_h * a.tiles_w; ++tile) {
      const int row0 = tile / a.tiles_w * a.tile_h, col0 = tile % a.tiles_w * a.tile_w;
      __syncthreads();  // the last tile has been read
      // Rows and columns of grad beyond the tile belong to the next one.
      const int end_row = min(row0 + a.tile_h, a.g.out_h), end_col = min(col0 + a.tile_w, a.g.out_w);
      stage_tile(grad_tile, a.grad_stage, a.grad, a.images, row0, col0, end_row, end_col, 0,
                 a.groups.by_dilation, [&](int i) -> int64_t {
                   return n0 + i < a.g.n ? (n0 + i) * a.grad.n + c * a.grad.c : -1;
                 });
      stage_tile(x_tile, a.x_stage, a.x, a.images, row0 - a.g.pad_h, col0 - a.g.pad_w, a.g.in_h,
                 a.g.in_w, a.g.relu, a.groups.by_dilation, [&](int i) -> int64_t {
                   return n0 + i < a.g.n ? (n0 + i) * a.x.n + c * a.x.c : -1;
                 });
      if (image >= a.images) continue;
      const float* g = grad_tile + image * a.grad_stage.floats() + row * a.grad_stage.row_pitch +
                       phase * a.grad_stage.phase_pitch + column;
      float grad[kRows][kCols];
#pragma unroll
      for (int r = 0; r < kRows; ++r, g += d * a.grad_stage.row_pitch) load_segment(g, grad[r]);
      const float* p = x_tile + image * a.x_stage.floats() + row * a.x_stage.row_pitch +
                       phase * a.x_stage.phase_pitch + column;
#pragma unroll
      for (int i = 0; i < kRows + K - 1; ++i, p += d * a.x_stage.row_pitch) {
        float segment[kSegment];
        load_segment(p, segment);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (i - r < 0 || i - r >= K) continue;
#pragma unroll
          for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
              sum[(i - r) * K + j] = fmaf(grad[r][q], segment[q + j], sum[(i - r) * K + j]);
            }
          }
        }
      }
    }
  }

  // The threads of the block: a tree in each warp, then the warps in order.
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < K * K; ++i) {
    float value = sum[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    if (lane == 0) shared[warp * K * K + i] = value;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < K * K; i += kPlanarThreads) {
    float value = shared[i];
    for (int w = 1; w < kPlanarThreads / 32; ++w) value += shared[w * K * K + i];
    a.partial[(int64_t{i} * a.g.c + c) * a.splits + split] = value;
  }
}

// ---- strided ---------------------------------------------------------------------------------

struct StridedArgs {
  Geometry g;
  Map in, mask;  // weight gradient: in = x, mask = grad
  void* out;
  int64_t out_n, out_c, out_h, out_w;
  const void* weight;
  int weight_dtype;
  float* partial;  // [tap][channel][split]
  int splits;
  int channel_bits;  // log2 of the channels of a block
  int tiles;         // of all images
  Groups groups;
};

// Pixel positions of tile t: image, first row, first column of the written map.
__device__ __forceinline__ int tile_position(const Groups& groups, int t, int& row, int& col) {
  int group_row, group_col;
  const int n =
      groups.by_rows.divide(groups.by_cols.divide(t, group_col), group_row);
  row = groups.first(group_row, kRows);
  col = groups.first(group_col, kCols);
  return n;
}

// kCols + K - 1 pixels of one row, `dilation` apart, zero outside the map.
template <int kCount, class X>
__device__ __forceinline__ void load_pixels(const X* row, int64_t stride, int col, int dilation,
                                            int width, int relu, float (&pixels)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int x = col + i * dilation;
    pixels[i] = x >= 0 && x < width ? relu_if<float>(relu, to_compute(row[x * stride])) : 0.0f;
  }
}

template <int K, class X, class T>
__global__ void __launch_bounds__(kStridedThreads) strided_kernel(StridedArgs a) {
  FB_DYNAMIC_SHARED(float, taps);  // [channel][tap]
  const int channels = 1 << a.channel_bits, c0 = blockIdx.y << a.channel_bits;
  const int used = min(channels, a.g.c - c0);
  for (int i = threadIdx.x; i < used * K * K; i += kStridedThreads) {
    taps[i] = load_element<float>(a.weight, a.weight_dtype, int64_t{c0} * K * K + i);
  }
  __syncthreads();
  const int c = threadIdx.x & (channels - 1);
  const int t = blockIdx.x * (kStridedThreads >> a.channel_bits) + (threadIdx.x >> a.channel_bits);
  if (c >= used || t >= a.tiles) return;
  float tap[K * K];
#pragma unroll
  for (int i = 0; i < K * K; ++i) tap[i] = taps[c * K * K + (a.g.flip ? K * K - 1 - i : i)];

  int row, col;
  const int n = tile_position(a.groups, t, row, col), d = a.g.dilation;
  const X* in = static_cast<const X*>(a.in.data) + n * a.in.n + (c0 + c) * a.in.c;
  float sum[kRows][kCols] = {};
#pragma unroll
  for (int i = 0; i < kRows + K - 1; ++i) {
    const int y = row + i * d - a.g.pad_h;
    if (y < 0 || y >= a.g.in_h) continue;
    float pixels[kCols + K - 1];
    load_pixels(in + y * a.in.h, a.in.w, col - a.g.pad_w, d, a.g.in_w, a.g.relu, pixels);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (i - r < 0 || i - r >= K) continue;
#pragma unroll
      for (int j = 0; j < K; ++j) {
#pragma unroll
        for (int q = 0; q < kCols; ++q) {
          sum[r][q] = fmaf(tap[(i - r) * K + j], pixels[q + j], sum[r][q]);
        }
      }
    }
  }

  T* out = static_cast<T*>(a.out) + n * a.out_n + (c0 + c) * a.out_c;
  const T* mask = a.mask.data == nullptr
      ? nullptr
      : static_cast<const T*>(a.mask.data) + n * a.mask.n + (c0 + c) * a.mask.c;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
#pragma unroll
    for (int q = 0; q < kCols; ++q) {
      const int y = row + r * d, x = col + q * d;
      if (y >= a.g.out_h || x >= a.g.out_w) continue;
      float value = sum[r][q];
      if (mask && to_compute(mask[y * a.mask.h + x * a.mask.w]) <= 0.0f) value = 0.0f;
      out[y * a.out_h + x * a.out_w] = round_to_nearest<T>(value);
    }
  }
}

template <int K, class X, class T>
__global__ void __launch_bounds__(kStridedThreads) strided_weight_kernel(StridedArgs a) {
  constexpr int kBatch = 8;  // taps that are added at once; a block has at least 8 lanes of tiles
  __shared__ float shared[kBatch * kStridedThreads];
  const int channels = 1 << a.channel_bits, c0 = blockIdx.y << a.channel_bits;
  const int c = threadIdx.x & (channels - 1), lane = threadIdx.x >> a.channel_bits;
  const int lanes = kStridedThreads >> a.channel_bits, d = a.g.dilation;
  float sum[K * K] = {};
  if (c0 + c < a.g.c) {
    for (int t = blockIdx.x * lanes + lane; t < a.tiles; t += a.splits * lanes) {
      int row, col;
      const int n = tile_position(a.groups, t, row, col);
      const T* g = static_cast<const T*>(a.mask.data) + n * a.mask.n + (c0 + c) * a.mask.c;
      float grad[kRows][kCols];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
#pragma unroll
        for (int q = 0; q < kCols; ++q) {
          const int y = row + r * d, x = col + q * d;
          grad[r][q] = y < a.g.out_h && x < a.g.out_w
              ? to_compute(g[y * a.mask.h + x * a.mask.w])
              : 0.0f;
        }
      }
      const X* in = static_cast<const X*>(a.in.data) + n * a.in.n + (c0 + c) * a.in.c;
#pragma unroll
      for (int i = 0; i < kRows + K - 1; ++i) {
        const int y = row + i * d - a.g.pad_h;
        if (y < 0 || y >= a.g.in_h) continue;
        float pixels[kCols + K - 1];
        load_pixels(in + y * a.in.h, a.in.w, col - a.g.pad_w, d, a.g.in_w, a.g.relu, pixels);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (i - r < 0 || i - r >= K) continue;
#pragma unroll
          for (int j = 0; j < K; ++j) {
#pragma unroll
            for (int q = 0; q < kCols; ++q) {
              sum[(i - r) * K + j] = fmaf(grad[r][q], pixels[q + j], sum[(i - r) * K + j]);
            }
          }
        }
      }
    }
  }
  // The lanes of the block in order, kBatch taps at a time.
#pragma unroll
  for (int first = 0; first < K * K; first += kBatch) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < K * K) shared[i * kStridedThreads + threadIdx.x] = sum[first + i];
    }
    __syncthreads();
    if (lane < kBatch && first + lane < K * K && c0 + c < a.g.c) {
      float value = 0.0f;
      for (int l = 0; l < lanes; ++l) value += shared[lane * kStridedThreads + l * channels + c];
      a.partial[(int64_t{first + lane} * a.g.c + c0 + c) * a.splits + blockIdx.x] = value;
    }
  }
}

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

// ---- general ---------------------------------------------------------------------------------

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

// ---- choosing and launching --------------------------------------------------------------------

// body(Constant<K>) for the filter sizes that are unrolled.
template <int V>
struct Constant {
  static constexpr int value = V;
};
template <class Body>
void with_kernel_size(int64_t k, const Body& body) {
  if (k == 3) body(Constant<3>{});
  if (k == 5) body(Constant<5>{});
  if (k == 7) body(Constant<7>{});
}

// The types of the map that is convolved and of the other one: equal, or float32 beside a half type.
template <class X, class T>
struct Types {
  using first = X;
  using second = T;
};
// float32 beside a half type is what a Gabor layer needs, and compiled for 3 x 3 taps only.
template <int K, class Body>
bool with_types(int first, int second, const Body& body) {
  if (first == kFloat32 && second == kFloat32) {
    body(Types<float, float>{});
  } else if (first == kBFloat16 && second == kBFloat16) {
    body(Types<bfloat16, bfloat16>{});
  } else if (first == kFloat16 && second == kFloat16) {
    body(Types<float16, float16>{});
  } else if (K == 3 && first == kFloat32 && second == kBFloat16) {
    if constexpr (K == 3) body(Types<float, bfloat16>{});
  } else if (K == 3 && first == kFloat32 && second == kFloat16) {
    if constexpr (K == 3) body(Types<float, float16>{});
  } else {
    return false;
  }
  return true;
}

bool unrolled(const int64_t* s) {
  const int64_t k = s[kConvKernelH];
  return (k == 3 || k == 5 || k == 7) && s[kConvKernelW] == k && s[kConvStrideH] == 1 &&
         s[kConvStrideW] == 1 && s[kConvDilationH] == s[kConvDilationW] &&
         s[kConvDilationH] < 1024;
}

bool is_half(int dtype) { return dtype == kBFloat16 || dtype == kFloat16; }
bool known(int dtype) { return dtype == kFloat32 || is_half(dtype); }
int size_of(int dtype) { return is_half(dtype) ? 2 : 4; }

int log2_ceil(int value, int limit) {
  int bits = 0;
  while (bits < limit && (1 << bits) < value) ++bits;
  return bits;
}

// Whole 16-byte accesses: every row begins on a boundary and holds whole packs.
bool packs_fit(const void* data, int dtype, int64_t n, int64_t c, int64_t h, int64_t width) {
  const int64_t each = 16 / size_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && n % each == 0 && c % each == 0 &&
         h % each == 0 && width % each == 0;
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

// A staged tile for `groups` with `reach` more rows and columns in each phase.
Stage stage_of(const Groups& groups, int dilation, int reach, int segment, int width, int vector) {
  Stage s{};
  const int row_blocks = groups.rows / dilation, col_blocks = groups.cols / dilation;
  s.rows = dilation * (row_blocks * kRows + reach);
  s.phase_pitch = (col_blocks - 1) * kCols + segment;
  s.row_pitch = dilation * s.phase_pitch;
  s.cols = dilation * (col_blocks * kCols + reach);
  const int accesses = (s.cols < width ? s.cols : width) / (vector > 1 ? vector : 1);
  s.lane_bits = log2_ceil(accesses, 5);
  s.vector = vector > 1;
  s.by_rows = Divider(s.rows);
  return s;
}

bool small_indices(const int64_t* s) {
  if (s[kConvN] * s[kConvC] >= kIndexLimit || s[kConvH] >= (1 << 20) || s[kConvW] >= (1 << 20) ||
      s[kConvPadH] >= (1 << 20) || s[kConvPadW] >= (1 << 20))
    return false;
  const int64_t pixels = (s[kConvH] + s[kConvOutH]) * (s[kConvW] + s[kConvOutW]);
  return s[kConvN] < kIndexLimit / (pixels > 0 ? pixels : 1);
}

// False where the maps are not planar or the tile does not fit.
template <int K>
bool launch_planar(const Geometry& g, const Map& from, const void* weight, int weight_dtype,
                   const Map& mask, void* to, int to_dtype, const int64_t* to_strides,
                   void* stream) {
  if (from.w != 1 || to_strides[3] != 1 || (mask.data && mask.w != 1)) return false;
  PlanarArgs a{};
  a.g = g, a.in = from, a.mask = mask, a.out = to, a.out_dtype = to_dtype;
  a.out_n = to_strides[0], a.out_c = to_strides[1], a.out_h = to_strides[2];
  a.weight = weight, a.weight_dtype = weight_dtype;
  a.planes_total = g.n * g.c;
  a.tile_h = g.out_h < kTile ? g.out_h : kTile;
  a.tile_w = g.out_w < kTile ? g.out_w : kTile;
  a.tiles_w = (g.out_w + a.tile_w - 1) / a.tile_w;
  const int64_t tiles = int64_t{a.tiles_w} * ((g.out_h + a.tile_h - 1) / a.tile_h);
  a.groups = Groups(a.tile_h, a.tile_w, g.dilation);
  const int64_t units = int64_t{a.groups.rows} * a.groups.cols;
  if (units > kPlanarThreads) return false;
  const int in_packs = packs_fit(from.data, from.dtype, from.n, from.c, from.h, g.in_w)
      ? 16 / size_of(from.dtype)
      : 1;
  a.stage = stage_of(a.groups, g.dilation, K - 1, segment_of<K>(), g.in_w, in_packs);
  const int64_t staged = a.stage.floats(), written = int64_t{a.tile_h} * a.tile_w;
  const int64_t plane_bytes = 4 * (staged > written ? staged : written);
  if (plane_bytes > kSharedBytes || tiles > 65535) return false;
  const int64_t by_memory = kSharedBytes / plane_bytes, by_threads = kPlanarThreads / units;
  a.planes = static_cast<int>(by_memory < by_threads ? by_memory : by_threads);
  if (a.planes > a.planes_total) a.planes = a.planes_total;
  a.by_units = Divider(units), a.by_channels = Divider(g.c), a.by_tile_h = Divider(a.tile_h);
  const int each = 16 / size_of(to_dtype);
  a.out_vector = packs_fit(to, to_dtype, a.out_n, a.out_c, a.out_h, g.out_w) &&
                 a.tile_w % each == 0 &&
                 (!mask.data || packs_fit(mask.data, to_dtype, mask.n, mask.c, mask.h, g.out_w));
  a.out_lane_bits = log2_ceil(a.out_vector ? a.tile_w / each : a.tile_w, 5);
  const dim3 grid((a.planes_total + a.planes - 1) / a.planes, static_cast<unsigned>(tiles));
  FB_LAUNCH((planar_kernel<K>), grid, kPlanarThreads, a.planes * plane_bytes, stream, a);
  return true;
}

struct StridedPlan {
  StridedArgs args;
  int channel_groups, lanes;
  bool fits;  // whether an int numbers the tiles; the other numbers stand for nothing where not
};

StridedPlan plan_strided(const Geometry& g) {
  StridedPlan plan{};
  plan.args.g = g;
  plan.args.channel_bits = log2_ceil(g.c, 5);
  plan.args.groups = Groups(g.out_h, g.out_w, g.dilation);
  // A small map has a group for each phase of the dilation, so pixels do not bound their number.
  const int64_t of_image = int64_t{plan.args.groups.rows} * plan.args.groups.cols;
  plan.fits = of_image == 0 || g.n <= (kIndexLimit - kStridedThreads) / of_image;
  if (!plan.fits) return plan;
  plan.args.tiles = static_cast<int>(g.n * of_image);
  plan.lanes = kStridedThreads >> plan.args.channel_bits;
  plan.channel_groups = (g.c + (1 << plan.args.channel_bits) - 1) >> plan.args.channel_bits;
  const int64_t wanted = (plan.args.tiles + plan.lanes - 1) / plan.lanes;
  const int64_t share = (kPartialBlocks + plan.channel_groups - 1) / plan.channel_groups;
  plan.args.splits = static_cast<int>(wanted < share ? wanted : share);
  return plan;
}

template <int K, class X, class T>
void launch_strided(StridedPlan plan, const Map& from, const void* weight, int weight_dtype,
                    const Map& mask, void* to, const int64_t* to_strides, void* stream) {
  StridedArgs& a = plan.args;
  a.in = from, a.mask = mask, a.out = to;
  a.out_n = to_strides[0], a.out_c = to_strides[1], a.out_h = to_strides[2], a.out_w = to_strides[3];
  a.weight = weight, a.weight_dtype = weight_dtype;
  const dim3 grid((a.tiles + plan.lanes - 1) / plan.lanes, plan.channel_groups);
  FB_LAUNCH((strided_kernel<K, X, T>), grid, kStridedThreads,
            (sizeof(float) * K * K) << a.channel_bits, stream, a);
}

// The planar weight gradient, without its pointers; images = 0 where it does not apply.
template <int K>
PlanarWeightArgs plan_planar_weight(const Geometry& g, const Map& grad, const Map& x) {
  PlanarWeightArgs a{};
  if (grad.w != 1 || x.w != 1) return a;
  a.g = g, a.grad = grad, a.x = x;
  a.tile_h = g.out_h < kTile ? g.out_h : kTile;
  a.tile_w = g.out_w < kTile ? g.out_w : kTile;
  a.tiles_h = (g.out_h + a.tile_h - 1) / a.tile_h;
  a.tiles_w = (g.out_w + a.tile_w - 1) / a.tile_w;
  a.groups = Groups(a.tile_h, a.tile_w, g.dilation);
  const int64_t units = int64_t{a.groups.rows} * a.groups.cols;
  if (units > kPlanarThreads) return a;
  const auto packs = [](const Map& map, int width) {
    return packs_fit(map.data, map.dtype, map.n, map.c, map.h, width) ? 16 / size_of(map.dtype) : 1;
  };
  // The staged columns of grad end with the tile, which must end with a pack too.
  const int grad_packs = a.tile_w % 8 == 0 ? packs(grad, g.out_w) : 1;
  a.grad_stage = stage_of(a.groups, g.dilation, 0, kCols, g.out_w, grad_packs);
  a.x_stage = stage_of(a.groups, g.dilation, K - 1, segment_of<K>(), g.in_w, packs(x, g.in_w));
  const int64_t bytes = 4 * (int64_t{a.grad_stage.floats()} + a.x_stage.floats());
  if (bytes > kSharedBytes) return a;
  const int64_t by_memory = kSharedBytes / bytes, by_threads = kPlanarThreads / units;
  a.images = static_cast<int>(by_memory < by_threads ? by_memory : by_threads);
  if (a.images > g.n) a.images = g.n;
  a.by_units = Divider(units);
  const int64_t sets = (g.n + a.images - 1) / a.images;
  const int64_t share = (kPartialBlocks + g.c - 1) / g.c;
  a.splits = static_cast<int>(sets < share ? sets : share);
  return a;
}

void sum_partials(const float* partial, void* grad_weight, int dtype, int c, int taps, int splits,
                  void* stream) {
  const int64_t threads = int64_t{c} * taps * 32;
  const unsigned blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  FB_LAUNCH((sum_partials_kernel), blocks, kThreads, 0, stream, partial, grad_weight, dtype, c,
            taps, splits);
}

GeneralArgs general_of(const int64_t* s) {
  GeneralArgs a{};
  for (int i = 0; i < kConvFields; ++i) a.shape[i] = s[i];
  return a;
}

}  // namespace

FB_LAUNCHER launch_depthwise_conv2d(const void* from, int from_dtype, const void* weight,
                                    int weight_dtype, const void* mask, void* to, int to_dtype,
                                    const int64_t* shape, const int64_t* from_strides,
                                    const int64_t* mask_strides, const int64_t* to_strides,
                                    int backward, void* stream) {
  const Map in = map_of(from, from_dtype, from_strides);
  const Map keep = mask ? map_of(mask, to_dtype, mask_strides) : Map{};
  if (unrolled(shape) && small_indices(shape) && known(from_dtype) && known(to_dtype)) {
    const Geometry g = geometry_of(shape, backward != 0);
    bool launched = false;
    with_kernel_size(shape[kConvKernelH], [&](auto k) {
      constexpr int kSize = decltype(k)::value;
      launched = launch_planar<kSize>(g, in, weight, weight_dtype, keep, to, to_dtype, to_strides,
                                      stream);
      if (launched) return;
      const StridedPlan plan = plan_strided(g);
      launched = plan.fits && with_types<kSize>(from_dtype, to_dtype, [&](auto types) {
        using Pair = decltype(types);
        launch_strided<kSize, typename Pair::first, typename Pair::second>(
            plan, in, weight, weight_dtype, keep, to, to_strides, stream);
      });
    });
    if (launched) return launch_error();
  }
  GeneralArgs a = general_of(shape);
  a.from = in, a.mask = keep, a.to = to, a.to_dtype = to_dtype;
  a.to_n = to_strides[0], a.to_c = to_strides[1], a.to_h = to_strides[2], a.to_w = to_strides[3];
  a.weight = weight, a.weight_dtype = weight_dtype, a.backward = backward;
  a.channels_inner = to_strides[1] == 1;
  const int64_t total = shape[kConvN] * shape[kConvC] *
      (backward ? shape[kConvH] * shape[kConvW] : shape[kConvOutH] * shape[kConvOutW]);
  const unsigned blocks = grid_size(total, kThreads);
  if (to_dtype == kFloat64) {
    FB_LAUNCH((general_kernel<double>), blocks, kThreads, 0, stream, a);
  } else {
    FB_LAUNCH((general_kernel<float>), blocks, kThreads, 0, stream, a);
  }
  return launch_error();
}

extern "C" int64_t depthwise_conv2d_partial_floats(int grad_dtype, const int64_t* shape,
                                                   const int64_t* grad_strides,
                                                   const int64_t* x_strides) {
  if (!unrolled(shape) || !small_indices(shape) || !known(grad_dtype)) return 0;
  const Geometry g = geometry_of(shape, false);
  const StridedPlan strided = plan_strided(g);
  int64_t splits = strided.fits ? strided.args.splits : 0;
  with_kernel_size(shape[kConvKernelH], [&](auto k) {
    const PlanarWeightArgs planar = plan_planar_weight<decltype(k)::value>(
        g, map_of(nullptr, grad_dtype, grad_strides), map_of(nullptr, kFloat32, x_strides));
    if (planar.images > 0) splits = planar.splits;
  });
  return splits * shape[kConvC] * shape[kConvKernelH] * shape[kConvKernelW];
}

FB_LAUNCHER launch_depthwise_conv2d_backward_weight(
    const void* grad, int grad_dtype, const void* x, int x_dtype, float* partial,
    void* grad_weight, int weight_dtype, const int64_t* shape, const int64_t* grad_strides,
    const int64_t* x_strides, void* stream) {
  const Map from = map_of(grad, grad_dtype, grad_strides), in = map_of(x, x_dtype, x_strides);
  if (partial && unrolled(shape) && small_indices(shape) && known(grad_dtype) && known(x_dtype)) {
    const Geometry g = geometry_of(shape, false);
    bool launched = false;
    int splits = 0;
    with_kernel_size(shape[kConvKernelH], [&](auto k) {
      constexpr int kSize = decltype(k)::value;
      PlanarWeightArgs planar = plan_planar_weight<kSize>(g, from, in);
      if (planar.images > 0) {
        planar.partial = partial;
        splits = planar.splits;
        const int64_t staged =
            planar.images * (int64_t{planar.grad_stage.floats()} + planar.x_stage.floats());
        const int64_t summed = kPlanarThreads / 32 * kSize * kSize;
        FB_LAUNCH((planar_weight_kernel<kSize>), dim3(g.c, splits), kPlanarThreads,
                  sizeof(float) * (staged > summed ? staged : summed), stream, planar);
        launched = true;
        return;
      }
      launched = with_types<kSize>(x_dtype, grad_dtype, [&](auto types) {
        using Pair = decltype(types);
        StridedPlan plan = plan_strided(g);
        plan.args.in = in, plan.args.mask = from, plan.args.partial = partial;
        splits = plan.args.splits;
        FB_LAUNCH((strided_weight_kernel<kSize, typename Pair::first, typename Pair::second>),
                  dim3(splits, plan.channel_groups), kStridedThreads, 0, stream, plan.args);
      });
    });
    if (launched) {
      const char* error = launch_error();
      if (error) return error;
      sum_partials(partial, grad_weight, weight_dtype, g.c,
                   static_cast<int>(shape[kConvKernelH] * shape[kConvKernelW]), splits, stream);
      return launch_error();
    }
  }
  GeneralArgs a = general_of(shape);
  a.from = from, a.mask = in, a.to = grad_weight, a.to_dtype = weight_dtype;
  const int64_t blocks = shape[kConvC] * shape[kConvKernelH] * shape[kConvKernelW];
  if (blocks > kIndexLimit) return "more filter taps than a grid has blocks";
  if (grad_dtype == kFloat64) {
    FB_LAUNCH((general_weight_kernel<double>), static_cast<unsigned>(blocks), kThreads, 0, stream,
              a);
  } else {
    FB_LAUNCH((general_weight_kernel<float>), static_cast<unsigned>(blocks), kThreads, 0, stream,
              a);
  }
  return launch_error();
}

}  // namespace fastbandit
