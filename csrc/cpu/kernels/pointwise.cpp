// The kernels of pointwise_problem.h, compiled once for each instruction set (see cpu/isa.h).
#include <type_traits>

#include "cpu/simd/simd.h"
#include "cpu/pointwise_problem.h"

namespace fastbandit::cpu::FB_ISA {

// Vectors of columns that a tile of sums takes, and rows: as many as the registers hold.
constexpr int kMostVectors = kIsa == Isa::avx512 ? 4 : kIsa == Isa::avx2 ? 2 : 1;
template <int V>
constexpr int kRows = kIsa == Isa::baseline ? 4 : V == kMostVectors ? 6 : 8;

FB_INLINE int64_t padded(int64_t columns) { return (columns + kLanes - 1) / kLanes * kLanes; }

inline void pack(int64_t depth, int64_t columns, const float* from, int64_t row, int64_t column,
                 float* to) {
  const int64_t width = padded(columns);
  if (row == 1) {  // the weight of a forward pass: read along its rows, which lie far apart
    for (int64_t n = 0; n < columns; n += kLanes)
      for (int64_t k = 0; k < depth; k += kLanes)
        transpose_tile(from + n * column + k, column, std::min<int64_t>(kLanes, columns - n),
                       std::min<int64_t>(kLanes, depth - k), to + k * width + n, width);
    return;
  }
  for (int64_t k = 0; k < depth; ++k, to += width) {
    if (column == 1) {
      std::copy_n(from + k * row, columns, to);
      std::fill(to + columns, to + width, 0.0f);
      continue;
    }
    for (int64_t n = 0; n < width; ++n)
      to[n] = n < columns ? from[k * row + n * column] : 0.0f;
  }
}

// ---- products ------------------------------------------------------------------------------------

// R rows by V vectors of columns; `last` columns of the last vector are stored.
template <int R, int V>
FB_INLINE void multiply_tile(int64_t depth, const float* a, int64_t a_row, const float* b,
                             int64_t b_row, const float* bias, float* out, int64_t out_row,
                             int64_t last) {
  Vec sum[R][V];
  FB_UNROLL
  for (int v = 0; v < V; ++v) {
    const Vec first = bias ? load(bias + v * kLanes) : zero();
    FB_UNROLL
    for (int r = 0; r < R; ++r) sum[r][v] = first;
  }
  for (int64_t k = 0; k < depth; ++k, b += b_row) {
    Vec right[V];
    FB_UNROLL
    for (int v = 0; v < V; ++v) right[v] = load(b + v * kLanes);
    FB_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec left = broadcast(a[r * a_row + k]);
      FB_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    float* const to = out + r * out_row;
    FB_UNROLL
    for (int v = 0; v + 1 < V; ++v) store(to + v * kLanes, sum[r][v]);
    store_first(to + (V - 1) * kLanes, last, sum[r][V - 1]);
  }
}

template <int V>
void multiply_panel(int64_t rows, int64_t depth, const float* a, int64_t a_row, const float* b,
                    int64_t b_row, const float* bias, float* out, int64_t out_row, int64_t last) {
  constexpr int R = kRows<V>;
  int64_t r = 0;
  for (; r + R <= rows; r += R)
    multiply_tile<R, V>(depth, a + r * a_row, a_row, b, b_row, bias, out + r * out_row, out_row,
                        last);
  for (; r + 2 <= rows; r += 2)
    multiply_tile<2, V>(depth, a + r * a_row, a_row, b, b_row, bias, out + r * out_row, out_row,
                        last);
  if (r < rows)
    multiply_tile<1, V>(depth, a + r * a_row, a_row, b, b_row, bias, out + r * out_row, out_row,
                        last);
}

// f(V as a type, first column, columns of the last vector) for panels of at most kMostVectors.
template <class F>
FB_INLINE void for_panels(int64_t columns, const F& f) {
  for (int64_t n = 0; n < columns;) {
    const int64_t vectors = std::min<int64_t>((columns - n + kLanes - 1) / kLanes, kMostVectors);
    const int64_t last = std::min<int64_t>(kLanes, columns - n - (vectors - 1) * kLanes);
    if constexpr (kMostVectors >= 4) {
      if (vectors == 4) f(std::integral_constant<int, 4>{}, n, last);
      if (vectors == 3) f(std::integral_constant<int, 3>{}, n, last);
    }
    if constexpr (kMostVectors >= 2) {
      if (vectors == 2) f(std::integral_constant<int, 2>{}, n, last);
    }
    if (vectors == 1) f(std::integral_constant<int, 1>{}, n, last);
    n += vectors * kLanes;
  }
}

inline void multiply(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row,
                     const float* packed, const float* bias, float* out, int64_t out_row) {
  for_panels(columns, [&](auto vectors, int64_t n, int64_t last) {
    multiply_panel<decltype(vectors)::value>(rows, depth, a, a_row, packed + n, padded(columns),
                                             bias ? bias + n : nullptr, out + n, out_row, last);
  });
}

template <int R, int V>
FB_INLINE void accumulate_tile(int64_t rows, const float* g, int64_t g_row, const float* x,
                               int64_t x_row, float* sums, int64_t sums_row) {
  Vec sum[R][V];
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    FB_UNROLL
    for (int v = 0; v < V; ++v) sum[r][v] = load(sums + r * sums_row + v * kLanes);
  }
  for (int64_t p = 0; p < rows; ++p, g += g_row, x += x_row) {
    Vec right[V];
    FB_UNROLL
    for (int v = 0; v < V; ++v) right[v] = load(x + v * kLanes);
    FB_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec left = broadcast(g[r]);
      FB_UNROLL
      for (int v = 0; v < V; ++v) sum[r][v] = fma(left, right[v], sum[r][v]);
    }
  }
  FB_UNROLL
  for (int r = 0; r < R; ++r) {
    FB_UNROLL
    for (int v = 0; v < V; ++v) store(sums + r * sums_row + v * kLanes, sum[r][v]);
  }
}

template <int V>
void accumulate_panel(int64_t rows, int64_t height, const float* g, int64_t g_row, const float* x,
                      int64_t x_row, float* sums, int64_t sums_row) {
  constexpr int R = kRows<V>;
  int64_t m = 0;
  for (; m + R <= height; m += R)
    accumulate_tile<R, V>(rows, g + m, g_row, x, x_row, sums + m * sums_row, sums_row);
  for (; m + 2 <= height; m += 2)
    accumulate_tile<2, V>(rows, g + m, g_row, x, x_row, sums + m * sums_row, sums_row);
  if (m < height)
    accumulate_tile<1, V>(rows, g + m, g_row, x, x_row, sums + m * sums_row, sums_row);
}

inline void accumulate(int64_t rows, int64_t height, int64_t columns, const float* g,
                       int64_t g_row, const float* x, int64_t x_row, float* sums) {
  for_panels(columns, [&](auto vectors, int64_t n, int64_t) {
    accumulate_panel<decltype(vectors)::value>(rows, height, g, g_row, x + n, x_row, sums + n,
                                               padded(columns));
  });
}

// ---- ReLU on the way in and out ------------------------------------------------------------------

inline void gather_relu(int64_t begin, int64_t end, const Source* sources, int64_t count,
                        float* out, int64_t out_row) {
  int64_t at = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t c = sources[s].channels;
    const float* x = sources[s].data + begin * c;
    float* to = out + at;
    for (int64_t p = begin; p < end; ++p, x += c, to += out_row) {
      int64_t i = 0;
      for (; i + kLanes <= c; i += kLanes) store(to + i, relu(load(x + i)));
      if (i < c) store_first(to + i, c - i, relu(load_first(x + i, c - i)));
    }
    at += c;
  }
}

inline void scatter_masked(int64_t begin, int64_t end, const Source* sources, int64_t count,
                           const float* tile, int64_t tile_row) {
  int64_t at = 0;
  for (int64_t s = 0; s < count; ++s) {
    const int64_t c = sources[s].channels;
    if (sources[s].grad != nullptr) {
      const float* x = sources[s].data + begin * c;
      float* to = sources[s].grad + begin * c;
      const float* from = tile + at;
      for (int64_t p = begin; p < end; ++p, x += c, to += c, from += tile_row) {
        int64_t i = 0;
        for (; i + kLanes <= c; i += kLanes)
          store(to + i, where_positive(load(x + i), load(from + i)));
        if (i < c) {
          const Vec value = load_first(from + i, c - i);
          store_first(to + i, c - i, where_positive(load_first(x + i, c - i), value));
        }
      }
    }
    at += c;
  }
}

inline PointwiseKernels make_pointwise_table() {
  return {kLanes, &pack, &multiply, &accumulate, &gather_relu, &scatter_masked};
}

}  // namespace fastbandit::cpu::FB_ISA

namespace fastbandit::cpu {

template <>
const PointwiseKernels& kernels_for<PointwiseKernels, FB_ISA::kIsa>() {
  static const PointwiseKernels table = FB_ISA::make_pointwise_table();
  return table;
}

}  // namespace fastbandit::cpu

#include "cpu/simd/end.h"
