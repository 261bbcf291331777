"""A copy of a trained network for evaluation only, with batch norm as what it then is: x * a + b.

torch's batch norm with fixed statistics costs several times one pass over the data, most of it in
the backward pass. Here it is one fused multiply-add over the flat images, whatever their layout,
and its gradient one multiplication. The results differ by rounding.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import TypeGuard

import torch
from torch import Tensor, nn

from fastbandit._modes import may_keep
from fastbandit.nn.norm import is_batch_norm
from fastbandit.nn.shortcuts import Plain

__all__ = ["FrozenBatchNorm", "foldable", "freeze", "is_plain_norm"]


# Channels from which torch works through pixels as fast as through one long row; constants for each
# element of an image would be read beside it, and drive other things from the cache.
_ENOUGH = 16


@dataclass
class _Constants:
    """Scale and shift, and what is made of them, for as long as the module's tensors are these."""

    tensors: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    eps: float
    scale: Tensor  # [C]
    shift: Tensor  # [C]
    # For each size of map: scale and shift of every element of an image, as it lies in memory.
    rows: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    # The last weights of 1x1 convolutions that this was folded into, their versions, the result.
    folded: tuple[tuple[Tensor, ...], tuple[int, ...], Tensor] | None = None


def _version(tensor: Tensor | None) -> int:
    # An inference tensor has no version, and what changes it runs in inference mode.
    return 0 if tensor is None or tensor.is_inference() else tensor._version


class FrozenBatchNorm(nn.BatchNorm2d):
    """Batch norm with its running statistics, for evaluation mode; made by :func:`freeze`.

    Whatever else a module may look at in a batch norm is there and is used: parameters, buffers,
    hooks. Where parameters or statistics change, scale and shift follow.

    Raises:
        RuntimeError: called in training mode, which needs the batch's statistics.
    """

    _kept: _Constants | None = None

    def _constants(self) -> _Constants:
        named, buffers = self._parameters, self._buffers
        mean, variance = buffers["running_mean"], buffers["running_var"]
        tensors = (named["weight"], named["bias"], mean, variance)
        versions = tuple(map(_version, tensors))
        kept = self._kept
        if (
            kept is not None
            and kept.versions == versions
            and kept.eps == self.eps
            and all(map(operator.is_, kept.tensors, tensors))
        ):
            return kept
        assert mean is not None
        assert variance is not None
        with torch.inference_mode(False), torch.no_grad():  # kept for any caller
            scale = (variance.double() + self.eps).rsqrt()
            if self.weight is not None:
                scale = scale * self.weight.double()
            shift = -mean.double() * scale
            if self.bias is not None:
                shift = shift + self.bias.double()
            scale, shift = scale.to(mean.dtype), shift.to(mean.dtype)
        self._kept = _Constants(tensors, versions, self.eps, scale, shift)
        return self._kept

    def fold(self, weight: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that is ``weight``'s and this after it.

        Several weights are of convolutions side by side. What is folded is kept for as long as no
        weight changes, unless a gradient of it may be asked for.
        """
        own = self._constants()
        weights = weight if isinstance(weight, tuple) else (weight,)
        last = own.folded
        if torch.is_grad_enabled() and any(one.requires_grad for one in weights):
            return self._folded(own, weights), own.shift
        versions = tuple(map(_version, weights))
        if (
            last is None
            or last[1] != versions
            or len(last[0]) != len(weights)
            or not all(map(operator.is_, last[0], weights))
        ):
            with torch.inference_mode(False), torch.no_grad():
                own.folded = last = (weights, versions, self._folded(own, weights))
        return last[2], own.shift

    @staticmethod
    def _folded(own: _Constants, weights: tuple[Tensor, ...]) -> Tensor:
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        return joined * own.scale.view(-1, 1, 1, 1)

    @staticmethod
    def _row(own: _Constants, pixels: int, channels_last: bool) -> tuple[Tensor, Tensor]:
        key = (pixels, channels_last)
        if key not in own.rows:
            with torch.inference_mode(False):
                own.rows[key] = (
                    (own.scale.repeat(pixels), own.shift.repeat(pixels))
                    if channels_last
                    else (
                        own.scale.repeat_interleave(pixels),
                        own.shift.repeat_interleave(pixels),
                    )
                )
        return own.rows[key]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("FrozenBatchNorm: expected evaluation mode, got training mode")
        if torch.compiler.is_compiling() or not may_keep():
            return super().forward(x)
        own = self._constants()
        n, channels, height, width = x.shape
        if x.dtype != own.scale.dtype:  # autocast
            return torch.addcmul(own.shift.view(1, -1, 1, 1), x, own.scale.view(1, -1, 1, 1)).to(
                x.dtype
            )
        if x.is_contiguous():
            scale, shift = self._row(own, height * width, False)
            return torch.addcmul(shift, x.view(n, channels * height * width), scale).view(x.shape)
        if channels >= _ENOUGH:
            return torch.addcmul(own.shift.view(-1, 1, 1), x, own.scale.view(-1, 1, 1))
        scale, shift = self._row(own, height * width, True)
        # A copy only where x is in neither of the two layouts.
        flat = x.permute(0, 2, 3, 1).reshape(n, channels * height * width)
        y = torch.addcmul(shift, flat, scale)
        return y.view(n, height, width, channels).permute(0, 3, 1, 2)


_is_torch_batch_norm, _is_frozen = Plain(nn.BatchNorm2d), Plain(FrozenBatchNorm)


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a call of ``norm`` is batch norm of this package or of torch and nothing else."""
    return is_batch_norm(norm) or _is_frozen(norm) or _is_torch_batch_norm(norm)


def foldable(norm: nn.Module) -> TypeGuard[FrozenBatchNorm]:
    """Whether :meth:`FrozenBatchNorm.fold` is all that a call of ``norm`` does."""
    return _is_frozen(norm) and not norm.training and may_keep()


def freeze(network: nn.Module) -> nn.Module:
    """``network``, changed in place: each BatchNorm2d with running statistics becomes frozen.

    A batch norm to which anything is attached, of another class, or without running statistics is
    left alone. The modules stay the same objects, so whoever holds one holds the frozen one.
    """
    for module in network.modules():
        plain = _is_torch_batch_norm(module) or is_batch_norm(module)
        if plain and module.running_mean is not None and module.track_running_stats:
            module.__class__ = FrozenBatchNorm
    return network
