"""fastbandit.childparent: Algorithm 9 by hand, its schedule, state, log and simulation."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastbandit.bandit.log import End, prune
from fastbandit.childparent import (
    ChildParent,
    ChildParentSample,
    ChildParentSettings,
    ChildParentStart,
    replay,
    score,
)


def accuracies(choice, number=0):
    """Made-up accuracies (child, parent) of a path, a function of the path and of its number."""
    value = sum((7 * row + 3 * arm + number) % 11 for row, arm in enumerate(choice)) / 11
    child = 0.2 + 0.5 * value / len(choice)
    return child, min(1.0, child + 0.1 + 0.01 * (choice[0] % 3))


def run(bandit, stop=None, observe=None):
    """Go on to the end, or until so many samples."""
    while not bandit.finished and (stop is None or bandit.samples < stop):
        choice = bandit.sample().tolist()
        bandit.credit(choice, *accuracies(choice, bandit.samples))
        if bandit.due:
            abandoned = bandit.prune()
            if observe is not None:
                observe(abandoned.tolist())
    return bandit


# -- Rules ----------------------------------------------------------------------------------------


def test_the_score_is_eq_4_15():
    assert score(0.6, 0.8) == pytest.approx(0.7)
    assert score(0.6, 0.8, beta=0) == 0.6
    assert score(0.6, 0.8, beta=1) == pytest.approx(0.8)
    assert score(0.6, 0.8, beta=2) == pytest.approx(1.0)
    assert score(0.6, 0.8, beta=0.5, gap="penalty") == pytest.approx(0.5)


def test_a_hand_table():
    """Two rows, three arms, T = 1: the arms of each path, z, z-bar, e and what is dropped."""
    bandit = ChildParent(2, 3, rounds=1, beta=0.5)
    # (child, parent) by the path's number; z = 0.5, 0.7, 0.6, then 0.8, 0.4.
    given_accuracies = [(0.4, 0.6), (0.6, 0.8), (0.55, 0.65), (0.7, 0.9), (0.4, 0.4)]
    wanted = [0.5, 0.7, 0.6, 0.8, 0.4]
    paths = []
    for number in range(3):
        paths.append(bandit.sample().tolist())
        z = bandit.credit(paths[-1], *given_accuracies[number])
        assert z == pytest.approx(wanted[number])
    for row in range(2):
        assert sorted(path[row] for path in paths) == [0, 1, 2]
        for number, path in enumerate(paths):
            assert bandit.mean[row, path[row]] == pytest.approx(wanted[number])
    exponentials = torch.tensor(wanted[:3], dtype=torch.float64).exp()
    shares = bandit.shares()[0, [path[0] for path in paths]]
    torch.testing.assert_close(shares, exponentials / exponentials.sum())
    assert bandit.due
    # The first path has the smallest score, so its arm goes on both rows.
    assert bandit.prune().tolist() == paths[0]
    assert bandit.arms_left == 2
    # The round's means judge until the next score comes; then, as printed, nothing is carried.
    assert bandit.final().tolist() == paths[1]
    paths.append(bandit.sample().tolist())
    bandit.credit(paths[3], *given_accuracies[3])
    assert bandit.count.sum(1).tolist() == [1, 1]
    paths.append(bandit.sample().tolist())
    assert all(paths[4][row] != paths[3][row] for row in range(2))
    bandit.credit(paths[4], *given_accuracies[4])
    assert bandit.prune().tolist() == paths[4]
    assert bandit.finished
    assert bandit.final().tolist() == paths[3]
    assert bandit.samples == bandit.total_samples == 5


def test_carried_scores_are_means_over_all_rounds():
    bandit = ChildParent(1, 3, rounds=1, carry=True, beta=0)
    scores = {0: [], 1: [], 2: []}
    for value in (0.3, 0.9, 0.5, 0.4, 0.8):
        (arm,) = bandit.sample().tolist()
        scores[arm].append(value)
        bandit.credit([arm], value, 1.0)
        for other, values in scores.items():
            if values:
                assert bandit.mean[0, other] == pytest.approx(sum(values) / len(values))
        if bandit.due:
            alive = [arm for arm in range(3) if bandit.alive[0, arm]]
            worst = min(alive, key=lambda arm: sum(scores[arm]) / len(scores[arm]))
            assert bandit.prune().tolist() == [worst]
    assert bandit.finished


def test_ties_go_to_the_lowest_index():
    bandit = ChildParent(3, 4, rounds=2)
    dropped = []
    while not bandit.finished:
        bandit.credit(bandit.sample(), 0.5, 0.5)
        if bandit.due:
            dropped.append(bandit.prune().tolist())
    assert dropped == [[0] * 3, [1] * 3, [2] * 3]
    assert bandit.final().tolist() == [3] * 3


@given(
    rows=st.integers(1, 4), arms=st.integers(1, 6), rounds=st.integers(1, 3), seed=st.integers(0, 9)
)
@settings(deadline=None, max_examples=15)
def test_every_arm_is_tried_exactly_t_times_a_round(rows, arms, rounds, seed):
    bandit = ChildParent(rows, arms, rounds=rounds, seed=seed)
    total = 0
    while not bandit.finished:
        tried = torch.zeros(rows, arms, dtype=torch.int64)
        alive = bandit.alive.clone()
        for position in range(rounds * bandit.arms_left):
            law = bandit.probabilities()
            choice = bandit.sample()
            # Without replacement in a repetition: the arms left share the draw.
            left = bandit.arms_left - position % bandit.arms_left
            assert law.sum(1).tolist() == pytest.approx([1.0] * rows)
            assert law.gather(1, choice[:, None]).flatten().tolist() == pytest.approx(
                [1 / left] * rows
            )
            tried[torch.arange(rows), choice] += 1
            bandit.credit(choice, *accuracies(choice.tolist(), total))
            total += 1
        assert torch.equal(tried, rounds * alive.long())
        assert bandit.due
        bandit.prune()
    assert total == bandit.total_samples == rounds * (arms * (arms + 1) // 2 - 1)


def test_35_t_paths():
    assert ChildParent(28, 8).total_samples == 105
    assert ChildParent(28, 8, rounds=1).total_samples == 35


def test_permutations_are_uniform_and_differ_by_row_and_repetition():
    seen = dict.fromkeys(itertools.permutations(range(3)), 0)
    for seed in range(40):
        bandit = ChildParent(30, 3, rounds=1, seed=seed)
        paths = []
        for _ in range(3):
            paths.append(bandit.sample(ahead=True))
        for order in torch.stack(paths, 1).tolist():
            seen[tuple(order)] += 1
    # 1200 draws of 6: an expected count of 200 with a deviation of 13.
    assert all(140 < count < 260 for count in seen.values())
    bandit = ChildParent(40, 8, rounds=2, seed=1)
    first = torch.stack([bandit.sample(ahead=True) for _ in range(8)])
    second = torch.stack([bandit.sample(ahead=True) for _ in range(8)])
    assert not torch.equal(first, second)
    assert bandit.room == 0
    with pytest.raises(RuntimeError, match="16 paths drawn ahead are all that is left"):
        bandit.sample(ahead=True)


# -- State and log --------------------------------------------------------------------------------


@pytest.mark.parametrize("carry", [False, True])
def test_a_run_goes_on_from_any_sample(carry):
    def made():
        return ChildParent(5, 4, rounds=2, carry=carry, seed=3)

    whole = run(made())
    for stop in range(whole.total_samples):
        half = run(made(), stop)
        if stop % 2 and not half.finished:
            half.sample()  # drawn, and not credited
        again = made()
        again.load_state_dict(copy.deepcopy(half.state_dict()))
        if again.pending is not None:
            choice = again.pending.tolist()
            assert choice == half.pending.tolist()
            again.credit(choice, *accuracies(choice, again.samples))
            if again.due:
                again.prune()
        again = run(again)
        for name, value in whole.state_dict().items():
            other = again.state_dict()[name]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other


def test_no_global_randomness():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(ChildParent(3, 3))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_state_that_no_run_reaches_is_refused():
    bandit = run(ChildParent(3, 4, rounds=1, seed=2), 6)
    state = bandit.state_dict()

    def refused(message, **changes):
        before = bandit.state_dict()
        with pytest.raises(ValueError, match=message):
            bandit.load_state_dict({**state, **changes})
        after = bandit.state_dict()
        assert all(
            torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k]
            for k, v in before.items()
        )

    refused("beta: expected 0.5, got 0.7", beta=0.7)
    refused("seed: expected 2, got 3", seed=3)
    refused("keys unknown", more=1)
    refused("samples: expected 4 to 7 with 3 arms alive, got 9", samples=9)
    refused("samples: expected an integer", samples=True)
    refused("count: expected 2 scores in each row", count=state["count"] + 1)
    refused("sum: expected finite", sum=state["sum"] * math.nan)
    refused(
        "alive: expected the same number", alive=torch.arange(4) < torch.tensor([[3], [4], [2]])
    )
    refused(r"count: expected torch.int64 \[3, 4\]", count=state["count"].double())
    refused("pending: expected -1 everywhere", pending=torch.tensor([9, 0, 0]))


def logged(bandit, name="binary8"):
    """A whole run's log, as a search writes it."""
    edges = [f"a:0->{row}" for row in range(bandit.rows)]
    operations = [f"op{arm}" for arm in range(bandit.arms)]
    lines = [ChildParentStart.of(name, operations, edges, bandit.settings, bandit.seed).to_line()]
    while not bandit.finished:
        choice = bandit.sample().tolist()
        child, parent = accuracies(choice, bandit.samples)
        line = ChildParentSample(
            sample=bandit.samples, phase=bandit.phase, choice=choice, reward=0.0,
            child_accuracy=child, parent_accuracy=parent,
        )  # fmt: skip
        line.reward = bandit.credit(choice, child, parent)
        lines.append(line.to_line())
        if bandit.due:
            lines += [one.to_line() for one in prune(bandit, edges, operations)]
    lines.append(End(sample=bandit.samples, choice=bandit.final().tolist()).to_line())
    return lines


def test_the_log_replays():
    bandit = ChildParent(3, 4, rounds=2, beta=0.3, gap="penalty", carry=True, seed=5)
    lines = logged(bandit)
    again = replay(lines)
    assert again.final().tolist() == bandit.final().tolist()
    assert again.settings == bandit.settings
    assert replay(lines[:8]).samples == 7
    abandoned = next(line for line in lines if line["event"] == "abandon")
    assert abandoned["lower"] is None
    assert abandoned["count"] == 2

    def refused(number, message, **changes):
        changed = [dict(line) for line in lines]
        changed[number].update(changes)
        with pytest.raises(ValueError, match=rf"line {number + 1}: .*{message}"):
            replay(changed)

    refused(1, "reward: the rule gives", reward=0.123)
    refused(1, "parent", parent_accuracy=1.5)
    refused(2, "sample: the rule gives 1", sample=4)
    place = lines.index(abandoned)
    refused(place, "arm: the rule gives", arm=(abandoned["arm"] + 1) % 4)
    refused(len(lines) - 1, "choice: the rule gives", choice=[0, 0, 0])
    with pytest.raises(ValueError, match="line 1: event: expected start, got 'sample'"):
        replay(lines[1:])
    with pytest.raises(ValueError, match="expected abandon events of rows"):
        replay([*lines[: place + 1], lines[1]])
    with pytest.raises(ValueError, match="the log is empty"):
        replay([])
    with pytest.raises(ValueError, match="nothing may follow"):
        replay([*lines, lines[-1]])
    with pytest.raises(ValueError, match=r"line 1: .*algorithm"):
        replay([{k: v for k, v in lines[0].items() if k != "algorithm"}])


def test_errors():
    for changes, message in (
        ({"rounds": 0}, "rounds: expected an integer >= 1, got 0"),
        ({"beta": -0.1}, "beta: expected a finite number >= 0"),
        ({"beta": math.inf}, "beta"),
        ({"gap": "none"}, "gap: expected one of reward, penalty, got 'none'"),
        ({"carry": 1}, "carry: expected true or false, got 1"),
        ({"seed": -1}, "seed: expected an integer in"),
    ):
        with pytest.raises(ValueError, match=message):
            ChildParent(2, 3, **changes)
    with pytest.raises(ValueError, match="rows: expected an integer >= 1, got 0"):
        ChildParent(0, 3)
    bandit = ChildParent(2, 2, ChildParentSettings(rounds=1))
    with pytest.raises(RuntimeError, match="credit: no path was drawn"):
        bandit.credit([0, 0], 0.5, 0.5)
    with pytest.raises(RuntimeError, match="0 of 2 paths are trained with 2 arms"):
        bandit.prune()
    choice = bandit.sample()
    with pytest.raises(RuntimeError, match="not credited yet"):
        bandit.sample()
    with pytest.raises(RuntimeError, match="drawn and not credited"):
        bandit.prune()
    for wrong in ((1.1, 0.5), (0.5, math.nan), (-0.1, 0.5)):
        with pytest.raises(ValueError, match="expected an accuracy in"):
            bandit.credit(choice, *wrong)
    for wrong in ([0], [0.0, 1.0], [0, 2], [True, False]):
        with pytest.raises(ValueError, match="credit: choice"):
            bandit.credit(torch.tensor(wrong), 0.5, 0.5)
    assert bandit.samples == 0
    bandit.credit(choice, 0.5, 0.5)
    with pytest.raises(ValueError, match="trained: expected True"):
        bandit.sample(trained=False)
    bandit.credit(bandit.sample(), 0.5, 0.6)
    with pytest.raises(RuntimeError, match="call prune"):
        bandit.sample()
    bandit.prune()
    with pytest.raises(RuntimeError, match="finished"):
        bandit.sample()


# -- Simulation -----------------------------------------------------------------------------------


def simulated(searches, **settings):
    """Mean effect, in deviations, of the surviving arms of 28 rows of 8.

    The child's accuracy is the sum of effects of deviation 0.01, the parent's of effects that
    correlate with these by 0.7, each with noise of deviation 0.01.
    """
    total = 0.0
    for seed in range(searches):
        draws = torch.Generator().manual_seed(1000 + seed)
        child = torch.randn(28, 8, generator=draws, dtype=torch.float64)
        parent = 0.7 * child + math.sqrt(0.51) * torch.randn(
            28, 8, generator=draws, dtype=torch.float64
        )
        bandit = ChildParent(28, 8, seed=seed, **settings)
        noise = torch.randn(bandit.total_samples, 2, generator=draws, dtype=torch.float64)
        rows = torch.arange(28)
        while not bandit.finished:
            choice = bandit.sample()
            sums = torch.stack([child[rows, choice].sum(), parent[rows, choice].sum()])
            bandit.credit(choice, *(0.5 + 0.01 * (sums + noise[bandit.samples])).tolist())
            if bandit.due:
                bandit.prune()
        total += child[rows, bandit.final()].mean().item()
    return total / searches


@pytest.mark.parametrize(
    ("rule", "survivor"),
    [
        # Of 150 searches by another program.
        ({"beta": 0.5}, 0.61),
        ({"beta": 2.0}, 0.19),
        # Each pruning takes the smallest of k normal values out of noise of variance 28 and effects
        # of 1: the sum over k = 8 ... 2 of (expected largest of k) / (k - 1) / sqrt(29).
        ({"beta": 0.0, "rounds": 1}, 0.43),
    ],
)
def test_simulated_searches(rule, survivor):
    assert simulated(20, **rule) == pytest.approx(survivor, abs=0.05)
