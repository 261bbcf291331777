// The terms of fastbandit::norm_sum as both devices see them.
#pragma once

#include <optional>

#include "check.h"

namespace fastbandit {

inline bool is_dense_channels_last(const Tensor& x) {
  const int64_t strides[4] = {x.size(1) * x.size(2) * x.size(3), 1, x.size(1) * x.size(3),
                              x.size(1)};
  for (int d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != strides[d]) return false;
  return true;
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

// What is done to a term before it is added; the bits of `kinds`, as in fastbandit/ops/norm_sum.py.
enum NormKind : int64_t {
  kNormalized = 1,  // batch norm; the three below only with it
  kWeight = 2,      // times weight
  kBias = 4,        // plus bias
  kGiven = 8,       // mean and inverse deviation of the batch are known
};

struct NormTerm {
  bool normalized = false;
  std::optional<Tensor> weight, bias, mean, inverse;
};

// The dtype of statistics, weights and biases beside maps of this one.
inline ScalarType norm_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The terms that `kinds` describes, with their vectors [C], which `vectors` has in their order.
inline std::vector<NormTerm> norm_terms(const char* op, const std::vector<Tensor>& xs,
                                        const std::vector<int64_t>& kinds,
                                        const std::vector<Tensor>& vectors) {
  FB_CHECK(!xs.empty(), op, "xs: expected at least one tensor, got none");
  FB_CHECK(kinds.size() == xs.size(), op, "kinds: expected one for each of ", xs.size(),
           " tensors, got ", kinds.size());
  for (const Tensor& x : xs) {
    FB_CHECK(x.dim() == 4 && x.size(1) > 0, op, "xs: expected shape [N, C, H, W], got ",
             shape_text(x));
    check_same_shape(op, "xs", x, "the first", xs[0]);
    check_dtype(op, "xs", x, xs[0].scalar_type());
    check_same_device(op, "xs", x, "the first", xs[0]);
  }
  const int64_t channels = xs[0].size(1);
  size_t used = 0;
  const auto next = [&](bool wanted) {
    std::optional<Tensor> vector;
    if (!wanted) return vector;
    FB_CHECK(used < vectors.size(), op, "vectors: expected more than ", vectors.size());
    vector = vectors[used++];
    check_dtype(op, "vectors", *vector, norm_dtype(xs[0].scalar_type()));
    check_same_device(op, "vectors", *vector, "xs", xs[0]);
    FB_CHECK(vector->dim() == 1 && vector->size(0) == channels &&
                 (channels == 1 || vector->stride(0) == 1),
             op, "vectors: expected one value for each of ", channels, " channels, got shape ",
             shape_text(*vector));
    return vector;
  };
  std::vector<NormTerm> terms;
  for (const int64_t kind : kinds) {
    FB_CHECK(kind >= 0 && kind < 16 && (kind == 0 || (kind & kNormalized)), op,
             "kinds: expected 0, or 1 and any of 2, 4 and 8, got ", kind);
    NormTerm term;
    term.normalized = kind & kNormalized;
    term.weight = next(kind & kWeight);
    term.bias = next(kind & kBias);
    term.mean = next(kind & kGiven);
    term.inverse = next(kind & kGiven);
    terms.push_back(std::move(term));
  }
  FB_CHECK(used == vectors.size(), op, "vectors: expected ", used, ", got ", vectors.size());
  return terms;
}

inline int64_t normalized_terms(const std::vector<NormTerm>& terms) {
  int64_t count = 0;
  for (const NormTerm& term : terms) count += term.normalized;
  return count;
}

// mean and inverse of norm_sum_backward: [terms, C], of terms that are all normalised.
inline void check_norm_statistics(const char* op, const char* name, const Tensor& tensor,
                                  const std::vector<NormTerm>& terms, const Tensor& x) {
  FB_CHECK(normalized_terms(terms) == static_cast<int64_t>(terms.size()), op,
           "kinds: expected normalised terms only");
  check_dtype(op, name, tensor, norm_dtype(x.scalar_type()));
  check_same_device(op, name, tensor, "xs", x);
  const int64_t count = static_cast<int64_t>(terms.size()), c = x.size(1);
  FB_CHECK(tensor.dim() == 2 && tensor.size(0) == count && tensor.size(1) == c &&
               (c == 1 || tensor.stride(1) == 1) && (count == 1 || tensor.stride(0) == c),
           op, name, ": expected a contiguous tensor [", count, ", ", c, "], got shape ",
           shape_text(tensor));
}

}  // namespace fastbandit
