"""Batch norm with running statistics, forward and backward, float32 channels-last.

The kernel is made to serve every shape here. Buffers are warm in this loop, and mostly the same;
in a training step they are not, which is where the choice in fastbandit/ops/batch_norm.py was made
(bench_search_step.py, "torch's batch norm").
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from conftest import OURS

from fastbandit import ops

module = importlib.import_module("fastbandit.ops.batch_norm")
MAPS = [  # N, C, H = W: of the digits, of MNIST, of CIFAR-10 and between
    (64, 8, 8), (64, 16, 4), (64, 32, 2), (64, 8, 28), (64, 16, 14), (128, 16, 28), (128, 8, 32),
    (64, 16, 32), (128, 16, 32), (128, 24, 32), (64, 32, 32), (256, 32, 16), (128, 64, 8),
]  # fmt: skip


@pytest.mark.parametrize("rival", [OURS, "torch.batch_norm"])
@pytest.mark.parametrize(("n", "c", "h"), MAPS)
def test_batch_norm(measure: Callable[..., None], monkeypatch, device, n, c, h, rival):
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0 if rival == OURS else 1 << 62)
    torch.manual_seed(0)
    x, grad = (
        torch.randn(n, c, h, h).to(device, memory_format=torch.channels_last) for _ in range(2)
    )
    x.requires_grad_()
    mean, var = torch.zeros(c, device=device), torch.ones(c, device=device)
    measure(
        lambda: torch.autograd.grad(ops.batch_norm(x, None, None, mean, var), x, grad),
        rival=rival,
        group=f"batch norm, forward and backward, {n} x {c} x {h} x {h}",
        device=device,
        shape=[n, c, h, h],
        dtype="float32",
    )
