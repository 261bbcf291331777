"""Paths within a budget of sizes against all paths; mixes of operations."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fastbandit.bandit import SizeBudget, random_mix
from fastbandit.bandit.budget import ATTEMPTS
from fastbandit.bandit.mixes import GAMMA_UNIFORMS, mix_shares

FLOAT = torch.float64


def all_paths(alive):
    arms = [row.nonzero().squeeze(1).tolist() for row in alive]
    return torch.tensor(list(itertools.product(*arms)))


def problem(seed, rows=5, arms=4, most=50):
    """Costs, arms alive (one or more in each row) and worths."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randint(most, (rows, arms), generator=generator)
    alive = torch.rand(rows, arms, generator=generator) < 0.7
    alive[torch.arange(rows), torch.randint(arms, (rows,), generator=generator)] = True
    worth = torch.randn(rows, arms, generator=generator, dtype=FLOAT)
    return costs, alive, worth


def uniform(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((*shape, ATTEMPTS), generator=generator, dtype=FLOAT)


# --- the best path and whether there is one -----------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_best_and_possible_are_those_of_all_paths(seed):
    costs, alive, worth = problem(seed)
    base = 7 * seed
    paths = all_paths(alive)
    row = torch.arange(len(costs))
    size, sums = base + costs[row, paths].sum(1), worth[row, paths].sum(1)
    least, most = size.min().item(), size.max().item()
    ends = [(least, least), (most, math.inf), (0, most)]
    ends += [(low, low + width) for low in range(least, most, 9) for width in (0, 1, 12)]
    known = 0
    for low, high in ends:
        budget = object.__new__(SizeBudget)  # also one that no path meets
        budget.costs, budget.base, budget.low, budget.high = costs, base, float(low), float(high)
        inside = (size >= low) & (size <= high)
        assert budget.possible(alive) == bool(inside.any())
        if not bool(inside.any()):
            with pytest.raises(ValueError, match="budget: no path of the arms left has"):
                budget.best(worth, alive)
            continue
        known += 1
        found = budget.best(worth, alive)
        assert budget.holds(found)
        assert worth[row, found].sum().item() == pytest.approx(sums[inside].max().item())
        any_ = budget._any(alive)
        assert bool(budget.holds(any_))
        assert bool(alive[row, any_].all())
    assert known > 5


def test_rounded_sizes_still_give_a_path_within_and_nearly_the_best(monkeypatch):
    costs, alive, worth = problem(3, most=100_003)
    row = torch.arange(len(costs))
    paths = all_paths(alive)
    size, sums = costs[row, paths].sum(1), worth[row, paths].sum(1)
    low, high = (int(size.double().quantile(q)) for q in (0.3, 0.5))
    inside = (size >= low) & (size <= high)
    exact = SizeBudget(costs, 0, (low, high)).best(worth, alive)
    assert worth[row, exact].sum().item() == pytest.approx(sums[inside].max().item())
    monkeypatch.setattr("fastbandit.bandit.budget._MOST_SIZES", 2**10)
    found = SizeBudget(costs, 0, (low, high)).best(worth, alive)
    order = sums[inside].sort(descending=True).values
    assert low <= costs[row, found].sum().item() <= high
    assert worth[row, found].sum().item() >= order[3].item()
    # A budget of one size: the rounding leaves nothing, and the path comes from the set of sums.
    one = int(size[17])
    assert costs[row, SizeBudget(costs, 0, (one, one)).best(worth, alive)].sum().item() == one


def test_sums_without_end_are_rounded(monkeypatch):
    """A stranger's log may hold any sizes; what is found is within, and little is missed."""
    monkeypatch.setattr("fastbandit.bandit.budget._MOST_SUMS", 2**10)
    costs, alive, _ = problem(5, most=10**12 + 3)
    paths = all_paths(alive)
    size = costs[torch.arange(len(costs)), paths].sum(1).sort().values
    found = 0
    for low, high in zip(size[:-9:5].tolist(), size[9::5].tolist(), strict=False):
        budget = object.__new__(SizeBudget)
        budget.costs, budget.base, budget.low, budget.high = costs, 0, float(low), float(high)
        path = budget._any(alive)
        assert path is None or bool(budget.holds(path))
        found += path is not None
    assert found > 0.7 * len(size[:-9:5])
    budget.low = budget.high = float(size[20]) + 0.5
    assert budget._any(alive) is None


def test_many_bandits_have_each_its_own_best_path():
    costs, _, _ = problem(0)
    budget = SizeBudget(costs, 3, (40, 60))
    problems = [problem(seed) for seed in range(20)]
    kept = [(w, a) for _, a, w in problems if budget.possible(a)]
    assert len(kept) > 8
    worth, alive = (torch.stack(part) for part in zip(*kept, strict=True))
    found = budget.best(worth.unsqueeze(0), alive.unsqueeze(0)).squeeze(0)
    for i, path in enumerate(found):
        assert torch.equal(path, budget.best(worth[i], alive[i]))


# --- draws --------------------------------------------------------------------------------------


def test_draws_are_within_and_follow_the_law_given_the_budget():
    """The tilted law given a size is the law itself."""
    costs, alive, _ = problem(1, rows=4, arms=3, most=8)
    alive[:] = True
    generator = torch.Generator().manual_seed(5)
    law = torch.rand(4, 3, generator=generator, dtype=FLOAT).softmax(1)
    paths = all_paths(alive)
    row = torch.arange(4)
    size, weight = costs[row, paths].sum(1), law[row, paths].prod(1)
    one = int((size * weight).sum()) + 3  # off the mean size
    budget = SizeBudget(costs, 0, (one, one + 1))
    inside = (size >= one) & (size <= one + 1)
    n = 5_000
    drawn = budget.draw(law.expand(n, 4, 3), alive.expand(n, 4, 3), uniform(n, 4))
    assert bool(budget.holds(drawn).all())
    tilted = budget.law(law, alive)
    expected = tilted[row, paths].prod(1) * inside
    expected = n * expected / expected.sum()
    code = (3 ** torch.arange(4)).flip(0)
    observed = torch.bincount((drawn * code).sum(1), minlength=81).double()
    seen = expected > 5
    assert 5 <= int(seen.sum()) <= 40
    statistic = ((observed - expected) ** 2 / expected.clamp(min=1e-9))[seen].sum().item()
    assert statistic < int(seen.sum()) + 4 * math.sqrt(2 * int(seen.sum()))
    # Of one size, the paths have the law's own proportions; a thousandth is spread over all arms.
    same = (size == one) & seen
    ratio = tilted[row, paths].prod(1)[same] / weight[same]
    assert ratio.max() / ratio.min() == pytest.approx(1.0, rel=0.01)


def test_the_tilted_law_has_its_mean_in_the_budget():
    costs, alive, _ = problem(2, rows=30, arms=5, most=1000)
    law = alive.double() / alive.sum(1, keepdim=True)
    usual = (law * costs).sum().item()
    for low, high in ((0.5, 0.6), (0.99, 1.01), (1.2, math.inf), (0.0, 0.7)):
        budget = SizeBudget(costs, 100, (low * usual, high * usual))
        tilted = budget.law(law, alive)
        assert tilted.sum(1).tolist() == pytest.approx([1.0] * 30)
        assert bool((tilted[~alive] == 0).all())
        mean = 100 + (tilted * costs).sum().item()
        assert low * usual <= mean <= high * usual
    # A law whose mean is within is left alone, but for a thousandth.
    budget = SizeBudget(costs, 0, (0.9 * usual, 1.1 * usual))
    assert torch.allclose(budget.law(law, alive), law, atol=1e-3)


def test_the_repair_changes_the_fewest_rows_and_of_those_the_likeliest():
    for seed in range(8):
        costs, alive, worth = problem(seed, rows=5, arms=4)
        law = torch.where(alive, worth, -math.inf).softmax(1)
        paths = all_paths(alive)
        row = torch.arange(5)
        size = costs[row, paths].sum(1)
        target = int(size.sort().values[len(size) // 3])
        budget = SizeBudget(costs, 0, (target, target))
        start = paths[size.argmax()]
        inside = paths[size == target]
        changes = (inside != start).sum(1)
        few = inside[changes == changes.min()]
        # As the law is mixed with a thousandth of equal shares, so is this.
        mixed = 0.999 * law + 0.001 * alive / alive.sum(1, keepdim=True)
        likely = mixed[row, few].log().sum(1)
        found = budget.repair(start, law, alive)
        assert int((found != start).sum()) == int(changes.min())
        assert mixed[row, found].log().sum().item() == pytest.approx(likely.max().item())


def test_a_law_without_a_choice_is_moved_into_the_budget():
    """As the last path of a block of balanced draws: one arm in each row has all of the law."""
    costs = torch.tensor([[0, 10, 30]] * 6)
    law = torch.zeros(6, 3, dtype=FLOAT)
    law[:, 2] = 1.0
    alive = torch.ones(6, 3, dtype=torch.bool)
    budget = SizeBudget(costs, 0, (0, 150))
    many = budget.draw(law.expand(200, 6, 3), alive.expand(200, 6, 3), uniform(200, 6))
    assert bool(budget.holds(many).all())
    assert len({tuple(path) for path in many.tolist()}) > 5
    # 180 is by one row too large, and mostly one or two change.
    assert ((many != 2).sum(1) <= 2).double().mean() > 0.6


@pytest.mark.parametrize(
    ("costs", "base", "budget", "message"),
    [
        ([[1, 2]], 0, (4, 9), "budget: expected one that a path can meet; they have 1 to 2, and"),
        ([[0, 4]] * 3, 1, (6, 8), "they have 1 to 13, and none has 6 to 8"),
        ([[0, 4]] * 3, 1, (14, math.inf), "none has 14 to any"),
        ([[0, 4]], 0, (3, 2), "budget: expected the smallest and the largest size"),
        ([[0, 4]], 0, (math.nan, 2), "budget: expected the smallest and the largest size"),
        ([[0, 4]], 0.5, (3, 4), "base_cost: expected a whole number >= 0, got 0.5"),
        ([[0, -4]], 0, (0, 4), "costs: expected whole numbers >= 0"),
        ([[0, 0.5]], 0, (0, 4), "costs: expected whole numbers >= 0"),
        ([0, 4], 0, (0, 4), r"costs: expected whole numbers \[rows, arms\]"),
    ],
)
def test_what_cannot_be_met_is_refused(costs, base, budget, message):
    with pytest.raises(ValueError, match=message):
        SizeBudget(costs, base, budget)


# --- mixes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("concentration", [0.1, 0.5, 3.0])
def test_mixes_have_the_moments_of_a_dirichlet_law(concentration):
    n, arms = 6_000, 4
    generator = torch.Generator().manual_seed(1)
    numbers = torch.rand(n, arms, GAMMA_UNIFORMS, generator=generator, dtype=FLOAT)
    every = torch.ones(n, 1, arms, dtype=torch.bool)
    shares = mix_shares(concentration, numbers, every).squeeze(1)
    assert shares.sum(1).tolist() == pytest.approx([1.0] * n)
    # Mean 1 / K, variance (1 / K) (1 - 1 / K) / (K c + 1).
    variance = (1 / arms) * (1 - 1 / arms) / (arms * concentration + 1)
    assert shares.mean(0).tolist() == pytest.approx([1 / arms] * 4, abs=5 * (variance / n) ** 0.5)
    assert shares.var(0).tolist() == pytest.approx([variance] * 4, rel=0.05)
    # The third moment tells a gamma law from others of its mean and variance.
    a, total = concentration, arms * concentration
    third = a * (a + 1) * (a + 2) / (total * (total + 1) * (total + 2))
    assert shares.pow(3).mean().item() == pytest.approx(third, rel=0.05)
    # Rows share a mix; what is not alive in a row leaves the proportions of the rest.
    alive = torch.tensor([[True, False, True, True], [True, True, True, True]])
    law = mix_shares(concentration, numbers, alive)
    assert bool((law[:, 0, 1] == 0).all())
    left = shares / (1 - shares[:, 1:2])
    kept = shares[:, 1] < 0.9
    assert torch.allclose(law[kept, 0][:, [0, 2, 3]], left[kept][:, [0, 2, 3]])
    assert torch.equal(law[:, 1], shares)


def test_a_random_mix_is_drawn_from_its_shares():
    generator = torch.Generator().manual_seed(2)
    paths = torch.stack([random_mix(60, 9, 0.5, generator) for _ in range(300)])
    counts = torch.nn.functional.one_hot(paths, 9).sum(1).double()
    # Of a Dirichlet-multinomial law: n p q (n + K c) / (1 + K c), against n p q of uniform draws.
    expected = 60 * (1 / 9) * (8 / 9) * (60 + 4.5) / (1 + 4.5)
    assert counts.mean(0).tolist() == pytest.approx([60 / 9] * 9, abs=2.5)
    assert counts.var(0).mean().item() == pytest.approx(expected, rel=0.2)
    generator.manual_seed(2)
    assert torch.equal(paths[0], random_mix(60, 9, 0.5, generator))
    with pytest.raises(ValueError, match="random_mix: concentration: expected a finite number"):
        random_mix(3, 2, 0.0)
