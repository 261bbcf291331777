"""A regression that learns from few samples: operations first, then stages, then single edges.

The reward of a path is

    trend + size + sum over rows of (operation + operation x stage + operation x edge) + noise,

where the effect of an operation is shared by all rows, that of an operation in a stage by the rows
of the stage, and that on an edge belongs to one row. The three kinds of effects are normal, each
with a variance of its own. Where the data say nothing of single edges their variance is small, and
what is learnt of one edge is learnt of all.

With Z_k the counts of each effect in each path, K_k = Z_k Z_k^T, ratios h_k of the variances to
that of the noise, and X the columns of trend and size, everything follows from

    V = I + h_1 K_1 + h_2 K_2 + h_3 K_3,
    w = V^-1 (y - X b),  b = (X^T V^-1 X)^-1 X^T V^-1 y,  effects of kind k = h_k Z_k^T w.

The ratios maximise the restricted likelihood. They are taken from a grid (eighths of a decade from
10^-4 to 10^2, in units of the mean of each matrix's spectrum), and the search on it goes from a
coarse grid to the finest by whole neighbourhoods, so that rounding, which differs between
machines, does not move the result a little. One eigendecomposition of K_3 makes each step cheap,
since K_1 and K_2 have few columns. With one stage alone there are no effects of stages.

Sources: Patterson and Thompson, "Recovery of inter-block information when block sizes are
unequal", Biometrika 1971 (REML); Henderson, "Best linear unbiased estimation and prediction under a
selection model", Biometrics 1975; Robinson, "That BLUP is a good thing", Statistical Science 1991.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastbandit.bandit.regression import trend_columns

__all__ = ["HierarchicalFit", "HierarchicalRidge", "Variances"]

# Exponents of the grid, in eighths of a decade. The noise is thereby never less than about a
# hundredth of what the samples vary, which so few of them could not tell from none.
_FINEST = 1 / 8
_LEAST, _MOST = -4.0, 2.0
_STEPS = (2.0, 1.0, 0.5, 0.25, _FINEST)
# Losses (-2 log likelihood) that differ by less are equal, as in fastbandit.bandit.regression.
_FLAT = 1e-6
# Samples from which the size is a column: fewer would be explained by it.
_SAMPLES_FOR_SIZE = 8


class Variances(NamedTuple):
    """Variances of the effects and of the noise, in squared units of the reward."""

    operation: float
    stage: float
    edge: float
    noise: float


class HierarchicalFit(NamedTuple):
    """What the model holds after a fit; n samples, q columns of X."""

    ratios: Tensor  # [3]: variances of operation, stage and edge / that of the noise
    noise: Tensor  # []: variance of the noise
    loss: Tensor  # []: -2 log restricted likelihood, up to a constant
    coefficients: Tensor  # [q]: b
    weight: Tensor  # [n]: w
    columns: Tensor  # [n, q]: X
    now: Tensor  # [q - size]: the trend's columns where predictions are made
    size: Tensor  # [2]: mean and standard deviation of log size; 0 and 0 where it is no column
    solved: Tensor  # [n, q + n]: V^-1 [X, I]


class HierarchicalRidge:
    """The model for paths of given rows; :meth:`fit`, then :meth:`predict`.

    Args:
        groups: the stage of each row, one whole number >= 0 for each.
        arms: number of arms of each row.
        costs: [rows, arms] >= 0, what each arm adds to the size of a path, such as parameters;
            None: size is no part of the model. Its logarithm, less its mean and divided by its
            standard deviation over the samples, is a column beside the trend.
        base_cost: what all paths have of it, >= 0.

    Attributes:
        rows: number of rows.

    Raises:
        ValueError: groups, costs or arms of another shape or range.
    """

    def __init__(
        self,
        groups: Sequence[int],
        arms: int,
        costs: Tensor | Sequence[Sequence[float]] | None = None,
        *,
        base_cost: float = 0.0,
    ) -> None:
        self.groups = torch.as_tensor(groups, dtype=torch.int64)
        if self.groups.dim() != 1 or not len(self.groups) or int(self.groups.min()) < 0:
            raise ValueError(
                "HierarchicalRidge: groups: expected a whole number >= 0 for each row, got "
                f"{list(groups)!r}"
            )
        if arms < 1:
            raise ValueError(f"HierarchicalRidge: arms: expected 1 or more, got {arms}")
        self.rows, self.arms = len(self.groups), arms
        # Numbered from 0 without gaps: a stage without rows has no effects.
        self.groups = self.groups.unique(return_inverse=True)[1]
        self.base_cost = float(base_cost)
        self.costs: Tensor | None = None
        if costs is not None:
            self.costs = torch.as_tensor(costs).detach().cpu().double()
            bad = self.costs.shape != (self.rows, arms) or not bool((self.costs >= 0).all())
            if bad or not 0 <= self.base_cost < math.inf:
                raise ValueError(
                    f"HierarchicalRidge: costs, base_cost: expected [{self.rows}, {arms}] numbers "
                    f">= 0 and one more, got {list(self.costs.shape)} and {base_cost!r}"
                )
        self.found: HierarchicalFit | None = None
        self._choice = torch.empty(0, self.rows, dtype=torch.int64)
        self._mean = 0.0

    # --- the fit --------------------------------------------------------------------------------

    def fit(
        self,
        choices: Tensor | Sequence[Sequence[int]],
        rewards: Tensor | Sequence[float],
        trained: Tensor | None = None,
    ) -> HierarchicalRidge:
        """Fit the model to n samples; returns itself.

        Args:
            choices: int64 [n, rows], the arm of each row.
            rewards: [n], finite.
            trained: bool [n], False for a path that was only evaluated. With it the samples are
                those of one search, in order, whose level rises: see
                :func:`fastbandit.bandit.regression.trend_columns`. Default: no trend.

        With so few samples that the columns of trend and size explain all of them every effect is
        0.

        Raises:
            ValueError: shapes that do not fit, an arm out of range, a reward that is not finite.
        """
        choice = self._checked(choices, "fit")
        reward = torch.as_tensor(rewards).detach().cpu().double()
        if reward.shape != (len(choice),) or not bool(reward.isfinite().all()):
            raise ValueError(
                f"HierarchicalRidge.fit: rewards: expected [{len(choice)}] finite numbers, got "
                f"{list(reward.shape)}"
            )
        if trained is not None and (trained.shape != reward.shape or trained.dtype != torch.bool):
            raise ValueError(
                f"HierarchicalRidge.fit: trained: expected bool [{len(choice)}], got "
                f"{trained.dtype} {list(trained.shape)}"
            )
        self._choice = choice
        self._mean = float(reward.mean()) if len(reward) else 0.0
        self.found = self._fit(choice, reward, None if trained is None else trained.cpu())
        return self

    def _checked(self, choices: Tensor | Sequence[Sequence[int]], where: str) -> Tensor:
        choice = torch.as_tensor(choices).detach().cpu()
        if choice.numel() == 0 and choice.dim() < 2:
            choice = torch.empty(0, self.rows, dtype=torch.int64)
        whole = not (choice.is_floating_point() or choice.is_complex())
        inside = whole and bool(((choice >= 0) & (choice < self.arms)).all())
        if choice.dim() != 2 or choice.shape[1] != self.rows or not inside:
            raise ValueError(
                f"HierarchicalRidge.{where}: choices: expected arms 0..{self.arms - 1} in "
                f"[n, {self.rows}], got {choice.dtype} {list(choice.shape)}"
            )
        return choice.to(torch.int64)

    def _fit(
        self, choice: Tensor, reward: Tensor, trained: Tensor | None
    ) -> HierarchicalFit | None:
        n = len(choice)
        if n == 0:
            return None
        if trained is None:
            trend = torch.full((n, 1), n**-0.5, dtype=torch.float64)
            now = trend[-1]
        else:
            trend = trend_columns(trained)
            # A path to be trained, at the end of the samples.
            last = int(trained.nonzero()[-1]) if bool(trained.any()) else n - 1
            now = trend[last]
        size = self._log_size(choice)
        columns, scale = trend, torch.zeros(2, dtype=torch.float64)
        if size is not None and n >= _SAMPLES_FOR_SIZE:
            deviation = size.std(correction=0)
            standard = (size - size.mean()) / deviation.clamp(min=1e-300)
            left = standard - trend @ (trend.T @ standard)
            # A size that is the same for all, or that the trend explains, is no column.
            if float(deviation) > 1e-9 and float(left.square().mean()) > 1e-9:
                columns = torch.cat([trend, standard.unsqueeze(1)], 1)
                scale = torch.stack([size.mean(), deviation])
        q = columns.shape[1]
        if n <= q:
            return None
        rest = torch.linalg.qr(columns, mode="complete").Q[:, q:]
        shared, edge = self._designs(choice)
        half = rest.T @ edge
        spread, vectors = torch.linalg.eigh(half @ half.T)
        spread = spread.clamp(min=0.0)
        basis = rest @ vectors  # [n, m]
        z, designs = basis.T @ reward, basis.T @ shared  # [m], [m, k]
        blocks = [slice(0, self.arms), slice(self.arms, shared.shape[1])]
        means = [designs[:, block].square().sum() / len(z) for block in blocks]
        units = torch.stack([*means, spread.mean()]).clamp(min=1e-300)
        likelihood = _Likelihood(z, designs, spread, blocks, units)
        exponents = _search(likelihood, (True, int(self.groups.max()) > 0, True))
        ratios = 10.0**exponents / units
        loss = likelihood(exponents.unsqueeze(0))
        # From here on without the basis: V is of the order of the samples.
        system = torch.eye(n, dtype=torch.float64) + self._kernel(choice, choice, ratios)
        factor = torch.linalg.cholesky(system)
        eye = torch.eye(n, dtype=torch.float64)
        solved = torch.cholesky_solve(torch.cat([columns, eye], 1), factor)
        gram = columns.T @ solved[:, :q]
        coefficients = torch.linalg.solve(gram, solved[:, :q].T @ reward)
        left = reward - columns @ coefficients
        weight = solved[:, q:] @ left
        noise = (left @ weight / len(z)).clamp(min=0.0)
        return HierarchicalFit(
            ratios, noise, loss[0], coefficients, weight, columns, now, scale, solved
        )

    def _log_size(self, choice: Tensor) -> Tensor | None:
        """Logarithms of the sizes of paths, [n]; None without costs."""
        if self.costs is None:
            return None
        total = self.base_cost + self.costs[torch.arange(self.rows), choice].sum(-1)
        # A path without any size has the logarithm of the smallest other one, or of 1.
        return total.clamp(min=max(self.base_cost, 1.0)).log()

    def _designs(self, choice: Tensor) -> tuple[Tensor, Tensor]:
        """Z_1 and Z_2 side by side, [n, (1 + stages) arms], and Z_3, [n, rows arms]."""
        edge = (choice.unsqueeze(-1) == torch.arange(self.arms)).double()  # [n, rows, arms]
        stages = int(self.groups.max()) + 1
        stage = edge.new_zeros(len(choice), stages, self.arms).index_add_(1, self.groups, edge)
        return torch.cat([edge.sum(1), stage.flatten(1)], 1), edge.flatten(1)

    def _kernel(self, one: Tensor, other: Tensor, ratios: Tensor) -> Tensor:
        """h_1 K_1 + h_2 K_2 + h_3 K_3 between two sets of paths, [n, m]."""
        (a, c), (b, d) = self._designs(one), self._designs(other)
        own = slice(0, self.arms), slice(self.arms, None)
        return (
            ratios[0] * (a[:, own[0]] @ b[:, own[0]].T)
            + ratios[1] * (a[:, own[1]] @ b[:, own[1]].T)
            + ratios[2] * (c @ d.T)
        )

    # --- what was found -------------------------------------------------------------------------

    @property
    def variances(self) -> Variances | None:
        """The variances estimated; None before a fit, or with too few samples."""
        if self.found is None:
            return None
        operation, stage, edge = (self.found.ratios * self.found.noise).tolist()
        return Variances(operation, stage, edge, float(self.found.noise))

    def predict(self, choices: Tensor | Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """The expected reward of paths and the standard deviation of what is not known of it.

        The deviation is that of the expected reward, effects and columns, given the variances: it
        does not hold the noise of a single sample. With a trend it is for a path trained at the end
        of the samples.

        Args:
            choices: int64 [n, rows].

        Returns:
            Mean and standard deviation, float64 [n] each; the mean of the rewards and infinity
            where there are too few samples.
        """
        choice = self._checked(choices, "predict")
        fit = self.found
        if fit is None:
            mean = torch.full((len(choice),), self._mean, dtype=torch.float64)
            return mean, torch.full_like(mean, math.inf)
        columns = fit.now.expand(len(choice), -1)
        if float(fit.size[1]) > 0:
            size = self._log_size(choice)
            assert size is not None
            columns = torch.cat([columns, ((size - fit.size[0]) / fit.size[1]).unsqueeze(1)], 1)
        kernel = self._kernel(choice, self._choice, fit.ratios)
        shared, edge = self._designs(choice)
        own = shared.square()
        before = (
            fit.ratios[0] * own[:, : self.arms].sum(1)
            + fit.ratios[1] * own[:, self.arms :].sum(1)
            + fit.ratios[2] * edge.sum(1)
        )
        return self._posterior(columns, kernel, before)

    def effects(self, alive: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What each arm is worth on each row, less the mean of the arms alive there.

        The sum of its three effects, and of the size where that is a column: the size of an arm
        counts as it does in a path of mean size.

        Args:
            alive: bool [rows, arms]; default: all.

        Returns:
            Posterior mean and standard deviation, float64 [rows, arms] each, in units of the
            reward; 0 and infinity where there are too few samples. Meant for the arms alive.
        """
        shape = (self.rows, self.arms)
        fit = self.found
        if fit is None:
            return torch.zeros(shape).double(), torch.full(shape, math.inf).double()
        alive = torch.ones(shape, dtype=torch.bool) if alive is None else alive.cpu()
        share = alive.double() / alive.sum(1, keepdim=True).clamp(min=1)
        shared, edge = self._designs(self._choice)
        h = fit.ratios
        stages = shared[:, self.arms :].unflatten(1, (-1, self.arms))
        kernel = (
            h[0] * shared[:, None, : self.arms]
            + h[1] * stages[:, self.groups]
            + h[2] * edge.unflatten(1, shape)
        )  # [n, rows, arms]: of an arm's worth with each sample
        kernel = kernel - (kernel * share).sum(-1, keepdim=True)
        columns = torch.zeros(self.rows * self.arms, fit.columns.shape[1], dtype=torch.float64)
        if float(fit.size[1]) > 0:
            assert self.costs is not None
            cost = self.costs - (self.costs * share).sum(-1, keepdim=True)
            # The derivative of the logarithm at the mean size, in standard deviations.
            columns[:, -1] = (cost / (fit.size[0].exp() * fit.size[1])).flatten()
        # 1 - 2 share + sum(share^2): the variance of an arm against the mean, before any sample.
        before = h.sum() * (1.0 - 2.0 * share + share.square().sum(1, keepdim=True))
        mean, deviation = self._posterior(columns, kernel.flatten(1).T, before.flatten())
        return mean.unflatten(0, shape), deviation.unflatten(0, shape)

    def _posterior(self, columns: Tensor, kernel: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of linear functions of coefficients and effects.

        Args:
            columns: [p, q], of the coefficients.
            kernel: [p, n], covariances with the samples, in units of the noise.
            before: [p], variances before any sample, in units of the noise.
        """
        fit = self.found
        assert fit is not None
        q = fit.columns.shape[1]
        mean = columns @ fit.coefficients + kernel @ fit.weight
        inverse, solved = fit.solved[:, q:], fit.solved[:, :q]
        left = columns - kernel @ solved
        gram = fit.columns.T @ solved
        variance = (
            before
            - ((kernel @ inverse) * kernel).sum(1)
            + (left * torch.linalg.solve(gram, left.T).T).sum(1)
        )
        return mean, (fit.noise * variance.clamp(min=0.0)).sqrt()


class _Likelihood:
    """-2 log of the restricted likelihood at ratios ``10^exponents / units``, up to a constant.

    In the basis where K_3 is diagonal: with D = 1 / (1 + h_3 spread), U the shared designs, H
    their ratios,

        M = I + sqrt(H) U^T D U sqrt(H),
        m noise = z^T D z - z^T D U sqrt(H) M^-1 sqrt(H) U^T D z,
        loss = m log noise + sum(log(1 + h_3 spread)) + log det M.
    """

    def __init__(
        self, z: Tensor, designs: Tensor, spread: Tensor, blocks: list[slice], units: Tensor
    ) -> None:
        self.z, self.designs, self.spread, self.units = z, designs, spread, units
        self.blocks = blocks
        # What depends on h_3 alone, by its exponent.
        self.terms: dict[float, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def __call__(self, exponents: Tensor) -> Tensor:
        """The loss, [g], of exponents [g, 3]."""
        parts = [self._edge(exponent) for exponent in exponents[:, 2].tolist()]
        gram, right, square, growth = (torch.stack(part) for part in zip(*parts, strict=True))
        ratios = 10.0 ** exponents[:, :2] / self.units[:2]
        root = torch.cat(
            [
                ratios[:, i, None].sqrt().expand(-1, block.stop - block.start)
                for i, block in enumerate(self.blocks)
            ],
            1,
        )
        system = torch.eye(root.shape[1], dtype=torch.float64) + (
            root.unsqueeze(2) * gram * root.unsqueeze(1)
        )
        factor = torch.linalg.cholesky(system)
        half = torch.linalg.solve_triangular(factor, (root * right).unsqueeze(2), upper=False)
        m = len(self.z)
        noise = (square - half.square().sum((1, 2))) / m
        # Rewards that are all equal have no noise; the floor keeps the logarithm finite.
        loss = m * noise.clamp(min=1e-300).log() + growth
        return loss + 2.0 * factor.diagonal(dim1=1, dim2=2).log().sum(1)

    def _edge(self, exponent: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if exponent not in self.terms:
            growth = 1.0 + 10.0**exponent / self.units[2] * self.spread
            scaled = self.designs / growth.unsqueeze(1)
            right, square = scaled.T @ self.z, (self.z**2 / growth).sum()
            self.terms[exponent] = self.designs.T @ scaled, right, square, growth.log().sum()
        return self.terms[exponent]


def _search(likelihood: _Likelihood, free: Sequence[bool]) -> Tensor:
    """The exponents [3] with the smallest loss on the finest grid, from the coarsest on.

    One that is not ``free`` stays the smallest there is.
    """
    coarse = torch.arange(_LEAST, _MOST + 1, _STEPS[0], dtype=torch.float64)
    best = _best(likelihood, torch.cartesian_prod(*(coarse if one else coarse[:1] for one in free)))
    moves = itertools.product(*((-1.0, 0.0, 1.0) if one else (0.0,) for one in free))
    near = torch.tensor(list(moves), dtype=torch.float64)
    for step in _STEPS[1:]:
        for _ in range(int((_MOST - _LEAST) / step)):
            around = (best + step * near).clamp(_LEAST, _MOST)
            nearby = _best(likelihood, torch.cat([best.unsqueeze(0), around]))
            if torch.equal(nearby, best):
                break
            best = nearby
    return best


def _best(likelihood: _Likelihood, exponents: Tensor) -> Tensor:
    """The first of those that are as good as the best."""
    loss = likelihood(exponents)
    return exponents[int((loss <= loss.min() + _FLAT).int().argmax())]
