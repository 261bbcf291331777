// Batch normalisation of float32 in channels-last, in the pieces that ops are made of.
#pragma once

#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/walk.h"

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

template <class Row>
void for_all_rows(const Shape& shape, const Row& row) {
  parallel(shape.blocks, 4, [&](int64_t from, int64_t to) {
    with_isa(FB_BODY { for_rows(shape, shape.begin(from), shape.end(to - 1), row); });
  });
}

// What normalises: y = (x - mean) * scale + shift. Each written out `repeat` times.
struct ForwardNorm {
  std::vector<float> mean, scale, shift;

  // sums: of x - middle and of its square. Writes mean and inverse deviation [channels].
  ForwardNorm(const Shape& shape, const std::vector<double>& sums, const float* middle,
              const float* weight, const float* bias, double eps, float* means, float* inverses) {
    const int64_t c = shape.channels;
    const double count = static_cast<double>(shape.pixels);
    std::vector<float> scales(static_cast<size_t>(c)), shifts(static_cast<size_t>(c));
    for (int64_t i = 0; i < c; ++i) {
      const double offset = sums[static_cast<size_t>(i)] / count;
      double variance = sums[static_cast<size_t>(c + i)] / count - offset * offset;
      if (variance < 0.0) variance = 0.0;  // rounding; NaN stays what it is
      means[i] = static_cast<float>(static_cast<double>(middle[i]) + offset);
      inverses[i] = static_cast<float>(1.0 / std::sqrt(variance + eps));
      scales[static_cast<size_t>(i)] = inverses[i] * (weight ? weight[i] : 1.0f);
      shifts[static_cast<size_t>(i)] = bias ? bias[i] : 0.0f;
    }
    mean = repeated(shape, means);
    scale = repeated(shape, scales.data());
    shift = repeated(shape, shifts.data());
  }

  void run(const Shape& shape, const float* x, float* y) const {
    const float *const mp = mean.data(), *const sp = scale.data(), *const bp = shift.data();
    for_all_rows(shape, [=](int64_t at, int64_t n) FB_INLINE_LAMBDA {
#pragma GCC ivdep
      for (int64_t i = 0; i < n; ++i) y[at + i] = (x[at + i] - mp[i]) * sp[i] + bp[i];
    });
  }
};

// grad_x = scale (grad - mean(grad) - (x - mean) inverse^2 mean(grad (x - mean)))
//        = grad * scale - shift - (x - mean) * slope. Each written out `repeat` times.
struct BackwardNorm {
  std::vector<float> mean, scale, shift, slope;

  // Sums over grad and x; writes the gradients of weight and bias [channels].
  BackwardNorm(const Shape& shape, const float* grad, const float* x, const float* means,
               const float* inverses, const float* weight, float* by_weight, float* by_bias)
      : mean(repeated(shape, means)) {
    const int64_t c = shape.channels;
    const auto sums = channel_sums<true>(shape, {x, mean.data(), grad});
    std::vector<float> scales(static_cast<size_t>(c)), shifts(static_cast<size_t>(c)),
        slopes(static_cast<size_t>(c));
    const double count = static_cast<double>(shape.pixels);
    for (int64_t i = 0; i < c; ++i) {
      const size_t at = static_cast<size_t>(i);
      const double inverse = static_cast<double>(inverses[i]);
      const double factor = inverse * (weight ? static_cast<double>(weight[i]) : 1.0);
      const double product = sums[static_cast<size_t>(c + i)];
      by_bias[i] = static_cast<float>(sums[at]);
      by_weight[i] = static_cast<float>(product * inverse);
      scales[at] = static_cast<float>(factor);
      shifts[at] = static_cast<float>(factor * sums[at] / count);
      slopes[at] = static_cast<float>(factor * inverse * inverse * product / count);
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
      out[i] = grad[at + i] * ap[i] - bp[i] - (x[at + i] - mp[i]) * kp[i];
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

inline bool is_dense_channels_last(const Tensor& x) {
  const int64_t strides[4] = {x.size(1) * x.size(2) * x.size(3), 1, x.size(1) * x.size(3),
                              x.size(1)};
  for (int d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != strides[d]) return false;
  return true;
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

// `tensor`, or where it lies in another layout (the gradient of a sum or a mean is expanded) a copy
// of it in `make()`.
//
// What autograd saved may come back in another layout too: hooks on saved tensors may write them to
// a file, or compress them.
template <class Make>
inline Tensor dense_channels_last(const Tensor& tensor, const Make& make) {
  if (is_dense_channels_last(tensor)) return tensor;
  Tensor copy = make();
  torch::stable::copy_(copy, tensor);
  return copy;
}

inline Tensor dense_channels_last(const char* op, const char* name, const Tensor& tensor) {
  FB_CHECK(tensor.dim() == 4, op, name, ": expected shape [N, C, H, W], got ", shape_text(tensor));
  return dense_channels_last(tensor, [&] {
    const int64_t c = tensor.size(1), h = tensor.size(2), w = tensor.size(3);
    const int64_t sizes[4] = {tensor.size(0), c, h, w}, strides[4] = {h * w * c, 1, w * c, c};
    return empty_strided(tensor, sizes, strides, 4, tensor.scalar_type());
  });
}

}  // namespace fastbandit::norm
