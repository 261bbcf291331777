"""Charts as inline SVG text: lines, bars of shares, and the lanes of one bandit's arms.

Nothing here knows a run: numbers in, text out. Colours are classes that the page's style sheet
fills in, so the same drawing serves a light and a dark background. All text is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

__all__ = [
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

#: Classes of the diverging scale of :func:`arm_lanes`, ``d0`` (low) to ``d6`` (high).
DIVERGING_STEPS = 7

# Widths to leave for a character of 11 px, regular and bold: those of a wide face, since the page
# takes whatever sans-serif the reader's system has.
_REGULAR, _BOLD = 6.6, 7.4


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


def number(value: float) -> str:
    """A coordinate, at most two decimals and no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    if not (math.isfinite(low) and math.isfinite(high)) or high <= low:
        return [low] if math.isfinite(low) else []
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((f * power for f in (1, 2, 5) if f * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tick_labels(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as their step needs."""
    if len(values) < 2:
        return [f"{value:.4g}" for value in values]
    step = values[1] - values[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 4:
        return [f"{value:.1e}" for value in values]
    return [f"{value:.{decimals}f}" for value in values]


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _end_label(line: Series) -> str:
    """Name and last value."""
    return f"{line.name} {_finite(line.y)[-1]:.3g}"


def _spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, ``gap`` apart, within [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [0.0] * len(wanted)
    previous = low - gap
    for i in order:
        previous = placed[i] = max(wanted[i], previous + gap)
    limit = high
    for i in reversed(order):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_range: tuple[float, float],
    zero: bool = True,
    events: Sequence[tuple[float, str]] = (),
    notes: Sequence[tuple[float, str]] = (),
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_range: tuple[float, float] | None = None,
    width: int = 1080,
    height: int = 300,
) -> str:
    """Lines over a shared x axis, each labelled at its end.

    Args:
        series: the lines; one with no finite value is left out.
        title: accessible name of the drawing.
        x_label, y_label: axis titles, with the unit.
        x_range: ends of the x axis.
        zero: the y axis starts at 0; otherwise a little below the smallest value.
        events: (x, text) of vertical lines; the text stands above them.
        notes: (x, text) of tooltips, one for each value of x that has one.
        x_ticks: (x, text) of the ticks, for an axis that does not count whole things; one whose
            text would lie on the one before it has no text.
        y_range: ends of the y axis; default: what the values, and ``zero``, ask for.
        width, height: of the view box, in pixels.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    series = [line for line in series if _finite(line.y)]
    if not series:
        return '<p class="empty">Nothing to draw yet.</p>'
    values = [value for line in series for value in _finite(line.y)]
    low, high = min(values), max(values)
    low = min(0.0, low) if zero else low
    if high <= low:
        high = low + (abs(low) or 1.0)
    pad = (high - low) * 0.06
    low, high = (low if zero and low == 0 else low - pad), high + pad
    if y_range is not None:
        low, high = y_range
    x_low, x_high = x_range
    x_high = x_high if x_high > x_low else x_low + 1

    y_ticks = ticks(low, high)
    y_texts = _tick_labels(y_ticks)
    left = 30 + max((len(text) for text in y_texts), default=1) * _REGULAR
    right = 20 + max(len(_end_label(line)) for line in series) * _BOLD
    top, bottom = (28 if events else 12), 42
    inner_w, inner_h = width - left - right, height - top - bottom

    def at_x(value: float) -> float:
        return left + (value - x_low) / (x_high - x_low) * inner_w

    def at_y(value: float) -> float:
        return top + (high - value) / (high - low) * inner_h

    floor = top + inner_h
    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for value, text in zip(y_ticks, y_texts, strict=True):
        y = number(at_y(value))
        parts.append(f'<path class="gridline" d="M{number(left)} {y}H{number(left + inner_w)}"/>')
        parts.append(
            f'<text class="tick" x="{number(left - 6)}" y="{y}" dy=".35em" '
            f'text-anchor="end">{text}</text>'
        )
    if x_ticks is None:
        whole = [x for x in ticks(x_low, x_high, max(2, int(inner_w // 90))) if x % 1 == 0]
        x_ticks = [(value, f"{value:.0f}") for value in whole]
    taken = -math.inf
    for value, text in x_ticks:
        x, half = number(at_x(value)), len(text) * _REGULAR / 2
        parts.append(f'<path class="axis" d="M{x} {number(floor)}v5"/>')
        if at_x(value) - half < taken:
            continue
        taken = at_x(value) + half + 6
        parts.append(
            f'<text class="tick" x="{x}" y="{number(floor + 18)}" '
            f'text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(f'<path class="axis" d="M{number(left)} {number(floor)}h{number(inner_w)}"/>')
    taken = -math.inf
    for value, text in sorted(events):
        line_x, half = at_x(value), len(text) * _REGULAR / 2
        parts.append(f'<path class="event" d="M{number(line_x)} {top - 4}V{number(floor)}"/>')
        # Moved to the right where it would lie on the one before it.
        middle_x = max(line_x, taken + half)
        taken = middle_x + half + 5
        parts.append(
            f'<text class="tick" x="{number(middle_x)}" y="{top - 10}" '
            f'text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(
        f'<text class="label" x="{number(left + inner_w / 2)}" y="{height - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = number(top + inner_h / 2)
    parts.append(
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle})">{escape(y_label)}</text>'
    )

    ends = []
    for line in series:
        path, pen_down, alone, whiskers = [], False, [], []
        for position, (x_value, y_value) in enumerate(zip(line.x, line.y, strict=True)):
            if y_value is None or not math.isfinite(y_value):
                pen_down = False
                continue
            point = f"{number(at_x(x_value))} {number(at_y(y_value))}"
            following = line.y[position + 1] if position + 1 < len(line.y) else None
            if not pen_down and (following is None or not math.isfinite(following)):
                alone.append(point)  # a line of one point would not be seen
            path.append(f"{'L' if pen_down else 'M'}{point}")
            pen_down = True
            last = (x_value, y_value)
            if line.low is not None and line.high is not None:
                bottom_end, top_end = line.low[position], line.high[position]
                if bottom_end is not None and top_end is not None:
                    whiskers.append(
                        f"M{number(at_x(x_value))} {number(at_y(bottom_end))}"
                        f"V{number(at_y(top_end))}m-4 0h8M{number(at_x(x_value) - 4)} "
                        f"{number(at_y(bottom_end))}h8"
                    )
                if point not in alone:
                    alone.append(point)
        dash = " dashed" if line.dashed else ""
        parts.append(f'<path class="line {line.style}{dash}" d="{"".join(path)}"/>')
        if whiskers:
            parts.append(f'<path class="whisker {line.style}" d="{"".join(whiskers)}"/>')
        for point in alone:
            x, y = point.split()
            parts.append(f'<circle class="dot {line.style}" cx="{x}" cy="{y}" r="2.5"/>')
        ends.append(last)
    placed = _spread([at_y(y) for _, y in ends], 15, top + 6, floor - 2)
    for line, end, label_y in zip(series, ends, placed, strict=True):
        end_x, end_y, text_y = at_x(end[0]), number(at_y(end[1])), number(label_y)
        parts.append(f'<circle class="dot {line.style}" cx="{number(end_x)}" cy="{end_y}" r="3"/>')
        # A short leader where the label had to move away from its line's end.
        leader = f"M{number(end_x + 5)} {end_y}L{number(end_x + 12)} {text_y}"
        parts.append(f'<path class="leader {line.style}" d="{leader}"/>')
        parts.append(
            f'<text class="name {line.style}" x="{number(end_x + 15)}" y="{text_y}" dy=".35em">'
            f"{escape(_end_label(line))}</text>"
        )
    if notes:
        half = max(inner_w / (x_high - x_low) / 2, 1.5)
        for value, text in notes:
            parts.append(
                f'<rect class="hover" x="{number(at_x(value) - half)}" y="{top}" '
                f'width="{number(2 * half)}" height="{number(inner_h)}">'
                f"<title>{escape(text)}</title></rect>"
            )
    parts.append("</svg>")
    return "\n".join(parts)


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    x_label: str,
    x_range: tuple[float, float] = (0.0, 1.0),
    width: int = 720,
    bar_height: int = 24,
) -> str:
    """Horizontal bars, one below the other, all from the left end of the axis.

    Args:
        bars: from the top; a value outside ``x_range`` is drawn at its end.
        title: accessible name of the drawing.
        x_label: axis title, with the unit.
        x_range: ends of the axis.
        width, bar_height: in pixels; the height follows from the number of bars.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    if not bars:
        return '<p class="empty">Nothing to draw yet.</p>'
    low, high = x_range
    left = 10 + max(len(bar.label) for bar in bars) * _REGULAR
    right = 14 + max(len(bar.text) for bar in bars) * _BOLD
    top, bottom = 6, 42
    inner, floor = width - left - right, top + bar_height * len(bars)
    height = floor + bottom

    def at(value: float) -> float:
        return left + (min(max(value, low), high) - low) / (high - low) * inner

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    values = ticks(low, high)
    for value, text in zip(values, _tick_labels(values), strict=True):
        x = number(at(value))
        parts.append(f'<path class="gridline" d="M{x} {top}V{floor}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{floor + 16}" text-anchor="middle">{text}</text>'
        )
    for position, bar in enumerate(bars):
        y = top + position * bar_height
        middle = y + bar_height / 2
        parts.append(
            f'<text class="tick" x="{number(left - 7)}" y="{number(middle)}" dy=".35em" '
            f'text-anchor="end">{escape(bar.label)}</text>'
        )
        parts.append(
            f'<rect class="bar {bar.style}" x="{number(left)}" y="{y + 4}" '
            f'width="{number(at(bar.value) - left)}" height="{bar_height - 8}"/>'
        )
        end = at(bar.value)
        if bar.low is not None and bar.high is not None:
            start, end = at(bar.low), max(end, at(bar.high))
            parts.append(
                f'<path class="interval" d="M{number(start)} {number(middle)}H{number(end)}'
                f'm0 -4v8M{number(start)} {number(middle - 4)}v8"/>'
            )
        parts.append(
            f'<text class="name" x="{number(end + 8)}" y="{number(middle)}" dy=".35em">'
            f"{escape(bar.text)}</text>"
        )
        if bar.note:
            parts.append(
                f'<rect class="hover" x="0" y="{y}" width="{width}" height="{bar_height}">'
                f"<title>{escape(bar.note)}</title></rect>"
            )
    parts.append(f'<path class="axis" d="M{number(left)} {top}V{floor}h{number(inner)}"/>')
    parts.append(
        f'<text class="label" x="{number(left + inner / 2)}" y="{height - 8}" '
        f'text-anchor="middle">{escape(x_label)}</text></svg>'
    )
    return "\n".join(parts)


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
    width: int = 560,
    lane_height: int = 12,
) -> str:
    """The life of each arm of one edge: colour by level, a dash at each choice, a cross at its end.

    Args:
        lanes: one for each arm, from the top.
        title: heading of the drawing.
        samples: length of the x axis.
        events: samples at which an arm was abandoned, drawn as vertical lines.
        width, lane_height: in pixels.

    Returns:
        An ``<svg>`` element.
    """
    left = 8 + max((len(lane.name) for lane in lanes), default=0) * _BOLD
    right, top, bottom = 16, 22, 20
    inner = width - left - right
    body = lane_height * len(lanes)
    height = top + body + bottom
    scale = inner / max(samples, 1)
    parts = [
        f'<svg class="lanes" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">',
        f'<text class="title" x="{number(left)}" y="13">{escape(title)}</text>',
    ]
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
    parts.append(f'<g transform="translate({number(left)} {top}) scale({scale:.5f} 1)">')
    parts += [
        f'<path class="lane {name}" stroke-width="{lane_height - 2}" d="{"".join(path)}"/>'
        for name, path in sorted(by_class.items())
    ]
    parts.append(f'<path class="chosen" d="{"".join(chosen)}"/></g>')
    for event in events:
        x = number(left + event * scale)
        parts.append(f'<path class="event" d="M{x} {top - 2}v{body + 4}"/>')
    if crosses:
        parts.append(f'<path class="cross" d="{"".join(crosses)}"/>')
    for position, lane in enumerate(lanes):
        y = top + position * lane_height
        kind = "name kept" if lane.survives else "name gone"
        parts.append(
            f'<text class="{kind}" x="{number(left - 5)}" y="{y + lane_height / 2:g}" dy=".35em" '
            f'text-anchor="end">{escape(lane.name)}</text>'
        )
        parts.append(
            f'<rect class="hover" x="0" y="{y}" width="{width}" height="{lane_height}">'
            f"<title>{escape(lane.note)}</title></rect>"
        )
    floor = top + body
    parts.append(f'<path class="axis" d="M{number(left)} {floor + 2}h{number(inner)}"/>')
    for tick in (x for x in ticks(0, samples, 6) if x % 1 == 0):
        x = number(left + tick * scale)
        parts.append(f'<path class="axis" d="M{x} {floor + 2}v4"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{floor + 17}" text-anchor="middle">{tick:.0f}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts)


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


def whisker_chart(
    groups: Sequence[Points],
    labels: Sequence[str],
    *,
    title: str,
    x_label: str,
    y_label: str,
    joined: bool = True,
    lines: Sequence[tuple[float, str]] = (),
    width: int = 1080,
    height: int = 320,
) -> str:
    """Values with intervals over named places.

    Args:
        groups: what is drawn; several share a place side by side.
        labels: names of the places, from the left. Long ones are turned.
        title: accessible name of the drawing.
        x_label, y_label: axis titles, with the unit.
        joined: a line through the values of a group; for places that are numbers.
        lines: (y, text) of horizontal reference lines.
        width, height: of the view box, in pixels.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    values = [y for group in groups for y in _finite([*group.value, *group.low, *group.high])]
    if not values:
        return '<p class="empty">Nothing to draw yet.</p>'
    values += [y for y, _ in lines]
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(low) * 0.06 or 1.0
    low, high = low - pad, high + pad

    y_ticks = ticks(low, high)
    y_texts = _tick_labels(y_ticks)
    named = [group.name for group in groups] if len(groups) > 1 else []
    left = 30 + max((len(text) for text in y_texts), default=1) * _REGULAR
    right = 24 + max((len(text) * _BOLD for text in [*named, *(t for _, t in lines)]), default=0)
    step = (width - left - right) / max(len(labels), 1)
    longest = max(map(len, labels), default=0) * _REGULAR
    turned = longest > step - 6
    # A turned label reaches down by the sine of its 30 degrees, and to the left of the first place.
    left = max(left, longest * 0.87 - step / 2 + 4) if turned else left
    step = (width - left - right) / max(len(labels), 1)
    top, bottom = 12, 44 + (longest * 0.5 + 4 if turned else 0)
    inner_w, floor = width - left - right, height - bottom

    def at_y(value: float) -> float:
        return top + (high - value) / (high - low) * (floor - top)

    parts = [
        f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">'
    ]
    for value, text in zip(y_ticks, y_texts, strict=True):
        y = number(at_y(value))
        parts.append(f'<path class="gridline" d="M{number(left)} {y}H{number(left + inner_w)}"/>')
        parts.append(
            f'<text class="tick" x="{number(left - 6)}" y="{y}" dy=".35em" '
            f'text-anchor="end">{text}</text>'
        )
    parts.append(f'<path class="axis" d="M{number(left)} {number(floor)}h{number(inner_w)}"/>')
    for place, text in enumerate(labels):
        x, y = number(left + (place + 0.5) * step), number(floor + 18)
        how = f'text-anchor="end" transform="rotate(-30 {x} {y})"' if turned else ""
        how = how or 'text-anchor="middle"'
        parts.append(f'<text class="tick" x="{x}" y="{y}" {how}>{escape(text)}</text>')
    parts.append(
        f'<text class="label" x="{number(left + inner_w / 2)}" y="{height - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
    )
    middle = number((top + floor) / 2)
    parts.append(
        f'<text class="label" x="12" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle})">{escape(y_label)}</text>'
    )
    # Names at the right: (y wanted, class, text), moved apart where they would lie on each other.
    names: list[tuple[float, str, str]] = []
    for value, text in lines:
        y = number(at_y(value))
        parts.append(f'<path class="event" d="M{number(left)} {y}h{number(inner_w)}"/>')
        names.append((at_y(value), "tick", text))
    for order, group in enumerate(groups):
        shift = (order - (len(groups) - 1) / 2) * min(10.0, step / (len(groups) + 1))
        spots = []
        for place, value, below, above in zip(
            group.at, group.value, group.low, group.high, strict=True
        ):
            if not math.isfinite(value):
                continue
            spot = left + (place + 0.5) * step + shift
            spots.append((spot, at_y(value)))
            x, y = number(spot), number(at_y(value))
            text = f"{group.name}, {labels[place]}: {value:.3g}"
            if math.isfinite(below) and math.isfinite(above):
                text += f" ({below:.3g} to {above:.3g})"
                upper, lower = number(at_y(above)), number(at_y(below))
                left_end = number(spot - 4)
                parts.append(
                    f'<path class="line {group.style}" d="M{x} {upper}V{lower}'
                    f'M{left_end} {upper}h8M{left_end} {lower}h8"/>'
                )
            parts.append(
                f'<circle class="dot {group.style}" cx="{x}" cy="{y}" r="3.5">'
                f"<title>{escape(text)}</title></circle>"
            )
        if joined and len(spots) > 1:
            path = "L".join(f"{number(at_x)} {number(y_at)}" for at_x, y_at in spots)
            parts.append(f'<path class="line {group.style} dashed" d="M{path}"/>')
        if named and spots:
            names.append((spots[-1][1], f"name {group.style}", group.name))
    placed = _spread([y for y, _, _ in names], 15, top + 6, floor - 2)
    for (_, kind, text), text_y in zip(names, placed, strict=True):
        parts.append(
            f'<text class="{kind}" x="{number(left + inner_w + 10)}" y="{number(text_y)}" '
            f'dy=".35em">{escape(text)}</text>'
        )
    parts.append("</svg>")
    return "\n".join(parts)
