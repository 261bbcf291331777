"""The modules of the candidate operations, as a table from name to constructor.

``CONSTRUCTORS`` has a constructor for every row of :data:`fastbandit.operations.OPERATIONS`. It is
called with (channels, stride, affine, options) and gives a module from [N, C, H, W] to
[N, C, H, W] at stride 1 and to [N, C, ceil(H/2), ceil(W/2)] at stride 2, for every H and W from 1
up. ``affine`` says whether batch norms have scale and shift: not in the supernet, where they would
make the outputs of rivalling operations differ by what their scale happens to be, but in a final
network. ``options`` is understood by all and used by some.

Parameters at C channels, with affine batch norms (2 C each); counted by a test:

======================== ================================================================
operation                parameters
======================== ================================================================
max/avg_pool_3x3         2 C; none without pool_bn
skip_connect             none; at stride 2: C^2 + 2 C
zero                     none
conv_kxk                 k^2 C^2 + 2 C
sep_conv_kxk             k^2 C + 2 C + k^2 C^2 + 2 C
sep_conv_m_kxk           2 (k^2 C + C^2 + 2 C)
dil_conv_kxk             k^2 C + C^2 + 2 C
bin_sep_conv_kxk         k^2 C + C^2 + 4 C
bin_dil_conv_kxk         k^2 C + C^2 + 4 C
bin_conv_kxk             k^2 C^2 + 2 C
bin_conv_d2_kxk          k^2 C^2 + 2 C
gab_filt_3x3             5 C + 2 C
dtp_blok_3x3             2 C; C^2 more with denoise_1x1, 2 C^2 more with 'gaussian'
======================== ================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops
from fastbandit.nn.binary import BinaryConvBN, BinarySepConv
from fastbandit.nn.blocks import (
    DepthwiseConv2d,
    DilatedConv2d,
    Signed,
    conv_block,
    conv_term,
    conv_weight,
    norm_term,
    normalization,
)
from fastbandit.nn.cell import Term, summand, total
from fastbandit.nn.denoise import DenoiseBlock
from fastbandit.nn.gabor import GaborBlock
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.operations import OperationOptions
from fastbandit.ops.factorized_reduce import as_term as reduce_term

__all__ = [
    "CONSTRUCTORS",
    "Conv",
    "DilConv",
    "Downsample",
    "Identity",
    "Pool",
    "SepConv",
    "SepConvM",
    "Zero",
    "make",
]

Constructor = Callable[[int, int, bool, OperationOptions], nn.Module]


@summand
class Pool(nn.Module):
    """3x3 pooling, padding 1, then batch norm; the average does not count the padding."""

    def __init__(
        self, kind: str, channels: int, stride: int, affine: bool, norm: bool = True
    ) -> None:
        super().__init__()
        self.maximum, self.stride = kind == "max", stride
        self.bn = BatchNorm2d(channels, affine=affine) if norm else None

    def terms(self, x: Tensor) -> list[Term]:
        pool = ops.max_pool2d if self.maximum else ops.avg_pool2d
        y = pool(x, self.stride)
        return [y if self.bn is None else norm_term(self.bn, y)]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.terms(x))


@summand
class Identity(nn.Module):
    """``skip_connect`` at stride 1: the input itself, not a copy."""

    def terms(self, x: Tensor) -> list[Term]:
        return [x]

    def forward(self, x: Tensor) -> Tensor:
        return x


@summand
class Zero(nn.Module):
    """``zero``: 0, whatever the input is. Its gradient is 0 and not missing."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride

    def terms(self, x: Tensor) -> list[Term]:
        # Nothing to add where nobody asks for its gradient.
        return [self(x)] if torch.is_grad_enabled() and x.requires_grad else []

    def forward(self, x: Tensor) -> Tensor:
        everywhere = torch.ones((), dtype=torch.bool, device=x.device)
        # In place on a copy: masked_fill itself would lose the layout, and with it the kernels.
        return x[:, :, :: self.stride, :: self.stride].clone().masked_fill_(everywhere, 0.0)


@summand
class Downsample(Signed):
    """``skip_connect`` at stride 2.

    ReLU, two 1x1 convolutions of stride 2 to half of the channels each, the second on the input
    shifted by one pixel down and right, concatenated, batch norm. With an odd number of channels
    the first gets the smaller half. Where an odd size leaves the shifted grid one pixel short,
    that pixel is zero.

    Takes one map, or several that are meant side by side.

    Args:
        in_channels: default as many as ``channels``.
        sign: 1-bit weights.
    """

    def __init__(
        self, channels: int, affine: bool, in_channels: int | None = None, sign: bool = False
    ) -> None:
        super().__init__(sign)
        half, width = channels // 2, in_channels or channels
        self.weight = conv_weight(half, width, 1) if half else None
        self.weight_shifted = conv_weight(channels - half, width, 1)
        self.bn = BatchNorm2d(channels, affine=affine)

    def terms(self, x: Tensor | Sequence[Tensor], deferred: bool = True) -> list[Term]:
        told = normalization(self.bn, x, stride=2, deferred=deferred)
        weight = None if self.weight is None else self.used(self.weight)
        return [reduce_term(x, weight, self.used(self.weight_shifted), **told)]

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        return total(self.terms(x, deferred=False))


@summand
class Conv(nn.Module):
    """ReLU, dense k x k convolution of dilation 2 ("convolution with rate 2"), batch norm."""

    def __init__(self, kernel_size: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.conv = DilatedConv2d(channels, kernel_size, stride)
        self.bn = BatchNorm2d(channels, affine=affine)

    def terms(self, x: Tensor) -> list[Term]:
        return [norm_term(self.bn, self.conv(x))]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.terms(x))


@summand
class SepConv(nn.Module):
    """ReLU, depthwise k x k, BN, ReLU, dense k x k, BN: the form of the released networks."""

    def __init__(self, kernel_size: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.padding = kernel_size // 2
        self.depthwise = DepthwiseConv2d(channels, kernel_size, stride)
        self.bn1 = BatchNorm2d(channels, affine=affine)
        self.weight = conv_weight(channels, channels, kernel_size)
        self.bn2 = BatchNorm2d(channels, affine=affine)

    def terms(self, x: Tensor) -> list[Term]:
        x = F.relu(self.bn1(self.depthwise(x)))
        return [norm_term(self.bn2, F.conv2d(x, self.weight, padding=self.padding))]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.terms(x))


@summand
class SepConvM(Signed):
    """Twice (ReLU, depthwise k x k, 1x1 convolution, BN): the separable convolution of DARTS."""

    def __init__(
        self, kernel_size: int, channels: int, stride: int, affine: bool, sign: bool = False
    ) -> None:
        super().__init__(sign)
        self.depthwise1 = DepthwiseConv2d(channels, kernel_size, stride, sign=sign)
        self.pointwise1 = conv_weight(channels, channels, 1)
        self.bn1 = BatchNorm2d(channels, affine=affine)
        self.depthwise2 = DepthwiseConv2d(channels, kernel_size, sign=sign)
        self.pointwise2 = conv_weight(channels, channels, 1)
        self.bn2 = BatchNorm2d(channels, affine=affine)

    def terms(self, x: Tensor, deferred: bool = True) -> list[Term]:
        x = conv_block(x, self.used(self.pointwise1), self.bn1, self.depthwise1)
        weight = self.used(self.pointwise2)
        return [conv_term(x, weight, self.bn2, self.depthwise2, deferred=deferred)]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.terms(x, deferred=False))


@summand
class DilConv(Signed):
    """ReLU, depthwise k x k of dilation 2, 1x1 convolution, BN: the form of DARTS."""

    def __init__(
        self, kernel_size: int, channels: int, stride: int, affine: bool, sign: bool = False
    ) -> None:
        super().__init__(sign)
        self.depthwise = DepthwiseConv2d(channels, kernel_size, stride, dilation=2, sign=sign)
        self.pointwise = conv_weight(channels, channels, 1)
        self.bn = BatchNorm2d(channels, affine=affine)

    def terms(self, x: Tensor, deferred: bool = True) -> list[Term]:
        weight = self.used(self.pointwise)
        return [conv_term(x, weight, self.bn, self.depthwise, deferred=deferred)]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.terms(x, deferred=False))


def _skip(channels: int, stride: int, affine: bool, options: OperationOptions) -> nn.Module:
    sign = options.weights == "sign"
    return Identity() if stride == 1 else Downsample(channels, affine, sign=sign)


def _pool(kind: str) -> Constructor:
    return lambda channels, stride, affine, options: Pool(
        kind, channels, stride, affine, options.pool_bn
    )


def _darts(build: Callable[..., nn.Module], kernel_size: int) -> Constructor:
    """An operation of DARTS, with 1-bit weights if the options say so."""
    return lambda channels, stride, affine, options: build(
        kernel_size, channels, stride, affine, sign=options.weights == "sign"
    )


def _binary(kernel_size: int, dilation: int, dense: bool) -> Constructor:
    def build(channels: int, stride: int, affine: bool, options: OperationOptions) -> nn.Module:
        if dense:
            return BinaryConvBN(channels, channels, kernel_size, stride, dilation, affine, options)
        return BinarySepConv(kernel_size, channels, stride, affine, options, dilation)

    return build


def _plain(build: Callable[[int, int, bool], nn.Module]) -> Constructor:
    """The constructor of an operation without options."""
    return lambda channels, stride, affine, options: build(channels, stride, affine)


def _gabor(channels: int, stride: int, affine: bool, options: OperationOptions) -> nn.Module:
    # affine does not matter: this batch norm always has scale and shift (see the class).
    return GaborBlock(channels, stride, options.gabor)


def _denoise(channels: int, stride: int, affine: bool, options: OperationOptions) -> nn.Module:
    return DenoiseBlock(channels, stride, options.denoise, options.denoise_1x1)


CONSTRUCTORS: dict[str, Constructor] = {
    "max_pool_3x3": _pool("max"),
    "avg_pool_3x3": _pool("avg"),
    "skip_connect": _skip,
    "conv_1x1": _plain(partial(Conv, 1)),
    "conv_3x3": _plain(partial(Conv, 3)),
    "conv_5x5": _plain(partial(Conv, 5)),
    "conv_7x7": _plain(partial(Conv, 7)),
    "sep_conv_3x3": _plain(partial(SepConv, 3)),
    "sep_conv_5x5": _plain(partial(SepConv, 5)),
    "sep_conv_m_3x3": _darts(SepConvM, 3),
    "sep_conv_m_5x5": _darts(SepConvM, 5),
    "dil_conv_1x1": _darts(DilConv, 1),
    "dil_conv_3x3": _darts(DilConv, 3),
    "dil_conv_5x5": _darts(DilConv, 5),
    "dil_conv_7x7": _darts(DilConv, 7),
    "gab_filt_3x3": _gabor,
    "dtp_blok_3x3": _denoise,
    "zero": lambda channels, stride, affine, options: Zero(stride),
    "bin_dil_conv_3x3": _binary(3, 2, dense=False),
    "bin_dil_conv_5x5": _binary(5, 2, dense=False),
    "bin_sep_conv_3x3": _binary(3, 1, dense=False),
    "bin_sep_conv_5x5": _binary(5, 1, dense=False),
    "bin_conv_3x3": _binary(3, 1, dense=True),
    "bin_conv_5x5": _binary(5, 1, dense=True),
    "bin_conv_d2_3x3": _binary(3, 2, dense=True),
    "bin_conv_d2_5x5": _binary(5, 2, dense=True),
}


def make(
    name: str,
    channels: int,
    stride: int = 1,
    affine: bool = True,
    options: OperationOptions | None = None,
    **changes: Any,
) -> nn.Module:
    """The operation of that name; see the module's docstring.

    Args:
        options: how it is built where it has variants.
        changes: single options by name, in place of those of ``options``.

    Raises:
        ValueError: there is none of that name (the message lists those there are), an option has
            an unknown value, or the stride is not 1 or 2.
    """
    if name not in CONSTRUCTORS:
        raise ValueError(f"operation: expected one of {', '.join(CONSTRUCTORS)}, got {name!r}")
    if stride not in (1, 2):
        raise ValueError(f"operation: stride: expected 1 or 2, got {stride}")
    options = (options or OperationOptions()).changed(changes)
    return CONSTRUCTORS[name](channels, stride, affine, options)
