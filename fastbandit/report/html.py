"""Pieces of HTML: values as escaped text, tables, tiles, sections and intervals."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from fastbandit._intervals import wilson

if TYPE_CHECKING:
    from fastbandit.report.reading import Folder

__all__ = [
    "document",
    "duration",
    "empty",
    "finite",
    "folded",
    "get",
    "header",
    "interval",
    "pairs",
    "percent",
    "run_section",
    "section",
    "show",
    "table",
    "tile",
    "warning",
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


def header(
    title: str, lines: Sequence[str], *, status: str = "", notes: str = "", source: str = ""
) -> str:
    """What a page begins with: its title and state, lines below it, notes and the source."""
    state = f' <span class="status {status}">{status}</span>' if status else ""
    parts = [f"<h1>{show(title)}{state}</h1>", *lines]
    if source:
        parts += [notes, f'<p class="source">from {escape(source)}</p>']
    return "<header>" + "\n".join(parts) + "</header>"


def section(name: str, title: str, body: str, source: str = "") -> str:
    named = f'\n<p class="source">from {escape(source)}</p>' if source else ""
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{body}{named}</section>'


def run_section(run: Folder, name: str, title: str, body: str, source: str) -> str:
    """A section of one run; on a page of several its title, anchor and source say which one."""
    if not run.key:
        return section(name, title, body, source)
    return section(f"{run.key}-{name}", f"{run.key}: {title}", body, f"{run.label}: {source}")


def warning(body: str) -> str:
    return f'<div class="warning">{body}</div>'


def empty(words: str) -> str:
    """What stands where there is nothing to show."""
    return f'<p class="empty">{words}</p>'


def folded(summary: str, body: str, *, opened: bool = False) -> str:
    """What is shown when its summary is clicked; ``opened``: from the beginning."""
    state = " open" if opened else ""
    return f"<details{state}><summary>{summary}</summary>{body}</details>"


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


_FOOTER = """<footer><p class="source">this page was made on {made} from the files of the
run folder; equation numbers are those of Zhang, Xu et al., “Binary Neural Networks”, section 4.2
(Chen et al., “Anti-Bandit Neural Architecture Search for Model Defense”, ECCV 2020)</p></footer>
"""


def document(
    title: str,
    header: str,
    links: Sequence[tuple[str, str]],
    sections: str,
    *,
    pictures: bool = False,
    dated: bool = True,
) -> str:
    """A whole page, which forbids scripts and requests; its pieces but the title are HTML.

    ``dated``: it ends with the time at which it was made and the source of its equations.
    """
    style = resources.files("fastbandit").joinpath("_data/report.css").read_text(encoding="utf-8")
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    anchors = "\n".join(f'<a href="#{name}">{show(text)}</a>' for name, text in links)
    nav = f"<nav>{anchors}</nav>\n" if links else ""
    footer = _FOOTER.format(made=made) if dated else ""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if pictures:
        policy += "; img-src data:"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{show(title)}</title>
<style>
{style}</style>
</head>
<body>
{header}
{nav}<main>
{sections}
</main>
{footer}</body>
</html>
"""
