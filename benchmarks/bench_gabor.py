"""gabor_conv2d, filters included: both passes, and the forward alone.

Rivals: the two-line form (channel sum, then F.conv2d from one channel) with filters built in
PyTorch, in both layouts and compiled; the dense form with C_out x C_in x k x k filters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import ops

gabor = importlib.import_module("fastbandit.ops.gabor")

N = 64
MAPS = [(16, 32), (64, 16), (128, 16)]  # C_in = C_out, H = W
RIVALS = [
    "fastbandit",
    "fastbandit contiguous",
    "two lines channels-last",
    "two lines contiguous",
    "two lines torch.compile",
    "dense channels-last",
]


def two_lines(x: Tensor, parameters: list[Tensor], k: int) -> Tensor:
    bank = gabor._filters_reference(*parameters, k)
    return F.conv2d(x.sum(1, keepdim=True), bank[:, None], padding=k // 2)


def dense(x: Tensor, parameters: list[Tensor], k: int) -> Tensor:
    bank = gabor._filters_reference(*parameters, k)
    return F.conv2d(x, bank[:, None].expand(-1, x.shape[1], -1, -1), padding=k // 2)


def ours(x: Tensor, parameters: list[Tensor], k: int) -> Tensor:
    return ops.gabor_conv2d(x, *parameters, kernel_size=k, padding=k // 2)


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("c", "h"), MAPS)
@pytest.mark.parametrize("what", ["forward", "forward and backward"])
def test_gabor(measure: Callable[..., None], device, what, c, h, k, rival):
    generator = torch.Generator().manual_seed(0)
    contiguous = rival.endswith("contiguous")
    layout = torch.contiguous_format if contiguous else torch.channels_last
    x = torch.randn(N, c, h, h, generator=generator).to(device, memory_format=layout)
    grad = torch.randn(N, c, h, h, generator=generator).to(device, memory_format=layout)
    ranges = [(0.0, 3.1), (0.5, 1.0), (0.5, 1.0), (2.0, 4.0), (-3.0, 6.0)]
    parameters = [
        (low + width * torch.rand(c, generator=generator)).to(device).requires_grad_()
        for low, width in ranges
    ]
    function = {"fastbandit": ours, "two": two_lines, "dense": dense}[rival.split()[0]]
    if rival.endswith("torch.compile"):
        torch._dynamo.reset()  # or the second k would make it dynamic
        function = torch.compile(function, dynamic=False)
    if what == "forward":

        def call() -> Any:
            with torch.no_grad():
                return function(x, parameters, k)
    else:
        x.requires_grad_()

        def call() -> Any:
            return torch.autograd.grad(function(x, parameters, k), (x, *parameters), grad)

    both = what == "forward and backward"
    goals = {rival: 3.0 for rival in RIVALS if rival.startswith("two")} if both else {}
    if both and c == 64:
        goals["dense channels-last"] = 10.0
    measure(
        call,
        rival=rival,
        group=f"gabor {what} C {c} H {h} k {k}",
        device=device,
        goals=goals,
        shape=[N, c, h, h],
        kernel=k,
    )
