// fastbandit::norm_sum and its backward on the CPU: float32, channels-last.
//
// Each term is read once for its statistics, unless they are given, and once for the sum, which is
// written once. Backward, the terms share the gradient: a block of it stays in the cache while the
// sums of all terms over it are taken, and so does a row while their gradients are written. Sums and
// their order are those of batch_norm, so its bits are too.
#include "cpu/norm.h"

namespace fastbandit {
namespace {

using namespace norm;

// Sizes that all terms have; they were checked to be alike.
Shape check_terms(const char* op, const std::vector<Tensor>& xs, bool normalized) {
  for (const Tensor& x : xs) {
    check_dtype(op, "xs", x, ScalarType::Float);
    FB_CHECK(is_dense_channels_last(x), op,
             "xs: expected dense channels-last tensors [N, C, H, W], got shape ", shape_text(x));
  }
  const int64_t pixels = xs[0].size(0) * xs[0].size(2) * xs[0].size(3);
  FB_CHECK(!normalized || pixels > 1, op,
           "xs: expected more than one value for each channel, got shape ", shape_text(xs[0]));
  return Shape(xs[0].size(1), pixels);
}

Tensor like_first(const std::vector<Tensor>& xs) { return empty_like(xs[0], ScalarType::Float); }

Tensor rows_of_channels(const Tensor& x, int64_t rows) {
  const int64_t sizes[2] = {rows, x.size(1)};
  return empty_contiguous(x, sizes, 2, ScalarType::Float);
}

// The sum; then of the normalised terms, [terms, C] each: mean, inverse deviation, unbiased variance.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_sum(std::vector<Tensor> xs,
                                                    std::vector<int64_t> kinds,
                                                    std::vector<Tensor> vectors, double eps) {
  constexpr const char* kOp = "norm_sum";
  const auto terms = norm_terms(kOp, xs, kinds, vectors);
  const int64_t count = normalized_terms(terms);
  const Shape shape = check_terms(kOp, xs, count > 0);
  const int64_t c = shape.channels;
  Tensor y = like_first(xs), mean = rows_of_channels(xs[0], count),
         inverse = rows_of_channels(xs[0], count), variance = rows_of_channels(xs[0], count);
  float *means = floats_to_write(mean), *inverses = floats_to_write(inverse),
        *variances = floats_to_write(variance);
  std::vector<std::optional<ForwardNorm>> transforms(terms.size());
  std::vector<const float*> sources;
  for (size_t t = 0; t < terms.size(); ++t) {
    const NormTerm& term = terms[t];
    const float* const x = floats(xs[t]);
    sources.push_back(x);
    if (!term.normalized) continue;
    if (term.mean) {
      std::copy_n(floats(term.mean), c, means);
      std::copy_n(floats(term.inverse), c, inverses);
      for (int64_t i = 0; i < c; ++i)
        variances[i] = unbiased_variance<float>(
            variance_of(static_cast<double>(inverses[i]), eps), static_cast<double>(shape.pixels));
    } else {
      // About the first value: a mean that is large beside the deviation costs no digits.
      const std::vector<float> centre = repeated(shape, x);
      statistics(shape, channel_sums<false>(shape, {x, centre.data(), nullptr}), centre.data(), eps,
                 means, inverses, variances);
    }
    transforms[t].emplace(shape, means, inverses, floats(term.weight), floats(term.bias));
    means += c, inverses += c, variances += c;
  }
  float* const to = floats_to_write(y);
  for_all_rows(shape, [&](int64_t at, int64_t n) FB_INLINE_LAMBDA {
    float* const out = to + at;
    for (size_t t = 0; t < sources.size(); ++t) {
      const float* const x = sources[t] + at;
      if (transforms[t]) {
        transforms[t]->row(n, x, t > 0 ? out : nullptr, out);
      } else if (t == 0) {
        std::copy_n(x, n, out);
      } else {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) out[i] += x[i];
      }
    }
  });
  return {y, mean, inverse, variance};
}

// The gradient of each of xs, which are the normalised terms; then those of their weights [terms, C]
// and of their biases, which is one for all [C].
std::vector<Tensor> norm_sum_backward(Tensor grad, std::vector<Tensor> xs,
                                      std::vector<int64_t> kinds, std::vector<Tensor> vectors,
                                      Tensor mean, Tensor inverse) {
  constexpr const char* kOp = "norm_sum_backward";
  for (Tensor& x : xs) x = dense_channels_last(kOp, "xs", x);
  const auto terms = norm_terms(kOp, xs, kinds, vectors);
  const Shape shape = check_terms(kOp, xs, true);
  check_norm_statistics(kOp, "mean", mean, terms, xs[0]);
  check_norm_statistics(kOp, "inverse", inverse, terms, xs[0]);
  check_dtype(kOp, "grad", grad, ScalarType::Float);
  check_same_shape(kOp, "grad", grad, "xs", xs[0]);
  const Tensor dense = dense_channels_last(grad, [&] { return like_first(xs); });
  const float* const g = floats(dense);
  const int64_t c = shape.channels, count = static_cast<int64_t>(terms.size());

  std::vector<std::vector<float>> middles;
  std::vector<std::vector<double>> parts;
  for (int64_t t = 0; t < count; ++t) {
    middles.push_back(repeated(shape, floats(mean) + t * c));
    parts.emplace_back(static_cast<size_t>(2 * c * shape.blocks));
  }
  parallel(shape.blocks, 4, [&](int64_t from, int64_t to) {
    std::vector<float> sums(static_cast<size_t>(2 * shape.width));
    for (int64_t block = from; block < to; ++block)
      for (size_t t = 0; t < xs.size(); ++t)
        block_sums<true>(shape, {floats(xs[t]), middles[t].data(), g}, block, sums.data(),
                         parts[t].data() + 2 * c * block);
  });

  Tensor by_weight = rows_of_channels(xs[0], count);
  Tensor by_bias = empty_contiguous(xs[0], &c, 1, ScalarType::Float);
  std::vector<BackwardNorm> transforms;
  std::vector<Tensor> results;
  std::vector<std::pair<const float*, float*>> maps;
  for (int64_t t = 0; t < count; ++t) {
    const size_t at = static_cast<size_t>(t);
    transforms.emplace_back(shape, total_of(shape, parts[at]), floats(mean) + t * c,
                            floats(inverse) + t * c, floats(terms[at].weight),
                            floats_to_write(by_weight) + t * c, floats_to_write(by_bias));
    results.push_back(like_first(xs));
    maps.emplace_back(floats(xs[at]), floats_to_write(results.back()));
  }
  for_all_rows(shape, [&](int64_t at, int64_t n) FB_INLINE_LAMBDA {
    for (size_t t = 0; t < maps.size(); ++t)
      transforms[t].row(at, n, g, maps[t].first, maps[t].second + at);
  });
  results.push_back(by_weight);
  results.push_back(by_bias);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CPU, library) {
  library.impl("norm_sum", TORCH_BOX(&norm_sum));
  library.impl("norm_sum_backward", TORCH_BOX(&norm_sum_backward));
}

}  // namespace fastbandit
