"""The section of what runs cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastbandit.report.html import duration, finite, get, run_section, show, table
from fastbandit.report.networks import trained_networks
from fastbandit.report.search import Run

__all__ = ["search_cost", "totals"]


def totals(run: Run) -> dict[str, float | None]:
    """Cost so far from the metrics, for a run without a summary."""

    def total(name: str) -> float | None:
        values = [v for line in run.metrics if (v := getattr(line, name)) is not None]
        return sum(values) if values else None

    peaks = [line.peak_memory_mb for line in run.metrics if line.peak_memory_mb is not None]
    pairs = [
        (line.images_per_second * line.seconds_train, line.seconds_train)
        for line in run.metrics
        if line.images_per_second is not None and line.seconds_train
    ]
    images, seconds = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    return {
        "seconds_total": total("seconds_total"),
        "seconds_train": total("seconds_train"),
        "seconds_validate": total("seconds_validate"),
        "images_per_second": images / seconds if seconds else None,
        "peak_memory_mb": max(peaks) if peaks else None,
    }


def search_cost(run: Run) -> str:
    cost = get(run.summary, "cost")
    if isinstance(cost, Mapping):
        source = "summary.json"
        ledger: dict[str, Any] = dict(cost)
    else:
        source = "metrics.jsonl, summed (a run in progress has no ledger yet)"
        ledger = {name: value for name, value in totals(run).items() if value is not None}
    total = finite(ledger.get("seconds_total"))
    phases = []
    for name, value in ledger.items():
        seconds = finite(value)
        if name.startswith("seconds_") and seconds is not None and name != "seconds_total":
            share = f"{100 * seconds / total:.1f} %" if total else ""
            phases.append([show(name.removeprefix("seconds_")), f"{seconds:.2f}", share])
    if total is not None:
        phases.append(["<b>total</b>", f"<b>{total:.2f}</b>", ""])
    words = {
        "epochs": "epochs",
        "epochs_tuning": "epochs of the found path after the search",
        "paths_only_evaluated": "paths only evaluated",
        "images_per_second": "images/s in training",
        "images_trained": "images trained on",
        "images_evaluated": "images evaluated",
        "forward_passes": "forward passes (mini-batches)",
        "backward_passes": "backward passes (mini-batches)",
        "peak_memory_mb": "peak memory, MiB",
        "device": "device",
        "threads": "CPU threads",
    }
    counts = []
    for name, value in ledger.items():
        if name.startswith("seconds_"):
            continue
        shown = f"{value:,.1f}" if isinstance(value, float) else show(value)
        counts.append([words.get(name, show(name)), shown])
    if not phases and not counts:
        return run_section(
            run, "cost", "Cost", '<p class="empty">Nothing measured yet.</p>', source
        )
    times = [one.seconds for one in trained_networks(run) if one.seconds is not None]
    trained = f": {duration(sum(times))} for {len(times)} networks" if times else ""
    body = (
        f"<p>The cost of this search alone; training from scratch is not part of it{trained}.</p>"
        f'<div class="pair"><div>{table(["phase", "seconds", "share"], phases, text=(0,))}</div>'
        f"<div>{table(['measure', 'value'], counts, text=(0,))}</div></div>"
    )
    return run_section(run, "cost", "Cost", body, source)
