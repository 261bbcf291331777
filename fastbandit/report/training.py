"""Sections of what was learned over time: retraining runs, and searches over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fastbandit.report.charts import SMALL, Series, line_chart
from fastbandit.report.html import as_text, count, empty, get, percent, section, share
from fastbandit.report.matching import Collection
from fastbandit.report.retraining import Epoch, Retraining
from fastbandit.report.rows import shorten, sources, style_of

__all__ = ["searches", "training"]


def _guard(line: Epoch) -> str | None:
    """What the guard against catastrophic overfitting found wrong with an epoch."""
    guard = (line.model_extra or {}).get("overfitting")
    if not isinstance(guard, Mapping) or not guard.get("overfitted"):
        return None
    trained, strong = share(guard.get("trained")), share(guard.get("strong"))
    if trained is None or strong is None:
        return "catastrophic overfitting"
    words = (
        f"{percent(trained)} under the training attack, {percent(strong)} under a stronger one, "
        f"of {as_text(guard.get('images'))} images"
    )
    back = guard.get("back_to")
    if isinstance(back, int) and not isinstance(back, bool):
        words += f"; back to {f'epoch {back + 1}' if back >= 0 else 'the beginning'}"
    return words


def _series(
    runs: Sequence[Retraining], field: str, name: str = "", position: int | None = None
) -> list[Series]:
    """A line of each run; where there is one run, it is called ``name``."""
    series = []
    for number, run in enumerate(runs):
        style, dashed = style_of(number if position is None else position)
        title = name if len(runs) == 1 else shorten(f"{run.key} {run.label}")
        x = [line.epoch + 1 for line in run.epochs]
        y = [getattr(line, field) for line in run.epochs]
        series.append(Series(title, x, y, style, dashed))
    return series


def _notes(runs: Sequence[Retraining], fields: Sequence[str]) -> list[tuple[float, str]]:
    """What the runs' logs say of each epoch, as tooltips."""
    notes: dict[int, list[str]] = {}
    for run in runs:
        for line in run.epochs:
            values = [
                f"{field.replace('_', ' ')} {value:.4g}"
                for field in fields
                if (value := getattr(line, field)) is not None
            ]
            words = f"epoch {line.epoch + 1}: {', '.join(values)}"
            words = words if len(runs) == 1 else f"{run.key} {words}"
            notes.setdefault(line.epoch + 1, []).append(words)
    return [(float(at), "; ".join(words)) for at, words in sorted(notes.items())]


def training(collection: Collection) -> Markup:
    runs = [run for run in collection.retrainings if run.epochs]
    if not runs:
        source = sources(collection.retrainings, "metrics.jsonl")
        return empty("training", "Training", source, "No epoch of a retraining yet.")
    last = max(max(run.planned or 0, *(line.epoch + 1 for line in run.epochs)) for run in runs)
    alone = len(runs) == 1

    def chart(
        series: Sequence[Series], title: str, label: str, *fields: str, **more: Any
    ) -> Markup:
        return line_chart(
            series, title=title, x_label="epochs", y_label=label, x_range=(0.0, float(last)),
            notes=_notes(runs, fields), **more,
        )  # fmt: skip

    if alone:
        series = [
            *_series(runs, "clean_accuracy", "clean", 0),
            *_series(runs, "robust_accuracy", "robust", 1),
            *_series(runs, "train_accuracy", "training, attacked", 2),
        ]
        marks = [(float(line.epoch + 1), "guard") for line in runs[0].epochs if _guard(line)]
        best = count(get(runs[0].summary, "best", "epoch"))
        if best is not None and best < last:
            marks.append((float(best + 1), "best"))
        fields = ("clean_accuracy", "robust_accuracy", "train_accuracy")
        accuracies = [chart(series, "Accuracy of each epoch", "accuracy", *fields, events=marks)]
    else:
        accuracies = [
            chart(
                _series(runs, f"{kind}_accuracy"), f"{kind} validation accuracy",
                f"{kind} accuracy", f"{kind}_accuracy", **SMALL,
            )
            for kind in ("robust", "clean")
        ]  # fmt: skip
    loss = _series(runs, "loss", "loss", 3 if alone else None)
    learning_rate = _series(runs, "learning_rate", "rate", 0 if alone else None)
    return section(
        "training",
        "Training",
        sources(runs, "metrics.jsonl"),
        "training",
        accuracies=accuracies,
        others=[
            chart(loss, "Training loss", "loss, attacked images", "loss", **SMALL),
            chart(learning_rate, "Learning rate", "learning rate", "learning_rate", **SMALL),
        ],
        warned=[
            (run, str(line.epoch + 1), words)
            for run in runs
            for line in run.epochs
            if (words := _guard(line))
        ],
    )


def searches(collection: Collection) -> Markup:
    """The searches' rewards over each other, where there are several."""
    runs = [run for run in collection.searches if run.samples]
    series = []
    for position, run in enumerate(runs):
        style, dashed = style_of(position)
        x = [line.sample + 1 for line in run.samples]
        y = [line.reward for line in run.samples]
        series.append(Series(shorten(f"{run.key} {run.label}"), x, y, style, dashed))
    chart = line_chart(
        series,
        title="Reward of each sampled path",
        x_label="samples",
        y_label="reward",
        x_range=(0.0, float(max((run.planned for run in runs), default=1))),
    )
    source = sources(runs, "bandit.jsonl")
    return section("rewards", "Searches over each other", source, "rewards", chart=chart)
