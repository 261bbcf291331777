"""A convolution of signs with a gradient, for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fastbandit._modes import result_dtype
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
    pad_plus_one,
)
from fastbandit.ops.binary_pack import pack, unpack
from fastbandit.ops.depthwise_conv2d import _backward_input, _backward_weight
from fastbandit.ops.sign_ste import (
    ESTIMATORS,
    Estimator,
    check_choice,
    differentiable_sign,
    kept_of,
    sign,
    through,
)

__all__ = ["binary_conv2d_ste", "of_layer", "weight_scale"]

WeightEstimator = Literal["clip", "scaled", "identity"]
Scale = Literal["filter", "layer", "none"]

WEIGHT_ESTIMATORS = ("clip", "scaled", "identity")
SCALES = ("filter", "layer", "none")


# --- binary_conv2d_ste ----------------------------------------------------------------------------


def _mean_size(weight: Tensor, alpha: str) -> Tensor:
    """The mean magnitude of each filter's weights, or for each that of all weights: [C_out]."""
    if alpha == "layer":
        return weight.abs().mean().expand(weight.shape[0])
    return weight.abs().mean((1, 2, 3))


def weight_scale(weight: Tensor, alpha: str) -> Tensor | None:
    """The scale of each filter: float32 [C_out] (float64 for such weights), None for 1.

    ``filter``: the mean magnitude of the filter's weights; ``layer``: that of all weights.
    """
    if alpha == "none":
        return None
    weight = weight.detach()
    return _mean_size(weight.to(_linf.compute_dtype(weight.dtype)), alpha).contiguous()


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
    signs = differentiable_sign(x.to(dtype), ste)
    latent = weight.to(dtype)
    binary = differentiable_sign(latent, "identity" if weight_ste == "identity" else "clip")
    if plus_one:
        signs, padding = pad_plus_one(signs, padding)
    # Not rounded to integers, which would have no derivative; a library that is not exact here
    # serves no transform.
    y = exact_conv2d(signs, binary, stride, padding, dilation, groups)
    scale = weight_scale(latent, alpha)
    if scale is not None and weight_ste == "scaled":
        scale = _mean_size(latent, alpha)
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
        # For the gradient of x a bit of each of its values, whether it lies inside, or x itself;
        # for that of the weight the sign of each.
        whole, mask = kept_of(x, ste) if ctx.needs_input_grad[0] else (None, None)
        signs = bits if whole is None and ctx.needs_input_grad[1] else None
        ctx.save_for_backward(weight, whole, mask, signs)
        ctx.conv = (stride, padding, dilation, groups, plus_one)
        ctx.estimators = (alpha, ste, weight_ste)
        ctx.x = (x.shape, x.dtype, _convolution.memory_format(x))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("binary_conv2d_ste", grad)
        weight, x, mask, bits = ctx.saved_tensors
        alpha, ste, weight_ste = ctx.estimators
        shape, dtype, layout = ctx.x
        wanted = (
            ctx.needs_input_grad[0],
            ctx.needs_input_grad[1] and _convolution.gradient_wanted(ctx, 1),
        )
        if not wanted[1]:  # the gradient of x asks for the shape alone
            signs = torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=layout)
        elif x is not None:
            signs = sign(x).to(grad.dtype)
        else:
            signs = below_autograd(unpack, bits, shape[1], grad.dtype, layout)
        scale = weight_scale(weight, alpha)
        binary = sign(weight)
        filters = binary if scale is None else binary * scale.view(-1, 1, 1, 1)
        grad_signs, grad_binary = _conv_backward(
            grad, signs, filters.to(grad.dtype), ctx.conv, wanted
        )
        grad_x = grad_weight = None
        if wanted[0]:
            grad_x = through(grad_signs, x, mask, ste).to(dtype)
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
        signs, padding = pad_plus_one(signs, padding)
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
    along = grad * sign(weight).to(grad.dtype)
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


_OP = "binary_conv2d_ste"


def _check(
    x: Tensor,
    weight: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    alpha: str,
    ste: str,
    weight_ste: str,
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Refuse what is wrong with the arguments; stride, padding and dilation as pairs."""
    _linf.check_tensors(_OP, x=x, weight=weight)
    _convolution.check_input(_OP, x)
    if weight.dtype not in _linf.FLOAT_TYPES or (
        weight.dtype == torch.float64 and x.dtype != torch.float64
    ):
        raise TypeError(
            f"{_OP}: weight: expected torch.float32, bfloat16 or float16, or float64 as x, got "
            f"{weight.dtype}"
        )
    _linf.check_device(_OP, "weight", weight, "x", x)
    channels, shape = x.shape[1], weight.shape
    check_groups(_OP, groups, channels)
    expected = f"(C_out, {channels}, kh, kw)" if groups == 1 else f"({channels}, 1, kh, kw)"
    if (
        len(shape) != 4
        or shape[1] * groups != channels
        or (groups > 1 and shape[0] != channels)
        or min(shape) < 1
    ):
        raise ValueError(f"{_OP}: weight: expected shape {expected}, got {tuple(shape)}")
    stride = _convolution.pair(_OP, "stride", stride, 1)
    padding = _convolution.pair(_OP, "padding", padding, 0)
    dilation = _convolution.pair(_OP, "dilation", dilation, 1)
    check_choice(_OP, "alpha", alpha, SCALES)
    check_choice(_OP, "ste", ste, ESTIMATORS)
    check_choice(_OP, "weight_ste", weight_ste, WEIGHT_ESTIMATORS)
    kernel = (shape[2], shape[3])
    check_sum(_OP, shape[1] * kernel[0] * kernel[1])
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"{_OP}: x: expected at least one row and column, got {tuple(x.shape)}")
    _convolution.check_output(_OP, x, shape[0], kernel, stride, padding, dilation)
    return stride, padding, dilation


def _compute(x: Tensor, weight: Tensor, *settings: Any) -> Tensor:
    """The op of arguments that were checked."""
    if torch.compiler.is_exporting() or forward_mode():
        return _twin(x, weight, *settings)
    y: Tensor = _conv_ste(x, weight, *settings)
    return y


def of_layer(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    alpha: Scale,
    ste: Estimator,
    weight_ste: WeightEstimator,
    pad: Literal["zero", "plus_one"],
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`binary_conv2d_ste` with the settings of a layer, which are known to be right.

    The checks would take longer than the op on a small map. A map that is not of the usual form
    goes through them.

    Args:
        out_dtype: of the result; None: as autocast says, else the dtype of x.
    """
    if (
        not (
            type(x) is Tensor
            and x.dtype in _linf.FLOAT_TYPES
            and (weight.dtype != torch.float64 or x.dtype == torch.float64)
            and x.dim() == 4
            and x.shape[1] == weight.shape[1] * groups
            and x.shape[2] * x.shape[3] > 0
            and x.device == weight.device
            and 2 * padding == dilation * (weight.shape[2] - 1) == dilation * (weight.shape[3] - 1)
        )
        or torch.compiler.is_compiling()
    ):
        _check(x, weight, stride, padding, dilation, groups, alpha, ste, weight_ste)
    pairs = ([stride] * 2, [padding] * 2, [dilation] * 2)
    plus_one = check_pad(_OP, pad)
    out_dtype = out_dtype or result_dtype(x)
    needed = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if needed or torch.compiler.is_compiling() or differentiated_by_torch():
        return _compute(x, weight, *pairs, groups, alpha, ste, weight_ste, plus_one, out_dtype)
    return _packed_conv(x, weight, *pairs, groups, alpha, plus_one, out_dtype)[0]


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
        weight: [C_out, C / groups, kh, kw], the latent weights: float32, bfloat16 or float16, or
            float64 where x is.
        stride, padding, dilation: an int, or two for height and width.
        groups: 1 or C, a filter for each channel (then C_out = C).
        alpha: the scale of a filter: the mean magnitude of its weights (``filter``), that of all
            weights (``layer``), or 1 (``none``).
        ste: the derivative that stands for that of the sign of x, see :func:`sign_ste`.
        weight_ste: the same for the weights: ``clip``, alpha g where ``|w| <= 1``, else 0, with
            alpha as a constant; ``scaled``, the same plus the derivative of alpha, sign(w)
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
    stride, padding, dilation = _check(
        x, weight, stride, padding, dilation, groups, alpha, ste, weight_ste
    )
    plus_one = check_pad(_OP, pad)
    estimators = (alpha, ste, weight_ste, plus_one)
    return _compute(x, weight, stride, padding, dilation, groups, *estimators, result_dtype(x))
