// What the convolution kernels are told: sizes, strides in elements, and the kernel tables of the
// instruction sets. Knows nothing of torch.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace fastbandit::cpu {

enum class Real { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A [N, C, H, W] array with any strides (in elements).
struct Array4 {
  void* data = nullptr;
  int64_t n = 0, c = 0, h = 0, w = 0;
};

struct ConvProblem {
  int64_t n = 0, c = 0;    // images; channels of the filter and of the output
  int64_t h = 0, w = 0;    // input map
  int64_t oh = 0, ow = 0;  // output map
  int64_t kernel_h = 1, kernel_w = 1;
  int64_t stride_h = 1, stride_w = 1;
  int64_t pad_h = 0, pad_w = 0;
  int64_t dilation_h = 1, dilation_w = 1;
  bool relu = false;  // the input is max(x, 0)
  bool shared = false;  // one input channel for every output channel (Gabor)
  Real type = Real::kFloat32;
};

// Work is cut into items that may run in any order on any thread; how it is cut depends on the
// problem alone, so every result has the same bits for every number of threads.
struct ConvKernels {
  // float32 taps in the kernels' order from a weight [C, 1, kernel_h, kernel_w];
  // `packed` holds packed_size(problem, x) floats.
  int64_t (*packed_size)(const ConvProblem&, const Array4& x);
  void (*pack)(const ConvProblem&, const Array4& x, const Array4& weight, float* packed);

  int64_t (*forward_items)(const ConvProblem&, const Array4& x, const Array4& y);
  void (*forward)(const ConvProblem&, const Array4& x, const float* packed, const Array4& y,
                  int64_t begin, int64_t end);

  int64_t (*backward_input_items)(const ConvProblem&, const Array4& grad, const Array4& grad_x);
  void (*backward_input)(const ConvProblem&, const Array4& grad, const Array4& x,
                         const float* packed, const Array4& grad_x, int64_t begin, int64_t end);

  // Each item writes its own sums into `partial` (partial_size floats); reduce adds them in a fixed
  // order and writes grad_weight [C, 1, kernel_h, kernel_w].
  int64_t (*backward_weight_items)(const ConvProblem&, const Array4& grad, const Array4& x);
  int64_t (*partial_size)(const ConvProblem&, const Array4& grad, const Array4& x);
  void (*backward_weight)(const ConvProblem&, const Array4& grad, const Array4& x, float* partial,
                          int64_t begin, int64_t end);
  void (*reduce)(const ConvProblem&, const Array4& grad, const Array4& x, const float* partial,
                 const Array4& grad_weight);

  // The same with one input for all channels, the sum over the `channels` of x (problem.shared).
  // grad_sum, [N, H, W] in the problem's type, is the gradient of that sum; partial sums as above,
  // with grad in the place of x in partial_size and reduce. Either may be null.
  int64_t (*shared_forward_items)(const ConvProblem&);
  void (*shared_forward)(const ConvProblem&, int64_t channels, const Array4& x, const float* packed,
                         const Array4& y, int64_t begin, int64_t end);
  int64_t (*shared_backward_items)(const ConvProblem&, const Array4& grad);
  void (*shared_backward)(const ConvProblem&, int64_t channels, const Array4& grad,
                          const Array4& x, const float* packed, void* grad_sum, float* partial,
                          int64_t begin, int64_t end);
};

template <>
const ConvKernels& kernels_for<ConvKernels, Isa::baseline>();
template <>
const ConvKernels& kernels_for<ConvKernels, Isa::avx2>();
template <>
const ConvKernels& kernels_for<ConvKernels, Isa::avx512>();

}  // namespace fastbandit::cpu
