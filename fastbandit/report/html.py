"""From values to HTML: templates with every value escaped, and the words for values of files.

Templates are for what is written with them, and take any value. The functions that make a piece
(a table, a section) take HTML, of which a page is joined.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastbandit._intervals import wilson

if TYPE_CHECKING:
    from fastbandit.report.reading import Folder

__all__ = [
    "as_text",
    "count",
    "document",
    "duration",
    "empty",
    "finite",
    "folded",
    "get",
    "header",
    "interval",
    "pairs",
    "paragraph",
    "percent",
    "plain_table",
    "render",
    "run_section",
    "section",
    "share",
    "show",
    "table",
    "tile",
    "warning",
    "wide",
]

# Characters of a value that is neither text nor a number.
_LONGEST = 400

# --- text -----------------------------------------------------------------------------------


def as_text(value: Any) -> str:
    """A value from a file as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    text = str(value)
    # A list where a word belongs, in a stranger's file, may be of any length.
    return text if isinstance(value, str) or len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def show(value: Any) -> str:
    """The same, escaped."""
    return escape(as_text(value))


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


def count(value: Any) -> int | None:
    """How many, from a file: a whole number of at most 63 bits; None where it is none."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        return None
    return value


def share(value: Any) -> float | None:
    """A number in [0, 1] from a file; None where it is none."""
    number = finite(value)
    return None if number is None or not 0 <= number <= 1 else number


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    if seconds < 5400:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.2f} h"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("fastbandit.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, str) else as_text(value),
    )
    environment.globals.update(percent=percent, interval=interval, duration=duration)
    return environment


def render(template: str, **values: Any) -> Markup:
    """A template filled in: values that are not ``Markup`` as :func:`as_text` says, escaped."""
    return Markup(_environment().get_template(f"{template}.html").render(values))


def _part(name: str, *values: Any) -> str:
    """A piece of parts.html. Plain text, since its callers join it with HTML of their own."""
    module: Any = _environment().get_template("parts.html").module
    return str(getattr(module, name)(*values))


def header(
    title: str, lines: Sequence[str], *, status: str = "", notes: str = "", source: str = ""
) -> str:
    """What a page begins with: its title and state, lines below it, notes and the source."""
    return _part("header", title, list(map(Markup, lines)), status, Markup(notes), source)


def section(name: str, title: str, body: str, source: str = "") -> str:
    return _part("section", name, title, Markup(body), source)


def run_section(run: Folder, name: str, title: str, body: str, source: str) -> str:
    """A section of one run; on a page of several its title, anchor and source say which one."""
    if not run.key:
        return section(name, title, body, source)
    return section(f"{run.key}-{name}", f"{run.key}: {title}", body, f"{run.label}: {source}")


def warning(body: str) -> str:
    return _part("warning", Markup(body))


def empty(text: str) -> str:
    """What stands where there is nothing to show."""
    return _part("empty", Markup(text))


def folded(summary: str, body: str, *, opened: bool = False) -> str:
    """What is shown when its summary is clicked; ``opened``: from the beginning."""
    return _part("folded", Markup(summary), Markup(body), opened)


def table(
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Sequence[int] = (),
    style: str = "",
) -> str:
    """A table of cells that are HTML already; columns in ``text`` are aligned to the left."""
    cells = [list(map(Markup, row)) for row in rows]
    return _part("table", list(map(Markup, heads)), cells, text, style)


def plain_table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int) -> str:
    """A table of plain text; the first ``left`` columns are aligned to the left."""
    return _part("table", heads, rows, range(left))


def paragraph(words: str) -> str:
    """A paragraph of plain text."""
    return _part("paragraph", words)


def wide(chart: str) -> str:
    """A chart of the page's width, which is scrolled where that is too small to read it."""
    return f'<div class="figure wide">{chart}</div>'


def pairs(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under dotted names."""
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from pairs(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


def tile(name: str, value: str, more: str = "") -> str:
    return _part("tile", Markup(name), Markup(value), Markup(more))


def interval(value: float, n: int | None) -> str:
    """Wilson's interval of a share of ``n`` images, in words; ``n`` as a file has it."""
    n = count(n)
    if not n or share(value) is None:
        return "n not recorded"
    low, high = wilson(value * n, n)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


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
    page = render(
        "page",
        title=as_text(title),
        style=Markup(style),
        header=Markup(header),
        links=links,
        sections=Markup(sections),
        pictures=pictures,
        made=made if dated else "",
    )
    return f"{page}\n"
