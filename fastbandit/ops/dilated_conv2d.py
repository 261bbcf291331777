"""Dense 2-D convolution with dilation and an optional ReLU on its input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastbandit.ops import _convolution
from fastbandit.ops._convolution import Pair

__all__ = ["dilated_conv2d"]


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
    and computed by the library behind it, in x's layout and under autocast as usual.

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
    _convolution.check_input(op, x)
    if weight.dtype != x.dtype and _convolution.autocast_dtype(x) is None:
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
    _convolution.check_output(op, x, (shape[2], shape[3]), stride, padding, dilation)
    return F.conv2d(F.relu(x) if relu else x, weight, None, stride, padding, dilation)
