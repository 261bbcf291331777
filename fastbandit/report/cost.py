"""The section of what runs cost: of a search alone, and of each step side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from fastbandit.report.evaluation import Evaluation
from fastbandit.report.html import (
    duration,
    empty,
    finite,
    get,
    pairs,
    run_section,
    section,
    show,
    table,
)
from fastbandit.report.matching import Collection
from fastbandit.report.networks import trained_networks
from fastbandit.report.reading import Folder
from fastbandit.report.retraining import Retraining
from fastbandit.report.rows import MOST_ENTRIES, leaf, results_file, shorten
from fastbandit.report.search import Run, totals

__all__ = ["joint_cost", "search_cost"]

_NOTHING = empty("Nothing measured yet.")
_SUMMED = "metrics.jsonl, summed"
_PASSES = {
    "forward_passes": "forward passes (mini-batches)",
    "backward_passes": "backward passes (mini-batches)",
}
_WORDS = {"peak_memory_mb": "peak memory, MiB", "images_per_second": "images/s"}
_SEARCH_WORDS = {
    **_WORDS,
    **_PASSES,
    "epochs_tuning": "epochs of the found path after the search",
    "paths_only_evaluated": "paths only evaluated",
    "images_per_second": "images/s in training",
    "images_trained": "images trained on",
    "images_evaluated": "images evaluated",
    "threads": "CPU threads",
}


def _ledger(run: Folder) -> tuple[dict[str, Any], str]:
    """The ledger of a run and its file; summed from the metrics where there is none yet."""
    name = results_file(run)
    cost = get(run.summary, "cost")
    if isinstance(cost, Mapping):
        # No step has so many phases; a stranger's ledger may.
        return dict(islice(pairs(cost), MOST_ENTRIES)), name
    if isinstance(run, Run):
        return {key: value for key, value in totals(run).items() if value is not None}, _SUMMED
    if isinstance(run, Retraining):
        sums: dict[str, Any] = {}
        for line in run.epochs:
            for key, value in [("seconds_total", line.seconds_total),
                               *(line.model_extra or {}).items()]:  # fmt: skip
                seconds = finite(value)
                if key.startswith("seconds_") and seconds is not None:
                    sums[key] = sums.get(key, 0.0) + seconds
        peaks = [line.peak_memory_mb for line in run.epochs if line.peak_memory_mb is not None]
        if peaks:
            sums["peak_memory_mb"] = max(peaks)
        return sums, _SUMMED
    return {}, name


def search_cost(run: Run) -> str:
    """The ledger of a search: its phases with their shares, and what it counted."""
    ledger, source = _ledger(run)
    if source == _SUMMED:
        source += " (a run in progress has no ledger yet)"
    total = finite(ledger.get("seconds_total"))
    phases = []
    for name, value in ledger.items():
        seconds = finite(value)
        if name.startswith("seconds_") and seconds is not None and name != "seconds_total":
            share = f"{100 * seconds / total:.1f} %" if total else ""
            phases.append([show(name.removeprefix("seconds_")), f"{seconds:.2f}", share])
    if total is not None:
        phases.append(["<b>total</b>", f"<b>{total:.2f}</b>", ""])
    counts = [
        [_SEARCH_WORDS.get(name, show(name)), _number(value)]
        for name, value in ledger.items()
        if not name.startswith("seconds_")
    ]
    if not phases and not counts:
        return run_section(run, "cost", "Cost", _NOTHING, source)
    times = [one.seconds for one in trained_networks(run) if one.seconds is not None]
    trained = f": {duration(sum(times))} for {len(times)} networks" if times else ""
    body = (
        f"<p>The cost of this search alone; training from scratch is not part of it{trained}.</p>"
        f'<div class="pair"><div>{table(["phase", "seconds", "share"], phases, text=(0,))}</div>'
        f"<div>{table(['measure', 'value'], counts, text=(0,))}</div></div>"
    )
    return run_section(run, "cost", "Cost", body, source)


def joint_cost(found: Collection) -> str:
    """Ledgers side by side, one table for each step: they are never added up."""
    body = "<p>Each step by itself; search and retraining are never added up.</p>"
    for title, runs in (
        ("Search", found.searches),
        ("Retraining", found.retrainings),
        ("Evaluation", found.evaluations),
    ):
        if not runs:
            continue
        ledgers = list(map(_ledger, runs))
        names = list(dict.fromkeys(name for ledger, _ in ledgers for name in ledger))
        if not names:
            body += f"<h3>{title}</h3>{_NOTHING}"
            continue
        lines = [
            [_words(name, runs[0]), *(_amount(name, ledger.get(name)) for ledger, _ in ledgers)]
            for name in names
        ]
        lines.append(["file", *(show(source) for _, source in ledgers)])
        heads = ["", *(f"{show(run.key)} {show(shorten(run.label, 40))}" for run in runs)]
        body += f"<h3>{title}</h3>{table(heads, lines, text=(0,))}"
    named = "; ".join(f"{run.label}: {_ledger(run)[1]}" for run in found.runs)
    return section("cost", "Cost", body, named)


def _words(name: str, run: Folder) -> str:
    for prefix in ("seconds_", "seconds."):
        if name.startswith(prefix):
            return f"seconds, {show(name.removeprefix(prefix).replace('_', ' '))}"
    # An evaluation says itself what its passes count.
    known = _WORDS if isinstance(run, Evaluation) else {**_WORDS, **_PASSES}
    return known.get(name) or show(name.replace("_", " "))


def _amount(name: str, value: Any) -> str:
    seconds = finite(value)
    if name.startswith(("seconds_", "seconds.")) and seconds is not None:
        return f'{seconds:,.2f} <span class="n">{duration(seconds)}</span>'
    return "" if value is None else _number(value, leaf)


def _number(value: Any, other: Callable[[Any], str] = show) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else other(value)
