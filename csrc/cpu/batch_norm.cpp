// fastbandit::batch_norm and its backward on the CPU: float32, channels-last.
#include <cmath>
#include <cstring>

#include "cpu/isa.h"
#include "cpu/walk.h"

namespace fastbandit {
namespace {

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
std::vector<float> repeated(const Shape& shape, const float* values) {
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

// The two sums of each channel over all pixels. In blocks, so that neither the threads nor their
// number decide the rounding.
template <bool kGrad>
std::vector<double> channel_sums(const Shape& shape, const Terms& terms) {
  const int64_t c = shape.channels, width = shape.width;
  std::vector<double> parts(static_cast<size_t>(2 * c * shape.blocks));
  parallel(shape.blocks, 4, [&](int64_t from, int64_t to) {
    std::vector<float> sums(static_cast<size_t>(2 * width));
    float* const first = sums.data();
    float* const second = first + width;
    for (int64_t block = from; block < to; ++block) {
      std::fill(sums.begin(), sums.end(), 0.0f);
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
      double* const part = parts.data() + 2 * c * block;
      for (int64_t i = 0; i < width; ++i) {
        part[i % c] += static_cast<double>(first[i]);
        part[c + i % c] += static_cast<double>(second[i]);
      }
    }
  });
  std::vector<double> total(parts.begin(), parts.begin() + 2 * c);
  for (int64_t block = 1; block < shape.blocks; ++block)
    for (int64_t i = 0; i < 2 * c; ++i)
      total[static_cast<size_t>(i)] += parts[static_cast<size_t>(2 * c * block + i)];
  return total;
}

template <class Row>
void for_all_rows(const Shape& shape, const Row& row) {
  parallel(shape.blocks, 4, [&](int64_t from, int64_t to) {
    with_isa(FB_BODY { for_rows(shape, shape.begin(from), shape.end(to - 1), row); });
  });
}

void check_channels(const char* op, const char* name, const std::optional<Tensor>& tensor,
                    const Tensor& x) {
  if (!tensor) return;
  check_dtype(op, name, *tensor, ScalarType::Float);
  FB_CHECK(tensor->dim() == 1 && tensor->size(0) == x.size(1) && tensor->stride(0) == 1, op, name,
           ": expected one value for each of ", x.size(1), " channels, got shape ",
           shape_text(*tensor));
}

bool is_dense_channels_last(const Tensor& x) {
  const int64_t strides[4] = {x.size(1) * x.size(2) * x.size(3), 1, x.size(1) * x.size(3),
                              x.size(1)};
  for (int d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != strides[d]) return false;
  return true;
}

Shape check_input(const char* op, const char* name, const Tensor& x) {
  check_dtype(op, name, x, ScalarType::Float);
  FB_CHECK(x.dim() == 4 && x.size(1) > 0 && is_dense_channels_last(x), op, name,
           ": expected a dense channels-last tensor [N, C, H, W], got shape ", shape_text(x));
  const int64_t pixels = x.size(0) * x.size(2) * x.size(3);
  FB_CHECK(pixels > 1, op, name, ": expected more than one value for each channel, got shape ",
           shape_text(x));
  return Shape(x.size(1), pixels);
}

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> batch_norm(Tensor x, std::optional<Tensor> weight,
                                              std::optional<Tensor> bias, double eps) {
  constexpr const char* kOp = "batch_norm";
  const Shape shape = check_input(kOp, "x", x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "bias", bias, x);
  const int64_t c = shape.channels;
  Tensor y = empty_like(x, ScalarType::Float);
  Tensor mean = empty_contiguous(x, &c, 1, ScalarType::Float);
  Tensor inverse = empty_contiguous(x, &c, 1, ScalarType::Float);
  const float* const data = static_cast<const float*>(x.const_data_ptr());
  // About the first value: a mean that is large beside the deviation costs no digits.
  const std::vector<float> centre = repeated(shape, data);
  const float* const middle = centre.data();
  const auto sums = channel_sums<false>(shape, {data, middle, nullptr});
  std::vector<float> scales(static_cast<size_t>(c)), shifts(static_cast<size_t>(c));
  float* const means = static_cast<float*>(mean.mutable_data_ptr());
  float* const inverses = static_cast<float*>(inverse.mutable_data_ptr());
  const double count = static_cast<double>(shape.pixels);
  for (int64_t i = 0; i < c; ++i) {
    const double offset = sums[static_cast<size_t>(i)] / count;
    double variance = sums[static_cast<size_t>(c + i)] / count - offset * offset;
    if (variance < 0.0) variance = 0.0;  // rounding; NaN stays what it is
    means[i] = static_cast<float>(static_cast<double>(middle[i]) + offset);
    inverses[i] = static_cast<float>(1.0 / std::sqrt(variance + eps));
    scales[static_cast<size_t>(i)] = inverses[i] * (weight ? floats(weight)[i] : 1.0f);
    shifts[static_cast<size_t>(i)] = bias ? floats(bias)[i] : 0.0f;
  }
  const auto m = repeated(shape, means), s = repeated(shape, scales.data()),
             b = repeated(shape, shifts.data());
  const float *const mp = m.data(), *const sp = s.data(), *const bp = b.data();
  float* const out = static_cast<float*>(y.mutable_data_ptr());
  for_all_rows(shape, [=](int64_t at, int64_t n) FB_INLINE_LAMBDA {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) out[at + i] = (data[at + i] - mp[i]) * sp[i] + bp[i];
  });
  return {y, mean, inverse};
}

std::tuple<Tensor, Tensor, Tensor> batch_norm_backward(Tensor grad, Tensor x,
                                                       std::optional<Tensor> weight, Tensor mean,
                                                       Tensor inverse, double) {
  constexpr const char* kOp = "batch_norm_backward";
  const Shape shape = check_input(kOp, "x", x);
  check_dtype(kOp, "grad", grad, ScalarType::Float);
  check_same_shape(kOp, "grad", grad, "x", x);
  check_channels(kOp, "weight", weight, x);
  check_channels(kOp, "mean", mean, x);
  check_channels(kOp, "inverse", inverse, x);
  const int64_t c = shape.channels;
  Tensor grad_x = empty_like(x, ScalarType::Float);
  Tensor grad_weight = empty_contiguous(x, &c, 1, ScalarType::Float);
  Tensor grad_bias = empty_contiguous(x, &c, 1, ScalarType::Float);
  // A gradient in another layout (that of a sum or a mean, expanded) is first written out.
  Tensor g = grad;
  if (!is_dense_channels_last(grad)) {
    g = empty_like(x, ScalarType::Float);
    torch::stable::copy_(g, grad);
  }
  const float* const data = static_cast<const float*>(x.const_data_ptr());
  const float* const gradient = static_cast<const float*>(g.const_data_ptr());
  const float* const inverses = static_cast<const float*>(inverse.const_data_ptr());
  const auto m = repeated(shape, static_cast<const float*>(mean.const_data_ptr()));
  const float* const mp = m.data();
  const auto sums = channel_sums<true>(shape, {data, mp, gradient});
  // grad_x = scale (grad - mean(grad) - (x - mean) inverse^2 mean(grad (x - mean)))
  std::vector<float> scale(static_cast<size_t>(c)), shift(static_cast<size_t>(c)),
      slope(static_cast<size_t>(c));
  float* const by_weight = static_cast<float*>(grad_weight.mutable_data_ptr());
  float* const by_bias = static_cast<float*>(grad_bias.mutable_data_ptr());
  const double count = static_cast<double>(shape.pixels);
  for (int64_t i = 0; i < c; ++i) {
    const size_t at = static_cast<size_t>(i);
    const double factor =
        static_cast<double>(inverses[i]) * (weight ? static_cast<double>(floats(weight)[i]) : 1.0);
    const double square = static_cast<double>(inverses[i]) * static_cast<double>(inverses[i]);
    const double product = sums[static_cast<size_t>(c + i)];
    by_bias[i] = static_cast<float>(sums[at]);
    by_weight[i] = static_cast<float>(product * static_cast<double>(inverses[i]));
    scale[at] = static_cast<float>(factor);
    shift[at] = static_cast<float>(factor * sums[at] / count);
    slope[at] = static_cast<float>(factor * square * product / count);
  }
  const auto a = repeated(shape, scale.data()), b = repeated(shape, shift.data()),
             k = repeated(shape, slope.data());
  const float *const ap = a.data(), *const bp = b.data(), *const kp = k.data();
  float* const out = static_cast<float*>(grad_x.mutable_data_ptr());
  for_all_rows(shape, [=](int64_t at, int64_t n) FB_INLINE_LAMBDA {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i)
      out[at + i] = gradient[at + i] * ap[i] - bp[i] - (data[at + i] - mp[i]) * kp[i];
  });
  return {grad_x, grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("batch_norm", TORCH_BOX(&batch_norm));
  library.impl("batch_norm_backward", TORCH_BOX(&batch_norm_backward));
}

}  // namespace fastbandit
