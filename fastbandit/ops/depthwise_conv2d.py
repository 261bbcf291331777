"""Depthwise 2-D convolution with dilation and an optional fused ReLU on its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbandit._modes import autocast_dtype
from fastbandit.ops import _convolution
from fastbandit.ops._convolution import Pair
from fastbandit.ops._linf import check_tensors
from fastbandit.ops._register import (
    below_autograd,
    define,
    forward_mode,
    refuse_second_derivative,
)

__all__ = ["depthwise_conv2d"]


# --- References -----------------------------------------------------------------------------------


def _reference(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C, 1, k, k]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    activated = x.relu() if relu else x
    y = F.conv2d(activated, weight, None, stride, padding, dilation, groups=x.shape[1])
    return _convolution.in_layout(y, _convolution.memory_format(x))


def _backward_input_reference(
    grad: Tensor,  # [N, C, H_out, W_out]
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    grad_x = _convolution.convolution_backward(
        grad, x, weight, stride, padding, dilation, x.shape[1], (True, False)
    )[0]
    if relu:
        grad_x = torch.where(x > 0, grad_x, 0.0)
    return grad_x.contiguous(memory_format=_convolution.memory_format(x))


def _backward_weight_reference(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    activated = x.relu() if relu else x
    grad_weight = _convolution.convolution_backward(
        grad, activated, weight, stride, padding, dilation, x.shape[1], (False, True)
    )[1]
    return grad_weight.contiguous()


# --- Fake kernels ---------------------------------------------------------------------------------


def _fake(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    kernel = (weight.shape[2], weight.shape[3])
    height, width = _convolution.output_size(x, kernel, stride, padding, dilation)
    return torch.empty(
        (x.shape[0], x.shape[1], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=_convolution.memory_format(x),
    )


def _backward_input_fake(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=_convolution.memory_format(x)
    )


def _backward_weight_fake(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


# --- The ops --------------------------------------------------------------------------------------


class _DepthwiseConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        relu: bool,
    ) -> Tensor:
        # Both gradients read x: that of the input for the mask of the ReLU and its layout.
        ctx.save_for_backward(x, weight)
        ctx.settings = (stride, padding, dilation, relu)
        return below_autograd(_forward, x, weight, stride, padding, dilation, relu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("depthwise_conv2d", grad)
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = below_autograd(_backward_input, grad, x, weight, *ctx.settings)
        if ctx.needs_input_grad[1] and _convolution.gradient_wanted(ctx, 1):
            grad_weight = below_autograd(_backward_weight, grad, x, weight, *ctx.settings)
        return grad_x, grad_weight, None, None, None, None


_SETTINGS = "int[2] stride, int[2] padding, int[2] dilation, bool relu"

_forward = define(
    "depthwise_conv2d",
    f"(Tensor x, Tensor weight, {_SETTINGS}) -> Tensor",
    _reference,
    _fake,
    autograd=_DepthwiseConv2d,
)
_backward_input = define(
    "depthwise_conv2d_backward_input",
    f"(Tensor grad, Tensor x, Tensor weight, {_SETTINGS}) -> Tensor",
    _backward_input_reference,
    _backward_input_fake,
)
_backward_weight = define(
    "depthwise_conv2d_backward_weight",
    f"(Tensor grad, Tensor x, Tensor weight, {_SETTINGS}) -> Tensor",
    _backward_weight_reference,
    _backward_weight_fake,
)


# Multiply-adds count as two, taps on the padding included, as in torch's own formulas.


@register_flop_formula(torch.ops.fastbandit.depthwise_conv2d)
def _flops(x: list[int], weight: list[int], *_: Any, out_shape: list[int], **__: Any) -> int:
    n, c, h, w = out_shape
    return 2 * n * c * h * w * weight[2] * weight[3]


@register_flop_formula(
    [
        torch.ops.fastbandit.depthwise_conv2d_backward_input,
        torch.ops.fastbandit.depthwise_conv2d_backward_weight,
    ]
)
def _backward_flops(grad: list[int], x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    n, c, h, w = grad
    return 2 * n * c * h * w * weight[2] * weight[3]


# --- Public function ------------------------------------------------------------------------------


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    relu: bool = False,
) -> Tensor:
    """Convolve each channel with its own filter; differentiable once.

    The same as ``F.conv2d(F.relu(x) if relu else x, weight, None, stride, padding, dilation,
    groups=C)``, with the ReLU inside the kernel. Sums are accumulated in float32 at least. The
    gradient of the ReLU at 0 is 0.

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16, any strides; N may be 0.
        weight: [C, 1, k, k], dtype and device of x.
        stride, padding, dilation: an int, or two for height and width.
        relu: apply ReLU to x first (the order of a separable convolution in a DARTS cell).

    Under autocast, x and weight are cast to its dtype first, as ``F.conv2d`` does.

    The native CPU kernels are unrolled for k = 1, 3, 5, 7 with stride and dilation 1 or 2, the CUDA
    kernels for k = 3, 5, 7 with stride 1 and any dilation. Other shapes, and float64, take general
    kernels that are several times slower for each tap; with another stride on CUDA it is torch's
    convolution that computes. The kernels of this package give the same bits for the same inputs at
    every run, on the CPU for every number of threads.

    Returns:
        [N, C, H_out, W_out] in the dtype of x, with
        ``H_out = (H + 2 padding - dilation (k - 1) - 1) // stride + 1``; channels-last if x is.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape is not one of those above, or the kernel does not fit.
        RuntimeError: devices differ, or a second derivative is asked for.
    """
    op = "depthwise_conv2d"
    check_tensors(op, x=x, weight=weight)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    _convolution.check_input(op, x)
    if weight.dtype != x.dtype:
        raise TypeError(f"{op}: weight: expected {x.dtype} as x, got {weight.dtype}")
    shape = weight.shape
    if len(shape) != 4 or shape[0] != x.shape[1] or shape[1] != 1 or not shape[2] == shape[3] > 0:
        raise ValueError(
            f"{op}: weight: expected shape ({x.shape[1]}, 1, k, k), one filter for each channel "
            f"of x, got {tuple(shape)}"
        )
    if weight.device != x.device:
        raise RuntimeError(f"{op}: weight: expected device {x.device} as x, got {weight.device}")
    stride = _convolution.pair(op, "stride", stride, 1)
    padding = _convolution.pair(op, "padding", padding, 0)
    dilation = _convolution.pair(op, "dilation", dilation, 1)
    kernel = (shape[2], shape[3])
    _convolution.check_output(op, x, shape[0], kernel, stride, padding, dilation)
    # An exported program runs where this package is not. On CUDA the kernels are made for stride 1:
    # with another one the library's are faster.
    library = x.is_cuda and stride != (1, 1)
    if library or torch.compiler.is_exporting() or forward_mode():
        return _reference(x, weight, stride, padding, dilation, relu)
    return _forward(x, weight, stride, padding, dilation, relu)
