"""Means with intervals, and rank tests: what a comparison over seeds needs, without SciPy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["mann_whitney", "mean_interval", "standard_error", "student_t", "wilcoxon"]


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def student_t(share: float, freedom: int) -> float:
    """Quantile of Student's t distribution, for 0.5 <= share < 1, by integration and bisection."""
    if not 0.5 <= share < 1 or freedom < 1:
        raise ValueError(
            f"student_t: expected 0.5 <= share < 1 and freedom >= 1, got {share}, {freedom}"
        )
    # With x = sqrt(freedom) tan(a) the density becomes cos(a)^(freedom - 1): finite limits.
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def above_half(angle: float) -> float:
        """Simpson's rule over [0, angle]."""
        steps = 400
        width = angle / steps
        total = 0.0
        for i in range(steps + 1):
            weight = 1 if i in (0, steps) else 4 if i % 2 else 2
            total += weight * math.cos(i * width) ** (freedom - 1)
        return scale * total * width / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above_half(middle) < share - 0.5 else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """``(mean, low, high)`` with Student's interval; low and high are NaN for one value.

    Raises:
        ValueError: no value.
    """
    if not values:
        raise ValueError("mean_interval: values: expected at least one, got none")
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = student_t(0.5 + level / 2, len(values) - 1) * standard_error(values)
    return mean, mean - half, mean + half


def _ranks(values: Sequence[float]) -> tuple[list[float], float]:
    """Ranks from 1, ties sharing their mean, and the sum of t^3 - t over groups of t ties."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    ties = 0.0
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for position in order[start:end]:
            ranks[position] = (start + 1 + end) / 2
        ties += (end - start) ** 3 - (end - start)
        start = end
    return ranks, ties


def _two_sided(counts: Sequence[int], value: int) -> float:
    """Two-sided p of ``value`` when ``counts[v]`` of all equally likely cases give v."""
    below, above = sum(counts[: value + 1]), sum(counts[value:])
    return min(1.0, 2 * min(below, above) / sum(counts))


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test for pairs.

    Pairs without a difference are left out. Exact for up to 50 pairs (given the ties), else the
    normal approximation with the correction for ties.

    Source: Wilcoxon, "Individual comparisons by ranking methods", 1945.

    Raises:
        ValueError: unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(
            f"wilcoxon: expected as many values on both sides, got {len(first)} and {len(second)}"
        )
    differences = [a - b for a, b in zip(first, second, strict=True) if a != b]
    n = len(differences)
    if n == 0:
        return 1.0
    ranks, ties = _ranks([abs(d) for d in differences])
    positive = sum(rank for rank, d in zip(ranks, differences, strict=True) if d > 0)
    if n <= 50:
        counts = [1]  # of the sums of subsets of the ranks so far, each doubled: ties have halves
        for rank in (round(2 * rank) for rank in ranks):
            shifted = [0] * rank + counts
            counts = [a + b for a, b in zip(counts + [0] * rank, shifted, strict=True)]
        return _two_sided(counts, round(2 * positive))
    variance = n * (n + 1) * (2 * n + 1) / 24 - ties / 48
    z = (positive - n * (n + 1) / 4) / math.sqrt(variance)
    return math.erfc(abs(z) / math.sqrt(2))


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test for two independent groups.

    Exact for up to 400 pairs of values (given the ties), else the normal approximation with the
    corrections for ties and for continuity.

    Source: Mann and Whitney, "On a test of whether one of two random variables is stochastically
    larger than the other", 1947.

    Raises:
        ValueError: an empty group.
    """
    n, m = len(first), len(second)
    if not n or not m:
        raise ValueError(f"mann_whitney: expected values in both groups, got {n} and {m}")
    ranks, ties = _ranks([*first, *second])
    if n * m <= 400:
        doubled = [round(2 * rank) for rank in ranks]
        # counts[j][v]: subsets of j of the ranks so far, each doubled, whose sum is v.
        counts = [[0] * (sum(doubled) + 1) for _ in range(n + 1)]
        counts[0][0] = 1
        for position, rank in enumerate(doubled, 1):
            for size in range(min(position, n), 0, -1):
                fewer = counts[size - 1]
                shifted = [0] * rank + fewer[: len(fewer) - rank]
                counts[size] = [a + b for a, b in zip(counts[size], shifted, strict=True)]
        return _two_sided(counts[n], sum(doubled[:n]))
    u = sum(ranks[:n]) - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
    if variance == 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))
