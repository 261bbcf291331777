"""Batch normalisation with the statistics of the batch at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastbandit.ops import _convolution
from fastbandit.ops._linf import check_number, check_tensors
from fastbandit.ops._register import below_autograd, define, refuse_second_derivative

__all__ = ["batch_norm"]

# Which route serves what. torch's own is taken, except on a CPU for float32 in channels-last from
# this many elements on: there a whole step, with maps from memory and fresh buffers, is faster by
# our kernel (docs/decisions.md#batch-norm). On CUDA it is a sum of one term (norm_sum.py).
_LEAST_ELEMENTS = 1 << 16


# --- References -----------------------------------------------------------------------------------


def _reference(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor | None,  # [C]
    bias: Tensor | None,  # [C]
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    return _convolution.in_layout(y, _convolution.memory_format(x)), mean, inverse


def _backward_reference(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, x, weight, None, None, mean, inverse, True, eps, [True, True, True]
    )
    return grad_x.contiguous(memory_format=_convolution.memory_format(x)), grad_weight, grad_bias


# --- Fake kernels ---------------------------------------------------------------------------------


def _fake(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=_convolution.memory_format(x)
    )
    return y, x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, inverse: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=_convolution.memory_format(x)
    )
    return grad_x, x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


# --- The ops --------------------------------------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, inverse = below_autograd(_forward, x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, inverse)
        ctx.eps = eps
        # The statistics have no gradient here, and torch gives them none either.
        ctx.mark_non_differentiable(mean, inverse)
        ctx.set_materialize_grads(False)
        return y, mean, inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("batch_norm", grad)
        if grad is None:
            return None, None, None, None
        x, weight, mean, inverse = ctx.saved_tensors
        grads = below_autograd(_backward, grad, x, weight, mean, inverse, ctx.eps)
        needed = ctx.needs_input_grad[:3]
        return (*(g if want else None for g, want in zip(grads, needed, strict=True)), None)


_forward = define(
    "batch_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    autograd=_BatchNorm,
)
_backward = define(
    "batch_norm_backward",
    "(Tensor grad, Tensor x, Tensor? weight, Tensor mean, Tensor inverse, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)


# --- Public function ------------------------------------------------------------------------------


def _ours(x: Tensor) -> bool:
    """Whether the kernel of this package serves ``x``; see the note at the top."""
    return _convolution.has_kernel("batch_norm", x) and x.numel() >= _LEAST_ELEMENTS


def batch_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel by mean and variance of this batch; differentiable once.

    The same as ``F.batch_norm(x, running_mean, running_var, weight, bias, True, momentum, eps)``,
    and computed by torch, except where a kernel of ours is faster: in channels-last from 2^16
    elements on, float32 on a CPU and any floating type on a GPU (:func:`norm_sum` of one term). It
    sums each channel about its first value in blocks, the blocks in float64 and in order: the same
    bits for any number of threads.

    Args:
        x: [N, C, H, W] with more than one value for each channel.
        weight, bias: [C] or None for 1 and 0.
        running_mean, running_var: [C], moved towards mean and unbiased variance of the batch by
            ``momentum``, or None.
        eps: added to the variance.

    Returns:
        Like ``x``.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: one of ``running_mean`` and ``running_var`` is None alone.
        RuntimeError: shapes do not fit, devices differ, or a second derivative is asked for.
    """
    check_tensors("batch_norm", x=x)
    check_running("batch_norm", running_mean, running_var)
    check_number("batch_norm", "momentum", momentum)
    check_number("batch_norm", "eps", eps)
    _convolution.check_optional(
        "batch_norm", x,
        weight=weight, bias=bias, running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    if x.is_cuda and not torch.compiler.is_compiling():
        from fastbandit.ops.norm_sum import Normalized  # which is made of this module

        return Normalized(x, weight, bias, running_mean, running_var, momentum, eps).close()
    return by_itself(x, weight, bias, running_mean, running_var, momentum, eps)


def by_itself(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
) -> Tensor:
    """:func:`batch_norm` of arguments that are known to be right, without the kernels of a sum."""
    if not _ours(x):
        return torch.batch_norm(
            x, weight, bias, running_mean, running_var,
            True, momentum, eps, torch.backends.cudnn.enabled,
        )  # fmt: skip
    y, mean, inverse = _forward(x, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        update_running(running_mean, running_var, mean, inverse, y, momentum, eps)
    return y


def check_running(op: str, running_mean: Tensor | None, running_var: Tensor | None) -> None:
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            f"{op}: running_mean, running_var: expected two tensors or two None, got one of each"
        )


def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    mean: Tensor,
    inverse: Tensor,
    y: Tensor,
    momentum: float,
    eps: float,
) -> None:
    """Move running statistics [C] towards those of the batch that ``y`` was normalised with."""
    with torch.no_grad():
        count = y.numel() // y.shape[1]
        unbiased = (inverse.pow(-2) - eps).mul_(count / (count - 1))
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(unbiased, momentum)
