"""The frame that charts share: numbers as pixels, ticks, the y axis and the names around it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TypeGuard

from markupsafe import Markup

__all__ = [
    "BOLD",
    "END",
    "MIDDLE",
    "NOTHING",
    "REGULAR",
    "Axes",
    "Drawing",
    "drawable",
    "number",
    "padded",
    "tick_labels",
    "ticks",
]

# Widths to leave for a character of 11 px, regular and bold: those of a wide face, since the page
# takes whatever sans-serif the reader's system has.
REGULAR, BOLD = 6.6, 7.4
# Where a text stands: centred on its place, or left of it and centred on its height.
#: What stands in place of a chart of nothing.
NOTHING = Markup('<p class="empty">Nothing to draw yet.</p>')
MIDDLE, END = 'text-anchor="middle"', 'dy=".35em" text-anchor="end"'


def drawable(value: float | None) -> TypeGuard[float]:
    """Whether a chart has a place for it: no NaN, and differences that a number holds."""
    return value is not None and abs(value) <= 1e100


def number(value: float) -> str:
    """A coordinate, at most two decimals and no trailing zeros."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value % 1 else f"{value:.0f}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten) within [low, high]."""
    rough = (high - low) / max(count, 1)
    # Ends that are nearly the same, or whose distance no number holds, have no round ones between.
    if not (math.isfinite(rough) and rough > 1e-9 * max(abs(low), abs(high), 1e-290)):
        return [low] if math.isfinite(low) else []
    power = 10.0 ** math.floor(math.log10(rough))
    step = next((f * power for f in (1, 2, 5) if f * power >= rough * 0.999), 10 * power)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """The values with as many decimals as their step needs."""
    if len(values) < 2:
        return [f"{value:.4g}" for value in values]
    step = values[1] - values[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if decimals > 4:
        return [f"{value:.1e}" for value in values]
    return [f"{value:.{decimals}f}" for value in values]


def padded(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis that holds all values, with some room around them."""
    low, high = min(values), max(values)
    pad = (high - low) * 0.06 or abs(low) * 0.06 or 1.0
    return low - pad, high + pad


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


class Drawing:
    """The elements of an ``<svg>``, one after the other; all text is escaped."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def open(self, kind: str, width: float, height: float, title: str) -> None:
        self.parts.append(
            f'<svg class="{kind}" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(title)}">'
        )

    def path(self, kind: str, d: str, more: str = "") -> None:
        self.parts.append(f'<path class="{kind}"{more} d="{d}"/>')

    def text(self, kind: str, x: str, y: str, text: str, how: str = "") -> None:
        place = f'x="{x}" y="{y}" {how}'.rstrip()
        self.parts.append(f'<text class="{kind}" {place}>{escape(text)}</text>')

    def dot(self, style: str, x: str, y: str, radius: float, note: str = "") -> None:
        dot = f'<circle class="dot {style}" cx="{x}" cy="{y}" r="{radius:g}"'
        inner = f"><title>{escape(note)}</title></circle>" if note else "/>"
        self.parts.append(dot + inner)

    def hover(self, x: str, y: float, width: str, height: str, note: str) -> None:
        """A tooltip over a rectangle."""
        self.parts.append(
            f'<rect class="hover" x="{x}" y="{y}" width="{width}" height="{height}">'
            f"<title>{escape(note)}</title></rect>"
        )

    def svg(self) -> Markup:
        return Markup("\n".join([*self.parts, "</svg>"]))


class Axes(Drawing):
    """The frame of a chart: from values to pixels, and what stands around the drawing.

    ``parts`` begins with the grid and the y axis; a chart adds its own x axis and what it draws.

    Args:
        span: ends of the y axis.
        top, bottom, right: room around the drawing, in pixels; ``left`` is at least what the texts
            of the y axis take.
    """

    def __init__(
        self,
        title: str,
        span: tuple[float, float],
        *,
        width: int,
        height: int,
        top: float,
        bottom: float,
        right: float,
    ) -> None:
        self.low, self.high = span
        self.title, self.width, self.height, self.top = title, width, height, top
        values = ticks(self.low, self.high)
        self._ticks = list(zip(values, tick_labels(values), strict=True))
        self.left = 30 + max((len(text) for _, text in self._ticks), default=1) * REGULAR
        self.right, self.bottom = right, bottom
        super().__init__()

    @property
    def inner(self) -> float:
        return self.width - self.left - self.right

    @property
    def floor(self) -> float:
        return self.height - self.bottom

    def y(self, value: float) -> float:
        return self.top + (self.high - value) / (self.high - self.low) * (self.floor - self.top)

    def begin(self) -> None:
        self.open("chart", self.width, self.height, self.title)
        for value, text in self._ticks:
            y, x = number(self.y(value)), number(self.left - 6)
            self.path("gridline", f"M{number(self.left)} {y}H{number(self.left + self.inner)}")
            self.text("tick", x, y, text, END)

    def base(self) -> None:
        """The line of the x axis."""
        self.path("axis", f"M{number(self.left)} {number(self.floor)}h{number(self.inner)}")

    def name(self, x_label: str, y_label: str) -> None:
        x, y = number(self.left + self.inner / 2), number((self.top + self.floor) / 2)
        self.text("label", x, str(self.height - 6), x_label, MIDDLE)
        self.text("label", "12", y, y_label, f'{MIDDLE} transform="rotate(-90 12 {y})"')

    def marks(self, marks: Sequence[tuple[float, str]]) -> None:
        """Ticks of the x axis at places in pixels; a text that would lie on another is left out."""
        end = -math.inf
        for place, text in marks:
            x, half = number(place), len(text) * REGULAR / 2
            self.path("axis", f"M{x} {number(self.floor)}v5")
            if place - half >= end:
                end = place + half + 6
                self.text("tick", x, number(self.floor + 18), text, MIDDLE)

    def whisker(self, style: str, place: float, low: float, high: float, half: float) -> None:
        """An interval, with caps of ``2 half`` pixels at its ends."""
        top, bottom = number(self.y(high)), number(self.y(low))
        cap, wide = f"M{number(place - half)}", number(2 * half)
        line = f"M{number(place)} {top}V{bottom}{cap} {top}h{wide}{cap} {bottom}h{wide}"
        self.path(f"line {style}", line)

    def spread(self, wanted: Sequence[float]) -> list[float]:
        """Heights of the names at the right, moved apart where they would lie on each other."""
        return _spread(wanted, 15, self.top + 6, self.floor - 2)
