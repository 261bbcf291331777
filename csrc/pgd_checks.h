// Argument checks that the CPU and the CUDA glue of the PGD ops share.
#pragma once

#include <cmath>

#include "check.h"

namespace fastbandit {

inline void check_image(const char* op, const Tensor& image, ScalarType delta_dtype) {
  const ScalarType dtype = image.scalar_type();
  FB_CHECK(dtype == delta_dtype || dtype == ScalarType::Float || dtype == ScalarType::Byte, op,
           "image must be ", dtype_name(delta_dtype), ", float32 or uint8, got ",
           dtype_name(dtype));
}

inline void check_bounds(const char* op, double epsilon, std::optional<double> lower,
                         std::optional<double> upper) {
  FB_CHECK(epsilon >= 0 && std::isfinite(epsilon), op,
           "epsilon must be finite and not negative, got ", epsilon);
  FB_CHECK(!lower || !std::isnan(*lower), op, "lower must be a number, got nan");
  FB_CHECK(!upper || !std::isnan(*upper), op, "upper must be a number, got nan");
  FB_CHECK(!lower || !upper || *lower <= *upper, op, "lower must not be above upper, got ",
           lower.value_or(0), " and ", upper.value_or(0));
}

inline void check_pgd(const char* op, const Tensor& delta, const Tensor& grad, const Tensor& image,
                      double step_size, double epsilon, std::optional<double> lower,
                      std::optional<double> upper) {
  check_floating(op, "delta", delta);
  check_dtype(op, "grad", grad, delta.scalar_type());
  check_image(op, image, delta.scalar_type());
  check_same_shape(op, "grad", grad, "delta", delta);
  check_same_shape(op, "image", image, "delta", delta);
  check_same_device(op, "grad", grad, "delta", delta);
  check_same_device(op, "image", image, "delta", delta);
  FB_CHECK(std::isfinite(step_size), op, "step_size must be finite, got ", step_size);
  check_bounds(op, epsilon, lower, upper);
}

}  // namespace fastbandit
