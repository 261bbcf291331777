"""The short way from Python to an op: when it applies, and what it leaves behind."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch
from _processes import run

from fastbandit import _native, ops
from fastbandit.ops._register import MISS, native_call

pytestmark = pytest.mark.skipif(_native.NativeCall is None, reason="built without Python.h")


class Recorder:
    """Stands for an op: keeps its arguments and the state of the thread it was called in."""

    def __init__(self, result: Any = "result", error: BaseException | None = None) -> None:
        self.result, self.error = result, error
        self.calls: list[tuple[Any, ...]] = []
        self.below_autograd = False

    def __call__(self, *args: Any) -> Any:
        self.calls.append(args)
        excluded = torch._C._dispatch_tls_is_dispatch_key_excluded
        self.below_autograd = excluded(torch._C.DispatchKey.AutogradFunctionality)
        if self.error is not None:
            raise self.error
        return self.result


def short(op: Any, **changes: Any) -> Any:
    """A call of an op of three arguments: a tensor it writes, a tensor or None, and a number."""
    arguments: dict[str, Any] = {
        "op": op,
        "arguments": 3,
        "tensors": 0b011,
        "mutated": 0b001,
        "tensor_type": torch.Tensor,
        "served": {"cpu"},
        "is_grad_enabled": torch.is_grad_enabled,
        "below_autograd": torch._C._AutoDispatchBelowAutograd,
        "increment_versions": torch._C._increment_version,
        "miss": MISS,
    }
    return _native.NativeCall(**{**arguments, **changes})


def autograd_is_on() -> bool:
    return not torch._C._dispatch_tls_is_dispatch_key_excluded(
        torch._C.DispatchKey.AutogradFunctionality
    )


def test_the_op_is_called_below_autograd_with_its_arguments():
    op = Recorder()
    x, y = torch.zeros(2), torch.zeros(3)
    version = x._version, y._version
    assert short(op)(x, y, 0.5) == "result"
    assert len(op.calls) == 1
    assert all(a is b for a, b in zip(op.calls[0], (x, y, 0.5), strict=True))
    assert op.below_autograd
    assert autograd_is_on()
    assert (x._version, y._version) == (version[0] + 1, version[1])


def test_an_optional_tensor_may_be_none():
    op = Recorder()
    assert short(op)(torch.zeros(2), None, 1) == "result"


def test_nothing_is_written_where_nothing_is_mutated():
    x = torch.zeros(2)
    version = x._version
    short(Recorder(), mutated=0)(x, None, 1)
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
        "too few": (x, x),
        "too many": (x, x, 1, 1),
        "none": (),
    }


@pytest.mark.parametrize("case", misses())
def test_where_it_does_not_apply_the_op_is_not_called(case):
    op = Recorder()
    assert short(op)(*misses()[case]) is MISS
    assert op.calls == []
    assert autograd_is_on()


def test_keywords_are_not_taken():
    op = Recorder()
    assert short(op)(torch.zeros(2), None, value=1) is MISS
    assert op.calls == []


def test_a_device_without_kernels_is_missed():
    op = Recorder()
    assert short(op, served=set())(torch.zeros(2), None, 1) is MISS
    assert short(op, served={"cuda"})(torch.zeros(2), None, 1) is MISS
    assert op.calls == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_leaf_is_taken_where_no_gradient_is_recorded(mode):
    op = Recorder()
    x, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    with mode():
        assert short(op)(x, leaf, 1) == "result"


@pytest.mark.parametrize("error", [RuntimeError, TypeError, AttributeError])
def test_the_long_way_says_what_an_error_means(error):
    x = torch.zeros(2)
    version = x._version
    op = Recorder(error=error("from the op"))
    assert short(op)(x, None, 1) is MISS
    assert len(op.calls) == 1
    assert x._version == version
    assert autograd_is_on()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_other_errors_pass(error):
    with pytest.raises(error, match="from the op"):
        short(Recorder(error=error("from the op")))(torch.zeros(2), None, 1)
    assert autograd_is_on()


def test_an_error_of_the_guard_is_not_swallowed():
    class Guard:
        def __enter__(self) -> None:
            pass

        def __exit__(self, *_: object) -> None:
            raise ValueError("from the guard")

    for op in (Recorder(), Recorder(error=RuntimeError("from the op"))):
        with pytest.raises(ValueError, match="from the guard"):
            short(op, below_autograd=Guard)(torch.zeros(2), None, 1)


def test_an_error_of_the_version_counter_is_not_swallowed():
    def increment(_: tuple[torch.Tensor, ...]) -> None:
        raise RuntimeError("from the counter")

    with pytest.raises(RuntimeError, match="from the counter"):
        short(Recorder(), increment_versions=increment)(torch.zeros(2), None, 1)


def test_each_thread_has_its_own_guard():
    states = []

    def op(*_: Any) -> None:
        other = threading.Thread(target=lambda: states.append(autograd_is_on()))
        other.start()
        other.join()
        states.append(autograd_is_on())

    short(op)(torch.zeros(2), None, 1)
    assert states == [True, False]


def test_no_reference_is_kept_or_lost():
    class Guard:
        alive = 0

        def __init__(self) -> None:
            Guard.alive += 1

        def __del__(self) -> None:
            Guard.alive -= 1

        def __enter__(self) -> object:
            return entered

        def __exit__(self, *_: object) -> object:
            return left

    def fail(*_: Any) -> None:
        raise RuntimeError("from the op")

    x, y = torch.zeros(2), torch.zeros(2)
    result, entered, left, counted = object(), object(), object(), object()
    truth = [1]  # true, and counted as True itself is not in every Python
    parts = {
        "below_autograd": Guard,
        "is_grad_enabled": lambda: truth,
        "increment_versions": lambda _: counted,
    }
    for call in (
        short(lambda *_: result, **parts),
        short(fail, **parts),
        short(fail, served=set(), **parts),
    ):
        watched = (x, y, result, entered, left, counted, truth, MISS, call)
        for _ in range(3):
            call(x, y, 1)
        before = [sys.getrefcount(item) for item in watched]
        for _ in range(100):
            call(x, y, 1)
        assert [sys.getrefcount(item) for item in watched] == before
        assert Guard.alive == 0


def test_what_it_holds_is_released_with_it():
    op = Recorder()
    before = sys.getrefcount(op)
    call = short(op)
    assert sys.getrefcount(op) == before + 1
    del call
    assert sys.getrefcount(op) == before


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"arguments": 0}, ValueError),
        ({"arguments": 33}, ValueError),
        ({"served": ["cpu"]}, TypeError),
        ({"other": 1}, TypeError),
    ],
)
def test_it_is_made_of_what_it_expects(changes, error):
    with pytest.raises(error):
        short(Recorder(), **changes)


@pytest.mark.skipif("cpu" not in _native.served, reason="no native CPU library")
def test_the_ops_take_it():
    call = native_call(torch.ops.fastbandit.pgd_step_.default)
    delta, grad, image = torch.zeros(4), torch.ones(4), torch.zeros(4)
    version = delta._version
    assert call(delta, grad, image, 0.5, 1.0, None, None) is None
    assert delta.tolist() == [0.5] * 4
    assert delta._version == version + 1
    assert call(delta, grad, image[:2], 0.5, 1.0, None, None) is MISS
    assert delta.tolist() == [0.5] * 4

    compiled = torch.compile(lambda *args: call(*args) is MISS, backend="eager", fullgraph=True)
    assert compiled(delta, grad, image, 0.5, 1.0, None, None)


def test_without_it_the_ops_are_the_same():
    code = (
        "import sys; sys.modules['fastbandit._native_call'] = None\n"
        "import torch, fastbandit\n"
        "from fastbandit import ops\n"
        "info = fastbandit.build_info()\n"
        "assert not info['native_call'] and '_native_call' in info['native_call_reason'], info\n"
        "delta = torch.zeros(4)\n"
        "ops.pgd_step_(delta, torch.ones(4), torch.zeros(4), step_size=0.5, epsilon=1.0)\n"
        "assert delta.tolist() == [0.5] * 4\n"
        "from fastbandit.info import main; main([])\n"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "small ops are called the long way: " in done.stdout


def test_a_module_that_does_not_load_is_told_once(monkeypatch):
    def broken(name: str) -> Any:
        raise ImportError(f"{name}: undefined symbol")

    monkeypatch.setattr(_native.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="_native_call is present but does not load.*symbol"):
        assert _native._load_native_call()[0] is None


def test_ops_on_it_still_see_an_error_of_the_caller():
    with pytest.raises(ValueError, match="grad: expected shape"):
        ops.pgd_step_(torch.zeros(4), torch.zeros(3), torch.zeros(4), step_size=1.0, epsilon=1.0)
