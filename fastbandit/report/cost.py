"""The section of what runs cost: of a search alone, and of each step side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any

from markupsafe import Markup

from fastbandit.report.evaluation import Evaluation
from fastbandit.report.html import as_text, duration, empty, finite, get, pairs, section
from fastbandit.report.matching import Collection
from fastbandit.report.networks import trained_networks
from fastbandit.report.reading import Folder
from fastbandit.report.retraining import Retraining
from fastbandit.report.rows import MOST_ENTRIES, leaf, results_file, shorten
from fastbandit.report.search import Run, totals

__all__ = ["joint_cost", "search_cost"]

_NOTHING = "Nothing measured yet."
# In a run's own ledger, and nested in that of an evaluation.
_SECONDS = ("seconds_", "seconds.")
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


def search_cost(run: Run) -> Markup:
    """The ledger of a search: its phases with their shares, and what it counted."""
    ledger, source = _ledger(run)
    if source == _SUMMED:
        source += " (a run in progress has no ledger yet)"
    total = finite(ledger.get("seconds_total"))
    phases = [
        (name.removeprefix("seconds_"), seconds)
        for name, value in ledger.items()
        if name.startswith("seconds_") and name != "seconds_total"
        if (seconds := finite(value)) is not None
    ]
    counts = [
        (_SEARCH_WORDS.get(name, name), _amount(value, as_text))
        for name, value in ledger.items()
        if not name.startswith("seconds_")
    ]
    if not phases and not counts and total is None:
        return empty("cost", "Cost", source, _NOTHING, of=run)
    times = [one.seconds for one in trained_networks(run) if one.seconds is not None]
    return section(
        "cost", "Cost", source, "cost_search", of=run,
        phases=phases, total=total, counts=counts, times=times,
    )  # fmt: skip


def joint_cost(collection: Collection) -> Markup:
    """Ledgers side by side, one table for each step: they are never added up."""
    steps = []
    for title, runs in (
        ("Search", collection.searches),
        ("Retraining", collection.retrainings),
        ("Evaluation", collection.evaluations),
    ):
        if not runs:
            continue
        ledgers = [_ledger(run) for run in runs]
        names = list(dict.fromkeys(name for ledger, _ in ledgers for name in ledger))
        lines = [
            (_words(name, runs[0]), [_entry(name, ledger.get(name)) for ledger, _ in ledgers])
            for name in names
        ]
        heads = [f"{run.key} {shorten(run.label, 40)}" for run in runs]
        steps.append((title, heads, lines, [file for _, file in ledgers]))
    files = "; ".join(f"{run.label}: {_ledger(run)[1]}" for run in collection.runs)
    return section("cost", "Cost", files, "cost", steps=steps, nothing=_NOTHING)


def _words(name: str, run: Folder) -> str:
    for prefix in _SECONDS:
        if name.startswith(prefix):
            return f"seconds, {name.removeprefix(prefix).replace('_', ' ')}"
    # An evaluation says itself what its passes count.
    words = _WORDS if isinstance(run, Evaluation) else {**_WORDS, **_PASSES}
    return words.get(name) or name.replace("_", " ")


def _entry(name: str, value: Any) -> tuple[str, str]:
    """A value of a ledger, and a time in words too."""
    seconds = finite(value)
    if name.startswith(_SECONDS) and seconds is not None:
        return f"{seconds:,.2f}", duration(seconds)
    return "" if value is None else _amount(value), ""


def _amount(value: Any, other: Callable[[Any], str] = leaf) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else other(value)
