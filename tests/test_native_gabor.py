"""The native CPU kernels of the Gabor ops against float64, in every layout.

tests/test_ops_gabor.py tests the ops as a whole, whatever serves them.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from test_native_depthwise import LAYOUTS, TOLERANCE, place
from torch import Tensor

from fastbandit import _native
from fastbandit.ops._convolution import convolution_backward

gabor = importlib.import_module("fastbandit.ops.gabor")

pytestmark = pytest.mark.skipif(
    not _native.status()["cpu"]["loaded"], reason="the native CPU library is not loaded"
)

CONV = torch.ops.fastbandit.gabor_conv2d.default
CONV_BACKWARD = torch.ops.fastbandit.gabor_conv2d_backward.default

# N, C, H, W, C_out
SHAPES = [
    (2, 16, 8, 8, 16),
    (1, 3, 7, 9, 5),
    (3, 17, 31, 5, 33),
    (1, 1, 1, 1, 1),
    (4, 40, 9, 20, 24),
]
# k, stride, padding, dilation
SETTINGS = [
    (3, (1, 1), (1, 1), (1, 1)),
    (5, (1, 1), (2, 2), (1, 1)),
    (7, (1, 1), (3, 3), (1, 1)),
    (3, (2, 1), (2, 1), (2, 2)),
    (1, (1, 1), (0, 0), (1, 1)),
    (9, (3, 3), (8, 4), (1, 1)),
]


def parameters(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    ranges = [(0, 6.3), (0.5, 1.0), (0.5, 1.0), (2.0, 4.0), (-3.0, 6.0)]
    return [
        (low + width * torch.rand(count, generator=generator)).to(dtype) for low, width in ranges
    ]


def assert_close(result: Tensor, reference: Tensor, tolerance: float, name: str) -> None:
    assert result.shape == reference.shape, name
    error = (result.double() - reference).abs().max().item()
    limit = tolerance * reference.abs().max().item() + 1e-7
    assert error <= limit, f"{name}: {error}, at most {limit}"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_convolution_and_gradients(dtype, layout):
    for index, (shape, settings) in enumerate(itertools.product(SHAPES, SETTINGS)):
        n, c, h, w, count = shape
        if dtype == torch.float64 and h * w > 100:
            continue
        k, stride, padding, dilation = settings
        if any((h, w)[i] + 2 * padding[i] < dilation[i] * (k - 1) + 1 for i in (0, 1)):
            continue
        generator = torch.Generator().manual_seed(index)
        # The parameters stay in float32 beside half types every other time.
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parameter_dtype = wide if index % 2 == 0 else dtype
        values = parameters(count, parameter_dtype, generator)
        x = place(torch.randn(n, c, h, w, generator=generator).to(dtype), layout)
        double = [v.double() for v in values]
        bank = gabor._filters_reference(*double, k)[:, None]
        total = x.double().sum(1, keepdim=True)
        expected = torch.nn.functional.conv2d(total, bank, None, stride, padding, dilation)
        grad = place(torch.randn(expected.shape, generator=generator).to(dtype), layout)
        grad_total, grad_bank = convolution_backward(
            grad.double(), total, bank, stride, padding, dilation, 1, (True, True)
        )
        by_parameters = gabor._filters_backward_reference(grad_bank[:, 0], *double, k)

        name = f"{shape} {settings} {dtype} {parameter_dtype} {layout}"
        y = CONV(x, *values, k, stride, padding, dilation)
        results = CONV_BACKWARD(grad, x, *values, k, stride, padding, dilation, [True, True])
        assert_close(y, expected, TOLERANCE[dtype], f"forward {name}")
        assert_close(results[0], grad_total, TOLERANCE[dtype], f"x {name}")
        for result, reference in zip(results[1:], by_parameters, strict=True):
            assert result.dtype == parameter_dtype
            # A sum over taps in which terms cancel: relative to all five, not to this one.
            scale = max(float(r.abs().max()) for r in by_parameters)
            error = (result.double() - reference).abs().max().item()
            limit = 8 * TOLERANCE[parameter_dtype] * scale + 1e-7
            assert error <= limit, f"parameters {name}: {error}, at most {limit}"

        only_x = CONV_BACKWARD(grad, x, *values, k, stride, padding, dilation, [True, False])
        only_parameters = CONV_BACKWARD(
            grad, x, *values, k, stride, padding, dilation, [False, True]
        )
        assert torch.equal(only_x[0], results[0])
        assert all(t.numel() == 0 for t in (*only_x[1:], only_parameters[0]))
        assert all(torch.equal(a, b) for a, b in zip(only_parameters[1:], results[1:], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_large_maps_are_cut_into_pieces(layout):
    generator = torch.Generator().manual_seed(0)
    values = parameters(20, torch.float32, generator)
    x = place(torch.randn(1, 5, 200, 150, generator=generator), layout)
    settings = (3, (1, 1), (1, 1), (1, 1))
    y = CONV(x, *values, *settings)
    grad = place(torch.randn(y.shape, generator=generator), layout)
    results = CONV_BACKWARD(grad, x, *values, *settings, [True, True])
    double = [v.double() for v in values]
    assert_close(y, gabor._conv_reference(x.double(), *double, *settings), 5e-6, "forward")
    expected = gabor._conv_backward_reference(
        grad.double(), x.double(), *double, *settings, [True, True]
    )
    for result, reference in zip(results, expected, strict=True):
        assert_close(result, reference, 5e-5, "gradient")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_same_bits_for_every_run_and_number_of_threads(layout):
    generator = torch.Generator().manual_seed(2)
    values = parameters(24, torch.float32, generator)
    x = place(torch.randn(13, 6, 17, 19, generator=generator), layout)
    grad = place(torch.randn(13, 24, 17, 19, generator=generator), layout)
    settings = (3, (1, 1), (1, 1), (1, 1))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5, 1):
            torch.set_num_threads(count)
            gradients = CONV_BACKWARD(grad, x, *values, *settings, [True, True])
            results.append((CONV(x, *values, *settings), *gradients))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_images():
    values = parameters(4, torch.float32, torch.Generator().manual_seed(0))
    x, grad = torch.zeros(0, 3, 8, 8), torch.zeros(0, 4, 8, 8)
    settings = (3, (1, 1), (1, 1), (1, 1))
    assert CONV(x, *values, *settings).shape == (0, 4, 8, 8)
    results = CONV_BACKWARD(grad, x, *values, *settings, [True, True])
    assert results[0].shape == (0, 1, 8, 8)
    assert all(torch.equal(r, torch.zeros(4)) for r in results[1:])
