"""Hierarchical ridge against direct solves in NumPy and a direct maximisation of the likelihood."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from fastbandit.bandit import HierarchicalRidge, random_mix, regression
from fastbandit.bandit.hierarchical import _FINEST, _LEAST, _MOST

FLOAT = torch.float64
ROWS, ARMS = 12, 4
GROUPS = [0, 0, 0, 0, 2, 2, 2, 2, 5, 5, 5, 5]  # numbered with gaps


def problem(n, seed=0, sizes=(0.02, 0.01, 0.01), noise=0.02, rows=ROWS, arms=ARMS, groups=GROUPS):
    """Paths with random mixes, their rewards without a trend, and the effects [rows, arms]."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.stack([random_mix(rows, arms, 0.5, generator) for _ in range(n)])

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=FLOAT)

    stage = sizes[1] * normal(max(groups) + 1, arms)
    effect = sizes[0] * normal(arms) + stage[groups] + sizes[2] * normal(rows, arms)
    reward = 0.5 + effect[torch.arange(rows), choice].sum(1) + noise * normal(n)
    return choice, reward, effect


def designs(choice, rows=ROWS, arms=ARMS, groups=GROUPS):
    """Counts of operations, of operations in stages, and of arms on edges; column by column."""
    choice, stages = np.asarray(choice), sorted(set(groups))
    one, two, three = [], [], []
    for path in choice:
        one.append([(path == a).sum() for a in range(arms)])
        two.append(
            [
                sum(path[r] == a for r in range(rows) if groups[r] == s)
                for s in stages
                for a in range(arms)
            ]
        )
        three.append([float(path[r] == a) for r in range(rows) for a in range(arms)])
    return [np.array(part, dtype=float) for part in (one, two, three)]


def log_size(choice, costs, base):
    total = base + costs.numpy()[np.arange(len(costs)), np.asarray(choice)].sum(1)
    return np.log(total)


def columns_of(choice, trained, costs, base):
    n = len(choice)
    columns = np.ones((n, 1))
    if trained is not None:
        columns = regression.trend_columns(trained).numpy()
    if costs is not None:
        size = log_size(choice, costs, base)
        columns = np.column_stack([columns, (size - size.mean()) / size.std()])
    return columns


def kernels(choice):
    return [z @ z.T for z in designs(choice)]


def restricted_loss(known, reward, columns, ratios):
    """-2 log of the restricted likelihood from the determinants of its definition."""
    n, q = columns.shape
    system = np.eye(n) + sum(h * k for h, k in zip(ratios, known, strict=True))
    solved = np.linalg.solve(system, np.column_stack([columns, reward]))
    gram = columns.T @ solved[:, :q]
    left = reward - columns @ np.linalg.solve(gram, columns.T @ solved[:, q])
    noise = left @ np.linalg.solve(system, left) / (n - q)
    return (
        (n - q) * np.log(noise) + np.linalg.slogdet(system)[1] + np.linalg.slogdet(gram)[1]
    ) - np.linalg.slogdet(columns.T @ columns)[1]


COSTS = torch.outer(1 + torch.tensor(GROUPS), 5 * torch.arange(1, ARMS + 1) ** 2).double()


@pytest.mark.parametrize("n", [15, 40])
@pytest.mark.parametrize("costs", [None, COSTS])
@pytest.mark.parametrize("evaluated", [None, 3])
def test_predictions_are_those_of_henderson_s_equations(n, costs, evaluated):
    """Mean and deviation of new paths and of effects from the mixed-model equations."""
    choice, reward, _ = problem(n, seed=n)
    trained = None
    if evaluated is not None:
        trained = torch.ones(n, dtype=torch.bool)
        trained[1::evaluated] = False
        reward = reward + 0.05 * trained.double().cumsum(0).log1p() - 0.1 * (~trained).double()
    model = HierarchicalRidge(GROUPS, ARMS, costs, base_cost=30.0)
    assert model.fit(choice, reward, trained) is model
    ratios, noise = model.found.ratios.numpy(), float(model.found.noise)
    columns = columns_of(choice, trained, costs, 30.0)
    z = designs(choice)
    design = np.column_stack(z)
    penalty = np.concatenate([np.full(p.shape[1], 1 / h) for h, p in zip(ratios, z, strict=True)])
    q = columns.shape[1]
    system = np.block(
        [
            [columns.T @ columns, columns.T @ design],
            [design.T @ columns, design.T @ design + np.diag(penalty)],
        ]
    )
    right = np.concatenate([columns.T @ reward.numpy(), design.T @ reward.numpy()])
    solution = np.linalg.solve(system, right)
    covariance = noise * np.linalg.inv(system)
    left = reward.numpy() - columns @ solution[:q]
    kernel = sum(h * part @ part.T for h, part in zip(ratios, z, strict=True))
    assert noise == pytest.approx(left @ np.linalg.solve(np.eye(n) + kernel, left) / (n - q))

    new, _, _ = problem(9, seed=100)
    now = columns[-1 if trained is None else int(trained.nonzero()[-1])].copy()
    at = np.tile(now, (9, 1))
    scale = 0.0
    if costs is not None:
        size = log_size(choice, costs, 30.0)
        at[:, -1] = (log_size(new, costs, 30.0) - size.mean()) / size.std()
        scale = 1 / (np.exp(size.mean()) * size.std())
    function = np.column_stack([at, *designs(new)])
    mean, deviation = model.predict(new)
    assert mean.numpy() == pytest.approx(function @ solution, abs=1e-8)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", function, covariance, function))
    assert deviation.numpy() == pytest.approx(expected, rel=1e-5, abs=1e-9)

    alive = torch.ones(ROWS, ARMS, dtype=torch.bool)
    alive[0, 1] = alive[3, 2] = False
    mean, deviation = model.effects(alive)
    stages = sorted(set(GROUPS))
    for row in range(ROWS):
        single = np.zeros((ARMS, design.shape[1] + q))
        for arm in range(ARMS):
            single[arm, q + arm] = 1
            single[arm, q + ARMS + stages.index(GROUPS[row]) * ARMS + arm] = 1
            single[arm, q + z[0].shape[1] + z[1].shape[1] + row * ARMS + arm] = 1
            if costs is not None:
                single[arm, q - 1] = scale * float(costs[row, arm])
        kept = np.flatnonzero(alive[row].numpy())
        contrast = single - single[kept].mean(0)
        assert mean[row].numpy() == pytest.approx(contrast @ solution, abs=1e-8)
        expected = np.sqrt(np.einsum("ij,jk,ik->i", contrast, covariance, contrast))
        assert deviation[row, kept].numpy() == pytest.approx(expected[kept], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_variances_maximise_the_restricted_likelihood(seed):
    """By descent in NumPy from two starts, on the likelihood as it is defined."""
    choice, reward, _ = problem(50, seed=seed, sizes=(0.03, 0.015, 0.01), noise=0.02)
    model = HierarchicalRidge(GROUPS, ARMS, COSTS).fit(choice, reward)
    columns, known = columns_of(choice, None, COSTS, 0.0), kernels(choice)
    # The units of the grid, and its ends: what is there may be as small as one likes.
    rest = np.linalg.qr(columns, mode="complete")[0][:, columns.shape[1] :]
    units = np.array([np.trace(rest.T @ k @ rest) / rest.shape[1] for k in known])

    def loss(exponents):
        return restricted_loss(known, reward.numpy(), columns, 10.0**exponents / units)

    found = np.log10(model.found.ratios.numpy() * units)
    assert found / _FINEST == pytest.approx(np.round(found / _FINEST), abs=1e-6)
    best = min((_descend(loss, start) for start in ([-1.0] * 3, [0.0, -2.0, -2.0])), key=loss)
    # Half a step of the grid off in each direction.
    assert loss(found) - loss(best) < 0.2
    # Where the likelihood is not flat the exponents are as near as the grid allows.
    for i in range(3):
        off = best.copy()
        off[i] = np.clip(off[i] + 3 * _FINEST * np.sign(found[i] - off[i] + 1e-9), _LEAST, _MOST)
        if loss(off) - loss(best) > 0.5:
            assert abs(found[i] - best[i]) < 3 * _FINEST
    # The loss that the fit holds is that of the definition, up to one constant.
    ratios = model.found.ratios.numpy()
    ours = model.found.loss.item() - restricted_loss(known, reward.numpy(), columns, ratios)
    other = 10.0 ** (found - 0.5) / units
    again = _loss_at(choice, reward, other)
    theirs = restricted_loss(known, reward.numpy(), columns, other)
    assert again - theirs == pytest.approx(ours, abs=1e-7)


def _descend(loss, point):
    """Pattern search to a step of a hundredth."""
    point, step = np.array(point), 1.0
    moves = np.array(list(np.ndindex(3, 3, 3))) - 1.0
    while step > 0.01:
        better = min(np.clip(point + step * moves, _LEAST, _MOST), key=loss)
        if loss(better) < loss(point) - 1e-9:
            point = better
        else:
            step /= 2
    return point


def _loss_at(choice, reward, ratios):
    """The fit's loss at given ratios."""
    from fastbandit.bandit import hierarchical

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            hierarchical,
            "_search",
            lambda likelihood, _: (torch.tensor(ratios) * likelihood.units).log10(),
        )
        other = HierarchicalRidge(GROUPS, ARMS, COSTS).fit(choice, reward)
    assert other.found.ratios.tolist() == pytest.approx(ratios.tolist())
    return other.found.loss.item()


def test_it_learns_operations_where_single_edges_need_more_samples():
    """Leave-one-out R2 of 96 paths with random mixes, 60 edges, nine operations; ridge by edges."""
    rows, arms, n = 60, 9, 96
    groups = [row // 20 for row in range(rows)]
    ours, theirs = [], []
    for seed in range(6):
        choice, reward, _ = problem(n, seed, (0.0015, 0.0, 0.0005), 0.02, rows, arms, groups)
        model = HierarchicalRidge(groups, arms).fit(choice, reward)
        ours.append(_left_out_r2(reward, model.found.solved[:, 1:], model.found.columns))
        trained = torch.ones(n, dtype=torch.bool)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(regression, "_TREND_DEGREE", 0)
            fit = regression.ridge(choice, reward, trained, arms)
        system = torch.eye(n) + fit.ratio * (choice[:, None] == choice[None]).sum(-1).double()
        ones = torch.ones(n, 1, dtype=FLOAT)
        theirs.append(_left_out_r2(reward, torch.linalg.inv(system), ones))
    assert sum(ours) / 6 > 0.35
    assert sum(one - other for one, other in zip(ours, theirs, strict=True)) / 6 > 0.08


def test_one_stage_has_no_effects_of_its_own():
    choice, reward, _ = problem(60, 1)
    model = HierarchicalRidge([3] * ROWS, ARMS).fit(choice, reward)
    assert model.variances.stage < 1e-3 * model.variances.operation


def _left_out_r2(reward, inverse, columns):
    """From the residuals y_i - prediction without i = (P y)_i / P_ii, given the variances."""
    solved = inverse @ columns
    projected = inverse - solved @ torch.linalg.solve(columns.T @ solved, solved.T)
    left = projected @ reward / projected.diagonal()
    return 1 - (left.square().mean() / reward.var(correction=0)).item()


def test_effects_and_variances_are_found_when_there_are_enough_samples():
    choice, reward, effect = problem(900, 3, (0.03, 0.02, 0.02), 0.02)
    model = HierarchicalRidge(GROUPS, ARMS).fit(choice, reward)
    mean, deviation = model.effects()
    true = effect - effect.mean(1, keepdim=True)
    assert torch.corrcoef(torch.stack([mean.flatten(), true.flatten()]))[0, 1] > 0.98
    # Errors are as large as the model says.
    standard = ((mean - true) / deviation).square().mean().sqrt().item()
    assert 0.7 < standard < 1.4
    assert model.variances.noise == pytest.approx(0.02**2, rel=0.15)
    assert model.variances.edge == pytest.approx(0.02**2, rel=0.6)


def test_size_explains_what_it_decides():
    generator = torch.Generator().manual_seed(4)
    choice, _, _ = problem(50, 4)
    size = torch.as_tensor(log_size(choice, COSTS, 0.0))
    reward = 0.1 * size + 0.001 * torch.randn(50, generator=generator, dtype=FLOAT)
    with_size = HierarchicalRidge(GROUPS, ARMS, COSTS).fit(choice[:40], reward[:40])
    mean, _ = with_size.predict(choice[40:])
    assert (mean - reward[40:]).abs().max() < 0.005
    slope = with_size.found.coefficients[-1] / with_size.found.size[1]
    assert slope.item() == pytest.approx(0.1, rel=0.05)
    # The larger arm of an edge is worth more.
    assert with_size.effects()[0].argmax(1).tolist() == [ARMS - 1] * ROWS
    # Sizes that are all the same are no column.
    same = HierarchicalRidge(GROUPS, ARMS, torch.ones(ROWS, ARMS)).fit(choice, reward)
    assert same.found.columns.shape[1] == 1


def test_a_trend_is_not_credited_to_arms():
    choice, reward, _ = problem(64, 6, (0.02, 0.0, 0.0), 0.005)
    rising = reward + 0.1 * torch.arange(1, 65, dtype=FLOAT).log()
    trained = torch.ones(64, dtype=torch.bool)
    flat = HierarchicalRidge(GROUPS, ARMS).fit(choice, reward, trained)
    steep = HierarchicalRidge(GROUPS, ARMS).fit(choice, rising, trained)
    assert steep.effects()[0].numpy() == pytest.approx(flat.effects()[0].numpy(), abs=1e-6)
    # Predictions are at the level of the end.
    gain = (steep.predict(choice)[0] - flat.predict(choice)[0]).numpy()
    assert gain == pytest.approx(0.1 * math.log(64), abs=1e-6)


def test_too_few_samples_and_equal_rewards():
    model = HierarchicalRidge(GROUPS, ARMS)
    for n in (0, 1):
        choice, reward, _ = problem(max(n, 1))
        model.fit(choice[:n], reward[:n])
        assert model.variances is None
        mean, deviation = model.predict(choice)
        assert mean.tolist() == pytest.approx(reward[:n].tolist() or [0.0])
        assert deviation.tolist() == [math.inf]
        assert model.effects()[0].abs().max() == 0
    choice, _, _ = problem(12)
    model.fit(choice, torch.full((12,), 0.25))
    mean, deviation = model.predict(choice)
    assert mean.tolist() == pytest.approx([0.25] * 12)
    assert bool(deviation.isfinite().all())
    for n in range(2, 12):
        choice, reward, _ = problem(n, n)
        mean, deviation = model.fit(choice, reward).predict(choice)
        assert bool((mean.isfinite() & deviation.isfinite()).all())
        spread = reward.max() - reward.min()
        assert (mean - reward).abs().max() < spread


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "HierarchicalRidge: groups: expected a whole number >= 0 for each row, got []"),
        (([0, -1], 3), "HierarchicalRidge: groups: expected a whole number >= 0"),
        (([0], 0), "HierarchicalRidge: arms: expected 1 or more, got 0"),
        (([0], 3, [[1.0, 2.0]]), "HierarchicalRidge: costs, base_cost: expected [1, 3] numbers"),
        (([0], 2, [[1.0, -2.0]]), "HierarchicalRidge: costs, base_cost: expected [1, 2] numbers"),
    ],
)
def test_what_it_cannot_be_made_of_is_refused(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        HierarchicalRidge(*arguments)


def test_samples_it_cannot_take_are_refused():
    model = HierarchicalRidge([0, 1], 3)
    good = torch.tensor([[0, 1], [2, 2]])
    for choice in (torch.tensor([[0, 3]]), torch.tensor([[0]]), torch.rand(2, 2)):
        with pytest.raises(
            ValueError, match=r"HierarchicalRidge\.fit: choices: expected arms 0\.\.2"
        ):
            model.fit(choice, [0.1, 0.2])
        with pytest.raises(ValueError, match=r"HierarchicalRidge\.predict: choices: expected arms"):
            model.predict(choice)
    for reward in ([0.1], [0.1, math.nan]):
        with pytest.raises(ValueError, match=r"fit: rewards: expected \[2\] finite numbers"):
            model.fit(good, reward)
    with pytest.raises(ValueError, match=r"fit: trained: expected bool \[2\]"):
        model.fit(good, [0.1, 0.2], torch.ones(2))
