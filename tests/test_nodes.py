"""Nodes of cells: batch norms, sums and gradients by one op each, and when not."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

from fastbandit import _native, ops
from fastbandit.nn import cell
from fastbandit.nn.cell import run_nodes, terms_of
from fastbandit.nn.frozen import freeze
from fastbandit.nn.norm import BatchNorm2d, Moves
from fastbandit.nn.operations import Identity, make

sums = importlib.import_module("fastbandit.ops.norm_sum")
EDGES = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
NAMES = [
    "dil_conv_3x3", "max_pool_3x3", "sep_conv_m_3x3", "gab_filt_3x3", "skip_connect",
    "dtp_blok_3x3",
]  # fmt: skip


@pytest.fixture
def every_size(monkeypatch):
    for name in ("norm_sum", "batch_norm"):
        module = importlib.import_module(f"fastbandit.ops.{name}")
        monkeypatch.setattr(module, "_LEAST_ELEMENTS", 0)
    monkeypatch.setattr(importlib.import_module("fastbandit.ops.max_pool2d"), "_LEAST_OUTPUTS", 0)
    monkeypatch.setattr(sums, "_WAITING_DEVICES", ("cpu", "cuda"))


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """How many terms each call of the kernel has."""
    found: list[int] = []
    serves_all = sums._serves_all

    def counted(terms: list[Tensor]) -> bool:
        served = serves_all(terms)
        found.extend([len(terms)] * served)
        return served

    monkeypatch.setattr(sums, "_serves_all", counted)
    return found


pytestmark = pytest.mark.usefixtures("every_size")
kernel = pytest.mark.skipif("cpu" not in _native.served, reason="no native kernel")


def operations(affine: bool = False) -> nn.ModuleList:
    torch.manual_seed(0)
    made = nn.ModuleList(make(name, 8, affine=affine) for name in NAMES)
    for module in made.modules():
        if isinstance(module, BatchNorm2d) and module.weight is not None:
            nn.init.uniform_(module.weight)
    return made.to(memory_format=torch.channels_last)


def some() -> Tensor:
    x = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(1))
    return x.contiguous(memory_format=torch.channels_last).requires_grad_()


def outcome(made: nn.ModuleList) -> list[Tensor]:
    """Nodes, gradients and buffers."""
    x = some()
    nodes = run_nodes(x, EDGES, made)
    # As a cell gets them: that of a mean would be expanded, and no kernel serves it.
    arriving = [node.detach().cos() for node in nodes]
    grads = torch.autograd.grad(nodes, [x, *made.parameters()], arriving)
    return [*(node.detach() for node in nodes), *grads, *made.buffers()]


@kernel
@pytest.mark.parametrize("affine", [False, True])
def test_the_result_is_that_of_the_operations_one_by_one(monkeypatch, calls, affine):
    got = outcome(operations(affine))
    # Node 2 has two terms, node 3 five (a block has two); backward, node 1 has three readers, node
    # 0 four, as it is returned too.
    assert calls == [2, 5, 3, 4], calls
    calls.clear()
    monkeypatch.setattr(cell, "terms_of", lambda operation, x: [operation(x)])
    monkeypatch.setattr(sums, "_serves_all", lambda terms: False)
    monkeypatch.setattr(sums, "_WAITING_DEVICES", ())
    for one, other in zip(got, outcome(operations(affine)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)
    assert not calls


@kernel
def test_the_same_bits_twice():
    for one, other in zip(outcome(operations()), outcome(operations()), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [*NAMES, "conv_3x3", "sep_conv_3x3"])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_terms_add_up_to_the_operation(name, stride):
    torch.manual_seed(0)
    one = make(name, 8, stride).to(memory_format=torch.channels_last)
    x = some()
    torch.testing.assert_close(ops.norm_sum(terms_of(one, x)), one(x), rtol=1e-4, atol=1e-5)


def test_an_operation_with_something_attached_is_called():
    x, seen = some(), []
    for attach in ("hook", "subclass", "forward", "norm"):
        one = make("max_pool_3x3", 8)
        if attach == "hook":
            one.register_forward_hook(lambda module, given, y: seen.append(y))
        elif attach == "subclass":
            one.__class__ = type("Other", (type(one),), {})
        elif attach == "forward":
            one.forward = lambda x: x
        else:
            one.bn.register_forward_hook(lambda module, given, y: seen.append(y))
        (term,) = terms_of(one, x)
        assert isinstance(term, Tensor), attach
    assert len(seen) == 2


@pytest.mark.parametrize("how", ["eval", "frozen", "synchronised"])
def test_other_batch_norms_are_called(how):
    one = make("max_pool_3x3", 8)
    if how == "synchronised":
        one.bn.synchronise = lambda x, *rest: x + 1
    else:
        one.eval()
    if how == "frozen":
        freeze(one)
    (term,) = terms_of(one, some())
    assert isinstance(term, Tensor)
    assert torch.equal(term, one(some()))


def test_a_single_value_for_each_channel_is_refused():
    with pytest.raises(ValueError, match="BatchNorm2d: training needs more than one value"):
        terms_of(make("max_pool_3x3", 8), torch.rand(1, 8, 1, 1))


def test_recorded_running_statistics_move_once():
    one, other = make("max_pool_3x3", 8), make("max_pool_3x3", 8)
    other.load_state_dict(one.state_dict())
    moves = Moves([one.bn])
    one.bn.moves = moves
    moves.start()
    moves.fill(0.1)
    for module in (one, other):
        ops.norm_sum([*terms_of(module, some()), some()])
    moves.make()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(one.bn, name), getattr(other.bn, name))


@kernel
def test_recorded_running_statistics_are_moved_from_where_the_kernel_left_them():
    """Nothing is written to the buffers in between, and a second pass is another move."""
    one, other = make("max_pool_3x3", 8), make("max_pool_3x3", 8)
    other.load_state_dict(one.state_dict())
    moves = Moves([one.bn])
    one.bn.moves = moves
    moves.start()
    moves.fill(0.1)
    for scale in (1.0, 2.0):
        for module in (one, other):
            ops.norm_sum([*terms_of(module, scale * some()), some()])
    assert not any(bool(t.any()) for t in moves._batch[one.bn])
    moves.make()
    for name in ("running_mean", "running_var"):
        assert torch.equal(getattr(one.bn, name), getattr(other.bn, name))


@kernel
def test_readers_that_are_not_known_share_the_tensor(monkeypatch):
    x = some()
    got: list[Tensor] = []

    def keeps(y: Tensor) -> Tensor:
        got.append(y)
        return y * 1

    run_nodes(x, [(0, 1), (0, 2), (0, 3)], [keeps, keeps, keeps])
    assert all(y is x for y in got)
    *_, left = run_nodes(x, [(0, 1), (0, 2), (0, 3)], [Identity()] * 3)
    assert "Fork" in type(left.grad_fn).__name__


@kernel
def test_readers_have_a_second_derivative():
    x = some()
    one, two, three = sums.fork(x, 3)
    y = (one.sin() * two.cos() + three.exp()).sum()
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    torch.testing.assert_close(grad, (2 * x).cos() + x.exp())
    (second,) = torch.autograd.grad(grad.sum(), x)
    torch.testing.assert_close(second, -2 * (2 * x).sin() + x.exp())


@kernel
def test_on_a_cpu_gradients_do_not_wait(monkeypatch):
    monkeypatch.undo()
    x = torch.zeros(64, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    assert all(reader is x for reader in sums.fork(x.requires_grad_(), 3))


@kernel
def test_a_reader_without_a_gradient():
    x = some()
    one, _, three = sums.fork(x, 3)
    (grad,) = torch.autograd.grad((one + 2 * three).sum(), x)
    assert torch.equal(grad, torch.full_like(x, 3.0))
    with torch.no_grad():
        assert all(reader is x for reader in sums.fork(x, 3))


@pytest.mark.parametrize("stride", [1, 2])
def test_zero_is_added_only_where_its_gradient_is_asked_for(stride):
    zero, x = make("zero", 8, stride), some()
    (term,) = terms_of(zero, x)
    assert not term.any()
    (gradient,) = torch.autograd.grad(term.sum(), x)
    assert torch.equal(gradient, torch.zeros_like(x))
    assert terms_of(zero, x.detach()) == []
    with torch.no_grad():
        assert terms_of(zero, x) == []


def test_nodes_are_the_same_without_the_zeros():
    names = ["zero", "skip_connect", "zero", "zero", "zero", "max_pool_3x3"]
    made = nn.ModuleList(make(name, 8) for name in names)
    x = some()
    expected = run_nodes(x, EDGES, made)  # node 2 is 0, and so is all that node 3 gets of it
    with torch.no_grad():
        nodes = run_nodes(x, EDGES, made)
    assert not expected[1].any()
    assert expected[2].any()
    for node, other in zip(nodes, expected, strict=True):
        assert torch.equal(node, other)
        assert node.is_contiguous(memory_format=torch.channels_last)
