"""The skip connection of a reduction cell: two shifted 1x1 convolutions of stride 2, side by side.

No op of its own: where it is faster, one ``conv_block`` on the pixels that the two read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit.ops._convolution import check_optional
from fastbandit.ops._linf import check_tensors
from fastbandit.ops.conv_block import as_term as block_as_term
from fastbandit.ops.conv_block import check_normalization, normalized, serves

__all__ = ["factorized_reduce"]


def _grids(x: Tensor) -> tuple[Tensor, Tensor]:
    """The pixels of even row and column, and those of odd row and column; channels-last."""
    even = x[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    odd = x[:, :, 1::2, 1::2]
    short = [side for size in x.shape[:1:-1] for side in (0, size % 2)]
    if any(short):
        odd = F.pad(odd, short)
    return even, odd.contiguous(memory_format=torch.channels_last)


class _Grids(torch.autograd.Function):
    """:func:`_grids`, whose gradient is written once: slices would each fill a map with zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.shape = x.shape
        return _grids(x)

    @staticmethod
    def backward(ctx: Any, even: Tensor, odd: Tensor) -> Tensor:
        height, width = ctx.shape[2:]
        grad = torch.empty(
            ctx.shape, dtype=even.dtype, device=even.device, memory_format=torch.channels_last
        ).zero_()
        grad[:, :, ::2, ::2] = even
        grad[:, :, 1::2, 1::2] = odd[:, :, : height // 2, : width // 2]
        return grad


def factorized_reduce(x: Tensor, even: Tensor | None, odd: Tensor, **normalization: Any) -> Tensor:
    """ReLU, two 1x1 convolutions of stride 2, the second on x shifted by one pixel, then a norm.

    ``FactorizedReduce`` of DARTS (Liu et al., ICLR 2019). Where an odd size leaves the shifted grid
    one pixel short, that pixel is zero. Differentiable once. The same as::

        a = F.pad(F.relu(x), (0, W % 2, 0, H % 2))
        y = torch.cat((F.conv2d(a[:, :, :H, :W], even, stride=2),
                       F.conv2d(a[:, :, 1:, 1:], odd, stride=2)), 1)

    and a normalisation of y.

    Args:
        x: [N, C, H, W].
        even: [C_1, C, 1, 1], or None for no first half.
        odd: [C_2, C, 1, 1].
        normalization: ``normalize``, ``weight``, ``bias``, the running statistics, ``norm`` and so
            on, as in :func:`fastbandit.ops.conv_block`.

    Returns:
        [N, C_1 + C_2, ceil(H / 2), ceil(W / 2)].

    Raises:
        TypeError, ValueError: as :func:`fastbandit.ops.conv_block`.
        RuntimeError: shapes do not fit, devices differ, or a second derivative is asked for.
    """
    op = "factorized_reduce"
    check_tensors(op, x=x, odd=odd)
    check_optional(op, x, even=even, odd=odd)
    check_normalization(op, **normalization)
    y: Tensor = as_term(x, even, odd, **normalization)
    return y


def as_term(x: Tensor | Sequence[Tensor], even: Tensor | None, odd: Tensor, **how: Any) -> Any:
    """:func:`factorized_reduce` of arguments that are known to be right; ``how`` as in
    :func:`fastbandit.ops.conv_block.as_term`.

    Args:
        x: one map, or several that are meant side by side.
    """
    maps = [x] if isinstance(x, Tensor) else list(x)
    if even is not None and serves(maps, odd):
        split = _Grids.apply if torch.is_grad_enabled() else _grids
        grids = [split(one) for one in maps]
        first, second = ([grid[index] for grid in grids] for index in (0, 1))
        fold = how.get("fold")
        if fold is not None and not torch.is_grad_enabled():
            weight, bias = fold((even, odd))
            half = len(even)
            halves = ((first, weight[:half], bias[:half]), (second, weight[half:], bias[half:]))
            return torch.cat([block_as_term(g, w, bias=b) for g, w, b in halves], 1)
        # Both convolutions as one whose weight has zeros where neither looks: the kernel then
        # needs no map of what it reads, and the products are few at a quarter of the pixels.
        joined = torch.block_diag(even.flatten(1), odd.flatten(1))[:, :, None, None]
        return block_as_term([*first, *second], joined, **how)
    x = F.relu(maps[0] if len(maps) == 1 else torch.cat(maps, 1))
    shifted = x[:, :, 1:, 1:]
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        shifted = F.pad(shifted, (0, width % 2, 0, height % 2))
    y = F.conv2d(shifted, odd, stride=2)
    if even is not None:
        y = torch.cat((F.conv2d(x, even, stride=2), y), dim=1)
    return normalized(y, **how)
