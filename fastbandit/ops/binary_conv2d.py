"""Convolution of packed signs with packed signs; batch norm before a sign as integers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils.flop_counter import register_flop_formula

from fastbandit._modes import autocast_dtype
from fastbandit.ops import _convolution, _linf
from fastbandit.ops._convolution import Pair
from fastbandit.ops._register import MISS, declare_short, define, short_call
from fastbandit.ops.binary_pack import check_bits, unpack_reference, words_from, words_of

__all__ = ["binary_conv2d", "sign_threshold"]

MOST_TAPS = 1 << 24  # products of a sum; below it the reference's float32 is exact
_MOST_INT16 = (1 << 15) - 2  # one past the largest sum is a threshold too

Threshold = tuple[Tensor, Tensor]


# --- References -----------------------------------------------------------------------------------


def signs_of_weight(weight_bits: Tensor, channels: int, groups: int) -> Tensor:
    """Packed filters as +1 and -1 in float32, in the shape that F.conv2d takes."""
    weight = unpack_reference(weight_bits, channels, torch.float32, torch.contiguous_format)
    return weight.transpose(0, 1) if groups > 1 else weight


def pad_plus_one(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
    """The map with +1 around it, and the padding that is left to a convolution: none."""
    top, left = padding
    return F.pad(x, (left, left, top, top), value=1.0), (0, 0)


def integer_conv2d(
    x: Tensor,  # +1 and -1
    weight: Tensor,  # +1 and -1
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plus_one: bool,
) -> Tensor:
    """F.conv2d of integers in float32 or float64: exact."""
    if plus_one:
        x, padding = pad_plus_one(x, padding)
    # A library that multiplies in another domain (Winograd, FFT) is off by less than one half.
    return exact_conv2d(x, weight, stride, padding, dilation, groups).round()


def exact_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """F.conv2d, outside of autocast: bfloat16 has no integers past 256."""
    if autocast_dtype(x) is None:
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    with torch.autocast(x.device.type, enabled=False):
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def affine(
    dot: Tensor, scale: Tensor | None, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``scale * dot + bias``: product and sum each rounded once in float32, or float64 for that."""
    dtype = _linf.compute_dtype(out_dtype)
    y = dot.to(dtype)
    if scale is not None:
        y = scale.to(dtype).view(-1, 1, 1) * y
    if bias is not None:
        y = y + bias.to(dtype).view(-1, 1, 1)
    return _convolution.in_layout(y.to(out_dtype), torch.channels_last)


def _dot(
    bits: Tensor,
    weight_bits: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plus_one: bool,
) -> Tensor:
    x = unpack_reference(bits, channels, torch.float32, torch.channels_last)
    weight = signs_of_weight(weight_bits, channels, groups)
    return integer_conv2d(x, weight, stride, padding, dilation, groups, plus_one)


def reference(
    bits: Tensor,  # int64 [N, H, W, words]
    weight_bits: Tensor,  # int64 [C_out, k, k, words], or [1, k, k, words] for a depthwise one
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plus_one: bool,
    scale: Tensor | None,  # [C_out]
    bias: Tensor | None,  # [C_out]
    out_dtype: torch.dtype,
) -> Tensor:
    dot = _dot(bits, weight_bits, channels, stride, padding, dilation, groups, plus_one)
    return affine(dot, scale, bias, out_dtype)


def bits_reference(
    bits: Tensor,
    weight_bits: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plus_one: bool,
    threshold: Tensor,  # int16 or int32 [C_out]
    flip: Tensor,  # bool [C_out]
) -> Tensor:
    dot = _dot(bits, weight_bits, channels, stride, padding, dilation, groups, plus_one)
    reached = dot.int() >= threshold.int().view(-1, 1, 1)
    return words_from(reached != flip.view(-1, 1, 1))


def _threshold_reference(
    scale: Tensor,  # [C], float32 or float64
    bias: Tensor,
    taps: int,
) -> Threshold:
    flip = scale < 0
    # The bit rises once over the sums in the order of scale * sum. Bisected for the first sum that
    # has it, from -taps - 1 (excluded) to taps + 1 (none has it).
    direction = torch.where(flip, -1, 1)
    low = torch.full_like(direction, -taps - 1)
    high = -low
    for _ in range((2 * taps + 2).bit_length()):
        middle = torch.div(low + high, 2, rounding_mode="floor")
        reached = scale * (direction * middle).to(scale.dtype) + bias >= 0
        inside = high - low > 1
        high = torch.where(inside & reached, middle, high)
        low = torch.where(inside & ~reached, middle, low)
    # At most -high, for a falling one: not at least -high + 1.
    threshold = torch.where(flip, 1 - high, high)
    return threshold.to(threshold_dtype(taps)), flip


def threshold_dtype(taps: int) -> torch.dtype:
    return torch.int16 if taps <= _MOST_INT16 else torch.int32


# --- Fake kernels ---------------------------------------------------------------------------------


def output_size(
    bits: Tensor,
    weight_bits: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> tuple[int, int, int, int]:
    """N, C_out, H_out, W_out."""
    kernel = (weight_bits.shape[1], weight_bits.shape[2])
    map_ = bits.permute(0, 3, 1, 2)
    height, width = _convolution.output_size(map_, kernel, stride, padding, dilation)
    return bits.shape[0], channels if groups > 1 else weight_bits.shape[0], height, width


def _fake(
    bits: Tensor,
    weight_bits: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    plus_one: bool,
    scale: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    shape = output_size(bits, weight_bits, channels, stride, padding, dilation, groups)
    return torch.empty(
        shape, dtype=out_dtype, device=bits.device, memory_format=torch.channels_last
    )


def _bits_fake(
    bits: Tensor,
    weight_bits: Tensor,
    channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *_: Any,
) -> Tensor:
    n, c, height, width = output_size(
        bits, weight_bits, channels, stride, padding, dilation, groups
    )
    return torch.empty((n, height, width, words_of(c)), dtype=torch.int64, device=bits.device)


def _threshold_fake(scale: Tensor, bias: Tensor, taps: int) -> Threshold:
    threshold = torch.empty(scale.shape, dtype=threshold_dtype(taps), device=scale.device)
    return threshold, torch.empty_like(threshold, dtype=torch.bool)


# --- The ops --------------------------------------------------------------------------------------

_SETTINGS = (
    "Tensor bits, Tensor weight_bits, int channels, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, bool plus_one"
)

conv = define(
    "binary_conv2d",
    f"({_SETTINGS}, Tensor? scale, Tensor? bias, ScalarType out_dtype) -> Tensor",
    reference,
    _fake,
)
conv_bits = define(
    "binary_conv2d_bits",
    f"({_SETTINGS}, Tensor threshold, Tensor flip) -> Tensor",
    bits_reference,
    _bits_fake,
)
_threshold = define(
    "sign_threshold",
    "(Tensor scale, Tensor bias, int taps) -> (Tensor, Tensor)",
    _threshold_reference,
    _threshold_fake,
)

_native_conv = short_call(
    declare_short(
        "binary_conv2d",
        "(Tensor bits, Tensor weight_bits, int settings, Tensor? scale, Tensor? bias) -> Tensor",
    )
)
_native_conv_bits = short_call(
    declare_short(
        "binary_conv2d_bits",
        "(Tensor bits, Tensor weight_bits, int settings, Tensor threshold, Tensor flip) -> Tensor",
    )
)

# The numbers of a call in one, from the lowest bit on, as csrc/cpu/binary_conv2d.cpp reads them.
_WIDTHS = {
    "channels": 20, "kernel_size": 6, "stride": 6, "padding": 8, "dilation": 6, "depthwise": 1,
    "plus_one": 1, "out_dtype": 2,
}  # fmt: skip
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@lru_cache(maxsize=4096, typed=True)  # typed: True is no number here
def one_number(
    channels: int,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    pad: str,
    out_dtype: torch.dtype,
) -> int | None:
    """What the short ops take for these settings, or None: they take only the usual ones.

    A kernel size of 0 is that of the filters, whichever it is.

    Raises:
        TypeError: a number is none; so it is not kept.
    """
    numbers = (channels, kernel_size, stride, padding, dilation, groups)
    if any(type(number) is not int for number in numbers):
        raise TypeError("expected ints")
    if groups not in (1, channels) or pad not in ("zero", "plus_one") or out_dtype not in _DTYPES:
        return None
    fields = (*numbers[:5], groups > 1, pad == "plus_one", _DTYPES.index(out_dtype))
    packed = shift = 0
    for value, width in zip(fields, _WIDTHS.values(), strict=True):
        if not 0 <= value < 1 << width:
            return None
        packed |= int(value) << shift
        shift += width
    return packed


def _short(
    bits: Tensor,
    weight_bits: Tensor,
    settings: tuple[Any, ...],
    scale: Tensor | None,
    bias: Tensor | None,
    threshold: Threshold | None,
) -> Any:
    try:
        number = one_number(*settings)
    except TypeError:  # a list, say
        return MISS
    if number is None:
        return MISS
    if threshold is None:
        return _native_conv(bits, weight_bits, number, scale, bias)
    if (
        type(threshold) is tuple
        and len(threshold) == 2
        and scale is None
        and bias is None
        and settings[-1] is torch.float32
    ):
        return _native_conv_bits(bits, weight_bits, number, *threshold)
    return MISS


# Counted as the multiply-adds that the bits stand for, two each, padding included, as in torch's
# own formulas.
@register_flop_formula(
    [torch.ops.fastbandit.binary_conv2d, torch.ops.fastbandit.binary_conv2d_bits]
)
def _flops(
    bits: list[int],
    weight_bits: list[int],
    channels: int,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    *_: Any,
    out_shape: list[int],
    **__: Any,
) -> int:
    filters, *kernel = weight_bits[:3]
    map_ = torch.empty((1, 1, *bits[1:3]), device="meta")
    height, width = _convolution.output_size(
        map_, (kernel[0], kernel[1]), stride, padding, dilation
    )
    return 2 * bits[0] * height * width * filters * channels * kernel[0] * kernel[1]


# --- Public functions -----------------------------------------------------------------------------


def check_groups(op: str, groups: int, channels: int) -> None:
    if groups not in (1, channels) or isinstance(groups, bool):
        raise ValueError(
            f"{op}: groups: expected 1 or the number of channels, {channels}, got {groups!r}"
        )


def check_pad(op: str, pad: str) -> bool:
    """Whether the padding is +1."""
    if pad not in ("zero", "plus_one"):
        raise ValueError(f"{op}: pad: expected 'zero' or 'plus_one', got {pad!r}")
    return pad == "plus_one"


def check_sum(op: str, taps: int) -> None:
    if taps > MOST_TAPS:
        raise ValueError(f"{op}: expected a sum of at most {MOST_TAPS} products, got {taps}")


def _check_vector(
    op: str, name: str, value: Tensor, filters: int, dtypes: tuple[torch.dtype, ...], bits: Tensor
) -> None:
    _linf.check_constants(op, **{name: value})
    if value.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise TypeError(f"{op}: {name}: expected {expected}, got {value.dtype}")
    if tuple(value.shape) != (filters,):
        raise ValueError(
            f"{op}: {name}: expected shape ({filters},), one for each filter, "
            f"got {tuple(value.shape)}"
        )
    _linf.check_device(op, name, value, "bits", bits)


def binary_conv2d(
    bits: Tensor,
    weight_bits: Tensor,
    channels: int,
    *,
    kernel_size: Pair,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    threshold: Threshold | None = None,
    pad: Literal["zero", "plus_one"] = "zero",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Convolve signs with signs; no gradient (:func:`binary_conv2d_ste` has one).

    The sum of products is an exact integer: that of ``F.conv2d(x, weight, None, stride, padding,
    dilation, groups)`` with x and weight the signs, +1 and -1, and a padding of the exact value 0,
    or of +1. The result is ``scale * sum + bias``, product and sum each rounded once in float32
    (float64 for a result of float64), then rounded to ``out_dtype``; or, with a threshold, the bits
    of the next layer. Every implementation gives the same bits.

    Args:
        bits: int64 [N, H, W, ceil(C / 64)], from :func:`pack_sign`; H and W at least 1.
        weight_bits: the packed filters. For groups = 1 ``pack_sign(weight)`` of weight
            [C_out, C, kh, kw]: [C_out, kh, kw, ceil(C / 64)]. For groups = C > 1
            ``pack_sign(weight.transpose(0, 1))`` of weight [C, 1, kh, kw]: [1, kh, kw,
            ceil(C / 64)].
        channels: C; bits past it are not read. At most 2^24 products make a sum.
        kernel_size, stride, padding, dilation: an int, or two for height and width.
        groups: 1 or C, a filter for each channel.
        scale, bias: [C_out], float32, or float64 where ``out_dtype`` is; None is 1 and 0.
        threshold: from :func:`sign_threshold`: (int16 or int32 [C_out], bool [C_out]). A bit is
            ``(sum >= threshold[c]) != flip[c]``. Not with scale, bias or another ``out_dtype``.
        pad: what lies around the map, ``zero`` or ``plus_one``.
        out_dtype: float32, float64, bfloat16 or float16.

    Returns:
        [N, C_out, H_out, W_out] in ``out_dtype`` and channels-last; with a threshold int64
        [N, H_out, W_out, ceil(C_out / 64)]. ``H_out = (H + 2 padding - dilation (kh - 1) - 1) //
        stride + 1``.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape or number is not one of those above, or the kernel does not fit.
        RuntimeError: devices differ, or scale or bias requires grad.

    Source: Rastegari et al., "XNOR-Net", arXiv 1603.05279, Eq. (11), with the scale of the filters
    alone; *Binary Neural Networks*, section 4.3.
    """
    # The short way is for the kernels, which check their arguments themselves, and for numbers of
    # the usual form: on a small map the checks here take longer than they do.
    if type(bits) is Tensor and bits.is_cpu and not is_compiling():
        settings = (channels, kernel_size, stride, padding, dilation, groups, pad, out_dtype)
        y = _short(bits, weight_bits, settings, scale, bias, threshold)
        if y is not MISS:
            result: Tensor = y
            return result
    op = "binary_conv2d"
    check_bits(op, bits, channels)
    kernel = _convolution.pair(op, "kernel_size", kernel_size, 1)
    stride = _convolution.pair(op, "stride", stride, 1)
    padding = _convolution.pair(op, "padding", padding, 0)
    dilation = _convolution.pair(op, "dilation", dilation, 1)
    check_groups(op, groups, channels)
    plus_one = check_pad(op, pad)
    _linf.check_tensors(op, weight_bits=weight_bits)
    if weight_bits.dtype != torch.int64:
        raise TypeError(f"{op}: weight_bits: expected torch.int64, got {weight_bits.dtype}")
    _linf.check_device(op, "weight_bits", weight_bits, "bits", bits)
    words = words_of(channels)
    shape = tuple(weight_bits.shape)
    if groups > 1:
        if shape != (1, *kernel, words):
            raise ValueError(
                f"{op}: weight_bits: expected shape {(1, *kernel, words)}, a filter for each "
                f"channel, got {shape}"
            )
    elif len(shape) != 4 or shape[0] < 1 or shape[1:] != (*kernel, words):
        raise ValueError(
            f"{op}: weight_bits: expected shape (C_out, {kernel[0]}, {kernel[1]}, {words}), "
            f"got {shape}"
        )
    filters = channels if groups > 1 else shape[0]
    check_sum(op, kernel[0] * kernel[1] * (channels if groups == 1 else 1))
    if bits.shape[1] < 1 or bits.shape[2] < 1:
        raise ValueError(
            f"{op}: bits: expected at least one row and column, got {tuple(bits.shape)}"
        )
    map_ = bits.permute(0, 3, 1, 2)
    _convolution.check_output(op, map_, filters, kernel, stride, padding, dilation)
    _linf.check_output(op, out_dtype, torch.channels_last)
    checked = (bits, weight_bits, channels, stride, padding, dilation, groups, plus_one)
    plain = torch.compiler.is_exporting()  # such a program runs where this package is not
    if threshold is None:
        dtypes = (torch.float32, torch.float64)[: 1 + (out_dtype == torch.float64)]
        for name, value in (("scale", scale), ("bias", bias)):
            if value is not None:
                _check_vector(op, name, value, filters, dtypes, bits)
        return (reference if plain else conv)(*checked, scale, bias, out_dtype)
    if scale is not None or bias is not None or out_dtype != torch.float32:
        raise ValueError(
            f"{op}: threshold: expected no scale, bias or out_dtype beside it: the result is bits"
        )
    if not isinstance(threshold, (tuple, list)) or len(threshold) != 2:
        raise TypeError(
            f"{op}: threshold: expected two tensors, from sign_threshold, got "
            f"{type(threshold).__name__}"
        )
    _check_vector(op, "threshold", threshold[0], filters, (torch.int16, torch.int32), bits)
    _check_vector(op, "flip", threshold[1], filters, (torch.bool,), bits)
    return (bits_reference if plain else conv_bits)(*checked, *threshold)


def sign_threshold(scale: Tensor, bias: Tensor, taps: int) -> Threshold:
    """The sign of ``scale * sum + bias`` as a comparison of the integer ``sum``; no gradient.

    Batch norm after a convolution of signs, and the sign after it, so become one comparison for
    each channel. It is found by bisection on the floating-point expression itself, product and sum
    each rounded once, so the bits are those of :func:`binary_conv2d` with this scale and bias and
    of :func:`pack_sign` after it, for every sum.

    Args:
        scale, bias: [C], float32 or float64, the same for both. May be 0, negative, infinite; a
            channel with a NaN has bit 0.
        taps: the largest sum, 1 to 2^24: the number of products, C_in kh kw, or kh kw of a
            depthwise convolution.

    Returns:
        (threshold, flip): the bit is ``(sum >= threshold) != flip``. threshold is int16 [C] (int32
        where taps > 32766), from -taps to taps + 1; flip is bool [C], set where scale < 0.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape or number is not one of those above.
        RuntimeError: devices differ, or an argument requires grad.
    """
    op = "sign_threshold"
    _linf.check_constants(op, scale=scale, bias=bias)
    if scale.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: scale: expected float32 or float64, got {scale.dtype}")
    if bias.dtype != scale.dtype:
        raise TypeError(f"{op}: bias: expected {scale.dtype} as scale, got {bias.dtype}")
    if scale.dim() != 1:
        raise ValueError(f"{op}: scale: expected shape (C,), got {tuple(scale.shape)}")
    if bias.shape != scale.shape:
        raise ValueError(
            f"{op}: bias: expected shape {tuple(scale.shape)} as scale, got {tuple(bias.shape)}"
        )
    _linf.check_device(op, "bias", bias, "scale", scale)
    if not isinstance(taps, int) or isinstance(taps, bool):
        raise TypeError(f"{op}: taps: expected an int, got {taps!r}")
    if not 1 <= taps <= MOST_TAPS:
        raise ValueError(f"{op}: taps: expected 1 to {MOST_TAPS}, got {taps}")
    threshold, flip = _threshold(scale, bias, taps)
    return threshold, flip
