"""Batch norm and Gabor parameters on a GPU, ours and torch's, for ``gpu_stages.py``."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastbandit import ops

LAST = torch.channels_last
Compare = Callable[[str, Callable[[], Any], dict[str, Callable[[], Any]]], None]


def torchs_norm(x: Tensor) -> Tensor:
    return torch.batch_norm(
        x, None, None, None, None, True, 0.1, 1e-5, torch.backends.cudnn.enabled
    )


def compare_small(compare: Compare, device: torch.device, check: bool) -> None:
    """Both passes of each."""
    for (c, h), dtype in itertools.product([(16, 32), (64, 8)], (torch.float32, torch.bfloat16)):
        x, grad = (
            torch.randn(4 if check else 256, c, h, h).to(device, dtype, memory_format=LAST)
            for _ in range(2)
        )
        x.requires_grad_()

        def both(
            norm: Callable[[Tensor], Tensor], x: Tensor = x, grad: Tensor = grad
        ) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(norm(x), x, grad)

        compare(
            f"batch_norm C{c} H{h} {str(dtype)[6:]}, both passes",
            both(ops.batch_norm),
            {"torch": both(torchs_norm)},
        )
    numbers = [torch.randn(32, device=device).requires_grad_() for _ in range(4)]
    grads = [torch.randn(32, device=device) for _ in range(4)]
    reference = importlib.import_module("fastbandit.ops.gabor_parameters")._reference
    compare(
        "gabor_parameters C32, both passes",
        lambda: torch.autograd.grad(ops.gabor_parameters(*numbers), numbers, grads),
        {"torch": lambda: torch.autograd.grad(
            reference(*numbers, 0.5, 1.0, 2.0, 4.0), numbers, grads
        )},
    )  # fmt: skip
