"""3 x 3 average pooling with a padding of 1 that is not counted, the pooling of the search spaces.

No op of its own: where it is faster, a depthwise convolution with a factor for the edges.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit._modes import autocast_dtype, may_keep
from fastbandit.ops.depthwise_conv2d import depthwise_conv2d
from fastbandit.ops.max_pool2d import check_pooling, kernel_pools

__all__ = ["avg_pool2d"]


def _average(channels: int, height: int, width: int, stride: int) -> tuple[Tensor, Tensor]:
    """Weight [C, 1, 3, 3] of the depthwise convolution, and the factor [1, C, H_out, W_out] by
    which there are fewer pixels than nine at an edge."""

    def of(size: int) -> Tensor:
        centre = torch.arange(0, size, stride)
        return 3.0 / ((centre + 1).clamp(max=size - 1) - (centre - 1).clamp(min=0) + 1)

    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):  # kept for any caller
        factor = (of(height)[:, None] * of(width)).expand(1, channels, -1, -1)
        factor = factor.float().contiguous(memory_format=torch.channels_last)
        return torch.full((channels, 1, 3, 3), 1 / 9, dtype=torch.float32), factor


_kept_average = lru_cache(maxsize=64)(_average)


def avg_pool2d(x: Tensor, stride: int = 1) -> Tensor:
    """The mean of each 3 x 3 window, with a padding of 1 that is not counted.

    The same as ``F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)``, and computed by torch,
    except for float32 in channels-last on a CPU from 2^15 outputs on, outside autocast: there the
    depthwise convolution of this package takes less than half of the time, and is differentiable
    once.

    Args:
        x: [N, C, H, W].
        stride: 1 or 2.

    Returns:
        [N, C, ceil(H / stride), ceil(W / stride)] in the layout of ``x``.

    Raises:
        TypeError: x is no tensor.
        ValueError: another stride.
    """
    check_pooling("avg_pool2d", x, stride)
    # The tensors of the convolution are made on the CPU.
    if x.is_cpu and kernel_pools("depthwise_conv2d", x, stride) and autocast_dtype(x) is None:
        channels, height, width = x.shape[1:]
        average = _kept_average if may_keep() else _average
        weight, factor = average(channels, height, width, stride)
        return depthwise_conv2d(x, weight, stride=stride, padding=1).mul_(factor)
    return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)
