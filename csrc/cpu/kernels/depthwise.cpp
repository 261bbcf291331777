// Depthwise convolution over lanes, compiled once for each instruction set (see cpu/isa.h).
//
// A lane is one channel of one image. In channels-last memory the lanes of a vector are neighbouring
// channels and float32 maps are read where they lie. Any other layout or type goes through a scratch
// map [rows][w][kLanes] of float32 that stays in the cache: contiguous maps are transposed in
// registers, 16-bit values are converted once, relu is applied on the way. So there is one set of
// inner loops, and small maps (8 x 8) fill the vectors as well as large ones. Where there are fewer
// channels than lanes, the lanes of a contiguous array run on into the next images ("flat").
//
// The inner loops are unrolled for square filters of 1, 3, 5, 7 taps with dilation and stride 1 or
// 2 (see with_shape); every other shape takes the loops named *_any, which are vectorised but not
// unrolled, and a few times slower for each tap.
#include "cpu/depthwise/shared.h"

namespace fastbandit::cpu::FB_ISA {

inline ConvKernels make_table() {
  ConvKernels table;
  table.packed_size = &packed_size;
  table.pack = &pack;
  table.forward_items = [](const ConvProblem& p, const Array4& x, const Array4& y) {
    return forward_plan(p, x, y).count;
  };
  table.forward = &forward;
  table.backward_input_items = [](const ConvProblem& p, const Array4& grad, const Array4& grad_x) {
    return backward_input_plan(p, grad, grad_x).count;
  };
  table.backward_input = &backward_input;
  table.backward_weight_items = [](const ConvProblem& p, const Array4& grad, const Array4& x) {
    return WeightItems(p, grad, x).count();
  };
  table.partial_size = &partial_size;
  table.backward_weight = &backward_weight_items;
  table.reduce = &reduce;
  table.shared_forward_items = &shared_forward_items;
  table.shared_forward = &shared_forward;
  table.shared_backward_items = [](const ConvProblem& p, const Array4& grad) {
    return WeightItems(p, grad, grad).chunks;
  };
  table.shared_backward = &shared_backward;
  return table;
}

}  // namespace fastbandit::cpu::FB_ISA

namespace fastbandit::cpu {

template <>
const ConvKernels& kernels_for<ConvKernels, FB_ISA::kIsa>() {
  static const ConvKernels table = FB_ISA::make_table();
  return table;
}

}  // namespace fastbandit::cpu

#include "cpu/simd/end.h"
