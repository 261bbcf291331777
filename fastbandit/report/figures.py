"""The section of a search's key figures."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from fastbandit.report.html import (
    as_text,
    count,
    duration,
    finite,
    get,
    interval,
    percent,
    section,
    share,
)
from fastbandit.report.search import Run, split_size, totals

__all__ = ["accuracy_rows", "figures"]


def accuracy_rows(run: Run) -> list[tuple[str, str, float, int | None, str]]:
    """(split, kind, accuracy, n, attack) of every accuracy of the found path."""
    rows = []
    for key in ("test", "final"):
        evaluation = get(run.summary, key)
        if not isinstance(evaluation, Mapping):
            continue
        n, split = count(evaluation.get("n")) or None, as_text(evaluation.get("split") or key)
        for kind in ("clean", "robust"):
            stated = evaluation.get(f"{kind}_accuracy")
            value = share(stated)
            if value is not None:
                attack = as_text(evaluation.get("attack") or "") if kind == "robust" else ""
                rows.append((split, kind, value, n, attack))
            elif stated is not None:
                run.note(
                    f"summary.json: {key}.{kind}_accuracy: expected a number in [0, 1], got "
                    f"{stated!r:.60}; left out"
                )
    return rows


def figures(run: Run) -> Markup:
    def images(value: float, n: int | None) -> str:
        return f"95 %: {interval(value, n)}" + ("" if n is None else f", n\N{NBSP}=\N{NBSP}{n:,}")

    accuracies = accuracy_rows(run)
    tiles = [
        (f"shared weights: {kind}, {split}", percent(value), images(value, n))
        for split, kind, value, n, _ in accuracies
    ]
    if not accuracies and run.samples:
        last, n = run.samples[-1], split_size(run, "validation")
        for kind, accuracy in (("clean", last.clean_accuracy), ("robust", last.robust_accuracy)):
            if accuracy is not None:
                more = f"{images(accuracy, n)} (validation)"
                tiles.append((f"{kind} accuracy, last sample", percent(accuracy), more))
    cost, measured = get(run.summary, "cost") or {}, totals(run)

    def stated(name: str) -> float | None:
        value = finite(get(cost, name))
        return measured[name] if value is None else value

    epochs = get(cost, "epochs")
    epochs = run.epoch_at(len(run.samples)) if epochs is None else epochs
    planned = [] if run.finished else [f"of {run.planned_epochs} planned"]
    if only_evaluated := sum(not line.trained for line in run.samples):
        planned.append(f"{only_evaluated:,} more paths only evaluated")
    tiles.append(("epochs", as_text(epochs), ", ".join(planned)))
    if (seconds := stated("seconds_total")) is not None:
        tiles.append(("time", duration(seconds), f"{seconds:.1f} seconds"))
    if (speed := stated("images_per_second")) is not None:
        tiles.append(("images/s", f"{speed:,.0f}", "in training"))
    if (peak := stated("peak_memory_mb")) is not None:
        device = get(cost, "device") or run.config.get("device")
        on = "" if device is None else f", {as_text(device)}"
        owner = "process" if str(device).startswith("cpu") else "allocator"
        tiles.append(("peak memory", f"{peak:,.0f} MiB", f"of the {owner}{on}"))
    validated = any(split == "validation" and kind == "robust" for split, kind, *_ in accuracies)
    attacks = dict.fromkeys(attack for *_, attack in accuracies if attack)
    return section(
        "figures",
        "The search",
        "summary.json" if run.finished else "bandit.jsonl and metrics.jsonl",
        "figures",
        of=run,
        tiles=tiles,
        optimistic=validated,
        attacks=attacks,
    )
