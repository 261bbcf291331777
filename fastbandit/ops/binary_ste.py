"""Signs with a gradient: straight-through estimators, and a convolution of signs for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit._modes import autocast_dtype
from fastbandit.ops import _convolution, _linf
from fastbandit.ops._convolution import Pair
from fastbandit.ops._register import (
    below_autograd,
    define,
    differentiated_by_torch,
    forward_mode,
    refuse_second_derivative,
)
from fastbandit.ops.binary_conv2d import (
    affine,
    check_groups,
    check_pad,
    check_sum,
    conv,
    exact_conv2d,
)
from fastbandit.ops.binary_pack import pack, unpack, words_of
from fastbandit.ops.depthwise_conv2d import _backward_input, _backward_weight

__all__ = ["binary_conv2d_ste", "sign_ste", "weight_scale"]

Estimator = Literal["poly", "clip", "tanh", "identity"]
WeightEstimator = Literal["clip", "scaled", "identity"]
Scale = Literal["filter", "layer", "none"]

ESTIMATORS = ("poly", "clip", "tanh", "identity")
WEIGHT_ESTIMATORS = ("clip", "scaled", "identity")
SCALES = ("filter", "layer", "none")

_SLOPE = 2.0  # of the hyperbolic tangent at 0


# --- Estimators -----------------------------------------------------------------------------------


def _sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1, in the dtype of x."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def _surrogate(x: Tensor, ste: str) -> Tensor:
    """The function whose derivative stands for that of the sign."""
    if ste == "identity":
        return x
    if ste == "tanh":
        return (_SLOPE * x).tanh()
    x = torch.where(x.isnan(), -1.0, x).clamp(-1, 1)
    return x if ste == "clip" else x * (2 - x.abs())


def _slope(x: Tensor, ste: str) -> Tensor:
    """The derivative of :func:`_surrogate`; NaN lies outside."""
    if ste == "tanh":
        return _SLOPE * (1 - (_SLOPE * x).tanh().square())
    magnitude = x.abs()
    return torch.where(magnitude <= 1, 2 - 2 * magnitude, 0.0)


def _differentiable_sign(x: Tensor, ste: str) -> Tensor:
    """The sign with the derivatives of the surrogate, in torch's operations."""
    smooth = _surrogate(x, ste)
    return _sign(x.detach()) + (smooth - smooth.detach())


def _inside(x: Tensor) -> Tensor:
    """1 - |x|: not below 0 exactly where |x| <= 1, whatever the dtype rounds."""
    return 1 - x.abs()


def _packed(x: Tensor, ste: str) -> Tensor:
    """What ``clip`` keeps of x: a bit for each value; nothing for the others."""
    if ste == "clip" and x.shape[1] > 0:
        return below_autograd(pack, _inside(x.detach()), None)
    return torch.empty((x.shape[0], *x.shape[2:], 0), dtype=torch.int64, device=x.device)


def _through(grad: Tensor, x: Tensor | None, mask: Tensor | None, ste: str) -> Tensor:
    """The gradient of the sign's input from that of its output."""
    if ste == "identity":
        return grad
    if mask is not None:
        kept = below_autograd(
            unpack, mask, grad.shape[1], grad.dtype, _convolution.memory_format(grad)
        )
        return torch.where(kept > 0, grad, 0.0)
    assert x is not None
    slope = _slope(x.to(_linf.compute_dtype(x.dtype)), ste)
    return grad * slope.to(grad.dtype)


# --- sign_ste -------------------------------------------------------------------------------------


def _sign_reference(
    x: Tensor,  # [N, C, H, W]
    ste: str,
) -> tuple[Tensor, Tensor]:
    if differentiated_by_torch():
        y = _differentiable_sign(x, ste)
    else:
        y = _convolution.in_layout(_sign(x), _convolution.memory_format(x))
    return y, _packed(x, ste)


def _sign_fake(x: Tensor, ste: str) -> tuple[Tensor, Tensor]:
    n, channels, height, width = x.shape
    y = torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=_convolution.memory_format(x)
    )
    words = words_of(channels) if ste == "clip" else 0
    return y, torch.empty((n, height, width, words), dtype=torch.int64, device=x.device)


class _SignSte(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ste: str) -> tuple[Tensor, Tensor]:
        y, mask = below_autograd(_sign_op, x, ste)
        # A derivative that is 0 or 1 is a bit; another one is a function of the value.
        ctx.save_for_backward(
            x if ste in ("poly", "tanh") else None, mask if ste == "clip" else None
        )
        ctx.ste = ste
        ctx.mark_non_differentiable(mask)
        ctx.set_materialize_grads(False)
        return y, mask

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, None]:
        refuse_second_derivative("sign_ste", grad)
        if grad is None:
            return None, None
        x, mask = ctx.saved_tensors
        return _through(grad, x, mask, ctx.ste), None


_sign_op = define(
    "sign_ste",
    "(Tensor x, str ste) -> (Tensor, Tensor)",
    _sign_reference,
    _sign_fake,
    autograd=_SignSte,
)


def _check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name}: expected one of {', '.join(choices)}, got {value!r}")


def sign_ste(x: Tensor, *, ste: Estimator = "poly") -> Tensor:
    """The sign, with the gradient of a smoother function; differentiable once.

    +1 where x >= 0 (-0.0 too), else -1 (NaN too). The gradient is multiplied by the derivative of

    - ``poly``: a piecewise quadratic, 2 - 2 |x| for |x| <= 1, else 0 (Liu et al., "Bi-Real Net",
      arXiv 1808.00278, Eq. 7);
    - ``clip``: x clamped to [-1, 1], 1 for |x| <= 1, else 0 (Courbariaux et al., "Binarized Neural
      Networks", arXiv 1602.02830, Eq. 4);
    - ``tanh``: tanh(2 x), 2 (1 - tanh(2 x)^2);
    - ``identity``: x, 1.

    For backward ``clip`` keeps a bit for each value and ``identity`` nothing; the derivatives of
    ``poly`` and ``tanh`` are functions of the value, so they keep x. In forward mode and under the
    transforms of torch.func the derivatives are those of the smoother function.

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
    _check_choice(op, "ste", ste, ESTIMATORS)
    if torch.compiler.is_exporting() or forward_mode():
        return _differentiable_sign(x, ste)
    if x.dim() != 4:
        flat: Tensor = _sign_op(x.reshape(1, -1, 1, 1), ste)[0]
        return flat.view(x.shape)
    y: Tensor = _sign_op(x, ste)[0]
    return y


# --- binary_conv2d_ste ----------------------------------------------------------------------------


def weight_scale(weight: Tensor, alpha: str) -> Tensor | None:
    """The scale of each filter: float32 [C_out] (float64 for such weights), None for 1.

    ``filter``: the mean magnitude of the filter's weights; ``layer``: that of all weights.
    """
    weight = weight.detach().to(_linf.compute_dtype(weight.dtype))
    if alpha == "none":
        return None
    if alpha == "layer":
        return weight.abs().mean().expand(weight.shape[0]).contiguous()
    return weight.abs().mean((1, 2, 3))


def pack_weight(weight: Tensor, groups: int) -> Tensor:
    return below_autograd(pack, weight if groups == 1 else weight.transpose(0, 1), None)


def _twin(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: str,
    ste: str,
    weight_ste: str,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """The op in torch's operations, with all their derivatives."""
    dtype = _linf.compute_dtype(x.dtype)
    signs = _differentiable_sign(x.to(dtype), ste)
    latent = weight.to(dtype)
    binary = _differentiable_sign(latent, "identity" if weight_ste == "identity" else "clip")
    if plus_one:
        signs = F.pad(signs, (padding[1], padding[1], padding[0], padding[0]), value=1.0)
        padding = (0, 0)
    # Not rounded to integers, which would have no derivative; a library that is not exact here
    # serves no transform.
    y = exact_conv2d(signs, binary, stride, padding, dilation, groups)
    scale = weight_scale(latent, alpha)
    if scale is not None and weight_ste == "scaled":
        size = latent.abs()
        scale = size.mean().expand(len(latent)) if alpha == "layer" else size.mean((1, 2, 3))
    return affine(y, scale, None, out_dtype)


def _conv_reference(
    x: Tensor,  # [N, C, H, W]
    weight: Tensor,  # [C_out, C / groups, kh, kw]
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: str,
    ste: str,
    weight_ste: str,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    if differentiated_by_torch():
        estimators = (alpha, ste, weight_ste, plus_one)
        return _twin(x, weight, stride, padding, dilation, groups, *estimators, out_dtype)
    return _packed_conv(x, weight, stride, padding, dilation, groups, alpha, plus_one, out_dtype)[0]


def _packed_conv(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: str,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The result, and the packed signs of x: the kernels of evaluation serve training too."""
    bits = below_autograd(pack, x, None)
    y = below_autograd(
        conv,
        bits,
        pack_weight(weight, groups),
        x.shape[1],
        stride,
        padding,
        dilation,
        groups,
        plus_one,
        weight_scale(weight, alpha),
        None,
        out_dtype,
    )
    return y, bits


def _conv_fake(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    alpha: str,
    ste: str,
    weight_ste: str,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    kernel = (weight.shape[2], weight.shape[3])
    height, width = _convolution.output_size(x, kernel, stride, padding, dilation)
    return torch.empty(
        (x.shape[0], weight.shape[0], height, width),
        dtype=out_dtype,
        device=x.device,
        memory_format=torch.channels_last,
    )


class _BinaryConv2dSte(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
        alpha: str,
        ste: str,
        weight_ste: str,
        plus_one: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        y, bits = _packed_conv(
            x, weight, stride, padding, dilation, groups, alpha, plus_one, out_dtype
        )
        # Of each value of x two bits, its sign and whether it lies inside; or x itself.
        whole = ste in ("poly", "tanh")
        ctx.save_for_backward(
            weight,
            x if whole else None,
            None if whole else bits,
            _packed(x, ste) if ste == "clip" else None,
        )
        ctx.conv = (stride, padding, dilation, groups, plus_one)
        ctx.estimators = (alpha, ste, weight_ste)
        ctx.x = (x.dtype, _convolution.memory_format(x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("binary_conv2d_ste", grad)
        weight, x, bits, mask = ctx.saved_tensors
        alpha, ste, weight_ste = ctx.estimators
        dtype, layout = ctx.x
        channels = weight.shape[1] if ctx.conv[3] == 1 else weight.shape[0]
        if x is not None:
            signs = _sign(x).to(grad.dtype)
        else:
            signs = below_autograd(unpack, bits, channels, grad.dtype, layout)
        scale = weight_scale(weight, alpha)
        binary = _sign(weight)
        filters = binary if scale is None else binary * scale.view(-1, 1, 1, 1)
        wanted = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] and _convolution.gradient_wanted(ctx, 1),
        )
        grad_signs, grad_binary = _conv_backward(
            grad, signs, filters.to(grad.dtype), ctx.conv, wanted
        )
        grad_x = grad_weight = None
        if wanted[0]:
            grad_x = _through(grad_signs, x, mask, ste).to(dtype)
        if wanted[1]:
            grad_weight = _weight_gradient(
                grad_binary.to(scale.dtype if scale is not None else weight.dtype),
                weight,
                scale,
                alpha,
                weight_ste,
            ).to(weight.dtype)
        return grad_x, grad_weight, *[None] * 9


def _conv_backward(
    grad: Tensor,
    signs: Tensor,
    filters: Tensor,
    settings: tuple[Sequence[int], Sequence[int], Sequence[int], int, bool],
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of the convolution by its input and by its filters; what is not wanted is None."""
    stride, padding, dilation, groups, plus_one = settings
    rows, columns = signs.shape[2:]
    top, left = padding
    if plus_one:
        signs = F.pad(signs, (left, left, top, top), value=1.0)
        padding = (0, 0)
    grad_signs: Any
    grad_filters: Any
    if groups == 1:
        grad_signs, grad_filters = _convolution.convolution_backward(
            grad, signs, filters, stride, padding, dilation, groups, wanted
        )
    else:
        arguments = (grad, signs, filters, stride, padding, dilation, False)
        grad_signs = below_autograd(_backward_input, *arguments) if wanted[0] else None
        grad_filters = below_autograd(_backward_weight, *arguments) if wanted[1] else None
    if plus_one and grad_signs is not None:
        grad_signs = grad_signs[:, :, top : top + rows, left : left + columns]
    return grad_signs, grad_filters


def _weight_gradient(
    grad: Tensor,  # of alpha sign(W), without alpha
    weight: Tensor,
    scale: Tensor | None,
    alpha: str,
    weight_ste: str,
) -> Tensor:
    through = grad if scale is None else grad * scale.view(-1, 1, 1, 1)
    if weight_ste == "identity":
        return through
    through = torch.where(weight.abs() <= 1, through, 0.0)
    if weight_ste == "clip" or scale is None:
        return through
    # alpha is a mean of magnitudes, whose derivative is the sign.
    binary = torch.where(weight >= 0, 1.0, -1.0).to(grad.dtype)
    along = grad * binary
    mean = along.mean((1, 2, 3), keepdim=True)
    if alpha == "layer":
        mean = along.mean()
    return through + torch.sgn(weight).to(grad.dtype) * mean


_conv_ste = define(
    "binary_conv2d_ste",
    "(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, int groups, "
    "str alpha, str ste, str weight_ste, bool plus_one, ScalarType out_dtype) -> Tensor",
    _conv_reference,
    _conv_fake,
    autograd=_BinaryConv2dSte,
)


def binary_conv2d_ste(
    x: Tensor,
    weight: Tensor,
    *,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    alpha: Scale = "filter",
    ste: Estimator = "poly",
    weight_ste: WeightEstimator = "clip",
    pad: Literal["zero", "plus_one"] = "zero",
) -> Tensor:
    """Convolve the signs of x with ``alpha sign(weight)``; differentiable once.

    The op to train a 1-bit convolution with. Its forward is that of the packed network,
    ``binary_conv2d(pack_sign(x), pack_sign(weight), ..., scale=alpha)``, so both give the same
    bits: an exact sum of +1 and -1, times alpha, rounded once in float32.

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16, any strides; N may be 0.
        weight: [C_out, C / groups, kh, kw], the latent weights: float32, or the dtype of x.
        stride, padding, dilation: an int, or two for height and width.
        groups: 1 or C, a filter for each channel (then C_out = C).
        alpha: the scale of a filter: the mean magnitude of its weights (``filter``), that of all
            weights (``layer``), or 1 (``none``).
        ste: the derivative that stands for that of the sign of x, see :func:`sign_ste`.
        weight_ste: the same for the weights: ``clip``, alpha g where |w| <= 1, else 0, with alpha
            as a constant; ``scaled``, the same plus the derivative of alpha, sign(w)
            mean(g sign(w)); ``identity``, alpha g. g is the gradient of the filter
            ``alpha sign(w)``.
        pad: what lies around the map of signs, ``zero`` or ``plus_one``.

    Under autocast the result has its dtype. The signs are those of x and weight as they are: a
    small value that this dtype rounds to 0 keeps its sign.

    For backward it keeps the weight, and of each value of x two bits with ``clip`` (its sign, and
    whether it lies in [-1, 1]), one with ``identity``, and x itself with ``poly`` and ``tanh``,
    whose derivatives are functions of the value.

    Returns:
        [N, C_out, H_out, W_out] in the dtype of x, channels-last.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape or number is not one of those above, or the kernel does not fit.
        RuntimeError: devices differ, or a second derivative is asked for.

    Source: Rastegari et al., "XNOR-Net", arXiv 1603.05279, Eqs. (6) and (11); *Binary Neural
    Networks*, section 4.3.
    """
    op = "binary_conv2d_ste"
    _linf.check_tensors(op, x=x, weight=weight)
    _convolution.check_input(op, x)
    if weight.dtype not in (torch.float32, x.dtype):
        wider = "" if x.dtype == torch.float32 else f" or {x.dtype} as x"
        raise TypeError(f"{op}: weight: expected torch.float32{wider}, got {weight.dtype}")
    _linf.check_device(op, "weight", weight, "x", x)
    channels, shape = x.shape[1], weight.shape
    check_groups(op, groups, channels)
    expected = f"(C_out, {channels}, kh, kw)" if groups == 1 else f"({channels}, 1, kh, kw)"
    if (
        len(shape) != 4
        or shape[1] * groups != channels
        or (groups > 1 and shape[0] != channels)
        or min(shape) < 1
    ):
        raise ValueError(f"{op}: weight: expected shape {expected}, got {tuple(shape)}")
    stride = _convolution.pair(op, "stride", stride, 1)
    padding = _convolution.pair(op, "padding", padding, 0)
    dilation = _convolution.pair(op, "dilation", dilation, 1)
    _check_choice(op, "alpha", alpha, SCALES)
    _check_choice(op, "ste", ste, ESTIMATORS)
    _check_choice(op, "weight_ste", weight_ste, WEIGHT_ESTIMATORS)
    plus_one = check_pad(op, pad)
    kernel = (shape[2], shape[3])
    check_sum(op, shape[1] * kernel[0] * kernel[1])
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{op}: x: expected at least one row and column, got {tuple(x.shape)}")
    _convolution.check_output(op, x, shape[0], kernel, stride, padding, dilation)
    arguments = (stride, padding, dilation, groups, alpha, ste, weight_ste, plus_one)
    out_dtype = autocast_dtype(x) or x.dtype
    if torch.compiler.is_exporting() or forward_mode():
        return _twin(x, weight, *arguments, out_dtype)
    y: Tensor = _conv_ste(x, weight, *arguments, out_dtype)
    return y
