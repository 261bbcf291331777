"""Convolutions, and the blocks that candidate operations and networks are made of.

Every layer of this package takes ``[N, C, H, W]`` of any floating dtype, contiguous or
channels-last, down to a 1 x 1 map. Depthwise, Gabor and dilated convolutions go through
:mod:`fastbandit.ops`, so that whichever kernel serves the device is the one that runs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops
from fastbandit._modes import autocast_dtype
from fastbandit.nn.cell import Term, compiling, concatenate, total
from fastbandit.nn.frozen import foldable
from fastbandit.nn.norm import BatchNorm2d, is_batch_norm
from fastbandit.nn.shortcuts import Plain
from fastbandit.ops.conv_block import as_term
from fastbandit.ops.norm_sum import fork

__all__ = [
    "DepthwiseConv2d",
    "DilatedConv2d",
    "ReluConvBN",
    "Residual",
    "Signed",
    "classify",
    "conv_block",
    "conv_term",
    "conv_weight",
    "halve",
    "norm_term",
    "normalization",
    "sign_weight",
]


def conv_weight(out_channels: int, in_channels: int, kernel_size: int) -> nn.Parameter:
    """A convolution weight [out, in, k, k] drawn as ``torch.nn.Conv2d`` draws its own."""
    weight = torch.empty(out_channels, in_channels, kernel_size, kernel_size)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return nn.Parameter(weight)


def sign_weight(weight: Tensor) -> Tensor:
    """1-bit weights for real maps: the signs times the mean magnitude of the layer's weights.

    The gradient passes where a weight lies in [-1, 1]; the scale has none. Source: BNAS (Chen et
    al., AAAI 2020), after XNOR-Net (Rastegari et al., ECCV 2016).
    """
    return ops.sign_ste(weight, ste="clip") * weight.detach().abs().mean()


class Signed(nn.Module):
    """A layer whose convolutions may have 1-bit weights, see :func:`sign_weight`.

    Args:
        sign: they have.

    Attributes:
        fixed: the weights are the signs times their scale already, as a packed file has them.
        real_weights: compute with the weights themselves, as the first of two steps of training
            does.
    """

    fixed = False
    real_weights = False

    def __init__(self, sign: bool) -> None:
        super().__init__()
        self.sign = sign

    def used(self, weight: Tensor) -> Tensor:
        """What the layer computes with in place of ``weight``."""
        if not self.sign or self.fixed or self.real_weights:
            return weight
        return sign_weight(weight)

    @property
    def signed(self) -> tuple[nn.Parameter, ...]:
        """The weights whose signs the layer computes with."""
        return tuple(p for p in self.parameters(recurse=False) if p.dim() == 4) if self.sign else ()


class DepthwiseConv2d(Signed):
    """ReLU, then a depthwise k x k convolution with 'same' padding, as one op.

    Output: [N, C, ceil(H / stride), ceil(W / stride)]. ``kernel_size`` is odd. With ``sign`` the
    weights are 1-bit, see :func:`sign_weight`.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
        sign: bool = False,
    ) -> None:
        super().__init__(sign)
        self.stride, self.dilation = stride, dilation
        self.padding = dilation * (kernel_size // 2)
        self.weight = conv_weight(channels, 1, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.depthwise_conv2d(
            x,
            self.used(self.weight),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=True,
        )


is_depthwise = Plain(DepthwiseConv2d)


def conv_block(
    x: Tensor | Sequence[Tensor],
    pointwise: Tensor,
    norm: nn.Module,
    depthwise: DepthwiseConv2d | None = None,
) -> Tensor:
    """:func:`conv_term`, normalised."""
    y: Tensor = conv_term(x, pointwise, norm, depthwise, deferred=False)  # type: ignore[assignment]
    return y


def conv_term(
    x: Tensor | Sequence[Tensor],
    pointwise: Tensor,
    norm: nn.Module,
    depthwise: DepthwiseConv2d | None = None,
    *,
    deferred: bool = True,
) -> Term:
    """ReLU, ``depthwise`` if there is one, a 1x1 convolution and ``norm``, as one op.

    A layer to which something is attached (see :class:`~fastbandit.nn.shortcuts.Plain`) is called.

    Args:
        x: a map, or several of one size that are taken side by side.
        pointwise: [C_out, C, 1, 1].
        norm: the batch norm.
        depthwise: a depthwise convolution, which has the ReLU inside; with one map only.
        deferred: a batch norm may be left to the sum that the result is a term of.
    """
    if compiling() or not (depthwise is None or is_depthwise(depthwise)):
        joined = x if isinstance(x, Tensor) else concatenate(x)
        activated = F.relu(joined) if depthwise is None else depthwise(joined)
        z = F.conv2d(activated, pointwise)
        return norm_term(norm, z) if deferred else norm(z)
    xs = [x] if isinstance(x, Tensor) else x
    if depthwise is None:
        return as_term(xs, pointwise, **normalization(norm, x, deferred=deferred))
    stride = depthwise.stride
    return as_term(
        xs,
        pointwise,
        depthwise=depthwise.used(depthwise.weight),
        stride=stride,
        padding=depthwise.padding,
        dilation=depthwise.dilation,
        **normalization(norm, x, stride, deferred=deferred),
    )


def norm_term(norm: nn.Module, y: Tensor) -> Term:
    """``norm(y)`` as a term of a sum, which may do a plain batch norm itself."""
    return norm.term(y) if is_batch_norm(norm) and not compiling() else norm(y)


def normalization(
    norm: nn.Module, x: Tensor | Sequence[Tensor], stride: int = 1, deferred: bool = False
) -> dict[str, Any]:
    """How :func:`fastbandit.ops.conv_block` is told of ``norm`` after a convolution of ``x``.

    A plain batch norm is told by its tensors or folded into the convolution; any other is called,
    if ``deferred`` as :func:`norm_term`.
    """
    if compiling():
        return {"norm": norm}
    if foldable(norm):
        return {"norm": norm, "fold": norm.fold}
    if not is_batch_norm(norm):
        return {"norm": norm}
    mean, variance = norm.running_mean, norm.running_var
    if not norm.training and norm.moves is None and mean is not None and variance is not None:
        return {"norm": norm, "fold": norm.fold}
    # A single value for each channel is for the batch norm to refuse.
    first = x if isinstance(x, Tensor) else x[0]
    several = first.shape[0] > 1 or max(first.shape[2:]) > stride
    if norm.training and norm.synchronise is None and norm.moves is None and several:
        tracking = norm.track_running_stats
        return {
            "normalize": True,
            "weight": norm.weight,
            "bias": norm.bias,
            "running_mean": mean if tracking else None,
            "running_var": variance if tracking else None,
            "momentum": norm.next_factor() if tracking else 0.0,
            "eps": norm.eps,
            "deferred": deferred,
        }
    return {"norm": partial(norm_term, norm) if deferred else norm}


class ReluConvBN(Signed):
    """ReLU - 1x1 convolution - batch norm: brings the input of a cell to its width.

    Takes the input as one map or as several that are meant side by side, as a cell gives them.
    With ``sign`` the weights are 1-bit, see :func:`sign_weight`.
    """

    def __init__(
        self, in_channels: int, out_channels: int, affine: bool, sign: bool = False
    ) -> None:
        super().__init__(sign)
        self.weight = conv_weight(out_channels, in_channels, 1)
        self.bn = BatchNorm2d(out_channels, affine=affine)

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        return conv_block(x, self.used(self.weight), self.bn)


class DilatedConv2d(nn.Module):
    """ReLU, then a dense k x k convolution of dilation 2 with 'same' padding.

    Output: [N, C, ceil(H / stride), ceil(W / stride)]. ``kernel_size`` is odd.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, dilation: int = 2) -> None:
        super().__init__()
        self.stride, self.dilation = stride, dilation
        self.padding = dilation * (kernel_size // 2)
        self.weight = conv_weight(channels, channels, kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return ops.dilated_conv2d(
            x,
            self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            relu=True,
        )


def halve(x: Tensor) -> Tensor:
    """Bilinear resize (corners aligned) to ceil(H / 2) x ceil(W / 2)."""
    size = ((x.size(2) + 1) // 2, (x.size(3) + 1) // 2)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


class Residual(nn.Module, ABC):
    """x + BN(f(x)), halved at stride 2; starts as the identity.

    The batch norm has scale and shift, starting at 0, even where the others have none (in the
    supernet): the block *is* that learnt scale. With a fixed scale of 1 it would add noise of unit
    variance from the first step and could never be the identity.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.bn = BatchNorm2d(channels, affine=True)
        nn.init.zeros_(self.bn.weight)

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """f."""

    def terms(self, x: Tensor) -> list[Term]:
        # The gradient of the first decides the layout of their sum; that of a Gabor filter is one
        # map for all channels.
        same, read = fork(x, 2)
        both: list[Term] = [same, norm_term(self.bn, self.transform(read))]
        return both if self.stride == 1 else [halve(total(both))]

    def forward(self, x: Tensor) -> Tensor:
        return total(self.terms(x))


def classify(x: Tensor, classifier: nn.Module) -> Tensor:
    """Global average pooling and the classifier, in float32 under autocast: logits are differences
    of large sums, and the loss is taken of them."""
    if autocast_dtype(x) is not None:
        with torch.autocast(x.device.type, enabled=False):
            logits: Tensor = classifier(x.float().mean(dim=(2, 3)))
            return logits
    return classifier(x.mean(dim=(2, 3)))
