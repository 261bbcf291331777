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
max_pool_3x3, avg_...    2 C
skip_connect             none; at stride 2: C^2 + 2 C
conv_kxk                 k^2 C^2 + 2 C
sep_conv_kxk             k^2 C + 2 C + k^2 C^2 + 2 C
sep_conv_m_kxk           2 (k^2 C + C^2 + 2 C)
dil_conv_kxk             k^2 C + C^2 + 2 C
gab_filt_3x3             5 C + 2 C
dtp_blok_3x3             2 C; C^2 more with denoise_1x1, 2 C^2 more with 'gaussian'
======================== ================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops
from fastbandit.nn.blocks import (
    DepthwiseConv2d,
    DilatedConv2d,
    conv_block,
    conv_weight,
    normalization,
)
from fastbandit.nn.denoise import DenoiseBlock
from fastbandit.nn.gabor import GaborBlock
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.operations import OperationOptions

__all__ = [
    "CONSTRUCTORS",
    "Conv",
    "DilConv",
    "Downsample",
    "Identity",
    "Pool",
    "SepConv",
    "SepConvM",
    "make",
]

Constructor = Callable[[int, int, bool, OperationOptions], nn.Module]


class Pool(nn.Module):
    """3x3 pooling, padding 1, then batch norm; the average does not count the padding."""

    def __init__(self, kind: str, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.maximum, self.stride = kind == "max", stride
        self.bn = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        pool = ops.max_pool2d if self.maximum else ops.avg_pool2d
        return self.bn(pool(x, self.stride))


class Identity(nn.Module):
    """``skip_connect`` at stride 1: the input itself, not a copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Downsample(nn.Module):
    """``skip_connect`` at stride 2.

    ReLU, two 1x1 convolutions of stride 2 to half of the channels each, the second on the input
    shifted by one pixel down and right, concatenated, batch norm. With an odd number of channels
    the first gets the smaller half. Where an odd size leaves the shifted grid one pixel short,
    that pixel is zero.
    """

    def __init__(self, channels: int, affine: bool) -> None:
        super().__init__()
        half = channels // 2
        self.weight = conv_weight(half, channels, 1) if half else None
        self.weight_shifted = conv_weight(channels - half, channels, 1)
        self.bn = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        told = normalization(self.bn, x, stride=2)
        return ops.factorized_reduce(x, self.weight, self.weight_shifted, **told)


class Conv(nn.Module):
    """ReLU, dense k x k convolution of dilation 2 ("convolution with rate 2"), batch norm."""

    def __init__(self, kernel_size: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.conv = DilatedConv2d(channels, kernel_size, stride)
        self.bn = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class SepConv(nn.Module):
    """ReLU, depthwise k x k, BN, ReLU, dense k x k, BN: the form of the released networks."""

    def __init__(self, kernel_size: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.padding = kernel_size // 2
        self.depthwise = DepthwiseConv2d(channels, kernel_size, stride)
        self.bn1 = BatchNorm2d(channels, affine=affine)
        self.weight = conv_weight(channels, channels, kernel_size)
        self.bn2 = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.depthwise(x)))
        return self.bn2(F.conv2d(x, self.weight, padding=self.padding))


class SepConvM(nn.Module):
    """Twice (ReLU, depthwise k x k, 1x1 convolution, BN): the separable convolution of DARTS."""

    def __init__(self, kernel_size: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.depthwise1 = DepthwiseConv2d(channels, kernel_size, stride)
        self.pointwise1 = conv_weight(channels, channels, 1)
        self.bn1 = BatchNorm2d(channels, affine=affine)
        self.depthwise2 = DepthwiseConv2d(channels, kernel_size)
        self.pointwise2 = conv_weight(channels, channels, 1)
        self.bn2 = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        x = conv_block(x, self.pointwise1, self.bn1, self.depthwise1)
        return conv_block(x, self.pointwise2, self.bn2, self.depthwise2)


class DilConv(nn.Module):
    """ReLU, depthwise k x k of dilation 2, 1x1 convolution, BN: the form of DARTS."""

    def __init__(self, kernel_size: int, channels: int, stride: int, affine: bool) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv2d(channels, kernel_size, stride, dilation=2)
        self.pointwise = conv_weight(channels, channels, 1)
        self.bn = BatchNorm2d(channels, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        return conv_block(x, self.pointwise, self.bn, self.depthwise)


def _skip(channels: int, stride: int, affine: bool) -> nn.Module:
    return Identity() if stride == 1 else Downsample(channels, affine)


def _plain(build: Callable[[int, int, bool], nn.Module]) -> Constructor:
    """The constructor of an operation without options."""
    return lambda channels, stride, affine, options: build(channels, stride, affine)


def _gabor(channels: int, stride: int, affine: bool, options: OperationOptions) -> nn.Module:
    # affine does not matter: this batch norm always has scale and shift (see the class).
    return GaborBlock(channels, stride, options.gabor)


def _denoise(channels: int, stride: int, affine: bool, options: OperationOptions) -> nn.Module:
    return DenoiseBlock(channels, stride, options.denoise, options.denoise_1x1)


CONSTRUCTORS: dict[str, Constructor] = {
    "max_pool_3x3": _plain(partial(Pool, "max")),
    "avg_pool_3x3": _plain(partial(Pool, "avg")),
    "skip_connect": _plain(_skip),
    "conv_1x1": _plain(partial(Conv, 1)),
    "conv_3x3": _plain(partial(Conv, 3)),
    "conv_5x5": _plain(partial(Conv, 5)),
    "conv_7x7": _plain(partial(Conv, 7)),
    "sep_conv_3x3": _plain(partial(SepConv, 3)),
    "sep_conv_5x5": _plain(partial(SepConv, 5)),
    "sep_conv_m_3x3": _plain(partial(SepConvM, 3)),
    "sep_conv_m_5x5": _plain(partial(SepConvM, 5)),
    "dil_conv_1x1": _plain(partial(DilConv, 1)),
    "dil_conv_3x3": _plain(partial(DilConv, 3)),
    "dil_conv_5x5": _plain(partial(DilConv, 5)),
    "dil_conv_7x7": _plain(partial(DilConv, 7)),
    "gab_filt_3x3": _gabor,
    "dtp_blok_3x3": _denoise,
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
