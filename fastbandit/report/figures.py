"""The section of a search's key figures."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from fastbandit.report.html import duration, finite, get, interval, percent, run_section, show, tile
from fastbandit.report.search import Run, split_size, totals

__all__ = ["accuracy_rows", "figures"]


def accuracy_rows(run: Run) -> list[tuple[str, str, float, int | None, str]]:
    """(split, kind, accuracy, n, attack) of every accuracy of the found path."""
    rows = []
    for key in ("test", "final"):
        found = get(run.summary, key)
        if not isinstance(found, Mapping):
            continue
        n = found.get("n")
        count = n if isinstance(n, int) and not isinstance(n, bool) and n > 0 else None
        split = str(found.get("split") or key)
        for kind in ("clean", "robust"):
            value = finite(found.get(f"{kind}_accuracy"))
            if value is not None:
                attack = str(found.get("attack") or "") if kind == "robust" else ""
                rows.append((split, kind, value, count, attack))
    return rows


def figures(run: Run) -> str:
    accuracies = accuracy_rows(run)
    tiles = []
    for split, kind, value, n, _ in accuracies:
        count = "" if n is None else f", n&nbsp;=&nbsp;{n:,}"
        tiles.append(
            tile(
                f"shared weights: {kind}, {escape(split)}",
                percent(value),
                f"95 %: {interval(value, n)}{count}",
            )
        )
    if not accuracies and run.samples:
        last = run.samples[-1]
        n = split_size(run, "validation")
        for kind, found in (("clean", last.clean_accuracy), ("robust", last.robust_accuracy)):
            if found is not None:
                count = "" if n is None else f", n&nbsp;=&nbsp;{n:,}"
                tiles.append(
                    tile(
                        f"{kind} accuracy, last sample",
                        percent(found),
                        f"95 %: {interval(found, n)}{count} (validation)",
                    )
                )
    cost = get(run.summary, "cost") or {}
    epochs = get(cost, "epochs")
    epochs = run.epoch_at(len(run.samples)) if epochs is None else epochs
    planned = "" if run.finished else f"of {run.planned_epochs} planned"
    only_evaluated = sum(not line.trained for line in run.samples)
    if only_evaluated:
        planned += f"{', ' if planned else ''}{only_evaluated:,} more paths only evaluated"
    tiles.append(tile("epochs", show(epochs), planned))
    measured = totals(run)
    seconds = finite(get(cost, "seconds_total"))
    seconds = measured["seconds_total"] if seconds is None else seconds
    if seconds is not None:
        tiles.append(tile("time", duration(seconds), f"{seconds:.1f} seconds"))
    speed = finite(get(cost, "images_per_second"))
    speed = measured["images_per_second"] if speed is None else speed
    if speed is not None:
        tiles.append(tile("images/s", f"{speed:,.0f}", "in training"))
    peak = finite(get(cost, "peak_memory_mb"))
    peak = measured["peak_memory_mb"] if peak is None else peak
    if peak is not None:
        device = get(cost, "device") or run.config.get("device")
        on = "" if device is None else f", {show(device)}"
        owner = "process" if str(device).startswith("cpu") else "allocator"
        tiles.append(tile("peak memory", f"{peak:,.0f} MiB", f"of the {owner}{on}"))
    body = f'<dl class="tiles">{"".join(tiles)}</dl>'
    if any(kind == "robust" and split == "validation" for split, kind, *_ in accuracies):
        body += (
            "<p>These accuracies are those of the found path with the weights that all paths of "
            "the search share; they do not judge the architecture. The validation images gave "
            "the search its rewards, so their accuracy is optimistic. Intervals are Wilson's, for "
            "the images alone: they hold no variance between seeds.</p>"
        )
    attacks = dict.fromkeys(attack for *_, attack in accuracies if attack)
    for attack in attacks:
        body += f'<p class="meta">robust: {escape(attack)}</p>'
    source = "summary.json" if run.finished else "bandit.jsonl and metrics.jsonl"
    return run_section(run, "figures", "The search", body, source)
