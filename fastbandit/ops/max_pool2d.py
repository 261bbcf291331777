"""3 x 3 max pooling with a padding of 1, the pooling of the search spaces."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit.ops import _convolution
from fastbandit.ops._linf import check_tensors
from fastbandit.ops._register import below_autograd, define, refuse_second_derivative

__all__ = ["max_pool2d"]

_KERNEL, _PADDING = 3, 1
# Below this many outputs a Python-declared op with a gradient costs what its kernel saves
# (docs/decisions.md#max-pooling).
_LEAST_OUTPUTS = 1 << 15


# --- References -----------------------------------------------------------------------------------


def _reference(
    x: Tensor,  # [N, C, H, W]
    stride: int,
) -> tuple[Tensor, Tensor]:
    layout = _convolution.memory_format(x)
    y, index = F.max_pool2d(x, _KERNEL, stride, _PADDING, return_indices=True)
    # From the place in the image to the place in the window, in rows: 0 to 8.
    rows, columns = (torch.arange(size, device=x.device) * stride for size in y.shape[2:])
    row = index // x.shape[3] - rows[:, None] + _PADDING
    which = row * _KERNEL + index % x.shape[3] - columns + _PADDING
    return _convolution.in_layout(y, layout), _convolution.in_layout(which.byte(), layout)


def _backward_reference(
    grad: Tensor,  # [N, C, H_out, W_out]
    which: Tensor,
    height: int,
    width: int,
    stride: int,
) -> Tensor:
    rows, columns = (torch.arange(n, device=grad.device) * stride for n in grad.shape[2:])
    window = which.long()
    row = rows[:, None] + window // _KERNEL - _PADDING
    index = row * width + columns + window % _KERNEL - _PADDING
    result = grad.new_zeros(*grad.shape[:2], height * width)
    result.scatter_add_(2, index.flatten(2), grad.flatten(2))
    result = result.unflatten(2, (height, width))
    return result.contiguous(memory_format=_convolution.memory_format(which))


# --- Fake kernels ---------------------------------------------------------------------------------


def _fake(x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    n, c, height, width = x.shape
    shape = (n, c, (height - 1) // stride + 1, (width - 1) // stride + 1)
    layout = _convolution.memory_format(x)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return y, torch.empty_like(y, dtype=torch.uint8)


def _backward_fake(grad: Tensor, which: Tensor, height: int, width: int, stride: int) -> Tensor:
    shape = (*which.shape[:2], height, width)
    layout = _convolution.memory_format(which)
    return torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)


# --- The ops --------------------------------------------------------------------------------------


class _MaxPool2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        y, which = below_autograd(_forward, x, stride)
        ctx.save_for_backward(which)
        ctx.settings = (x.shape[2], x.shape[3], stride)
        ctx.mark_non_differentiable(which)
        ctx.set_materialize_grads(False)
        return y, which

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        refuse_second_derivative("max_pool2d", grad)
        if grad is None:
            return None, None
        (which,) = ctx.saved_tensors
        return below_autograd(_backward, grad, which, *ctx.settings), None


_forward = define(
    "max_pool2d",
    "(Tensor x, int stride) -> (Tensor, Tensor)",
    _reference,
    _fake,
    autograd=_MaxPool2d,
)
_backward = define(
    "max_pool2d_backward",
    "(Tensor grad, Tensor which, int height, int width, int stride) -> Tensor",
    _backward_reference,
    _backward_fake,
)


# --- Public function ------------------------------------------------------------------------------


def check_pooling(op: str, x: Tensor, stride: int) -> None:
    """Refuse an ``x`` that is no tensor and a stride other than 1 and 2."""
    check_tensors(op, x=x)
    if stride not in (1, 2):
        raise ValueError(f"{op}: stride: expected 1 or 2, got {stride}")


def kernel_pools(op: str, x: Tensor, stride: int) -> bool:
    """Whether the kernel of ``op`` serves ``x``, and is faster for pooling than torch."""
    return _convolution.has_kernel(op, x) and x.numel() >= max(1, _LEAST_OUTPUTS * stride**2)


def max_pool2d(x: Tensor, stride: int = 1) -> Tensor:
    """The largest value of each 3 x 3 window, with a padding of 1; differentiable once.

    The same as ``F.max_pool2d(x, 3, stride, 1)``, bit for bit, gradient included: of equal values
    the first wins, and NaN wins. Computed by torch, except for float32 in channels-last on a CPU
    from 2^15 outputs on.

    Args:
        x: [N, C, H, W].
        stride: 1 or 2.

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)] in the layout of ``x``.

    Raises:
        TypeError: x is no tensor.
        ValueError: another stride.
    """
    check_pooling("max_pool2d", x, stride)
    if kernel_pools("max_pool2d", x, stride):
        y: Tensor = _forward(x, stride)[0]
        return y
    return F.max_pool2d(x, _KERNEL, stride, _PADDING)
