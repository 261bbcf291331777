"""The CUDA kernels of depthwise_conv2d and its gradients, run on the CPU against float64."""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, Call, exact, library, run, run_all
from torch import Tensor

# The sanitizers' build computes the same: the plain one, which is optimised otherwise, is looked at
# in one layout.
LAYOUTS = [
    *((layout, "sanitized") for layout in ("contiguous", "channels_last", "strided", "unaligned")),
    ("unaligned", "plain"),
]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Relative to the largest value of the result: the rounding of the result's type, and for float32
# the accumulation too.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
# N, C, H, W, k, stride, padding, dilation. Tiles (32 x 32), groups of 4 x 4 and of channels (32)
# are met below, at and above their sizes. Channels-last maps of 4 channels (8 in half types) and
# their multiples are staged: 16 channels and items of up to 8 x 8 tiles a block.
CASES = [
    (2, 3, 8, 8, 3, 1, 2, 2),
    (1, 1, 1, 1, 3, 1, 1, 1),
    (3, 17, 7, 5, 5, 1, 4, 2),
    (1, 2, 16, 16, 7, 1, 6, 2),
    (1, 33, 4, 8, 3, 1, 1, 1),
    (1, 1, 35, 40, 5, 1, 2, 1),
    (1, 2, 9, 12, 7, 1, 0, 1),
    (2, 2, 9, 8, 3, 1, 3, 3),
    (1, 2, 31, 16, 3, 1, 0, 2),
    (2, 3, 9, 7, 3, 2, 1, 1),
    (1, 2, 8, 8, 1, 1, 0, 1),
    (1, 3, 10, 9, (3, 5), (2, 3), (0, 4), (2, 1)),
    (3, 16, 8, 8, 3, 1, 2, 2),
    (1, 24, 5, 7, 3, 1, 1, 1),
    (1, 8, 35, 20, 3, 1, 2, 1),
    (5, 4, 3, 2, 3, 1, 3, 3),
    (2, 16, 6, 9, 5, 1, 4, 2),
    (1, 40, 4, 5, 7, 1, 6, 2),
    (1, 8, 17, 18, 7, 1, 0, 1),
]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def make(case, dtype: torch.dtype, layout: str, generator: torch.Generator):
    n, c, h, w, k, stride, padding, dilation = case
    x = torch.randn(n, c, h, w, generator=generator).to(dtype)
    weight = torch.randn(c, 1, *pair(k), generator=generator).to(dtype)
    settings = {"stride": pair(stride), "padding": pair(padding), "dilation": pair(dilation)}
    y = F.conv2d(x.double(), weight.double(), groups=c, **settings)
    grad = torch.randn(y.shape, generator=generator).to(dtype)
    return place(x, layout), weight, place(grad, layout), settings


def place(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a layout, in a storage of exactly its extent."""
    if layout == "channels_last":
        return exact(tensor.to(memory_format=torch.channels_last))
    if layout == "strided":
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if layout == "unaligned":
        shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        shifted[1:] = tensor.reshape(-1)
        return shifted[1:].view(tensor.shape)
    return exact(tensor)


def empty(tensor: Tensor, layout: str) -> Tensor:
    """A result to write, full of NaN so that nothing unwritten passes."""
    return place(
        torch.full_like(tensor, float("nan"), memory_format=torch.contiguous_format), layout
    )


def shape_numbers(x: Tensor, weight: Tensor, grad: Tensor, settings, relu: bool) -> list[int]:
    sizes = [*x.shape, *grad.shape[2:], *weight.shape[2:]]
    return [*sizes, *settings["stride"], *settings["padding"], *settings["dilation"], int(relu)]


def calls_of(x: Tensor, weight: Tensor, grad: Tensor, settings, relu: bool, layout: str):
    """Calls of the three launchers and their results."""
    dtype = DTYPES[x.dtype]
    shape = shape_numbers(x, weight, grad, settings, relu)
    y, grad_x, grad_weight = empty(grad, layout), empty(x, layout), empty(weight, "contiguous")
    strides = [list(t.stride()) for t in (x, grad, y, grad_x)]
    strides_in = [strides[1], strides[0], strides[3], 1, None]
    floats = partial_floats(grad, x, shape)
    partial = torch.full((floats,), float("nan")) if floats else None
    op, name = "depthwise_conv2d", f"{tuple(x.shape)} {shape} {layout} {x.dtype}"
    calls = [
        Call(
            op,
            "launch_depthwise_conv2d",
            [x, dtype, weight, dtype, None, y, dtype, shape, strides[0], None, strides[2], 0, None],
            f"forward {name}",
        ),
        Call(
            op,
            "launch_depthwise_conv2d",
            [grad, dtype, weight, dtype, x if relu else None, grad_x, dtype, shape, *strides_in],
            f"backward_input {name}",
        ),
        Call(
            op,
            "launch_depthwise_conv2d_backward_weight",
            [grad, dtype, x, dtype, partial, grad_weight, dtype, shape, *strides[1::-1], None],
            f"backward_weight {name}",
        ),
    ]
    return calls, (y, grad_x, grad_weight)


def partial_floats(grad: Tensor, x: Tensor, shape: list[int]) -> int:
    function = ctypes.CDLL(
        str(library("depthwise_conv2d", "plain"))
    ).depthwise_conv2d_partial_floats
    function.restype = ctypes.c_int64
    numbers = [(ctypes.c_int64 * len(v))(*v) for v in (shape, grad.stride(), x.stride())]
    return function(ctypes.c_int(DTYPES[grad.dtype]), *numbers)


def expected(x: Tensor, weight: Tensor, grad: Tensor, settings, relu: bool):
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    y = F.conv2d(x.relu() if relu else x, weight, groups=x.shape[1], **settings)
    return y.detach(), *torch.autograd.grad(y, (x, weight), grad.double())


def assert_close(result: Tensor, reference: Tensor, tolerance: float, name: str) -> None:
    error = (result.double() - reference).abs().max().item()
    scale = reference.abs().max().item()
    assert error <= tolerance * scale + 1e-7, f"{name}: {error} of {scale}"


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "mode"), LAYOUTS)
def test_against_float64(layout, mode):
    generator = torch.Generator().manual_seed(0)
    calls, checks = [], []
    for index, case in enumerate(CASES):
        for dtype in FLOATS:
            relu = (index + FLOATS.index(dtype)) % 2 == 0
            made = make(case, dtype, layout, generator)
            new, results = calls_of(*made, relu, layout)
            calls += new
            checks += zip(new, results, expected(*made, relu), strict=True)
    run_all(calls, mode)
    for call, result, reference in checks:
        assert_close(result, reference, TOLERANCE[result.dtype], call.name)


def test_more_groups_than_an_int_counts():
    """A map of one pixel has a group for each of the 512 x 512 phases of its dilation: 2^32 with
    these images, which wraps to none."""
    generator = torch.Generator().manual_seed(2)
    made = make((1 << 14, 1, 1, 1, 3, 1, 512, 512), torch.float32, "contiguous", generator)
    calls, results = calls_of(*made, False, "contiguous")
    for call, result, reference in zip(calls, results, expected(*made, False), strict=True):
        run(call)
        assert_close(result, reference, TOLERANCE[torch.float32], call.name)


def test_same_bits_at_every_run_and_thread_order(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    made = make((5, 4, 9, 8, 5, 1, 4, 2), torch.float32, "contiguous", generator)
    results = []
    for _ in range(2):
        calls, result = calls_of(*made, True, "contiguous")
        for call in calls:
            run(call)
        results.append(result)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
