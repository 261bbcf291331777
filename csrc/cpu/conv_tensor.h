// Tensors as the CPU convolution kernels see them.
#pragma once

#include "conv_checks.h"
#include "cpu/conv_problem.h"

namespace fastbandit::cpu {

inline Real real_of(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return Real::kFloat64;
    case ScalarType::BFloat16: return Real::kBFloat16;
    case ScalarType::Half: return Real::kFloat16;
    default: return Real::kFloat32;
  }
}

// A stride along a dimension of one element says nothing; channels of stride 1 are what the kernels
// look for, so a single channel gets the plane's view.
inline Array4 array_of(const Tensor& t) {
  const auto strides = t.strides();
  return {const_cast<void*>(t.data_ptr()), strides[0], strides[1], strides[2], strides[3]};
}

inline ConvProblem problem_of(const ConvShape& s, ScalarType dtype, bool relu) {
  ConvProblem p;
  p.n = s.n, p.c = s.c, p.h = s.h, p.w = s.w, p.oh = s.oh, p.ow = s.ow;
  p.kernel_h = s.kernel_h, p.kernel_w = s.kernel_w;
  p.stride_h = s.stride_h, p.stride_w = s.stride_w;
  p.pad_h = s.pad_h, p.pad_w = s.pad_w;
  p.dilation_h = s.dilation_h, p.dilation_w = s.dilation_w;
  p.relu = relu;
  p.type = real_of(dtype);
  return p;
}

}  // namespace fastbandit::cpu
