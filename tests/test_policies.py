"""The policies: arithmetic by hand, laws of sampling, the regressions against direct solves."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from fastbandit.bandit import (
    POLICIES,
    AntiBandit,
    BanditSettings,
    HierarchicalRidge,
    random_mix,
    regression,
)
from fastbandit.study import SimulatedConfig

FLOAT = torch.float64
# Points of the chi-square distribution that are exceeded in 0.1 % of cases.
CHI_SQUARE_0_1_PERCENT = {1: 10.828, 2: 13.816, 3: 16.266, 4: 18.467}
NEW = [
    "detrended",
    "hierarchical",
    "ridge",
    "ridge-thompson",
    "successive-halving",
    "thompson",
    "ucb1",
]


def credit(bandit, choice, reward, **keywords):
    """Credits a path of our own choosing."""
    bandit.sample(**keywords)
    bandit.credit(choice, reward, **keywords)


def run(bandit, effect, noise=0.0, evaluated=0):
    """Runs a bandit to its end on additive effects; returns the arms abandoned, in order."""
    generator = torch.Generator().manual_seed(0)
    abandoned = []
    while not bandit.finished:
        initial = bandit.phase == "initial"
        for trained in [True] + [False] * (0 if initial else evaluated):
            choice = bandit.sample(trained=trained)
            gain = effect.gather(1, choice.unsqueeze(1)).sum().item()
            level = 0.4 + 0.1 * math.log(bandit.trained + trained) / 5
            error = noise * torch.randn((), generator=generator).item()
            bandit.credit(choice, level + gain + error, trained=trained)
        while bandit.due:
            abandoned.append(bandit.prune())
    return abandoned


def test_the_lists_of_policies_are_the_registry():
    page = (Path(__file__).parent.parent / "docs" / "study.md").read_text(encoding="utf-8")
    section = page.split("## The policies")[1].split("## ")[0]
    assert re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE) == list(POLICIES)
    (said,) = get_type_hints(BanditSettings, include_extras=True)["policy"].__metadata__
    for name, policy in POLICIES.items():
        assert policy.description
        assert f"{name} ({policy.description})" in said.documentation
    tried = [entry for entry in SimulatedConfig().policies if "," not in entry]
    assert sorted(tried) == sorted(POLICIES)


# --- plain averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", NEW)
def test_mean_is_the_plain_average_and_scaled(policy):
    bandit = AntiBandit(1, 2, policy=policy, scale=10.0, rate=0.9)
    for choice, reward in ((0, 0.5), (1, 0.25), (1, 0.75), (1, 0.2)):
        credit(bandit, [choice], reward)
    assert bandit.mean.tolist()[0] == pytest.approx([5.0, 4.0], abs=1e-12)
    assert bandit.count.tolist() == [[1, 3]]


def test_ucb1_by_hand():
    bandit = AntiBandit(1, 3, policy="ucb1", bonus=0.5)
    for choice, reward in ((0, 0.5), (1, 0.6), (2, 0.4)):
        credit(bandit, [choice], reward)
    # All tried once, so the largest average.
    assert bandit.probabilities().tolist() == [[0.0, 1.0, 0.0]]
    assert bandit.sample().tolist() == [1]
    bandit.credit([1], 0.6)
    # N = 4: 0.5 sqrt(2 ln 4 / 1) = 0.8326, and for n = 2, 0.5887:
    # 0.5 + 0.8326, 0.6 + 0.5887, 0.4 + 0.8326.
    assert bandit.sample().tolist() == [0]
    bandit.credit([0], 0.3)
    # Averages 0.4, 0.6, 0.4 with n = 2, 2, 1.
    assert bandit.sample().tolist() == [2]
    bandit.credit([2], 0.5)
    assert bandit.mean.tolist()[0] == pytest.approx([0.4, 0.6, 0.45])
    while not bandit.due:
        bandit.credit(bandit.sample(), 0.1)
    averages = bandit.mean[0]
    assert bandit.prune().item() == int(averages.argmin())


# --- Thompson sampling --------------------------------------------------------------------------


def test_thompson_law_of_two_arms_is_the_closed_form():
    bandit = AntiBandit(1, 2, policy="thompson", bonus=1.5)
    for choice, reward in ((0, 0.5), (1, 0.4), (1, 0.6), (1, 0.62)):
        credit(bandit, [choice], reward)
    variance = np.var([0.5, 0.4, 0.6, 0.62])
    deviation = 1.5 * math.sqrt(variance / 1 + variance / 3)
    z = (0.5 - 0.54) / deviation
    expected = 0.5 * math.erfc(-z / math.sqrt(2))
    assert bandit.probabilities().tolist()[0] == pytest.approx([expected, 1 - expected], abs=1e-6)


@pytest.mark.parametrize("policy", ["thompson", "ridge-thompson"])
def test_thompson_draws_follow_the_law(policy):
    rows = 5000
    bandit = AntiBandit(rows, 4, policy=policy, seed=3)
    samples = (0, 0.5), (1, 0.56), (2, 0.52), (3, 0.4), (1, 0.5), (2, 0.6), (0, 0.5)
    # The same samples on every row, so that all rows share one law; none of the last arm later.
    for choice, reward in samples:
        credit(bandit, [choice] * rows, reward)
    bandit.alive[:, 3] = False
    if policy == "ridge-thompson":
        # 5000 rows that always agree are one row to the model, so it is fitted to one.
        single = AntiBandit(1, 4)
        for choice, reward in samples:
            credit(single, [choice], reward)
        choice, reward, trained = single.history
        fit = regression.ridge(choice, reward, trained, 4)
        mean = regression.posterior_mean(fit, choice, 4)
        deviation = regression.posterior_variance(fit, choice, bandit.alive[:1]).sqrt()
        bandit._policy._beliefs = lambda _: (mean.expand(rows, 4), deviation.expand(rows, 4))
    law = bandit.probabilities()[0]
    assert law[3] == 0
    assert law.sum().item() == pytest.approx(1)
    observed = torch.bincount(bandit.sample(), minlength=4).double()
    assert observed[3] == 0
    expected = rows * law[:3]
    assert expected.min() > 50
    statistic = ((observed[:3] - expected) ** 2 / expected).sum().item()
    assert statistic < CHI_SQUARE_0_1_PERCENT[2]


def test_thompson_with_equal_accuracies_is_uniform():
    bandit = AntiBandit(3000, 3, policy="thompson")
    for arm in range(3):
        credit(bandit, [arm] * 3000, 0.5)
    assert bandit.probabilities()[0].tolist() == pytest.approx([1 / 3] * 3)
    observed = torch.bincount(bandit.sample(), minlength=3).double()
    assert ((observed - 1000) ** 2 / 1000).sum() < CHI_SQUARE_0_1_PERCENT[2]


# --- draws without replacement ------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["detrended", "hierarchical", "ridge", "successive-halving"])
def test_each_block_draws_every_arm_alive_once(policy):
    bandit = AntiBandit(7, 5, policy=policy, rounds=2, seed=1)
    while bandit.phase == "initial":
        bandit.credit(bandit.sample(), 0.5)
    blocks = bandit._budget(5) // 5
    for _ in range(blocks):
        block = []
        for position in range(5):
            law = bandit.probabilities()
            choice = bandit.sample()
            assert law.gather(1, choice.unsqueeze(1)).squeeze(1).tolist() == pytest.approx(
                [1 / (5 - position)] * 7
            )
            bandit.credit(choice, 0.5)
            block.append(choice)
        assert torch.equal(torch.stack(block, 1).sort(1).values, torch.arange(5).expand(7, 5))


def test_blocks_hold_for_paths_drawn_ahead_and_paths_only_evaluated():
    bandit = AntiBandit(6, 4, policy="ridge", rounds=1, seed=2)
    for _ in range(4):
        bandit.credit(bandit.sample(), 0.5)
    ahead = [bandit.sample(ahead=True) for _ in range(2)]
    assert torch.equal(bandit.drawn.sum(1), torch.full((6,), 6))
    assert torch.equal(bandit.count, torch.ones_like(bandit.count))
    for choice in ahead:
        bandit.credit(choice, 0.5)
    rest = [bandit.sample(trained=False, ahead=True) for _ in range(2)]
    for choice in rest:
        bandit.credit(choice, 0.5, trained=False)
    block = torch.stack([*ahead, *rest], 1)
    assert torch.equal(block.sort(1).values, torch.arange(4).expand(6, 4))


def test_first_draw_of_a_block_is_uniform():
    bandit = AntiBandit(5000, 5, policy="detrended", seed=6)
    for _ in range(5):
        bandit.credit(bandit.sample(), 0.5)
    observed = torch.bincount(bandit.sample(), minlength=5).double()
    assert ((observed - 1000) ** 2 / 1000).sum() < CHI_SQUARE_0_1_PERCENT[4]


# --- successive halving -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arms", "rounds", "stages"),
    [
        (9, 3, {9: 33, 5: 33, 3: 33, 2: 33}),
        (8, 3, {8: 35, 4: 35, 2: 35}),
        (4, 1, {4: 5, 2: 4}),
        (2, 2, {2: 4}),
    ],
)
def test_halving_spends_the_printed_budget_in_equal_stages(arms, rounds, stages):
    bandit = AntiBandit(2, arms, policy="successive-halving", rounds=rounds)
    assert {k: b for k in range(2, arms + 1) if (b := bandit._budget(k))} == stages
    assert bandit.total_samples == AntiBandit(2, arms, rounds=rounds).total_samples


def test_halving_abandons_the_smallest_averages_at_the_end_of_a_stage():
    bandit = AntiBandit(1, 5, policy="successive-halving", rounds=1)
    worth = [0.3, 0.1, 0.5, 0.2, 0.4]
    left = []
    while not bandit.finished:
        choice = bandit.sample()
        bandit.credit(choice, worth[choice.item()])
        dropped = []
        while bandit.due:
            dropped.append(bandit.prune().item())
        if dropped:
            left.append((bandit.trained, dropped))
    # 14 samples in three stages, 5 + 5 + 4, after the initial 5; 5 -> 3 -> 2 -> 1.
    assert left == [(10, [1, 3]), (15, [0]), (19, [4])]
    assert bandit.final().tolist() == [2]


# --- the training trend -------------------------------------------------------------------------


def test_detrended_by_hand():
    bandit = AntiBandit(1, 2, policy="detrended", scale=10.0)
    for choice, reward in ((0, 0.1), (1, 0.2), (0, 0.3), (1, 0.4)):
        credit(bandit, [choice], reward)
    # Four samples leave room for the constant alone: -0.15, -0.05, 0.05, 0.15 remain.
    assert bandit.score().tolist()[0] == pytest.approx([-0.5, 0.5], abs=1e-12)
    assert AntiBandit(1, 2, policy="detrended").score().tolist() == [[0.0, 0.0]]


def trend_by_least_squares(reward, trained):
    """With numpy and plain powers."""
    n = len(reward)
    t = np.maximum(np.cumsum(trained), 1)
    columns = [np.log(t) ** d for d in range(1 + min(3, n // 8))]
    if not trained.all():
        columns.append((~trained).astype(float))
    columns = np.stack(columns, 1)
    return columns, reward - columns @ np.linalg.lstsq(columns, reward, rcond=None)[0]


@pytest.mark.parametrize("n", [2, 7, 8, 17, 40])
@pytest.mark.parametrize("evaluated", [False, True])
def test_trend_is_the_least_squares_fit(n, evaluated):
    generator = torch.Generator().manual_seed(n)
    reward = torch.rand(n, generator=generator, dtype=FLOAT)
    trained = torch.ones(n, dtype=torch.bool)
    if evaluated:
        trained[1::3] = False
    columns, expected = trend_by_least_squares(reward.numpy(), trained.numpy())
    found = regression.trend_columns(trained)
    assert found.shape == (n, np.linalg.matrix_rank(columns))
    assert torch.allclose(found.T @ found, torch.eye(found.shape[1], dtype=FLOAT), atol=1e-12)
    left = regression.detrend(reward, trained)
    assert left.numpy() == pytest.approx(expected, abs=1e-9)
    # Independent problems side by side.
    pair = regression.detrend(torch.stack([reward, 2 * reward]), trained)
    assert torch.allclose(pair, torch.stack([left, 2 * left]), atol=1e-12)


def test_paths_only_evaluated_have_a_level_of_their_own():
    """The weights had just been trained on the others: that is not the arms' doing."""
    bandit = AntiBandit(1, 2, policy="detrended")
    for choice in (0, 1):
        credit(bandit, [choice], 0.5)
    for choice in (0, 1):
        credit(bandit, [choice], 0.6)
        credit(bandit, [0], 0.2, trained=False)
    # Arm 0 was evaluated twice at a level of its own; no arm is better than the other.
    assert bandit.score()[0].tolist() == pytest.approx([0.0, 0.0], abs=1e-12)


def test_arm_means_and_arms_never_chosen():
    choice = torch.tensor([[0, 2], [0, 1], [1, 2]])
    value = torch.tensor([1.0, 2.0, 6.0], dtype=FLOAT)
    assert regression.arm_means(choice, value, 3).tolist() == [[1.5, 6.0, 0.0], [0.0, 2.0, 3.5]]


# --- the ridge model ----------------------------------------------------------------------------


def problem(n, rows, arms, seed, evaluated=False, noise=0.02):
    generator = torch.Generator().manual_seed(seed)
    choice = torch.randint(arms, (n, rows), generator=generator)
    effect = 0.05 * torch.randn(rows, arms, generator=generator, dtype=FLOAT)
    trained = torch.ones(n, dtype=torch.bool)
    if evaluated:
        trained[2::3] = False
    level = 0.3 + 0.1 * trained.double().cumsum(0).clamp(min=1).log()
    gain = effect.expand(n, rows, arms).gather(2, choice.unsqueeze(2)).sum((1, 2))
    reward = level + gain + noise * torch.randn(n, generator=generator, dtype=FLOAT)
    return choice, reward, trained, effect


def design_of(choice, arms):
    n, rows = choice.shape
    design = np.zeros((n, rows * arms))
    for i in range(n):
        for r in range(rows):
            design[i, r * arms + choice[i, r]] = 1
    return design


@pytest.mark.parametrize(
    ("n", "rows", "arms", "evaluated"), [(40, 4, 3, False), (30, 12, 5, True), (9, 2, 2, False)]
)
def test_posterior_is_that_of_henderson_s_equations(n, rows, arms, evaluated):
    """Mean and covariance from the mixed-model equations, solved directly in float64."""
    choice, reward, trained, _ = problem(n, rows, arms, n, evaluated)
    fit = regression.ridge(choice, reward, trained, arms)
    design = design_of(choice.numpy(), arms)
    columns, _ = trend_by_least_squares(reward.numpy(), trained.numpy())
    q, p = columns.shape[1], rows * arms
    h, noise = fit.ratio.item(), fit.noise.item()
    system = np.block(
        [
            [columns.T @ columns, columns.T @ design],
            [design.T @ columns, design.T @ design + np.eye(p) / h],
        ]
    )
    right = np.concatenate([columns.T @ reward.numpy(), design.T @ reward.numpy()])
    mean = np.linalg.solve(system, right)[q:].reshape(rows, arms)
    found = regression.posterior_mean(fit, choice, arms)
    assert found.numpy() == pytest.approx(mean, abs=1e-8)
    assert found.sum(1).tolist() == pytest.approx([0.0] * rows, abs=1e-10)

    covariance = noise * np.linalg.inv(system)[q:, q:].reshape(rows, arms, rows, arms)
    alive = torch.ones(rows, arms, dtype=torch.bool)
    alive[0, 0] = False
    variance = regression.posterior_variance(fit, choice, alive)
    for r in range(rows):
        kept = np.flatnonzero(alive[r].numpy())
        contrast = np.eye(arms)
        contrast[:, kept] -= 1 / len(kept)
        expected = np.diag(contrast @ covariance[r, :, r] @ contrast.T)
        assert variance[r, kept].numpy() == pytest.approx(expected[kept], rel=1e-6, abs=1e-12)


def restricted_loss(choice, reward, trained, arms, h):
    """-2 log of the restricted likelihood at h with the noise that is best for it, up to a
    constant, from the determinants of its definition."""
    columns, _ = trend_by_least_squares(reward.numpy(), trained.numpy())
    design = design_of(choice.numpy(), arms)
    n, q = columns.shape
    v = np.eye(n) + h * design @ design.T
    inverse = np.linalg.inv(v)
    inner = columns.T @ inverse @ columns
    p = inverse - inverse @ columns @ np.linalg.inv(inner) @ columns.T @ inverse
    noise = reward.numpy() @ p @ reward.numpy() / (n - q)
    logs = np.linalg.slogdet(v)[1] + np.linalg.slogdet(inner)[1]
    return logs + (n - q) * math.log(noise), noise


def test_variances_maximise_the_restricted_likelihood():
    choice, reward, trained, _ = problem(60, 5, 3, 1)
    fit = regression.ridge(choice, reward, trained, 3)
    h = fit.ratio.item()
    best, noise = restricted_loss(choice, reward, trained, 3, h)
    assert fit.noise.item() == pytest.approx(noise, rel=1e-6)
    for factor in (0.01, 10**-0.1, 10**0.1, 100):
        assert restricted_loss(choice, reward, trained, 3, h * factor)[0] > best
    # The truth: effects of variance 0.05^2, noise of variance 0.02^2.
    assert fit.noise.sqrt().item() == pytest.approx(0.02, rel=0.3)
    assert (fit.ratio * fit.noise).sqrt().item() == pytest.approx(0.05, rel=0.5)


def test_ridge_finds_the_effects_when_there_are_enough_samples():
    choice, reward, trained, effect = problem(400, 6, 4, 5, noise=1e-4)
    fit = regression.ridge(choice, reward, trained, 4)
    found = regression.posterior_mean(fit, choice, 4)
    assert torch.allclose(found, effect - effect.mean(1, keepdim=True), atol=2e-3)


def test_batched_fits_are_the_single_ones():
    problems = [problem(30, 4, 3, seed) for seed in range(3)]
    choice, reward = (torch.stack([p[i] for p in problems]) for i in (0, 1))
    trained = problems[0][2]
    alive = torch.ones(3, 4, 3, dtype=torch.bool)
    alive[:, 1, 2] = False
    batch = regression.ridge(choice, reward, trained, 3)
    mean = regression.posterior_mean(batch, choice, 3)
    variance = regression.posterior_variance(batch, choice, alive)
    for i in range(3):
        fit = regression.ridge(choice[i], reward[i], trained, 3)
        assert fit.ratio == batch.ratio[i]
        assert torch.allclose(regression.posterior_mean(fit, choice[i], 3), mean[i], atol=1e-10)
        single = regression.posterior_variance(fit, choice[i], alive[i])
        assert torch.allclose(single, variance[i], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("policy", ["hierarchical", "ridge", "ridge-thompson"])
def test_ridge_without_enough_to_go_by(policy):
    bandit = AntiBandit(2, 3, policy=policy)
    assert bandit.score().tolist() == [[0.0] * 3] * 2
    credit(bandit, [0, 0], 0.5)
    assert bandit.score().tolist() == [[0.0] * 3] * 2  # one sample is all trend
    for arm in (1, 2, 0, 1, 2):
        credit(bandit, [arm, arm], 0.5)
    assert bandit.score().abs().max() < 1e-12  # equal accuracies: nothing learned, nothing NaN
    law = bandit.probabilities()
    assert torch.isfinite(law).all()
    assert law.sum(1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("policy", ["hierarchical", "ridge"])
def test_ridge_knows_when_the_history_changed(policy):
    """What is remembered of a fit belongs to its history."""
    effect = 0.02 * torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=FLOAT)
    first, second = (AntiBandit(3, 4, policy=policy, seed=1) for _ in range(2))
    for sign, bandit in ((1, first), (-1, second)):
        for _ in range(10):
            choice = bandit.sample()
            gain = effect.gather(1, choice.unsqueeze(1)).sum().item()
            bandit.credit(choice, 0.5 + sign * gain)
    before = first.score()
    first.load_state_dict(second.state_dict())
    assert torch.equal(first.score(), second.score())
    assert not torch.allclose(before, first.score())


@pytest.mark.parametrize("policy", ["detrended", "hierarchical", "ridge"])
def test_score_is_in_units_of_scaled_accuracy(policy):
    plain, percent = AntiBandit(2, 3, policy=policy), AntiBandit(2, 3, policy=policy, scale=100.0)
    for reward in (0.2, 0.5, 0.3, 0.6, 0.1, 0.4):
        for bandit in (plain, percent):
            bandit.credit(bandit.sample(), reward)
    assert plain.score().abs().max() > 0
    assert torch.allclose(percent.score(), 100 * plain.score(), rtol=1e-12)


@pytest.mark.parametrize("policy", ["detrended", "hierarchical", "ridge", "ridge-thompson"])
@pytest.mark.parametrize("evaluated", [0, 2])
def test_clear_effects_are_found(policy, evaluated):
    effect = torch.tensor([[0.0, 0.04, 0.08], [0.08, 0.0, 0.04], [0.04, 0.08, 0.0]], dtype=FLOAT)
    bandit = AntiBandit(3, 3, policy=policy, rounds=4, seed=1)
    abandoned = run(bandit, effect, noise=0.002, evaluated=evaluated)
    assert bandit.final().tolist() == [2, 0, 1]
    assert abandoned[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_law_sums_to_one_over_the_arms_alive_and_holds_every_draw(policy):
    bandit = AntiBandit(4, 5, policy=policy, rounds=1, seed=2)
    while not bandit.finished:
        law = bandit.probabilities()
        assert law.dtype == FLOAT
        assert law.sum(1).tolist() == pytest.approx([1.0] * 4)
        assert (law[~bandit.alive] == 0).all()
        choice = bandit.sample()
        assert (law.gather(1, choice.unsqueeze(1)) > 0).all()
        bandit.credit(choice, 0.3 + 0.1 * (choice.sum().item() % 5))
        while bandit.due:
            kept = bandit.alive.clone()
            dropped = bandit.prune()
            assert kept.gather(1, dropped.unsqueeze(1)).all()


# --- the hierarchical model ---------------------------------------------------------------------


def test_hierarchical_scores_are_the_effects_of_its_model():
    groups, costs = [0, 0, 1, 1, 1], torch.arange(20).view(5, 4)
    bandit = AntiBandit(
        5, 4, policy="hierarchical", scale=10.0, groups=groups, costs=costs, base_cost=7, seed=4
    )
    while bandit.phase == "initial" or bandit.in_round < 9:
        choice = bandit.sample()
        bandit.credit(choice, 0.4 + 0.05 * (choice == 2).sum().item())
    trained = torch.ones(bandit.samples, dtype=torch.bool)
    model = HierarchicalRidge(groups, 4, costs, base_cost=7)
    model.fit(bandit.history.choice, bandit.history.reward, trained)
    mean, deviation = model.effects()
    assert torch.equal(bandit.score(), 10 * mean)
    assert torch.equal(bandit._policy.deviation(bandit), 10 * deviation)
    assert model.found.columns.shape[1] > regression.trend_columns(trained).shape[1]
    # One operation is better wherever it stands, also where it was hardly tried.
    assert bandit.final().tolist() == [2] * 5


def test_hierarchical_learns_of_an_operation_on_all_edges_at_once():
    """An arm that one edge never tried there is known from the others."""
    groups = [row // 10 for row in range(30)]
    bandit = AntiBandit(30, 4, policy="hierarchical", groups=groups)
    ridge = AntiBandit(30, 4, policy="ridge")
    generator = torch.Generator().manual_seed(0)
    for number in range(40):
        choice = random_mix(30, 4, 0.5, generator)
        choice[0] = choice[0].clamp(max=2)  # the last arm is never there on this edge
        reward = 0.3 + 0.01 * (choice == 3).sum().item()
        for one in (bandit, ridge):
            one._pending, one._pending_trained = [choice], True
            one._trained_total = number % 4  # no round is ever full
            one.credit(choice, reward)
    assert bandit.score()[0].argmax() == 3
    assert ridge.score()[0].argmax() != 3
    assert bandit.score()[0, 3] == pytest.approx(bandit.score()[1, 3].item(), rel=0.1)


def test_a_search_fits_the_hierarchical_model_when_arms_are_abandoned(monkeypatch):
    original, fits = HierarchicalRidge.fit, []

    def fit(self, choices, *rest):
        fits.append(len(choices))
        return original(self, choices, *rest)

    monkeypatch.setattr(HierarchicalRidge, "fit", fit)
    bandit = AntiBandit(3, 4, policy="hierarchical", rounds=2)
    while not bandit.finished:
        bandit.probabilities()
        bandit.credit(bandit.sample(), 0.5)
        while bandit.due:
            bandit.score()
            bandit.prune()
            bandit.final()
    assert fits == [4 + 8, 4 + 8 + 6, 4 + 8 + 6 + 4]
