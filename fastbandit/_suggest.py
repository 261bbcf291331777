"""What somebody may have meant who wrote a name that is none."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

__all__ = ["did_you_mean", "with_hint"]

_NAMES = re.compile(r"expected (?:one|names) of (?P<known>[^:;]+), got '(?P<given>[^']+)'$")


def did_you_mean(given: str, candidates: Iterable[str]) -> str:
    """``; did you mean NAME?`` with the nearest candidate, or nothing where none is near."""
    names = list(candidates)
    if given in names:
        return ""
    lower = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(given.strip().lower(), lower, n=1)
    return f"; did you mean {lower[near[0]]}?" if near else ""


def with_hint(message: str) -> str:
    """A message that ends with "expected one of A, B, got 'C'", and the nearest of the names."""
    match = _NAMES.search(message)
    if match is None:
        return message
    candidates = [name.strip() for name in match["known"].split(",")]
    return message + did_you_mean(match["given"], candidates)
