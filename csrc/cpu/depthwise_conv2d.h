// The depthwise ops as functions, for ops that contain them.
#pragma once

#include "conv_checks.h"

namespace fastbandit::cpu {

Tensor depthwise_conv2d(Tensor x, Tensor weight, Pair stride, Pair padding, Pair dilation,
                        bool relu);
Tensor depthwise_conv2d_backward_input(Tensor grad, Tensor x, Tensor weight, Pair stride,
                                       Pair padding, Pair dilation, bool relu);
Tensor depthwise_conv2d_backward_weight(Tensor grad, Tensor x, Tensor weight, Pair stride,
                                        Pair padding, Pair dilation, bool relu);

}  // namespace fastbandit::cpu
