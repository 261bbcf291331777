// fastbandit::norm_sum and its backward on CUDA: maps in channels-last, [pixels, channels].
//
// A thread has `kWide` channels of a pixel, one access, and a block a tile of channels and rows of
// pixels. Forward: partial sums of all terms in one launch, whose last block makes of them what
// normalises; then each term is read once more and the sum is written. Backward the same way: the
// gradient, which all terms share, is read once for the sums of up to kGroup terms and once for all
// their gradients. Sums are taken in one order: over the pixels of a thread, over the rows of a
// block, over the blocks, the last in float64, whichever block it is that adds them.
#include "cuda/norm_sum.h"

#include <type_traits>

#include "cuda/last_block.h"
#include "cuda/pack.h"
#include "math/norm.h"

namespace fastbandit {
namespace {

constexpr int kTile = 32;           // groups of channels of a block, at most
constexpr int kBatch = 4;           // pixels whose loads of one map are under way at once
constexpr int kGroup = 4;           // terms whose sums with the gradient a thread keeps in registers
constexpr int64_t kMostParts = 256; // blocks over the pixels whose sums are added up afterwards
constexpr int kColumns = 32;        // channels whose sums a block adds up at once

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

// total[k] = the sum of part[stride * i + k * second] over `parts` parts, by all threads of a column
// of a block; the first of them has it.
template <class C>
__device__ __forceinline__ void add_parts(const C* part, int parts, int64_t stride, int64_t second,
                                          bool inside, double (&total)[2]) {
  __shared__ double scratch[2][kThreads];
  constexpr int kRows = kThreads / kColumns;
  const int column = static_cast<int>(threadIdx.x) % kColumns;
  const int row = static_cast<int>(threadIdx.x) / kColumns;
  total[0] = total[1] = 0.0;
  if (inside) {
#pragma unroll 8
    for (int i = row; i < parts; i += kRows) {
      total[0] += fresh(part + i * stride);
      total[1] += fresh(part + i * stride + second);
    }
  }
  __syncthreads();
  for (int k = 0; k < 2; ++k) scratch[k][threadIdx.x] = total[k];
  __syncthreads();
  if (row > 0) return;
  for (int i = 1; i < kRows; ++i)
    for (int k = 0; k < 2; ++k) total[k] += scratch[k][i * kColumns + column];
}

// body(channel, whether there is one) by all threads, kColumns channels of the block at a time.
template <int kWide, class Body>
__device__ __forceinline__ void for_channels_of_block(const Tiling& tiling, const Body& body) {
  const int64_t first = static_cast<int64_t>(blockIdx.y) * tiling.tile * kWide;
  const int64_t behind = first + static_cast<int64_t>(tiling.tile) * kWide;
  const int64_t end = behind < tiling.channels ? behind : tiling.channels;
  for (int64_t at = first; at < end; at += kColumns) {
    const int64_t c = at + static_cast<int64_t>(threadIdx.x) % kColumns;
    body(c, c < end);
  }
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
};

template <class C>
struct Statistics {
  C *mean, *inverse, *variance;  // [terms][channels] each
  C* table;                      // mean, scale and shift, [term][3][channels]
  double eps;

  // The first row of threads has the numbers of a channel.
  __device__ __forceinline__ void write(const Vectors<C>& vectors, int term, int64_t c,
                                        int64_t channels, double pixels, C own_mean, C own_inverse,
                                        double own_variance) const {
    mean[term * channels + c] = own_mean;
    inverse[term * channels + c] = own_inverse;
    variance[term * channels + c] = unbiased_variance<C>(own_variance, pixels);
    C* const row = table + static_cast<int64_t>(term) * 3 * channels + c;
    row[0] = own_mean;
    row[channels] = own_inverse * (vectors.weight[term] ? vectors.weight[term][c] : C(1));
    row[2 * channels] = vectors.bias[term] ? vectors.bias[term][c] : C(0);
  }
};

// Of normalised term blockIdx.z: sums of x - x[0] and of its square into partial
// [term][part][2][channels], and of those what normalises it. Where that is given, one block does.
template <int kWide, class T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    norm_sum_measure_kernel(Maps<T> maps, Vectors<compute_t<T>> vectors, compute_t<T>* partial,
                            Statistics<compute_t<T>> to, Tiling tiling, unsigned first_counter) {
  using C = compute_t<T>;
  const int term = static_cast<int>(blockIdx.z);
  const int64_t channels = tiling.channels;
  const double pixels = static_cast<double>(tiling.pixels);
  if (vectors.mean[term]) {
    if (blockIdx.x > 0) return;
    for_channels_of_block<kWide>(tiling, [&](int64_t c, bool inside) {
      if (!inside || threadIdx.x >= kColumns) return;
      const C inverse = vectors.inverse[term][c];
      to.write(vectors, term, c, channels, pixels, vectors.mean[term][c], inverse,
               variance_of(static_cast<double>(inverse), to.eps));
    });
    return;
  }
  const Place at = place_of<kWide>(tiling);
  C sums[2][kWide] = {};
  if (at.inside) {
    const T* const x = maps.x[term] + at.channel;
    const Range range = part_of(tiling.pixels);
    C middle[kWide];
    read<kWide>(x, 0, middle);
#pragma unroll 4
    for (int64_t p = range.begin + at.row; p < range.end; p += tiling.rows) {
      C value[kWide];
      read<kWide>(x, p * channels, value);
#pragma unroll
      for (int i = 0; i < kWide; ++i) {
        const C v = value[i] - middle[i];
        sums[0][i] += v;
        sums[1][i] += v * v;
      }
    }
  }
  C* const own = partial + static_cast<int64_t>(term) * gridDim.x * 2 * channels;
  add_rows(tiling, at, sums, own + static_cast<int64_t>(blockIdx.x) * 2 * channels);
  if (!is_last_block(first_counter)) return;
  for_channels_of_block<kWide>(tiling, [&](int64_t c, bool inside) {
    double total[2];
    add_parts(own + c, static_cast<int>(gridDim.x), 2 * channels, channels, inside, total);
    if (!inside || threadIdx.x >= kColumns) return;
    C mean, inverse;
    const double variance =
        norm_statistics(total[0], total[1], static_cast<double>(to_compute(maps.x[term][c])),
                        pixels, to.eps, mean, inverse);
    to.write(vectors, term, c, channels, pixels, mean, inverse, variance);
  });
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

template <class C>
struct Slopes {
  C *by_weight, *by_bias;  // [terms][channels], [channels]
  C* table;                // scale, shift and slope, [term][3][channels]
};

// Of the terms from blockIdx.z * kGroup on: the sum of grad, and of grad (x - mean) of each, into
// partial [group][part][1 + kGroup][channels]; and of those what their gradients are made of.
template <int kWide, class T>
__global__ void __launch_bounds__(kThreads, 2)
    norm_sum_products_kernel(Maps<T> maps, Vectors<compute_t<T>> vectors, int terms,
                             const T* __restrict__ grad, const compute_t<T>* __restrict__ mean,
                             const compute_t<T>* __restrict__ inverse, compute_t<T>* partial,
                             Slopes<compute_t<T>> to, Tiling tiling, unsigned first_counter) {
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
  const int64_t stride = (1 + kGroup) * c;
  C* const own = partial + static_cast<int64_t>(blockIdx.z) * gridDim.x * stride;
  add_rows(tiling, at, sums, own + static_cast<int64_t>(blockIdx.x) * stride);
  if (!is_last_block(first_counter)) return;
  const int behind = first + kGroup < terms ? first + kGroup : terms;
  for (int term = first; term < behind; ++term) {
    for_channels_of_block<kWide>(tiling, [&](int64_t k, bool inside) {
      double total[2];  // of grad, and of grad (x - mean)
      add_parts(own + k, static_cast<int>(gridDim.x), stride, (1 + term - first) * c, inside,
                total);
      if (!inside || threadIdx.x >= kColumns) return;
      C* const row = to.table + static_cast<int64_t>(term) * 3 * c + k;
      norm_slopes(total[0], total[1], static_cast<double>(inverse[term * c + k]),
                  vectors.weight[term] ? static_cast<double>(vectors.weight[term][k]) : 1.0,
                  static_cast<double>(tiling.pixels), to.by_weight[term * c + k], row[0], row[c],
                  row[2 * c]);
      if (term == 0) to.by_bias[k] = static_cast<C>(total[0]);
    });
  }
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
  Maps<T> all, of_normalized;
  Vectors<C> vectors{};
  unsigned normalized_terms = 0;
  int count = 0, measures = 0;  // normalised terms, and those whose statistics are not given
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
    measures += own[2] == nullptr;
    of_normalized.x[count++] = all.x[t];
  }
  C* const partial = static_cast<C*>(a.partial);
  C* const table = partial;  // before the sums, which come after it
  C* const sums = partial + 3 * a.terms * a.channels;
  with_width<T>(a.channels, aligned, [&](auto wide) {
    constexpr int kWide = decltype(wide)::value;
    const Tiling tiling(a.pixels, a.channels, kWide);
    if (count > 0) {
      const int64_t parts = measures > 0 ? parts_of(a.pixels, measures) : 1;
      const Statistics<C> to{static_cast<C*>(a.mean), static_cast<C*>(a.inverse),
                             static_cast<C*>(a.variance), table, a.eps};
      const dim3 grid(static_cast<unsigned>(parts), tiling.tiles(), static_cast<unsigned>(count));
      FB_LAUNCH((norm_sum_measure_kernel<kWide, T>), grid, kThreads, 0, a.stream, of_normalized,
                vectors, sums, to, tiling, take_counters(grid.y * grid.z));
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
    const dim3 grid(static_cast<unsigned>(parts), tiling.tiles(), static_cast<unsigned>(groups));
    const Slopes<C> to{static_cast<C*>(a.by_weight), static_cast<C*>(a.by_bias), table};
    FB_LAUNCH((norm_sum_products_kernel<kWide, T>), grid, kThreads, 0, a.stream, maps, vectors,
              a.terms, grad, mean, inverse, sums, to, tiling, take_counters(grid.y * grid.z));
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
  if (channels > kMostNormChannels) return "more than 4096 channels";
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
  if (channels > kMostNormChannels) return "more than 4096 channels";
  const Backward a{grad,    xs,        weights, static_cast<int>(terms), mean,    inverse,
                   by_x,    by_weight, by_bias, partial,                 pixels,  channels,
                   stream};
  return launch_floating(dtype, [&](auto zero) { launch<decltype(zero)>(a); });
}
