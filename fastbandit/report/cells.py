"""Drawings of cells as self-contained SVG: no system package, no script, no font file.

Nodes stand on a line from left to right. An edge to the next node is straight; a longer one is
an arc above or below the line, in a *lane* that no arc of an overlapping span shares, so that the
labels, which sit on the tops of the arcs, never overlap. What the output concatenates is drawn as
thin grey lines into one rail under everything else. Of a cell of two inputs the first two nodes
are the outputs of the two cells before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from fastbandit.operations import OPERATIONS

if TYPE_CHECKING:
    from fastbandit.genotype import Cell, Genotype

__all__ = ["draw_genotype"]

# Lengths in SVG user units, at which the text is 12 high.
_STEP = 116  # between neighbouring nodes
_OUT = 72  # from the last node to the output
_RADIUS = 15  # of a node
_LANE = 30  # between the tops of arcs in neighbouring lanes
_FIRST = 44  # from the line to the top of the first lane
_GLYPH = 6.9  # width of a character, generous for every common sans-serif
_LABEL = 18  # height of a label
_MARGIN = 18  # around a panel's content
_TITLE = 26  # height of a panel's title
_GAP = 14  # between panels
_COLUMNS = 2

_INK, _FAINT, _PANEL, _RULE = "#1f2933", "#9aa5b1", "#ffffff", "#d9dee4"


def _style(operation: str) -> tuple[str, str]:
    """Label and colour of an operation."""
    row = OPERATIONS.get(operation)
    return (operation, _INK) if row is None else (row.label, row.colour)


@dataclass(frozen=True)
class _Arc:
    source: int
    target: int
    operation: str
    side: int  # -1 above, 1 below; 0 straight
    lane: int  # from 1 outwards; 0 straight


def _crosses(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Whether two arcs on the same side cross: they overlap and neither holds the other."""
    return a[0] < b[0] < a[1] < b[1] or b[0] < a[0] < b[1] < a[1]


def _arrange(cell: Cell) -> list[_Arc]:
    """Side and lane of every edge; short spans first, so that long ones go around them."""
    arcs: list[_Arc] = []
    for source, target, operation in sorted(cell.edges, key=lambda e: (e[1] - e[0], e[0])):
        if target - source == 1:
            arcs.append(_Arc(source, target, operation, 0, 0))
            continue
        best: tuple[int, int, int] | None = None
        for side in (-1, 1):
            placed = [arc for arc in arcs if arc.side == side]
            overlapping = [a for a in placed if a.source < target and source < a.target]
            lane = 1 + max((arc.lane for arc in overlapping), default=0)
            crossings = sum(_crosses((source, target), (a.source, a.target)) for a in placed)
            candidate = (crossings, lane, side)
            best = candidate if best is None else min(best, candidate)
        assert best is not None
        arcs.append(_Arc(source, target, operation, best[2], best[1]))
    return arcs


def _lanes(arcs: Sequence[_Arc], side: int) -> int:
    return max((arc.lane for arc in arcs if arc.side == side), default=0)


def _reach(lanes: int) -> int:
    """From the line of nodes to the top of the outermost lane, label included."""
    return _FIRST + (lanes - 1) * _LANE + _LABEL // 2 if lanes else _RADIUS


def _label(x: float, y: float, operation: str) -> str:
    text, colour = _style(operation)
    width = len(text) * _GLYPH + 10
    return (
        f'<g><title>{escape(operation)}</title><rect x="{x - width / 2:.1f}" '
        f'y="{y - _LABEL / 2:.1f}" width="{width:.1f}" height="{_LABEL}" rx="4" '
        f'fill="{_PANEL}" fill-opacity="0.94"/><text class="op" x="{x:.1f}" y="{y + 4:.1f}" '
        f'text-anchor="middle" fill="{colour}">{escape(text)}</text></g>'
    )


def _arrow(x: float, y: float, dx: float, dy: float, colour: str) -> str:
    """A small arrow head with its point at (x, y), pointing along the unit vector (dx, dy)."""
    back_x, back_y = x - 7 * dx, y - 7 * dy
    points = (
        f"{x:.1f},{y:.1f} {back_x - 3.2 * dy:.1f},{back_y + 3.2 * dx:.1f} "
        f"{back_x + 3.2 * dy:.1f},{back_y - 3.2 * dx:.1f}"
    )
    return f'<polygon points="{points}" fill="{colour}"/>'


def _node(x: float, y: float, text: str, fill: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{_RADIUS}" fill="{fill}" stroke="{_INK}" '
        f'stroke-width="1.2"/><text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle" '
        f'class="node" fill="{_INK}">{escape(text)}</text>'
    )


def _draw_cell(cell: Cell, arcs: Sequence[_Arc], above: int, below: int) -> str:
    """One cell with its origin at the left end of the line of nodes, ``above`` under the top."""
    line = float(above)
    count = cell.inputs + len(cell.nodes)
    x = [_MARGIN + _RADIUS + _STEP * node for node in range(count)]
    out = x[-1] + _OUT
    rail = line + below
    lines: list[str] = []
    heads: list[str] = []
    labels: list[str] = []

    if tuple(cell.concat) != (count - 1,):
        first = min(x[node] for node in cell.concat)
        grey = f'fill="none" stroke="{_FAINT}" stroke-width="1" stroke-dasharray="2 2.5"'
        for node in cell.concat:
            lines.append(f'<path d="M{x[node]:.1f} {line:.1f}V{rail:.1f}" {grey}/>')
        lines.append(
            f'<path d="M{first:.1f} {rail:.1f}H{out - 10:.1f}Q{out:.1f} {rail:.1f} {out:.1f} '
            f'{rail - 10:.1f}V{line + _RADIUS:.1f}" {grey}/>'
        )
        heads.append(_arrow(out, line + _RADIUS, 0, -1, _FAINT))
    else:
        lines.append(
            f'<path d="M{x[-1]:.1f} {line:.1f}H{out:.1f}" fill="none" stroke="{_FAINT}" '
            f'stroke-width="1" stroke-dasharray="2 2.5"/>'
        )
        heads.append(_arrow(out - 22, line, 1, 0, _FAINT))

    for arc in arcs:
        colour = _style(arc.operation)[1]
        stroke = f'fill="none" stroke="{colour}" stroke-width="1.6"'
        start, end = x[arc.source], x[arc.target]
        middle = (start + end) / 2
        if arc.side == 0:
            edge_of_node = end - _RADIUS
            lines.append(f'<path d="M{start:.1f} {line:.1f}H{edge_of_node - 5:.1f}" {stroke}/>')
            heads.append(_arrow(edge_of_node, line, 1, 0, colour))
            labels.append(_label(middle - 2, line, arc.operation))
            continue
        top = line + arc.side * (_FIRST + (arc.lane - 1) * _LANE)
        # Edges leave a node right of its centre and arrive left of it, so that the arcs of one
        # node stay apart; a wider turn for outer lanes keeps nested arcs from touching.
        turn = 26 + 5 * arc.lane
        start, end = start + 6, end - 6
        tip = line + arc.side * (_RADIUS - 1)
        lines.append(
            f'<path d="M{start:.1f} {line:.1f}C{start:.1f} {(line + top) / 2:.1f} '
            f"{start + turn * 0.35:.1f} {top:.1f} {start + turn:.1f} {top:.1f}"
            f"H{end - turn:.1f}C{end - turn * 0.35:.1f} {top:.1f} {end:.1f} "
            f'{(line + top) / 2:.1f} {end:.1f} {tip + arc.side * 5:.1f}" {stroke}/>'
        )
        heads.append(_arrow(end, tip, 0, -arc.side, colour))
        # A label over a node that an outer arc leaves or enters would cut that arc: it moves into
        # the gap after the node.
        crowded = any(
            other.side == arc.side
            and other.lane > arc.lane
            and (arc.source + arc.target) in (2 * other.source, 2 * other.target)
            for other in arcs
        )
        labels.append(_label(middle + (_STEP / 2 - 4) * crowded, top, arc.operation))

    nodes = [
        _node(x[i], line, str(i), "#e8edf2" if i < cell.inputs else "#ffffff")
        for i in range(len(x))
    ]
    nodes.append(
        f'<rect x="{out - 22:.1f}" y="{line - _RADIUS:.1f}" width="44" height="{2 * _RADIUS}" '
        f'rx="5" fill="#e8edf2" stroke="{_INK}" stroke-width="1.2"/><text class="node" '
        f'x="{out:.1f}" y="{line + 4:.1f}" text-anchor="middle" fill="{_INK}">out</text>'
    )
    return "".join(lines + heads + nodes + labels)


def _legend(operations: Sequence[str], width: float, y: float) -> tuple[str, float]:
    """What the short labels stand for, in as many rows as it takes; and where it ends."""
    parts: list[str] = []
    x = float(_MARGIN)
    for operation in operations:
        short, colour = _style(operation)
        entry = 7.0 * (len(short) + len(operation) + 3) + 18
        if x + entry > width - _MARGIN and x > _MARGIN:
            x, y = float(_MARGIN), y + 20
        parts.append(
            f'<text x="{x:.1f}" y="{y + 13:.1f}"><tspan class="op" fill="{colour}">'
            f'{escape(short)}</tspan><tspan fill="#52606d" dx="6">{escape(operation)}</tspan>'
            "</text>"
        )
        x += entry
    return "".join(parts), y + 20


def _is_darts(genotype: Genotype) -> bool:
    return genotype.inputs == 2 and len(genotype.cells) == 2


def draw_genotype(genotype: Genotype) -> str:
    """All cells of a genotype, two in a row, with a legend of the operations they hold.

    Returns:
        One SVG document as text, with its size in ``viewBox``, ``width`` and ``height``.
    """
    arranged = [_arrange(cell) for cell in genotype.cells]
    nodes = max(cell.inputs + len(cell.nodes) for cell in genotype.cells)
    panel_width = 2 * _MARGIN + _RADIUS + (nodes - 1) * _STEP + _OUT + 22
    # The two types of cells with two inputs have names.
    names = {"a": "normal cell", "b": "reduction cell"} if _is_darts(genotype) else {}
    columns = min(_COLUMNS, len(genotype.cells))
    width = columns * panel_width + (columns - 1) * _GAP
    body: list[str] = []
    top = 0.0
    for first in range(0, len(genotype.cells), columns):
        row = range(first, min(first + columns, len(genotype.cells)))
        # Panels side by side share one line of nodes, so that they can be compared.
        above = _TITLE + max(_reach(_lanes(arranged[index], -1)) for index in row) + 6
        below = max(_reach(_lanes(arranged[index], 1)) for index in row) + 12
        height = above + below + 14
        for column, index in enumerate(row):
            cell = genotype.cells[index]
            left = column * (panel_width + _GAP)
            body.append(
                f'<g transform="translate({left:.1f} {top:.1f})"><rect x="0.5" y="0.5" '
                f'width="{panel_width - 1:.1f}" height="{height - 1:.1f}" rx="8" '
                f'fill="{_PANEL}" stroke="{_RULE}"/><text class="title" x="{_MARGIN}" y="22" '
                f'fill="{_INK}">{names.get(cell.name) or escape(f"cell {cell.name}")}</text>'
                f"{_draw_cell(cell, arranged[index], above, below)}</g>"
            )
        top += height + _GAP
    used = {edge.op for cell in genotype.cells for edges in cell.nodes for edge in edges}
    legend, bottom = _legend([op for op in genotype.operations if op in used], width, top)
    title = f"{genotype.name or 'genotype'} ({genotype.hash[:12]})"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.1f} {bottom:.1f}" '
        f'width="{width:.1f}" height="{bottom:.1f}" class="genotype-cells" role="img" '
        f'aria-label="{escape(title)}" '
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" font-size="12">'
        f"<title>{escape(title)}</title>"
        # Inlined in a page, a style sheet is the page's: every rule is confined to this drawing.
        "<style>.genotype-cells .op{font-weight:600}.genotype-cells .node{font-size:12px}"
        ".genotype-cells .title{font-weight:600;font-size:14px}"
        f"</style>{''.join(body)}{legend}</svg>\n"
    )
