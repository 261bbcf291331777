"""The sections of a page of several runs, or of runs that are not a search.

Each says which file of which run its numbers come from; runs have keys, S1 for a search, R1 for a
retraining, E1 for an evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

from markupsafe import Markup

from fastbandit.report.cost import joint_cost
from fastbandit.report.drawings import joint_cells
from fastbandit.report.html import get, section
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder
from fastbandit.report.robustness import checks, examples_section, robustness
from fastbandit.report.rows import data_words, model_name, rows_of, with_results
from fastbandit.report.seeds import groups, seeds
from fastbandit.report.settings import joint_configuration, joint_environment
from fastbandit.report.training import searches, training

__all__ = ["LAST_SECTIONS", "SECTIONS", "JointSection"]

#: (anchor, title in the navigation, function, whether it is shown) of a section of all runs.
JointSection = tuple[str, str, Callable[[Collection], Markup], Callable[[Collection], bool]]


def _headline(collection: Collection) -> Markup:
    """What each network achieves: of one network as figures, of several side by side."""
    networks = []
    for model in collection.models:
        if rows := rows_of(model):
            owner = model.retraining or rows[0].run
            parameters = owner.size("parameters")
            networks.append(
                {
                    "name": model_name(model),
                    "rows": rows,
                    "first": rows[0],
                    "parameters": rows[0].run.size("parameters")
                    if parameters is None
                    else parameters,
                    "macs": owner.size("macs"),
                    "genotype": (model.digest or "not recorded")[:12],
                }
            )
    rows = [row for network in networks for row in network["rows"]]
    first = [network["first"] for network in networks]
    settings = {(row.what, row.threat, row.attack, row.images, row.n) for row in first}
    # The part of a file that a row names is left to the row.
    files = dict.fromkeys(
        row.source.rpartition(" (")[0] or row.source
        if row.what.startswith(("test", "best", "last"))
        else row.source
        for row in rows
    )
    return section(
        "results",
        "Results",
        "; ".join(files) or "no file",
        "results",
        suspicious=[run for run in collection.evaluations if run.suspicious],
        networks=networks,
        rows=rows,
        alike=len(settings) < 2,
    )


def _lineage(collection: Collection) -> Markup:
    """Which run made what, matched by genotype, run id and folder."""
    lines = []
    for model in collection.models:
        chain: list[tuple[str, Folder]] = [("search", run) for run in model.searches]
        if model.retraining is not None:
            chain.append(("retraining", model.retraining))
        chain += [("evaluation", run) for run in model.evaluations]
        for kind, run in chain:
            more = (
                (model.digest or "not recorded")[:12],
                run.size("parameters"),
                data_words(run) or run.config.get("data"),
                run.config.get("seed"),
                str(get(run.environment, "date") or "")[:16].replace("T", " "),
                get(run.summary, "run_id") or "",
            )
            lines.append((run, kind, more))
    files = with_results(collection.runs, "config.yaml", "env.json")
    return section("runs", "Runs", files, "runs", lines=lines)


def _always(collection: Collection) -> bool:
    return True


def _evaluated(collection: Collection) -> bool:
    return bool(collection.evaluations)


#: In the order of the page.
SECTIONS: tuple[JointSection, ...] = (
    ("results", "Results", _headline, _always),
    ("seeds", "Seeds", seeds, lambda runs: bool(groups(runs))),
    ("runs", "Runs", _lineage, _always),
    ("robustness", "Robustness", robustness, _always),
    ("checks", "Suspicion checks", checks, _evaluated),
    ("examples", "Examples", examples_section, _evaluated),
    ("training", "Training", training, lambda runs: bool(runs.retrainings)),
    ("cells", "Cells", joint_cells, lambda runs: bool(runs.searches or runs.retrainings)),
    ("rewards", "Searches", searches, lambda runs: sum(bool(r.samples) for r in runs.searches) > 1),
    ("cost", "Cost", joint_cost, _always),
)

#: The same, after the sections of each search.
LAST_SECTIONS: tuple[JointSection, ...] = (
    ("config", "Configuration", joint_configuration, _always),
    ("environment", "Environment", joint_environment, _always),
)
