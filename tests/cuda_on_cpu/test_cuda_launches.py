"""Launches of the CUDA kernels of an op, as benchmarks/count_step.py counts them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from harness import DTYPES, Call, launches
from torch import Tensor

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import count_step

F32 = DTYPES[torch.float32]
PIXELS, CHANNELS = 130, 8


def maps(number: int) -> list[Tensor]:
    return [torch.randn(PIXELS, CHANNELS) for _ in range(number)]


def as_map(x: Tensor) -> Tensor:
    return x.t()[None, :, :, None]  # channels-last


def vectors(number: int) -> list[Tensor]:
    return [torch.ones(CHANNELS) for _ in range(number)]


@pytest.mark.parametrize("kinds", [[0, 0], [1], [1, 0], [7, 1], [9], [9, 1], [15, 0]])
def test_norm_sum(kinds):
    xs, count = maps(len(kinds)), len(kinds)
    slots = [v if kind & bit else None for kind in kinds for bit in (2, 4, 8, 8)
             for v in vectors(1)]  # fmt: skip
    statistics = [torch.zeros(count, CHANNELS) for _ in range(3)]
    partial = torch.zeros(1 << 14)
    arguments = [*xs, *[None] * (4 - count), kinds, *slots, *[None] * (16 - len(slots)), count]
    arguments += [maps(1)[0], *statistics, partial, partial.numel(), F32, PIXELS, CHANNELS, 1e-3]
    made = launches(Call("norm_sum", "enter_norm_sum", arguments))
    assert made == count_step.NODES["norm_sum"](xs, kinds, [], 1e-3)


@pytest.mark.parametrize("terms", [1, 2, 6])
def test_norm_sum_backward(terms):
    xs, results, nothing = maps(terms), maps(terms), [None] * (6 - terms)
    grad, mean, by_weight = maps(1)[0], *(torch.zeros(terms, CHANNELS) for _ in range(2))
    partial = torch.zeros(1 << 14)
    arguments = [grad, *xs, *nothing, *[None] * 6, terms, mean, torch.ones_like(mean)]
    arguments += [*results, *nothing, by_weight, *vectors(1), partial, partial.numel()]
    arguments += [F32, PIXELS, CHANNELS]
    made = launches(Call("norm_sum", "enter_norm_sum_backward", arguments))
    nodes = count_step.NODES["norm_sum_backward"]
    assert made == nodes(as_map(grad))
    assert made + 1 == nodes(as_map(grad)[:, :1].expand(1, CHANNELS, PIXELS, 1))


def test_depthwise_and_gabor():
    """Those of a Gabor convolution are its steps in csrc/cuda/gabor.cpp."""
    n, c, size, k = 2, 8, 8, 3
    x, y = (torch.randn(n, c, size, size).to(memory_format=torch.channels_last) for _ in range(2))
    weight, partial = torch.randn(c, 1, k, k), torch.zeros(1 << 16)
    plane = torch.randn(n, 1, size, size)
    shape = [n, c, size, size, size, size, k, k, 1, 1, 1, 1, 1, 1, 0]
    strides = list(x.stride())
    made = {
        name: launches(Call(op, f"launch_{name}", arguments))
        for op, name, arguments in (
            ("depthwise_conv2d", "depthwise_conv2d",
             [x, F32, weight, F32, None, y, F32, shape, strides, None, strides, 0, None]),
            ("depthwise_conv2d", "depthwise_conv2d_backward_weight",
             [y, F32, x, F32, partial, weight, F32, shape, strides, strides, None]),
            ("gabor", "channel_sum", [x, F32, list(x.shape), strides, plane, None]),
            ("gabor", "gabor_backward_input",
             [y, F32, shape, strides, weight, plane, None]),
        )
    }  # fmt: skip
    forward, by_weight, total, by_input = made.values()
    nodes = {name: count_step.NODES.get(name, 1) for name in made}
    assert forward == nodes["depthwise_conv2d"]
    assert by_weight == nodes["depthwise_conv2d_backward_weight"]
    filters = 1  # and their gradients: a launch each, tests/cuda_on_cpu/test_cuda_gabor.py
    assert count_step.NODES["gabor_conv2d"] == filters + total + forward
    backward = count_step.NODES["gabor_conv2d_backward"]
    assert backward([True, False]) == filters + by_input
    assert backward([False, True]) == total + by_weight + filters
    assert backward([True, True]) == backward([True, False]) + backward([False, True])
