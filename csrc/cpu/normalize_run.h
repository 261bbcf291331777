// (image + delta - mean) / std of a stretch of elements: the ops that write a model's input share
// these.
#pragma once

#include "cpu/isa.h"
#include "dispatch.h"
#include "math/pgd.h"

namespace fastbandit {

constexpr int64_t kNormalizeBlock = 1024;  // elements at once, in the L1 cache

// `count` elements; mean and std are indexed by element, or one value each (channel_stride 0).
template <bool kUnit, class T, class X, class C>
inline __attribute__((always_inline)) void normalize_run(
    const T* delta, int64_t delta_stride, const X* image, int64_t image_stride, const C* mean,
    const C* std, int64_t channel_stride, C* result, int64_t count) {
  if (kUnit) delta_stride = image_stride = 1;
  const C mean0 = *mean, std0 = *std;
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const C attacked = image_value<C>(image[i * image_stride]) + to_compute(delta[i * delta_stride]);
    const C m = channel_stride == 0 ? mean0 : mean[i * channel_stride];
    const C s = channel_stride == 0 ? std0 : std[i * channel_stride];
    result[i] = (attacked - m) / s;
  }
}

template <class O, class C>
inline __attribute__((always_inline)) void write_run(const C* result, O* out, int64_t out_stride,
                                                     int64_t count) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i)
    out[i * out_stride] = round_to_nearest<O>(static_cast<compute_t<O>>(result[i]));
}

// `count` results to `out`, element type by code.
template <class C>
void write_results(const char* op, const C* result, void* out, ScalarType dtype, int64_t at,
                   int64_t stride, int64_t count) {
  dispatch_floating(op, "out_dtype", dtype, [&](auto tag) {
    using O = typename decltype(tag)::type;
    O* const to = static_cast<O*>(out) + at;
    if (stride == 1) {
      with_isa(FB_BODY { write_run(result, to, 1, count); });
    } else {
      write_run(result, to, stride, count);
    }
  });
}

}  // namespace fastbandit
