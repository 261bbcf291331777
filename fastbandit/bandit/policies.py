"""How arms are drawn, credited and abandoned: the policies of the bandit, by name.

``printed`` is the rule of the paper, Eqs. 4.9 to 4.13, and ``random`` spends the same samples
without learning from them. The others are there to be compared with them on the same rows and the
same number of trained paths:

- ``ucb1``, ``thompson``, ``successive-halving``: the well-known rules of the bandit literature,
  each row on its own;
- ``detrended``, ``ridge``, ``ridge-thompson``, ``hierarchical``: rules that select better from the
  same samples, because they remove the rise of the training and, all but the first, what the other
  rows do; the last one also learns what an operation is worth wherever it stands.

Every policy is written on leading dimensions ``...``: a bandit's tensors are [rows, arms], a
simulation has thousands of bandits in [bandits, rows, arms]
(:mod:`fastbandit.bandit.simulation`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.bandit.hierarchical import HierarchicalRidge
from fastbandit.bandit.regression import (
    RidgeFit,
    arm_means,
    detrend,
    posterior_mean,
    posterior_variance,
    ridge,
)
from fastbandit.bandit.state import History, State

__all__ = [
    "POLICIES",
    "Detrended",
    "Hierarchical",
    "History",
    "Policy",
    "Printed",
    "Random",
    "Ridge",
    "RidgeThompson",
    "State",
    "SuccessiveHalving",
    "Thompson",
    "Ucb1",
    "register",
]


class Policy(ABC):
    """How arms are drawn, credited and abandoned; this base draws by no rule.

    A policy keeps no state of its own. All it may use is in the bandit - ``mean``, ``count``,
    ``alive``, ``drawn``, ``history`` and the numbers from ``uniform`` - so that checkpoints and
    replays are complete whatever the policy. (What it remembers to save time must be a function
    of these.) It changes ``mean`` and ``count`` in :meth:`credit` and nothing else; the schedule
    and ``alive`` are the bandit's.

    To add one: derive, set ``name`` and ``description``, decorate with :func:`register`. A
    parameter of its own is a field of :class:`fastbandit.bandit.BanditSettings`.
    """

    name: ClassVar[str]
    #: What the policy is, in a few words, for lists of policies.
    description: ClassVar[str] = ""
    #: Whether every arm gets one sample before the first round.
    initial_pass: ClassVar[bool] = True
    #: Whether that may be given up for paths with random mixes (the setting ``mixes``).
    mixed_initial_pass: ClassVar[bool] = False
    #: Whether stages and sizes of the rows are of use.
    uses_rows: ClassVar[bool] = False
    #: Whether rewards are accuracies, in [0, 1]; otherwise any finite number is one.
    accuracies: ClassVar[bool] = True
    #: How an arm is chosen to be abandoned, where neither score nor bound says it.
    reason: ClassVar[str] = ""
    #: Bandits that are simulated at a time; fewer bound the memory of a policy that needs much.
    simulated_at_a_time: ClassVar[int] = 1000

    @classmethod
    def reward_problem(cls, reward: float) -> str:
        """What is wrong with a reward, or an empty string."""
        if cls.accuracies and not 0.0 <= reward <= 1.0:
            return f"expected an accuracy in [0, 1], got {reward}"
        return "" if math.isfinite(reward) else f"expected a finite number, got {reward}"

    def budget(self, bandit: State, arms: int) -> int:
        """Paths to train with ``arms`` arms alive before one is abandoned: K * T.

        0 is allowed and abandons the next arm at once.
        """
        return arms * bandit.settings.rounds

    @abstractmethod
    def probabilities(self, bandit: State) -> Tensor:
        """The law :meth:`sample` draws from, float64 [..., rows, arms], zero where not alive."""

    @abstractmethod
    def sample(self, bandit: State) -> Tensor:
        """Draws one arm alive per row, int64 [..., rows]. Not called for the initial pass."""

    def credit(self, bandit: State, choice: Tensor, reward: Tensor | float) -> None:
        """Updates ``mean`` and ``count`` with the scaled accuracy ``reward``.

        Here Eq. 4.11, where the first value an arm gets is its m_0.

        Args:
            choice: [..., rows], int64.
            reward: a number, or float64 [..., 1].
        """
        first = bandit.count.gather(-1, choice.unsqueeze(-1)).squeeze(-1) == 0
        for rows, rate in ((first, 1.0), (~first, bandit.settings.rate)):
            ops.bandit_update_(
                bandit.mean, bandit.count, torch.where(rows, choice, -1), reward, rate=rate
            )

    def prune(self, bandit: State) -> Tensor:
        """The arm alive that each row abandons, int64 [..., rows].

        Here the one with the smallest score, the lowest index among equals.
        """
        return torch.where(bandit.alive, self.score(bandit), math.inf).argmin(-1)

    def score(self, bandit: State) -> Tensor:
        """What makes an arm good, float64 [..., rows, arms]; ranks the arms alive."""
        return bandit.mean

    def worth(self, bandit: State) -> Tensor:
        """What a path that keeps to a budget is chosen by when arms are abandoned.

        The sum over its arms, float64 [..., rows, arms]; here the score.
        """
        return self.score(bandit)


POLICIES: dict[str, type[Policy]] = {}


def register(policy: type[Policy]) -> type[Policy]:
    """Class decorator: make a policy known under its ``name``."""
    if policy.name in POLICIES:
        raise ValueError(f"policy {policy.name!r} is registered already")
    POLICIES[policy.name] = policy
    return policy


def _pick(eligible: Tensor, uniform: Tensor) -> Tensor:
    """One of the eligible arms of each row, uniformly, [..., rows]."""
    # Below the number eligible: 1 - 2**-53 times an integer does not round up to it.
    rank = (uniform * eligible.sum(-1)).long()
    position = eligible.cumsum(-1) - 1
    return (eligible & (position == rank.unsqueeze(-1))).int().argmax(-1)


def _credit_average(bandit: State, choice: Tensor, reward: Tensor | float) -> None:
    """m <- m + (a - m) / (n + 1), n <- n + 1: the plain average of all that an arm was given."""
    index = choice.unsqueeze(-1)
    value = torch.as_tensor(reward, dtype=torch.float64, device=choice.device)
    old, count = bandit.mean.gather(-1, index), bandit.count.gather(-1, index)
    new = old + (value.expand(choice.shape).unsqueeze(-1) - old) / (count + 1)
    bandit.mean.scatter_(-1, index, new)
    bandit.count.scatter_(-1, index, count + 1)


def _best_probabilities(mean: Tensor, deviation: Tensor, alive: Tensor) -> Tensor:
    """P(arm k is the largest) for independent N(mean, deviation^2), [..., arms], by quadrature.

    ``integral of phi(z) prod over j of Phi((mean_k + deviation_k z - mean_j) / deviation_j) dz``.
    """
    z = torch.linspace(-6.0, 6.0, 129, dtype=torch.float64, device=mean.device)
    density = (-0.5 * z**2).exp()
    probabilities = torch.zeros_like(mean)
    for arm in range(mean.shape[-1]):
        value = mean[..., arm, None] + deviation[..., arm, None] * z  # [..., z]
        below = (value.unsqueeze(-2) - mean.unsqueeze(-1)) / deviation.unsqueeze(-1)
        below = torch.special.ndtr(below)  # [..., arms, z]
        others = alive.unsqueeze(-1).clone()
        others[..., arm, :] = False
        probabilities[..., arm] = (torch.where(others, below, 1.0).prod(-2) * density).sum(-1)
    probabilities = torch.where(alive, probabilities, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _draw_best(bandit: State, mean: Tensor, deviation: Tensor) -> Tensor:
    """The arm alive with the largest of independent draws from N(mean, deviation^2)."""
    uniform = bandit.uniform("sample", bandit.arms)
    # A uniform of exactly 0 would be minus infinity, as the arms that are not alive are.
    normal = torch.special.ndtri(uniform.clamp(min=2.0**-54))
    return torch.where(bandit.alive, mean + deviation * normal, -math.inf).argmax(-1)


# --- the paper's rule and the baseline ----------------------------------------------------------


@register
class Printed(Policy):
    """The rule as printed: draw by ``softmax(-s_L)``, abandon the smallest s_U."""

    name = "printed"
    description = "the paper's rule"

    def probabilities(self, bandit: State) -> Tensor:
        return ops.bandit_probabilities(
            bandit.mean, bandit.count, bandit.alive, bonus=bandit.settings.bonus
        )

    def sample(self, bandit: State) -> Tensor:
        uniform = bandit.uniform("sample").squeeze(-1)
        choice, _ = ops.bandit_sample(
            bandit.mean, bandit.count, bandit.alive, uniform, bonus=bandit.settings.bonus
        )
        return choice

    def prune(self, bandit: State) -> Tensor:
        kept = bandit.alive.clone()
        ops.bandit_prune_(kept, bandit.mean, bandit.count, bonus=bandit.settings.bonus)
        return (bandit.alive & ~kept).int().argmax(-1)


@register
class Random(Policy):
    """Random search, the baseline: draws and abandons uniformly among the arms alive.

    Means and counts are kept for the record and for the survivors of a stopped run.
    """

    name = "random"
    description = "the baseline, which learns nothing"
    reason = "drawn at random"
    mixed_initial_pass = True

    def probabilities(self, bandit: State) -> Tensor:
        return bandit.alive.double() / bandit.arms_left

    def sample(self, bandit: State) -> Tensor:
        return _pick(bandit.alive, bandit.uniform("sample").squeeze(-1))

    def prune(self, bandit: State) -> Tensor:
        return _pick(bandit.alive, bandit.uniform("prune").squeeze(-1))

    def worth(self, bandit: State) -> Tensor:
        # Other numbers than those of the draw, which are numbered by the arms left.
        return bandit.uniform("prune", bandit.arms, number=bandit.arms + bandit.arms_left)


# --- the well-known rules, each row on its own --------------------------------------------------


class _Averaging(Policy):
    """Plain averages in place of Eq. 4.11, so ``rate`` is not used; abandons the smallest one."""

    def credit(self, bandit: State, choice: Tensor, reward: Tensor | float) -> None:
        _credit_average(bandit, choice, reward)


class _Balanced(_Averaging):
    """Draws without replacement: uniformly among the arms alive drawn least often in their row.

    In each block of K samples every arm alive is drawn once.
    """

    def probabilities(self, bandit: State) -> Tensor:
        least = self._least(bandit)
        return least.double() / least.sum(-1, keepdim=True)

    def sample(self, bandit: State) -> Tensor:
        return _pick(self._least(bandit), bandit.uniform("sample").squeeze(-1))

    @staticmethod
    def _least(bandit: State) -> Tensor:
        drawn = torch.where(bandit.alive, bandit.drawn, torch.iinfo(torch.int64).max)
        return bandit.alive & (drawn == drawn.amin(-1, keepdim=True))


@register
class Ucb1(_Averaging):
    """UCB1: draw the arm alive with the largest ``average + bonus sqrt(2 ln N / n)``.

    The lowest index among equals; no randomness after the initial pass. On the printed schedule
    the arm with the smallest average is abandoned.

    Source: Auer, Cesa-Bianchi and Fischer, "Finite-time analysis of the multiarmed bandit
    problem", Machine Learning 2002.
    """

    name = "ucb1"
    description = "largest upper bounds"

    def probabilities(self, bandit: State) -> Tensor:
        probabilities = torch.zeros_like(bandit.mean)
        return probabilities.scatter_(-1, self.sample(bandit).unsqueeze(-1), 1.0)

    def sample(self, bandit: State) -> Tensor:
        _, upper = ops.bandit_bounds(bandit.mean, bandit.count, bonus=bandit.settings.bonus)
        return torch.where(bandit.alive, upper, -math.inf).argmax(-1)


@register
class Thompson(_Averaging):
    """Thompson sampling: draw ``N(average, bonus^2 v / n)`` for each arm, take the largest.

    v is the variance of all accuracies so far, so the exploration fits their spread. On the
    printed schedule the arm with the smallest average is abandoned.

    Sources: Thompson, Biometrika 1933; Agrawal and Goyal, "Further optimal regret bounds for
    Thompson sampling", AISTATS 2013 (Gaussian posteriors; there v = 1).
    """

    name = "thompson"
    description = "draws from normal posteriors"

    def probabilities(self, bandit: State) -> Tensor:
        return _best_probabilities(bandit.mean, self._deviation(bandit), bandit.alive)

    def sample(self, bandit: State) -> Tensor:
        return _draw_best(bandit, bandit.mean, self._deviation(bandit))

    @staticmethod
    def _deviation(bandit: State) -> Tensor:
        reward = bandit.history.reward
        variance = bandit.settings.scale**2 * reward.var(-1, correction=0)
        count = bandit.count.clamp(min=1)
        # The floor lets equal arms of equal accuracies share the law.
        return bandit.settings.bonus * (variance[..., None, None] / count).sqrt() + 1e-12


@register
class SuccessiveHalving(_Balanced):
    """Sequential halving: as many paths in each stage, after which half of the arms go.

    A stage abandons, one after the other, the arms with the smallest averages until
    ``ceil(K / 2)`` are left: 9, 5, 3, 2, 1. The stages share the total of the printed schedule,
    T (K + ... + 2), equally, the first ones the remainder. Arms are drawn without replacement,
    and averages are over all samples of a search.

    Source: Karnin, Koren and Somekh, "Almost optimal exploration in multi-armed bandits", ICML
    2013 (there a stage uses its own samples alone).
    """

    name = "successive-halving"
    description = "half of the arms at a time"

    def budget(self, bandit: State, arms: int) -> int:
        stages = []
        left = bandit.arms
        while left > 1:
            stages.append(left)
            left = (left + 1) // 2
        if arms not in stages:
            return 0
        total = bandit.settings.rounds * sum(range(2, bandit.arms + 1))
        each, rest = divmod(total, len(stages))
        return each + (stages.index(arms) < rest)


# --- rules that use what else is known about the samples ----------------------------------------


@register
class Detrended(_Balanced):
    """Balanced draws; an arm's score is the mean of what the training trend leaves.

    The trend is a regression of all accuracies on powers of log t, t the paths trained so far, and
    on whether a path was only evaluated. On the printed schedule the arm with the smallest score
    is abandoned. ``mean`` holds plain averages.
    """

    name = "detrended"
    mixed_initial_pass = True
    description = "means less the training trend"

    def score(self, bandit: State) -> Tensor:
        choice, reward, trained = bandit.history
        if not trained.numel():
            return torch.zeros_like(bandit.mean)
        return bandit.settings.scale * arm_means(choice, detrend(reward, trained), bandit.arms)


@register
class Ridge(_Balanced):
    """Balanced draws; an arm's score is its posterior mean in one model of all rows.

    ``accuracy = trend + sum over rows of effect[row, arm] + noise`` with normal effects and noise,
    whose variances are estimated by restricted maximum likelihood: a ridge regression with its
    penalty chosen by the data. What the other rows contributed to an accuracy is thereby not
    credited to an arm. Scores of a row sum to 0. On the printed schedule the arm with the smallest
    score is abandoned. ``mean`` holds plain averages.

    Paths that are only evaluated (``evaluations_per_epoch``) enter like the others; they make the
    difference, since a search has more effects than trained paths.
    """

    name = "ridge"
    mixed_initial_pass = True
    description = "one model of all edges"
    # The regression holds a matrix of samples x samples for each bandit.
    simulated_at_a_time = 25

    def __init__(self) -> None:
        # A function of the history, kept because a law and its draw both need it.
        self._fitted: tuple[History, RidgeFit | None] | None = None

    def fit(self, bandit: State) -> RidgeFit | None:
        """The model of all samples so far; None before there are enough to tell arms from trend."""
        history = bandit.history
        if self._fitted is not None:
            fitted_to, model = self._fitted
            if all(torch.equal(a, b) for a, b in zip(fitted_to, history, strict=True)):
                return model
        model = ridge(history.choice, history.reward, history.trained, bandit.arms)
        self._fitted = (history, model)
        return model

    def score(self, bandit: State) -> Tensor:
        fit = self.fit(bandit)
        if fit is None:
            return torch.zeros_like(bandit.mean)
        return bandit.settings.scale * posterior_mean(fit, bandit.history.choice, bandit.arms)


@register
class RidgeThompson(Ridge):
    """The model of ``ridge``, drawn from by Thompson sampling: good arms are drawn more often.

    Each arm alive gets an independent draw from its marginal posterior, with the deviation that its
    effect has from the mean of those alive in its row, times ``bonus``; the largest is taken.
    """

    name = "ridge-thompson"
    description = "draws from that model"

    def probabilities(self, bandit: State) -> Tensor:
        return _best_probabilities(*self._beliefs(bandit), bandit.alive)

    def sample(self, bandit: State) -> Tensor:
        return _draw_best(bandit, *self._beliefs(bandit))

    def _beliefs(self, bandit: State) -> tuple[Tensor, Tensor]:
        fit = self.fit(bandit)
        if fit is None:
            return torch.zeros_like(bandit.mean), torch.ones_like(bandit.mean)
        choice = bandit.history.choice
        variance = posterior_variance(fit, choice, bandit.alive)
        return posterior_mean(
            fit, choice, bandit.arms
        ), bandit.settings.bonus * variance.sqrt() + 1e-12


@register
class Hierarchical(_Balanced):
    """Balanced draws; an arm's score is its worth in a model of operations, stages and edges.

    The model is :class:`fastbandit.bandit.HierarchicalRidge` with the trend of ``ridge``: what an
    operation is worth on all edges, what it is worth more on the edges of one stage (``groups`` of
    the bandit), and on a single one, each kind with a variance that is estimated; and the size of a
    path where the bandit has ``costs``. Scores of a row sum to 0. On the printed schedule the arm
    with the smallest score is abandoned. ``mean`` holds plain averages.

    The variances are estimated where scores are asked for: when arms are abandoned, not when a path
    is drawn or credited.
    """

    name = "hierarchical"
    description = "one model of operations, stages and edges"
    mixed_initial_pass = True
    uses_rows = True
    # A model holds a matrix of samples x samples for each bandit.
    simulated_at_a_time = 25

    def __init__(self) -> None:
        # A function of the history, kept because a round asks for scores several times.
        self._fitted: tuple[History, list[HierarchicalRidge]] | None = None

    def models(self, bandit: State) -> list[HierarchicalRidge]:
        """The models of all samples so far, one for each bandit in the order of their seeds."""
        history = bandit.history
        if self._fitted is not None:
            fitted_to, models = self._fitted
            if all(torch.equal(a, b) for a, b in zip(fitted_to, history, strict=True)):
                return models
        groups = (0,) * bandit.rows if bandit.groups is None else bandit.groups
        bandits = math.prod(bandit.mean.shape[:-2])
        choices = history.choice.reshape(bandits, *history.choice.shape[-2:])
        rewards = history.reward.reshape(bandits, history.reward.shape[-1])
        models = [
            HierarchicalRidge(groups, bandit.arms, bandit.costs, base_cost=bandit.base_cost).fit(
                choice, reward, history.trained
            )
            for choice, reward in zip(choices, rewards, strict=True)
        ]
        self._fitted = (history, models)
        return models

    def score(self, bandit: State) -> Tensor:
        return self._effects(bandit, 0)

    def deviation(self, bandit: State) -> Tensor:
        """Posterior standard deviations of the scores, float64 [..., rows, arms]."""
        return self._effects(bandit, 1)

    def _effects(self, bandit: State, which: int) -> Tensor:
        per_bandit = [model.effects()[which] for model in self.models(bandit)]
        if not per_bandit:
            return torch.zeros_like(bandit.mean)
        effects = torch.stack(per_bandit).view_as(bandit.mean).to(bandit.mean.device)
        return bandit.settings.scale * effects
