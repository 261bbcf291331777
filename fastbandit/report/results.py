"""The sections of a page of several runs, or of runs that are not a search.

Each says which file of which run its numbers come from; runs have keys, S1 for a search, R1 for a
retraining, E1 for an evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from fastbandit.report.cost import joint_cost
from fastbandit.report.drawings import joint_cells
from fastbandit.report.html import (
    empty,
    folded,
    get,
    percent,
    render,
    section,
    show,
    table,
    tile,
    warning,
)
from fastbandit.report.matching import Collection, Model
from fastbandit.report.reading import Folder
from fastbandit.report.robustness import checks, examples_section, robustness
from fastbandit.report.rows import (
    Row,
    data_words,
    model_name,
    robust_cell,
    rows_of,
    share_cell,
    sizes,
    with_results,
)
from fastbandit.report.seeds import groups, seeds
from fastbandit.report.settings import joint_configuration, joint_environment
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
        warning(
            f"The robust accuracies of {show(run.key)} ({show(run.label)}) are "
            '<b>suspicious</b>: see <a href="#checks">the checks</a> before quoting them.'
        )
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
        body += empty("No accuracy of a network yet.")
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
    return folded(
        "Every accuracy, with what it was measured on",
        table(heads, lines, text=(0, 4, 5, 6, 7)) + lead,
        opened=len(lines) <= 8,
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
            parameters = get(run.summary, "parameters")
            if parameters is None:
                parameters = get(run.summary, "model", "parameters")
            more = (
                (model.digest or "not recorded")[:12],
                parameters,
                data_words(run) or run.config.get("data"),
                run.config.get("seed"),
                str(get(run.environment, "date") or "")[:16].replace("T", " "),
                get(run.summary, "run_id") or "",
            )
            lines.append((run, kind, more))
    body = render("runs", lines=lines)
    return section("runs", "Runs", body, with_results(found.runs, "config.yaml", "env.json"))


def _several(found: Collection) -> bool:
    return sum(bool(run.samples) for run in found.searches) > 1


#: (anchor, title in the navigation, function, when it is shown) in the order of the page.
SECTIONS = (
    ("results", "Results", _headline, lambda found: True),
    ("seeds", "Seeds", seeds, lambda found: bool(groups(found))),
    ("runs", "Runs", _lineage, lambda found: True),
    ("robustness", "Robustness", robustness, lambda found: True),
    ("checks", "Suspicion checks", checks, lambda found: bool(found.evaluations)),
    ("examples", "Examples", examples_section, lambda found: bool(found.evaluations)),
    ("training", "Training", training, lambda found: bool(found.retrainings)),
    ("cells", "Cells", joint_cells, lambda found: bool(found.searches or found.retrainings)),
    ("rewards", "Searches", searches, _several),
    ("cost", "Cost", joint_cost, lambda found: True),
)

#: The same, after the sections of each search.
LAST_SECTIONS = (
    ("config", "Configuration", joint_configuration, lambda found: True),
    ("environment", "Environment", joint_environment, lambda found: True),
)
