"""The parts of DilConv (ReLU - depthwise - 1x1 - batch norm), forward and backward, channels-last.

What could fusing them save? At most the batch norm, whose passes over memory would ride on those of
the 1x1 convolution; the products of the other two parts stay. So the bound on the gain is
whole / (whole - batch norm). The ratios printed are part / whole.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit.nn.layers import BatchNorm2d, DepthwiseConv2d

N = 64
MAPS = [(16, 32), (32, 32), (64, 16), (128, 16)]  # C, H = W


@pytest.mark.parametrize("part", ["whole", "relu and depthwise", "1x1", "batch norm"])
@pytest.mark.parametrize(("c", "h"), MAPS)
def test_block(measure: Callable[..., None], device, c, h, part):
    torch.manual_seed(0)
    layout = torch.channels_last
    x = torch.randn(N, c, h, h).to(device, memory_format=layout).requires_grad_()
    grad = torch.randn(N, c, h, h).to(device, memory_format=layout)
    depthwise = DepthwiseConv2d(c, 3, dilation=2).to(device)
    pointwise = torch.randn(c, c, 1, 1, device=device, requires_grad=True)
    norm = BatchNorm2d(c).to(device)
    parts: dict[str, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {
        "relu and depthwise": (depthwise, [depthwise.weight]),
        "1x1": (lambda y: F.conv2d(y, pointwise), [pointwise]),
        "batch norm": (norm, [*norm.parameters()]),
    }
    parts["whole"] = (
        lambda y: norm(F.conv2d(depthwise(y), pointwise)),
        [depthwise.weight, pointwise, *norm.parameters()],
    )
    forward, weights = parts[part]
    measure(
        lambda: torch.autograd.grad(forward(x), (x, *weights), grad),
        rival="fastbandit" if part == "whole" else part,
        group=f"DilConv 3x3, forward and backward, float32 C {c} H {h}",
        device=device,
        shape=[N, c, h, h],
        dtype="float32",
    )
