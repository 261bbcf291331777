"""dilated_conv2d: the library's convolution behind the checks and messages of the ops."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from fastbandit import ops

dilated = importlib.import_module("fastbandit.ops.dilated_conv2d")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values(device, dtype, relu, memory_format):
    x = torch.randn(2, 3, 9, 7, device=device).to(dtype).contiguous(memory_format=memory_format)
    weight = torch.randn(4, 3, 3, 3, device=device).to(dtype)
    y = ops.dilated_conv2d(x, weight, stride=(1, 2), padding=2, relu=relu)
    expected = F.conv2d(x.relu() if relu else x, weight, None, (1, 2), 2, 2)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, expected)


def test_the_default_dilation_is_two(device):
    x = torch.arange(25.0, device=device).view(1, 1, 5, 5)
    y = ops.dilated_conv2d(x, torch.ones(1, 1, 3, 3, device=device))
    assert y.tolist() == [[[[0.0 + 2 + 4 + 10 + 12 + 14 + 20 + 22 + 24]]]]


def test_gradcheck(device):
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(3, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, weight: ops.dilated_conv2d(x, weight, padding=2, relu=True), (x, weight)
    )


def test_compile(device):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, weight: ops.dilated_conv2d(x, weight, padding=2, relu=True),
        fullgraph=True,
        backend="aot_eager",
    )
    weight = torch.randn(4, 3, 3, 3, device=device)
    for shape in [(2, 3, 8, 8), (3, 3, 9, 7)]:
        x = torch.randn(shape, device=device)
        expected = ops.dilated_conv2d(x, weight, padding=2, relu=True)
        torch.testing.assert_close(compiled(x, weight), expected)


def test_autocast(device):
    x = torch.randn(2, 3, 8, 8, device=device).bfloat16()
    weight = torch.randn(4, 3, 3, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.dilated_conv2d(x, weight)
    assert y.dtype == torch.bfloat16


def test_empty_batch(device):
    x = torch.zeros(0, 3, 8, 8, device=device)
    assert ops.dilated_conv2d(x, torch.ones(4, 3, 3, 3, device=device)).shape == (0, 4, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x: expected shape \(N, C, H, W\)"),
        ({"x": torch.zeros(2, 3, 8, 8).long()}, TypeError, "x: expected float32.*torch.int64"),
        (
            {"weight": torch.zeros(4, 1, 3, 3)},
            ValueError,
            r"weight: expected shape \(C_out, 3, k_h, k_w\).*got \(4, 1, 3, 3\)",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, 3).half()},
            TypeError,
            "weight: expected torch.float32 as x, got torch.float16",
        ),
        (
            {"weight": torch.zeros(4, 3, 3, 3, device="meta")},
            RuntimeError,
            "weight: expected device cpu as x, got meta",
        ),
        ({"stride": -1}, ValueError, "stride: expected at least 1, got -1"),
        ({"dilation": 4}, ValueError, "x: expected at least the extent of the kernel, 9 x 9"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(4, 3, 3, 3), **change}
    with pytest.raises(error, match=f"dilated_conv2d: {message}"):
        ops.dilated_conv2d(**arguments)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("size", "k", "padding"), [((8, 8), 5, 4), ((8, 6), 5, 2), ((4, 4), 3, 2), ((8, 8), 7, (6, 4))]
)
def test_weight_gradient_by_phases(size, k, padding, memory_format, relu):
    """The route of small maps: same values, and differentiable as often as the plain one."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, *size, generator=generator).contiguous(memory_format=memory_format)
    weight = torch.randn(4, 5, k, k, generator=generator)
    pad = (padding, padding) if isinstance(padding, int) else padding
    x.requires_grad_()
    weight.requires_grad_()
    assert dilated._splits(x, weight, (1, 1), pad, (2, 2))
    y = ops.dilated_conv2d(x, weight, padding=padding, relu=relu)
    expected = F.conv2d(F.relu(x) if relu else x, weight, None, 1, padding, 2)
    assert torch.equal(y, expected)
    grad = torch.randn(y.shape, generator=generator).requires_grad_()
    results = torch.autograd.grad(y, (x, weight), grad, create_graph=True)
    references = torch.autograd.grad(expected, (x, weight), grad, create_graph=True)
    for result, reference in zip(results, references, strict=True):
        torch.testing.assert_close(result, reference, rtol=1e-5, atol=1e-4)
    second = torch.autograd.grad(results[1].square().sum(), (x, grad))
    for result, reference in zip(
        second, torch.autograd.grad(references[1].square().sum(), (x, grad)), strict=True
    ):
        torch.testing.assert_close(result, reference, rtol=1e-4, atol=1e-2)


def test_phases_only_where_they_were_measured_to_win():
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(3, 3, 5, 5, requires_grad=True)
    same = ((1, 1), (4, 4), (2, 2))
    assert dilated._splits(x, weight, *same)
    assert not dilated._splits(x, weight.detach(), *same)
    assert not dilated._splits(torch.randn(2, 3, 10, 8), weight, *same)
    assert not dilated._splits(x.bfloat16(), weight, *same)
    assert not dilated._splits(x, weight, (2, 2), *same[1:])
    assert not dilated._splits(x, weight, (1, 1), (3, 3), (2, 2))
    assert not dilated._splits(x, weight, (1, 1), (4, 4), (1, 1))
    with torch.no_grad():
        assert not dilated._splits(x, weight, *same)
