// The projected sign-gradient step, and the bounds it shares with the random start.
//
// Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", arXiv 1706.06083:
// delta <- clip(delta + step sign(grad)), with the clip that keeps |delta| <= epsilon and
// lower <= image + delta <= upper. The bounds are put on delta itself, [lower - image,
// upper - image], so that no rounding of image + delta moves it.
#pragma once

#include "dtype.h"
#include "math/number.h"

namespace fastbandit {

// An image element in the compute type; a byte stands for value / 255.
template <class C, class X>
FB_HOST_DEVICE C image_value(X value) {
  return static_cast<C>(to_compute(value));
}

template <class C>
FB_HOST_DEVICE C image_value(uint8_t value) {
  return static_cast<C>(value) / static_cast<C>(255);
}

// An image element whose type is known at run time only: `dtype` is kUInt8, kFloat32 or, for any
// other code, that of T.
template <class T>
FB_HOST_DEVICE compute_t<T> pixel_at(const void* image, int dtype, int64_t at) {
  using C = compute_t<T>;
  if (dtype == kUInt8) return image_value<C>(static_cast<const uint8_t*>(image)[at]);
  if (dtype == kFloat32) return image_value<C>(static_cast<const float*>(image)[at]);
  return image_value<C>(static_cast<const T*>(image)[at]);
}

// Which bounds there are: neither, both, or as the fields say. The first two are compiled apart,
// since they are what attacks use; without bounds the image is not even read.
enum Bounds { kNoBounds, kBothBounds, kSomeBounds };

template <class C>
struct ProjectionBounds {
  C epsilon, lower, upper;
  bool has_lower, has_upper;

  Bounds kind() const {
    // A bound that is finite as double can be infinite here; then it takes the careful clamp.
    const bool finite = lower - lower == C(0) && upper - upper == C(0);
    return has_lower && has_upper && finite ? kBothBounds
           : has_lower || has_upper         ? kSomeBounds
                                            : kNoBounds;
  }
};

template <class C>
inline ProjectionBounds<C> projection_bounds(double epsilon, int has_lower, double lower,
                                             int has_upper, double upper) {
  return {static_cast<C>(epsilon), static_cast<C>(lower), static_cast<C>(upper), has_lower != 0,
          has_upper != 0};
}

// min(max(delta, low), high); NaN in any of the three gives NaN, as torch.clamp does.
//
// `a > b ? a : b` gives b where either is NaN, which decides on which side each operand stands.
template <Bounds kBounds, class C>
FB_HOST_DEVICE C clamp_nan(C delta, C low, C high) {
  if (kBounds == kNoBounds) {  // only delta can be NaN
    const C raised = low > delta ? low : delta;
    return high < raised ? high : raised;
  }
  const C raised = delta > low ? delta : low;
  if (kBounds == kBothBounds) {  // low and high are NaN together, where the image is
    // Of equal numbers it is high, as below: -0 and 0 differ in their bits.
    const C clamped = raised < high ? raised : high;
    return delta != delta ? delta : clamped;
  }
  const C raised_or_nan = delta != delta ? delta : raised;
  const C clamped = raised_or_nan < high ? raised_or_nan : high;
  return raised_or_nan != raised_or_nan ? raised_or_nan : clamped;
}

template <Bounds kBounds, class C>
FB_HOST_DEVICE C project(C delta, C image, const ProjectionBounds<C>& bounds) {
  C low = -bounds.epsilon;
  C high = bounds.epsilon;
  if (kBounds == kBothBounds || (kBounds == kSomeBounds && bounds.has_lower)) {
    const C room = bounds.lower - image;
    low = low > room ? low : room;  // a NaN in `room` stays
  }
  if (kBounds == kBothBounds || (kBounds == kSomeBounds && bounds.has_upper)) {
    const C room = bounds.upper - image;
    high = high < room ? high : room;
  }
  return clamp_nan<kBounds>(delta, low, high);
}

FB_HOST_DEVICE float with_sign_of(float size, float sign) {
  return bit_cast<float>(bit_cast<uint32_t>(size) ^ (bit_cast<uint32_t>(sign) & 0x80000000u));
}

FB_HOST_DEVICE double with_sign_of(double size, double sign) {
  return bit_cast<double>(bit_cast<uint64_t>(size) ^
                          (bit_cast<uint64_t>(sign) & 0x8000000000000000ull));
}

FB_HOST_DEVICE float magnitude(float value) {
  return bit_cast<float>(bit_cast<uint32_t>(value) & 0x7fffffffu);
}

FB_HOST_DEVICE double magnitude(double value) {
  return bit_cast<double>(bit_cast<uint64_t>(value) & 0x7fffffffffffffffull);
}

// delta + step * torch.sign(grad), where the sign of zeros and of NaN is 0.
template <class C>
FB_HOST_DEVICE C stepped(C delta, C grad, C step) {
  const C moved = delta + with_sign_of(step, grad);
  return magnitude(grad) > C(0) ? moved : delta;
}

// The new delta, before it is rounded (toward zero) to its storage type.
template <Bounds kBounds, class C>
FB_HOST_DEVICE C pgd_update(C delta, C grad, C image, C step, const ProjectionBounds<C>& bounds) {
  return project<kBounds>(stepped(delta, grad, step), image, bounds);
}

}  // namespace fastbandit
