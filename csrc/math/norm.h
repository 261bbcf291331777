// Batch normalisation of one value, and what is computed once for each channel.
#pragma once

#include <cmath>

#include "math/number.h"

namespace fastbandit {

template <class C>
FB_HOST_DEVICE C normalized(C x, C mean, C scale, C shift) {
  return (x - mean) * scale + shift;
}

// scale (grad - mean(grad) - (x - mean) inverse^2 mean(grad (x - mean)))
template <class C>
FB_HOST_DEVICE C norm_gradient(C grad, C x, C mean, C scale, C shift, C slope) {
  return grad * scale - shift - (x - mean) * slope;
}

// From the sums over `count` values of x - middle and of its square. Returns the variance.
template <class C>
FB_HOST_DEVICE double norm_statistics(double sum, double square, double middle, double count,
                                      double eps, C& mean, C& inverse) {
  const double offset = sum / count;
  double variance = square / count - offset * offset;
  if (variance < 0.0) variance = 0.0;  // rounding; NaN stays what it is
  mean = static_cast<C>(middle + offset);
  inverse = static_cast<C>(1.0 / std::sqrt(variance + eps));
  return variance;
}

// What running statistics are moved towards.
template <class C>
FB_HOST_DEVICE C unbiased_variance(double variance, double count) {
  return static_cast<C>(variance * (count / (count - 1.0)));
}

// The variance whose inverse deviation is `inverse`.
FB_HOST_DEVICE double variance_of(double inverse, double eps) {
  const double variance = 1.0 / (inverse * inverse) - eps;
  return variance < 0.0 ? 0.0 : variance;
}

// From the sums over `count` values of grad and of grad (x - mean).
template <class C>
FB_HOST_DEVICE void norm_slopes(double sum, double product, double inverse, double weight,
                                double count, C& by_weight, C& scale, C& shift, C& slope) {
  const double factor = inverse * weight;
  by_weight = static_cast<C>(product * inverse);
  scale = static_cast<C>(factor);
  shift = static_cast<C>(factor * sum / count);
  slope = static_cast<C>(factor * inverse * inverse * product / count);
}

}  // namespace fastbandit
