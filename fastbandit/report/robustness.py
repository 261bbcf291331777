"""Sections of evaluations: robustness, suspicion checks, adversarial examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from fastbandit.report.charts import STYLES, Bar, Series, bar_chart, line_chart
from fastbandit.report.evaluation import EVALUATION, EXAMPLES, Evaluation, Examples, Result
from fastbandit.report.html import as_text, empty, get, percent, render, section
from fastbandit.report.matching import Collection, Model
from fastbandit.report.png import data_uri
from fastbandit.report.rows import (
    model_name,
    norm_words,
    plain,
    rows_of,
    shorten,
    sizes,
    sources,
    style_of,
    threat_words,
)
from fastbandit.report.shares import Share, make_share

__all__ = ["checks", "examples_section", "has_pictures", "robustness"]

# Pictures beyond these would make the page heavy without showing more.
_MOST_EXAMPLES, _MOST_PIXELS = 16, 600_000
# Lines of single attacks beside that of the worst case.
_MOST_LINES = 4


def robustness(collection: Collection) -> Markup:
    models = [m for m in collection.models if any(run.results for run in m.evaluations)]
    runs = [run for model in models for run in model.evaluations]
    if not models:
        words = "No evaluation yet: python -m fastbandit.evaluate makes one."
        return empty("robustness", "Robustness", "no file", words)
    threats = _by_threat(models)
    units = {str(get(run.summary, "cost", "unit_of_passes")) for run in runs} - {"None"}
    return section(
        "robustness",
        "Robustness",
        sources(runs, EVALUATION),
        "robustness",
        sweeps=_sweeps(models),
        threats=threats,
        every={result.every for _, _, entries in threats for _, result in entries},
        unit=units.pop() if len(units) == 1 else None,
        left_out=[
            (run, words)
            for run in runs
            # Not in files of older versions.
            if isinstance(words := get(run.summary, "cross_check_left_out"), str) and words
        ],
        more=[(run, parts) for run in runs if (parts := _more(run))],
    )


#: One result for each radius.
_Points = dict[float, tuple[Evaluation, Result]]


def _points(model: Model, norm: str) -> dict[tuple[Any, ...], _Points]:
    """One result for each epsilon, for each set of images: where there are several, one that is
    not suspicious, then the one with most attacks."""
    by_data: dict[tuple[Any, ...], _Points] = {}

    def rank(run: Evaluation, result: Result) -> tuple[bool, int]:
        return (not run.suspicious, len(result.attacks))

    for run in model.evaluations:
        points = by_data.setdefault((*run.data, str(get(run.summary, "data", "n"))), {})
        for result in run.results:
            radius = result.radius
            if result.norm != norm or radius is None or result.worst is None:
                continue
            if radius not in points or rank(*points[radius]) < rank(run, result):
                points[radius] = (run, result)
    return {data: dict(sorted(points.items())) for data, points in by_data.items() if points}


def _curves(model: Model, norm: str) -> list[tuple[str, _Points]]:
    """Name and points of each curve of a model: one for each set of images."""
    by_data = _points(model, norm)
    name = model_name(model)
    if len(by_data) == 1:
        return [(name, points) for points in by_data.values()]
    return [
        (f"{name}, {next(iter(points.values()))[0].key}", points) for points in by_data.values()
    ]


def _sweeps(models: Sequence[Model]) -> list[dict[str, Any]]:
    """Accuracy against epsilon, one chart for each norm with two radii or more."""
    norms = sorted(
        {result.norm for model in models for run in model.evaluations for result in run.results},
        key=lambda norm: (norm != "linf", norm),
    )
    sweeps = []
    for norm in norms:
        curves = [curve for model in models for curve in _curves(model, norm)]
        radii = sorted({radius for _, points in curves for radius in points})
        if len(radii) < 2:
            continue
        series = []
        for position, (title, points) in enumerate(curves):
            style, dashed = style_of(position)
            name = "worst case" if len(curves) == 1 else shorten(title)
            series.append(_curve(name, points, style, dashed))
            if len(curves) == 1:
                series += _attack_curves(points)
        texts = {radius: result.epsilon for _, points in curves
                 for radius, (_, result) in points.items()}  # fmt: skip
        words = norm_words(norm)
        chart = line_chart(
            series,
            title=f"Accuracy against epsilon, {words}",
            x_label=f"epsilon, {words} norm, images in [0, 1]",
            y_label="accuracy",
            x_range=(0.0, radii[-1]),
            x_ticks=[(0.0, "0"), *((radius, texts[radius]) for radius in radii if radius > 0)],
            y_range=(0.0, 1.0),
            notes=[(radius, _sweep_note(curves, radius)) for radius in radii],
            width=760,
            height=320,
        )
        attacks = {tuple(attack.name for attack in result.attacks)
                   for _, points in curves for _, result in points.values()}  # fmt: skip
        sweeps.append({"norm": words, "chart": chart, "alike": len(attacks) == 1})
    return sweeps


def _sweep_note(curves: Sequence[tuple[str, _Points]], radius: float) -> str:
    """The worst case of each curve at one radius."""
    notes = []
    for title, points in curves:
        run, result = points.get(radius, (None, None))
        if run is not None and result is not None and result.worst is not None:
            notes.append(
                f"epsilon {result.epsilon}, {title}: worst case {percent(result.worst.accuracy)} "
                f"of {sizes(result.worst)}{', suspicious' if run.suspicious else ''}"
            )
    return "; ".join(notes)


def _curve(
    name: str, points: Mapping[float, tuple[Evaluation, Result]], style: str, dashed: bool
) -> Series:
    x: list[float] = []
    shares: list[Share] = []
    first = next(iter(points.values()))[1]
    if 0.0 not in points and first.clean is not None:
        x.append(0.0)
        shares.append(first.clean)
    for radius, (_, result) in points.items():
        assert result.worst is not None
        x.append(radius)
        shares.append(result.worst)
    return Series(
        name,
        x,
        [share.accuracy for share in shares],
        style,
        dashed,
        low=[share.low for share in shares],
        high=[share.high for share in shares],
    )


def _attack_curves(points: Mapping[float, tuple[Evaluation, Result]]) -> list[Series]:
    """A line for each attack that was run at two radii or more."""
    curves: dict[str, dict[float, float]] = {}
    for radius, (_, result) in points.items():
        for attack in result.attacks:
            curves.setdefault(attack.name, {})[radius] = attack.share.accuracy
    worst = {r: result.worst.accuracy for r, (_, result) in points.items() if result.worst}
    # The line of the attack that decides everywhere would lie on that of the worst case.
    lines = [
        (name, values)
        for name, values in curves.items()
        if len(values) > 1 and values != {radius: worst[radius] for radius in values}
    ][:_MOST_LINES]
    return [
        Series(name, list(values), list(values.values()), STYLES[1 + position], dashed=True)
        for position, (name, values) in enumerate(lines)
    ]


#: An evaluation and one of its results.
_Entry = tuple[Evaluation, Result]


def _by_threat(models: Sequence[Model]) -> list[tuple[str, Markup, list[_Entry]]]:
    """Words, chart and results of each threat: first those that stand for a model."""
    threats: dict[tuple[str, str], list[_Entry]] = {}
    for model in models:
        for run in model.evaluations:
            for result in run.results:
                threats.setdefault((result.norm, result.epsilon), []).append((run, result))
    chosen = [row.threat for model in models if (row := rows_of(model)[0]).result is not None]

    def order(entries: Sequence[_Entry]) -> tuple[Any, ...]:
        result = entries[0][1]
        words = threat_words(result.threat)
        return words not in chosen, result.norm != "linf", result.norm, result.radius or 0.0

    blocks = []
    for entries in sorted(threats.values(), key=order):
        words = threat_words(entries[0][1].threat)
        title = f"Accuracy under attack, {words}"
        chart = bar_chart(_attack_bars(entries), title=title, x_label="accuracy", width=760)
        blocks.append((words, chart, entries))
    return blocks


def _attack_bars(entries: Sequence[_Entry]) -> list[Bar]:
    several = len(entries) > 1
    names = dict.fromkeys(attack.name for _, result in entries for attack in result.attacks)
    kinds: list[tuple[str, int]] = [("clean", 0), *((name, 1) for name in names), ("worst case", 3)]
    bars = []
    for kind, colour in kinds:
        for position, (run, result) in enumerate(entries):
            note, share = "", {"clean": result.clean, "worst case": result.worst}.get(kind)
            if kind not in ("clean", "worst case"):
                attack = next((a for a in result.attacks if a.name == kind), None)
                share = None if attack is None else attack.share
                note = "" if attack is None else f"{attack.describe}; "
            if share is None:
                continue
            limits = f", 95 %: {share.limits} %" if share.limits else ""
            bars.append(
                Bar(
                    label=shorten(f"{kind} · {run.key}" if several else kind, 26),
                    value=share.accuracy,
                    text=percent(share.accuracy),
                    style=style_of(position)[0] if several else STYLES[colour],
                    low=share.low,
                    high=share.high,
                    note=f"{kind}: {note}{percent(share.accuracy)}{limits}, n = {sizes(share)}",
                )
            )
    return bars


def _more(run: Evaluation) -> list[tuple[str, Markup]]:
    """The parts of an evaluation whose fields are their own business: shown as they are."""
    parts = (
        ("Cross-check", "cross_check"),
        ("Transfer", "transfer"),
        ("RobustBench entry", "robustbench"),
    )
    return [
        (title, _transfer(value) if key == "transfer" else plain(value))
        for title, key in parts
        if (value := get(run.summary, key))
    ]


def _transfer(value: Any) -> Markup:
    """Accuracy on images that were made against other models."""
    lines: list[tuple[Any, Mapping[str, Any], Share | None]] = []
    for entry in value if isinstance(value, list) else []:
        origin = get(entry, "from")
        if isinstance(origin, Mapping):
            origin = get(origin, "file") or get(origin, "code")
        attacks = get(entry, "attacks")
        for attack in attacks if isinstance(attacks, list) else []:
            stated = attack if isinstance(attack, Mapping) else {}
            fields = (stated.get(key) for key in ("accuracy", "n", "correct", "interval"))
            lines.append((origin, stated, make_share(*fields, where="", notes=[])))
    return render("transfer", lines=lines) if lines else plain(value)


def checks(collection: Collection) -> Markup:
    runs = [run for run in collection.evaluations if get(run.summary, "suspicion") is not None]
    if not runs:
        words = "No suspicion checks: an evaluation makes them."
        return empty("checks", "Suspicion checks", "no file", words)
    shown = []
    for run in runs:
        listed = get(run.summary, "suspicion", "checks")
        entries = (
            [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
        )
        shown.append((run, get(run.summary, "suspicion", "verdict"), entries))
    return section("checks", "Suspicion checks", sources(runs, EVALUATION), "checks", runs=shown)


# --- examples -------------------------------------------------------------------------------


def _shown(examples: Examples) -> int:
    pixels = int(np.prod(examples.clean.shape[1:])) * 3
    return max(1, min(len(examples.label), _MOST_EXAMPLES, _MOST_PIXELS // pixels))


def _with_examples(collection: Collection) -> list[tuple[Evaluation, Examples]]:
    return [(run, run.examples) for run in collection.evaluations
            if run.examples is not None and run.examples.label]  # fmt: skip


def has_pictures(collection: Collection) -> bool:
    return bool(_with_examples(collection))


def _picture(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[C, H, W] as the PNG writer wants it; the mean over channels where C is not 1 or 3."""
    if image.shape[0] == 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    if image.shape[0] == 1:
        return np.ascontiguousarray(image[0])
    return np.rint(image.mean(0)).astype(np.uint8)


def examples_section(collection: Collection) -> Markup:
    kept = _with_examples(collection)
    if not kept:
        words = "No adversarial examples: an evaluation keeps some."
        return empty("examples", "Adversarial examples", "no file", words)
    shown = []
    for run, examples in kept:
        count, total = _shown(examples), len(examples.label)
        names = get(run.summary, "data", "class_names")
        classes = names if isinstance(names, list) else None
        note = f", the first {count} of {total:,}" if count < total else ""
        channels, height, width = examples.clean.shape[1:]
        if channels not in (1, 3):
            note += f"; the mean of their {channels} channels"
        cards = [_card(examples, i, classes) for i in range(count)]
        shown.append((run, note, str(width), str(height), cards))
    files = sources([run for run, _ in kept], EXAMPLES)
    return section("examples", "Adversarial examples", files, "examples", runs=shown)


def _card(examples: Examples, i: int, names: list[Any] | None) -> dict[str, Any]:
    difference = examples.difference[i]
    most = float(np.abs(difference).max())
    scaled = np.rint(127.5 + 127.5 * difference / most) if most else np.full_like(difference, 128)
    pictures = {
        "clean": examples.clean[i],
        "adversarial": examples.adversarial[i],
        "difference": scaled.astype(np.uint8),
    }

    def name(value: int) -> str:
        if names is not None and 0 <= value < len(names):
            return f"{as_text(names[value])} ({value})"
        return "not finite" if value == -1 else str(value)

    return {
        "image": str(examples.identity[i]),
        "pictures": {kind: data_uri(_picture(pixels)) for kind, pixels in pictures.items()},
        "label": name(examples.label[i]),
        "before": name(examples.before[i]),
        "after": name(examples.after[i]),
        "stood": examples.after[i] == examples.label[i],
        "most": most,
    }
