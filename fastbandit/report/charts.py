"""Charts as inline SVG text: lines, bars of shares, and the lanes of one bandit's arms.

Nothing here knows a run: numbers in, text out. Colours are classes that the page's style sheet
fills in, so the same drawing serves a light and a dark background. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from fastbandit.report.axes import (
    BOLD,
    END,
    MIDDLE,
    NOTHING,
    REGULAR,
    Axes,
    Drawing,
    drawable,
    number,
    padded,
    tick_labels,
    ticks,
)

__all__ = [
    "SMALL",
    "STYLES",
    "Bar",
    "Lane",
    "Points",
    "Series",
    "arm_lanes",
    "bar_chart",
    "line_chart",
    "ticks",
    "whisker_chart",
]

#: Classes of colour of lines and bars.
STYLES = ("s1", "s2", "s3", "s4", "s5", "s6")

#: Size of a chart of which two stand side by side.
SMALL: dict[str, Any] = {"width": 540, "height": 230}

#: Classes of the diverging scale of :func:`arm_lanes`, ``d0`` (low) to ``d6`` (high).
DIVERGING_STEPS = 7


@dataclass(frozen=True)
class Series:
    """One line: ``x`` and ``y`` of equal length; None or NaN in ``y`` breaks the line.

    ``style`` is the class of its colour, one of ``STYLES``; ``dashed`` lets a line that may lie
    on another be seen. ``low`` and ``high``, where given, are the ends of an interval at each
    point; then the points themselves are marked too.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str
    dashed: bool = False
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None


@dataclass(frozen=True)
class Bar:
    """One bar from 0 to ``value``, with an interval where both ends are given.

    ``label`` stands left of it, ``text`` right of it, ``note`` is its tooltip.
    """

    label: str
    value: float
    text: str
    style: str
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Lane:
    """One arm over time.

    Args:
        name: operation.
        note: tooltip.
        level: class index of the diverging scale for each sample, -1 where the arm has not been
            tried; its length is the arm's life in samples.
        chosen: samples at which the arm was chosen.
        survives: False where the arm was abandoned at the end of ``level``.
    """

    name: str
    note: str
    level: Sequence[int]
    chosen: Sequence[int]
    survives: bool


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if drawable(value)]


def _end_label(line: Series) -> str:
    """Name and last value."""
    return f"{line.name} {_finite(line.y)[-1]:.3g}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    events: Sequence[tuple[float, str]] = (),
    notes: Sequence[tuple[float, str]] = (),
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_range: tuple[float, float] | None = None,
    width: int = 1080,
    height: int = 300,
) -> Markup:
    """Lines over a shared x axis, each labelled at its end.

    Args:
        series: the lines; one with no finite value is left out.
        title: accessible name of the drawing.
        x_label, y_label: axis titles, with the unit.
        x_range: ends of the x axis.
        events: (x, text) of vertical lines; the text stands above them.
        notes: (x, text) of tooltips, one for each value of x that has one.
        x_ticks: (x, text) of the ticks, for an axis that does not count whole things; one whose
            text would lie on the one before it has no text.
        y_range: ends of the y axis; default: from 0, or from below the smallest value.
        width, height: of the view box, in pixels.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    series = [line for line in series if _finite(line.y)]
    if not series:
        return NOTHING
    if y_range is None:
        values = [0.0, *(value for line in series for value in _finite(line.y))]
        low, high = min(values), max(values) if any(values) else 1.0
        pad = (high - low) * 0.06
        y_range = (low - pad if low < 0 else 0.0), high + pad
    x_low, x_high = x_range
    x_high = x_high if x_high > x_low else x_low + 1

    right = 20 + max(len(_end_label(line)) for line in series) * BOLD
    above = 28 if events else 12
    axes = Axes(title, y_range, width=width, height=height, top=above, bottom=42, right=right)

    def at_x(value: float) -> float:
        return axes.left + (value - x_low) / (x_high - x_low) * axes.inner

    axes.begin()
    if x_ticks is None:
        whole = [x for x in ticks(x_low, x_high, max(2, int(axes.inner // 90))) if x % 1 == 0]
        x_ticks = [(value, f"{value:.0f}") for value in whole]
    top, floor = axes.top, number(axes.floor)
    axes.marks([(at_x(value), text) for value, text in x_ticks])
    axes.base()
    taken = -math.inf
    for value, text in sorted(events):
        line_x, half = at_x(value), len(text) * REGULAR / 2
        axes.path("event", f"M{number(line_x)} {top - 4}V{floor}")
        # Moved to the right where it would lie on the one before it.
        middle_x = max(line_x, taken + half)
        taken = middle_x + half + 5
        axes.text("tick", number(middle_x), f"{top - 10}", text, MIDDLE)
    axes.name(x_label, y_label)
    ends = [_draw_line(axes, line, at_x) for line in series]
    placed = axes.spread([y for _, y in ends])
    for line, (end_x, y), label_y in zip(series, ends, placed, strict=True):
        end_y, text_y = number(y), number(label_y)
        axes.dot(line.style, number(end_x), end_y, 3)
        # A short leader where the label had to move away from its line's end.
        leader = f"M{number(end_x + 5)} {end_y}L{number(end_x + 12)} {text_y}"
        axes.path(f"leader {line.style}", leader)
        text_x = number(end_x + 15)
        axes.text(f"name {line.style}", text_x, text_y, _end_label(line), 'dy=".35em"')
    half = max(axes.inner / (x_high - x_low) / 2, 1.5)
    size = number(2 * half), number(axes.floor - top)
    for x_value, text in notes:
        axes.hover(number(at_x(x_value) - half), top, *size, text)
    return axes.svg()


def _draw_line(axes: Axes, line: Series, at_x: Callable[[float], float]) -> tuple[float, float]:
    """One line with its intervals; where it ends, in pixels."""
    path, pen_down, alone, whiskers = [], False, [], []
    end = (0.0, 0.0)
    for position, (x_value, y_value) in enumerate(zip(line.x, line.y, strict=True)):
        if not drawable(y_value):
            pen_down = False
            continue
        end = at_x(x_value), axes.y(y_value)
        point = f"{number(end[0])} {number(end[1])}"
        following = line.y[position + 1] if position + 1 < len(line.y) else None
        if not pen_down and not drawable(following):
            alone.append(point)  # a line of one point would not be seen
        path.append(f"{'L' if pen_down else 'M'}{point}")
        pen_down = True
        if line.low is not None and line.high is not None:
            low, high = line.low[position], line.high[position]
            if low is not None and high is not None:
                whiskers.append(
                    f"M{number(end[0])} {number(axes.y(low))}V{number(axes.y(high))}m-4 0h8"
                    f"M{number(end[0] - 4)} {number(axes.y(low))}h8"
                )
            if point not in alone:
                alone.append(point)
    axes.path(f"line {line.style}{' dashed' if line.dashed else ''}", "".join(path))
    if whiskers:
        axes.path(f"whisker {line.style}", "".join(whiskers))
    for point in alone:
        x, y = point.split()
        axes.dot(line.style, x, y, 2.5)
    return end


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    x_label: str,
    width: int = 720,
) -> Markup:
    """Horizontal bars, one below the other, all from the left end of the axis.

    Args:
        bars: shares, from the top; a value outside [0, 1] is drawn at that end.
        title: accessible name of the drawing.
        x_label: axis title, with the unit.
        width: in pixels; the height follows from the number of bars.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    if not bars:
        return NOTHING
    bar_height = 24
    left = 10 + max(len(bar.label) for bar in bars) * REGULAR
    right = 14 + max(len(bar.text) for bar in bars) * BOLD
    top, bottom = 6, 42
    inner, floor = width - left - right, top + bar_height * len(bars)
    height = floor + bottom

    def at(value: float) -> float:
        return left + min(max(value, 0.0), 1.0) * inner

    chart = Drawing()
    chart.open("chart", width, height, title)
    values = ticks(0.0, 1.0)
    for value, text in zip(values, tick_labels(values), strict=True):
        x = number(at(value))
        chart.path("gridline", f"M{x} {top}V{floor}")
        chart.text("tick", x, f"{floor + 16}", text, MIDDLE)
    for position, bar in enumerate(bars):
        y = top + position * bar_height
        middle = y + bar_height / 2
        chart.text("tick", number(left - 7), number(middle), bar.label, END)
        chart.parts.append(
            f'<rect class="bar {bar.style}" x="{number(left)}" y="{y + 4}" '
            f'width="{number(at(bar.value) - left)}" height="{bar_height - 8}"/>'
        )
        end = at(bar.value)
        if bar.low is not None and bar.high is not None:
            start, end = at(bar.low), max(end, at(bar.high))
            line = f"M{number(start)} {number(middle)}H{number(end)}m0 -4v8"
            chart.path("interval", f"{line}M{number(start)} {number(middle - 4)}v8")
        chart.text("name", number(end + 8), number(middle), bar.text, 'dy=".35em"')
        if bar.note:
            chart.hover("0", y, f"{width}", f"{bar_height}", bar.note)
    chart.path("axis", f"M{number(left)} {top}V{floor}h{number(inner)}")
    chart.text("label", number(left + inner / 2), f"{height - 8}", x_label, MIDDLE)
    return chart.svg()


def _runs(level: Sequence[int]) -> list[tuple[int, int, int]]:
    """(value, start, length) of each run of equal values."""
    values = np.asarray(level, dtype=np.int64)
    if not len(values):
        return []
    starts = np.flatnonzero(np.r_[True, values[1:] != values[:-1]])
    lengths = np.diff(np.r_[starts, len(values)])
    return [(int(values[s]), int(s), int(n)) for s, n in zip(starts, lengths, strict=True)]


def arm_lanes(
    lanes: Sequence[Lane],
    *,
    title: str,
    samples: int,
    events: Sequence[int] = (),
) -> Markup:
    """The life of each arm of one edge: colour by level, a dash at each choice, a cross at its end.

    Args:
        lanes: one for each arm, from the top.
        title: heading of the drawing.
        samples: length of the x axis.
        events: samples at which an arm was abandoned, drawn as vertical lines.

    Returns:
        An ``<svg>`` element.
    """
    width, lane_height = 560, 12
    left = 8 + max((len(lane.name) for lane in lanes), default=0) * BOLD
    right, top, bottom = 16, 22, 20
    inner = width - left - right
    body = lane_height * len(lanes)
    height = top + body + bottom
    scale = inner / max(samples, 1)
    chart = Drawing()
    chart.open("lanes", width, height, title)
    chart.text("title", number(left), "13", title)
    by_class: dict[str, list[str]] = {}
    chosen: list[str] = []
    crosses: list[str] = []
    for position, lane in enumerate(lanes):
        middle = position * lane_height + lane_height // 2
        for value, start, length in _runs(lane.level):
            name = f"d{value}" if value >= 0 else "untried"
            by_class.setdefault(name, []).append(f"M{start} {middle}h{length}")
        chosen += [f"M{sample} {middle}h1" for sample in lane.chosen]
        if not lane.survives:
            corner_x = left + len(lane.level) * scale + 2
            crosses.append(f"M{number(corner_x)} {number(top + middle - 2.5)}l5 5m0-5l-5 5")
    # One user unit is one sample in x and one pixel in y, so paths need whole numbers only.
    chart.parts.append(f'<g transform="translate({number(left)} {top}) scale({scale:.5f} 1)">')
    for name, lives in sorted(by_class.items()):
        chart.path(f"lane {name}", "".join(lives), f' stroke-width="{lane_height - 2}"')
    chart.path("chosen", "".join(chosen))
    chart.parts.append("</g>")
    for event in events:
        chart.path("event", f"M{number(left + event * scale)} {top - 2}v{body + 4}")
    if crosses:
        chart.path("cross", "".join(crosses))
    for position, lane in enumerate(lanes):
        y = top + position * lane_height
        kind = "name kept" if lane.survives else "name gone"
        chart.text(kind, number(left - 5), f"{y + lane_height / 2:g}", lane.name, END)
        chart.hover("0", y, f"{width}", f"{lane_height}", lane.note)
    floor = top + body
    chart.path("axis", f"M{number(left)} {floor + 2}h{number(inner)}")
    for tick in (x for x in ticks(0, samples, 6) if x % 1 == 0):
        x = number(left + tick * scale)
        chart.path("axis", f"M{x} {floor + 2}v4")
        chart.text("tick", x, f"{floor + 17}", f"{tick:.0f}", MIDDLE)
    return chart.svg()


Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Points:
    """One group of a :func:`whisker_chart`: a value and its interval at some of the places.

    ``at`` are positions in the chart's labels, in ascending order; ``style`` is the class of the
    colour, ``s1`` to ``s4``.
    """

    name: str
    at: Sequence[int]
    value: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    style: str

    @classmethod
    def of(cls, name: str, at: Sequence[int], rows: Rows, style: str, factor: float = 1) -> Points:
        """The mean, low and high of rows, each times ``factor``; None is not drawn."""
        mean, low, high = (
            [math.nan if row[key] is None else factor * row[key] for row in rows]
            for key in ("mean", "low", "high")
        )
        return cls(name, at, mean, low, high, style)


def whisker_chart(
    groups: Sequence[Points],
    labels: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    joined: bool = True,
    lines: Sequence[tuple[float, str]] = (),
    height: int = 320,
) -> Markup:
    """Values with intervals over named places.

    Args:
        groups: what is drawn; several share a place side by side.
        labels: names of the places, from the left. Long ones are turned.
        title: accessible name of the drawing.
        x_label, y_label: axis titles, with the unit.
        joined: a line through the values of a group; for places that are numbers.
        lines: (y, text) of horizontal reference lines.
        height: of the view box, in pixels; its width is 1080.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    values = [y for group in groups for y in _finite([*group.value, *group.low, *group.high])]
    if not values:
        return NOTHING
    values += [y for y, _ in lines]
    named = [group.name for group in groups] if len(groups) > 1 else []
    right = 24 + max((len(text) * BOLD for text in [*named, *(t for _, t in lines)]), default=0)
    axes = Axes(title, padded(values), width=1080, height=height, top=12, bottom=44, right=right)
    step = axes.inner / max(len(labels), 1)
    longest = max(map(len, labels), default=0) * REGULAR
    turned = longest > step - 6
    if turned:
        # A turned label reaches down by the sine of its 30 degrees, and left of the first place.
        axes.left = max(axes.left, longest * 0.87 - step / 2 + 4)
        axes.bottom += longest * 0.5 + 4
    step = axes.inner / max(len(labels), 1)

    axes.begin()
    axes.base()
    for place, text in enumerate(labels):
        x, y = number(axes.left + (place + 0.5) * step), number(axes.floor + 18)
        how = f'text-anchor="end" transform="rotate(-30 {x} {y})"' if turned else ""
        axes.text("tick", x, y, text, how or MIDDLE)
    axes.name(x_label, y_label)
    # Names at the right: (y wanted, class, text).
    names: list[tuple[float, str, str]] = []
    for value, text in lines:
        y = number(axes.y(value))
        axes.path("event", f"M{number(axes.left)} {y}h{number(axes.inner)}")
        names.append((axes.y(value), "tick", text))
    for order, group in enumerate(groups):
        shift = (order - (len(groups) - 1) / 2) * min(10.0, step / (len(groups) + 1))
        spots = []
        for place, value, below, above in zip(
            group.at, group.value, group.low, group.high, strict=True
        ):
            if not drawable(value):
                continue
            spot, height_of = axes.left + (place + 0.5) * step + shift, axes.y(value)
            spots.append((spot, height_of))
            x, y = number(spot), number(height_of)
            text = f"{group.name}, {labels[place]}: {value:.3g}"
            if drawable(below) and drawable(above):
                text += f" ({below:.3g} to {above:.3g})"
                axes.whisker(group.style, spot, below, above, 4)
            axes.dot(group.style, x, y, 3.5, text)
        if joined and len(spots) > 1:
            path = "L".join(f"{number(at_x)} {number(y_at)}" for at_x, y_at in spots)
            axes.path(f"line {group.style} dashed", f"M{path}")
        if named and spots:
            names.append((spots[-1][1], f"name {group.style}", group.name))
    placed = axes.spread([y for y, _, _ in names])
    for (_, kind, text), text_y in zip(names, placed, strict=True):
        x = number(axes.left + axes.inner + 10)
        axes.text(kind, x, number(text_y), text, 'dy=".35em"')
    return axes.svg()
