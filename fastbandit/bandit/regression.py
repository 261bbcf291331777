"""Credit for arms by regression over all samples: the training trend, and one ridge model.

A sample is a path, one arm in each row, and its accuracy. The accuracy rises as the shared
weights are trained, and it depends on all rows at once; both hide what one arm is worth. Here
the rise is a few fixed columns, and the arms of all rows are one random effect whose variance, and
that of the noise, are estimated from the samples.

Leading dimensions ``...`` are independent problems on the same schedule. All tensors are float64.

Sources: Patterson and Thompson, "Recovery of inter-block information when block sizes are
unequal", Biometrika 1971 (REML); Kang et al., "Efficient control of population structure in model
organism association mapping", Genetics 2008 (its profile by one eigendecomposition); Robinson,
"That BLUP is a good thing", Statistical Science 1991 (the posterior mean).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "RidgeFit",
    "arm_means",
    "detrend",
    "posterior_mean",
    "posterior_variance",
    "ridge",
    "trend_columns",
]

# Cubic in log t: a search rises fast at first and slowly later.
_TREND_DEGREE = 3
# Samples for each degree, so that a short history is not explained by its trend alone.
_SAMPLES_PER_DEGREE = 8
# The ratio of the two variances is chosen from a fixed grid and not by descent, so that rounding,
# which differs between machines, cannot move it a little.
_RATIOS = 10.0 ** (torch.arange(-40, 41, dtype=torch.float64) / 10)

# Ratios whose -2 log likelihood differs by less are equally good; far above rounding.
_FLAT = 1e-6


class RidgeFit(NamedTuple):
    """What :func:`ridge` found; :func:`posterior_mean` turns it into credit.

    With V = prior K + noise I and P = V^-1 - V^-1 X (X^T V^-1 X)^-1 X^T V^-1, the columns of
    ``basis`` diagonalise P: P = basis diag(1 / (1 + ratio spread)) basis^T / noise.
    """

    ratio: Tensor  # [...]: prior variance of an arm's effect / noise variance
    noise: Tensor  # [...]: noise variance
    basis: Tensor  # [..., n, n - q]
    spread: Tensor  # [..., n - q]: eigenvalues, >= 0
    weight: Tensor  # [..., n]: noise * P y


def trend_columns(trained: Tensor) -> Tensor:
    """Orthonormal columns of what is not the arms' doing.

    A constant; powers of log t up to the third, t the number of paths trained so far; and, where
    both kinds are there, whether a path was only evaluated, since the weights had just been trained
    on the others.

    Args:
        trained: [n], bool.

    Returns:
        [n, q], float64; q = n for n <= 1.
    """
    n = trained.numel()
    if n == 0:
        return torch.empty(0, 0, dtype=torch.float64, device=trained.device)
    time = trained.double().cumsum(0).clamp(min=1.0).log()
    time = 2.0 * time / time[-1].clamp(min=1.0) - 1.0  # the powers of [-1, 1] are well scaled
    columns = [time**degree for degree in range(1 + min(_TREND_DEGREE, n // _SAMPLES_PER_DEGREE))]
    if not bool(trained.all()) and bool(trained.any()):
        columns.append((~trained).double())
    basis, triangle = torch.linalg.qr(torch.stack(columns[:n], 1))
    return basis[:, triangle.diagonal().abs() > 1e-9 * math.sqrt(n)]


def detrend(reward: Tensor, trained: Tensor) -> Tensor:
    """What least squares on :func:`trend_columns` leaves of the rewards [..., n]."""
    columns = trend_columns(trained)
    return reward - (reward @ columns) @ columns.T


def arm_means(choice: Tensor, value: Tensor, arms: int) -> Tensor:
    """Mean of the values of the samples that chose each arm, [..., rows, arms]; 0 where none did.

    Args:
        choice: [..., n, rows], int64.
        value: [..., n].
        arms: number of arms.
    """
    index = choice.transpose(-1, -2)  # [..., rows, n]
    shape = (*index.shape[:-1], arms)
    total = value.new_zeros(shape).scatter_add_(-1, index, value.unsqueeze(-2).expand(index.shape))
    count = value.new_zeros(shape).scatter_add_(-1, index, torch.ones_like(index).double())
    return total / count.clamp(min=1.0)


def _one_hot(choice: Tensor, arms: int) -> Tensor:
    """The design matrix Z, [..., n, rows * arms]: 1 where a sample chose the arm."""
    arm = torch.arange(arms, device=choice.device)
    return (choice.unsqueeze(-1) == arm).double().flatten(-2)


def ridge(choice: Tensor, reward: Tensor, trained: Tensor, arms: int) -> RidgeFit | None:
    """Fits ``reward = X beta + Z effect + noise`` to all samples, arms and rows at once.

    X are the :func:`trend_columns`, ``effect ~ N(0, prior)`` independently for each arm of each
    row, ``noise ~ N(0, noise)``. The variances maximise the restricted likelihood: with
    Q an orthonormal basis of what X leaves, the eigenvalues d of Q^T Z Z^T Q, z the coordinates of
    Q^T reward along its eigenvectors, m of them, and h = prior / noise,

        noise(h) = sum(z^2 / (1 + h d)) / m,
        -2 log L(h) = m log noise(h) + sum(log(1 + h d)).

    Args:
        choice: [..., n, rows], int64.
        reward: [..., n].
        trained: [n], bool.
        arms: number of arms.

    Returns:
        The fit; None where the trend alone explains all samples (n <= q).
    """
    columns = trend_columns(trained)
    n, q = columns.shape
    if n <= q:
        return None
    rest = torch.linalg.qr(columns, mode="complete").Q[:, q:]
    design = rest.T @ _one_hot(choice, arms)
    spread, vectors = torch.linalg.eigh(design @ design.transpose(-1, -2))
    spread = spread.clamp(min=0.0)
    basis = rest @ vectors
    z2 = (reward.unsqueeze(-2) @ basis).squeeze(-2) ** 2
    # In units of the mean eigenvalue, so that the grid fits any number of rows and samples.
    unit = spread.mean(-1, keepdim=True).clamp(min=1e-300)
    losses, noises, ratios = [], [], []
    for step in _RATIOS.tolist():
        growth = 1.0 + spread * (step / unit)
        noise = (z2 / growth).mean(-1)
        # Rewards that are all equal have no noise; the floor keeps the logarithm finite.
        losses.append((n - q) * noise.clamp(min=1e-300).log() + growth.log().sum(-1))
        noises.append(noise)
        ratios.append(step / unit.squeeze(-1))
    # Few samples leave the likelihood flat, and rounding must not choose: the smallest ratio of
    # those that are as good as the best.
    loss = torch.stack(losses)
    best = (loss <= loss.amin(0) + _FLAT).int().argmax(0, keepdim=True)
    noise = torch.stack(noises).gather(0, best).squeeze(0)
    ratio = torch.stack(ratios).gather(0, best).squeeze(0)
    shrunk = (reward.unsqueeze(-2) @ basis) / (1.0 + ratio[..., None, None] * spread.unsqueeze(-2))
    weight = (basis @ shrunk.transpose(-1, -2)).squeeze(-1)
    return RidgeFit(ratio, noise, basis, spread, weight)


def posterior_mean(fit: RidgeFit, choice: Tensor, arms: int) -> Tensor:
    """Posterior mean of each arm's effect, ``E[effect | data] = prior Z^T P y``.

    It sums to 0 over the arms of a row: the mean of a row cannot be told from the trend's constant.

    Args:
        fit: of :func:`ridge`.
        choice: [..., n, rows], int64, as there.
        arms: number of arms.

    Returns:
        [..., rows, arms].
    """
    index = choice.transpose(-1, -2)
    mean = fit.weight.new_zeros((*index.shape[:-1], arms))
    mean = mean.scatter_add_(-1, index, fit.weight.unsqueeze(-2).expand(index.shape))
    return mean * fit.ratio[..., None, None]


def posterior_variance(fit: RidgeFit, choice: Tensor, alive: Tensor) -> Tensor:
    """Posterior variance of each arm's effect less the mean effect of the arms alive in its row.

    From ``Var[effect | data] = prior I - prior^2 Z^T P Z``. Arms of a row are compared with each
    other, and what is not known of all of them alike has no part in that.

    Args:
        fit, choice: as in :func:`posterior_mean`.
        alive: [..., rows, arms], bool.

    Returns:
        [..., rows, arms]; meant for the arms alive.
    """
    share = alive.double() / alive.sum(-1, keepdim=True).clamp(min=1)
    ratio = fit.ratio[..., None, None]
    design = fit.basis.transpose(-1, -2) @ _one_hot(choice, alive.shape[-1])
    seen = design.unflatten(-1, alive.shape[-2:])  # [..., m, rows, arms]
    seen = seen - (seen * share.unsqueeze(-3)).sum(-1, keepdim=True)
    gain = ratio / (1.0 + ratio * fit.spread.unsqueeze(-1))  # [..., m, 1]
    # 1 - 2 share + sum(share^2): the variance of an arm against the mean, before any sample.
    before = 1.0 - 2.0 * share + (share**2).sum(-1, keepdim=True)
    variance = before - (gain.unsqueeze(-1) * seen**2).sum(-3)
    return ratio * fit.noise[..., None, None] * variance.clamp(min=0.0)
