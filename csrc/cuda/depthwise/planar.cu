// Depthwise convolution of contiguous maps (stride 1 along w). A block stages tiles of several planes
// in shared memory with 16-byte loads; each thread keeps the filter and 4 x 4 sums in registers.
#include "cuda/depthwise/common.h"

namespace fastbandit::depthwise {
namespace {

constexpr int kPlanarThreads = 128;
constexpr int kTile = 32;                 // largest tile of the planar kernels, pixels
constexpr int kSharedBytes = 48 * 1024;   // what a block gets without asking

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
  const auto stage = [&](auto zero, auto each) {
    stage_rows<decltype(zero), decltype(each)::value>(tile, s, map, planes, first_row, first_col,
                                                      map_h, map_w, relu, by_dilation, offset);
  };
  if (map.dtype == kFloat32) {
    s.vector ? stage(float{}, Constant<4>{}) : stage(float{}, Constant<1>{});
  } else if (map.dtype == kBFloat16) {
    s.vector ? stage(bfloat16{}, Constant<8>{}) : stage(bfloat16{}, Constant<1>{});
  } else {
    s.vector ? stage(float16{}, Constant<8>{}) : stage(float16{}, Constant<1>{});
  }
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

// ---- launching -----------------------------------------------------------------------------------

// Whole 16-byte accesses: every row begins on a boundary and holds whole packs.
bool packs_fit(const void* data, int dtype, int64_t n, int64_t c, int64_t h, int64_t width) {
  const int64_t each = 16 / size_of(dtype);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && n % each == 0 && c % each == 0 &&
         h % each == 0 && width % each == 0;
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

// False where the maps are not planar or the tile does not fit.
template <int K>
bool launch(const Geometry& g, const Map& from, const Weight& weight, const Output& to,
            void* stream) {
  const Map& mask = to.mask;
  if (from.w != 1 || to.strides[3] != 1 || (mask.data && mask.w != 1)) return false;
  PlanarArgs a{};
  a.g = g, a.in = from, a.mask = mask, a.out = to.data, a.out_dtype = to.dtype;
  a.out_n = to.strides[0], a.out_c = to.strides[1], a.out_h = to.strides[2];
  a.weight = weight.data, a.weight_dtype = weight.dtype;
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
  const int each = 16 / size_of(to.dtype);
  a.out_vector = packs_fit(to.data, to.dtype, a.out_n, a.out_c, a.out_h, g.out_w) &&
                 a.tile_w % each == 0 &&
                 (!mask.data || packs_fit(mask.data, to.dtype, mask.n, mask.c, mask.h, g.out_w));
  a.out_lane_bits = log2_ceil(a.out_vector ? a.tile_w / each : a.tile_w, 5);
  const dim3 grid((a.planes_total + a.planes - 1) / a.planes, static_cast<unsigned>(tiles));
  FB_LAUNCH((planar_kernel<K>), grid, kPlanarThreads, a.planes * plane_bytes, stream, a);
  return true;
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

}  // namespace

bool launch_planar(int64_t k, const Geometry& g, const Map& from, const Weight& weight,
                   const Output& to, void* stream) {
  bool launched = false;
  with_kernel_size(k, [&](auto size) {
    launched = launch<decltype(size)::value>(g, from, weight, to, stream);
  });
  return launched;
}

int planar_weight_splits(int64_t k, const Geometry& g, const Map& grad, const Map& x) {
  int splits = 0;
  with_kernel_size(k, [&](auto size) {
    const PlanarWeightArgs plan = plan_planar_weight<decltype(size)::value>(g, grad, x);
    if (plan.images > 0) splits = plan.splits;
  });
  return splits;
}

bool launch_planar_weight(int64_t k, const Geometry& g, const Map& grad, const Map& x,
                          float* partial, void* stream) {
  bool launched = false;
  with_kernel_size(k, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    PlanarWeightArgs plan = plan_planar_weight<kSize>(g, grad, x);
    if (plan.images == 0) return;
    plan.partial = partial;
    const int64_t staged =
        plan.images * (int64_t{plan.grad_stage.floats()} + plan.x_stage.floats());
    const int64_t summed = kPlanarThreads / 32 * kSize * kSize;
    FB_LAUNCH((planar_weight_kernel<kSize>), dim3(g.c, plan.splits), kPlanarThreads,
              sizeof(float) * (staged > summed ? staged : summed), stream, plan);
    launched = true;
  });
  return launched;
}

}  // namespace fastbandit::depthwise
