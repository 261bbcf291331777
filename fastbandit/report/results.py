"""The sections of a page of several runs, or of runs that are not a search.

Each says which file of which run its numbers come from; runs have keys, S1 for a search, R1 for a
retraining, E1 for an evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastbandit.report.cost import totals
from fastbandit.report.evaluation import Evaluation
from fastbandit.report.html import duration, finite, get, pairs, percent, section, show, table, tile
from fastbandit.report.matching import Collection, Model
from fastbandit.report.reading import Folder, without_folder
from fastbandit.report.retraining import Retraining
from fastbandit.report.robustness import checks, examples_section, robustness
from fastbandit.report.rows import (
    Row,
    data_words,
    leaf,
    model_name,
    plain,
    results_file,
    robust_cell,
    rows_of,
    share_cell,
    shorten,
    sizes,
    sources,
    with_results,
)
from fastbandit.report.search import Run
from fastbandit.report.training import searches, training

__all__ = ["LAST_SECTIONS", "SECTIONS"]


def _tiles(row: Row) -> str:
    tiles = []
    for kind, share in (("clean", row.clean), ("robust", row.robust)):
        if share is None:
            continue
        more = "n not recorded"
        if share.n is not None:
            more = f"n&nbsp;=&nbsp;{share.n:,}"
        if share.low is not None and share.high is not None:
            more = f"95 %: {100 * share.low:.2f} to {100 * share.high:.2f} %, {more}"
        if kind == "robust" and row.suspicious:
            more += ", <b>suspicious</b>"
        name = f"{kind} accuracy"
        if kind == "robust" and row.threat:
            name += f", {escape(row.threat)}"
        tiles.append(tile(name, percent(share.accuracy), more))
    return "".join(tiles)


def _headline(found: Collection) -> str:
    models = [(model, rows_of(model)) for model in found.models]
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
    named = dict.fromkeys(
        row.source.rpartition(" (")[0] or row.source
        if row.what.startswith(("test", "best", "last"))
        else row.source
        for _, rows in with_rows
        for row in rows
    )
    return section("results", "Results", body, "; ".join(named) or "no file")


def _side_by_side(models: Sequence[tuple[Model, list[Row]]]) -> str:
    lines = []
    for model, rows in models:
        row = rows[0]
        owner = model.retraining or row.run
        parameters = get(owner.summary, "parameters")
        if parameters is None:
            parameters = get(row.run.summary, "model", "parameters")
        lines.append(
            [
                f'<b class="tight">{show(model_name(model))}</b>',
                share_cell(row.clean),
                robust_cell(row),
                sizes(row.clean, row.robust),
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
    settings = {
        (row.what, row.threat, row.attack, row.images, sizes(row.clean, row.robust))
        for row in (rows[0] for _, rows in models)
    }
    if len(settings) > 1:
        note = (
            "<p>Not all of these were measured in the same way (images, threat or attacks differ): "
            "compare only those that were.</p>"
        )
    return note + table(heads, lines, text=(0, 4, 5, 7, 8))


def _every_accuracy(models: Sequence[tuple[Model, list[Row]]]) -> str:
    lines = [
        [
            show(row.run.key),
            share_cell(row.clean),
            robust_cell(row),
            sizes(row.clean, row.robust),
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
            data = data_words(run) or run.config.get("data")
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
        "folder. An evaluation of other weights stands by itself.</p>"
        + table(heads, lines, text=(0, 1, 2, 3, 4, 6, 8, 9))
    )
    return section("runs", "Runs", body, with_results(found.runs, "config.yaml", "env.json"))


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
    return section("cells", "Cells", body, sources(runs, "genotype.json"))


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
        heads = ["", *(f"{show(run.key)} {show(shorten(run.label, 40))}" for run in runs)]
        body += f"<h3>{title}</h3>{table(heads, lines, text=(0,))}"
    named = "; ".join(f"{run.label}: {_ledger(run)[1]}" for run in found.runs)
    return section("cost", "Cost", body, named)


def _ledger(run: Folder) -> tuple[dict[str, Any], str]:
    """The ledger of a run and its file; summed from the metrics where there is none yet."""
    name = results_file(run)
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
    return "" if value is None else leaf(value)


def _configuration(found: Collection) -> str:
    body = "".join(
        f"<details><summary>{show(run.key)}: {show(run.label)}</summary>"
        f"<pre>{escape(run.config_text) or 'not there'}</pre></details>"
        for run in found.runs
    )
    return section("config", "Configuration", body, sources(found.runs, "config.yaml"))


def _environment(found: Collection) -> str:
    body = ""
    for run in found.runs:
        entries = dict(run.environment or {})
        versions = get(run.summary, "versions")
        if isinstance(versions, Mapping):
            entries["versions"] = versions
        inner = plain(entries) if entries else '<p class="empty">Not recorded.</p>'
        body += f"<details><summary>{show(run.key)}: {show(run.label)}</summary>{inner}</details>"
    return section(
        "environment",
        "Environment",
        body,
        with_results(found.runs, "env.json"),
    )


def _several(found: Collection) -> bool:
    return sum(bool(run.samples) for run in found.searches) > 1


#: (anchor, title in the navigation, function, when it is shown) in the order of the page.
SECTIONS = (
    ("results", "Results", _headline, lambda found: True),
    ("runs", "Runs", _lineage, lambda found: True),
    ("robustness", "Robustness", robustness, lambda found: True),
    ("checks", "Suspicion checks", checks, lambda found: bool(found.evaluations)),
    ("examples", "Examples", examples_section, lambda found: bool(found.evaluations)),
    ("training", "Training", training, lambda found: bool(found.retrainings)),
    ("cells", "Cells", _cells, lambda found: bool(found.searches or found.retrainings)),
    ("rewards", "Searches", searches, _several),
    ("cost", "Cost", _cost, lambda found: True),
)

#: The same, after the sections of each search.
LAST_SECTIONS = (
    ("config", "Configuration", _configuration, lambda found: True),
    ("environment", "Environment", _environment, lambda found: True),
)
