"""Two convolutions of packed signs as one: depthwise to bits, then 1x1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbandit.ops._register import MISS, declare_short, define, short_call
from fastbandit.ops.binary_conv2d import (
    bits_reference,
    conv,
    conv_bits,
    one_number,
    output_size,
    reference,
)

__all__ = ["separable"]


def _reference(
    bits: Tensor,
    depthwise_bits: Tensor,  # int64 [1, k, k, words]
    threshold: Tensor,  # int16 or int32 [C]
    flip: Tensor,  # bool [C]
    pointwise_bits: Tensor,  # int64 [C_out, 1, 1, words]
    scale: Tensor | None,  # [C_out]
    bias: Tensor | None,  # [C_out]
    channels: int,
    stride: int,
    padding: int,
    dilation: int,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """By the two ops, each with the kernel of its device."""
    if depthwise_bits.shape[0] != 1:
        raise RuntimeError(
            "binary_sep_conv2d: depthwise_bits: expected [1, k, k, words], got "
            f"{list(depthwise_bits.shape)}"
        )
    plain = torch.compiler.is_exporting()
    bits = (bits_reference if plain else conv_bits)(
        bits, depthwise_bits, channels, [stride] * 2, [padding] * 2, [dilation] * 2, channels,
        plus_one, threshold, flip,
    )  # fmt: skip
    y: Tensor = (reference if plain else conv)(
        bits, pointwise_bits, channels, [1, 1], [0, 0], [1, 1], 1, False, scale, bias, out_dtype
    )
    return y


def _fake(
    bits: Tensor,
    depthwise_bits: Tensor,
    threshold: Tensor,
    flip: Tensor,
    pointwise_bits: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    channels: int,
    stride: int,
    padding: int,
    dilation: int,
    plus_one: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    settings = [stride] * 2, [padding] * 2, [dilation] * 2
    n, _, height, width = output_size(bits, depthwise_bits, channels, *settings, channels)
    shape = (n, pointwise_bits.shape[0], height, width)
    return torch.empty(
        shape, dtype=out_dtype, device=bits.device, memory_format=torch.channels_last
    )


_separable = define(
    "binary_sep_conv2d",
    "(Tensor bits, Tensor depthwise_bits, Tensor threshold, Tensor flip, Tensor pointwise_bits, "
    "Tensor? scale, Tensor? bias, int channels, int stride, int padding, int dilation, "
    "bool plus_one, ScalarType out_dtype) -> Tensor",
    _reference,
    _fake,
)
_native = short_call(
    declare_short(
        "binary_sep_conv2d",
        "(Tensor bits, Tensor depthwise_bits, Tensor threshold, Tensor flip, "
        "Tensor pointwise_bits, Tensor? scale, Tensor? bias, int settings) -> Tensor",
    )
)


@register_flop_formula(torch.ops.fastbandit.binary_sep_conv2d)
def _flops(
    bits: list[int],
    depthwise_bits: list[int],
    threshold: list[int],
    flip: list[int],
    pointwise_bits: list[int],
    scale: list[int] | None,
    bias: list[int] | None,
    channels: int,
    *_: Any,
    out_shape: list[int],
    **__: Any,
) -> int:
    """As the multiply-adds that the bits stand for, two each."""
    images, filters, height, width = out_shape
    kernel = depthwise_bits[1:3]
    return 2 * images * height * width * channels * (kernel[0] * kernel[1] + filters)


def separable(*arguments: Any) -> Tensor:
    """A depthwise convolution to bits and a 1x1 convolution of these, in one call.

    On small maps a call of an op takes longer than its kernel.

    Args:
        arguments: of the op ``binary_sep_conv2d``, by position and known to be right: bits,
            depthwise_bits, threshold, flip, pointwise_bits, scale, bias, channels, stride,
            padding, dilation, plus_one, out_dtype. As in :func:`binary_conv2d`; one number for
            height and width.

    Returns:
        [N, C_out, H_out, W_out] in ``out_dtype`` and channels-last.
    """
    y: Any = MISS
    if not torch.compiler.is_compiling():
        channels, stride, padding, dilation, plus_one, dtype = arguments[7:]
        pad = "plus_one" if plus_one else "zero"
        number = one_number(channels, 0, stride, padding, dilation, channels, pad, dtype)
        if number is not None:
            y = _native(*arguments[:7], number)
    if y is MISS:
        y = (_reference if torch.compiler.is_exporting() else _separable)(*arguments)
    result: Tensor = y
    return result
