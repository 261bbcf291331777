"""How many networks an arm needs for a difference to be seen."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np

from fastbandit._statistics import EXACT_PAIRS, scipy_stats
from fastbandit.study.compare.config import fewest

__all__ = ["networks_normal", "networks_simulated", "power_table", "rank_power"]

# Nobody trains so many networks for one arm.
_MOST = 5000


def networks_normal(difference: float, sd: float, *, alpha: float, power: float) -> int:
    """Networks of each of two arms for a test of their means, by the normal approximation.

    n = 2 sd^2 (z(1 - alpha/2) + z(power))^2 / difference^2, rounded up: ``sd`` is of the networks
    of one arm, ``alpha`` the two-sided level.
    """
    normal = NormalDist()
    z = normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)
    return max(2, math.ceil(2 * (sd * z / difference) ** 2 - 1e-9))


def rank_power(
    n: int,
    difference: float,
    sd: float,
    other_sd: float | None = None,
    *,
    alpha: float,
    simulations: int = 2000,
    seed: int = 0,
) -> float:
    """Power of the two-sided Mann-Whitney test, n normal values against n, by simulation.

    Args:
        sd, other_sd: of the first and the second group; None: the same.
        simulations: the standard error of the result is sqrt(p (1 - p) / simulations).

    Returns:
        The share of the simulations in which p < alpha.
    """
    stats = scipy_stats()
    generator = np.random.default_rng((seed, n))
    first = generator.normal(difference, sd, (simulations, n))
    second = generator.normal(0.0, sd if other_sd is None else other_sd, (simulations, n))
    method = "exact" if n * n <= EXACT_PAIRS else "asymptotic"
    p = stats.mannwhitneyu(first, second, axis=1, method=method).pvalue
    return float((p < alpha).mean())


def networks_simulated(
    difference: float,
    sd: float,
    *,
    alpha: float,
    power: float,
    simulations: int = 2000,
    seed: int = 0,
) -> int | None:
    """Networks of each of two arms for the Mann-Whitney test, by simulation.

    The smallest n whose simulated power is at least ``power``, by bisection; None above 5,000.
    """

    def enough(n: int) -> bool:
        return power <= rank_power(
            n, difference, sd, alpha=alpha, simulations=simulations, seed=seed
        )

    low = fewest(alpha, 1) - 1  # too few
    high = max(low + 1, networks_normal(difference, sd, alpha=alpha, power=power))
    while not enough(high):
        low, high = high, max(high + 1, math.ceil(high * 1.1))
        if high > _MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def power_table(
    differences: tuple[float, ...],
    sd: float,
    *,
    alpha: float,
    power: float,
    simulations: int,
    seed: int,
) -> list[dict[str, Any]]:
    """One row for each difference: networks of each arm by both ways.

    Args:
        differences: percentage points.
        sd: of the networks of an arm, percentage points.
    """
    rows: list[dict[str, Any]] = []
    for difference in differences:
        normal = networks_normal(difference, sd, alpha=alpha, power=power)
        simulated = None
        # An n beyond this is out of reach, and so is its simulation.
        if normal <= _MOST:
            simulated = networks_simulated(
                difference, sd, alpha=alpha, power=power, simulations=simulations, seed=seed
            )
        rows.append({"difference": difference, "normal": normal, "simulated": simulated})
    return rows
