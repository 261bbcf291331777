"""The numbers that a setting may have, said beside it: ``Annotated[int, at_least(1)]``."""

from __future__ import annotations

import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Range", "at_least", "out_of_range"]


@dataclass(frozen=True)
class Range:
    """Metadata of an ``Annotated`` field.

    Args:
        expected: the range in words, for the message of an error.
        least, most: bounds that belong to the range.
        above, below: bounds that do not.
    """

    expected: str
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in the range; NaN never is."""
        return (
            self.least <= value <= self.most
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def at_least(least: float) -> Range:
    """Finite numbers from ``least`` on."""
    return Range(f"{least} or more", least=least, below=math.inf)


def out_of_range(settings: Any) -> Iterator[tuple[str, Range, Any]]:
    """Name, range and value of each field of a dataclass that is not in its range."""
    hints = typing.get_type_hints(type(settings), include_extras=True)
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        for mark in getattr(hints[setting.name], "__metadata__", ()):
            if isinstance(mark, Range) and not mark.holds(value):
                yield setting.name, mark, value
