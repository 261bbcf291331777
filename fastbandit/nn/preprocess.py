"""What brings the inputs of a cell to its width and size."""

from __future__ import annotations

from torch import nn

from fastbandit.nn.binary import BinaryConvBN
from fastbandit.nn.blocks import ReluConvBN
from fastbandit.nn.operations import Downsample
from fastbandit.operations import OperationOptions

__all__ = ["preprocessing"]


def preprocessing(
    in_channels: int, channels: int, stride: int, affine: bool, options: OperationOptions
) -> nn.Module:
    """ReLU - 1x1 convolution - batch norm, or its 1-bit form, for one input of a cell.

    An input of twice the size, that of the cell before a reduction cell, has stride 2 and real
    weights: two 1x1 convolutions on shifted grids as in DARTS (Liu et al., ICLR 2019), or with
    ``options.residual`` a 1-bit 3x3 convolution whose batch norm has no scale and shift (Kim et
    al., ECCV 2020).

    Args:
        in_channels: of the input; it may come as several maps that are meant side by side.
        channels: of the cell.
        affine: the batch norm has scale and shift.
        options: ``preprocess`` and ``residual`` are read, and what 1-bit layers read.
    """
    if stride == 2:
        if options.residual:
            return BinaryConvBN(in_channels, channels, 3, 2, affine=False, options=options)
        return Downsample(channels, affine, in_channels)
    if options.preprocess == "binary":
        return BinaryConvBN(in_channels, channels, affine=affine, options=options)
    return ReluConvBN(in_channels, channels, affine, sign=options.preprocess == "sign")
