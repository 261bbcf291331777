"""norm_sum: the sum of batch norms and maps, as torch's single operations give it."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import _native, ops
from fastbandit.ops import Normalized
from fastbandit.ops._register import OPERATORS

module = importlib.import_module("fastbandit.ops.norm_sum")
OP, BACKWARD = OPERATORS["norm_sum"], OPERATORS["norm_sum_backward"]
# Channels that do and do not divide the kernel's rows, more than a row; a part of a row; blocks.
SHAPES = [(2, 3, 4, 5), (1, 16, 33, 31), (3, 300, 3, 2), (5, 7, 1, 1), (9, 64, 8, 8)]
# Of each term: as it is, normalised, with scale, with both, with shift alone.
TERMS = ["n", "nn", "in", "wib", "iii", "bnwis", "bbbbbbbbb"]
native = pytest.mark.skipif(
    os.environ.get("FASTBANDIT_BACKEND") == "reference", reason="a promise of the native kernel"
)


@pytest.fixture
def every_size(monkeypatch):
    """The kernel serves whatever it can, not only what it is faster at."""
    monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0)


pytestmark = pytest.mark.usefixtures("every_size")


def some(
    shape, *, seed: int = 0, offset: float = 0.0, layout=torch.channels_last, device="cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    x = torch.randn(shape, generator=generator) * 2 + offset
    return x.to(device).contiguous(memory_format=layout)


def made(
    what: str, shape, *, layout=torch.channels_last, device="cpu", dtype=torch.float32
) -> tuple[list[Tensor | Normalized], list[Tensor]]:
    """Terms, and the tensors that have a gradient."""
    wide = module.compute_dtype(dtype)
    terms: list[Tensor | Normalized] = []
    leaves = []
    for index, kind in enumerate(what):
        x = some(shape, seed=index, offset=3.0, layout=layout, device=device)
        x = x.to(dtype).requires_grad_()
        leaves.append(x)
        if kind == "i":
            terms.append(x)
            continue
        vectors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(index)
        for name, kinds in (("weight", "wb"), ("bias", "bs")):
            if kind in kinds:
                vector = torch.rand(shape[1], generator=generator).to(device, wide)
                vectors[name] = vector.requires_grad_()
        leaves += vectors.values()
        mean, var = torch.rand(2, shape[1], generator=generator).to(device, wide).unbind()
        terms.append(Normalized(x, **vectors, running_mean=mean, running_var=var, momentum=0.25))
    return terms, leaves


def in_float64(
    terms: list[Tensor | Normalized],
) -> tuple[Tensor, list[Tensor], list[tuple[Tensor, Tensor]]]:
    """The sum by torch's operations, its leaves, the running statistics."""
    leaves, running = [], []
    total = torch.zeros((), dtype=torch.float64)
    for term in terms:
        x = (term if isinstance(term, Tensor) else term.x).detach().double().requires_grad_()
        leaves.append(x)
        y = x
        if isinstance(term, Normalized):
            own = [
                None if one is None else one.detach().double().requires_grad_()
                for one in (term.weight, term.bias)
            ]
            leaves += [one for one in own if one is not None]
            mean, var = term.running_mean.double().clone(), term.running_var.double().clone()
            y = F.batch_norm(x, mean, var, *own, True, term.momentum, term.eps)
            running.append((mean, var))
        total = total.to(y.device) + y
    return total, leaves, running


@pytest.mark.parametrize("what", TERMS)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(device, shape, layout, what):
    terms, leaves = made(what, shape, layout=layout, device=device)
    expected, exact, running = in_float64(terms)
    y = ops.norm_sum(terms)
    assert y.stride() == leaves[0].stride()
    torch.testing.assert_close(y.double(), expected, rtol=2e-5, atol=5e-5)
    normalized = [term for term in terms if isinstance(term, Normalized)]
    for term, (mean, var) in zip(normalized, running, strict=True):
        torch.testing.assert_close(term.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(term.running_var.double(), var, rtol=1e-5, atol=1e-6)
    grad = torch.randn(shape, device=device)
    got = torch.autograd.grad(y, leaves, grad)
    for one, other in zip(got, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_other_dtypes(device, dtype, layout):
    terms, leaves = made("wibn", (4, 6, 5, 3), layout=layout, device=device, dtype=dtype)
    expected, exact, _ = in_float64(terms)
    y = ops.norm_sum(terms)
    assert y.dtype == dtype
    grad = torch.randn(y.shape, device=device).to(dtype)
    got = torch.autograd.grad(y, leaves, grad)
    wanted = torch.autograd.grad(expected, exact, grad.double())
    # Term by term a sum of half types is rounded at each step.
    tolerance = {torch.float64: 1e-11, torch.bfloat16: 0.05, torch.float16: 0.006}[dtype]
    for one, other in zip((y, *got), (expected, *wanted), strict=True):
        scale = other.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(one.double() / scale, other / scale, rtol=0, atol=tolerance)


@native
@pytest.mark.parametrize("what", TERMS)
def test_the_bits_are_those_of_the_single_kernels(what, monkeypatch):
    """The order of all sums is that of batch_norm, and the terms are added in order."""
    monkeypatch.setattr(importlib.import_module("fastbandit.ops.batch_norm"), "_LEAST_ELEMENTS", 0)
    terms, leaves = made(what, (9, 64, 8, 8))
    others, other_leaves = made(what, (9, 64, 8, 8))
    y, z = ops.norm_sum(terms), module._one_by_one(others)
    assert torch.equal(y, z)
    grad = some((9, 64, 8, 8), seed=7)
    got = torch.autograd.grad(y, leaves, grad)
    for one, other in zip(got, torch.autograd.grad(z, other_leaves, grad), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(terms, others, strict=True):
        if isinstance(one, Normalized):
            assert torch.equal(one.running_mean, other.running_mean)
            # The variance is not taken back from the inverse deviation.
            torch.testing.assert_close(one.running_var, other.running_var, rtol=1e-6, atol=0)


def test_sum_by_hand(device):
    a = torch.tensor([1.0, 3.0, 10.0, 30.0], device=device).view(1, 2, 2, 1)
    b = torch.tensor([5.0, 6.0, 7.0, 8.0], device=device).view(1, 2, 2, 1)
    a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    weight, bias = torch.tensor([[2.0, 3.0], [0.5, 0.25]], device=device).unbind()
    y = ops.norm_sum([Normalized(a, weight, bias, eps=0.0), b])
    # CUDA's reciprocal root may be 2 units in the last place off.
    assert y.flatten().tolist() == pytest.approx([3.5, 8.5, 4.25, 11.25], rel=3e-7)


def test_given_statistics_are_used_and_differentiated():
    x, other = (some((2, 3, 4, 5), seed=seed).requires_grad_() for seed in range(2))
    variance, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    inverse = (variance + 1e-5).rsqrt()
    y = ops.norm_sum([Normalized(x, statistics=(mean, inverse)), other])
    expected = F.batch_norm(x, None, None, training=True) + other
    torch.testing.assert_close(y, expected)
    grad = some(x.shape, seed=3)
    got, wanted = (torch.autograd.grad(z, (x, other), grad) for z in (y, expected))
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    if "cpu" in _native.served:
        shifted = ops.norm_sum([Normalized(x, statistics=(mean + 1, inverse)), other])
        torch.testing.assert_close(shifted, expected - inverse.view(-1, 1, 1))


@native
def test_the_number_of_threads_changes_nothing():
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            terms, leaves = made("bin", (64, 16, 16, 16))
            y = ops.norm_sum(terms)
            grads = torch.autograd.grad(y, leaves, some((64, 16, 16, 16), offset=1.0))
            results.append((y.detach(), *grads))
    finally:
        torch.set_num_threads(threads)
    for one in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(one, results[0], strict=True))


@native
def test_a_mean_far_from_zero_costs_no_digits():
    x = some((8, 4, 16, 16), offset=1000.0)
    y = ops.norm_sum([Normalized(x), torch.zeros_like(x)])
    expected = F.batch_norm(x.double(), None, None, training=True)
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-4)


def test_gradients_in_other_layouts():
    x, other = (some((4, 6, 5, 3), seed=seed).requires_grad_() for seed in range(2))
    wide = torch.randn(4, 12, 5, 3).contiguous(memory_format=torch.channels_last)
    for grad in (wide[:, 2:8], wide[:, :6].contiguous(), torch.ones(1).expand(4, 6, 5, 3)):
        got = torch.autograd.grad(ops.norm_sum([Normalized(x), other]), (x, other), grad)
        expected = torch.autograd.grad(
            F.batch_norm(x, None, None, training=True) + other, (x, other), grad.contiguous()
        )
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_only_what_needs_a_gradient_gets_one():
    x, other = some((2, 3, 4, 5)), some((2, 3, 4, 5), seed=1).requires_grad_()
    weight = torch.rand(3, requires_grad=True)
    y = ops.norm_sum([Normalized(x, weight), other])
    y.sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    assert torch.equal(other.grad, torch.ones_like(other))


def test_biases_do_not_share_their_gradient():
    terms, _ = made("bb", (2, 3, 4, 5))
    ops.norm_sum(terms).sum().backward()
    first, second = (term.bias.grad for term in terms)
    first.zero_()
    assert (second != 0).all()


def test_which_maps_the_kernel_serves():
    if "cpu" not in _native.served:
        pytest.skip("no native kernel")
    x, other = (some((2, 3, 4, 4), seed=seed).requires_grad_() for seed in range(2))

    def served(*terms: Tensor | Normalized) -> bool:
        return "_Function" in type(ops.norm_sum(terms).grad_fn).__name__

    assert served(x, other)
    assert served(Normalized(x), other)
    assert not served(x.contiguous(), other)
    assert not served(x.double(), other.double())
    assert not served(x, some((1, 3, 4, 4)))
    assert not served(Normalized(x, eps=1e-3), Normalized(other))
    assert not module._serves_all([Normalized(x, torch.rand(3).double()), other])
    assert not served(*[x] * 33)


def test_it_runs_where_it_is_faster(monkeypatch):
    if "cpu" not in _native.served:
        pytest.skip("no native kernel")
    monkeypatch.undo()
    for shape, ours in (((16, 16, 16, 16), True), ((16, 16, 16, 15), False)):
        x = some(shape).requires_grad_()
        y = ops.norm_sum([x, x])
        assert ("_Function" in type(y.grad_fn).__name__) is ours, shape


def test_one_term():
    x = some((2, 3, 4, 5))
    assert ops.norm_sum([x]) is x
    torch.testing.assert_close(ops.norm_sum([Normalized(x)]), ops.batch_norm(x))


def test_nothing_to_add(device):
    x = torch.zeros((0, 3, 4, 5), device=device).contiguous(memory_format=torch.channels_last)
    assert ops.norm_sum([x, x]).shape == x.shape
    assert OP([x, x], [0, 0], [], 0.0)[0].shape == x.shape


def test_the_terms_are_not_written_to():
    x, y, z = (some((2, 3, 4, 5), seed=seed) for seed in range(3))
    kept = x.clone()
    for terms in ([x, y, z], [x.contiguous(), y, z]):
        before = terms[0].clone()
        ops.norm_sum(terms)
        assert torch.equal(terms[0], before)
    assert torch.equal(x, kept)


def test_what_is_not_a_number_stays_so():
    x, other = some((4, 3, 8, 8)), some((4, 3, 8, 8), seed=1)
    x[1, 2, 3, 4] = torch.nan
    mean, var = torch.zeros(3), torch.ones(3)
    y = ops.norm_sum([Normalized(x, None, None, mean, var), other])
    assert y[:, 2].isnan().all()
    assert y[:, :2].isfinite().all()
    assert (mean.isnan().tolist(), var.isnan().tolist()) == ([False, False, True],) * 2


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_opcheck(layout):
    if layout == torch.contiguous_format and "cpu" in _native.served:
        pytest.skip("the kernel is for channels-last")
    xs = [some((2, 3, 4, 5), seed=seed, layout=layout).requires_grad_() for seed in range(4)]
    vectors = [torch.rand(3, requires_grad=True) for _ in range(3)]
    mean, inverse = torch.rand(2, 3).unbind()
    # "test_autograd_registration" wants a kernel; the statistics that are given are no leaves.
    torch.library.opcheck(OP, (xs, [1, 0, 7, 3], vectors, 1e-5))
    torch.library.opcheck(OP, (xs[:2], [9, 0], [mean, inverse], 1e-5))


def test_compile():
    torch._dynamo.reset()

    def f(x: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        return ops.norm_sum([Normalized(x, weight), other, x]) * 2

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    x, other, weight = some((2, 3, 4, 5)), some((2, 3, 4, 5), seed=1), torch.rand(3)
    torch.testing.assert_close(compiled(x, other, weight), f(x, other, weight))


def test_errors():
    x = some((2, 3, 4, 5)).requires_grad_()
    with pytest.raises(TypeError, match="norm_sum: terms: expected a list, got Tensor"):
        ops.norm_sum(x)
    with pytest.raises(ValueError, match="norm_sum: terms: expected at least one, got none"):
        ops.norm_sum([])
    with pytest.raises(TypeError, match="norm_sum: terms: expected a tensor"):
        ops.norm_sum([x, 3])
    with pytest.raises(ValueError, match="norm_sum: running_mean, running_var: expected two"):
        ops.norm_sum([x, Normalized(x, running_mean=torch.zeros(3))])
    with pytest.raises(RuntimeError, match="norm_sum: weight: expected device cpu"):
        ops.norm_sum([x, Normalized(x, torch.ones(3, device="meta"))])
    y = OP([x, x], [0, 1], [], 1e-5)[0]
    with pytest.raises(RuntimeError, match="norm_sum: expected a backward pass without create"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_sum: xs: expected more than one value"):
        OP([some((1, 3, 1, 1))] * 2, [0, 1], [], 1e-5)


@native
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([(2, 3, 4, 5)], [0, 0], [], 0.0), "kinds: expected one for each of 1 tensors, got 2"),
        (([(2, 3, 4, 5)], [2], [], 0.0), "kinds: expected 0, or 1 and any of 2, 4 and 8, got 2"),
        (([(2, 3, 4, 5)], [3], [], 0.0), "vectors: expected more than 0"),
        (([(2, 3, 4, 5)], [1], [(3,)], 0.0), "vectors: expected 0, got 1"),
        (([(2, 3, 4, 5)], [3], [(2,)], 0.0), "vectors: expected one value for each of 3 channels"),
        (([(2, 3, 4, 5), (2, 3, 4, 4)], [0, 0], [], 0.0), "xs: expected the shape of the first"),
    ],
)
def test_the_kernel_checks_its_arguments(arguments, message):
    shapes, kinds, vectors, eps = arguments
    with pytest.raises(RuntimeError, match=f"^norm_sum: {message}"):
        OP([some(shape) for shape in shapes], kinds, [torch.rand(shape) for shape in vectors], eps)


@native
def test_the_kernel_wants_channels_last_and_its_own_statistics():
    x = some((2, 3, 4, 5))
    with pytest.raises(RuntimeError, match="norm_sum: xs: expected dense channels-last"):
        OP([x.contiguous()], [0], [], 0.0)
    with pytest.raises(RuntimeError, match="norm_sum_backward: kinds: expected normalised"):
        BACKWARD(x, [x], [0], [], torch.rand(1, 3), torch.rand(1, 3))
    with pytest.raises(RuntimeError, match=r"norm_sum_backward: mean: expected a contiguous"):
        BACKWARD(x, [x], [1], [], torch.rand(2, 3), torch.rand(1, 3))
