"""What a search ends with: the found network and random ones, each trained from scratch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from fastbandit.report.html import (
    duration,
    finite,
    get,
    interval,
    percent,
    run_section,
    show,
    table,
    tile,
)
from fastbandit.report.reading import read_optional
from fastbandit.report.search import Run
from fastbandit.search.networks import FOLDER, FOUND, REFERENCE, network_name, network_row

__all__ = ["Trained", "networks", "trained_networks"]

# So many random networks are looked for in the folder of a search that is not finished.
_MOST = 9


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


def _whole(value: Any) -> int | None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    return value if whole else None


def _trained(row: Any) -> Trained | None:
    if not isinstance(row, Mapping):
        return None
    clean, robust = finite(row.get("clean_accuracy")), finite(row.get("robust_accuracy"))
    if clean is None or robust is None or not isinstance(row.get("name"), str):
        return None
    return Trained(
        row["name"],
        clean,
        robust,
        _whole(row.get("n")) or None,
        str(row.get("split") or "not recorded"),
        str(row.get("attack") or ""),
        _whole(row.get("parameters")),
        _whole(row.get("macs")),
        _whole(row.get("epochs")),
        finite(row.get("seconds_total")),
        str(row.get("folder") or ""),
        str(row.get("genotype_hash") or ""),
    )


def _so_far(run: Run) -> list[Any]:
    """The networks of a search that is not finished, from their own folders."""
    rows = []
    for name in (FOUND, *(f"random-{i}" for i in range(1, _MOST + 1)), REFERENCE):
        found = read_optional(run, f"{FOLDER}/{name}/summary.json")
        if found is not None:
            try:
                rows.append(network_row(name, found))
            except (KeyError, TypeError):
                run.notes.append(f"{FOLDER}/{name}/summary.json: not of a retraining; left out")
    return rows


def trained_networks(run: Run) -> list[Trained]:
    """The found network first, then random ones of its size, then the one of any size."""
    rows = get(run.summary, "networks")
    if not isinstance(rows, list):
        rows = _so_far(run)
    known = [one for row in rows if (one := _trained(row)) is not None]
    order = {FOUND: 0, REFERENCE: 2}
    return sorted(known, key=lambda one: order.get(one.name, 1))


def networks(run: Run) -> str:
    """The section; empty where no network was trained."""
    rows = trained_networks(run)
    if not rows:
        return ""
    chance = finite(get(run.summary, "chance"))
    tiles = []
    for one in rows:
        size = "" if one.parameters is None else f", {one.parameters:,} parameters"
        tiles.append(
            tile(
                f"{escape(network_name(one.name))}, robust",
                percent(one.robust),
                f"95 %: {interval(one.robust, one.n)}<br>clean {percent(one.clean)}{size}",
            )
        )
    if chance is not None:
        tiles.append(tile("chance", percent(chance), "always the most frequent class"))
    heads = ["network", "parameters", "MACs", "clean", "robust", "n", "epochs", "time", "folder"]
    lines = [
        [
            escape(network_name(one.name)),
            show(one.parameters),
            show(one.macs),
            f'{percent(one.clean)}<br><span class="n">{interval(one.clean, one.n)}</span>',
            f'{percent(one.robust)}<br><span class="n">{interval(one.robust, one.n)}</span>',
            show(one.n),
            show(one.epochs),
            "not recorded" if one.seconds is None else duration(one.seconds),
            show(one.folder),
        ]
        for one in rows
    ]
    attacks = dict.fromkeys(one.attack for one in rows if one.attack)
    splits = dict.fromkeys(one.split for one in rows)
    body = (
        f'<dl class="tiles">{"".join(tiles)}</dl>'
        "<p>Each network is trained from scratch, with the same short schedule, images and attack, "
        f"and measured on {escape(', '.join(splits))} images. Intervals (95 %, Wilson) are for the "
        "images alone. Each was trained once: another seed moves such a figure by a few points, so "
        "a difference of a few points may be chance.</p>"
        f"{table(heads, lines, text=(0, 8))}"
    )
    for attack in attacks:
        body += f'<p class="meta">robust: {escape(attack)}</p>'
    if not run.finished:
        body += '<p class="meta">So far: the search is not finished.</p>'
    title, name = "Trained from scratch", "networks"
    source = f"summary.json, {FOLDER}/"
    return run_section(run, name, title, body, source)
