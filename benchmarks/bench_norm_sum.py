"""A node of a cell, forward and backward, float32 channels-last: batch norms and their sum.

``single ops`` normalises each term by ops.batch_norm and adds them in place, as a node was made
before. The kernel is made to serve every shape here. Buffers are warm in this loop, and mostly the
same; in a training step they are not (bench_search_step.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from conftest import OURS

from fastbandit import ops

module = importlib.import_module("fastbandit.ops.norm_sum")
SERVES = module._serves_all
MAPS = [  # N, C, H = W: of the digits and of CIFAR-10
    (64, 8, 8), (64, 16, 4), (64, 16, 14), (128, 16, 32), (128, 32, 16), (128, 64, 8)
]  # fmt: skip


@pytest.mark.parametrize("rival", [OURS, "single ops"])
@pytest.mark.parametrize("terms", [2, 4])
@pytest.mark.parametrize(("n", "c", "h"), MAPS)
def test_node(measure: Callable[..., None], monkeypatch, device, n, c, h, terms, rival):
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(module, "_serves_all", SERVES if rival == OURS else lambda terms: False)
    torch.manual_seed(0)
    *xs, grad = (
        torch.randn(n, c, h, h).to(device, memory_format=torch.channels_last)
        for _ in range(terms + 1)
    )
    for x in xs:
        x.requires_grad_()
    running = [(torch.zeros(c, device=device), torch.ones(c, device=device)) for _ in range(terms)]

    def node() -> None:
        normalized = [
            ops.Normalized(x, running_mean=mean, running_var=var)
            for x, (mean, var) in zip(xs, running, strict=True)
        ]
        torch.autograd.grad(ops.norm_sum(normalized), xs, grad)

    measure(
        node,
        rival=rival,
        group=f"a node of {terms} batch norms, forward and backward, {n} x {c} x {h} x {h}",
        device=device,
        shape=[terms, n, c, h, h],
        dtype="float32",
    )
