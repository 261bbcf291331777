"""Gabor filter bank and Gabor convolution, differentiable in the five parameters of each filter.

On the integer grid of a k x k window, x over rows and y over columns, both from -(k // 2) to
k // 2:

    G(x, y) = exp(-(x'^2 + gamma^2 y'^2) / (2 sigma^2)) cos(2 pi x' / wavelength + psi)
    x' =  x cos(theta) + y sin(theta)
    y' = -x sin(theta) + y cos(theta)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbandit._modes import autocast_dtype
from fastbandit.ops import _convolution
from fastbandit.ops._convolution import Pair
from fastbandit.ops._linf import FLOAT_TYPES, HALF_TYPES, check_tensors, compute_dtype
from fastbandit.ops._register import (
    below_autograd,
    define,
    forward_mode,
    refuse_second_derivative,
)

__all__ = ["gabor_conv2d", "gabor_filters"]

Parameters = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

_NAMES = ("theta", "sigma", "gamma", "wavelength", "psi")
_MOST_SIZE = (1 << 15) - 1  # as in csrc/conv_checks.h


# --- References: the filter bank ------------------------------------------------------------------


def _grid(theta: Tensor, kernel_size: int) -> tuple[Tensor, Tensor]:
    """Rotated coordinates x' and y', each [C_out, k, k]."""
    half = kernel_size // 2
    ticks = torch.arange(-half, half + 1, dtype=theta.dtype, device=theta.device)
    rows, columns = ticks[:, None], ticks[None, :]
    cos, sin = theta.cos(), theta.sin()
    return rows * cos + columns * sin, columns * cos - rows * sin


def _columns(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters in the dtype of the computation, each [C_out, 1, 1]."""
    return [p.to(compute_dtype(p.dtype))[:, None, None] for p in parameters]


def _filters_reference(
    theta: Tensor, sigma: Tensor, gamma: Tensor, wavelength: Tensor, psi: Tensor, kernel_size: int
) -> Tensor:
    dtype = theta.dtype
    theta, sigma, gamma, wavelength, psi = _columns((theta, sigma, gamma, wavelength, psi))
    across, along = _grid(theta, kernel_size)
    envelope = torch.exp((across.square() + (gamma * along).square()) / (-2 * sigma.square()))
    carrier = torch.cos(2 * math.pi * across / wavelength + psi)
    return (envelope * carrier).to(dtype)


def _filters_backward_reference(
    grad: Tensor,  # [C_out, k, k]
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
) -> Parameters:
    dtype = theta.dtype
    theta, sigma, gamma, wavelength, psi = _columns((theta, sigma, gamma, wavelength, psi))
    grad = grad.to(theta.dtype)
    across, along = _grid(theta, kernel_size)
    variance = sigma.square()
    squares = across.square() + (gamma * along).square()
    envelope = torch.exp(squares / (-2 * variance))
    phase = 2 * math.pi * across / wavelength + psi
    even = grad * envelope * phase.cos()  # grad * G
    odd = grad * envelope * phase.sin()  # -grad * dG/dphase
    # With dx'/dtheta = y' and dy'/dtheta = -x'.
    frequency = 2 * math.pi / wavelength
    by_theta = even * across * along * (gamma.square() - 1) / variance - odd * frequency * along
    by_sigma = even * squares / (variance * sigma)
    by_gamma = -even * gamma * along.square() / variance
    by_wavelength = odd * frequency * across / wavelength
    result = tuple(
        gradient.sum((1, 2)).to(dtype)
        for gradient in (by_theta, by_sigma, by_gamma, by_wavelength, -odd)
    )
    return result  # type: ignore[return-value]


# --- References: the convolution ------------------------------------------------------------------


def _channel_sum(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, 1, H, W], accumulated and returned in float32 for half types."""
    return x.sum(1, keepdim=True, dtype=compute_dtype(x.dtype))


def _conv_reference(
    x: Tensor,  # [N, C, H, W]
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    bank = _filters_reference(theta, sigma, gamma, wavelength, psi, kernel_size)
    total = _channel_sum(x).to(x.dtype)
    y = F.conv2d(total, bank[:, None].to(x.dtype), None, stride, padding, dilation)
    return _convolution.in_layout(y, _convolution.memory_format(x))


def _conv_backward_reference(
    grad: Tensor,  # [N, C_out, H_out, W_out]
    x: Tensor,
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the channel sum, [N, 1, H, W], and of the five parameters."""
    parameters = (theta, sigma, gamma, wavelength, psi)
    bank = _filters_reference(*parameters, kernel_size)[:, None]  # [C_out, 1, k, k]
    grad_x = x.new_empty(0)
    if output_mask[0]:
        total = x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]))  # only its shape is used
        grad_total = _convolution.convolution_backward(
            grad, total, bank.to(x.dtype), stride, padding, dilation, 1, (True, False)
        )[0]
        grad_x = grad_total.contiguous()
    grad_parameters: Sequence[Tensor] = [p.new_empty(0) for p in parameters]
    if output_mask[1]:
        # In float32 for half types: the parameters are, and a sum over all pixels should be.
        total = _channel_sum(x)
        bank = bank.to(total.dtype)
        grad_bank = _convolution.convolution_backward(
            grad.to(total.dtype), total, bank, stride, padding, dilation, 1, (False, True)
        )[1]
        grad_parameters = _filters_backward_reference(grad_bank[:, 0], *parameters, kernel_size)
    return (grad_x, *grad_parameters)  # type: ignore[return-value]


# --- Fake kernels ---------------------------------------------------------------------------------


def _filters_fake(
    theta: Tensor, sigma: Tensor, gamma: Tensor, wavelength: Tensor, psi: Tensor, kernel_size: int
) -> Tensor:
    return theta.new_empty((theta.shape[0], kernel_size, kernel_size))


def _filters_backward_fake(
    grad: Tensor,
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
) -> Parameters:
    shape = theta.shape
    return (
        theta.new_empty(shape),
        sigma.new_empty(shape),
        gamma.new_empty(shape),
        wavelength.new_empty(shape),
        psi.new_empty(shape),
    )


def _conv_fake(
    x: Tensor,
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    kernel = (kernel_size, kernel_size)
    height, width = _convolution.output_size(x, kernel, stride, padding, dilation)
    return torch.empty(
        (x.shape[0], theta.shape[0], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=_convolution.memory_format(x),
    )


def _conv_backward_fake(
    grad: Tensor,
    x: Tensor,
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if output_mask[0]:
        grad_x = x.new_empty((x.shape[0], 1, x.shape[2], x.shape[3]))
    else:
        grad_x = x.new_empty(0)
    shape = theta.shape if output_mask[1] else (0,)
    return (
        grad_x,
        theta.new_empty(shape),
        sigma.new_empty(shape),
        gamma.new_empty(shape),
        wavelength.new_empty(shape),
        psi.new_empty(shape),
    )


# --- The ops --------------------------------------------------------------------------------------


class _GaborFilters(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        sigma: Tensor,
        gamma: Tensor,
        wavelength: Tensor,
        psi: Tensor,
        kernel_size: int,
    ) -> Tensor:
        ctx.save_for_backward(theta, sigma, gamma, wavelength, psi)
        ctx.kernel_size = kernel_size
        return below_autograd(_filters, theta, sigma, gamma, wavelength, psi, kernel_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gabor_filters", grad)
        gradients = below_autograd(_filters_backward, grad, *ctx.saved_tensors, ctx.kernel_size)
        return (*gradients, None)


class _GaborConv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        theta: Tensor,
        sigma: Tensor,
        gamma: Tensor,
        wavelength: Tensor,
        psi: Tensor,
        kernel_size: int,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
    ) -> Tensor:
        tensors = (x, theta, sigma, gamma, wavelength, psi)
        settings = (kernel_size, stride, padding, dilation)
        ctx.save_for_backward(*tensors)
        ctx.settings = settings
        return below_autograd(_conv, *tensors, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("gabor_conv2d", grad)
        needed = ctx.needs_input_grad
        mask = (needed[0], any(needed[1:6]) and _convolution.gradient_wanted(ctx, 1, 2, 3, 4, 5))
        # Read once: activation checkpointing computes what was saved anew, for one reading.
        tensors = ctx.saved_tensors
        gradients = below_autograd(_conv_backward, grad, *tensors, *ctx.settings, mask)
        # What was masked out is an empty tensor, and nothing for autograd. The gradient of x is the
        # same for every channel: expanded, as that of a sum is, and not written C times.
        grad_x = gradients[0].expand(tensors[0].shape) if needed[0] else None
        wanted = (gradients[i] if mask[1] and needed[i] else None for i in range(1, 6))
        return (grad_x, *wanted, None, None, None, None)


_PARAMETERS = "Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength, Tensor psi"
_SETTINGS = "int kernel_size, int[2] stride, int[2] padding, int[2] dilation"

_filters = define(
    "gabor_filters",
    f"({_PARAMETERS}, int kernel_size) -> Tensor",
    _filters_reference,
    _filters_fake,
    autograd=_GaborFilters,
)
_filters_backward = define(
    "gabor_filters_backward",
    f"(Tensor grad, {_PARAMETERS}, int kernel_size) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _filters_backward_reference,
    _filters_backward_fake,
)
_conv = define(
    "gabor_conv2d",
    f"(Tensor x, {_PARAMETERS}, {_SETTINGS}) -> Tensor",
    _conv_reference,
    _conv_fake,
    autograd=_GaborConv2d,
)
_conv_backward = define(
    "gabor_conv2d_backward",
    f"(Tensor grad, Tensor x, {_PARAMETERS}, {_SETTINGS}, bool[2] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _conv_backward_reference,
    _conv_backward_fake,
)


# Of the 1 -> C_out convolution that is really computed, a multiply-add counted as two; neither
# the channel sum (N C H W additions) nor the filter bank is counted, as torch's formulas count no
# pointwise work.


@register_flop_formula(torch.ops.fastbandit.gabor_conv2d)
def _flops(*args: Any, out_shape: list[int], **_: Any) -> int:
    kernel_size = args[6]
    return 2 * math.prod(out_shape) * kernel_size**2


@register_flop_formula(torch.ops.fastbandit.gabor_conv2d_backward)
def _backward_flops(grad: list[int], *args: Any, **_: Any) -> int:
    kernel_size, output_mask = args[6], args[10]
    return sum(output_mask) * 2 * math.prod(grad) * kernel_size**2


# --- Public functions -----------------------------------------------------------------------------


def check_vectors(op: str, names: Sequence[str], vectors: Sequence[Tensor]) -> None:
    """Parameters of filters: [C_out] each, of one dtype and on one device; theta is the first."""
    check_tensors(op, **dict(zip(names, vectors, strict=True)))
    theta = vectors[0]
    if theta.dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{op}: theta: expected float32, float64, bfloat16 or float16, got {theta.dtype}"
        )
    if theta.dim() != 1 or theta.shape[0] == 0:
        raise ValueError(
            f"{op}: theta: expected shape (C_out,), one value for each filter, "
            f"got {tuple(theta.shape)}"
        )
    for name, parameter in zip(names[1:], vectors[1:], strict=True):
        if parameter.dtype != theta.dtype:
            raise TypeError(f"{op}: {name}: expected {theta.dtype} as theta, got {parameter.dtype}")
        if parameter.shape != theta.shape:
            raise ValueError(
                f"{op}: {name}: expected shape {tuple(theta.shape)} as theta, "
                f"got {tuple(parameter.shape)}"
            )
        if parameter.device != theta.device:
            raise RuntimeError(
                f"{op}: {name}: expected device {theta.device} as theta, got {parameter.device}"
            )


def _check_parameters(op: str, parameters: Parameters, kernel_size: int) -> None:
    check_vectors(op, _NAMES, parameters)
    if not isinstance(kernel_size, int) or isinstance(kernel_size, bool):
        raise TypeError(f"{op}: kernel_size: expected an odd int, got {type(kernel_size).__name__}")
    if not 1 <= kernel_size <= _MOST_SIZE or kernel_size % 2 == 0:
        raise ValueError(
            f"{op}: kernel_size: expected an odd int from 1 to {_MOST_SIZE}, got {kernel_size}"
        )


def gabor_filters(
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    kernel_size: int,
) -> Tensor:
    """Sample C_out Gabor functions on a k x k window; differentiable once in all five parameters.

    ``G(x, y) = exp(-(x'^2 + gamma^2 y'^2) / (2 sigma^2)) cos(2 pi x' / wavelength + psi)`` with
    ``x' = x cos(theta) + y sin(theta)``, ``y' = -x sin(theta) + y cos(theta)``; x runs over the
    rows and y over the columns, from -(k // 2) to k // 2. Computed in float32 at least.

    Args:
        theta: orientation of the normal to the stripes, radians, [C_out]; float32, float64,
            bfloat16 or float16.
        sigma: standard deviation of the envelope along x', pixels, not 0; as theta.
        gamma: aspect ratio, the envelope along y' has the deviation sigma / gamma; as theta.
        wavelength: of the cosine, pixels, not 0; as theta.
        psi: phase of the cosine, radians; as theta.
        kernel_size: k, odd, at most 32767.

    Returns:
        [C_out, k, k] in the dtype of the parameters. A sigma or wavelength of 0 is not detected
        (that would wait for the device) and gives NaN.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: shapes differ, or ``kernel_size`` is even or out of its range.
        RuntimeError: devices differ, or a second derivative is asked for.

    Source: *Binary Neural Networks* (Zhang, Xu et al.), section 4.2, where the filter is one of
    the operations of the search space.
    """
    _check_parameters("gabor_filters", (theta, sigma, gamma, wavelength, psi), kernel_size)
    parameters = (theta, sigma, gamma, wavelength, psi)
    # An exported program runs where this package is not.
    if torch.compiler.is_exporting() or forward_mode():
        return _filters_reference(*parameters, kernel_size)
    return _filters(*parameters, kernel_size)


def gabor_conv2d(
    x: Tensor,
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    psi: Tensor,
    *,
    kernel_size: int = 3,
    stride: Pair = 1,
    padding: Pair = 1,
    dilation: Pair = 1,
) -> Tensor:
    """Convolve with Gabor filters that are the same for every input channel; differentiable once.

    The same as ``F.conv2d(x, gabor_filters(...)[:, None].expand(-1, C, -1, -1), None, stride,
    padding, dilation)``, computed as what it is: a sum over the input channels, then a
    convolution from 1 to C_out channels. Sums are accumulated in float32 at least. For bfloat16
    and float16 the channel sum and the filters may be rounded to the dtype of x in between; the
    gradients of the parameters are computed in float32.

    Args:
        x: [N, C, H, W], float32, float64, bfloat16 or float16, any strides; N may be 0.
        theta, sigma, gamma, wavelength, psi: [C_out], as for :func:`gabor_filters`, all in the
            dtype of x, or in float32 if x is bfloat16 or float16.
        kernel_size: k, odd.
        stride, padding, dilation: an int, or two for height and width.

    Under autocast, x is cast to its dtype first; the parameters keep theirs.

    Returns:
        [N, C_out, H_out, W_out] in the dtype of x, with
        ``H_out = (H + 2 padding - dilation (k - 1) - 1) // stride + 1``; channels-last if x is.

    Raises:
        TypeError, RuntimeError: as :func:`gabor_filters`.
        ValueError: likewise, and where the kernel does not fit.
    """
    op = "gabor_conv2d"
    check_tensors(op, x=x)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x = x.to(dtype)
    _convolution.check_input(op, x)
    _check_parameters(op, (theta, sigma, gamma, wavelength, psi), kernel_size)
    if theta.dtype != x.dtype and not (theta.dtype == torch.float32 and x.dtype in HALF_TYPES):
        raise TypeError(
            f"{op}: theta: expected {x.dtype} as x"
            f"{' or torch.float32' if x.dtype in HALF_TYPES else ''}, got {theta.dtype}"
        )
    if theta.device != x.device:
        raise RuntimeError(f"{op}: theta: expected device {x.device} as x, got {theta.device}")
    stride = _convolution.pair(op, "stride", stride, 1)
    padding = _convolution.pair(op, "padding", padding, 0)
    dilation = _convolution.pair(op, "dilation", dilation, 1)
    kernel = (kernel_size, kernel_size)
    _convolution.check_output(op, x, theta.shape[0], kernel, stride, padding, dilation)
    arguments = (x, theta, sigma, gamma, wavelength, psi, kernel_size, stride, padding, dilation)
    if torch.compiler.is_exporting() or forward_mode():
        return _conv_reference(*arguments)
    return _conv(*arguments)
