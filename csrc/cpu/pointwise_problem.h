// Products of small matrices, as a 1x1 convolution in channels-last memory needs them: many pixels,
// few channels. One table for each instruction set. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastbandit::cpu {

// One part of a row of channels: maps of the same size whose channels follow each other.
struct Source {
  const float* data;  // [pixels, channels]
  float* grad;        // of the same shape, or null
  int64_t channels;
};

struct PointwiseKernels {
  int64_t lanes;  // rows of packed matrices and of sums are padded to a multiple of it

  // to [depth, columns padded] = from[k * row + n * column], zeros in the padding.
  void (*pack)(int64_t depth, int64_t columns, const float* from, int64_t row, int64_t column,
               float* to);

  // out[r][n] = bias[n] + sum_k a[r][k] packed[k][n] for n < columns; the sums in the order of k
  // whatever `rows` is, so that a pixel's result does not depend on its neighbours. bias, padded
  // as the packed matrix is, may be null.
  void (*multiply)(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row,
                   const float* packed, const float* bias, float* out, int64_t out_row);

  // sums[m][n] += sum_r g[r][m] x[r][n], n < columns. x and sums have padded rows; what is in the
  // padding does not matter and comes to nothing.
  void (*accumulate)(int64_t rows, int64_t height, int64_t columns, const float* g, int64_t g_row,
                     const float* x, int64_t x_row, float* sums);

  // out[r] = max(x, 0) of the sources side by side for pixels [begin, end).
  void (*gather_relu)(int64_t begin, int64_t end, const Source* sources, int64_t count, float* out,
                      int64_t out_row);

  // The gradient of that: each source's grad = its part of `tile` where x > 0, else 0.
  void (*scatter_masked)(int64_t begin, int64_t end, const Source* sources, int64_t count,
                         const float* tile, int64_t tile_row);
};

template <>
const PointwiseKernels& kernels_for<PointwiseKernels, Isa::baseline>();
template <>
const PointwiseKernels& kernels_for<PointwiseKernels, Isa::avx2>();
template <>
const PointwiseKernels& kernels_for<PointwiseKernels, Isa::avx512>();

}  // namespace fastbandit::cpu
