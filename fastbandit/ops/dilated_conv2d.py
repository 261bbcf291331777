"""Dense 2-D convolution with dilation and an optional ReLU on its input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit._modes import autocast_dtype
from fastbandit.ops import _convolution
from fastbandit.ops._convolution import Pair
from fastbandit.ops._linf import check_tensors
from fastbandit.ops._register import differentiated_by_torch

__all__ = ["dilated_conv2d"]

# Which route serves what: the library's (oneDNN, cuDNN), except that on a CPU a four-phase split
# computes the weight gradient where the filter's extent 2 (k - 1) reaches the size of the map;
# elsewhere no other route is faster (docs/decisions.md#dilated-convolution).
_SPLIT_DILATION = 2


def dilated_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 2,
    relu: bool = False,
) -> Tensor:
    """Convolve with a dense dilated kernel; differentiable.

    The same as ``F.conv2d(F.relu(x) if relu else x, weight, None, stride, padding, dilation)``,
    and computed by the library behind it, in x's layout and under autocast as usual, except where
    another route is measured to be much faster (docs/decisions.md).

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16, any strides; N may be 0.
        weight: [C_out, C, k_h, k_w], device of x, and its dtype except under autocast.
        stride, padding, dilation: an int, or two for height and width.
        relu: apply ReLU to x first.

    Returns:
        [N, C_out, H_out, W_out] in the dtype of x (under autocast, in autocast's), with
        ``H_out = (H + 2 padding - dilation (k_h - 1) - 1) // stride + 1``.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape is not one of those above, or the kernel does not fit.
        RuntimeError: devices differ.
    """
    op = "dilated_conv2d"
    check_tensors(op, x=x, weight=weight)
    _convolution.check_input(op, x)
    if weight.dtype != x.dtype and autocast_dtype(x) is None:
        raise TypeError(f"{op}: weight: expected {x.dtype} as x, got {weight.dtype}")
    shape = weight.shape
    if len(shape) != 4 or shape[1] != x.shape[1] or 0 in shape:
        raise ValueError(
            f"{op}: weight: expected shape (C_out, {x.shape[1]}, k_h, k_w) for x of {x.shape[1]} "
            f"channels, got {tuple(shape)}"
        )
    if weight.device != x.device:
        raise RuntimeError(f"{op}: weight: expected device {x.device} as x, got {weight.device}")
    stride = _convolution.pair(op, "stride", stride, 1)
    padding = _convolution.pair(op, "padding", padding, 0)
    dilation = _convolution.pair(op, "dilation", dilation, 1)
    kernel = (shape[2], shape[3])
    _convolution.check_output(op, x, shape[0], kernel, stride, padding, dilation)
    activated = F.relu(x) if relu else x
    if _splits(x, weight, stride, padding, dilation):
        result: Tensor = _SplitWeightGradient.apply(activated, weight, padding)
        return result
    if _convolution.beyond_onednn(x, stride, padding, dilation) and not differentiated_by_torch():
        # Autocast does not look into a Function.
        dtype = autocast_dtype(x) or x.dtype
        maps = activated.to(dtype), weight.to(dtype)
        y = _OwnGradient.apply(*maps, stride, padding, dilation)
    else:
        y = F.conv2d(activated, weight, None, stride, padding, dilation)
    if x.is_cuda and x.dtype == torch.float64:  # cuDNN has no channels-last convolution of these
        y = y.contiguous(memory_format=_convolution.memory_format(x))
    return y


def _splits(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether the weight gradient goes by the four-phase split; see the table above."""
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # a compiler is shown the plain convolution
        and not differentiated_by_torch()
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and autocast_dtype(x) is None
        and tuple(stride) == (1, 1)
        and tuple(dilation) == (_SPLIT_DILATION, _SPLIT_DILATION)
        and all(
            padding[axis] % 2 == 0
            and x.shape[2 + axis] % 2 == 0
            and _SPLIT_DILATION * (weight.shape[2 + axis] - 1) >= x.shape[2 + axis]
            for axis in (0, 1)
        )
    )


class _OwnGradient(torch.autograd.Function):
    """F.conv2d whose gradients are computed without oneDNN."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings = (stride, padding, dilation)
        return F.conv2d(x, weight, None, stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        stride, padding, dilation = ctx.settings
        mask = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        grad_x, grad_weight = _convolution.convolution_backward(
            grad, x, weight, stride, padding, dilation, 1, mask
        )
        return grad_x, grad_weight, None, None, None


class _SplitWeightGradient(torch.autograd.Function):
    """F.conv2d of dilation 2 whose weight gradient is computed at dilation 1.

    Output pixel (h, w) reads input pixels of the same parities of h and w only, so the four
    parities are four times as many images of a quarter of the size, with dilation 1.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return F.conv2d(x, weight, None, 1, padding, _SPLIT_DILATION)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        backward, ones, twos = _convolution.convolution_backward, [1, 1], [_SPLIT_DILATION] * 2
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = backward(grad, x, weight, ones, ctx.padding, twos, 1, (True, False))[0]
        if ctx.needs_input_grad[1] and _convolution.gradient_wanted(ctx, 1):
            padding = [pad // 2 for pad in ctx.padding]
            phases = (_phases(grad), _phases(x))
            grad_weight = backward(*phases, weight, ones, padding, ones, 1, (False, True))[1]
        return grad_x, grad_weight, None


def _phases(x: Tensor) -> Tensor:
    """[N, C, 2 H, 2 W] -> [4 N, C, H, W], one image for each pair of parities, in x's layout."""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(3, 5, 0, 1, 2, 4)
    phases = parts.reshape(4 * n, c, h // 2, w // 2)
    return _convolution.in_layout(phases, _convolution.memory_format(x))
