"""The sections of a search's arms: over time, which survive, and why the others went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fastbandit.bandit import POLICIES
from fastbandit.bandit.log import Abandon, Start
from fastbandit.childparent import ChildParentStart
from fastbandit.report.charts import DIVERGING_STEPS, Lane, arm_lanes
from fastbandit.report.html import empty, section
from fastbandit.report.search import Run

__all__ = ["abandoned", "arms", "survival"]

_LOG = "bandit.jsonl"


def _cells(start: Start | ChildParentStart) -> dict[str, list[int]]:
    """Rows by cell type, from the names of the edges ('a:0->1')."""
    cells: dict[str, list[int]] = {}
    for row, edge in enumerate(start.edges):
        cells.setdefault(edge.partition(":")[0], []).append(row)
    return cells


def arms(run: Run) -> Markup:
    """Every edge's arms over time, one collapsible block for each cell."""
    start, history = run.start, run.history
    if start is None or history is None or not run.samples:
        return empty("arms", "Arms over time", _LOG, "No sample yet.", of=run)
    finite = np.abs(history.difference[np.isfinite(history.difference)])
    # One scale for all edges. The largest differences are those of the first epochs, when every
    # epoch changes the accuracy; a scale that held them would show nothing of the later ones.
    limit = float(np.quantile(finite, 0.8)) if finite.size else 0.0
    limit = limit or 1.0
    levels = history.levels(limit)
    total = len(run.samples)
    reasons = {(line.row, line.arm): line for line in run.abandons}
    cells = []
    for cell, rows in _cells(start).items():
        drawings = []
        for row in rows:
            lanes = []
            for arm, operation in enumerate(start.operations):
                gone = reasons.get((row, arm))
                length = min(total, int(history.life[row, arm]))
                chosen = np.flatnonzero(history.choice[:, row] == arm).tolist()
                mean = history.mean[length, row, arm]
                note = f"{operation}: chosen {len(chosen)} times, "
                note += "not tried" if math.isnan(mean) else f"m {mean:.4f} at the end"
                note += (
                    "; still there"
                    if gone is None
                    else f"; abandoned after {gone.sample} samples (round {gone.round})"
                )
                level = levels[:length, row, arm].tolist()
                lanes.append(Lane(operation, note, level, chosen, gone is None))
            drawing = arm_lanes(
                lanes,
                title=f"edge {start.edges[row]}",
                samples=run.planned,
                events=[sample for sample, _, _ in run.prunings],
            )
            drawings.append(drawing)
        cells.append((cell, drawings, _means(run, rows)))
    return section(
        "arms",
        "Arms over time",
        f"{_LOG} (m and n computed again)",
        "arms",
        of=run,
        cells=cells,
        operations=start.operations,
        low=f"{-limit:+.3g}",
        high=f"{limit:+.3g}",
        steps=DIVERGING_STEPS,
    )


def _means(run: Run, rows: Sequence[int]) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """Each edge, with (class, m, n) of its arms: now for those alive, else when abandoned."""
    start, history = run.start, run.history
    assert start is not None
    assert history is not None
    logged = {(line.row, line.arm): line for line in run.abandons}

    def entry(row: int, arm: int) -> tuple[str, str, int]:
        gone = logged.get((row, arm))
        if gone is not None:
            mean, count = gone.mean, gone.count
        else:
            mean, count = float(history.mean[-1, row, arm]), int(history.count[-1, row, arm])
        kind = "kept" if gone is None else "gone"
        return kind, "none" if count == 0 else f"{mean:.4f}", count

    arms = range(len(start.operations))
    return [(start.edges[row], [entry(row, arm) for arm in arms]) for row in rows]


def survival(run: Run) -> Markup:
    """How many edges hold each operation after each round, and in which cells the last ones are."""
    start, history = run.start, run.history
    if start is None or history is None:
        words = "The bandit has not started."
        return empty("survival", "Operations that survive", _LOG, words, of=run)
    edges, arms = len(start.edges), len(start.operations)
    prunings = run.prunings
    alive = [np.full(arms, edges)]
    for _, number, _ in prunings:
        alive.append((history.round > number).sum(0))
    # (words, edges of the column at most) of each column.
    rounds = [(f"{arms} arms", edges), *((str(left), edges) for _, _, left in prunings)]
    order = sorted(range(arms), key=lambda arm: (-int(alive[-1][arm]), arm))

    def rows(columns: Sequence[np.ndarray[Any, Any]]) -> list[tuple[str, list[int]]]:
        return [(start.operations[arm], [int(step[arm]) for step in columns]) for arm in order]

    cells = _cells(start)
    kept = history.life == history.ALIVE
    by_cell = [kept[cell_rows].sum(0) for cell_rows in cells.values()]
    sizes = [(cell, len(cell_rows)) for cell, cell_rows in cells.items()]
    tables = [
        ("By arms left on each edge", rounds, rows(alive)),
        ("Now, by cell", sizes, rows(by_cell)),
    ]
    left = prunings[-1][2] if prunings else arms
    return section(
        "survival", "Operations that survive", _LOG, "survival", of=run,
        edges=edges, left=left, arms=arms, tables=tables,
    )  # fmt: skip


def _reason(run: Run, line: Abandon) -> str:
    """Why an arm went, as far as the log alone can tell."""
    start, history = run.start, run.history
    assert start is not None
    assert history is not None
    if isinstance(start, ChildParentStart):
        return "smallest mean score of the round" if not start.carry else "smallest mean score"
    name = start.settings.policy
    rule = f"rule of policy {name}"
    if line.upper is None or not history.explained:
        return rule
    upper = history.upper(line.sample, line.row)
    others = [
        (float(upper[arm]), arm)
        for arm in range(len(upper))
        if arm != line.arm and history.round[line.row, arm] > line.round
    ]
    if not others:
        return rule
    smaller = sum(value < line.upper - 1e-9 for value, _ in others)
    reason = POLICIES[name].reason if name in POLICIES else ""
    if reason or smaller:
        return f"{reason or rule}; upper bound {smaller + 1} of {len(others) + 1} from below"
    bound, arm = min(others)
    other = start.operations[arm]
    if bound <= line.upper + 1e-12:
        return f"smallest upper bound {line.upper:.4f}, equal to {other}'s; the lowest index goes"
    return f"smallest upper bound {line.upper:.4f}; next smallest {bound:.4f} ({other})"


def abandoned(run: Run) -> Markup:
    if not run.abandons:
        words = "No arm has been abandoned yet."
        return empty("abandoned", "Abandoned arms", _LOG, words, of=run)
    rounds: dict[int, list[tuple[Abandon, str]]] = {}
    for line in run.abandons:
        rounds.setdefault(line.round, []).append((line, _reason(run, line)))
    number = len(run.abandons)
    return section(
        "abandoned", "Abandoned arms", _LOG, "abandoned", of=run,
        number=number, rounds=sorted(rounds.items()),
    )  # fmt: skip
