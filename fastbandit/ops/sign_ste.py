"""The sign with a gradient: straight-through estimators."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import torch
from torch import Tensor

from fastbandit.ops import _convolution, _linf
from fastbandit.ops._register import (
    below_autograd,
    define,
    differentiated_by_torch,
    forward_mode,
    refuse_second_derivative,
)
from fastbandit.ops.binary_pack import pack, unpack

__all__ = ["sign_ste"]

Estimator = Literal["poly", "clip", "tanh", "identity"]

ESTIMATORS = ("poly", "clip", "tanh", "identity")

_SLOPE = 2.0  # of the hyperbolic tangent at 0


# --- Estimators -----------------------------------------------------------------------------------


def sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, in the dtype of x."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _surrogate(x: Tensor, ste: str) -> Tensor:
    """The function whose derivative stands for that of the sign; finite for every x."""
    if ste == "identity":
        return torch.where(x.isfinite(), x, 0.0)
    x = torch.where(x.isnan(), -1.0, x)  # where it has no slope
    if ste == "tanh":
        return (_SLOPE * x).tanh()
    x = x.clamp(-1, 1)
    return x if ste == "clip" else x * (2 - x.abs())


def _slope(x: Tensor, ste: str) -> Tensor:
    """The derivative of :func:`_surrogate`; NaN lies outside."""
    if ste == "tanh":
        return torch.where(x.isnan(), 0.0, _SLOPE * (1 - (_SLOPE * x).tanh().square()))
    magnitude = x.abs()
    return torch.where(magnitude <= 1, 2 - 2 * magnitude, 0.0)


# What an exporter puts in place of every sign, see exported_signs.
_exported: ContextVar[Callable[[Tensor], Tensor] | None] = ContextVar("_exported", default=None)


@contextmanager
def exported_signs(function: Callable[[Tensor], Tensor] = sign) -> Iterator[None]:
    """Within it a program that is exported has ``function`` for every sign, without a surrogate.

    Args:
        function: of a tensor; gives +1 and -1 in its shape and dtype.
    """
    token = _exported.set(function)
    try:
        yield
    finally:
        _exported.reset(token)


def differentiable_sign(x: Tensor, ste: str) -> Tensor:
    """The sign with the derivatives of the surrogate, in torch's operations."""
    exported = _exported.get()
    if exported is not None and torch.compiler.is_exporting():
        return exported(x)
    smooth = _surrogate(x, ste)
    return sign(x.detach()) + (smooth - smooth.detach())


# --- What backward needs --------------------------------------------------------------------------


def kept_of(x: Tensor, ste: str) -> tuple[Tensor | None, Tensor | None]:
    """What :func:`through` needs of x: x itself, or a bit for each value, or nothing."""
    if ste in ("poly", "tanh"):  # their derivatives are functions of the value
        return x, None
    if ste == "identity" or x.shape[1] == 0:
        return None, None
    # 1 - |x| is not below 0 exactly where |x| <= 1, whatever the dtype rounds.
    return None, below_autograd(pack, 1 - x.detach().abs(), None)


def through(grad: Tensor, x: Tensor | None, mask: Tensor | None, ste: str) -> Tensor:
    """The gradient of the sign's input from that of its output and :func:`kept_of` the input."""
    if mask is not None:
        layout = _convolution.memory_format(grad)
        inside = below_autograd(unpack, mask, grad.shape[1], grad.dtype, layout)
        return torch.where(inside > 0, grad, 0.0)
    if x is None:
        return grad
    slope = _slope(x.to(_linf.compute_dtype(x.dtype)), ste)
    return grad * slope.to(grad.dtype)


# --- The op ---------------------------------------------------------------------------------------


def _reference(
    x: Tensor,  # [N, C, H, W]
    ste: str,
) -> Tensor:
    if differentiated_by_torch():
        return differentiable_sign(x, ste)
    return _convolution.in_layout(sign(x), _convolution.memory_format(x))


def _fake(x: Tensor, ste: str) -> Tensor:
    layout = _convolution.memory_format(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


class _SignSte(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ste: str) -> Tensor:
        ctx.save_for_backward(*kept_of(x, ste))
        ctx.ste = ste
        return below_autograd(_sign_op, x, ste)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative("sign_ste", grad)
        x, mask = ctx.saved_tensors
        return through(grad, x, mask, ctx.ste), None


_sign_op = define("sign_ste", "(Tensor x, str ste) -> Tensor", _reference, _fake, autograd=_SignSte)


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(choices)}, got {value!r}")


def sign_ste(x: Tensor, *, ste: Estimator = "poly") -> Tensor:
    """The sign, with the gradient of a smoother function; differentiable once.

    +1 where x >= 0 (-0.0 too), else -1 (NaN too). The gradient is multiplied by the derivative of

    - ``poly``: a piecewise quadratic, ``2 - 2 |x|`` for ``|x| <= 1``, else 0 (Liu et al.,
      "Bi-Real Net", arXiv 1808.00278, Eq. 7);
    - ``clip``: x clamped to [-1, 1], 1 for ``|x| <= 1``, else 0 (Courbariaux et al.,
      "Binarized Neural Networks", arXiv 1602.02830, Eq. 4);
    - ``tanh``: tanh(2 x), 2 (1 - tanh(2 x)^2);
    - ``identity``: x, 1.

    For backward ``clip`` keeps a bit for each value and ``identity`` nothing; the derivatives of
    ``poly`` and ``tanh`` are functions of the value, so they keep x. In forward mode and under the
    transforms of torch.func the derivatives are those of the smoother function.

    The derivative at NaN and at infinities is 0, except that of ``identity``, which looks at no
    value, and is 0 there only in forward mode, under those transforms and in an exported program.

    Args:
        x: any shape; float32, float64, bfloat16 or float16, any strides.
        ste: one of those above.

    Returns:
        +1 and -1 in the shape and dtype of x; channels-last if x is.

    Raises:
        TypeError: x is no tensor, or its dtype is not one of those above.
        ValueError: another ``ste``.
        RuntimeError: a second derivative is asked for.
    """
    op = "sign_ste"
    _linf.check_tensors(op, x=x)
    if x.dtype not in _linf.FLOAT_TYPES:
        raise TypeError(f"{op}: x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    check_choice(op, "ste", ste, ESTIMATORS)
    if torch.compiler.is_exporting() or forward_mode():
        return differentiable_sign(x, ste)
    if x.dim() != 4:
        flat: Tensor = _sign_op(x.reshape(1, -1, 1, 1), ste)
        return flat.view(x.shape)
    y: Tensor = _sign_op(x, ste)
    return y
