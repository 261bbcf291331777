// Depthwise convolution of maps of any strides, meant for channels-last: neighbouring threads are
// neighbouring channels, so every access of a warp is contiguous; 4 x 4 sums in registers.
#include "cuda/depthwise/common.h"

namespace fastbandit::depthwise {
namespace {

constexpr int kStridedThreads = 256;

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

// ---- launching -----------------------------------------------------------------------------------

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
void launch(StridedPlan plan, const Map& from, const Weight& weight, const Output& to,
            void* stream) {
  StridedArgs& a = plan.args;
  a.in = from, a.mask = to.mask, a.out = to.data;
  a.out_n = to.strides[0], a.out_c = to.strides[1], a.out_h = to.strides[2], a.out_w = to.strides[3];
  a.weight = weight.data, a.weight_dtype = weight.dtype;
  const dim3 grid((a.tiles + plan.lanes - 1) / plan.lanes, plan.channel_groups);
  FB_LAUNCH((strided_kernel<K, X, T>), grid, kStridedThreads,
            (sizeof(float) * K * K) << a.channel_bits, stream, a);
}

}  // namespace

bool launch_strided(int64_t k, const Geometry& g, const Map& from, const Weight& weight,
                    const Output& to, void* stream) {
  const StridedPlan plan = plan_strided(g);
  bool launched = false;
  with_kernel_size(k, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    launched = plan.fits && with_types<kSize>(from.dtype, to.dtype, [&](auto types) {
      using Pair = decltype(types);
      launch<kSize, typename Pair::first, typename Pair::second>(plan, from, weight, to, stream);
    });
  });
  return launched;
}

int strided_weight_splits(const Geometry& g) {
  const StridedPlan plan = plan_strided(g);
  return plan.fits ? plan.args.splits : 0;
}

bool launch_strided_weight(int64_t k, const Geometry& g, const Map& grad, const Map& x,
                           float* partial, void* stream) {
  StridedPlan plan = plan_strided(g);
  plan.args.in = x, plan.args.mask = grad, plan.args.partial = partial;
  bool launched = false;
  with_kernel_size(k, [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    launched = plan.fits && with_types<kSize>(x.dtype, grad.dtype, [&](auto types) {
      using Pair = decltype(types);
      FB_LAUNCH((strided_weight_kernel<kSize, typename Pair::first, typename Pair::second>),
                dim3(plan.args.splits, plan.channel_groups), kStridedThreads, 0, stream, plan.args);
    });
  });
  return launched;
}

}  // namespace fastbandit::depthwise
