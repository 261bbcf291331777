"""The native CPU kernels of depthwise_conv2d: every inner loop against float64, in every layout.

tests/test_ops_depthwise_conv2d.py tests the op as a whole, whatever serves it; this file walks
through what only the native kernels have: unrolled shapes, tiles, lanes, instruction sets, threads.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import _native, ops  # noqa: F401

pytestmark = pytest.mark.skipif(
    not _native.status()["cpu"]["loaded"], reason="the native CPU library is not loaded"
)

FORWARD = torch.ops.fastbandit.depthwise_conv2d.default
BACKWARD_INPUT = torch.ops.fastbandit.depthwise_conv2d_backward_input.default
BACKWARD_WEIGHT = torch.ops.fastbandit.depthwise_conv2d_backward_weight.default

# Relative to the largest value of a result: one rounding to its type, and for float32 the sum.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 5e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}
# N, C, H, W: blocks of 8 and 16 lanes and tiles of 8 and 16 pixels, below, at and above their size.
SHAPES = [
    (2, 16, 8, 8),
    (1, 3, 7, 9),
    (3, 17, 31, 5),
    (2, 32, 16, 33),
    (1, 1, 1, 1),
    (5, 20, 3, 18),
    (1, 8, 1, 40),
]
LAYOUTS = ["contiguous", "channels_last", "strided", "channels_last_view"]
# kernel, stride, padding, dilation that no unrolled loop takes.
GENERAL = [
    ((3, 5), (1, 1), (1, 2), (1, 1)),
    ((9, 9), (1, 1), (4, 4), (1, 1)),
    ((3, 3), (3, 3), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (3, 3), (3, 3)),
    ((2, 4), (1, 2), (0, 3), (2, 1)),
    ((1, 1), (1, 1), (2, 0), (1, 1)),
    ((70, 1), (1, 1), (40, 0), (1, 1)),  # more rows of taps than the small array of pointers
]


def place(tensor: Tensor, layout: str) -> Tensor:
    """The tensor in a layout; views lie in a larger storage full of NaN."""
    n, c, h, w = tensor.shape
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        storage = torch.full((n, c + 2, h + 3, 2 * w + 5), float("nan"), dtype=tensor.dtype)
        view = storage[:, 1 : c + 1, 2 : h + 2, 3 : 2 * w + 3 : 2]
    else:
        storage = torch.full((n, h + 3, w + 5, c + 2), float("nan"), dtype=tensor.dtype)
        view = storage[:, 1 : h + 1, 2 : w + 2, 1 : c + 1].permute(0, 3, 1, 2)
    return view.copy_(tensor)


def check(shape, kernel, stride, padding, dilation, relu, dtype, layout, seed=0) -> int:
    """Compares the three ops with float64; returns 0 where the map does not hold the filter."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[1]
    extent = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    if any(shape[2 + i] + 2 * padding[i] < extent[i] for i in (0, 1)):
        return 0
    x = place(torch.randn(shape, generator=generator).to(dtype), layout)
    weight = torch.randn(channels, 1, *kernel, generator=generator).to(dtype)
    wide_x, wide_weight = (t.double().clone().requires_grad_() for t in (x, weight))
    activated = wide_x.relu() if relu else wide_x
    expected = F.conv2d(activated, wide_weight, None, stride, padding, dilation, channels)
    grad = place(torch.randn(expected.shape, generator=generator).to(dtype), layout)
    gradients = torch.autograd.grad(expected, (wide_x, wide_weight), grad.double())
    settings = (stride, padding, dilation, relu)
    results = (
        FORWARD(x, weight, *settings),
        BACKWARD_INPUT(grad, x, weight, *settings),
        BACKWARD_WEIGHT(grad, x, weight, *settings),
    )
    names = ("forward", "backward_input", "backward_weight")
    for name, result, reference in zip(names, results, (expected, *gradients), strict=True):
        assert result.shape == reference.shape
        error = (result.double() - reference).abs().max().item()
        limit = TOLERANCE[dtype] * reference.abs().max().item() + 1e-7
        assert error <= limit, f"{name} {shape} {kernel} {settings} {dtype} {layout}: {error}"
    return 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_unrolled_shapes(dtype, layout):
    combinations = itertools.product((1, 3, 5, 7), (1, 2), (1, 2), SHAPES)
    checked = 0
    for index, (k, dilation, stride, shape) in enumerate(combinations):
        if dtype == torch.float64 and shape[2] * shape[3] > 100:
            continue  # plain loops, no tiles
        pad = dilation * (k // 2)
        # The ReLU alternates with every other factor, so each loop is met with and without.
        relu = (index + index // len(SHAPES)) % 2 == 0
        checked += check(
            shape, (k, k), (stride,) * 2, (pad,) * 2, (dilation,) * 2, relu, dtype, layout, index
        )
    assert checked > 70


@pytest.mark.parametrize("k", [3, 5, 7])
@pytest.mark.parametrize("dilation", [1, 2])
def test_unrolled_shapes_at_every_width_channels_last(k, dilation):
    """Where tiles meet the edges: a convolution that keeps its size has loops of its own there."""
    same = dilation * (k // 2)
    for width, pad in itertools.product(range(1, 42), (0, same - 1, same, same + 3)):
        settings = ((1, 1), (same, pad), (dilation,) * 2, width % 2 == 0)
        check((1, 16, 3, width), (k, k), *settings, torch.float32, "channels_last", width)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("settings", GENERAL, ids=str)
def test_general_shapes(settings, layout):
    shapes = [(2, 16, 8, 8), (3, 17, 11, 5)]
    for dtype, shape, relu in itertools.product(TOLERANCE, shapes, (False, True)):
        check(shape, *settings, relu, dtype, layout)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_maps_are_cut_into_pieces(layout):
    for k, stride in ((3, 1), (7, 2), (9, 1)):
        pad = (k // 2,) * 2
        assert check(
            (1, 18, 80, 260), (k, k), (stride,) * 2, pad, (1, 1), True, torch.float32, layout
        )


@pytest.mark.parametrize("layout", ["channels_last", "channels_last_view"])
@pytest.mark.parametrize("stride", [1, 2])
def test_maps_that_outgrow_the_cache(layout, stride):
    """Above 10 MiB the kernels also ask for lines ahead; 40 channels leave a partial block."""
    shape = (5, 40, 96, 96)
    assert check(shape, (3, 3), (stride,) * 2, (2, 2), (2, 2), False, torch.float32, layout)


def test_no_images():
    x, weight = torch.zeros(0, 4, 8, 8), torch.randn(4, 1, 3, 3)
    settings = ((1, 1), (1, 1), (1, 1), True)
    assert FORWARD(x, weight, *settings).shape == (0, 4, 8, 8)
    assert BACKWARD_INPUT(x, x, weight, *settings).shape == (0, 4, 8, 8)
    assert torch.equal(BACKWARD_WEIGHT(x, x, weight, *settings), torch.zeros(4, 1, 3, 3))


def test_nan_passes_the_relu():
    x = torch.tensor([float("nan"), -1.0, 2.0, 0.0]).view(1, 1, 1, 4)
    weight, settings = torch.full((1, 1, 1, 1), 3.0), ((1, 1), (0, 0), (1, 1), True)
    y = FORWARD(x, weight, *settings)
    torch.testing.assert_close(
        y.flatten(), torch.tensor([float("nan"), 0.0, 6.0, 0.0]), equal_nan=True
    )
    gradient = BACKWARD_INPUT(torch.ones_like(y), x, weight, *settings).flatten()
    assert gradient[1:].tolist() == [0.0, 3.0, 0.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_for_every_run_and_number_of_threads(dtype, layout):
    generator = torch.Generator().manual_seed(2)
    x = place(torch.randn(13, 24, 17, 19, generator=generator).to(dtype), layout)
    grad = place(torch.randn(13, 24, 17, 19, generator=generator).to(dtype), layout)
    weight = torch.randn(24, 1, 5, 5, generator=generator).to(dtype)
    settings = ((1, 1), (4, 4), (2, 2), True)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5, 1):
            torch.set_num_threads(count)
            results.append(
                (
                    FORWARD(x, weight, *settings),
                    BACKWARD_INPUT(grad, x, weight, *settings),
                    BACKWARD_WEIGHT(grad, x, weight, *settings),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
