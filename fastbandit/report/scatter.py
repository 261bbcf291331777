"""Two charts of single values: strips of points with a mean beside them, and y over x."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from fastbandit.report.axes import (
    BOLD,
    MIDDLE,
    NOTHING,
    Axes,
    drawable,
    number,
    padded,
    tick_labels,
    ticks,
)

__all__ = ["Cloud", "Strip", "scatter_chart", "strip_chart"]


@dataclass(frozen=True)
class Strip:
    """The values of one group.

    Args:
        name: stands below it.
        values: in the unit of the y axis.
        notes: tooltip of each value.
        mean, low, high: drawn beside the points; an interval that is NaN is not.
        style: class of the colour.
    """

    name: str
    values: Sequence[float]
    notes: Sequence[str]
    mean: float
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class Cloud:
    """One group of points of a :func:`scatter_chart`; ``notes`` are their tooltips."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    notes: Sequence[str]
    style: str


def _points(cloud: Cloud) -> list[tuple[float, float, str]]:
    """What can be drawn of it: (x, y, note)."""
    triples = zip(cloud.x, cloud.y, cloud.notes, strict=True)
    return [(x, y, note) for x, y, note in triples if drawable(x) and drawable(y)]


def strip_chart(strips: Sequence[Strip], *, title: str, y_label: str) -> Markup:
    """Every value of each group as a point, their mean as a bar with its interval.

    Args:
        strips: from the left.
        title: accessible name of the drawing.
        y_label: axis title, with the unit.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    values = [y for strip in strips for y in (*strip.values, strip.low, strip.high) if drawable(y)]
    if not values:
        return NOTHING
    axes = Axes(title, padded(values), width=1080, height=360, top=12, bottom=44, right=24)
    step = axes.inner / len(strips)
    axes.begin()
    axes.base()
    for place, strip in enumerate(strips):
        middle = axes.left + (place + 0.5) * step
        axes.text("tick", number(middle), number(axes.floor + 18), strip.name, MIDDLE)
        room = min(60.0, step / 3)
        count = len(strip.values)
        for position, (value, note) in enumerate(zip(strip.values, strip.notes, strict=True)):
            # In the order of their numbers, from the left, so that none hides another.
            shift = 0.0 if count == 1 else (position / (count - 1) - 1) * room
            if drawable(value):
                axes.dot(strip.style, number(middle + shift - 8), number(axes.y(value)), 3, note)
        if not drawable(strip.mean):
            continue
        spot = middle + min(24.0, step / 6)
        y = number(axes.y(strip.mean))
        limits = drawable(strip.low) and drawable(strip.high)
        if limits:
            axes.whisker(strip.style, spot, strip.low, strip.high, 5)
        axes.path(f"line {strip.style}", f"M{number(spot - 9)} {y}h18")
        note = f"{strip.name}: mean {strip.mean:.4g}"
        if limits:
            note += f" ({strip.low:.4g} to {strip.high:.4g})"
        axes.dot(strip.style, number(spot), y, 4, note)
    axes.name("", y_label)
    return axes.svg()


def scatter_chart(
    clouds: Sequence[Cloud],
    *,
    title: str,
    x_label: str,
    y_label: str,
) -> Markup:
    """Points at x and y, a colour for each group, whose names stand at the right.

    Args:
        clouds: the groups; a point that is no number, or too large to be
            drawn, is left out, and so is a group without points.
        title: accessible name of the drawing.
        x_label, y_label: axis titles, with the unit.

    Returns:
        An ``<svg>`` element, or a paragraph that says there is nothing to draw yet.
    """
    groups = [(cloud, _points(cloud)) for cloud in clouds]
    groups = [(cloud, points) for cloud, points in groups if points]
    if not groups:
        return NOTHING
    right = 34 + max(len(cloud.name) for cloud, _ in groups) * BOLD
    span = padded([y for _, points in groups for _, y, _ in points])
    axes = Axes(title, span, width=1080, height=380, top=12, bottom=44, right=right)
    low, high = padded([x for _, points in groups for x, _, _ in points])

    def at_x(value: float) -> float:
        return axes.left + (value - low) / (high - low) * axes.inner

    axes.begin()
    axes.base()
    marks = ticks(low, high, max(2, int(axes.inner // 130)))
    axes.marks(list(zip(map(at_x, marks), tick_labels(marks), strict=True)))
    for place, (cloud, points) in enumerate(groups):
        for x_value, y_value, note in points:
            axes.dot(cloud.style, number(at_x(x_value)), number(axes.y(y_value)), 3.5, note)
        key_x, key_y = axes.left + axes.inner + 14, axes.top + 12 + 18 * place
        axes.dot(cloud.style, number(key_x), number(key_y), 3.5)
        axes.text(f"name {cloud.style}", number(key_x + 9), number(key_y), cloud.name, 'dy=".35em"')
    axes.name(x_label, y_label)
    return axes.svg()
