"""The section of a search's accuracy, loss and learning rate over time."""

from __future__ import annotations

import numpy as np

from fastbandit.report.charts import Series, line_chart
from fastbandit.report.html import empty, folded, run_section, show, table, wide
from fastbandit.report.search import Run, split_size

__all__ = ["curves"]


def curves(run: Run) -> str:
    if not run.samples:
        body = empty("No sample yet.")
        return run_section(
            run, "curves", "Accuracy over samples", body, "bandit.jsonl, metrics.jsonl"
        )
    x = [line.sample + 1 for line in run.samples]
    clean = [line.clean_accuracy for line in run.samples]
    robust = [line.robust_accuracy for line in run.samples]
    reward = [line.reward for line in run.samples]
    events = [(float(sample), str(left)) for sample, _, left in run.prunings]
    span = (0.0, float(run.planned))

    def shown(value: float | None) -> str:
        return "none" if value is None else f"{value:.4f}"

    notes = [
        (
            float(at),
            f"after {at} samples ({line.phase}{'' if line.trained else ', only evaluated'}): "
            f"clean {shown(line.clean_accuracy)}, robust {shown(line.robust_accuracy)}, "
            f"reward {shown(line.reward)}",
        )
        for at, line in zip(x, run.samples, strict=True)
    ]
    mixed = not all(line.trained for line in run.samples)
    # A reward that is one of the two accuracies is named there instead of drawn over it.
    names = ["clean = reward" if reward == clean else "clean"]
    names.append("robust = reward" if reward == robust else "robust")
    lines = [Series(names[0], x, clean, "s1"), Series(names[1], x, robust, "s2")]
    if reward not in (clean, robust):
        lines.append(Series("reward", x, reward, "s3", dashed=True))
    accuracy = line_chart(
        lines,
        title="Validation accuracy of each sampled path",
        x_label="samples" if mixed else "samples (one epoch each)",
        y_label="validation accuracy",
        x_range=span,
        events=events,
        notes=notes,
    )
    # Loss and learning rate belong to the paths that were trained: their axis counts epochs.
    epochs = [line.epoch + 1 for line in run.metrics]
    by_epoch = "epochs" if mixed else "samples"
    # The found path's own epochs come after those of the search.
    epoch_span = (0.0, float(max([run.planned_epochs, *epochs])))
    epoch_events = [(float(run.epoch_at(sample)), str(left)) for sample, _, left in run.prunings]
    loss = line_chart(
        [Series("loss", epochs, [line.loss for line in run.metrics], "s4")],
        title="Training loss on attacked images",
        x_label=by_epoch,
        y_label="loss, attacked images",
        x_range=epoch_span,
        events=epoch_events,
        notes=[
            (float(m.epoch + 1), f"epoch {m.epoch + 1}: loss {shown(m.loss)}") for m in run.metrics
        ],
        width=540,
        height=230,
    )
    rate = line_chart(
        [Series("rate", epochs, [line.learning_rate for line in run.metrics], "s1")],
        title="Learning rate",
        x_label=by_epoch,
        y_label="learning rate",
        x_range=epoch_span,
        notes=[
            (float(m.epoch + 1), f"epoch {m.epoch + 1}: learning rate {show(m.learning_rate)}")
            for m in run.metrics
        ],
        width=540,
        height=230,
    )
    means = _round_means(run)
    n = split_size(run, "validation")
    count = "" if n is None else f" ({n:,} images)"
    after = " after its epoch"
    if mixed:
        after += " or, where it was only evaluated, with the weights that the others had trained"
    body = (
        f"<p>Each point is one sampled path{after}, on the validation images{count}. "
        "The reward is what the bandit was credited with. Dotted lines: prunings, with the arms "
        "left on each edge above them.</p>"
        f"{wide(accuracy)}\n"
        f'<div class="pair"><div class="figure">{loss}</div>'
        f'<div class="figure">{rate}</div></div>\n{means}'
    )
    return run_section(run, "curves", "Accuracy over samples", body, "bandit.jsonl, metrics.jsonl")


def _round_means(run: Run) -> str:
    """Mean and spread of the accuracies between two prunings."""
    cuts = [0, *[sample for sample, _, _ in run.prunings], len(run.samples)]
    rows = []
    start = run.start
    assert start is not None
    arms = len(start.operations)
    lefts = [arms, *[left for _, _, left in run.prunings]]
    mixed = not all(line.trained for line in run.samples)
    for low, high, left in zip(cuts, cuts[1:], lefts, strict=False):
        part = run.samples[low:high]
        if not part:
            continue
        row = [str(left), f"{low + 1} to {low + len(part)}"]
        if mixed:
            row.append(str(sum(line.trained for line in part)))
        for name in ("clean_accuracy", "robust_accuracy", "reward"):
            values = [v for line in part if (v := getattr(line, name)) is not None]
            row.append(
                f'{np.mean(values):.4f} <span class="n">±{np.std(values):.4f}</span>'
                if values
                else "none"
            )
        rows.append(row)
    heads = ["arms left", "samples", *(["trained"] if mixed else []), "clean", "robust", "reward"]
    words = "Means between prunings (± standard deviation over paths)"
    return folded(words, table(heads, rows))
