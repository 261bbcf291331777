"""Bandits whose paths keep to a budget of sizes, and paths with random mixes."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from fastbandit.bandit import POLICIES, AntiBandit, Bandits, BanditSettings, log, replay

ROWS, ARMS, BASE = 5, 4, 20
COSTS = torch.randint(50, (ROWS, ARMS), generator=torch.Generator().manual_seed(8))
LEAST = BASE + int(COSTS.amin(1).sum())
MOST = BASE + int(COSTS.amax(1).sum())
USUAL = BASE + int(COSTS.double().mean(1).sum())
BUDGETS = {
    "usual": (USUAL - 15, USUAL + 15),
    "small": (0, LEAST + 12),
    "large": (MOST - 10, math.inf),
    "narrow": (USUAL + 20, USUAL + 21),
}
SEEDS = (0, 3, 2**40)


def accuracy(choice):
    """Made up: exact in float64, different for different paths."""
    weights = torch.arange(1, choice.shape[-1] + 1)
    return 0.5 + ((choice * weights).sum(-1) % 64) / 256


def size(choice):
    return BASE + COSTS[torch.arange(ROWS), choice].sum(-1)


def within(choice, budget):
    found = size(choice)
    return bool(((found >= budget[0]) & (found <= budget[1])).all())


def made(policy="printed", budget="usual", kind=AntiBandit, seed=0, **settings):
    given = BanditSettings(policy, rounds=1, **settings)
    known = {"costs": COSTS, "base_cost": BASE, "budget": BUDGETS[budget]}
    if kind is AntiBandit:
        known["groups"] = [0, 0, 1, 1, 1]
    return kind(ROWS, ARMS, given, seed=seed, **known)


def turns(bandit, evaluated=0):
    """Whether the paths of the next step are trained."""
    return (True, *[False] * (0 if bandit.phase == "initial" else evaluated))


def best_of_all(alive, worth, budget):
    """The largest sum of worths of the paths within."""
    arms = [row.nonzero().squeeze(1).tolist() for row in alive]
    paths = torch.tensor(list(itertools.product(*arms)))
    total = size(paths)
    inside = (total >= budget[0]) & (total <= budget[1])
    sums = worth[torch.arange(ROWS), paths].sum(1)
    return sums[inside].max().item() if bool(inside.any()) else None


def holding(alive, budget):
    """Which arms some path within holds, as far as the extremes of sizes tell, by trying each."""
    found = alive.clone()
    while True:
        before = found.clone()
        for row, arm in before.nonzero().tolist():
            others = [r for r in range(ROWS) if r != row]
            costs = [COSTS[r][before[r]] for r in others]
            rest = BASE + int(COSTS[row, arm])
            least = rest + sum(int(one.min()) for one in costs)
            most = rest + sum(int(one.max()) for one in costs)
            found[row, arm] = least <= budget[1] and most >= budget[0]
        if torch.equal(found, before):
            return found


# Every policy, and every budget.
CASES = [(policy, "narrow") for policy in POLICIES]
CASES += [(policy, b) for policy in ("printed", "ridge-thompson") for b in BUDGETS if b != "narrow"]


@pytest.mark.parametrize(("policy", "budget"), CASES)
def test_all_paths_are_within_the_budget(policy, budget):
    """Drawn, left and final ones; the batched bandits make the same choices."""
    many = made(policy, budget, Bandits, torch.tensor(SEEDS), evaluations_per_epoch=1)
    each = [made(policy, budget, Bandits, seed, evaluations_per_epoch=1) for seed in SEEDS]
    seen = set()
    while not many.finished:
        for trained in turns(many, 1):
            law = many.probabilities(trained=trained)
            assert law.sum(-1).flatten().tolist() == pytest.approx([1.0] * 3 * ROWS)
            assert bool((law[~many.alive] == 0).all())
            choice = many.sample(trained=trained)
            assert within(choice, BUDGETS[budget])
            assert bool(many.alive.gather(-1, choice.unsqueeze(-1)).all())
            seen |= {tuple(path) for path in choice.tolist()}
            for i, one in enumerate(each):
                assert torch.equal(one.sample(trained=trained), choice[i])
                one.credit(choice[i], accuracy(choice[i]).item(), trained=trained)
            many.credit(choice, accuracy(choice), trained=trained)
        assert within(many.final(), BUDGETS[budget])
        while many.due:
            gone = many.prune()
            assert many.alive.sum(-1).unique().tolist() == [many.arms_left]
            for i, one in enumerate(each):
                assert torch.equal(one.prune(), gone[i])
                assert best_of_all(one.alive, one.mean, BUDGETS[budget]) is not None
    assert within(many.final(), BUDGETS[budget])
    assert torch.equal(many.final(), many.alive.int().argmax(-1))
    assert len(seen) > (2 if budget == "small" else 8)


def test_arms_are_spared_only_where_the_budget_needs_them(monkeypatch):
    # Sizes that few paths share, so that the budget is lost early.
    costs = torch.randint(1000, (ROWS, ARMS), generator=torch.Generator().manual_seed(3))
    monkeypatch.setitem(globals(), "COSTS", costs)
    usual = BASE + int(costs.double().mean(1).sum())
    for width in (2, 5, 40, 400):
        monkeypatch.setitem(BUDGETS, f"{width}", (usual - width, usual + width))
    free, spared, ends = 0, 0, 0
    cases = itertools.product(("printed", "ridge", "ucb1"), ("2", "5", "40", "400"), range(2))
    for policy, budget, seed in cases:
        bandit = made(policy, budget, seed=seed)
        while not bandit.finished:
            bandit.credit(choice := bandit.sample(), accuracy(choice).item())
            while bandit.due:
                wanted = bandit._policy.prune(bandit)
                before, worth = bandit.alive.clone(), bandit.score()
                # An arm that no path within has, goes before any other.
                useless = before & ~holding(before, BUDGETS[budget])
                wanted = torch.where(useless.any(1), useless.int().argmax(1), wanted)
                plain = before.scatter(1, wanted.unsqueeze(1), False)
                gone = bandit.prune()
                assert bool(before.gather(1, gone.unsqueeze(1)).all())
                if best_of_all(plain, worth, BUDGETS[budget]) is not None:
                    assert torch.equal(gone, wanted)
                    free += 1
                elif bandit.arms_left == 1:
                    left = bandit.alive.int().argmax(1)
                    best = best_of_all(before, worth, BUDGETS[budget])
                    assert worth[torch.arange(ROWS), left].sum().item() == pytest.approx(best)
                    ends += 1
                else:
                    # Rows change in the order of what they lose by it, and the last was needed.
                    changed = (gone != wanted).nonzero().squeeze(1)
                    spared += len(changed)
                    row = torch.arange(ROWS)
                    loss = (worth[row, gone] - worth[row, wanted])[changed]
                    last = changed[loss.argsort(stable=True)[-1]]
                    one_less = torch.where(row == last, wanted, gone)
                    left = before.scatter(1, one_less.unsqueeze(1), False)
                    assert best_of_all(left, worth, BUDGETS[budget]) is None
    assert min(free, spared, ends) > 2


def test_final_is_the_best_path_by_the_policys_score():
    bandit = made("ridge", "narrow")
    while bandit.phase == "initial" or bandit.in_round < 2:
        bandit.credit(choice := bandit.sample(), accuracy(choice).item())
    score, final = bandit.score(), bandit.final()
    assert score[torch.arange(ROWS), final].sum().item() == pytest.approx(
        best_of_all(bandit.alive, score, BUDGETS["narrow"])
    )


def test_the_random_baseline_learns_nothing_from_rewards():
    one, other = made("random", "narrow", seed=5), made("random", "narrow", seed=5)
    while not one.finished:
        choice = one.sample()
        assert torch.equal(choice, other.sample())
        one.credit(choice, accuracy(choice).item())
        other.credit(choice, 1.0 - accuracy(choice).item())
        while one.due:
            assert torch.equal(one.prune(), other.prune())
    assert torch.equal(one.final(), other.final())


def test_the_initial_pass_tries_every_arm_as_far_as_the_sizes_allow():
    rows, arms = 40, 8
    costs = torch.randint(100, (rows, arms), generator=torch.Generator().manual_seed(1))
    middle = costs.double().mean(1).sum().item()
    known = {"costs": costs, "budget": (0.97 * middle, 1.03 * middle)}
    bandit = AntiBandit(rows, arms, seed=2, **known)
    for _ in range(arms):
        bandit.credit(bandit.sample(), 0.5)
    assert (bandit.count > 0).double().mean() > 0.95
    # A budget that all paths keep to changes nothing.
    wide, plain = AntiBandit(rows, arms, costs=costs, budget=(0, 1e9)), AntiBandit(rows, arms)
    while not plain.finished:
        choice = wide.sample()
        assert torch.equal(choice, plain.sample())
        for one in (wide, plain):
            one.credit(choice, accuracy(choice).item())
        while plain.due:
            assert torch.equal(wide.prune(), plain.prune())
    assert wide.finished


@pytest.mark.parametrize("policy", ["printed", "ridge"])
def test_a_run_resumes_and_draws_ahead_alike(policy):
    """With a budget and with mixes: after every step, from the state as a file holds it."""
    how = {"mixes": 0.5, "evaluations_per_epoch": 1}
    bandit = made(policy, "narrow", seed=7, **how)
    paths = []
    while not bandit.finished:
        state = bandit.state_dict()
        plain = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
        resumed = made(policy, "narrow", seed=7, **how)
        resumed.load_state_dict({**state, **json.loads(json.dumps(plain))})
        ahead = [resumed.sample(ahead=True) for _ in range(min(2, resumed.room))]
        again = made(policy, "narrow", seed=7, **how)
        again.load_state_dict(state)
        for choice in ahead:
            assert torch.equal(choice, again.sample(ahead=True))
            assert within(choice, BUDGETS["narrow"])
        for trained in turns(bandit, 1):
            choice = bandit.sample(trained=trained)
            assert not trained or torch.equal(choice, ahead[0])
            bandit.credit(choice, accuracy(choice).item(), trained=trained)
            paths.append(tuple(choice.tolist()))
        while bandit.due:
            bandit.prune()
    assert len(set(paths)) > 5
    with pytest.raises(ValueError, match="load_state_dict: known: expected '"):
        made(policy, "usual", seed=7, **how).load_state_dict(bandit.state_dict())
    with pytest.raises(ValueError, match=r"keys missing: \[\], keys unknown: \['known'\]"):
        AntiBandit(ROWS, ARMS, policy=policy).load_state_dict(
            {k: v for k, v in bandit.state_dict().items() if k not in how}
        )


def test_a_state_without_a_path_in_the_budget_is_refused():
    bandit = made("random", "large")
    while not bandit.finished:
        bandit.credit(bandit.sample(), 0.5)
        while bandit.due:
            bandit.prune()
    state = bandit.state_dict()
    state["alive"] = torch.zeros(ROWS, ARMS, dtype=torch.bool)
    state["alive"][torch.arange(ROWS), COSTS.argmin(1)] = True
    with pytest.raises(ValueError, match=r"alive: expected arms of which a path has 1.. to any"):
        made("random", "large").load_state_dict(state)


# --- the log ------------------------------------------------------------------------------------


def logged(bandit, evaluated=0):
    """The lines of a run, through JSON."""
    edges, operations = [f"a:0->{r}" for r in range(ROWS)], [f"op_{a}" for a in range(ARMS)]
    start = log.Start.of("s", operations, edges, bandit.settings, bandit.seed, **bandit.known())
    lines = [start]
    while not bandit.finished:
        for trained in turns(bandit, evaluated):
            choice = bandit.sample(trained=trained)
            line = log.Sample(
                sample=bandit.samples,
                phase=bandit.phase,
                choice=choice.tolist(),
                reward=accuracy(choice).item(),
            )
            if not trained:
                line.trained = False
            bandit.credit(choice, line.reward, trained=trained)
            lines.append(line)
        while bandit.due:
            lines += log.prune(bandit, edges, operations)
    lines.append(log.End(sample=bandit.samples, choice=bandit.final().tolist()))
    return [json.loads(json.dumps(line.to_line(), allow_nan=False)) for line in lines]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_log_replays_with_what_is_known_of_the_rows(policy):
    bandit = made(policy, "narrow", mixes=0.5, evaluations_per_epoch=2)
    lines = logged(bandit, 2)
    start = lines[0]
    assert list(start)[-6:] == [
        "mixes", "groups", "costs", "base_cost", "budget_low", "budget_high"
    ]  # fmt: skip
    assert (start["costs"], start["budget_high"]) == (COSTS.tolist(), USUAL + 21)
    again = replay(lines)
    assert torch.equal(again.final(), bandit.final())
    assert again.known() == bandit.known()
    # Without the budget the log is another run's, or at least not one that ends there.
    outside = next(i for i, line in enumerate(lines) if line["event"] == "sample")
    larger = {**lines[outside], "choice": COSTS.argmax(1).tolist()}
    with pytest.raises(ValueError, match=r"credit: choice: expected a path of 1.. to 1.., got one"):
        replay([start, larger])


def test_what_is_not_used_is_not_in_the_log():
    plain = AntiBandit(ROWS, ARMS, policy="ridge")
    assert plain.known() == {}
    start = log.Start.of("s", ["x"], ["a"], plain.settings, 0, **plain.known()).to_line()
    assert list(start)[-2:] == ["scale", "seed"]
    assert log.Start.model_validate(start).known == {
        "groups": None, "costs": None, "base_cost": 0
    }  # fmt: skip
    open_ended = made("random", "large")
    start = log.Start.of("s", ["x"], ["a"], plain.settings, 0, **open_ended.known())
    assert "budget_high" not in start.to_line()
    assert start.known["budget"] == (MOST - 10, math.inf)


@pytest.mark.parametrize(
    ("known", "message"),
    [
        ({"budget": (1, 2)}, "AntiBandit: budget: expected costs beside it, got none"),
        ({"costs": [[1, 2]]}, r"AntiBandit: costs: expected shape \[2, 2\], got \[1, 2\]"),
        ({"groups": [1]}, r"AntiBandit: groups: expected 2 whole numbers >= 0.*, got \[1\]"),
        ({"groups": [1, -1]}, "AntiBandit: groups: expected 2 whole numbers >= 0"),
        (
            {"costs": [[1, 2]] * 2, "base_cost": 3, "budget": (0, 4)},
            "AntiBandit: budget: expected one that a path can meet; they have 5 to 7, and none",
        ),
    ],
)
def test_what_cannot_be_is_refused(known, message):
    with pytest.raises(ValueError, match=message):
        AntiBandit(2, 2, **known)


# --- mixes --------------------------------------------------------------------------------------


def largest_shares(paths, arms):
    counts = torch.nn.functional.one_hot(torch.stack(paths), arms).sum(1)
    return (counts.amax(1) / counts.sum(1)).double().mean().item()


@pytest.mark.parametrize("policy", POLICIES)
def test_mixes_in_the_initial_pass_and_in_evaluated_paths(policy):
    rows, arms = 60, 6
    bandit = AntiBandit(rows, arms, policy=policy, mixes=0.3, evaluations_per_epoch=4, seed=1)
    first, trained, evaluated = [], [], []
    for _ in range(arms):
        law = bandit.probabilities()
        first.append(bandit.sample())
        if bandit._policy.mixed_initial_pass:
            # One law for all rows, and a new one for each path.
            assert torch.equal(law, law[:1].expand_as(law))
        bandit.credit(first[-1], 0.5)
    order = torch.stack(first, 1).sort(1).values
    every = torch.equal(order, torch.arange(arms).expand(rows, arms))
    assert every == (not POLICIES[policy].mixed_initial_pass)
    assert (largest_shares(first, arms) > 0.4) == POLICIES[policy].mixed_initial_pass
    while bandit.arms_left > arms - 2:
        for kind, paths in ((True, trained), *[(False, evaluated)] * 4):
            paths.append(bandit.sample(trained=kind))
            bandit.credit(paths[-1], accuracy(paths[-1]).item(), trained=kind)
        while bandit.due:
            bandit.prune()
    assert largest_shares(evaluated, arms) > 0.4
    assert len({tuple(path.tolist()) for path in evaluated}) == len(evaluated)
    if policy == "random":
        assert largest_shares(trained, arms) < 0.3


def test_the_law_of_a_mix_is_that_of_its_draw():
    rows, arms = 4000, 4
    bandit = AntiBandit(rows, arms, policy="random", mixes=0.7, seed=3)
    law = bandit.probabilities()[0]
    observed = torch.bincount(bandit.sample(), minlength=arms).double()
    assert ((observed - rows * law) ** 2 / (rows * law)).sum() < 16.27  # 0.1 %, three degrees


def test_the_row_that_loses_least_is_the_one_that_spares_its_arm():
    """By hand: four rows of three arms; the budget needs one of two arms that are the worst."""
    costs = [[0, 5, 10], [0, 5, 10], [0, 5, 0], [0, 9, 0]]
    bandit = Bandits(4, 3, BanditSettings("thompson"), costs=costs, budget=(20, 20))
    worth = [[1.0, 3.0, -1.0], [0.5, 3.0, -1.0], [0.9, -5.0, -9.0], [0.9, -5.0, -9.0]]
    bandit.mean = torch.tensor(worth, dtype=torch.float64)
    # The best path of size 20 has the worst arm of the first two rows. Without both nothing has
    # size 20; with that of either, 10 + 5 + 5 has. The second row loses 1.5 by it, the first 2.
    assert bandit.final().tolist() == [2, 2, 0, 0]
    assert bandit.prune().tolist() == [2, 0, 2, 2]
    assert bandit.final().tolist() == [1, 2, 1, 0]
