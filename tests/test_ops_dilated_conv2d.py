"""dilated_conv2d: the library's convolution behind the checks and messages of the ops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastbandit import ops


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
