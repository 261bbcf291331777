"""Pooling of 3 x 3, forward and backward, float32 channels-last: torch's, and that of a search.

Every shape is given to our kernels; a search leaves small ones to torch (ops/max_pool2d.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from conftest import OURS
from torch import Tensor
from torch.nn import functional as F

from fastbandit import ops

module = importlib.import_module("fastbandit.ops.max_pool2d")
POOLS: dict[tuple[str, str], Callable[[Tensor, int], Tensor]] = {
    ("max", OURS): ops.max_pool2d,
    ("max", "torch"): lambda x, stride: F.max_pool2d(x, 3, stride, 1),
    ("average", OURS): ops.avg_pool2d,
    ("average", "torch"): lambda x, stride: F.avg_pool2d(x, 3, stride, 1, count_include_pad=False),
}
MAPS = [  # N, C, H = W, stride: of the digits and of CIFAR-10
    (64, 8, 8, 1), (64, 16, 4, 1), (64, 32, 2, 1), (64, 8, 8, 2), (64, 16, 14, 1),
    (128, 16, 32, 1), (128, 32, 32, 2), (128, 32, 16, 1), (128, 64, 16, 2), (128, 64, 8, 1),
]  # fmt: skip


@pytest.mark.parametrize("rival", [OURS, "torch"])
@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize(("n", "c", "h", "stride"), MAPS)
def test_pool(measure: Callable[..., None], monkeypatch, device, n, c, h, stride, kind, rival):
    if device.type == "cuda" and rival == OURS:
        pytest.skip("on a GPU the same as torch")
    monkeypatch.setattr(module, "_LEAST_OUTPUTS", 0)
    torch.manual_seed(0)
    x = torch.randn(n, c, h, h).to(device, memory_format=torch.channels_last).requires_grad_()
    pool = POOLS[kind, rival]
    grad = torch.randn_like(pool(x, stride).detach())
    measure(
        lambda: torch.autograd.grad(pool(x, stride), x, grad),
        rival=rival,
        group=f"{kind} pooling, forward and backward, {n} x {c} x {h} x {h}, stride {stride}",
        device=device,
        shape=[n, c, h, h],
        dtype="float32",
    )
