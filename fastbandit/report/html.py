"""Pieces of HTML: values as escaped text, tables, tiles, sections and intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from typing import Any

from fastbandit._intervals import wilson

__all__ = [
    "duration",
    "finite",
    "get",
    "interval",
    "pairs",
    "percent",
    "section",
    "show",
    "table",
    "tile",
]

# --- text -----------------------------------------------------------------------------------


def show(value: Any) -> str:
    """A value from a file as escaped text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return escape(f"{value:.6g}")
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))


def get(value: Mapping[str, Any] | None, *path: str) -> Any:
    """The value at a path of keys; None where there is none."""
    found: Any = value
    for key in path:
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def finite(value: Any) -> float | None:
    """A number from a file; None where it is none, not finite or too large for one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def section(name: str, title: str, body: str, source: str) -> str:
    return (
        f'<section id="{name}"><h2>{escape(title)}</h2>\n{body}\n'
        f'<p class="source">from {escape(source)}</p></section>'
    )


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Sequence[int] = (),
    style: str = "",
) -> str:
    """A table of cells that are HTML already; columns in ``text`` are aligned to the left."""

    def kind(column: int) -> str:
        return ' class="text"' if column in text else ""

    head = "".join(f"<th{kind(i)}>{name}</th>" for i, name in enumerate(heads))
    body = "\n".join(
        "<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    opening = f'<table class="{style}">' if style else "<table>"
    return (
        f'<div class="scroll">{opening}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def pairs(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under dotted names."""
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from pairs(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def tile(name: str, value: str, more: str = "") -> str:
    extra = f'<dd class="more">{more}</dd>' if more else ""
    return f'<div class="tile"><dt>{name}</dt><dd>{value}</dd>{extra}</div>'


def interval(value: float, n: int | None) -> str:
    if n is None or not 0 <= value <= 1:
        return "n not recorded"
    low, high = wilson(value * n, n)
    return f"{100 * low:.2f} to {100 * high:.2f} %"
