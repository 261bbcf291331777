"""The sections of a page of several runs, or of runs that are not a search.

Each says which file of which run its numbers come from; runs have keys, S1 for a search, R1 for a
retraining, E1 for an evaluation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from fastbandit._charts import STYLES, Bar, Series, bar_chart, line_chart
from fastbandit._report.folders import (
    EVALUATION,
    EXAMPLES,
    Collection,
    Epoch,
    Evaluation,
    Examples,
    Model,
    Result,
    Retraining,
    Share,
    make_share,
    radius_of,
)
from fastbandit._report.html import (
    duration,
    finite,
    get,
    pairs,
    percent,
    section,
    show,
    table,
    tile,
)
from fastbandit._report.png import data_uri
from fastbandit._report.reading import Folder, Run, without_folder
from fastbandit._report.search import accuracy_rows, totals

__all__ = ["SECTIONS", "has_pictures"]

# Pictures beyond these would make the page heavy without showing more.
_MOST_EXAMPLES, _MOST_PIXELS = 16, 600_000
# Lines of single attacks beside that of the worst case.
_MOST_LINES = 4


# --- which number stands for a model --------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One measurement of one model."""

    run: Folder
    what: str
    threat: str
    attack: str
    clean: Share | None
    robust: Share | None
    source: str
    provenance: str | None = None
    result: Result | None = None


def _threat_words(threat: Mapping[str, Any]) -> str:
    norm = {"linf": "L∞", "l2": "L2"}.get(str(threat.get("norm")), str(threat.get("norm")))
    return f"{norm}, epsilon {threat.get('epsilon')}"


def _data_words(run: Folder) -> str:
    return " ".join(
        str(part)
        for part in (get(run.summary, "data", "name"), get(run.summary, "data", "split"))
        if part is not None
    )


def _evaluated(run: Evaluation) -> list[_Row]:
    rows = []
    for result in run.results:
        names = ", ".join(attack.name for attack in result.attacks)
        rows.append(
            _Row(
                run,
                f"evaluation, {_data_words(run) or 'data not recorded'}",
                _threat_words(result.threat),
                f"worst case over {names}" if names else "no attack",
                result.clean,
                result.worst,
                f"{run.label}: {EVALUATION}",
                result.provenance,
                result,
            )
        )
    return rows


def _retrained(run: Retraining) -> list[_Row]:
    rows = []
    threat = get(run.summary, "threat")
    words = _threat_words(threat) if isinstance(threat, Mapping) else ""
    for part in ("test", "best", "last"):
        clean, robust = run.measured.get(part, (None, None))
        if clean is None and robust is None:
            continue
        found = get(run.summary, part)
        epoch = get(found, "epoch")
        what = {
            "test": f"test images, checkpoint: {get(found, 'of') or 'not recorded'}",
            "best": "best epoch, validation images",
            "last": "last epoch, validation images",
        }[part]
        if epoch is not None:
            what += f" (epoch {epoch})"
        attack = str(get(found, "attack") or get(run.summary, "best", "attack") or "")
        rows.append(
            _Row(run, what, words, attack, clean, robust, f"{run.label}: summary.json ({part})")
        )
    if not rows and run.epochs:
        line = run.epochs[-1]
        images = get(run.split, "validation")
        n = len(images) if isinstance(images, list) else images
        shares = [
            None if value is None else make_share(value, n, where="", notes=[])
            for value in (line.clean_accuracy, line.robust_accuracy)
        ]
        rows.append(
            _Row(
                run,
                f"epoch {line.epoch} so far, validation images",
                words,
                "",
                shares[0],
                shares[1],
                f"{run.label}: metrics.jsonl, split.json",
            )
        )
    return rows


def _searched(run: Run) -> list[_Row]:
    rows: dict[str, dict[str, Any]] = {}
    for split, kind, value, n, attack in accuracy_rows(run):
        entry = rows.setdefault(split, {"attack": ""})
        entry[kind] = make_share(value, n, where="", notes=[])
        entry["attack"] = attack or entry["attack"]
    threat = get(run.summary, "threat")
    return [
        _Row(
            run,
            f"{split} images, weights shared in the search",
            _threat_words(threat) if isinstance(threat, Mapping) else "",
            entry["attack"],
            entry.get("clean"),
            entry.get("robust"),
            f"{run.label}: summary.json",
        )
        for split, entry in rows.items()
    ]


def _rows(model: Model) -> list[_Row]:
    """Every measurement of a model, the one that counts most first."""
    rows = [row for run in model.evaluations for row in _evaluated(run)]
    trained = get(model.retraining.summary, "threat") if model.retraining is not None else None

    def rank(row: _Row) -> tuple[int, int]:
        assert row.result is not None
        same = (
            isinstance(trained, Mapping)
            and row.result.norm == str(trained.get("norm") or "linf")
            and row.result.radius is not None
            and row.result.radius == radius_of(trained)
        )
        return (0 if same else 1, -len(row.result.attacks))

    rows.sort(key=rank)
    if model.retraining is not None:
        rows += _retrained(model.retraining)
    for search in model.searches:
        rows += _searched(search)
    return rows


def _cell(share: Share | None) -> str:
    if share is None:
        return "none"
    if share.low is None or share.high is None:
        return percent(share.accuracy)
    limits = f"{100 * share.low:.2f} to {100 * share.high:.2f}"
    return f'{percent(share.accuracy)}<br><span class="n">{limits}</span>'


def _n(*shares: Share | None) -> str:
    sizes = dict.fromkeys(f"{share.n:,}" for share in shares if share is not None and share.n)
    return ", ".join(sizes) or "not recorded"


def _model_name(model: Model) -> str:
    run = model.first
    name = get(run.summary, "name") or run.config.get("name") or run.label
    return f"{run.key} {name}"


def _style(position: int) -> tuple[str, bool]:
    """Colour class of the line of a run, and whether it is dashed: when colours begin again."""
    return STYLES[position % len(STYLES)], position // len(STYLES) % 2 == 1


def _short(text: str, most: int = 20) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _sources(runs: Iterable[Folder], *files: str) -> str:
    names = ", ".join(files)
    return "; ".join(f"{run.label}: {names}" for run in runs) or "no file"


def _with_results(runs: Iterable[Folder], *files: str) -> str:
    """The same, with the file of each run's results."""
    return "; ".join(f"{run.label}: {', '.join([*files, _results_file(run)])}" for run in runs)


def _results_file(run: Folder) -> str:
    return EVALUATION if isinstance(run, Evaluation) else "summary.json"


# --- headline -------------------------------------------------------------------------------


def _tiles(row: _Row) -> str:
    tiles = []
    for kind, share in (("clean", row.clean), ("robust", row.robust)):
        if share is None:
            continue
        more = "n not recorded"
        if share.n is not None:
            more = f"n&nbsp;=&nbsp;{share.n:,}"
        if share.low is not None and share.high is not None:
            more = f"95 %: {100 * share.low:.2f} to {100 * share.high:.2f} %, {more}"
        name = f"{kind} accuracy"
        if kind == "robust" and row.threat:
            name += f", {escape(row.threat)}"
        tiles.append(tile(name, percent(share.accuracy), more))
    return "".join(tiles)


def _headline(found: Collection) -> str:
    models = [(model, _rows(model)) for model in found.models]
    with_rows = [(model, rows) for model, rows in models if rows]
    body = "".join(
        f'<div class="warning">The robust accuracies of {show(run.key)} ({show(run.label)}) are '
        '<b>suspicious</b>: see <a href="#checks">the checks</a> before quoting them.</div>'
        for run in found.evaluations
        if run.suspicious
    )
    if len(with_rows) == 1:
        row = with_rows[0][1][0]
        model = with_rows[0][0]
        owner = model.retraining or row.run
        tiles = _tiles(row)
        for name, key in (("parameters", "parameters"), ("MACs", "macs")):
            value = get(owner.summary, key)
            value = get(owner.summary, "model", key) if value is None else value
            if value is not None:
                tiles += tile(name, show(value), "FLOPs are twice the MACs" * (key == "macs"))
        body += f'<dl class="tiles">{tiles}</dl>'
        body += f'<p class="meta">{show(row.what)}'
        body += f"; robust: {show(row.attack)}</p>" if row.attack else "</p>"
        if row.provenance:
            body += f'<p class="provenance">{show(row.provenance)}</p>'
    elif with_rows:
        body += "<h3>Side by side</h3>" + _side_by_side(with_rows)
    if with_rows:
        body += _every_accuracy(with_rows)
    else:
        body += '<p class="empty">No accuracy of a network yet.</p>'
    body += (
        "<p>Intervals hold 95 %, for the choice of the images alone: they hold no variance between "
        "seeds. Accuracies on validation images chose the epoch, so they are optimistic.</p>"
    )
    # The part of a file that a row names is left to the row.
    sources = dict.fromkeys(
        row.source.partition(" (")[0]
        if row.what.startswith(("test", "best", "last"))
        else row.source
        for _, rows in with_rows
        for row in rows
    )
    return section("results", "Results", body, "; ".join(sources) or "no file")


def _side_by_side(models: Sequence[tuple[Model, list[_Row]]]) -> str:
    lines = []
    for model, rows in models:
        row = rows[0]
        owner = model.retraining or row.run
        parameters = get(owner.summary, "parameters")
        if parameters is None:
            parameters = get(row.run.summary, "model", "parameters")
        lines.append(
            [
                f'<b class="tight">{show(_model_name(model))}</b>',
                _cell(row.clean),
                _cell(row.robust),
                _n(row.clean, row.robust),
                show(row.threat or "not recorded"),
                f'<span class="fold">{show(row.what)}</span>',
                "not recorded" if parameters is None else show(parameters),
                show((model.digest or "not recorded")[:12]),
                f'<span class="fold">{show(row.source)}</span>',
            ]
        )
    heads = ["network", "clean", "robust", "n", "threat", "measured on", "parameters",
             "genotype", "file"]  # fmt: skip
    note = ""
    settings = {(rows[0].what, rows[0].threat, rows[0].attack) for _, rows in models}
    if len(settings) > 1:
        note = (
            "<p>Not all of these were measured in the same way (images, threat or attacks differ): "
            "compare only those that were.</p>"
        )
    return note + table(heads, lines, text=(0, 4, 5, 7, 8))


def _every_accuracy(models: Sequence[tuple[Model, list[_Row]]]) -> str:
    lines = [
        [
            show(row.run.key),
            _cell(row.clean),
            _cell(row.robust),
            _n(row.clean, row.robust),
            show(row.threat),
            f'<span class="fold">{show(row.what)}</span>',
            f'<span class="fold">{show(row.attack)}</span>',
            f'<span class="fold">{show(row.source)}</span>',
        ]
        for _, rows in models
        for row in rows
    ]
    heads = ["run", "clean", "robust", "n", "threat", "measured on", "attack", "file"]
    lead = "".join(
        f'<p class="provenance">{show(row.run.key)}: {show(row.provenance)}</p>'
        for _, rows in models
        for row in rows
        if row.provenance is not None
    )
    opened = " open" if len(lines) <= 8 else ""
    return (
        f"<details{opened}><summary>Every accuracy, with what it was measured on</summary>"
        f"{table(heads, lines, text=(0, 4, 5, 6, 7))}{lead}</details>"
    )


def _lineage(found: Collection) -> str:
    """Which run made what, matched by genotype, run id and folder."""
    lines = []
    for model in found.models:
        chain: list[tuple[str, Folder]] = [("search", run) for run in model.searches]
        if model.retraining is not None:
            chain.append(("retraining", model.retraining))
        chain += [("evaluation", run) for run in model.evaluations]
        for kind, run in chain:
            status = "finished" if run.finished else "unfinished"
            seed = run.config.get("seed")
            parameters = get(run.summary, "parameters")
            if parameters is None:
                parameters = get(run.summary, "model", "parameters")
            data = _data_words(run) or run.config.get("data")
            lines.append(
                [
                    f"<b>{show(run.key)}</b>",
                    kind,
                    show(run.label),
                    f'<span class="status {status}">{status}</span>',
                    show((model.digest or "not recorded")[:12]),
                    "" if parameters is None else show(parameters),
                    "" if data is None else show(data),
                    "" if seed is None else show(seed),
                    show(str(get(run.environment, "date") or "")[:16].replace("T", " ")),
                    show(get(run.summary, "run_id") or ""),
                ]
            )
    heads = ["key", "step", "folder", "status", "genotype", "parameters", "data", "seed",
             "started", "run id"]  # fmt: skip
    body = (
        "<p>Each network from its search through its retraining to its evaluations: runs belong "
        "together by the hash of the genotype, evaluations and retrainings also by run id and "
        "folder.</p>" + table(heads, lines, text=(0, 1, 2, 3, 4, 6, 8, 9))
    )
    return section("runs", "Runs", body, _with_results(found.runs, "config.yaml", "env.json"))


# --- robustness -----------------------------------------------------------------------------


def _robustness(found: Collection) -> str:
    models = [model for model in found.models if any(run.results for run in model.evaluations)]
    runs = [run for model in models for run in model.evaluations]
    if not models:
        body = '<p class="empty">No evaluation yet: python -m fastbandit.evaluate makes one.</p>'
        return section("robustness", "Robustness", body, "no file")
    body = _sweeps(models) + _under_attack(models)
    body += "".join(_more(run) for run in runs)
    return section("robustness", "Robustness", body, _sources(runs, EVALUATION))


def _points(model: Model, norm: str) -> dict[float, tuple[Evaluation, Result]]:
    """One result for each epsilon: where there are several, the one with most attacks."""
    points: dict[float, tuple[Evaluation, Result]] = {}
    for run in model.evaluations:
        for result in run.results:
            radius = result.radius
            if result.norm != norm or radius is None or result.worst is None:
                continue
            known = points.get(radius)
            if known is None or len(known[1].attacks) < len(result.attacks):
                points[radius] = (run, result)
    return dict(sorted(points.items()))


def _sweeps(models: Sequence[Model]) -> str:
    """Accuracy against epsilon, one chart for each norm with two radii or more."""
    norms = sorted(
        {result.norm for model in models for run in model.evaluations for result in run.results},
        key=lambda norm: (norm != "linf", norm),
    )
    body = ""
    for norm in norms:
        curves = [(model, _points(model, norm)) for model in models]
        curves = [(model, points) for model, points in curves if points]
        radii = sorted({radius for _, points in curves for radius in points})
        if len(radii) < 2:
            continue
        series = []
        for position, (model, points) in enumerate(curves):
            style, dashed = _style(position)
            name = "worst case" if len(curves) == 1 else _short(_model_name(model))
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
                    f"epsilon {result.epsilon}, {_model_name(model)}: worst case "
                    f"{percent(result.worst.accuracy)} of {_n(result.worst)}"
                    for model, points in curves
                    for at, (_, result) in points.items()
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
    chosen = [row.threat for model in models if (row := _rows(model)[0]).result is not None]

    def order(entries: Sequence[tuple[Model, Evaluation, Result]]) -> tuple[Any, ...]:
        result = entries[0][2]
        words = _threat_words(result.threat)
        return words not in chosen, result.norm != "linf", result.norm, result.radius or 0.0

    blocks = []
    for number, entries in enumerate(sorted(threats.values(), key=order)):
        words = _threat_words(entries[0][2].threat)
        bars = _attack_bars(entries)
        chart = bar_chart(
            bars, title=f"Accuracy under attack, {words}", x_label="accuracy", width=760
        )
        tables = ""
        for _, run, result in entries:
            tables += f"<h3>{show(run.key)}: {show(run.label)}</h3>{_attack_table(result)}"
            if result.provenance:
                tables += f'<p class="provenance">{show(result.provenance)}</p>'
        opened = " open" if number == 0 else ""
        star = " *" if any(result.every for _, _, result in entries) else ""
        blocks.append(
            f"<details{opened}><summary>Under attack: {show(words)}{star}</summary>"
            f'<div class="figure narrow">{chart}</div>{tables}</details>'
        )
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
            style = _style(position)[0] if several else STYLES[colour]
            limits = (
                ""
                if share.low is None or share.high is None
                else f", 95 %: {100 * share.low:.2f} to {100 * share.high:.2f} %"
            )
            bars.append(
                Bar(
                    label=_short(f"{kind} · {run.key}" if several else kind, 26),
                    value=share.accuracy,
                    text=percent(share.accuracy),
                    style=style,
                    low=share.low,
                    high=share.high,
                    note=f"{kind}: {note}{percent(share.accuracy)}{limits}, n = {_n(share)}",
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
            "" if attacked is None else f"{attacked:,}",
            correct,
            "" if share is None else _n(share),
            _cell(share),
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
    heads = ["attack", "attacked", "right", "n", "accuracy", "fooled", "seconds", "forward",
             "backward", "unconfirmed", "settings"]  # fmt: skip
    return table(heads, lines, text=(0, 10))


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
        f"<h3>{title}</h3>{_transfer(value) if title == 'Transfer' else _plain(value)}"
        for title, value in parts
    )
    return (
        f"<details><summary>More of {show(run.key)} ({show(run.label)}): {titles}</summary>"
        f"{inner}</details>"
    )


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
            name = get(origin, "file") if isinstance(origin, Mapping) else origin
            lines.append(
                [
                    f'<span class="fold">{show(name)}</span>',
                    show(get(attack, "name")),
                    show(get(attack, "attacked")),
                    _n(share),
                    _cell(share),
                    f'<span class="fold">{show(get(attack, "describe") or "")}</span>',
                ]
            )
    if not lines:
        return _plain(value)
    heads = ["images made against", "attack", "attacked", "n", "accuracy", "settings"]
    return table(heads, lines, text=(0, 1, 5))


def _plain(value: Any) -> str:
    """Plain values as a table: a list of objects with a column for each name."""
    if isinstance(value, Mapping):
        rows = "".join(
            f'<tr><th>{show(name)}</th><td class="wrap">{_leaf(entry)}</td></tr>'
            for name, entry in pairs(value)
        )
        return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        flat = [dict(pairs(entry)) for entry in value]
        names = list(dict.fromkeys(name for entry in flat for name in entry))
        lines = [[_leaf(entry.get(name, "")) for name in names] for entry in flat]
        text = [
            i for i, name in enumerate(names) if any(isinstance(e.get(name), str) for e in flat)
        ]
        return table([show(name) for name in names], lines, text=text)
    return f"<p>{_leaf(value)}</p>"


def _leaf(value: Any) -> str:
    if isinstance(value, list):
        shown = ", ".join(show(entry) for entry in value[:12])
        return shown + (f" and {len(value) - 12} more" if len(value) > 12 else "")
    return show(value)


def _checks(found: Collection) -> str:
    runs = [run for run in found.evaluations if get(run.summary, "suspicion") is not None]
    if not runs:
        body = '<p class="empty">No suspicion checks: an evaluation makes them.</p>'
        return section("checks", "Suspicion checks", body, "no file")
    body = (
        "<p>Signs that a robust accuracy comes from a weak attack or a gradient that misleads it, "
        "and not from a robust network.</p>"
    )
    for run in runs:
        suspicion = get(run.summary, "suspicion")
        verdict = get(suspicion, "verdict")
        lines = []
        listed = get(suspicion, "checks")
        for entry in listed if isinstance(listed, list) else []:
            if isinstance(entry, Mapping):
                detail = show(entry.get("detail") or "")
                lines.append(
                    [
                        show(entry.get("name")),
                        _verdict(entry.get("verdict")),
                        f'<span class="fold">{detail}</span>',
                    ]
                )
        body += f"<h3>{show(run.key)}: {show(run.label)} {_verdict(verdict)}</h3>" + table(
            ["check", "verdict", "detail"], lines, text=(0, 1, 2)
        )
    return section("checks", "Suspicion checks", body, _sources(runs, EVALUATION))


def _verdict(value: Any) -> str:
    kind = str(value) if value in ("ok", "suspicious") else "other"
    mark = {"ok": "✓ ", "suspicious": "⚠ "}.get(kind, "")
    return f'<span class="verdict {kind}">{mark}{show(value)}</span>'


# --- training -------------------------------------------------------------------------------


def _guard(line: Epoch) -> str | None:
    """What the guard against catastrophic overfitting found wrong with an epoch, as HTML."""
    guard = (line.model_extra or {}).get("overfitting")
    if not isinstance(guard, Mapping) or not guard.get("overfitted"):
        return None
    trained, strong = finite(guard.get("trained")), finite(guard.get("strong"))
    if trained is None or strong is None:
        return "catastrophic overfitting"
    words = (
        f"{percent(trained)} under the training attack, {percent(strong)} under a stronger one, "
        f"of {show(guard.get('images'))} images"
    )
    back = guard.get("back_to")
    if isinstance(back, int) and not isinstance(back, bool):
        words += f"; back to {f'epoch {back}' if back >= 0 else 'the beginning'}"
    return words


def _training(found: Collection) -> str:
    runs = [run for run in found.retrainings if run.epochs]
    if not runs:
        body = '<p class="empty">No epoch of a retraining yet.</p>'
        return section("training", "Training", body, _sources(found.retrainings, "metrics.jsonl"))
    span = (0.0, float(max(max(run.planned or 0, run.epochs[-1].epoch + 1) for run in runs)))
    alone = len(runs) == 1

    def lines(field: str, name: str, position: int | None = None) -> list[Series]:
        series = []
        for number, run in enumerate(runs):
            style, dashed = _style(number if position is None else position)
            title = name if alone else _short(f"{run.key} {run.label}")
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
                words = f"epoch {line.epoch}: {', '.join(values)}"
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
        best = get(runs[0].summary, "best", "epoch")
        if isinstance(best, int) and not isinstance(best, bool):
            marks.append((float(best + 1), "best"))
        fields = ("clean_accuracy", "robust_accuracy", "train_accuracy")
        wide = chart(series, "Accuracy of each epoch", "accuracy", fields, events=marks)
        body = (
            "<p>Clean and robust: validation images; training: the attacked images that the "
            "weights were trained on.</p>"
            f'<div class="figure wide">{wide}</div>'
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
            f"<li>{show(run.key)}, epoch {line.epoch}: {text}</li>" for run, line, text in warned
        )
        body += f"<h3>Guard against catastrophic overfitting</h3><ul>{items}</ul>"
    return section("training", "Training", body, _sources(runs, "metrics.jsonl"))


def _pair(figures: Sequence[str]) -> str:
    return (
        '<div class="pair">'
        + "".join(f'<div class="figure">{figure}</div>' for figure in figures)
        + "</div>"
    )


def _searches(found: Collection) -> str:
    """The searches' robust validation accuracy over each other, where there are several."""
    runs = [run for run in found.searches if run.samples]
    series = []
    for position, run in enumerate(runs):
        style, dashed = _style(position)
        x = [line.sample + 1 for line in run.samples]
        y = [line.reward for line in run.samples]
        series.append(Series(_short(f"{run.key} {run.label}"), x, y, style, dashed))
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
        f'<div class="figure wide">{chart}</div>'
    )
    return section("rewards", "Searches over each other", body, _sources(runs, "bandit.jsonl"))


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


def _examples(found: Collection) -> str:
    runs = [run for run in found.evaluations if run.examples is not None and run.examples.label]
    if not runs:
        body = '<p class="empty">No adversarial examples: an evaluation keeps some.</p>'
        return section("examples", "Adversarial examples", body, "no file")
    body = (
        "<p>Each image, the same image after the attack, and the difference: grey is none, and "
        "black and white are the largest change of that image, which is written below it. "
        "Prediction before and after; classes are numbers from 0.</p>"
    )
    for run in runs:
        examples = run.examples
        assert examples is not None
        count = _shown(examples)
        names = get(run.summary, "data", "class_names")
        cards = "".join(
            _card(examples, i, names if isinstance(names, list) else None) for i in range(count)
        )
        total = len(examples.label)
        note = f", the first {count} of {total:,}" if count < total else ""
        if examples.clean.shape[1] not in (1, 3):
            note += f"; the mean of their {examples.clean.shape[1]} channels"
        body += (
            f'<h3>{show(run.key)}: {show(run.label)}{note}</h3><div class="examples">{cards}</div>'
        )
    return section("examples", "Adversarial examples", body, _sources(runs, EXAMPLES))


def _card(examples: Examples, i: int, names: list[Any] | None) -> str:
    difference = examples.difference[i]
    most = float(np.abs(difference).max())
    scaled = np.rint(127.5 + 127.5 * difference / most) if most else np.full_like(difference, 128)
    pictures = [examples.clean[i], examples.adversarial[i], scaled.astype(np.uint8)]
    height, width = examples.clean.shape[2:]
    identity = examples.identity[i]

    def name(value: int) -> str:
        if names is not None and 0 <= value < len(names):
            return f"{show(names[value])} ({value})"
        return str(value)

    images = "".join(
        f'<img src="{data_uri(_picture(picture))}" width="{width}" height="{height}" '
        f'alt="{kind} image {identity}">'
        for kind, picture in zip(("clean", "adversarial", "difference"), pictures, strict=True)
    )
    before, after, label = examples.before[i], examples.after[i], examples.label[i]
    fell = "fell" if after != label else "stood"
    return (
        f'<figure class="example"><div>{images}</div><figcaption>image {identity}, class '
        f'{name(label)}<br><span class="{fell}">{name(before)} → {name(after)}</span><br>'
        f'<span class="n">largest change {most:.4f} = {255 * most:.2f}/255</span>'
        "</figcaption></figure>"
    )


# --- cells, cost, settings ------------------------------------------------------------------


def _cells(found: Collection) -> str:
    """One drawing for each genotype of the page."""
    from fastbandit.genotype import Genotype

    drawn: dict[str, tuple[str, list[Folder]]] = {}
    problems = []
    for run in [*found.searches, *found.retrainings]:
        file = run.folder / "genotype.json"
        if not file.is_file():
            continue
        try:
            genotype = Genotype.load(file)
        except (ValueError, OSError) as error:
            message = without_folder(str(error), run.folder)
            problems.append(f"{run.label}: {message}")
            continue
        drawn.setdefault(genotype.hash, (genotype.svg(), []))[1].append(run)
    body = "".join(
        f'<div class="warning">The cells cannot be drawn: {escape(text)}</div>' for text in problems
    )
    for digest, (svg, runs) in drawn.items():
        keys = ", ".join(run.key for run in runs)
        body += f"<h3>Genotype {digest[:12]} ({keys})</h3>"
        body += f'<div class="drawing">{svg}</div>'
    if not drawn and not problems:
        body = '<p class="empty">No genotype in these folders.</p>'
    runs = [run for _, found_runs in drawn.values() for run in found_runs]
    return section("cells", "Cells", body, _sources(runs, "genotype.json"))


def _cost(found: Collection) -> str:
    """Ledgers side by side, one table for each step: they are never added up."""
    body = "<p>Each step by itself; search and retraining are never added up.</p>"
    for title, runs in (
        ("Search", found.searches),
        ("Retraining", found.retrainings),
        ("Evaluation", found.evaluations),
    ):
        if not runs:
            continue
        ledgers = [_ledger(run) for run in runs]
        names = list(dict.fromkeys(name for ledger, _ in ledgers for name in ledger))
        if not names:
            body += f'<h3>{title}</h3><p class="empty">Nothing measured yet.</p>'
            continue
        lines = [
            [_words(name, runs[0]), *(_amount(name, ledger.get(name)) for ledger, _ in ledgers)]
            for name in names
        ]
        lines.append(["file", *(show(source) for _, source in ledgers)])
        heads = ["", *(f"{show(run.key)} {show(_short(run.label, 40))}" for run in runs)]
        body += f"<h3>{title}</h3>{table(heads, lines, text=(0,))}"
    sources = "; ".join(f"{run.label}: {_ledger(run)[1]}" for run in found.runs)
    return section("cost", "Cost", body, sources)


def _ledger(run: Folder) -> tuple[dict[str, Any], str]:
    """The ledger of a run and its file; summed from the metrics where there is none yet."""
    name = _results_file(run)
    cost = get(run.summary, "cost")
    if isinstance(cost, Mapping):
        return dict(pairs(cost)), name
    if isinstance(run, Run):
        summed = {key: value for key, value in totals(run).items() if value is not None}
        return summed, "metrics.jsonl, summed"
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
        return sums, "metrics.jsonl, summed"
    return {}, name


def _words(name: str, run: Folder) -> str:
    for prefix in ("seconds_", "seconds."):
        if name.startswith(prefix):
            return f"seconds, {show(name.removeprefix(prefix).replace('_', ' '))}"
    if name == "peak_memory_mb":
        return "peak memory, MiB"
    if name == "images_per_second":
        return "images/s"
    # An evaluation says itself what its passes count.
    if name in ("forward_passes", "backward_passes") and not isinstance(run, Evaluation):
        return f"{name.replace('_', ' ')} (mini-batches)"
    return show(name.replace("_", " "))


def _amount(name: str, value: Any) -> str:
    seconds = finite(value)
    if name.startswith(("seconds_", "seconds.")) and seconds is not None:
        return f'{seconds:,.2f} <span class="n">{duration(seconds)}</span>'
    if isinstance(value, float):
        return f"{value:,.1f}"
    return "" if value is None else _leaf(value)


def _configuration(found: Collection) -> str:
    body = "".join(
        f"<details><summary>{show(run.key)}: {show(run.label)}</summary>"
        f"<pre>{escape(run.config_text) or 'not there'}</pre></details>"
        for run in found.runs
    )
    return section("config", "Configuration", body, _sources(found.runs, "config.yaml"))


def _environment(found: Collection) -> str:
    body = ""
    for run in found.runs:
        entries = dict(run.environment or {})
        versions = get(run.summary, "versions")
        if isinstance(versions, Mapping):
            entries["versions"] = versions
        inner = _plain(entries) if entries else '<p class="empty">Not recorded.</p>'
        body += f"<details><summary>{show(run.key)}: {show(run.label)}</summary>{inner}</details>"
    return section(
        "environment",
        "Environment",
        body,
        _with_results(found.runs, "env.json"),
    )


def _several(found: Collection) -> bool:
    return sum(bool(run.samples) for run in found.searches) > 1


#: (anchor, title in the navigation, function, when it is shown) in the order of the page.
SECTIONS = (
    ("results", "Results", _headline, lambda found: True),
    ("runs", "Runs", _lineage, lambda found: True),
    ("robustness", "Robustness", _robustness, lambda found: True),
    ("checks", "Suspicion checks", _checks, lambda found: bool(found.evaluations)),
    ("examples", "Examples", _examples, lambda found: bool(found.evaluations)),
    ("training", "Training", _training, lambda found: bool(found.retrainings)),
    ("cells", "Cells", _cells, lambda found: bool(found.searches or found.retrainings)),
    ("rewards", "Searches", _searches, _several),
    ("cost", "Cost", _cost, lambda found: True),
)

#: The same, after the sections of each search.
LAST_SECTIONS = (
    ("config", "Configuration", _configuration, lambda found: True),
    ("environment", "Environment", _environment, lambda found: True),
)
