"""The short way from Python to an op: when it applies, and what it leaves behind."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastbandit import _native, ops
from fastbandit.ops import _register
from fastbandit.ops._register import MISS, short_call


class Recorder:
    """Stands for an op: keeps its arguments and the state of the thread it was called in."""

    def __init__(self, result: Any = "result", error: BaseException | None = None) -> None:
        self.result, self.error = result, error
        self.calls: list[tuple[Any, ...]] = []
        self.below_autograd = False

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        self.below_autograd = not autograd_is_on()
        if self.error is not None:
            raise self.error
        return self.result


@pytest.fixture
def short(monkeypatch):
    """Makes a call of an op of three arguments: a tensor it writes, a tensor or None, a number."""

    def make(op: Any, *, mutates: bool = True, served: tuple[str, ...] = ("cpu",)) -> Any:
        monkeypatch.setattr(_native, "served", set(served))
        first = "Tensor(a!) x" if mutates else "Tensor x"
        schema = torch._C.parse_schema(f"op({first}, Tensor? y, float value) -> ()")
        return short_call(SimpleNamespace(_op=op, _schema=schema))

    return make


def autograd_is_on() -> bool:
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(
        torch._C.DispatchKey.AutogradFunctionality
    )


def test_the_op_is_called_below_autograd_with_its_arguments(short):
    op = Recorder()
    x, y = torch.zeros(2), torch.zeros(3)
    version = x._version, y._version
    assert short(op)(x, y, 0.5) == "result"
    assert len(op.calls) == 1
    assert all(a is b for a, b in zip(op.calls[0], (x, y, 0.5), strict=True))
    assert op.below_autograd
    assert autograd_is_on()
    assert (x._version, y._version) == (version[0] + 1, version[1])


def test_an_optional_tensor_may_be_none(short):
    assert short(Recorder())(torch.zeros(2), None, 1) == "result"


def test_nothing_is_written_where_nothing_is_mutated(short):
    x = torch.zeros(2)
    version = x._version
    short(Recorder(), mutates=False)(x, None, 1)
    assert x._version == version


def misses() -> dict[str, tuple[Any, ...]]:
    x, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    return {
        "parameter first": (torch.nn.Parameter(x, requires_grad=False), x, 1),
        "no tensor first": (1.0, x, 1),
        "no tensor second": (x, 1.0, 1),
        "gradient first": (leaf, x, 1),
        "gradient second": (x, leaf, 1),
        "meta first": (x.to("meta"), x.to("meta"), 1),
        "meta second": (x, x.to("meta"), 1),
    }


@pytest.mark.parametrize("case", misses())
def test_where_it_does_not_apply_the_op_is_not_called(short, case):
    op = Recorder()
    assert short(op)(*misses()[case]) is MISS
    assert op.calls == []
    assert autograd_is_on()


def test_in_forward_mode_it_does_not_apply(short):
    op = Recorder()
    with torch.autograd.forward_ad.dual_level():
        assert short(op)(torch.zeros(2), None, 1) is MISS
    assert op.calls == []


def test_a_device_without_kernels_is_missed(short):
    op = Recorder()
    assert short(op, served=())(torch.zeros(2), None, 1) is MISS
    assert short(op, served=("cuda",))(torch.zeros(2), None, 1) is MISS
    assert op.calls == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_leaf_is_taken_where_no_gradient_is_recorded(short, mode):
    x, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    with mode():
        assert short(Recorder())(x, leaf, 1) == "result"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError])
def test_the_long_way_says_what_an_error_means(short, error):
    x = torch.zeros(2)
    version = x._version
    op = Recorder(error=error("from the op"))
    assert short(op)(x, None, 1) is MISS
    assert len(op.calls) == 1
    assert x._version == version
    assert autograd_is_on()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_other_errors_pass(short, error):
    with pytest.raises(error, match="from the op"):
        short(Recorder(error=error("from the op")))(torch.zeros(2), None, 1)
    assert autograd_is_on()


def test_an_error_of_the_version_counter_is_not_swallowed(short, monkeypatch):
    def increment(_: list[torch.Tensor]) -> None:
        raise RuntimeError("from the counter")

    monkeypatch.setattr(_register, "_increment_versions", increment)
    with pytest.raises(RuntimeError, match="from the counter"):
        short(Recorder())(torch.zeros(2), None, 1)


def test_each_thread_has_its_own_guard(short):
    states = []

    def op(*_: Any) -> None:
        other = threading.Thread(target=lambda: states.append(autograd_is_on()))
        other.start()
        other.join()
        states.append(autograd_is_on())

    short(op)(torch.zeros(2), None, 1)
    assert states == [True, False]


@pytest.mark.skipif("cpu" not in _native.served, reason="no native CPU library")
def test_the_ops_take_it():
    call = short_call(torch.ops.fastbandit.pgd_step_.default)
    delta, grad, image = torch.zeros(4), torch.ones(4), torch.zeros(4)
    version = delta._version
    assert call(delta, grad, image, 0.5, 1.0, None, None) is None
    assert delta.tolist() == [0.5] * 4
    assert delta._version == version + 1
    assert call(delta, grad, image[:2], 0.5, 1.0, None, None) is MISS
    assert delta.tolist() == [0.5] * 4

    compiled = torch.compile(lambda *args: call(*args) is MISS, backend="eager", fullgraph=True)
    assert compiled(delta, grad, image, 0.5, 1.0, None, None)


def test_ops_on_it_still_see_an_error_of_the_caller():
    with pytest.raises(ValueError, match="grad: expected shape"):
        ops.pgd_step_(torch.zeros(4), torch.zeros(3), torch.zeros(4), step_size=1.0, epsilon=1.0)
