// fastbandit::norm_sum and its backward on CUDA: maps in channels-last, [pixels, channels].
//
// A thread has `kWide` channels of a pixel, one access, and a block a tile of channels and rows of
// pixels. Forward: partial sums of all terms in one launch, what normalises them in a small one, then
// each term is read once more and the sum is written. Backward the same way: the gradient, which all
// terms share, is read once for the sums of up to kGroup terms and once for all their gradients.
// Sums are taken in one order: over the pixels of a thread, over the rows of a block, over the
// blocks, the last in float64.
#include "cuda/norm_sum.h"

#include <type_traits>

#include "cuda/pack.h"
#include "math/norm.h"

namespace fastbandit {
namespace {

constexpr int kTile = 32;           // groups of channels of a block, at most
constexpr int kBatch = 4;           // pixels whose loads of one map are under way at once
constexpr int kGroup = 4;           // terms whose sums with the gradient a thread keeps in registers
constexpr int64_t kMostParts = 256; // blocks over the pixels whose sums are added up afterwards
constexpr int kColumns = 32;        // channels of a block that adds them up

// The part of the map that a block works through: a tile of channels, every `step`-th row of pixels.
struct Tiling {
  int64_t pixels, channels;
  int groups, tile, rows;  // groups of channels, those of a block, pixels that it has at a time

  Tiling(int64_t pixels, int64_t channels, int wide) : pixels(pixels), channels(channels) {
    groups = static_cast<int>(channels / wide);
    tile = groups < kTile ? groups : kTile;
    rows = kThreads / tile;
  }
  unsigned tiles() const { return static_cast<unsigned>((groups + tile - 1) / tile); }
};

struct Place {
  int row, column;   // of the thread in its block: pixel, group of channels
  int64_t channel;   // the first
  bool inside;
};

template <int kWide>
__device__ __forceinline__ Place place_of(const Tiling& tiling) {
  Place at;
  at.row = static_cast<int>(threadIdx.x) / tiling.tile;
  at.column = static_cast<int>(threadIdx.x) - at.row * tiling.tile;
  const int group = static_cast<int>(blockIdx.y) * tiling.tile + at.column;
  at.channel = static_cast<int64_t>(group) * kWide;
  at.inside = at.row < tiling.rows && group < tiling.groups;
  return at;
}

// The pixels of one of gridDim.x parts.
struct Range {
  int64_t begin, end;
};
__device__ __forceinline__ Range part_of(int64_t pixels) {
  const int64_t length = (pixels + gridDim.x - 1) / gridDim.x;
  const int64_t begin = blockIdx.x * length;
  return {begin, begin + length < pixels ? begin + length : pixels};
}

template <int kWide, class T>
__device__ __forceinline__ void read(const T* data, int64_t at, compute_t<T> (&value)[kWide]) {
  const Pack<T, kWide> pack = *reinterpret_cast<const Pack<T, kWide>*>(data + at);
#pragma unroll
  for (int i = 0; i < kWide; ++i) value[i] = to_compute(pack.value[i]);
}

template <int kWide, class T>
__device__ __forceinline__ void write(T* data, int64_t at, const compute_t<T> (&value)[kWide]) {
  Pack<T, kWide> pack;
#pragma unroll
  for (int i = 0; i < kWide; ++i) pack.value[i] = round_to_nearest<T>(value[i]);
  *reinterpret_cast<Pack<T, kWide>*>(data + at) = pack;
}

// A vector [C] may lie anywhere: a parameter is a part of what an optimiser made one.
template <int kWide, class C>
__device__ __forceinline__ void vector_at(const C* vector, int64_t at, C (&value)[kWide]) {
#pragma unroll
  for (int i = 0; i < kWide; ++i) value[i] = vector[at + i];
}

// Adds `sums` of the threads of a block over its rows and writes them to part[i * channels].
template <int kSums, int kWide, class C>
__device__ __forceinline__ void add_rows(const Tiling& tiling, const Place& at,
                                         const C (&sums)[kSums][kWide], C* part) {
  __shared__ C shared[kWide][kThreads];
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) shared[i][threadIdx.x] = at.inside ? sums[s][i] : C(0);
    __syncthreads();
    const int first = static_cast<int>(blockIdx.y) * tiling.tile;
    for (int k = static_cast<int>(threadIdx.x); k < tiling.tile * kWide; k += kThreads) {
      const int i = k / tiling.tile, column = k - i * tiling.tile;
      if (first + column < tiling.groups) {
        C total = 0;
        for (int row = 0; row < tiling.rows; ++row)
          total += shared[i][row * tiling.tile + column];
        part[s * tiling.channels + static_cast<int64_t>(first + column) * kWide + i] = total;
      }
    }
    __syncthreads();
  }
}

// The sum of part[stride * i] over `parts` parts, by all threads of a column of a block; the first
// of them has it. scratch: a number of each thread.
template <class C>
__device__ __forceinline__ double add_parts(const C* part, int parts, int64_t stride, bool inside,
                                            double* scratch) {
  constexpr int kRows = kThreads / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int row = static_cast<int>(threadIdx.x) / kColumns;
  double total = 0.0;
  if (inside) {
#pragma unroll 4
    for (int i = row; i < parts; i += kRows) total += static_cast<double>(part[i * stride]);
  }
  scratch[threadIdx.x] = total;
  __syncthreads();
  if (row == 0) {
    for (int i = 1; i < kRows; ++i) total += scratch[i * kColumns + column];
  }
  __syncthreads();
  return total;
}

// ---- forward --------------------------------------------------------------------------------

template <class T>
struct Maps {
  const T* x[kMostNormTerms];
};

// What is known of the normalised terms, each [channels] or null.
template <class C>
struct Vectors {
  const C *weight[kMostNormTerms], *bias[kMostNormTerms], *mean[kMostNormTerms],
      *inverse[kMostNormTerms];
  int8_t measured[kMostNormTerms];  // which of the partial sums are those of the term; -1: given
};

// Of map blockIdx.z: sums of x - x[0] and of its square into partial [map][part][2][channels].
template <int kWide, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_sum_measure_kernel(Maps<T> maps, compute_t<T>* __restrict__ partial, Tiling tiling) {
  using C = compute_t<T>;
  const Place at = place_of<kWide>(tiling);
  C sums[2][kWide] = {};
  if (at.inside) {
    const T* const x = maps.x[blockIdx.z] + at.channel;
    const Range range = part_of(tiling.pixels);
    C middle[kWide];
    read<kWide>(x, 0, middle);
#pragma unroll 4
    for (int64_t p = range.begin + at.row; p < range.end; p += tiling.rows) {
      C value[kWide];
      read<kWide>(x, p * tiling.channels, value);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const C v = value[i] - middle[i];
        sums[0][i] += v;
        sums[1][i] += v * v;
      }
    }
  }
  add_rows(tiling, at, sums,
           partial + (static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x) * 2 *
                         tiling.channels);
}

// Of normalised term blockIdx.y: mean and inverse, and mean, scale and shift into table
// [term][3][channels].
template <class T>
__global__ void __launch_bounds__(kThreads)
    norm_sum_finish_kernel(Maps<T> maps, Vectors<compute_t<T>> vectors,
                           const compute_t<T>* __restrict__ partial, int parts, int64_t pixels,
                           int64_t channels, double eps, compute_t<T>* __restrict__ mean,
                           compute_t<T>* __restrict__ inverse,
                           compute_t<T>* __restrict__ variance, compute_t<T>* __restrict__ table) {
  using C = compute_t<T>;
  __shared__ double scratch[kThreads];
  const int term = static_cast<int>(blockIdx.y);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool inside = c < channels;
  C own_mean = 0, own_inverse = 0;
  double own_variance = 0.0;
  if (vectors.measured[term] < 0) {
    if (inside) {
      own_mean = vectors.mean[term][c], own_inverse = vectors.inverse[term][c];
      own_variance = variance_of(static_cast<double>(own_inverse), eps);
    }
  } else {
    const C* const own =
        partial + static_cast<int64_t>(vectors.measured[term]) * parts * 2 * channels + c;
    const double sum = add_parts(own, parts, 2 * channels, inside, scratch);
    const double square = add_parts(own + channels, parts, 2 * channels, inside, scratch);
    if (inside)
      own_variance =
          norm_statistics(sum, square, static_cast<double>(to_compute(maps.x[term][c])),
                          static_cast<double>(pixels), eps, own_mean, own_inverse);
  }
  if (!inside || threadIdx.x >= kColumns) return;
  mean[term * channels + c] = own_mean;
  inverse[term * channels + c] = own_inverse;
  variance[term * channels + c] =
      unbiased_variance<C>(own_variance, static_cast<double>(pixels));
  C* const row = table + static_cast<int64_t>(term) * 3 * channels + c;
  row[0] = own_mean;
  row[channels] = own_inverse * (vectors.weight[term] ? vectors.weight[term][c] : C(1));
  row[2 * channels] = vectors.bias[term] ? vectors.bias[term][c] : C(0);
}

// normalized_terms: a bit for each term; those that are have a row of the table each, the others are added
// as they are.
template <int kWide, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_sum_add_kernel(Maps<T> maps, unsigned normalized_terms, int terms,
                        const compute_t<T>* __restrict__ table, T* __restrict__ y, Tiling tiling) {
  using C = compute_t<T>;
  const Place at = place_of<kWide>(tiling);
  if (!at.inside) return;
  const int64_t c = tiling.channels, turn = static_cast<int64_t>(tiling.rows) * kBatch;
  for (int64_t p = blockIdx.x * turn + at.row; p < tiling.pixels; p += gridDim.x * turn) {
    C total[kBatch][kWide] = {};
    const C* row = table;
    for (int t = 0; t < terms; ++t) {
      const T* const x = maps.x[t] + at.channel;
      C value[kBatch][kWide] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t pixel = p + static_cast<int64_t>(b) * tiling.rows;
        if (pixel < tiling.pixels) read<kWide>(x, pixel * c, value[b]);
      }
      if (normalized_terms >> t & 1u) {
        C mean[kWide], scale[kWide], shift[kWide];
        vector_at<kWide>(row, at.channel, mean);
        vector_at<kWide>(row + c, at.channel, scale);
        vector_at<kWide>(row + 2 * c, at.channel, shift);
        row += 3 * c;
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int i = 0; i < kWide; ++i)
            value[b][i] = normalized(value[b][i], mean[i], scale[i], shift[i]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b)
#pragma unroll
        for (int i = 0; i < kWide; ++i)
          total[b][i] = t == 0 ? value[b][i] : total[b][i] + value[b][i];
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t pixel = p + static_cast<int64_t>(b) * tiling.rows;
      if (pixel < tiling.pixels) write<kWide>(y, pixel * c + at.channel, total[b]);
    }
  }
}

// ---- backward -------------------------------------------------------------------------------

// Of the terms from blockIdx.z * kGroup on: the sum of grad, and of grad (x - mean) of each, into
// partial [group][part][1 + kGroup][channels].
template <int kWide, class T>
__global__ void __launch_bounds__(kThreads, 2)
    norm_sum_products_kernel(Maps<T> maps, int terms, const T* __restrict__ grad,
                             const compute_t<T>* __restrict__ mean,
                             compute_t<T>* __restrict__ partial, Tiling tiling) {
  using C = compute_t<T>;
  const Place at = place_of<kWide>(tiling);
  const int first = static_cast<int>(blockIdx.z) * kGroup;
  const int64_t c = tiling.channels;
  C sums[1 + kGroup][kWide] = {};
  if (at.inside) {
    const Range range = part_of(tiling.pixels);
    const T* x[kGroup];
    C middle[kGroup][kWide] = {};
#pragma unroll
    for (int t = 0; t < kGroup; ++t) {
      x[t] = nullptr;
      if (first + t >= terms) continue;
      x[t] = maps.x[first + t] + at.channel;
      vector_at<kWide>(mean + (first + t) * c, at.channel, middle[t]);
    }
#pragma unroll 2
    for (int64_t p = range.begin + at.row; p < range.end; p += tiling.rows) {
      C g[kWide];
      read<kWide>(grad, p * c + at.channel, g);
#pragma unroll
      for (int i = 0; i < kWide; ++i) sums[0][i] += g[i];
#pragma unroll
      for (int t = 0; t < kGroup; ++t) {
        if (first + t >= terms) continue;
        C value[kWide];
        read<kWide>(x[t], p * c, value);
#pragma unroll
        for (int i = 0; i < kWide; ++i) sums[1 + t][i] += g[i] * (value[i] - middle[t][i]);
      }
    }
  }
  add_rows(tiling, at, sums,
           partial + (static_cast<int64_t>(blockIdx.z) * gridDim.x + blockIdx.x) * (1 + kGroup) * c);
}

// Of term blockIdx.y: by_weight and by_bias, and scale, shift and slope into table
// [term][3][channels].
template <class C>
__global__ void __launch_bounds__(kThreads)
    norm_sum_slopes_kernel(Vectors<C> vectors, const C* __restrict__ partial, int parts,
                           int64_t pixels, int64_t channels, const C* __restrict__ inverse,
                           C* __restrict__ by_weight, C* __restrict__ by_bias,
                           C* __restrict__ table) {
  __shared__ double scratch[kThreads];
  const int term = static_cast<int>(blockIdx.y);
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const bool inside = c < channels;
  const int64_t stride = (1 + kGroup) * channels;
  const C* const own = partial + static_cast<int64_t>(term / kGroup) * parts * stride + c;
  const double sum = add_parts(own, parts, stride, inside, scratch);
  const double product =
      add_parts(own + (1 + term % kGroup) * channels, parts, stride, inside, scratch);
  if (!inside || threadIdx.x >= kColumns) return;
  C* const row = table + static_cast<int64_t>(term) * 3 * channels + c;
  norm_slopes(sum, product, static_cast<double>(inverse[term * channels + c]),
              vectors.weight[term] ? static_cast<double>(vectors.weight[term][c]) : 1.0,
              static_cast<double>(pixels), by_weight[term * channels + c], row[0], row[channels],
              row[2 * channels]);
  if (term == 0) by_bias[c] = static_cast<C>(sum);
}

template <class T>
struct Results {
  T* to[kMostNormTerms];
};

template <int kWide, class T>
__global__ void __launch_bounds__(kThreads, 2)
    norm_sum_gradients_kernel(Maps<T> maps, Results<T> results, int terms,
                              const T* __restrict__ grad, const compute_t<T>* __restrict__ mean,
                              const compute_t<T>* __restrict__ table, Tiling tiling) {
  using C = compute_t<T>;
  const Place at = place_of<kWide>(tiling);
  if (!at.inside) return;
  const int64_t c = tiling.channels, turn = static_cast<int64_t>(tiling.rows) * kBatch;
  for (int64_t p = blockIdx.x * turn + at.row; p < tiling.pixels; p += gridDim.x * turn) {
    C g[kBatch][kWide] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int64_t pixel = p + static_cast<int64_t>(b) * tiling.rows;
      if (pixel < tiling.pixels) read<kWide>(grad, pixel * c + at.channel, g[b]);
    }
    for (int t = 0; t < terms; ++t) {
      const C* const row = table + static_cast<int64_t>(t) * 3 * c;
      C middle[kWide], scale[kWide], shift[kWide], slope[kWide];
      vector_at<kWide>(mean + t * c, at.channel, middle);
      vector_at<kWide>(row, at.channel, scale);
      vector_at<kWide>(row + c, at.channel, shift);
      vector_at<kWide>(row + 2 * c, at.channel, slope);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int64_t pixel = p + static_cast<int64_t>(b) * tiling.rows;
        if (pixel >= tiling.pixels) continue;
        C value[kWide];
        read<kWide>(maps.x[t], pixel * c + at.channel, value);
#pragma unroll
        for (int i = 0; i < kWide; ++i)
          value[i] =
              norm_gradient(g[b][i], value[i], middle[i], scale[i], shift[i], slope[i]);
        write<kWide>(results.to[t], pixel * c + at.channel, value);
      }
    }
  }
}

// ---- launches -------------------------------------------------------------------------------

// Parts of the pixels whose sums are taken by a block each.
int64_t parts_of(int64_t pixels, int64_t launches) {
  const int64_t filling = static_cast<int64_t>(multiprocessors()) * 8 / launches;
  const int64_t most = (pixels + 63) / 64;  // of fewer pixels a block is not worth its launch
  const int64_t parts = filling < kMostParts ? filling : kMostParts;
  return parts < 1 ? 1 : parts < most ? parts : most;
}

int64_t product_groups(int64_t terms) { return (terms + kGroup - 1) / kGroup; }

dim3 grid_of(const Tiling& tiling) {
  return dim3(grid_size((tiling.pixels + kBatch - 1) / kBatch * tiling.tile, kThreads),
              tiling.tiles());
}

// run(width as a type): of packs, where all pointers allow them, or of single channels.
template <class T, class Run>
void with_width(int64_t channels, bool aligned, const Run& run) {
  constexpr int kWide = sizeof(T) == 8 ? 2 : 4;
  if (aligned && channels % kWide == 0)
    run(std::integral_constant<int, kWide>{});
  else
    run(std::integral_constant<int, 1>{});
}

template <class T>
bool packs(const void* pointer) {
  return pack_aligned<sizeof(T) == 8 ? 2 : 4>(static_cast<const T*>(pointer));
}

struct Forward {
  const void* const* xs;
  const int64_t* kinds;
  const void* const* vectors;
  int terms;
  void *y, *mean, *inverse, *variance, *partial;
  int64_t pixels, channels;
  double eps;
  void* stream;
};

template <class T>
void launch(const Forward& a) {
  using C = compute_t<T>;
  Maps<T> all, of_normalized, measured;
  Vectors<C> vectors{};
  unsigned normalized_terms = 0;
  int count = 0, measures = 0;
  bool aligned = packs<T>(a.y);
  for (int t = 0; t < a.terms; ++t) {
    all.x[t] = static_cast<const T*>(a.xs[t]);
    aligned = aligned && packs<T>(a.xs[t]);
    if (a.kinds[t] == 0) continue;
    normalized_terms |= 1u << t;
    const C* own[4];
    for (int i = 0; i < 4; ++i) own[i] = static_cast<const C*>(a.vectors[4 * t + i]);
    vectors.weight[count] = own[0], vectors.bias[count] = own[1];
    vectors.mean[count] = own[2], vectors.inverse[count] = own[3];
    vectors.measured[count] = -1;
    if (own[2] == nullptr) {
      vectors.measured[count] = static_cast<int8_t>(measures);
      measured.x[measures++] = all.x[t];
    }
    of_normalized.x[count++] = all.x[t];
  }
  C* const partial = static_cast<C*>(a.partial);
  C* const table = partial;  // before the sums, which come after it
  C* const sums = partial + 3 * a.terms * a.channels;
  with_width<T>(a.channels, aligned, [&](auto wide) {
    constexpr int kWide = decltype(wide)::value;
    const Tiling tiling(a.pixels, a.channels, kWide);
    if (count > 0) {
      const int64_t parts = measures > 0 ? parts_of(a.pixels, measures) : 0;
      if (measures > 0)
        FB_LAUNCH((norm_sum_measure_kernel<kWide, T>),
                  dim3(static_cast<unsigned>(parts), tiling.tiles(),
                       static_cast<unsigned>(measures)),
                  kThreads, 0, a.stream, measured, sums, tiling);
      FB_LAUNCH((norm_sum_finish_kernel<T>),
                dim3(static_cast<unsigned>((a.channels + kColumns - 1) / kColumns),
                     static_cast<unsigned>(count)),
                kThreads, 0, a.stream, of_normalized, vectors, sums, static_cast<int>(parts),
                a.pixels, a.channels, a.eps, static_cast<C*>(a.mean),
                static_cast<C*>(a.inverse), static_cast<C*>(a.variance), table);
    }
    FB_LAUNCH((norm_sum_add_kernel<kWide, T>), grid_of(tiling), kThreads, 0, a.stream, all,
              normalized_terms, a.terms, table, static_cast<T*>(a.y), tiling);
  });
}

struct Backward {
  const void* grad;
  const void* const* xs;
  const void* const* weights;
  int terms;
  const void *mean, *inverse;
  void* const* by_x;
  void *by_weight, *by_bias, *partial;
  int64_t pixels, channels;
  void* stream;
};

template <class T>
void launch(const Backward& a) {
  using C = compute_t<T>;
  Maps<T> maps;
  Results<T> results;
  Vectors<C> vectors{};
  bool aligned = packs<T>(a.grad);
  for (int t = 0; t < a.terms; ++t) {
    maps.x[t] = static_cast<const T*>(a.xs[t]);
    results.to[t] = static_cast<T*>(a.by_x[t]);
    vectors.weight[t] = static_cast<const C*>(a.weights[t]);
    aligned = aligned && packs<T>(a.xs[t]) && packs<T>(a.by_x[t]);
  }
  const int64_t groups = product_groups(a.terms), parts = parts_of(a.pixels, groups);
  C* const table = static_cast<C*>(a.partial);
  C* const sums = table + 3 * a.terms * a.channels;
  const C *const mean = static_cast<const C*>(a.mean), *const inverse =
                                                           static_cast<const C*>(a.inverse);
  const T* const grad = static_cast<const T*>(a.grad);
  with_width<T>(a.channels, aligned, [&](auto wide) {
    constexpr int kWide = decltype(wide)::value;
    const Tiling tiling(a.pixels, a.channels, kWide);
    FB_LAUNCH((norm_sum_products_kernel<kWide, T>),
              dim3(static_cast<unsigned>(parts), tiling.tiles(), static_cast<unsigned>(groups)),
              kThreads, 0, a.stream, maps, a.terms, grad, mean, sums, tiling);
    FB_LAUNCH((norm_sum_slopes_kernel<C>),
              dim3(static_cast<unsigned>((a.channels + kColumns - 1) / kColumns),
                   static_cast<unsigned>(a.terms)),
              kThreads, 0, a.stream, vectors, sums, static_cast<int>(parts), a.pixels, a.channels,
              inverse, static_cast<C*>(a.by_weight), static_cast<C*>(a.by_bias), table);
    FB_LAUNCH((norm_sum_gradients_kernel<kWide, T>), grid_of(tiling), kThreads, 0, a.stream, maps,
              results, a.terms, grad, mean, table, tiling);
  });
}

}  // namespace
}  // namespace fastbandit

extern "C" int64_t norm_sum_partial_numbers(int64_t pixels, int64_t channels, int64_t terms) {
  using namespace fastbandit;
  const int64_t forward = 2 * terms * parts_of(pixels, 1);
  const int64_t groups = product_groups(terms);
  const int64_t backward = (1 + kGroup) * groups * parts_of(pixels, groups);
  return channels * (3 * terms + (forward > backward ? forward : backward));
}

FB_LAUNCHER launch_norm_sum(const void* const* xs, const int64_t* kinds,
                            const void* const* vectors, int64_t terms, void* y, void* mean,
                            void* inverse, void* variance, void* partial, int dtype,
                            int64_t pixels, int64_t channels, double eps, void* stream) {
  using namespace fastbandit;
  if (terms > kMostNormTerms) return "more than 32 terms";
  const Forward a{xs,       kinds,   vectors, static_cast<int>(terms), y,   mean, inverse,
                  variance, partial, pixels,  channels,                eps, stream};
  return launch_floating(dtype, [&](auto zero) { launch<decltype(zero)>(a); });
}

FB_LAUNCHER launch_norm_sum_backward(const void* grad, const void* const* xs,
                                     const void* const* weights, int64_t terms, const void* mean,
                                     const void* inverse, void* const* by_x, void* by_weight,
                                     void* by_bias, void* partial, int dtype, int64_t pixels,
                                     int64_t channels, void* stream) {
  using namespace fastbandit;
  if (terms > kMostNormTerms) return "more than 32 terms";
  const Backward a{grad,    xs,        weights, static_cast<int>(terms), mean,    inverse,
                   by_x,    by_weight, by_bias, partial,                 pixels,  channels,
                   stream};
  return launch_floating(dtype, [&](auto zero) { launch<decltype(zero)>(a); });
}
