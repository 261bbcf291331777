"""Weights that are cast once for a recorded step: the bits of casting at each use."""

from __future__ import annotations

import contextlib

import torch
from test_engine import CPU, CallingRecorder, Run
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastbandit.nn.blocks import DepthwiseConv2d
from fastbandit.nn.operations import DilConv
from fastbandit.training import Engine, Graphs
from fastbandit.training import recorded as recording
from fastbandit.training.halves import Halves

HALF = torch.bfloat16


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.append(func._opname)
        return func(*args, **(kwargs or {}))


def trained(monkeypatch, cast: bool, half: bool = True) -> tuple[Run, list[str], int]:
    """A run after two epochs with recorded steps, and the operations of the second."""
    recorder = CallingRecorder()
    if not cast:
        monkeypatch.setattr(recording, "Halves", lambda modules, dtype: Halves(modules, None))
    run = Run(dtype=torch.float32)
    engine = Engine("bfloat16" if half else "float32", Graphs("yes", CPU, recorder=recorder))
    run.epoch(0, engine=engine)
    with Names() as names:
        run.epoch(1, engine=engine)
    monkeypatch.undo()
    return run, names.found, recorder.replayed


def test_the_bits_of_a_step_are_the_same(monkeypatch):
    cast, names, replayed = trained(monkeypatch, True)
    plain, others, _ = trained(monkeypatch, False)
    assert replayed > 4
    for one, other in zip(cast.model.state_dict().values(), plain.model.state_dict().values(),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)
    weights = len(Halves(cast.path["modules"], HALF)._places)
    assert weights > 8
    # Each is cast in two forward passes, and its gradient once.
    saved = others.count("_to_copy") - names.count("_to_copy")
    assert saved >= 3 * weights * (replayed // 2)
    assert not names.count("clone") > others.count("clone")  # a gradient is nobody else's


def test_nothing_is_cast_in_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(
        recording, "Halves", lambda modules, dtype: seen.append(dtype) or Halves(modules, dtype)
    )
    trained(monkeypatch, True, half=False)
    assert seen == [None] * len(seen) != []


def test_weights_are_put_back_after_an_error():
    layer = DilConv(3, 4, 1, affine=True)
    weight = layer.pointwise
    halves = Halves(layer.modules(), HALF)
    with contextlib.suppress(KeyError), halves.put():
        assert layer.pointwise.dtype == layer.depthwise.weight.dtype == HALF
        assert layer.bn.weight.dtype == torch.float32
        raise KeyError
    assert layer.pointwise is weight
    with halves.put():
        (layer.pointwise.float() * 3).sum().backward()
    assert weight.grad.dtype == torch.float32
    assert bool((weight.grad == 3).all())
    assert layer.depthwise.weight.grad is None


def test_layers_that_do_more_with_their_weights_keep_them():
    class Other(DepthwiseConv2d):
        pass

    hooked = DepthwiseConv2d(4, 3)
    hooked.register_forward_hook(lambda *_: None)
    signed, double = DepthwiseConv2d(4, 3, sign=True), DepthwiseConv2d(4, 3).double()
    kept = [Other(4, 3), hooked, signed, double, nn.Linear(3, 3), nn.BatchNorm2d(3)]
    assert not Halves(kept, HALF)._places
    assert not Halves([DepthwiseConv2d(4, 3)], None)._places
    assert len(Halves([DepthwiseConv2d(4, 3), nn.Conv2d(3, 3, 1)], HALF)._places) == 2
