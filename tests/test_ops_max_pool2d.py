"""max_pool2d: torch's bits, gradients included, whatever the kernel."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import _native, ops

module = importlib.import_module("fastbandit.ops.max_pool2d")
OP = torch.ops.fastbandit.max_pool2d.default
BACKWARD = torch.ops.fastbandit.max_pool2d_backward.default
# Single rows, columns and pixels; odd and even; channels that fill no vector, one, several.
SHAPES = [
    (1, 2, 1, 1), (2, 3, 1, 6), (2, 5, 7, 1), (1, 2, 2, 2), (3, 16, 5, 6), (2, 40, 9, 8),
    (4, 16, 32, 32),
]  # fmt: skip
needs_kernels = pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
pytestmark = pytest.mark.usefixtures("every_size")


@pytest.fixture
def every_size(monkeypatch):
    """The kernel serves whatever it can, not only what it is faster at."""
    monkeypatch.setattr(module, "_LEAST_OUTPUTS", 0)


def some(shape, layout=torch.channels_last, device="cpu") -> Tensor:
    """Few different values, so that windows have several largest ones."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randint(-3, 4, shape, generator=generator) / 2
    return x.to(device).contiguous(memory_format=layout)


def both(x: Tensor, stride: int) -> list[list[Tensor]]:
    """Value and gradient by this package and by torch."""
    generator = torch.Generator().manual_seed(1)
    results = []
    for function in (ops.max_pool2d, lambda x, stride: F.max_pool2d(x, 3, stride, 1)):
        x = x.detach().requires_grad_()
        y = function(x, stride)
        generator.manual_seed(1)
        grad = torch.randn(y.shape, generator=generator).to(x)
        results.append([y.detach(), *torch.autograd.grad(y, x, grad)])
    return results


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_torch(device, shape, stride, layout):
    x = some(shape, layout, device)
    for one, other in zip(*both(x, stride), strict=True):
        assert torch.equal(one, other)
        assert one.is_contiguous(memory_format=layout)


def test_table_by_hand():
    x = torch.tensor([[1.0, 5.0, 2.0], [0.0, 5.0, 1.0], [7.0, 3.0, 4.0]]).view(1, 1, 3, 3)
    x = x.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.max_pool2d(x)
    assert y[0, 1].tolist() == [[5, 5, 5], [7, 7, 5], [7, 7, 5]]
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad[0, 1].tolist() == [[0, 4, 0], [0, 1, 0], [4, 0, 0]]  # the first of equal values
    assert ops.max_pool2d(x, 2)[0, 0].tolist() == [[5, 5], [7, 5]]


@pytest.mark.parametrize("stride", [1, 2])
def test_what_is_not_finite(stride):
    x = some((2, 6, 7, 6))
    x[0, 1, 2, 3] = torch.nan
    x[0, 2] = -torch.inf
    x[1, 0, 4, 4] = torch.inf
    x[1, 3, 0, 0], x[1, 3, 0, 1] = torch.nan, torch.nan
    for one, other in zip(*both(x, stride), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_gradients_in_other_layouts():
    x = some((4, 6, 5, 3)).requires_grad_()
    wide = torch.randn(4, 12, 5, 3).contiguous(memory_format=torch.channels_last)
    for grad in (wide[:, 2:8], wide[:, :6].contiguous(), torch.ones(1).expand(4, 6, 5, 3)):
        (got,) = torch.autograd.grad(ops.max_pool2d(x), x, grad)
        (expected,) = torch.autograd.grad(F.max_pool2d(x, 3, 1, 1), x, grad.contiguous())
        assert torch.equal(got, expected)


@needs_kernels
def test_the_kernel_is_what_runs():
    x = some((2, 3, 4, 4)).requires_grad_()
    assert "_MaxPool2d" in type(ops.max_pool2d(x).grad_fn).__name__
    for other in (x.contiguous(), x.double(), x.bfloat16(), x[:0], x[:, :1]):
        assert "MaxPool2DWith" in type(ops.max_pool2d(other).grad_fn).__name__


@needs_kernels
def test_it_runs_where_it_is_faster(monkeypatch):
    monkeypatch.undo()
    for shape, stride, ours in (
        ((64, 8, 8, 8), 1, True),
        ((64, 8, 8, 8), 2, False),
        ((64, 8, 16, 16), 2, True),
        ((63, 8, 8, 8), 1, False),
    ):
        y = ops.max_pool2d(some(shape).requires_grad_(), stride)
        assert ("_MaxPool2d" in type(y.grad_fn).__name__) is ours, shape


@needs_kernels
def test_the_number_of_threads_changes_nothing():
    x, threads = some((64, 16, 32, 32)), torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for one, other in zip(*both(x, 1), strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("stride", [1, 2])
def test_opcheck(stride):
    x = some((2, 3, 5, 4)).requires_grad_()
    torch.library.opcheck(OP, (x, stride))
    y, which = OP(x.detach(), stride)
    torch.library.opcheck(
        BACKWARD,
        (torch.randn_like(y), which, 5, 4, stride),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernel_and_reference_agree_on_what_is_saved():
    x = some((3, 5, 6, 7))
    for stride in (1, 2):
        y, which = OP(x, stride)
        expected = module._reference(x, stride)
        assert torch.equal(y, expected[0])
        assert torch.equal(which, expected[1])
        grad = torch.randn_like(y)
        torch.testing.assert_close(
            BACKWARD(grad, which, 6, 7, stride),
            module._backward_reference(grad, which, 6, 7, stride),
        )


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: ops.max_pool2d(x, 2) * 2, fullgraph=True, backend="aot_eager"
    )
    x = some((2, 3, 4, 5))
    assert torch.equal(compiled(x), ops.max_pool2d(x, 2) * 2)


def test_errors():
    x = some((2, 3, 4, 5)).requires_grad_()
    with pytest.raises(ValueError, match="max_pool2d: stride: expected 1 or 2, got 3"):
        ops.max_pool2d(x, 3)
    if "cpu" not in _native.served:
        return
    with pytest.raises(RuntimeError, match="max_pool2d: expected a backward pass without create"):
        torch.autograd.grad(ops.max_pool2d(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="max_pool2d: x: expected a dense channels-last"):
        OP(torch.randn(2, 3, 4, 5), 1)
    with pytest.raises(RuntimeError, match="max_pool2d: x: expected float32"):
        OP(x.double(), 1)
    with pytest.raises(RuntimeError, match="max_pool2d: stride: expected 1 or 2, got 4"):
        OP(x, 4)
    y, which = OP(x.detach(), 1)
    with pytest.raises(RuntimeError, match="which: expected 7 x 5 windows, got shape"):
        BACKWARD(y, which, 7, 5, 1)
    with pytest.raises(RuntimeError, match="max_pool2d_backward: grad"):
        BACKWARD(y[:, :2], which, 4, 5, 1)
