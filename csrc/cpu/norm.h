// Batch normalisation of float32 in channels-last, in the pieces that ops are made of.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/walk.h"
#include "math/norm.h"
#include "norm_checks.h"

namespace fastbandit::norm {

constexpr int64_t kWidth = 256;   // floats of a row of accumulators: enough independent sums
constexpr int64_t kTile = 64;     // of them, those that are summed at a time, in registers
constexpr int64_t kBlock = 8192;  // floats summed in float32 before they enter the float64 sums

// x [pixels, channels] in memory. Rows of `repeat` pixels, so that a loop is long for any C.
struct Shape {
  int64_t channels, pixels, repeat, width, block_pixels, blocks;

  Shape(int64_t channels, int64_t pixels) : channels(channels), pixels(pixels) {
    repeat = std::max<int64_t>(1, kWidth / channels);
    width = repeat * channels;
    block_pixels = std::max<int64_t>(1, kBlock / width) * repeat;
    blocks = (pixels + block_pixels - 1) / block_pixels;
  }
  int64_t begin(int64_t block) const { return block * block_pixels; }
  int64_t end(int64_t block) const { return std::min(pixels, begin(block) + block_pixels); }
};

// values [channels], written out `repeat` times.
inline std::vector<float> repeated(const Shape& shape, const float* values) {
  std::vector<float> result(static_cast<size_t>(shape.width));
  for (int64_t i = 0; i < shape.width; ++i)
    result[static_cast<size_t>(i)] = values[i % shape.channels];
  return result;
}

// Calls row(at, count) for the rows of pixels [begin, end); count is the width but for the last.
template <class Row>
inline __attribute__((always_inline)) void for_rows(const Shape& shape, int64_t begin, int64_t end,
                                                    const Row& row) {
  const int64_t last = end * shape.channels;
  for (int64_t at = begin * shape.channels; at < last; at += shape.width)
    row(at, std::min(shape.width, last - at));
}

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int64_t kLanes = 16;

// What is summed: u and u * v, where v = x - middle and u = grad, or v again without a gradient.
struct Terms {
  const float *x, *middle, *grad;

  template <bool kGrad>
  inline __attribute__((always_inline)) void add(int64_t at, int64_t i, float& a, float& b) const {
    const float v = x[at] - middle[i];
    const float u = kGrad ? grad[at] : v;
    a += u;
    b += u * v;
  }
};

inline __attribute__((always_inline)) Floats load(const float* from) {
  return *reinterpret_cast<const Floats*>(from);
}

// The two sums of `kTile` columns from `column` on, over the full rows of a block, in registers.
template <bool kGrad>
inline __attribute__((always_inline)) void tile_sums(const Terms& terms, int64_t column,
                                                     int64_t begin, int64_t rows, int64_t width,
                                                     float* first, float* second) {
  constexpr int kVectors = kTile / kLanes;
  Floats a[kVectors] = {}, b[kVectors] = {}, middle[kVectors];
  for (int k = 0; k < kVectors; ++k) middle[k] = load(terms.middle + column + k * kLanes);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t at = begin + row * width + column;
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      const Floats v = load(terms.x + at + k * kLanes) - middle[k];
      const Floats u = kGrad ? load(terms.grad + at + k * kLanes) : v;
      a[k] += u;
      b[k] += u * v;
    }
  }
  std::memcpy(first + column, a, sizeof(a));
  std::memcpy(second + column, b, sizeof(b));
}

// The two sums of each channel over one block, into part [2 * channels]. `sums` [2 * width] is the
// caller's scratch memory.
template <bool kGrad>
void block_sums(const Shape& shape, const Terms& terms, int64_t block, float* sums, double* part) {
  const int64_t c = shape.channels, width = shape.width;
  float* const first = sums;
  float* const second = sums + width;
  std::fill(sums, sums + 2 * width, 0.0f);
  with_isa(FB_BODY {
    const int64_t begin = shape.begin(block) * c, end = shape.end(block) * c;
    const int64_t rows = (end - begin) / width;
    int64_t column = 0;
    for (; column + kTile <= width; column += kTile)
      tile_sums<kGrad>(terms, column, begin, rows, width, first, second);
    for (; column < width; ++column)
      for (int64_t row = 0; row < rows; ++row)
        terms.add<kGrad>(begin + row * width + column, column, first[column], second[column]);
    for (int64_t at = begin + rows * width, i = 0; at < end; ++at, ++i)
      terms.add<kGrad>(at, i, first[i], second[i]);
  });
  for (int64_t i = 0; i < width; ++i) {
    part[i % c] += static_cast<double>(first[i]);
    part[c + i % c] += static_cast<double>(second[i]);
  }
}

// The sum of the blocks' parts, each [2 * channels], in their order.
inline std::vector<double> total_of(const Shape& shape, const std::vector<double>& parts) {
  const int64_t length = 2 * shape.channels;
  std::vector<double> total(parts.begin(), parts.begin() + length);
  for (int64_t block = 1; block < shape.blocks; ++block)
    for (int64_t i = 0; i < length; ++i)
      total[static_cast<size_t>(i)] += parts[static_cast<size_t>(length * block + i)];
  return total;
}

// The two sums of each channel over all pixels. In blocks, so that neither the threads nor their
// number decide the rounding.
template <bool kGrad>
std::vector<double> channel_sums(const Shape& shape, const Terms& terms) {
  std::vector<double> parts(static_cast<size_t>(2 * shape.channels * shape.blocks));
  parallel(shape.blocks, 4, [&](int64_t from, int64_t to) {
    std::vector<float> sums(static_cast<size_t>(2 * shape.width));
    for (int64_t block = from; block < to; ++block)
      block_sums<kGrad>(shape, terms, block, sums.data(),
                        parts.data() + 2 * shape.channels * block);
  });
  return total_of(shape, parts);
}

// Those of grad and of grad (x - mean).
inline std::vector<double> gradient_sums(const Shape& shape, const float* grad, const float* x,
                                         const float* means) {
  const std::vector<float> middle = repeated(shape, means);
  return channel_sums<true>(shape, {x, middle.data(), grad});
}

template <class Row>
void for_all_rows(const Shape& shape, const Row& row) {
  parallel(shape.blocks, 4, [&](int64_t from, int64_t to) {
    with_isa(FB_BODY { for_rows(shape, shape.begin(from), shape.end(to - 1), row); });
  });
}

// From the sums of x - middle and of its square: mean and inverse deviation [channels], and, if it is
// asked for, the unbiased variance.
inline void statistics(const Shape& shape, const std::vector<double>& sums, const float* middle,
                       double eps, float* means, float* inverses, float* variances = nullptr) {
  const int64_t c = shape.channels;
  const double count = static_cast<double>(shape.pixels);
  for (int64_t i = 0; i < c; ++i) {
    const double variance =
        norm_statistics(sums[static_cast<size_t>(i)], sums[static_cast<size_t>(c + i)],
                        static_cast<double>(middle[i]), count, eps, means[i], inverses[i]);
    if (variances != nullptr) variances[i] = unbiased_variance<float>(variance, count);
  }
}

// What normalises: y = (x - mean) * scale + shift. Each written out `repeat` times.
struct ForwardNorm {
  std::vector<float> mean, scale, shift;

  ForwardNorm(const Shape& shape, const float* means, const float* inverses, const float* weight,
              const float* bias)
      : mean(repeated(shape, means)) {
    const int64_t c = shape.channels;
    std::vector<float> scales(static_cast<size_t>(c)), shifts(static_cast<size_t>(c));
    for (int64_t i = 0; i < c; ++i) {
      scales[static_cast<size_t>(i)] = inverses[i] * (weight ? weight[i] : 1.0f);
      shifts[static_cast<size_t>(i)] = bias ? bias[i] : 0.0f;
    }
    scale = repeated(shape, scales.data());
    shift = repeated(shape, shifts.data());
  }

  // out: `before`, if there is one, plus the `count` values of x normalised; all begin a row.
  inline __attribute__((always_inline)) void row(int64_t count, const float* x,
                                                 const float* before, float* out) const {
    const float *const mp = mean.data(), *const sp = scale.data(), *const bp = shift.data();
    if (before != nullptr) {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = before[i] + normalized(x[i], mp[i], sp[i], bp[i]);
    } else {
#pragma GCC ivdep
      for (int64_t i = 0; i < count; ++i) out[i] = normalized(x[i], mp[i], sp[i], bp[i]);
    }
  }

  void run(const Shape& shape, const float* x, float* y) const {
    for_all_rows(shape, [=](int64_t at, int64_t n) FB_INLINE_LAMBDA {
      row(n, x + at, nullptr, y + at);
    });
  }
};

// What gives grad_x, see norm_gradient. Each written out `repeat` times.
struct BackwardNorm {
  std::vector<float> mean, scale, shift, slope;

  // sums: of grad and of grad (x - mean). Writes the gradients of weight and bias [channels].
  BackwardNorm(const Shape& shape, const std::vector<double>& sums, const float* means,
               const float* inverses, const float* weight, float* by_weight, float* by_bias)
      : mean(repeated(shape, means)) {
    const int64_t c = shape.channels;
    std::vector<float> scales(static_cast<size_t>(c)), shifts(static_cast<size_t>(c)),
        slopes(static_cast<size_t>(c));
    const double count = static_cast<double>(shape.pixels);
    for (int64_t i = 0; i < c; ++i) {
      const size_t at = static_cast<size_t>(i);
      by_bias[i] = static_cast<float>(sums[at]);
      norm_slopes(sums[at], sums[static_cast<size_t>(c + i)], static_cast<double>(inverses[i]),
                  weight ? static_cast<double>(weight[i]) : 1.0, count, by_weight[i], scales[at],
                  shifts[at], slopes[at]);
    }
    scale = repeated(shape, scales.data());
    shift = repeated(shape, shifts.data());
    slope = repeated(shape, slopes.data());
  }

  // The `count` values from `at` on, which begin a row.
  inline __attribute__((always_inline)) void row(int64_t at, int64_t count, const float* grad,
                                                 const float* x, float* out) const {
    const float *const ap = scale.data(), *const bp = shift.data(), *const kp = slope.data(),
                *const mp = mean.data();
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i)
      out[i] = norm_gradient(grad[at + i], x[at + i], mp[i], ap[i], bp[i], kp[i]);
  }
};

inline void check_channels(const char* op, const char* name, const std::optional<Tensor>& tensor,
                    const Tensor& x) {
  if (!tensor) return;
  check_dtype(op, name, *tensor, ScalarType::Float);
  FB_CHECK(tensor->dim() == 1 && tensor->size(0) == x.size(1) && tensor->stride(0) == 1, op, name,
           ": expected one value for each of ", x.size(1), " channels, got shape ",
           shape_text(*tensor));
}

inline Shape check_input(const char* op, const char* name, const Tensor& x) {
  check_dtype(op, name, x, ScalarType::Float);
  FB_CHECK(x.dim() == 4 && x.size(1) > 0 && is_dense_channels_last(x), op, name,
           ": expected a dense channels-last tensor [N, C, H, W], got shape ", shape_text(x));
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  FB_CHECK(pixels > 1, op, name, ": expected more than one value for each channel, got shape ",
           shape_text(x));
  return Shape(x.size(1), pixels);
}

inline const float* floats(const Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? floats(*tensor) : nullptr;
}
inline float* floats_to_write(const Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}

}  // namespace fastbandit::norm
