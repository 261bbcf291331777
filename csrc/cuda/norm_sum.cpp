// fastbandit::norm_sum and its backward on CUDA: checks, allocation, device, stream.
#include "cuda/norm_sum.h"

#include "cuda/glue.h"
#include "norm_checks.h"

namespace fastbandit {
namespace {

// Pixels of the terms, which are dense in channels-last.
int64_t check_terms(const char* op, const std::vector<Tensor>& xs, bool normalized) {
  check_floating(op, "xs", xs[0]);
  FB_CHECK(xs.size() <= kMostNormTerms, op, "xs: expected at most ", kMostNormTerms,
           " tensors, got ", xs.size());
  for (const Tensor& x : xs)
    FB_CHECK(is_dense_channels_last(x), op,
             "xs: expected dense channels-last tensors [N, C, H, W], got shape ", shape_text(x));
  const int64_t pixels = xs[0].size(0) * xs[0].size(2) * xs[0].size(3);
  FB_CHECK(!normalized || pixels > 1, op,
           "xs: expected more than one value for each channel, got shape ", shape_text(xs[0]));
  return pixels;
}

Tensor rows_of_channels(const Tensor& x, int64_t rows) {
  const int64_t sizes[2] = {rows, x.size(1)};
  return empty_contiguous(x, sizes, 2, norm_dtype(x.scalar_type()));
}

Tensor scratch(const Tensor& x, int64_t pixels, int64_t terms) {
  const int64_t numbers = norm_sum_partial_numbers(pixels, x.size(1), terms);
  return empty_contiguous(x, &numbers, 1, norm_dtype(x.scalar_type()));
}

const void* pointer_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

std::vector<const void*> pointers_of(const std::vector<Tensor>& tensors) {
  std::vector<const void*> pointers;
  for (const Tensor& tensor : tensors) pointers.push_back(tensor.const_data_ptr());
  return pointers;
}

// The sum; then of the normalised terms, [terms, C] each: mean, inverse deviation, unbiased variance.
std::tuple<Tensor, Tensor, Tensor, Tensor> norm_sum(std::vector<Tensor> xs,
                                                    std::vector<int64_t> kinds,
                                                    std::vector<Tensor> vectors, double eps) {
  constexpr const char* kOp = "norm_sum";
  const auto terms = norm_terms(kOp, xs, kinds, vectors);
  const int64_t normalized = normalized_terms(terms);
  const int64_t pixels = check_terms(kOp, xs, normalized > 0);
  const DeviceGuard guard(xs[0].get_device_index());
  Tensor y = empty_like(xs[0], xs[0].scalar_type()), mean = rows_of_channels(xs[0], normalized),
         inverse = rows_of_channels(xs[0], normalized),
         variance = rows_of_channels(xs[0], normalized);
  if (pixels == 0) return {y, mean, inverse, variance};
  std::vector<const void*> given;
  for (const NormTerm& term : terms)
    for (const auto* vector : {&term.weight, &term.bias, &term.mean, &term.inverse})
      given.push_back(pointer_of(*vector));
  const int64_t count = static_cast<int64_t>(terms.size());
  Tensor partial = scratch(xs[0], pixels, count);
  check_launch(kOp, launch_norm_sum(pointers_of(xs).data(), kinds.data(), given.data(), count,
                                    y.mutable_data_ptr(), mean.mutable_data_ptr(),
                                    inverse.mutable_data_ptr(), variance.mutable_data_ptr(),
                                    partial.mutable_data_ptr(), dtype_code(kOp, y), pixels,
                                    y.size(1), eps, current_stream(y)));
  return {y, mean, inverse, variance};
}

// The gradient of each of xs, which are the normalised terms; then those of their weights [terms, C]
// and of their biases, which is one for all [C].
std::vector<Tensor> norm_sum_backward(Tensor grad, std::vector<Tensor> xs,
                                      std::vector<int64_t> kinds, std::vector<Tensor> vectors,
                                      Tensor mean, Tensor inverse) {
  constexpr const char* kOp = "norm_sum_backward";
  FB_CHECK(!xs.empty(), kOp, "xs: expected at least one tensor, got none");
  const DeviceGuard guard(xs[0].get_device_index());
  for (Tensor& x : xs) x = dense_channels_last(kOp, "xs", x);
  const auto terms = norm_terms(kOp, xs, kinds, vectors);
  const int64_t pixels = check_terms(kOp, xs, true);
  check_norm_statistics(kOp, "mean", mean, terms, xs[0]);
  check_norm_statistics(kOp, "inverse", inverse, terms, xs[0]);
  check_dtype(kOp, "grad", grad, xs[0].scalar_type());
  check_same_shape(kOp, "grad", grad, "xs", xs[0]);
  check_same_device(kOp, "grad", grad, "xs", xs[0]);
  const Tensor dense =
      dense_channels_last(grad, [&] { return empty_like(xs[0], xs[0].scalar_type()); });
  const int64_t count = static_cast<int64_t>(terms.size()), c = xs[0].size(1);
  std::vector<const void*> weights;
  std::vector<Tensor> results;
  std::vector<void*> by_x;
  for (const NormTerm& term : terms) {
    weights.push_back(pointer_of(term.weight));
    results.push_back(empty_like(xs[0], xs[0].scalar_type()));
    by_x.push_back(results.back().mutable_data_ptr());
  }
  Tensor by_weight = rows_of_channels(xs[0], count);
  Tensor by_bias = empty_contiguous(xs[0], &c, 1, norm_dtype(xs[0].scalar_type()));
  Tensor partial = scratch(xs[0], pixels, count);
  check_launch(kOp, launch_norm_sum_backward(
                        dense.const_data_ptr(), pointers_of(xs).data(), weights.data(), count,
                        mean.const_data_ptr(), inverse.const_data_ptr(), by_x.data(),
                        by_weight.mutable_data_ptr(), by_bias.mutable_data_ptr(),
                        partial.mutable_data_ptr(), dtype_code(kOp, dense), pixels, c,
                        current_stream(dense)));
  results.push_back(by_weight);
  results.push_back(by_bias);
  return results;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastbandit, CUDA, library) {
  library.impl("norm_sum", TORCH_BOX(&norm_sum));
  library.impl("norm_sum_backward", TORCH_BOX(&norm_sum_backward));
}

}  // namespace fastbandit
