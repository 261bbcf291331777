"""The guard against rewards that an attack through a derivative of the sign overstates."""

from __future__ import annotations

import json

import pytest
import torch
from _tiny import tiny
from torch import Tensor, nn

from fastbandit import attacks
from fastbandit import space as spaces
from fastbandit.childparent import replay
from fastbandit.config import merge
from fastbandit.nn.binary import BinaryConv2d, surrogate_of
from fastbandit.search import masking as masking_module
from fastbandit.search import search
from fastbandit.search.child_parent import ChildParentTrial
from fastbandit.search.masking import Masking, attack, masking, worst_case
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, evaluate

EXACT = ("genotype.json", "bandit.jsonl", "weights.safetensors")


def settings(**changes):
    """Five paths, attacked by FGSM; a check after every second."""
    base = {
        "space": "binary7", "layers": 3, "algorithm": "cp-nas", "attack": {"epsilon": "0.1"},
        "bandit": {"rounds": 3}, "cp": {"rounds": 1}, "guard": {"every": 2, "images": 8},
    }  # fmt: skip
    return merge(tiny(**base), changes, "test")


@pytest.fixture(scope="module", autouse=True)
def small_space():
    names = ("skip_connect", "max_pool_3x3", "bin_sep_conv_3x3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spaces.SPACES, "binary7", names)
        yield


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Batches:
    """Images, their labels and ids, in batches of eight."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.parts = [part.split(8) for part in (x, y, torch.arange(len(y)))]

    def epoch(self, number):
        return zip(*self.parts, strict=True)


def network(ste: str) -> nn.Module:
    """1-bit, sure of itself: the classes are signs of pixels, of which most are near the border."""
    torch.manual_seed(0)
    first = BinaryConv2d(1, 16, 3)
    first.ste = ste
    return nn.Sequential(
        Shift(), first, nn.BatchNorm2d(16), BinaryConv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    ).eval()  # fmt: skip


class Shift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 8 * (x - 0.5)


@pytest.fixture(scope="module")
def subject():
    model = network("identity")
    x = torch.rand(32, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, Batches(x, model(x).argmax(1))


THREAT = ThreatModel(epsilon=0.06, steps=1)


def check(model: nn.Module, batches: Batches, cost: Cost) -> Masking:
    own = evaluate(model, batches, THREAT, seed=0, cost=cost)
    return masking(
        model, batches, THREAT, own.robust_accuracy, seed=0, cost=cost, modules=model.modules()
    )


def test_the_check_fires_where_one_run_finds_little(subject):
    model, batches = subject
    cost = Cost()
    found = check(model, batches, cost)
    assert found.images == 32
    assert found.rewarded - found.restarts > masking_module.GAP
    assert found.masked
    assert cost.images_evaluated == 64
    assert cost.forward_passes > cost.backward_passes > 0


def test_the_verdict_is_the_lower_of_the_two():
    for restarts, queries, masked in ((0.9, 0.9, False), (0.84, 0.9, True), (0.9, 0.84, True)):
        found = Masking(0.9, restarts, queries, 100)
        assert found.masked is masked
        assert found.to_dict()["masked"] is masked


def test_the_worst_case_is_by_image_and_with_the_images_of_another(subject):
    """By hand: what each run leaves, and their intersection."""
    model, batches = subject
    standing = []
    for x, y, ids in batches.epoch(0):
        left = torch.ones(len(y), dtype=torch.bool)
        for ste in masking_module.SURROGATES:
            with surrogate_of(model, ste):
                moved = attack(model, THREAT, x, y, ids, masking_module.RESTARTS, 3)
            left &= model(moved).argmax(1) == y
        standing.append(left)
    expected = int(torch.cat(standing).sum())
    common = {"seed": 3, "cost": Cost(), "modules": list(model.modules())}
    found = worst_case(model, batches, THREAT, **common)
    assert (found.clean_correct, found.robust_correct, found.images) == (32, expected, 32)
    assert 0 < expected < 32

    def transfer(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        return attacks.square(model, x, y, epsilon=0.2, queries=200, index=ids)

    moved = worst_case(model, batches, THREAT, transfer=transfer, **common)
    assert moved.robust_correct < expected


@pytest.mark.parametrize("random_start", [True, False])
def test_passes_are_counted_as_they_are_made(subject, random_start):
    """Where every image stands to the end, and so takes all of them."""
    model, batches = subject
    threat = ThreatModel(epsilon=1e-7, steps=2, random_start=random_start)
    calls: list[int] = []
    hook = model[-1].register_forward_hook(lambda *_: calls.append(1))
    common = {"seed": 0, "modules": list(model.modules())}

    def transfer(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
        return attack(model, threat, x, y, ids, 1, 0)

    counted = []
    for call in (
        lambda cost: worst_case(model, batches, threat, cost=cost, **common),
        lambda cost: worst_case(model, batches, threat, cost=cost, transfer=transfer, **common),
        lambda cost: masking(model, batches, threat, 1.0, cost=cost, **common),
    ):
        cost = Cost()
        calls.clear()
        call(cost)
        counted.append((cost.forward_passes, len(calls)))
    hook.remove()
    assert all(said == made for said, made in counted), counted


def test_a_search_whose_reward_is_masked_goes_on_with_the_worst_case(tmp_path, monkeypatch):
    """It says so, the log replays, and an interrupted one goes on to the same bytes."""
    monkeypatch.setattr(masking_module, "GAP", -2.0)
    calls = []
    real = worst_case

    def counted(*arguments, **named):
        calls.append(named["transfer"] is not None)
        return real(*arguments, **named)

    monkeypatch.setattr("fastbandit.search.child_parent.worst_case", counted)
    whole, summary = search(settings(), tmp_path / "whole")
    # Checked after the second path, which is validated again; three more follow.
    assert calls == [True] * 4
    log = lines(whole / "bandit.jsonl")
    (event,) = (line for line in log if line["event"] == "reward")
    assert event["epoch"] == 1
    assert summary["masking"] == [event]
    replay(log)
    checked = [line.get("masking") for line in lines(whole / "metrics.jsonl")]
    assert [one is not None for one in checked[:5]] == [False, True, False, False, False]
    assert "unknown event" not in (whole / "report.html").read_text(encoding="utf-8")

    train = ChildParentTrial.train

    def stopping(self, path, number, *rest):
        if number == 3:
            raise KeyboardInterrupt
        return train(self, path, number, *rest)

    monkeypatch.setattr(ChildParentTrial, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        search(settings(), tmp_path / "parts")
    monkeypatch.setattr(ChildParentTrial, "train", train)
    search(settings(), tmp_path / "parts")
    for name in EXACT:
        assert (tmp_path / "parts" / name).read_bytes() == (whole / name).read_bytes(), name


def test_clean_searches_and_those_without_a_guard_are_not_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(masking_module, "GAP", -2.0)
    for name, changes in (
        ("clean", {"attack": {"steps": 0}}),
        ("off", {"guard": {"enabled": False}}),
    ):
        folder, summary = search(settings(**changes), tmp_path / name)
        assert summary["masking"] == []
        assert not any(line["event"] == "reward" for line in lines(folder / "bandit.jsonl"))
