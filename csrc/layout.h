// How to walk tensors of one shape and any strides at once: dimensions that lie in memory as one
// are merged, in the order of the first tensor's strides. Dense tensors of equal strides, whatever
// the permutation (channels-last too), become a single flat run. No torch header.
#pragma once

#include <cstdint>

#include "math/portable.h"

namespace fastbandit {

constexpr int kMaxDims = 8;  // after merging; more distinct strides than this do not occur

template <int kTensors>
struct Layout {
  int dims = 0;  // 0: no element at all
  int64_t numel = 0;
  int64_t size[kMaxDims] = {};               // outermost first
  int64_t stride[kTensors][kMaxDims] = {};   // in elements
  bool fits = true;                          // false: more than kMaxDims dimensions remained

  // One run with stride 1 in every tensor.
  bool flat() const {
    if (dims != 1) return false;
    for (int t = 0; t < kTensors; ++t)
      if (stride[t][0] != 1) return false;
    return true;
  }

  // The innermost run has stride 1 in every tensor.
  bool unit_inner() const {
    for (int t = 0; t < kTensors; ++t)
      if (stride[t][dims - 1] != 1) return false;
    return true;
  }
};

// Where element `index` of the layout's order lies in each tensor.
template <int kTensors>
FB_HOST_DEVICE void layout_offsets(const Layout<kTensors>& layout, int64_t index,
                                   int64_t (&offset)[kTensors]) {
  for (int t = 0; t < kTensors; ++t) offset[t] = 0;
  for (int d = layout.dims - 1; d > 0; --d) {
    const int64_t rest = index / layout.size[d];
    const int64_t position = index - rest * layout.size[d];
    for (int t = 0; t < kTensors; ++t) offset[t] += position * layout.stride[t][d];
    index = rest;
  }
  for (int t = 0; t < kTensors; ++t) offset[t] += index * layout.stride[t][0];
}

// The layout of tensors with these strides, strides[t][d].
template <int kTensors>
inline Layout<kTensors> merge_dims(int64_t dims, const int64_t* sizes,
                                   const int64_t* const (&strides)[kTensors]) {
  Layout<kTensors> layout;
  layout.numel = 1;
  int order[64];
  int count = 0;
  for (int64_t d = 0; d < dims && d < 64; ++d) {
    layout.numel *= sizes[d];
    if (sizes[d] != 1) order[count++] = static_cast<int>(d);
  }
  if (layout.numel == 0) return layout;
  // Insertion sort, largest stride first; equal strides keep their order.
  for (int i = 1; i < count; ++i) {
    const int moving = order[i];
    int j = i;
    for (; j > 0 && strides[0][order[j - 1]] < strides[0][moving]; --j) order[j] = order[j - 1];
    order[j] = moving;
  }
  for (int i = 0; i < count; ++i) {
    const int d = order[i];
    bool merged = layout.dims > 0;
    for (int t = 0; t < kTensors && merged; ++t)
      merged = layout.stride[t][layout.dims - 1] == strides[t][d] * sizes[d];
    if (!merged) {
      if (layout.dims == kMaxDims) {
        layout.fits = false;
        return layout;
      }
      layout.size[layout.dims++] = 1;
    }
    const int last = layout.dims - 1;
    layout.size[last] *= sizes[d];
    for (int t = 0; t < kTensors; ++t) layout.stride[t][last] = strides[t][d];
  }
  if (layout.dims == 0) {  // a single element
    layout.dims = 1;
    layout.size[0] = 1;
    for (int t = 0; t < kTensors; ++t) layout.stride[t][0] = 1;
  }
  return layout;
}

}  // namespace fastbandit
