"""The statistics of a comparison: tests, intervals, components of variance, numbers of networks."""

from __future__ import annotations

import itertools
import math
import random
import re
import statistics
import sys

import pytest

from fastbandit._statistics import (
    components,
    hodges_lehmann,
    holm,
    mann_whitney,
    r_squared,
    scipy_stats,
    smallest_p,
    spearman,
    student_t,
    welch,
    wilcoxon,
)
from fastbandit.study import StudyConfig, study
from fastbandit.study.compare.config import fewest
from fastbandit.study.compare.power import (
    networks_normal,
    networks_simulated,
    power_table,
    rank_power,
)

# --- rank tests ---------------------------------------------------------------------------------


def enumerated(first, second):
    """Two-sided p of the rank sum by all ways to divide the values."""
    values = [*first, *second]
    ranks = [sum(v < x for v in values) + (sum(v == x for v in values) + 1) / 2 for x in values]
    sums = [sum(chosen) for chosen in itertools.combinations(ranks, len(first))]
    mine = sum(ranks[: len(first)])
    below = sum(s <= mine + 1e-9 for s in sums) / len(sums)
    above = sum(s >= mine - 1e-9 for s in sums) / len(sums)
    return min(1.0, 2 * min(below, above))


@pytest.mark.parametrize(("n", "m"), [(3, 5), (6, 6), (2, 9)])
@pytest.mark.parametrize("ties", [False, True])
def test_mann_whitney_is_exact_for_few_values(n, m, ties):
    draw = random.Random(n + 10 * m)
    for _ in range(4):
        first = [draw.gauss(0.8, 1) for _ in range(n)]
        second = [draw.gauss(0, 1) for _ in range(m)]
        if ties:
            first, second = ([round(x) for x in values] for values in (first, second))
        assert mann_whitney(first, second) == pytest.approx(enumerated(first, second))


def test_mann_whitney_with_many_ties_takes_the_correction_for_ties():
    first, second = [1, 2, 2, 3, 3, 3, 4, 5, 5, 5], [1, 1, 1, 2, 2, 2, 2, 3, 3, 4]
    expected = scipy_stats().mannwhitneyu(first, second, method="asymptotic").pvalue
    assert mann_whitney(first, second) == pytest.approx(expected)
    assert mann_whitney(first, second) == pytest.approx(enumerated(first, second), rel=0.1)


def test_wilcoxon_is_exact_for_few_pairs_with_ties():
    differences = [1, 1, -2, 3, 3, -1, 4]
    ranks = [2, 2, 4, 5.5, 5.5, 2, 7]
    mine = sum(rank for rank, d in zip(ranks, differences, strict=True) if d > 0)
    signs = itertools.product((0, 1), repeat=len(ranks))
    sums = [sum(r for r, s in zip(ranks, each, strict=True) if s) for each in signs]
    p = 2 * min(sum(s <= mine for s in sums), sum(s >= mine for s in sums)) / len(sums)
    assert wilcoxon([*differences, 5], [0] * 7 + [5]) == pytest.approx(min(1.0, p))


@pytest.mark.parametrize(("n", "ties"), [(14, False), (50, False), (51, False), (90, True)])
def test_wilcoxon_says_itself_which_method_it_takes(n, ties):
    """Whatever a release of SciPy takes by default."""
    draw = random.Random(n)
    differences = [draw.gauss(0.3, 1) for _ in range(n)]
    if ties:
        differences = [one for x in differences if (one := round(2 * x))]
    method = "exact" if n <= 50 else "asymptotic"
    expected = scipy_stats().wilcoxon(differences, method=method).pvalue
    assert wilcoxon(differences, [0] * len(differences)) == pytest.approx(expected)


def test_wilcoxon_is_exact_for_more_pairs_with_ties():
    differences = [1, 2, 2, -3, 4, 4, 4, -1, 5, 6, 7, -2]
    permuted = scipy_stats().PermutationMethod(n_resamples=2**12)
    expected = scipy_stats().wilcoxon(differences, method=permuted).pvalue
    assert wilcoxon(differences, [0] * 12) == pytest.approx(expected)
    approximate = scipy_stats().wilcoxon(differences, method="asymptotic").pvalue
    assert wilcoxon(differences, [0] * 12) != pytest.approx(approximate, rel=0.01)


def test_the_smallest_p_of_a_rank_test():
    # What arithmetic allows 3 against 6, 4 against 6, 5 against 5 networks.
    assert smallest_p(3, 6) == pytest.approx(0.0238, abs=5e-5)
    assert smallest_p(4, 6) == pytest.approx(0.0095, abs=5e-5)
    assert smallest_p(5, 5) == pytest.approx(0.0079, abs=5e-5)
    for n, m in ((3, 6), (5, 5)):
        extreme = mann_whitney([10 + i for i in range(n)], list(range(m)))
        assert smallest_p(n, m) == pytest.approx(extreme)


def test_holm_by_hand():
    # 0.005 x 4, 0.01 x 3, 0.03 x 2; 0.04 x 1 is raised to what is before it.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.7, "b": 0.6}) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.2}) == {"a": 0.2}
    assert holm({}) == {}


def test_scipy_is_named_with_its_command_where_it_is_missing(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'fastbandit[study]'")):
        mann_whitney([1, 2], [3, 4])
    # Said before anything is simulated.
    with pytest.raises(ValueError, match="expected SciPy, which is not installed"):
        study(StudyConfig(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- intervals and correlations -----------------------------------------------------------------


def test_welch_against_scipy_and_by_hand():
    first, second = [3.0, 5.0, 4.0, 8.0], [1.0, 2.5, 2.0]
    found = scipy_stats().ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert welch(first, second) == pytest.approx((5 - 5.5 / 3, found.low, found.high))
    # Equal sizes and variances: Student's interval with 2 n - 2 degrees of freedom.
    assert welch([1, 3], [0, 2]) == pytest.approx(
        (1, 1 - student_t(0.975, 2) * math.sqrt(2), 1 + student_t(0.975, 2) * math.sqrt(2))
    )
    assert welch([2, 2], [1, 1]) == (1, 1, 1)
    with pytest.raises(ValueError, match="two values or more in both groups, got 1 and 2"):
        welch([1], [2, 3])


def test_student_quantiles_of_broken_degrees_of_freedom():
    for freedom in (1.0, 2.5, 17.31):
        expected = scipy_stats().t.ppf(0.975, freedom)
        assert student_t(0.975, freedom) == pytest.approx(expected, rel=1e-5)


def test_hodges_lehmann_by_hand():
    # Differences 1, 2, 4; -1, 0, 2; 8, 9, 11.
    assert hodges_lehmann([3, 1, 10], [2, 1, -1]) == 2
    with pytest.raises(ValueError, match="expected values in both groups, got 0 and 1"):
        hodges_lehmann([], [1])


def test_correlations():
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16])[0] == pytest.approx(1.0)
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / 60.
    assert spearman([1, 2, 3, 4], [20, 10, 40, 30])[0] == pytest.approx(0.6)
    assert spearman([1, 1, 1], [1, 2, 3]) == (None, None)
    assert r_squared([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    # Slope 1/2; residuals 1/2, -1, 1/2 of a total of 2.
    assert r_squared([0, 1, 2], [1, 0, 2]) == pytest.approx(0.25)
    assert r_squared([1, 2], [1, 2]) is None
    with pytest.raises(ValueError, match="as many values on both sides, got 1 and 2"):
        spearman([1], [1, 2])


# --- components of variance ---------------------------------------------------------------------


def test_components_by_hand():
    # Means 2, 4, 9; variance of them 13, so the mean square between is 26; within 2, 2, 8: 4.
    found = components([[1, 3], [3, 5], [7, 11]])
    assert (found.groups, found.repeats) == (3, 2)
    assert found.within == pytest.approx(2.0)
    assert found.between == pytest.approx(math.sqrt((26 - 4) / 2))
    assert found.icc == pytest.approx((26 - 4) / (26 + 4))
    # 95 % points of F with 2 and 3, and with 3 and 2 degrees of freedom, from the tables.
    low, high = 26 / 4 / 9.552, 26 / 4 * 19.164
    assert found.low == pytest.approx((low - 1) / (low + 1), abs=1e-3)
    assert found.high == pytest.approx((high - 1) / (high + 1), abs=1e-3)


def test_components_are_recovered_and_their_interval_covers():
    draw, covered, between, within = random.Random(1), 0, [], []
    for _ in range(200):
        groups = [
            [mean + draw.gauss(0, 3.0) for _ in range(2)]
            for mean in (draw.gauss(0, 2.1) for _ in range(24))
        ]
        found = components(groups)
        between.append(found.between**2)
        within.append(found.within**2)
        covered += found.low <= 2.1**2 / (2.1**2 + 3.0**2) <= found.high
    # Cutting at 0 raises the mean of between^2 a little.
    assert statistics.fmean(between) == pytest.approx(2.1**2, rel=0.15)
    assert statistics.fmean(within) == pytest.approx(9.0, rel=0.06)
    assert abs(covered / 200 - 0.9) < 4 * math.sqrt(0.09 / 200)


def test_components_without_noise_and_wrong_ones():
    same = components([[1, 1], [2, 2]])
    assert (same.icc, same.within) == (1.0, 0.0)
    worse = components([[1, 5], [5, 1], [2, 4]])
    assert worse.between == 0.0
    assert worse.icc == -1.0
    for values in ([[1, 2]], [[1], [2]], [[1, 2], [1, 2, 3]]):
        with pytest.raises(ValueError, match="expected two groups or more with equally many"):
            components(values)


# --- how many networks --------------------------------------------------------------------------


# Networks of each arm, p < 0.01, power 0.9, for 0.5, 1, 1.5, 2, 3, 5 points.
@pytest.mark.parametrize(
    ("between", "within", "expected"),
    [
        (1.1, 1.2, [316, 79, 36, 20, 9, 4]),
        (1.6, 0.8, [381, 96, 43, 24, 11, 4]),
        (2.5, 2.2, [1321, 331, 147, 83, 37, 14]),
    ],
)
def test_the_normal_approximation(between, within, expected):
    sd = math.hypot(between, within)
    found = [
        networks_normal(difference, sd, alpha=0.01, power=0.9)
        for difference in (0.5, 1, 1.5, 2, 3, 5)
    ]
    # The figures were rounded one way or the other.
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True)), found


# Simulated elsewhere: found networks with sd 2.0 against random ones with sd 3.5.
@pytest.mark.parametrize(
    ("n", "difference", "power"),
    [(12, 5, 0.86), (16, 5, 0.96), (24, 3, 0.76), (32, 3, 0.91), (32, 2, 0.52)],
)
def test_the_power_of_the_rank_test(n, difference, power):
    found = rank_power(n, difference, 2.0, 3.5, alpha=0.01, simulations=2000)
    # The other simulation was of about a thousand; four standard errors of both.
    error = math.sqrt(power * (1 - power) * (1 / 2000 + 1 / 1000))
    assert abs(found - power) < 4 * error


def test_without_a_difference_the_rank_test_keeps_its_level():
    found = rank_power(8, 0.0, 1.0, alpha=0.05, simulations=4000)
    # 8 against 8 have a level of 0.0499; four standard errors.
    assert abs(found - 0.0499) < 4 * math.sqrt(0.05 * 0.95 / 4000)


def test_the_simulated_number_is_the_smallest_one():
    arguments = {"alpha": 0.01, "simulations": 1000, "seed": 3}
    n = networks_simulated(2.0, 1.6, power=0.9, **arguments)
    assert rank_power(n, 2.0, 1.6, **arguments) >= 0.9
    assert rank_power(n - 1, 2.0, 1.6, **arguments) < 0.9
    assert n >= networks_normal(2.0, 1.6, alpha=0.01, power=0.9)
    # Where the approximation says 2 or 3, no rank test can reach the level.
    assert networks_simulated(20.0, 1.0, power=0.9, **arguments) == 5


def test_the_table_gives_up_on_what_is_out_of_reach():
    (row,) = power_table((0.01,), 5.0, alpha=0.01, power=0.9, simulations=100, seed=0)
    assert row["simulated"] is None
    assert row["normal"] > 5000


def test_fewest_networks_that_can_show_anything():
    assert fewest(0.01, 1) == 5
    # 5 against 5 can give 0.0079, twice that is above 0.01.
    assert fewest(0.01, 2) == 6
    assert fewest(0.05, 2) == 5
    assert fewest(1e-6, 1) == 12
