"""What a search ends with: the found network and random ones, each trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fastbandit.report.html import as_text, count, finite, get, section, share
from fastbandit.report.reading import read_optional
from fastbandit.report.search import Run
from fastbandit.search.networks import FOLDER, FOUND, REFERENCE, network_name, network_row

__all__ = ["Trained", "networks", "trained_networks"]

# So many random networks are looked for in the folder of a search that is not finished.
_MOST = 9
_MOST_ROWS = 200


@dataclass(frozen=True)
class Trained:
    """One network trained from scratch, with what its file says of it."""

    name: str
    clean: float
    robust: float
    n: int | None
    split: str
    attack: str
    parameters: int | None
    macs: int | None
    epochs: int | None
    seconds: float | None
    folder: str
    genotype: str
    latency: float | None = None
    latency_table: float | None = None


def _trained(row: Any) -> Trained | None:
    if not isinstance(row, Mapping):
        return None
    clean, robust = share(row.get("clean_accuracy")), share(row.get("robust_accuracy"))
    if clean is None or robust is None or not isinstance(row.get("name"), str):
        return None
    return Trained(
        row["name"],
        clean,
        robust,
        count(row.get("n")) or None,
        as_text(row.get("split") or "not recorded"),
        as_text(row.get("attack") or ""),
        count(row.get("parameters")),
        count(row.get("macs")),
        count(row.get("epochs")),
        finite(row.get("seconds_total")),
        as_text(row.get("folder") or ""),
        as_text(row.get("genotype_hash") or ""),
        finite(row.get("latency_ms")),
        finite(row.get("latency_table_ms")),
    )


def _so_far(run: Run) -> list[Any]:
    """The networks of a search that is not finished, from their own folders."""
    rows = []
    for name in (FOUND, *(f"random-{i}" for i in range(1, _MOST + 1)), REFERENCE):
        summary = read_optional(run, f"{FOLDER}/{name}/summary.json")
        if summary is not None:
            try:
                rows.append(network_row(name, summary))
            except (KeyError, TypeError):
                run.notes.append(f"{FOLDER}/{name}/summary.json: not of a retraining; left out")
    return rows


def trained_networks(run: Run) -> list[Trained]:
    """The found network first, then random ones of its size, then the one of any size."""
    rows = get(run.summary, "networks")
    if not isinstance(rows, list):
        rows = _so_far(run)
    networks = [one for row in rows[:_MOST_ROWS] if (one := _trained(row)) is not None]
    if left := len(rows) - len(networks):
        run.note(
            f"summary.json: networks: {left:,} of {len(rows):,} are left out: expected at most "
            f"{_MOST_ROWS}, each with a name and two accuracies in [0, 1]"
        )
    order = {FOUND: 0, REFERENCE: 2}
    return sorted(networks, key=lambda one: order.get(one.name, 1))


def networks(run: Run) -> Markup:
    """The section; empty where no network was trained."""
    rows = trained_networks(run)
    if not rows:
        return Markup()
    return section(
        "networks",
        "Trained from scratch",
        f"summary.json, {FOLDER}/",
        "networks",
        of=run,
        rows=rows,
        chance=share(get(run.summary, "chance")),
        splits=dict.fromkeys(one.split for one in rows),
        attacks=dict.fromkeys(one.attack for one in rows if one.attack),
        finished=run.finished,
        name=network_name,
        latency=any(one.latency is not None for one in rows),
        milliseconds=lambda value: "not recorded" if value is None else f"{value:.3g}",
    )
