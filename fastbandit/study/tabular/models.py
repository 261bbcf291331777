"""Models that predict a network's accuracy from the accuracies of a few.

Each is a ridge regression, ``accuracy = constant + sum of effects + noise`` with normal effects;
the ratio of the two variances is found by restricted maximum likelihood, as in
:mod:`fastbandit.bandit.regression`, without a training trend. They differ in what has an effect;
``hierarchical`` is :class:`fastbandit.bandit.HierarchicalRidge`. ``neighbours`` is no sum of
effects: networks that agree on more edges have more alike accuracies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbandit.bandit import HierarchicalRidge

__all__ = ["MODELS", "effects", "neighbours", "ridge_weights"]

#: What has an effect: each operation on each edge; each operation, wherever it is; or an operation,
#: an operation in a stage and one on an edge, each kind with a variance of its own. The last one is
#: that of :func:`neighbours`.
MODELS = ("additive", "counts", "hierarchical", "neighbours")

# Correlations of networks that differ on one edge, and variances of the noise over that of the
# accuracies.
_ALIKE = (0.3, 0.5, 0.7, 0.85, 0.95)
_NOISES = (0.05, 0.15, 0.4, 1.0, 3.0)
_RATIOS = 10.0 ** (torch.arange(-12, 13, dtype=torch.float64) / 4)
# Ratios whose -2 log likelihood differs by less are equally good; far above rounding.
_FLAT = 1e-6


def ridge_weights(design: Tensor, value: Tensor) -> Tensor:
    """Posterior means of the effects of normal columns, float64 [b, columns].

    With A the design less its column means, ``A A^T = U diag(d) U^T`` and z = U^T value, for a
    ratio h of the variances of an effect and of the noise,

        noise(h) = sum(z^2 / (1 + h d)) / (n - 1),
        -2 log L(h) = (n - 1) log noise(h) + sum(log(1 + h d)),

    and the means are ``h A^T U diag(1 / (1 + h d)) z`` at the best h of a grid.

    Args:
        design: float64 [b, n, columns].
        value: float64 [b, n].
    """
    design = design - design.mean(1, keepdim=True)
    value = value - value.mean(1, keepdim=True)
    spread, basis = torch.linalg.eigh(design @ design.transpose(1, 2))
    spread = spread.clamp(min=0.0)
    z = (value.unsqueeze(1) @ basis).squeeze(1)
    unit = spread.mean(-1, keepdim=True).clamp(min=1e-300)
    losses = []
    for step in _RATIOS.tolist():
        growth = 1.0 + spread * (step / unit)
        noise = (z**2 / growth).sum(-1) / max(value.shape[1] - 1, 1)
        loss = (value.shape[1] - 1) * noise.clamp(min=1e-300).log() + growth.log().sum(-1)
        losses.append(loss)
    # Few values leave the likelihood flat: the smallest ratio of those as good as the best.
    loss = torch.stack(losses)
    best = (loss <= loss.amin(0) + _FLAT).int().argmax(0)
    ratio = _RATIOS[best].unsqueeze(1) / unit
    shrunk = basis @ (ratio * z / (1.0 + ratio * spread)).unsqueeze(-1)
    return (design.transpose(1, 2) @ shrunk).squeeze(-1)


def effects(model: str, path: Tensor, value: Tensor, cost: Tensor, stages: Sequence[int]) -> Tensor:
    """What each operation on each edge adds to the accuracy, float64 [b, rows, operations].

    Args:
        model: one of :data:`MODELS`, but for the last.
        path: int64 [b, n, rows].
        value: float64 [b, n]: the accuracies of the paths.
        cost: [operations]: parameters of each operation; size is a part of ``hierarchical``.
        stages: the stage of each row, another part of it.
    """
    operations, rows = len(cost), path.shape[-1]
    if model == "hierarchical":
        ridge = HierarchicalRidge(stages, operations, cost.expand(rows, -1))
        fits = (ridge.fit(p, v) for p, v in zip(path, value, strict=True))
        return torch.stack([fit.effects()[0] for fit in fits])
    hot = torch.nn.functional.one_hot(path, operations).to(value.dtype)  # [b, n, rows, operations]
    if model == "counts":
        weights = ridge_weights(hot.sum(2), value)
        return weights.unsqueeze(1).repeat(1, rows, 1)
    return ridge_weights(hot.flatten(2), value).unflatten(1, (rows, operations))


def neighbours(path: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Expected accuracies of other paths, by a normal process, float64 [b, m].

    The accuracies of two paths that differ on d edges have the correlation r^d; a measurement adds
    noise of s times their variance. With ``V = (r^d) + s I`` and ``P`` as in :func:`ridge_weights`,
    a constant being fixed, r and s of a grid minimise

        (n - 1) log(value^T P value) + log det V + log(1^T V^-1 1).

    Args:
        path: int64 [b, n, rows].
        value: float64 [b, n].
        other: int64 [m, rows].
    """
    b, n, rows = path.shape
    distance = (path.unsqueeze(2) != path.unsqueeze(1)).sum(-1).double()
    both = torch.stack([torch.ones_like(value), value], -1)
    least = torch.full((b,), torch.inf, dtype=value.dtype)
    alike, level = torch.zeros_like(least), torch.zeros_like(least)
    weight = torch.zeros_like(value)
    for r in _ALIKE:
        for s in _NOISES:
            factor = torch.linalg.cholesky(r**distance + s * torch.eye(n, dtype=value.dtype))
            ones, solved = torch.cholesky_solve(both, factor).unbind(-1)
            mean = solved.sum(1) / ones.sum(1)
            left = solved - mean.unsqueeze(1) * ones  # P value
            square = (left * value).sum(1).clamp(min=1e-300)
            loss = (n - 1) * square.log() + ones.sum(1).log()
            loss = loss + 2.0 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
            better = loss < least - _FLAT
            least, alike, level = (
                torch.where(better, new, old)
                for new, old in ((loss, least), (torch.full_like(loss, r), alike), (mean, level))
            )
            weight = torch.where(better.unsqueeze(1), left, weight)
    arms = int(max(path.max(), other.max())) + 1
    measured, new = (
        torch.nn.functional.one_hot(one, arms).flatten(-2).to(value.dtype) for one in (path, other)
    )
    differ = rows - new @ measured.transpose(1, 2)  # [b, m, n]
    near = (differ * alike.log().view(-1, 1, 1)).exp()
    return level.unsqueeze(1) + (near @ weight.unsqueeze(-1)).squeeze(-1)
