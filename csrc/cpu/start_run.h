// The random start of a stretch of one image: the ops that draw it share these.
#pragma once

#include "cpu/isa.h"
#include "cpu/walk.h"
#include "math/pgd.h"
#include "math/philox.h"

namespace fastbandit {

constexpr int64_t kStartChunk = 2048;  // elements drawn at once; their words stay in the L1 cache

// `count` words, a multiple of 4, from element 4 * quarter of an image on.
void draw_words(const PhiloxStream& stream, uint32_t quarter, uint32_t* words, int64_t count);

// A number of the draw: from the host, or from a tensor of one element.
inline int64_t word_of(int64_t value, const std::optional<Tensor>& tensor) {
  return tensor ? *static_cast<const int64_t*>(tensor->const_data_ptr()) : value;
}

template <Bounds kBounds, class T, class X, class C>
inline __attribute__((always_inline)) void start_run(T* delta, int64_t delta_stride,
                                                     const X* image, int64_t image_stride,
                                                     const uint32_t* words, int64_t count,
                                                     ProjectionBounds<C> bounds) {
#pragma GCC ivdep
  for (int64_t i = 0; i < count; ++i) {
    const C pixel = kBounds == kNoBounds ? C(0) : image_value<C>(image[i * image_stride]);
    const C start = uniform_symmetric<C>(words[i]) * bounds.epsilon;
    delta[i * delta_stride] = round_toward_zero<T>(project<kBounds>(start, pixel, bounds));
  }
}

// The strides of one image's elements in logical order, beside those of the numbering itself.
enum { kStartNumber, kStartDelta, kStartImage, kStartTensors };

template <class T, class X, class C>
void start_chunk(const Layout<kStartTensors>& layout, int64_t begin, int64_t end, T* delta,
                 const X* image, const uint32_t* words, ProjectionBounds<C> bounds) {
  const auto vectorised = [&](auto kind) {
    constexpr Bounds kBounds = decltype(kind)::value;
    with_isa(FB_BODY {
      for_each_run(layout, begin, end, [&](const int64_t* at, int64_t count) FB_INLINE_LAMBDA {
        start_run<kBounds>(delta + at[kStartDelta], 1, image + at[kStartImage], 1,
                           words + (at[kStartNumber] - begin), count, bounds);
      });
    });
  };
  if (!layout.unit_inner()) {
    const int inner = layout.dims - 1;
    for_each_run(layout, begin, end, [&](const int64_t* at, int64_t count) {
      start_run<kSomeBounds>(delta + at[kStartDelta], layout.stride[kStartDelta][inner],
                             image + at[kStartImage], layout.stride[kStartImage][inner],
                             words + (at[kStartNumber] - begin), count, bounds);
    });
    return;
  }
  switch (bounds.kind()) {
    case kNoBounds: return vectorised(std::integral_constant<Bounds, kNoBounds>{});
    case kBothBounds: return vectorised(std::integral_constant<Bounds, kBothBounds>{});
    case kSomeBounds: return vectorised(std::integral_constant<Bounds, kSomeBounds>{});
  }
}

}  // namespace fastbandit
