"""Shares of images that were classified rightly, as files state them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastbandit._intervals import wilson
from fastbandit.report.html import count, finite, share

__all__ = ["Share", "make_share", "read_share"]


@dataclass(frozen=True)
class Share:
    """Images classified rightly: the share, of how many, and its 95 % interval."""

    accuracy: float
    n: int | None = None
    correct: int | None = None
    low: float | None = None
    high: float | None = None

    @property
    def images(self) -> str:
        return "not recorded" if self.n is None else f"{self.n:,}"

    @property
    def limits(self) -> str:
        """The interval in percent; nothing where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{100 * self.low:.2f} to {100 * self.high:.2f}"


def make_share(
    accuracy: Any, n: Any, correct: Any = None, limits: Any = None, *, where: str, notes: list[str]
) -> Share | None:
    """A share as a file states it; None, with a note, where it states none.

    Args:
        where: file and place, for the notes: a share that is no share, or that is not
            ``correct / n``.
    """
    value, n, correct = share(accuracy), count(n) or None, count(correct)
    if finite(accuracy) is None and correct is not None and n is not None and correct <= n:
        value = correct / n
    if value is None:
        notes.append(f"{where}: accuracy: expected a number in [0, 1], got {accuracy!r:.60}")
        return None
    if correct is not None and n is not None and abs(correct / n - value) > 5e-4:
        notes.append(
            f"{where}: accuracy: expected correct / n = {correct} / {n} = {correct / n:.6g}, "
            f"got {value:.6g}"
        )
    low = high = None
    if isinstance(limits, Sequence) and not isinstance(limits, str) and len(limits) == 2:
        low, high = finite(limits[0]), finite(limits[1])
    if low is not None and high is not None and 0 <= low <= high <= 1:
        return Share(value, n, correct, low, high)
    if n is None:
        return Share(value, None, correct)
    return Share(value, n, correct, *wilson(value * n, n))


def read_share(value: Any, where: str, notes: list[str]) -> Share | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        notes.append(f"{where}: expected an object, got {type(value).__name__}")
        return None
    return make_share(
        value.get("accuracy"),
        value.get("n"),
        value.get("correct"),
        value.get("interval"),
        where=where,
        notes=notes,
    )
