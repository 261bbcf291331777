"""Sections of evaluations: robustness, suspicion checks, adversarial examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastbandit.report.charts import STYLES, Bar, Series, bar_chart, line_chart
from fastbandit.report.evaluation import EVALUATION, EXAMPLES, Evaluation, Examples, Result
from fastbandit.report.html import (
    as_text,
    empty,
    folded,
    get,
    percent,
    render,
    section,
    show,
    table,
)
from fastbandit.report.matching import Collection, Model
from fastbandit.report.png import data_uri
from fastbandit.report.rows import (
    model_name,
    plain,
    rows_of,
    share_cell,
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


def robustness(found: Collection) -> str:
    models = [model for model in found.models if any(run.results for run in model.evaluations)]
    runs = [run for model in models for run in model.evaluations]
    if not models:
        body = empty("No evaluation yet: python -m fastbandit.evaluate makes one.")
        return section("robustness", "Robustness", body, "no file")
    body = _sweeps(models) + _under_attack(models)
    body += "".join(_left_out(run) + _more(run) for run in runs)
    return section("robustness", "Robustness", body, sources(runs, EVALUATION))


#: One result for each radius.
_Points = dict[float, tuple[Evaluation, Result]]


def _points(model: Model, norm: str) -> dict[tuple[Any, ...], _Points]:
    """One result for each epsilon, for each set of images: where there are several, one that is
    not suspicious, then the one with most attacks."""
    found: dict[tuple[Any, ...], _Points] = {}

    def rank(run: Evaluation, result: Result) -> tuple[bool, int]:
        return (not run.suspicious, len(result.attacks))

    for run in model.evaluations:
        points = found.setdefault((*run.data, str(get(run.summary, "data", "n"))), {})
        for result in run.results:
            radius = result.radius
            if result.norm != norm or radius is None or result.worst is None:
                continue
            if radius not in points or rank(*points[radius]) < rank(run, result):
                points[radius] = (run, result)
    return {data: dict(sorted(points.items())) for data, points in found.items() if points}


def _curves(model: Model, norm: str) -> list[tuple[str, _Points]]:
    """Name and points of each curve of a model: one for each set of images."""
    found = _points(model, norm)
    name = model_name(model)
    if len(found) == 1:
        return [(name, points) for points in found.values()]
    return [(f"{name}, {next(iter(points.values()))[0].key}", points) for points in found.values()]


def _sweeps(models: Sequence[Model]) -> str:
    """Accuracy against epsilon, one chart for each norm with two radii or more."""
    norms = sorted(
        {result.norm for model in models for run in model.evaluations for result in run.results},
        key=lambda norm: (norm != "linf", norm),
    )
    body = ""
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
        ticks = [(0.0, "0"), *((radius, texts[radius]) for radius in radii if radius > 0)]
        words = {"linf": "L∞", "l2": "L2"}.get(norm, norm)
        notes = [
            (
                radius,
                "; ".join(
                    f"epsilon {result.epsilon}, {title}: worst case "
                    f"{percent(result.worst.accuracy)} of {sizes(result.worst)}"
                    f"{', suspicious' if run.suspicious else ''}"
                    for title, points in curves
                    for at, (run, result) in points.items()
                    if at == radius and result.worst is not None
                ),
            )
            for radius in radii
        ]
        chart = line_chart(
            series,
            title=f"Accuracy against epsilon, {words}",
            x_label=f"epsilon, {words} norm, images in [0, 1]",
            y_label="accuracy",
            x_range=(0.0, radii[-1]),
            x_ticks=ticks,
            y_range=(0.0, 1.0),
            notes=notes,
            width=760,
            height=320,
        )
        mixed = len({tuple(attack.name for attack in result.attacks)
                     for _, points in curves for _, result in points.values()}) > 1  # fmt: skip
        caveat = " The attacks are not the same at every point." if mixed else ""
        body += (
            f"<h3>Accuracy against epsilon, {show(words)}</h3>"
            "<p>The worst case over all attacks, with 95 % intervals. A line begins with the "
            f"clean accuracy where epsilon 0 was not attacked.{caveat}</p>"
            f'<div class="figure narrow">{chart}</div>'
        )
    return body


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
    found: dict[str, dict[float, float]] = {}
    for radius, (_, result) in points.items():
        for attack in result.attacks:
            found.setdefault(attack.name, {})[radius] = attack.share.accuracy
    worst = {r: result.worst.accuracy for r, (_, result) in points.items() if result.worst}
    # The line of the attack that decides everywhere would lie on that of the worst case.
    lines = [
        (name, values)
        for name, values in found.items()
        if len(values) > 1 and values != {radius: worst[radius] for radius in values}
    ][:_MOST_LINES]
    return [
        Series(name, list(values), list(values.values()), STYLES[1 + position], dashed=True)
        for position, (name, values) in enumerate(lines)
    ]


def _under_attack(models: Sequence[Model]) -> str:
    """Accuracy under each attack, one block for each threat."""
    threats: dict[tuple[str, str], list[tuple[Model, Evaluation, Result]]] = {}
    for model in models:
        for run in model.evaluations:
            for result in run.results:
                entry = (result.norm, result.epsilon)
                threats.setdefault(entry, []).append((model, run, result))
    # First the threats that stand for a model, then by norm and radius.
    chosen = [row.threat for model in models if (row := rows_of(model)[0]).result is not None]

    def order(entries: Sequence[tuple[Model, Evaluation, Result]]) -> tuple[Any, ...]:
        result = entries[0][2]
        words = threat_words(result.threat)
        return words not in chosen, result.norm != "linf", result.norm, result.radius or 0.0

    blocks = []
    for number, entries in enumerate(sorted(threats.values(), key=order)):
        words = threat_words(entries[0][2].threat)
        bars = _attack_bars(entries)
        chart = bar_chart(
            bars, title=f"Accuracy under attack, {words}", x_label="accuracy", width=760
        )
        tables = ""
        for _, run, result in entries:
            tables += f"<h3>{show(run.key)}: {show(run.label)}</h3>{_attack_table(result)}"
            if result.provenance:
                tables += f'<p class="provenance">{show(result.provenance)}</p>'
        star = " *" if any(result.every for _, _, result in entries) else ""
        inner = f'<div class="figure narrow">{chart}</div>{tables}'
        blocks.append(folded(f"Under attack: {show(words)}{star}", inner, opened=number == 0))
    every = {result.every for entries in threats.values() for _, _, result in entries}
    how = []
    if False in every:
        how.append(
            "Attacks ran one after the other, each only on the images that were still classified "
            "rightly (column <i>attacked</i>), and <i>right</i> are those that still were after it."
        )
    if True in every:
        marked = " with a * at their summary" if len(every) > 1 else ""
        how.append(
            f"In evaluations{marked}, every attack ran on every image that is classified rightly, "
            "so each accuracy is that attack's own."
        )
    units = {
        str(unit)
        for model in models
        for run in model.evaluations
        if (unit := get(run.summary, "cost", "unit_of_passes")) is not None
    }
    if len(units) == 1:
        how.append(f"<i>Forward</i> and <i>backward</i> passes count {show(units.pop())}.")
    return (
        f"<h3>Accuracy under attack</h3><p>{' '.join(how)} The worst case counts an image as right "
        "only if it withstood all attacks. <i>Unconfirmed</i>: found by the fast path, refused by "
        "the float32 model, so not counted.</p>" + "\n".join(blocks)
    )


def _attack_bars(entries: Sequence[tuple[Model, Evaluation, Result]]) -> list[Bar]:
    several = len(entries) > 1
    names = dict.fromkeys(attack.name for _, _, result in entries for attack in result.attacks)
    kinds: list[tuple[str, int]] = [("clean", 0), *((name, 1) for name in names), ("worst case", 3)]
    bars = []
    for kind, colour in kinds:
        for position, (_, run, result) in enumerate(entries):
            note = ""
            if kind == "clean":
                share = result.clean
            elif kind == "worst case":
                share = result.worst
            else:
                attack = next((a for a in result.attacks if a.name == kind), None)
                share = None if attack is None else attack.share
                note = "" if attack is None else f"{attack.describe}; "
            if share is None:
                continue
            style = style_of(position)[0] if several else STYLES[colour]
            limits = (
                ""
                if share.low is None or share.high is None
                else f", 95 %: {100 * share.low:.2f} to {100 * share.high:.2f} %"
            )
            bars.append(
                Bar(
                    label=shorten(f"{kind} · {run.key}" if several else kind, 26),
                    value=share.accuracy,
                    text=percent(share.accuracy),
                    style=style,
                    low=share.low,
                    high=share.high,
                    note=f"{kind}: {note}{percent(share.accuracy)}{limits}, n = {sizes(share)}",
                )
            )
    return bars


def _attack_table(result: Result) -> str:
    def line(
        name: str, share: Share | None, attacked: int | None = None, more: Sequence[Any] = ()
    ) -> list[str]:
        cells = ["" if value is None else show(value) for value in more]
        cells += [""] * (6 - len(cells))
        correct = "" if share is None or share.correct is None else f"{share.correct:,}"
        return [
            name,
            share_cell(share),
            correct,
            "" if share is None else sizes(share),
            "" if attacked is None else f"{attacked:,}",
            *cells[:-1],
            f'<span class="fold">{cells[-1]}</span>',
        ]

    lines = [line("clean", result.clean)]
    for attack in result.attacks:
        seconds = None if attack.seconds is None else f"{attack.seconds:.2f}"
        more = (
            attack.fooled,
            seconds,
            attack.forward,
            attack.backward,
            attack.unconfirmed,
            attack.describe,
        )
        lines.append(line(show(attack.name), attack.share, attack.attacked, more))
    lines.append(line("<b>worst case</b>", result.worst))
    heads = ["attack", "accuracy", "right", "n", "attacked", "fooled", "seconds", "forward",
             "backward", "unconfirmed", "settings"]  # fmt: skip
    return table(heads, lines, text=(0, 10))


def _left_out(run: Evaluation) -> str:
    """Why nobody but us attacked the model though that was asked for; empty where somebody did."""
    reason = get(run.summary, "cross_check_left_out")  # not in files of older versions
    if not isinstance(reason, str) or not reason:
        return ""
    return (
        f"<p>{show(run.key)} ({show(run.label)}): no cross-check with the reference AutoAttack: "
        f"{show(reason)}.</p>"
    )


def _more(run: Evaluation) -> str:
    """The parts of an evaluation whose fields are their own business: shown as they are."""
    parts = [
        (title, value)
        for title, key in (
            ("Cross-check", "cross_check"),
            ("Transfer", "transfer"),
            ("RobustBench entry", "robustbench"),
        )
        if (value := get(run.summary, key))
    ]
    if not parts:
        return ""
    titles = ", ".join(title.lower().replace("robustb", "RobustB") for title, _ in parts)
    inner = "".join(
        f"<h3>{title}</h3>{_transfer(value) if title == 'Transfer' else plain(value)}"
        for title, value in parts
    )
    return folded(f"More of {show(run.key)} ({show(run.label)}): {titles}", inner)


def _transfer(value: Any) -> str:
    """Accuracy on images that were made against other models."""
    lines: list[list[str]] = []
    for entry in value if isinstance(value, list) else []:
        attacks = get(entry, "attacks")
        for attack in attacks if isinstance(attacks, list) else []:
            notes: list[str] = []
            share = make_share(
                get(attack, "accuracy"), get(attack, "n"), get(attack, "correct"),
                get(attack, "interval"), where="", notes=notes,
            )  # fmt: skip
            origin = get(entry, "from")
            name = origin
            if isinstance(origin, Mapping):
                name = get(origin, "file") or get(origin, "code")
            lines.append(
                [
                    f'<span class="fold">{show(name)}</span>',
                    show(get(attack, "name")),
                    show(get(attack, "attacked")),
                    sizes(share),
                    share_cell(share),
                    f'<span class="fold">{show(get(attack, "describe") or "")}</span>',
                ]
            )
    if not lines:
        return plain(value)
    heads = ["images made against", "attack", "attacked", "n", "accuracy", "settings"]
    return table(heads, lines, text=(0, 1, 5))


def checks(found: Collection) -> str:
    runs = [run for run in found.evaluations if get(run.summary, "suspicion") is not None]
    if not runs:
        body = empty("No suspicion checks: an evaluation makes them.")
        return section("checks", "Suspicion checks", body, "no file")
    found_checks = []
    for run in runs:
        listed = get(run.summary, "suspicion", "checks")
        entries = (
            [one for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
        )
        found_checks.append((run, get(run.summary, "suspicion", "verdict"), entries))
    body = render("checks", runs=found_checks)
    return section("checks", "Suspicion checks", body, sources(runs, EVALUATION))


# --- examples -------------------------------------------------------------------------------


def _shown(examples: Examples) -> int:
    pixels = int(np.prod(examples.clean.shape[1:])) * 3
    return max(1, min(len(examples.label), _MOST_EXAMPLES, _MOST_PIXELS // pixels))


def has_pictures(found: Collection) -> bool:
    return any(run.examples is not None and run.examples.label for run in found.evaluations)


def _picture(image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """[C, H, W] as the PNG writer wants it; the mean over channels where C is not 1 or 3."""
    if image.shape[0] == 3:
        return np.ascontiguousarray(image.transpose(1, 2, 0))
    if image.shape[0] == 1:
        return np.ascontiguousarray(image[0])
    return np.rint(image.mean(0)).astype(np.uint8)


def examples_section(found: Collection) -> str:
    runs = [run for run in found.evaluations if run.examples is not None and run.examples.label]
    if not runs:
        body = empty("No adversarial examples: an evaluation keeps some.")
        return section("examples", "Adversarial examples", body, "no file")
    shown = []
    for run in runs:
        examples = run.examples
        assert examples is not None
        count, total = _shown(examples), len(examples.label)
        names = get(run.summary, "data", "class_names")
        known = names if isinstance(names, list) else None
        note = f", the first {count} of {total:,}" if count < total else ""
        channels, height, width = examples.clean.shape[1:]
        if channels not in (1, 3):
            note += f"; the mean of their {channels} channels"
        cards = [_card(examples, i, known) for i in range(count)]
        shown.append((run, note, str(width), str(height), cards))
    body = render("examples", runs=shown)
    return section("examples", "Adversarial examples", body, sources(runs, EXAMPLES))


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
