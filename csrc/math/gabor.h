// The Gabor function and its derivatives by the five parameters (Binary Neural Networks, section
// 4.2): on the integer grid, x over rows and y over columns,
//   G(x, y) = exp(-(x'^2 + gamma^2 y'^2) / (2 sigma^2)) cos(2 pi x' / wavelength + psi)
//   x' = x cos(theta) + y sin(theta),  y' = -x sin(theta) + y cos(theta)
#pragma once

#include <cmath>

#include "math/portable.h"

namespace fastbandit {

template <class C>
struct GaborParameters {
  C theta, sigma, gamma, wavelength, psi;
};

// One filter, with what does not depend on the tap.
template <class C>
struct GaborFilter {
  GaborParameters<C> p;
  C cos_theta, sin_theta;

  FB_HOST_DEVICE explicit GaborFilter(const GaborParameters<C>& parameters)
      : p(parameters), cos_theta(std::cos(parameters.theta)), sin_theta(std::sin(parameters.theta)) {}

  FB_HOST_DEVICE C value(C x, C y) const {
    const C across = x * cos_theta + y * sin_theta, along = y * cos_theta - x * sin_theta;
    const C stretched = p.gamma * along;
    const C squares = across * across + stretched * stretched;
    return std::exp(squares / (C(-2) * p.sigma * p.sigma)) * std::cos(phase(across));
  }

  // sum += grad * dG / dparameter at one tap.
  FB_HOST_DEVICE void add_gradient(C x, C y, C grad, GaborParameters<C>& sum) const {
    const C across = x * cos_theta + y * sin_theta, along = y * cos_theta - x * sin_theta;
    const C stretched = p.gamma * along, variance = p.sigma * p.sigma;
    const C squares = across * across + stretched * stretched;
    const C envelope = grad * std::exp(squares / (C(-2) * variance));
    const C angle = phase(across);
    const C even = envelope * std::cos(angle);  // grad * G
    const C odd = envelope * std::sin(angle);   // -grad * dG/dphase
    const C frequency = C(kTwoPi) / p.wavelength;
    // dx'/dtheta = y', dy'/dtheta = -x'
    sum.theta += even * across * along * (p.gamma * p.gamma - C(1)) / variance -
        odd * frequency * along;
    sum.sigma += even * squares / (variance * p.sigma);
    sum.gamma -= even * p.gamma * along * along / variance;
    sum.wavelength += odd * frequency * across / p.wavelength;
    sum.psi -= odd;
  }

 private:
  static constexpr double kTwoPi = 6.283185307179586476925286766559;

  FB_HOST_DEVICE C phase(C across) const { return C(kTwoPi) * across / p.wavelength + p.psi; }
};

// The parameters from any real numbers t: least + more s(t), with the logistic function s.
template <class C>
FB_HOST_DEVICE C logistic(C t) {
  return C(1) / (C(1) + std::exp(-t));
}

template <class C>
FB_HOST_DEVICE C logistic_slope(C t) {
  const C s = logistic(t);
  return (C(1) - s) * s;
}

struct GaborIntervals {
  double least_sigma, more_sigma, least_wavelength, more_wavelength;
};

// Of numbers for theta, sigma, gamma, wavelength the parameters.
template <class C>
FB_HOST_DEVICE void gabor_parameters_of(const GaborIntervals& of, C (&value)[4]) {
  value[0] = C(6.283185307179586476925286766559) * logistic(value[0]);
  value[1] = C(of.least_sigma) + C(of.more_sigma) * logistic(value[1]);
  value[2] = C(1) + C(0.5) * value[2];
  value[3] = C(of.least_wavelength) + C(of.more_wavelength) * logistic(value[3]);
}

// The derivatives of the parameters at these numbers.
template <class C>
FB_HOST_DEVICE void gabor_parameter_slopes(const GaborIntervals& of, C (&value)[4]) {
  value[0] = C(6.283185307179586476925286766559) * logistic_slope(value[0]);
  value[1] = C(of.more_sigma) * logistic_slope(value[1]);
  value[2] = C(0.5);
  value[3] = C(of.more_wavelength) * logistic_slope(value[3]);
}

}  // namespace fastbandit
