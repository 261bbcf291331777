"""Statistics of a comparison over seeds: intervals, tests, components of variance.

The rank tests and the quantiles of F are SciPy's (extra ``study``), loaded where they are needed.
"""

from __future__ import annotations

import functools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

__all__ = [
    "EXACT_PAIRS",
    "Components",
    "components",
    "hodges_lehmann",
    "holm",
    "mann_whitney",
    "mean_interval",
    "mean_limits",
    "r_squared",
    "rank_correlation",
    "scipy_stats",
    "smallest_p",
    "spearman",
    "standard_error",
    "student_t",
    "welch",
    "wilcoxon",
]

#: Up to so many pairs of values without ties the Mann-Whitney test is exact.
EXACT_PAIRS = 400
# With ties SciPy enumerates all ways to divide the values; up to so many of them.
_DIVISIONS = 20_000
# Up to so many differences Wilcoxon's test is exact.
_EXACT_DIFFERENCES = 50


def scipy_stats() -> Any:
    """The module ``scipy.stats``.

    Raises:
        ValueError: SciPy is not installed; the message has the command that installs it.
    """
    try:
        from scipy import stats
    except ImportError:
        raise ValueError(
            "statistical tests: expected SciPy, which is not installed; pip install "
            "'fastbandit[study]', or pip install 'scipy>=1.13'"
        ) from None
    return stats


def standard_error(values: Sequence[float]) -> float:
    """Standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


@functools.lru_cache(maxsize=1024)
def student_t(share: float, freedom: float) -> float:
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


def mean_limits(values: Sequence[float]) -> dict[str, float | None]:
    """:func:`mean_interval` for a file: without ends, None, for one value."""
    mean, low, high = mean_interval(values)
    one = len(values) < 2
    return {"mean": mean, "low": None if one else low, "high": None if one else high}


# --- two groups -----------------------------------------------------------------------------


def welch(
    first: Sequence[float], second: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """``(difference, low, high)`` of the means, first less second, with Welch's interval.

    Source: Welch, "The generalization of Student's problem when several different population
    variances are involved", 1947; degrees of freedom after Satterthwaite.

    Raises:
        ValueError: a group of fewer than two values.
    """
    n, m = len(first), len(second)
    if n < 2 or m < 2:
        raise ValueError(f"welch: expected two values or more in both groups, got {n} and {m}")
    difference = statistics.fmean(first) - statistics.fmean(second)
    a, b = statistics.variance(first) / n, statistics.variance(second) / m
    if a + b == 0:
        return difference, difference, difference
    freedom = (a + b) ** 2 / (a * a / (n - 1) + b * b / (m - 1))
    half = student_t(0.5 + level / 2, max(1.0, freedom)) * math.sqrt(a + b)
    return difference, difference - half, difference + half


def hodges_lehmann(first: Sequence[float], second: Sequence[float]) -> float:
    """The median of all differences between a value of the first group and one of the second.

    Source: Hodges and Lehmann, "Estimates of location based on rank tests", 1963.

    Raises:
        ValueError: an empty group.
    """
    if not first or not second:
        raise ValueError(
            f"hodges_lehmann: expected values in both groups, got {len(first)} and {len(second)}"
        )
    return statistics.median(a - b for a in first for b in second)


def mann_whitney(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of the Mann-Whitney test for two independent groups.

    Exact for up to 400 pairs of values without ties, and with ties for up to 20,000 ways to divide
    the values; else the normal approximation with the corrections for ties and for continuity.

    Source: Mann and Whitney, "On a test of whether one of two random variables is stochastically
    larger than the other", 1947; computed by ``scipy.stats.mannwhitneyu``.

    Raises:
        ValueError: an empty group, or no SciPy.
    """
    n, m = len(first), len(second)
    if not n or not m:
        raise ValueError(f"mann_whitney: expected values in both groups, got {n} and {m}")
    stats = scipy_stats()
    different = len({*first, *second})
    if different == 1:
        return 1.0
    method: Any = "asymptotic"
    if different == n + m and n * m <= EXACT_PAIRS:
        method = "exact"
    elif different < n + m and math.comb(n + m, n) <= _DIVISIONS:
        method = stats.PermutationMethod(n_resamples=_DIVISIONS)
    return float(stats.mannwhitneyu(first, second, method=method).pvalue)


def wilcoxon(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided p of Wilcoxon's signed-rank test for pairs.

    Pairs without a difference are left out. Exact for up to 50 others, tied ranks or not: of all
    signs that the differences could have, the share whose sum of positive ranks is as far out.
    Beyond that the normal approximation with the correction for ties, without one for continuity.

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
    if not n:
        return 1.0
    sizes = sorted(abs(one) for one in differences)
    # Twice the mean rank of each size, a whole number.
    ranks, ties = {}, 0
    for size, number in Counter(sizes).items():
        ranks[size] = 2 * bisect_left(sizes, size) + number + 1
        ties += number**3 - number
    positive = sum(ranks[abs(one)] for one in differences if one > 0)
    if n > _EXACT_DIFFERENCES:
        deviation = math.sqrt((n * (n + 1) * (2 * n + 1) - ties / 2) / 24)
        return math.erfc(abs(positive / 2 - n * (n + 1) / 4) / deviation / math.sqrt(2))
    # ways[s]: signs whose positive ranks, each twice, sum to s.
    ways = [1]
    for size in sizes:
        more = [0] * ranks[size] + ways
        ways = [a + b for a, b in zip_longest(ways, more, fillvalue=0)]
    least = min(sum(ways[: positive + 1]), sum(ways[positive:]))
    return min(1.0, 2 * least / 2**n)


def smallest_p(n: int, m: int) -> float:
    """The smallest two-sided p that a rank test of n against m values can give."""
    return min(1.0, 2 / math.comb(n + m, n))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """p of several tests, each adjusted so that all may be read at one level.

    The smallest of k is multiplied by k, the next by k - 1, and so on; none falls below the one
    before it.

    Source: Holm, "A simple sequentially rejective multiple test procedure", 1979.
    """
    adjusted: dict[str, float] = {}
    least = 0.0
    for rank, name in enumerate(sorted(values, key=values.__getitem__)):
        least = max(least, min(1.0, (len(values) - rank) * values[name]))
        adjusted[name] = least
    return {name: adjusted[name] for name in values}


# --- several groups, two variables ----------------------------------------------------------


@dataclass(frozen=True)
class Components:
    """What a one-way analysis of variance with random effects says of groups of repeats.

    Attributes:
        between, within: standard deviations of the groups' true means and of a single value about
            its group's; ``between`` is 0 where the groups differ less than by chance.
        icc: the intraclass correlation, between^2 / (between^2 + within^2); it is not cut at 0.
        low, high: the ends of its interval.
        groups, repeats: how many, and values in each.
    """

    between: float
    within: float
    icc: float
    low: float
    high: float
    groups: int
    repeats: int


def components(values: Sequence[Sequence[float]], level: float = 0.9) -> Components:
    """Components of variance of groups with equally many repeats.

    Args:
        values: the repeats of each group.
        level: of the interval of the correlation.

    Source: Shrout and Fleiss, "Intraclass correlations: uses in assessing rater reliability",
    1979, ICC(1, 1) and its interval by F.

    Raises:
        ValueError: fewer than two groups or repeats, unequal numbers of repeats, or no SciPy.
    """
    counts = {len(group) for group in values}
    k = len(values)
    if k < 2 or len(counts) != 1 or min(counts) < 2:
        raise ValueError(
            "components: expected two groups or more with equally many repeats, two or more; got "
            f"{k} groups of {', '.join(map(str, sorted(counts))) or 'no'} repeats"
        )
    (r,) = counts
    means = [statistics.fmean(group) for group in values]
    among = r * statistics.variance(means)
    inside = statistics.fmean(statistics.variance(group) for group in values)
    between = math.sqrt(max(0.0, (among - inside) / r))
    if inside == 0:
        icc = low = high = 1.0 if among else 0.0
    else:
        f = scipy_stats().f
        ratio, tail = among / inside, 0.5 + level / 2
        lower = ratio / float(f.ppf(tail, k - 1, k * (r - 1)))
        upper = ratio * float(f.ppf(tail, k * (r - 1), k - 1))
        icc, low, high = ((x - 1) / (x + r - 1) for x in (ratio, lower, upper))
    return Components(between, math.sqrt(inside), icc, low, high, k, r)


def spearman(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """Spearman's rank correlation and its two-sided p; None for fewer than three different values.

    Raises:
        ValueError: unequal lengths, or no SciPy.
    """
    if len(first) != len(second):
        raise ValueError(
            f"spearman: expected as many values on both sides, got {len(first)} and {len(second)}"
        )
    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None, None
    result = scipy_stats().spearmanr(first, second)
    return float(result.statistic), float(result.pvalue)


def rank_correlation(
    first: Sequence[float], second: Sequence[float], level: float = 0.95
) -> tuple[float, float, float]:
    """Spearman's rank correlation and its interval, without SciPy; NaN where one side is constant.

    The interval is Fisher's on the z scale with the standard error sqrt(1.06 / (n - 3)) of Fieller,
    Hartley and Pearson, "Tests for rank correlation coefficients", Biometrika 1957; the whole range
    for fewer than four values.
    """
    if len(first) < 2 or len(set(first)) < 2 or len(set(second)) < 2:
        return math.nan, -1.0, 1.0
    rho = statistics.correlation(_ranks(first), _ranks(second))
    if len(first) < 4:
        return rho, -1.0, 1.0
    quantile = statistics.NormalDist().inv_cdf(0.5 + level / 2)
    half = quantile * math.sqrt(1.06 / (len(first) - 3))
    z = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return rho, math.tanh(z - half), math.tanh(z + half)


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 0; equal values share the mean of theirs."""
    ordered = sorted(values)
    return [(bisect_left(ordered, one) + bisect_right(ordered, one) - 1) / 2 for one in values]


def r_squared(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The share of the variance of ``y`` that a straight line over ``x`` explains.

    None for fewer than three values, or where all values of one side are equal.
    """
    if len(x) < 3 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    return statistics.correlation(x, y) ** 2
