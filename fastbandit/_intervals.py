"""Confidence intervals of a share, which stand beside every accuracy."""

from __future__ import annotations

import math

__all__ = ["sign_test", "wilson"]

# The 97.5 % point of the normal distribution: two-sided intervals of 95 %.
_Z = 1.959963984540054


def wilson(correct: float, n: int) -> tuple[float, float]:
    """95 % interval of a share, ``correct`` of ``n``.

    Args:
        correct: successes, 0 to ``n``.
        n: trials, at least 1.

    Returns:
        Lower and upper end, in [0, 1].

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", 1927.
    """
    if n < 1 or not 0 <= correct <= n:
        raise ValueError(f"wilson: expected 0 <= correct <= n and n >= 1, got {correct} of {n}")
    share, z2 = correct / n, _Z * _Z
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def sign_test(more: int, less: int) -> float:
    """Chance of ``more`` or more heads in ``more + less`` throws of a fair coin.

    For paired outcomes: ``more`` pairs speak for one side and ``less`` for the other.
    """
    if more < 0 or less < 0:
        raise ValueError(f"sign_test: expected counts >= 0, got {more} and {less}")
    n = more + less
    return sum(math.comb(n, k) for k in range(more, n + 1)) / 2**n
