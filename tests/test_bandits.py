"""Many bandits at once, settings that a policy has for itself, and the lines of bandit.jsonl."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

import pytest
import torch

from fastbandit.bandit import (
    POLICIES,
    AntiBandit,
    Bandits,
    BanditSettings,
    Policy,
    log,
    register,
    replay,
)
from fastbandit.study.config import parse_entry

SEEDS = (3, 2**40 + 1, 2**62)


def accuracy(choice):
    """A made-up accuracy of each path [..., rows], exact in float64."""
    weights = torch.arange(1, choice.shape[-1] + 1)
    return 0.5 + ((choice * weights).sum(-1) % 64).double() / 256


def paths(bandit, extra):
    """Whether each path of the next epoch is trained."""
    return [True] + [False] * (extra if bandit.phase == "search" else 0)


# --- many at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize(("extra", "scale"), [(0, 1.0), (2, 100.0)])
def test_bandit_i_of_a_batch_is_the_bandit_of_its_seed(policy, extra, scale):
    settings = BanditSettings(policy, rounds=1, scale=scale)
    many = Bandits(4, 5, settings, seed=torch.tensor(SEEDS), room_for=2)
    each = [AntiBandit(4, 5, settings, seed=seed) for seed in SEEDS]

    def same(name):
        for i, one in enumerate(each):
            found, expected = getattr(many, name), getattr(one, name)
            found = found if isinstance(found, int | str | bool) else found[i]
            if isinstance(expected, torch.Tensor):
                assert torch.equal(found, expected), name
            else:
                assert found == expected, name

    while not many.finished:
        for trained in paths(many, extra):
            law = many.probabilities()
            choice = many.sample()
            reward = accuracy(choice)
            for i, one in enumerate(each):
                assert torch.allclose(law[i], one.probabilities(), rtol=1e-9, atol=1e-12)
                assert torch.equal(choice[i], one.sample(trained=trained))
                one.credit(choice[i], reward[i].item(), trained=trained)
            many.credit(choice, reward, trained=trained)
            for name in (
                "mean",
                "count",
                "samples",
                "trained",
                "phase",
                "round",
                "in_round",
                "due",
            ):
                same(name)
        while many.due:
            abandoned = many.prune()
            for i, one in enumerate(each):
                assert torch.equal(abandoned[i], one.prune())
            same("alive")
    for i, one in enumerate(each):
        assert one.finished
        assert torch.equal(many.final()[i], one.final())
        assert torch.equal(many.history.choice[i], one.history.choice)
        assert torch.equal(many.history.reward[i], one.history.reward)
        assert torch.equal(many.history.trained, one.history.trained)
    assert many.total_samples == many.trained == each[0].total_samples


def test_more_samples_than_there_was_room_for_at_first():
    bandit = AntiBandit(2, 5, rounds=20)
    kept = []
    while not bandit.finished:
        choice = bandit.sample()
        bandit.credit(choice, accuracy(choice).item())
        kept.append(choice)
        while bandit.due:
            bandit.prune()
    assert bandit.samples == 5 + 20 * 14
    assert torch.equal(bandit.history.choice, torch.stack(kept))
    assert torch.equal(bandit.history.reward, accuracy(torch.stack(kept)))


# --- a policy of one's own ----------------------------------------------------------------------


@dataclass(frozen=True)
class Wider(BanditSettings):
    """The settings with one that a policy has for itself."""

    drift: float = 0.0


@pytest.fixture
def gap(monkeypatch):
    """A policy without an initial pass whose rewards are any numbers."""
    monkeypatch.setitem(POLICIES, "gap", Policy)  # what is there afterwards is taken out
    del POLICIES["gap"]

    @register
    class Gap(Policy):
        name = "gap"
        initial_pass = False
        accuracies = False

        def probabilities(self, bandit):
            return bandit.alive.double() / bandit.arms_left

        def sample(self, bandit):
            return bandit.alive.int().argmax(-1)

        def score(self, bandit):
            return bandit.mean + getattr(bandit.settings, "drift", 0.0)

    return Gap


def record(bandit):
    """The lines of a run from its beginning to its end, through JSON."""
    edges = [f"a:0->{row}" for row in range(bandit.rows)]
    operations = [f"operation_{arm}" for arm in range(bandit.arms)]
    lines = [log.Start.of("example", operations, edges, bandit.settings, bandit.seed)]
    while not bandit.finished:
        choice = bandit.sample()
        reward = -3.0 + 10 * accuracy(choice).item()
        line = log.Sample(
            sample=bandit.samples, phase=bandit.phase, choice=choice.tolist(), reward=reward
        )
        bandit.credit(choice, reward)
        lines.append(line)
        while bandit.due:
            lines += log.prune(bandit, edges, operations)
    lines.append(log.End(sample=bandit.samples, choice=bandit.final().tolist()))
    return [json.loads(json.dumps(line.to_line(), allow_nan=False)) for line in lines]


def test_no_initial_pass_and_rewards_of_any_size(gap):
    bandit = AntiBandit(2, 3, policy="gap", rounds=1)
    assert (bandit.phase, bandit.round, bandit.room) == ("search", 1, 3)
    assert bandit.total_samples == 3 + 2
    for wrong in (math.nan, math.inf):
        bandit.sample()
        with pytest.raises(
            ValueError, match=f"credit: reward: expected a finite number, got {wrong}"
        ):
            bandit.credit(bandit.pending, wrong)
        bandit.credit(bandit.pending, -7.5)
    resumed = AntiBandit(2, 3, policy="gap", rounds=1)
    resumed.load_state_dict(bandit.state_dict())
    assert resumed.mean.tolist() == [[-7.5, 0.0, 0.0]] * 2
    state = bandit.state_dict()
    state["history_reward"].fill_(math.inf)
    with pytest.raises(ValueError, match="history_reward: expected finite values"):
        resumed.load_state_dict(state)


def test_replay_of_arms_that_were_never_tried(gap):
    bandit = AntiBandit(2, 3, policy="gap", rounds=1)
    lines = record(bandit)
    assert [line["sample"] for line in lines if line["event"] == "sample"] == list(range(5))
    bounds = [(line["lower"], line["count"]) for line in lines if line["event"] == "abandon"]
    assert (None, 0) in bounds  # JSON has no infinity
    again = replay(lines)
    assert torch.equal(again.final(), bandit.final())
    assert torch.equal(again.mean, bandit.mean)


def test_a_setting_of_a_policy_s_own(gap):
    settings, _ = parse_entry("gap,drift=0.5", Wider(), "here")
    assert settings == Wider("gap", drift=0.5)
    bandit = AntiBandit(1, 2, settings)
    assert bandit.score().tolist() == [[0.5, 0.5]]
    state = bandit.state_dict()
    assert state["drift"] == 0.5
    other = AntiBandit(1, 2, Wider("gap", drift=0.25))
    with pytest.raises(ValueError, match=re.escape("drift: expected 0.25, got 0.5")):
        other.load_state_dict(state)
    # A checkpoint from before the setting came is one at its default.
    before = AntiBandit(1, 2, BanditSettings("gap")).state_dict()
    AntiBandit(1, 2, Wider("gap")).load_state_dict(before)


def test_whole_numbers_are_floats_where_a_setting_is_one():
    """A checkpoint of rate 1 goes on with rate 1.0, as a configuration file gives it back."""
    whole, plain = AntiBandit(1, 2, rate=1, bonus=2), AntiBandit(1, 2, rate=1.0, bonus=2.0)
    plain.load_state_dict(whole.state_dict())
    assert type(whole.settings.rate) is float
    assert type(whole.settings.rounds) is int


# --- the log ------------------------------------------------------------------------------------


def test_the_start_line():
    """Its bytes: the settings of the first logs, the seed, then what is not at its default."""
    settings = BanditSettings("ridge", 0.5, 2, 1.0)
    line = log.Start.of("example", ("x", "y"), ["a:0->1"], settings, 7).to_line()
    text = (
        '{"event": "start", "space": "example", "operations": ["x", "y"], "edges": ["a:0->1"], '
        '"policy": "ridge", "rate": 0.5, "rounds": 2, "bonus": 1.0, "scale": 1.0, "seed": 7'
    )
    assert json.dumps(line) == text + "}"
    settings = BanditSettings("ridge", 0.5, 2, 1.0, evaluations_per_epoch=3)
    line = log.Start.of("example", ("x", "y"), ["a:0->1"], settings, 7).to_line()
    assert json.dumps(line) == text + ', "evaluations_per_epoch": 3}'
    assert log.Start.model_validate(line).settings == settings
    del line["scale"], line["evaluations_per_epoch"]  # as in an old log
    assert log.Start.model_validate(line).settings == BanditSettings("ridge", 0.5, 2, 1.0)


def test_other_lines():
    sample = log.Sample(sample=4, phase="search", choice=[1], probability=[0.5], reward=0.25)
    expected = {"event": "sample", "sample": 4, "phase": "search", "choice": [1]}
    expected |= {"probability": [0.5], "reward": 0.25}
    assert json.dumps(sample.to_line()) == json.dumps(expected)
    sample.trained = False
    assert json.dumps(sample.to_line()) == json.dumps({**expected, "trained": False})
    end = log.End(sample=5, choice=[1])
    assert json.dumps(end.to_line()) == '{"event": "end", "sample": 5, "choice": [1]}'
    kinds = {kind.model_fields["event"].default: kind for kind in log.LINES.values()}
    assert kinds == log.LINES


@pytest.mark.parametrize("policy", ["printed", "ucb1", "ridge-thompson"])
def test_what_an_observer_sees(policy, monkeypatch):
    bandit = AntiBandit(2, 3, policy=policy, rounds=1)
    edges, operations = ["a:0->1", "b:0->1"], ["x", "y", "z"]
    lines = [log.Start.of("example", operations, edges, bandit.settings, 0).to_line()]
    means = [bandit.mean.clone()]
    while not bandit.finished:
        number, phase, choice = bandit.samples, bandit.phase, bandit.sample()
        reward = accuracy(choice).item()
        line = log.Sample(sample=number, phase=phase, choice=choice.tolist(), reward=reward)
        bandit.credit(choice, reward)
        lines.append(line.to_line())
        means.append(bandit.mean.clone())
        while bandit.due:
            gone = log.prune(bandit, edges, operations)
            lines += [one.to_line() for one in gone]
            means += [bandit.mean.clone()] * len(gone)
    lines.insert(2, {"event": "attack", "sample": 1})
    seen = []

    def observe(state, line):
        seen.append((line.to_line(), state.mean.clone(), state.samples))

    # The paths are those of the log: none is drawn again.
    monkeypatch.setattr(POLICIES[policy], "sample", None)
    replay(lines, observe)
    del lines[2]
    assert [line for line, _, _ in seen] == lines
    for (_, mean, _), expected in zip(seen, means, strict=True):
        assert torch.equal(mean, expected)
    credited = [line["event"] == "sample" for line in lines]
    assert [samples for _, _, samples in seen] == torch.tensor(credited).cumsum(0).tolist()


def test_replay_names_what_a_line_has_instead():
    start = log.Start.of("example", ["x", "y"], ["a:0->1"], BanditSettings(), 0).to_line()
    with pytest.raises(ValueError, match=r"^bandit log, line 1: rate: .*valid number, got '0\.7'$"):
        replay([{**start, "rate": "0.7"}])
    with pytest.raises(ValueError, match=r"^bandit log, line 1: start event: bonus is missing$"):
        replay([{name: value for name, value in start.items() if name != "bonus"}])
    with pytest.raises(
        ValueError, match=r"^bandit log, line 1: AntiBandit: rate: expected a number"
    ):
        replay([{**start, "rate": 1.5}])
