"""A copy of a trained network for evaluation only, with batch norm as what it then is: x * a + b.

torch's batch norm with fixed statistics costs several times one pass over the data, most of it in
the backward pass. Here it is one fused multiply-add over the flat images, whatever their layout,
and its gradient one multiplication. The results differ by rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["FrozenBatchNorm", "freeze"]


class FrozenBatchNorm(nn.Module):
    """Batch norm with the running statistics of ``norm``, for evaluation mode.

    Raises:
        RuntimeError: called in training mode, which needs the batch's statistics.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        mean, variance = norm.running_mean, norm.running_var
        assert mean is not None
        assert variance is not None
        scale = (variance.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.detach().double()
        shift = -mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.detach().double()
        self.register_buffer("scale", scale.to(mean.dtype), persistent=False)
        self.register_buffer("shift", shift.to(mean.dtype), persistent=False)
        # For each size of map: scale and shift of every element of an image, as it lies in memory.
        self._rows: dict[tuple[int, bool], tuple[Tensor, Tensor]] = {}
        # The last weight of a 1x1 convolution that this was folded into, its version, the result.
        self._folded: tuple[Tensor, int, Tensor] | None = None
        self.train(norm.training)

    def fold(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that is ``weight``'s and this after it.

        Kept for as long as ``weight`` does not change, unless a gradient of it may be asked for.
        """
        if weight.requires_grad and torch.is_grad_enabled():
            return weight * self.scale.view(-1, 1, 1, 1), self.shift
        last = self._folded
        if last is None or last[0] is not weight or last[1] != weight._version:
            with torch.no_grad():
                folded = weight * self.scale.view(-1, 1, 1, 1)
            self._folded = last = (weight, weight._version, folded)
        return last[2], self.shift

    def _row(self, pixels: int, channels_last: bool) -> tuple[Tensor, Tensor]:
        key = (pixels, channels_last)
        if key not in self._rows or self._rows[key][0].device != self.scale.device:
            self._rows[key] = (
                (self.scale.repeat(pixels), self.shift.repeat(pixels))
                if channels_last
                else (
                    self.scale.repeat_interleave(pixels),
                    self.shift.repeat_interleave(pixels),
                )
            )
        return self._rows[key]

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("FrozenBatchNorm: expected evaluation mode, got training mode")
        n, channels, height, width = x.shape
        if x.dtype != self.scale.dtype:  # autocast
            return torch.addcmul(self.shift.view(1, -1, 1, 1), x, self.scale.view(1, -1, 1, 1)).to(
                x.dtype
            )
        if x.is_contiguous():
            scale, shift = self._row(height * width, False)
            return torch.addcmul(shift, x.view(n, channels * height * width), scale).view(x.shape)
        scale, shift = self._row(height * width, True)
        # A copy only where x is in neither of the two layouts.
        flat = x.permute(0, 2, 3, 1).reshape(n, channels * height * width)
        y = torch.addcmul(shift, flat, scale)
        return y.view(n, height, width, channels).permute(0, 3, 1, 2)


def freeze(network: nn.Module) -> nn.Module:
    """``network``, changed in place: each BatchNorm2d with running statistics becomes frozen.

    Layers of another class, and subclasses that compute something else, are left alone.
    """
    from fastbandit.nn.layers import BatchNorm2d

    for name, module in list(network.named_children()):
        known = type(module) in (nn.BatchNorm2d, BatchNorm2d)
        if known and module.running_mean is not None and module.track_running_stats:
            assert isinstance(module, nn.BatchNorm2d)
            setattr(network, name, FrozenBatchNorm(module))
        else:
            freeze(module)
    return network
