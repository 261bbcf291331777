"""What somebody may have meant who wrote a name that is none."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["did_you_mean"]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the nearest of ``known``, or nothing where none is near."""
    names = list(known)
    lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(given.strip().lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""
