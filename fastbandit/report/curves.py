"""The section of a search's accuracy, loss and learning rate over time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from fastbandit.report.charts import SMALL, Series, line_chart
from fastbandit.report.html import as_text, empty, section
from fastbandit.report.search import Run, split_size

__all__ = ["curves"]

_FRAME = ("curves", "Accuracy over samples", "bandit.jsonl, metrics.jsonl")
_ACCURACIES = ("clean_accuracy", "robust_accuracy", "reward")


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def curves(run: Run) -> Markup:
    if not run.samples:
        return empty(*_FRAME, "No sample yet.", of=run)
    mixed = not all(line.trained for line in run.samples)
    # Loss and learning rate belong to the paths that were trained: their axis counts epochs.
    epochs = [line.epoch + 1 for line in run.metrics]

    def small(
        name: str, title: str, label: str, values: Sequence[float | None], style: str,
        notes: Sequence[str], events: Sequence[tuple[float, str]] = (),
    ) -> Markup:  # fmt: skip
        return line_chart(
            [Series(name, epochs, values, style)],
            title=title,
            x_label="epochs" if mixed else "samples",
            y_label=label,
            # The found path's own epochs come after those of the search.
            x_range=(0.0, float(max([run.planned_epochs, *epochs]))),
            events=events,
            notes=[
                (float(line.epoch + 1), f"epoch {line.epoch + 1}: {note}")
                for line, note in zip(run.metrics, notes, strict=True)
            ],
            **SMALL,
        )

    losses, rates = ([getattr(line, name) for line in run.metrics]
                     for name in ("loss", "learning_rate"))  # fmt: skip
    prunings = [(float(run.epoch_at(sample)), str(left)) for sample, _, left in run.prunings]
    return section(
        *_FRAME,
        "curves",
        of=run,
        images=split_size(run, "validation"),
        mixed=mixed,
        accuracy=_accuracy(run, mixed),
        others=[
            small("loss", "Training loss on attacked images", "loss, attacked images", losses,
                  "s4", [f"loss {_shown(loss)}" for loss in losses], prunings),
            small("rate", "Learning rate", "learning rate", rates, "s1",
                  [f"learning rate {as_text(rate)}" for rate in rates]),
        ],
        means=_round_means(run),
    )  # fmt: skip


def _accuracy(run: Run, mixed: bool) -> Markup:
    x = [line.sample + 1 for line in run.samples]
    clean, robust, reward = ([getattr(line, name) for line in run.samples] for name in _ACCURACIES)
    # A reward that is one of the two accuracies is named there instead of drawn over it.
    names = ["clean = reward" if reward == clean else "clean"]
    names.append("robust = reward" if reward == robust else "robust")
    lines = [Series(names[0], x, clean, "s1"), Series(names[1], x, robust, "s2")]
    if reward not in (clean, robust):
        lines.append(Series("reward", x, reward, "s3", dashed=True))
    return line_chart(
        lines,
        title="Validation accuracy of each sampled path",
        x_label="samples" if mixed else "samples (one epoch each)",
        y_label="validation accuracy",
        x_range=(0.0, float(run.planned)),
        events=[(float(sample), str(left)) for sample, _, left in run.prunings],
        notes=[
            (
                float(at),
                f"after {at} samples ({line.phase}{'' if line.trained else ', only evaluated'}): "
                f"clean {_shown(line.clean_accuracy)}, robust {_shown(line.robust_accuracy)}, "
                f"reward {_shown(line.reward)}",
            )
            for at, line in zip(x, run.samples, strict=True)
        ],
    )


def _round_means(run: Run) -> list[tuple[str, str, str, list[tuple[float, float] | None]]]:
    """Between two prunings: arms left, samples, how many were trained, (mean, sd) of each value."""
    assert run.start is not None
    cuts = [0, *[sample for sample, _, _ in run.prunings], len(run.samples)]
    lefts = [len(run.start.operations), *[left for _, _, left in run.prunings]]
    rows = []
    for low, high, left in zip(cuts, cuts[1:], lefts, strict=False):
        part = run.samples[low:high]
        if not part:
            continue
        means: list[tuple[float, float] | None] = []
        for name in _ACCURACIES:
            values = [v for line in part if (v := getattr(line, name)) is not None]
            means.append((float(np.mean(values)), float(np.std(values))) if values else None)
        trained = sum(line.trained for line in part)
        rows.append((str(left), f"{low + 1} to {low + len(part)}", str(trained), means))
    return rows
