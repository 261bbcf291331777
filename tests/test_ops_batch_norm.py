"""batch_norm: torch's numbers, the same bits for any number of threads, one derivative."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import _native, ops

module = importlib.import_module("fastbandit.ops.batch_norm")
sums = importlib.import_module("fastbandit.ops.norm_sum")
OP = torch.ops.fastbandit.batch_norm.default
# Channels that do and do not divide the kernel's rows, more than a row, 1; a part of a row; blocks.
SHAPES = [(2, 3, 4, 5), (1, 16, 33, 31), (3, 300, 3, 2), (4, 1, 5, 5), (5, 7, 1, 1), (9, 64, 8, 8)]


@pytest.fixture
def every_size(monkeypatch):
    """The kernel serves whatever it can, not only what it is faster at."""
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(sums, "_LEAST_ELEMENTS", 0)  # on CUDA


pytestmark = pytest.mark.usefixtures("every_size")


def some(shape, *, offset: float = 0.0, layout=torch.channels_last, device="cpu") -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 2 + offset
    return x.to(device).contiguous(memory_format=layout)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device, shape, layout, affine):
    x = some(shape, offset=3.0, layout=layout, device=device).requires_grad_()
    c = shape[1]
    weight, bias = torch.rand(2, c, device=device).unbind() if affine else (None, None)
    running = torch.rand(2, c, device=device)
    mean, var = running.clone().unbind()
    grad = torch.randn(shape, device=device)
    tensors = [x]
    if affine:
        weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        tensors += [weight, bias]
    y = ops.batch_norm(x, weight, bias, mean, var, momentum=0.25, eps=1e-5)
    assert y.stride() == x.stride()
    exact = [t.detach().double().requires_grad_() for t in tensors]
    wide_mean, wide_var = running.double().clone().unbind()
    expected = F.batch_norm(
        exact[0], wide_mean, wide_var, *(exact[1:] or (None, None)), True, 0.25, 1e-5
    )
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(mean.double(), wide_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), wide_var, rtol=1e-5, atol=1e-6)
    got = torch.autograd.grad(y, tensors, grad)
    for one, other in zip(got, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_table_by_hand(device):
    x = torch.tensor([1.0, 3.0, 10.0, 30.0], device=device).view(1, 2, 2, 1)
    y = ops.batch_norm(x.contiguous(memory_format=torch.channels_last), eps=0.0)
    # CUDA's reciprocal root may be 2 units in the last place off.
    assert y.flatten().tolist() == pytest.approx([-1.0, 1.0, -1.0, 1.0], rel=3e-7)


@pytest.mark.skipif(
    os.environ.get("FASTBANDIT_BACKEND") == "reference", reason="a promise of the native kernel"
)
def test_a_mean_far_from_zero_costs_no_digits():
    x = some((8, 4, 16, 16), offset=1000.0)
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(ops.batch_norm(x).double(), expected, rtol=0, atol=2e-4)


@pytest.mark.skipif(
    os.environ.get("FASTBANDIT_BACKEND") == "reference", reason="a promise of the native kernel"
)
def test_the_number_of_threads_changes_nothing():
    x, grad = some((64, 16, 16, 16)).requires_grad_(), some((64, 16, 16, 16), offset=1.0)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            y = ops.batch_norm(x)
            results.append((y.detach(), *torch.autograd.grad(y, x, grad)))
    finally:
        torch.set_num_threads(threads)
    for one in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, results[0], strict=True))


def test_gradients_in_other_layouts():
    x = some((4, 6, 5, 3)).requires_grad_()
    wide = torch.randn(4, 12, 5, 3).contiguous(memory_format=torch.channels_last)
    for grad in (wide[:, 2:8], wide[:, :6].contiguous(), torch.ones(1).expand(4, 6, 5, 3)):
        (got,) = torch.autograd.grad(ops.batch_norm(x), x, grad)
        expected = torch.autograd.grad(
            F.batch_norm(x, None, None, training=True), x, grad.contiguous()
        )[0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_kernel_is_what_runs():
    if "cpu" not in _native.served:
        pytest.skip("no native kernel")
    x = some((2, 3, 4, 4)).requires_grad_()
    assert "_BatchNorm" in type(ops.batch_norm(x).grad_fn).__name__
    for other in (x.contiguous(), x.double(), x.bfloat16()):
        assert "NativeBatchNorm" in type(ops.batch_norm(other).grad_fn).__name__


def test_it_runs_where_it_is_faster(monkeypatch):
    if "cpu" not in _native.served:
        pytest.skip("no native kernel")
    monkeypatch.undo()
    for shape, ours in (
        ((16, 16, 16, 16), True),
        ((16, 16, 16, 15), False),
        ((1, 1024, 8, 8), True),
    ):
        x = some(shape).requires_grad_()
        assert ("_BatchNorm" in type(ops.batch_norm(x).grad_fn).__name__) is ours, shape


def test_what_is_not_a_number_stays_so():
    x = some((4, 3, 8, 8))
    x[1, 2, 3, 4] = torch.nan
    mean, var = torch.zeros(3), torch.ones(3)
    y = ops.batch_norm(x, None, None, mean, var)
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()
    assert (mean.isnan().tolist(), var.isnan().tolist()) == ([False, False, True],) * 2


@pytest.mark.parametrize("affine", [False, True])
def test_opcheck(affine):
    x = some((2, 3, 4, 5)).requires_grad_()
    weight = torch.rand(3, requires_grad=True) if affine else None
    bias = torch.rand(3, requires_grad=True) if affine else None
    torch.library.opcheck(OP, (x, weight, bias, 1e-5))


def test_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.batch_norm(x) * 2, fullgraph=True, backend="aot_eager")
    x = some((2, 3, 4, 5))
    torch.testing.assert_close(compiled(x), ops.batch_norm(x) * 2)


def test_errors():
    x = some((2, 3, 4, 5)).requires_grad_()
    y = ops.batch_norm(x)
    if "cpu" not in _native.served:
        return
    with pytest.raises(RuntimeError, match="batch_norm: expected a backward pass without create"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm: x: expected more than one value"):
        OP(some((1, 3, 1, 1)), None, None, 1e-5)
    with pytest.raises(RuntimeError, match="batch_norm: weight: expected one value for each of 3"):
        OP(some((2, 3, 4, 5)), torch.ones(2), None, 1e-5)
    with pytest.raises(RuntimeError, match="batch_norm: x: expected a dense channels-last"):
        OP(torch.randn(2, 3, 4, 5), None, None, 1e-5)


# --- On CUDA, a sum of one term -------------------------------------------------------------------


@pytest.fixture
def as_cuda(monkeypatch) -> list[str]:
    """A CPU that Python takes for a GPU, whose norm_sum is that of the CPU; the ops called."""
    if "cpu" not in _native.served:
        pytest.skip("no native kernel")
    monkeypatch.setattr(sums, "_LEAST_ELEMENTS", 1 << 16)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(Tensor, "is_cpu", property(lambda self: False))
    monkeypatch.setattr(sums._convolution, "_registered", lambda op, key: op == "norm_sum")
    called: list[str] = []
    for name in ("_forward", "_backward"):
        real = getattr(sums, name)
        monkeypatch.setattr(
            sums, name, lambda *given, name=name, real=real: called.append(name) or real(*given)
        )
    return called


@pytest.mark.parametrize("affine", [False, True])
def test_on_cuda_a_sum_of_one_term(as_cuda, affine):
    shape = (4, 16, 32, 33)
    x = some(shape, offset=2.0).requires_grad_()
    weight, bias = torch.rand(2, 16).requires_grad_().unbind() if affine else (None, None)
    given = [x, weight, bias] if affine else [x]
    mean, var = torch.rand(2, 16).unbind()
    wide_mean, wide_var = mean.double(), var.double()
    y = ops.batch_norm(x, weight, bias, mean, var, momentum=0.25)
    exact = [t.detach().double().requires_grad_() for t in given]
    expected = F.batch_norm(exact[0], wide_mean, wide_var, *(exact[1:] or (None, None)), True, 0.25)
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(mean.double(), wide_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(var.double(), wide_var, rtol=1e-5, atol=1e-6)
    grad = some(shape).cos()
    assert as_cuda == ["_forward"] * 2  # above autograd and below it
    for one, other in zip(
        torch.autograd.grad(y, given, grad),
        torch.autograd.grad(expected, exact, grad.double()),
        strict=True,
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)
    assert as_cuda[2:] == ["_backward"]
    with pytest.raises(RuntimeError, match=r"^batch_norm: .*no second derivative"):
        torch.autograd.grad(ops.batch_norm(x, weight, bias).sum(), x, create_graph=True)


def test_on_cuda_torch_normalises_small_contiguous_and_very_wide_maps(as_cuda):
    for shape, layout in (
        ((2, 4100, 3, 4), torch.channels_last),
        ((4, 16, 8, 8), torch.channels_last),
        ((4, 16, 32, 33), torch.contiguous_format),
    ):
        x = some(shape, layout=layout)
        torch.testing.assert_close(ops.batch_norm(x), F.batch_norm(x, None, None, training=True))
    assert not as_cuda
