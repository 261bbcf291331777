"""Random numbers of an attack: a function of the seed and the image's id, and of nothing else.

The generator is that of :func:`fastbandit.ops.random_start`, so an image meets the same numbers in
any batch, on any device and any number of processes. Everything is computed in float64, where the
last bit, in which libraries may differ, is lost when the result is rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbandit.ops.philox import philox4x32, split64


def words(seed: int, index: Tensor, count: int, offset: int | Tensor) -> Tensor:
    """``count`` random words of 32 bits for each image, int64 [N, count].

    Args:
        seed: in [0, 2^63).
        index: ids of the images, int64 [N].
        offset: number of the draw, in [0, 2^32).
    """
    quarter = torch.arange((count + 3) // 4, device=index.device)
    blocks = philox4x32((quarter, offset, *split64(index[:, None])), split64(seed))
    return torch.stack(blocks, dim=-1).flatten(1)[:, :count]


def uniform(seed: int, index: Tensor, count: int, offset: int | Tensor) -> Tensor:
    """Uniform in (0, 1), float64 [N, count]."""
    return (words(seed, index, count, offset).double() + 0.5) * 2.0**-32


def normal(seed: int, index: Tensor, count: int, offset: int | Tensor) -> Tensor:
    """Standard normal, float64 [N, count], by Box and Muller's method."""
    half = (count + 1) // 2
    first, second = uniform(seed, index, 2 * half, offset).chunk(2, dim=1)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]


def below(word: Tensor, limit: int) -> Tensor:
    """Whole numbers in [0, limit) from random words."""
    return (word * limit) >> 32


def sign(word: Tensor) -> Tensor:
    """-1 or 1 from random words, int64."""
    return 1 - 2 * (word >> 31)
