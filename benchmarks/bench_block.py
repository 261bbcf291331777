"""ReLU - depthwise - 1x1 - batch norm as one op, and layer by layer by this package's single ops.

Two blocks of the search spaces, channels-last: ``dil_conv_3x3`` (N x C x H x H to the same), and
the one that begins a cell, ReLU - 1x1 - batch norm, on the four nodes of the cell before it. Timed
forward and backward: ``training`` with all gradients, ``attack`` with that of the input alone.
The rival ``torch`` has F.conv2d and torch's batch norm in the same layout.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from conftest import OURS, SMOKE
from torch import Tensor, nn

from fastbandit.nn.blocks import ReluConvBN
from fastbandit.nn.operations import make

N = 8 if SMOKE else 64
MAPS = [(8, 8), (16, 32), (32, 16), (32, 32), (64, 8), (64, 16), (128, 16)]  # C, H = W
SINGLE, TORCH = "single ops", "torch"
BLOCK = importlib.import_module("fastbandit.ops.conv_block")
SERVES = BLOCK.serves


def in_torch(block: nn.Module, x: Tensor | Sequence[Tensor]) -> Tensor:
    bn = block.bn
    if isinstance(x, Tensor):
        depthwise = block.depthwise
        channels, geometry = x.shape[1], (depthwise.stride, depthwise.padding, depthwise.dilation)
        y = F.conv2d(F.relu(x), depthwise.weight, None, *geometry, groups=channels)
        y = F.conv2d(y, block.pointwise)
    else:
        y = F.conv2d(F.relu(torch.cat(list(x), 1)), block.weight)
    return F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, training=True)


@pytest.mark.parametrize("rival", [OURS, SINGLE, TORCH])
@pytest.mark.parametrize("step", ["training", "attack"])
@pytest.mark.parametrize("kind", ["dil_conv_3x3", "four maps"])
@pytest.mark.parametrize(("c", "h"), MAPS)
def test_block(measure: Callable[..., None], device, c, h, kind, step, rival):
    torch.manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(N, c, h, h).to(device, memory_format=torch.channels_last)

    if kind == "four maps":
        block: nn.Module = ReluConvBN(4 * c, c, affine=True).to(device)
        xs = [draw().requires_grad_() for _ in range(4)]
        x: Tensor | list[Tensor] = xs
    else:
        block = make(kind, c).to(device)
        x = draw().requires_grad_()
        xs = [x]
    grad = draw()
    wanted = xs if step == "attack" else [*xs, *block.parameters()]

    def run() -> Tensor:
        BLOCK.serves = SERVES if rival == OURS else lambda *_: False
        y = in_torch(block, x) if rival == TORCH else block(x)
        torch.autograd.grad(y, wanted, grad)
        return y

    try:
        expected = in_torch(block, x)
        torch.testing.assert_close(run(), expected, rtol=1e-3, atol=1e-3)
        measure(
            run,
            rival=rival,
            group=f"{kind}, {step}, N {N} C {c} H {h} float32",
            device=device,
            shape=[N, c, h, h],
            dtype="float32",
        )
    finally:
        BLOCK.serves = SERVES
