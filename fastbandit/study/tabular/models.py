"""Models that predict a network's accuracy from the accuracies of a few.

Each is a ridge regression, ``accuracy = constant + sum of effects + noise`` with normal effects;
the ratio of the two variances is found by restricted maximum likelihood, as in
:mod:`fastbandit.bandit.regression`, without a training trend. They differ in what has an effect;
``hierarchical`` is :class:`fastbandit.bandit.HierarchicalRidge`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastbandit.bandit import HierarchicalRidge

__all__ = ["MODELS", "effects", "ridge_weights"]

#: What has an effect: each operation on each edge; each operation, wherever it is; or an operation,
#: an operation in a stage and one on an edge, each kind with a variance of its own.
MODELS = ("additive", "counts", "hierarchical")

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
        model: one of :data:`MODELS`.
        path: int64 [b, n, rows].
        value: float64 [b, n]: the accuracies of the paths.
        cost: [operations]: parameters of each operation; size is a part of ``hierarchical``.
        stages: the stage of each row, another part of it.
    """
    operations, rows = len(cost), path.shape[-1]
    if model == "hierarchical":
        ridge = HierarchicalRidge(stages, operations, cost.expand(rows, -1))
        found = [ridge.fit(p, v).effects()[0] for p, v in zip(path, value, strict=True)]
        return torch.stack(found)
    hot = torch.nn.functional.one_hot(path, operations).to(value.dtype)  # [b, n, rows, operations]
    if model == "counts":
        weights = ridge_weights(hot.sum(2), value)
        return weights.unsqueeze(1).repeat(1, rows, 1)
    return ridge_weights(hot.flatten(2), value).unflatten(1, (rows, operations))
