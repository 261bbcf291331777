"""depthwise_conv2d of dilation 2: forward, input gradient, weight gradient, and both passes.

Rivals: F.conv2d in both layouts; the four-phase split, which turns dilation 2 into dilation 1 of
four times as many images; torch.compile. Part of a CPU rival's time may be page faults on fresh
buffers: run this also with MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296.

On a CPU ``extra_info["floor_us"]`` is the least time that the hardware allows, and the table prints
how far each entry is from it: the larger of the bytes at 24 GB/s and the products at 115 GFLOP/s,
for each thread (a Zen 4 core with AVX-512). A map that stays in the cache can beat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import ops

N, DILATION = 64, 2
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAPS = [(16, 32), (32, 32), (64, 16), (128, 16), (256, 8)]  # C, H = W
FORWARD = torch.ops.fastbandit.depthwise_conv2d.default
BACKWARD_INPUT = torch.ops.fastbandit.depthwise_conv2d_backward_input.default
BACKWARD_WEIGHT = torch.ops.fastbandit.depthwise_conv2d_backward_weight.default
RIVALS = [
    "fastbandit",
    "fastbandit contiguous",
    "F.conv2d channels-last",
    "F.conv2d contiguous",
    "phase split channels-last",
    "phase split contiguous",
]
# The least that is asked on any shape (on the mean: 1.0 forward, 5 input, 10 weight, 2 for both
# passes against the phase split).
GOALS = {
    "forward": {"F.conv2d channels-last": 0.8, "F.conv2d contiguous": 0.8},
    "backward_input": {"F.conv2d channels-last": 2.0, "F.conv2d contiguous": 2.0},
    "backward_weight": {"F.conv2d channels-last": 3.0, "F.conv2d contiguous": 3.0},
    "forward and backward": {"phase split channels-last": 2.0, "phase split contiguous": 2.0},
}


def split(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """[N, C, 2 H, 2 W] -> [4 N, C, H, W]"""
    n, c, h, w = x.shape
    parts = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(3, 5, 0, 1, 2, 4)
    return parts.reshape(4 * n, c, h // 2, w // 2).contiguous(memory_format=memory_format)


def join(x: Tensor, n: int, memory_format: torch.memory_format) -> Tensor:
    _, c, h, w = x.shape
    parts = x.reshape(2, 2, n, c, h, w).permute(2, 3, 4, 0, 5, 1)
    return parts.reshape(n, c, 2 * h, 2 * w).contiguous(memory_format=memory_format)


def phase_conv(x: Tensor, weight: Tensor, k: int, memory_format: torch.memory_format) -> Tensor:
    y = F.conv2d(split(x, memory_format), weight, padding=k // 2, groups=x.shape[1])
    return join(y, x.shape[0], memory_format)


def library_backward(
    grad: Tensor, x: Tensor, weight: Tensor, pad: int, dilation: int, mask: list[bool]
) -> tuple[Tensor, ...]:
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [pad] * 2, [dilation] * 2, False, [0, 0], x.shape[1], mask
    )


def make_call(what: str, rival: str, c: int, h: int, k: int, device: torch.device, dtype):
    generator = torch.Generator().manual_seed(0)
    contiguous = rival.endswith("contiguous")
    layout = torch.contiguous_format if contiguous else torch.channels_last
    x = torch.randn(N, c, h, h, generator=generator).to(device, dtype, memory_format=layout)
    grad = torch.randn(N, c, h, h, generator=generator).to(device, dtype, memory_format=layout)
    weight = torch.randn(c, 1, k, k, generator=generator).to(device, dtype)
    pad = DILATION * (k // 2)
    settings = ([1, 1], [pad] * 2, [DILATION] * 2, False)

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ops.depthwise_conv2d(x, weight, padding=pad, dilation=DILATION)

    def library(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, padding=pad, dilation=DILATION, groups=c)

    def phases(x: Tensor, weight: Tensor) -> Tensor:
        return phase_conv(x, weight, k, layout)

    if what == "forward and backward":
        forward = ours if rival.startswith("fastbandit") else library
        forward = phases if rival.startswith("phase") else forward
        if rival == "torch.compile":
            torch._dynamo.reset()  # or the second shape would make it dynamic
            forward = torch.compile(library, dynamic=False)
        x.requires_grad_()
        weight.requires_grad_()
        return lambda: torch.autograd.grad(forward(x, weight), (x, weight), grad)
    mask = [what == "backward_input", what == "backward_weight", False]
    if rival.startswith("fastbandit"):
        if what == "forward":
            return lambda: FORWARD(x, weight, *settings)
        backward = BACKWARD_INPUT if mask[0] else BACKWARD_WEIGHT
        return lambda: backward(grad, x, weight, *settings)
    if rival.startswith("phase"):
        if what == "forward":
            return lambda: phases(x, weight)
        if mask[1]:
            return lambda: library_backward(
                split(grad, layout), split(x, layout), weight, k // 2, 1, mask
            )
        phase_x = split(x, layout)  # only its shape is used
        return lambda: join(
            library_backward(split(grad, layout), phase_x, weight, k // 2, 1, mask)[0], N, layout
        )
    if what == "forward":
        return lambda: library(x, weight)
    return lambda: library_backward(grad, x, weight, pad, DILATION, mask)


@pytest.mark.parametrize("rival", [*RIVALS, "torch.compile"])
@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize(("c", "h"), MAPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=[str(dtype)[6:] for dtype in DTYPES])
@pytest.mark.parametrize(
    "what", ["forward", "backward_input", "backward_weight", "forward and backward"]
)
def test_depthwise(measure: Callable[..., None], device, what, dtype, c, h, k, rival):
    if rival == "torch.compile" and what != "forward and backward":
        pytest.skip("compiled once, for both passes")
    call: Callable[[], Any] = make_call(what, rival, c, h, k, device, dtype)
    moved = 2 * N * c * h * h * dtype.itemsize
    floor_us = None
    if device.type == "cpu" and what != "forward and backward":
        seconds = max(moved / 24e9, 2 * N * c * h * h * k**2 / 115e9) / torch.get_num_threads()
        floor_us = seconds * 1e6
    measure(
        call,
        rival=rival,
        group=f"{what} {str(dtype)[6:]} C {c} H {h} k {k}",
        device=device,
        goals=GOALS[what] if dtype == torch.float32 else {},
        moved=None if what == "forward and backward" else moved,
        shape=[N, c, h, h],
        kernel=k,
        dtype=str(dtype),
        floor_us=floor_us,
    )


@pytest.mark.parametrize("rival", ["fastbandit", "F.conv2d channels-last", "F.conv2d contiguous"])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize(("c", "h"), [(32, 32), (64, 16)])
def test_depthwise_stride_2(measure: Callable[..., None], device, c, h, k, rival):
    """Forward and backward where a cell halves its maps; dilation 2, float32."""
    pad = DILATION * (k - 1) // 2
    layout = torch.contiguous_format if rival.endswith("contiguous") else torch.channels_last
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, c, h, h, generator=generator).to(device).contiguous(memory_format=layout)
    weight = torch.randn(c, 1, k, k, generator=generator).to(device)
    x.requires_grad_()
    weight.requires_grad_()

    def forward() -> Tensor:
        if rival == "fastbandit":
            return ops.depthwise_conv2d(x, weight, stride=2, padding=pad, dilation=DILATION)
        return F.conv2d(x, weight, None, 2, pad, DILATION, c)

    grad = torch.randn_like(forward())
    measure(
        lambda: torch.autograd.grad(forward(), (x, weight), grad),
        rival=rival,
        group=f"forward and backward, stride 2, float32 C {c} H {h} k {k}",
        device=device,
        shape=[N, c, h, h],
        kernel=k,
        dtype="torch.float32",
    )
