"""From values to HTML: templates with every value escaped, and the words for values of files."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fastbandit._intervals import wilson

if TYPE_CHECKING:
    from fastbandit.report.reading import Folder

__all__ = [
    "Section",
    "as_text",
    "count",
    "document",
    "duration",
    "empty",
    "finite",
    "get",
    "interval",
    "pairs",
    "percent",
    "render",
    "section",
    "share",
]

# Characters of a value that is neither text nor a number.
_LONGEST = 400

#: A section of a page: its anchor, its title in the navigation (or none) and its HTML.
Section = tuple[str, str, str]


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


def get(value: Mapping[str, Any] | None, *path: str) -> Any:
    """The value at a path of keys; None where there is none."""
    entry: Any = value
    for key in path:
        if not isinstance(entry, Mapping):
            return None
        entry = entry.get(key)
    return entry


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


def interval(value: float, n: int | None) -> str:
    """Wilson's interval of a share of ``n`` images, in words; ``n`` as a file has it."""
    n = count(n)
    if not n or share(value) is None:
        return "n not recorded"
    low, high = wilson(value * n, n)
    return f"{100 * low:.2f} to {100 * high:.2f} %"


def _number(value: float | None, form: str, factor: float = 1) -> str:
    """A number in a format such as ``.2f``; nothing where there is none."""
    return "" if value is None else format(factor * value, form)


def _limits(share: Mapping[str, float | None], form: str = ".2f") -> str:
    """Ends of an interval in percent or points; nothing where there is none."""
    low, high = share["low"], share["high"]
    if low is None or high is None:
        return ""
    return f"{_number(low, form, 100)} to {_number(high, form, 100)}"


def pairs(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings under dotted names."""
    for key, entry in value.items():
        if isinstance(entry, Mapping) and entry:
            yield from pairs(entry, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", entry


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
    environment.filters.update(number=_number, limits=_limits, text=as_text)
    environment.globals.update(percent=percent, interval=interval, duration=duration)
    return environment


def render(template: str, /, **values: Any) -> Markup:
    """A template filled in: values that are not ``Markup`` as :func:`as_text` says, escaped."""
    return Markup(_environment().get_template(f"{template}.html").render(values))


def section(
    name: str, title: str, source: str, template: str, /, of: Folder | None = None, **values: Any
) -> Markup:
    """A section: its anchor and title, the files its numbers come from, and its template.

    Args:
        of: the one run that it shows; on a page of several, title, anchor and source name it.
        values: what the template is filled with.
    """
    if of is not None and of.key:
        name, title = f"{of.key}-{name}", f"{of.key}: {title}"
        source = f"{of.label}: {source}"
    frame = {"anchor": name, "heading": title, "source": source, "body": f"{template}.html"}
    return render("section", **frame, **values)


def empty(name: str, title: str, source: str, words: str, of: Folder | None = None) -> Markup:
    """A section that has nothing to show yet, and says so."""
    return section(name, title, source, "empty", of=of, words=words)


def document(template: str, title: str, sections: Sequence[Section], /, **values: Any) -> str:
    """A whole page, which forbids scripts and requests; ``values`` are those of its header."""
    style = resources.files("fastbandit").joinpath("_data/report.css").read_text(encoding="utf-8")
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    page = render(
        template,
        title=title,
        style=Markup(style),
        sections=[(name, link, Markup(body)) for name, link, body in sections if body],
        made=made,
        **values,
    )
    return f"{page}\n"
