"""Sections of what was learned over time: retraining runs, and searches over each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastbandit.report.charts import Series, line_chart
from fastbandit.report.html import count, empty, get, percent, section, share, show, wide
from fastbandit.report.matching import Collection
from fastbandit.report.retraining import Epoch
from fastbandit.report.rows import shorten, sources, style_of

__all__ = ["searches", "training"]


def _guard(line: Epoch) -> str | None:
    """What the guard against catastrophic overfitting found wrong with an epoch, as HTML."""
    guard = (line.model_extra or {}).get("overfitting")
    if not isinstance(guard, Mapping) or not guard.get("overfitted"):
        return None
    trained, strong = share(guard.get("trained")), share(guard.get("strong"))
    if trained is None or strong is None:
        return "catastrophic overfitting"
    words = (
        f"{percent(trained)} under the training attack, {percent(strong)} under a stronger one, "
        f"of {show(guard.get('images'))} images"
    )
    back = guard.get("back_to")
    if isinstance(back, int) and not isinstance(back, bool):
        words += f"; back to {f'epoch {back + 1}' if back >= 0 else 'the beginning'}"
    return words


def training(found: Collection) -> str:
    runs = [run for run in found.retrainings if run.epochs]
    if not runs:
        body = empty("No epoch of a retraining yet.")
        return section("training", "Training", body, sources(found.retrainings, "metrics.jsonl"))
    last = max(max(run.planned or 0, *(line.epoch + 1 for line in run.epochs)) for run in runs)
    span = (0.0, float(last))
    alone = len(runs) == 1

    def lines(field: str, name: str, position: int | None = None) -> list[Series]:
        series = []
        for number, run in enumerate(runs):
            style, dashed = style_of(number if position is None else position)
            title = name if alone else shorten(f"{run.key} {run.label}")
            x = [line.epoch + 1 for line in run.epochs]
            y = [getattr(line, field) for line in run.epochs]
            series.append(Series(title, x, y, style, dashed))
        return series

    def notes(*fields: str) -> list[tuple[float, str]]:
        found_notes: dict[int, list[str]] = {}
        for run in runs:
            for line in run.epochs:
                values = [
                    f"{field.replace('_', ' ')} {value:.4g}"
                    for field in fields
                    if (value := getattr(line, field)) is not None
                ]
                words = f"epoch {line.epoch + 1}: {', '.join(values)}"
                found_notes.setdefault(line.epoch + 1, []).append(
                    words if alone else f"{run.key} {words}"
                )
        return [(float(at), "; ".join(words)) for at, words in sorted(found_notes.items())]

    def chart(series: Sequence[Series], title: str, label: str, fields: Sequence[str],
              **more: Any) -> str:  # fmt: skip
        return line_chart(
            series, title=title, x_label="epochs", y_label=label, x_range=span,
            notes=notes(*fields), **more,
        )  # fmt: skip

    small = {"width": 540, "height": 230}
    if alone:
        series = [
            *lines("clean_accuracy", "clean", 0),
            *lines("robust_accuracy", "robust", 1),
            *lines("train_accuracy", "training, attacked", 2),
        ]
        marks = [
            (float(line.epoch + 1), "guard") for line in runs[0].epochs if _guard(line) is not None
        ]
        best = count(get(runs[0].summary, "best", "epoch"))
        if best is not None and best < last:
            marks.append((float(best + 1), "best"))
        fields = ("clean_accuracy", "robust_accuracy", "train_accuracy")
        accuracies = chart(series, "Accuracy of each epoch", "accuracy", fields, events=marks)
        body = (
            "<p>Clean and robust: validation images; training: the attacked images that the "
            "weights were trained on.</p>"
            f"{wide(accuracies)}"
        )
    else:
        charts = [
            chart(lines(field, ""), f"{kind} validation accuracy", f"{kind} accuracy", (field,),
                  **small)
            for kind, field in (("robust", "robust_accuracy"), ("clean", "clean_accuracy"))
        ]  # fmt: skip
        body = "<p>Accuracy on the validation images after each epoch.</p>" + _pair(charts)
    body += _pair(
        [
            chart(lines("loss", "loss", 3 if alone else None), "Training loss",
                  "loss, attacked images", ("loss",), **small),
            chart(lines("learning_rate", "rate", 0 if alone else None), "Learning rate",
                  "learning rate", ("learning_rate",), **small),
        ]
    )  # fmt: skip
    warned = [(run, line, text) for run in runs for line in run.epochs if (text := _guard(line))]
    if warned:
        items = "".join(
            f"<li>{show(run.key)}, epoch {line.epoch + 1}: {text}</li>"
            for run, line, text in warned
        )
        body += f"<h3>Guard against catastrophic overfitting</h3><ul>{items}</ul>"
    return section("training", "Training", body, sources(runs, "metrics.jsonl"))


def _pair(figures: Sequence[str]) -> str:
    return (
        '<div class="pair">'
        + "".join(f'<div class="figure">{figure}</div>' for figure in figures)
        + "</div>"
    )


def searches(found: Collection) -> str:
    """The searches' robust validation accuracy over each other, where there are several."""
    runs = [run for run in found.searches if run.samples]
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
    body = (
        "<p>What each bandit was credited with; every point is another path, so a line tells of "
        f"the shared weights and of chance.</p>"
        f"{wide(chart)}"
    )
    return section("rewards", "Searches over each other", body, sources(runs, "bandit.jsonl"))
