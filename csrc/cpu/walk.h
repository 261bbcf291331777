// Threads and memory order for elementwise CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "check.h"
#include "layout.h"

namespace fastbandit {

// Elements below which a second thread costs more than it brings (torch's own figure).
constexpr int64_t kGrain = 32768;

// f(begin, end) on torch's threads; directly, without the pool, when the range is small.
template <class F>
inline void parallel(int64_t total, int64_t grain, const F& f) {
  if (total <= 0) return;
  if (total <= grain) {
    f(int64_t{0}, total);
  } else {
    torch::stable::parallel_for(0, total, grain, f);
  }
}

// Strides of every tensor, merged; an error when more dimensions remain than kMaxDims.
template <class... Tensors>
inline auto merged_layout(const char* op, const Tensor& first, const Tensors&... rest) {
  constexpr int kTensors = 1 + sizeof...(rest);
  const int64_t* strides[kTensors] = {first.strides().data(), rest.strides().data()...};
  const auto layout = merge_dims<kTensors>(first.dim(), first.sizes().data(), strides);
  FB_CHECK(layout.fits, op, "more than ", kMaxDims, " dimensions with unrelated strides");
  return layout;
}

// Calls run(offsets, count) for the elements [begin, end) of the layout's order, one call for each
// stretch of the innermost dimension; offsets[t] is the element where tensor t's stretch begins.
template <int kTensors, class Run>
inline __attribute__((always_inline)) void for_each_run(const Layout<kTensors>& layout,
                                                        int64_t begin, int64_t end,
                                                        const Run& run) {
  const int inner = layout.dims - 1;
  int64_t index[kMaxDims];
  int64_t offset[kTensors];
  int64_t rest = begin;
  for (int t = 0; t < kTensors; ++t) offset[t] = 0;
  for (int d = inner; d >= 0; --d) {
    index[d] = rest % layout.size[d];
    rest /= layout.size[d];
    for (int t = 0; t < kTensors; ++t) offset[t] += index[d] * layout.stride[t][d];
  }
  for (int64_t at = begin; at < end;) {
    const int64_t count = std::min(layout.size[inner] - index[inner], end - at);
    run(offset, count);
    at += count;
    index[inner] += count;
    for (int t = 0; t < kTensors; ++t) offset[t] += count * layout.stride[t][inner];
    for (int d = inner; d > 0 && index[d] == layout.size[d]; --d) {
      index[d] = 0;
      ++index[d - 1];
      for (int t = 0; t < kTensors; ++t)
        offset[t] += layout.stride[t][d - 1] - layout.size[d] * layout.stride[t][d];
    }
  }
}

}  // namespace fastbandit
