"""The part of a study's page about a table of true accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fastbandit.report.charts import Points, whisker_chart
from fastbandit.report.html import section

__all__ = ["make_tabular"]

_STYLES = ("s1", "s2", "s3", "s4")


def _name(table: Mapping[str, Any]) -> str:
    cells = "one cell" if table["cells"] == 1 else f"{table['cells']} cells side by side"
    budget = "any size" if table["budget"] == "none" else f"budget {table['budget']}"
    return f"{cells}, {budget}"


def _chart(table: Mapping[str, Any]) -> Markup:
    rows: Sequence[Mapping[str, Any]] = table["rows"]
    labels = list(dict.fromkeys(row["entry"] for row in rows))
    groups = []
    rhos = list(dict.fromkeys(row["rho"] for row in rows))
    for position, rho in enumerate(rhos):
        members = [row for row in rows if row["rho"] == rho]
        name = "no shared rewards" if rho is None else f"rho {rho:g}"
        places = [labels.index(row["entry"]) for row in members]
        groups.append(Points.of(name, places, members, _STYLES[position % len(_STYLES)], 100))
    words = {"random": "random", "largest": "largest", "best": "best there is"}
    lines = [(100 * table[name]["mean"], text) for name, text in words.items()]
    return whisker_chart(
        groups,
        labels,
        title=_name(table),
        x_label="",
        y_label="true accuracy, %",
        joined=False,
        lines=lines,
        height=420,
    )


def _cost(row: Mapping[str, Any]) -> str:
    """What a search cost, and which trainings that is."""
    kinds = (("supernets", "supernet"), ("short_trainings", "short"), ("full_trainings", "full"))
    parts = [f"{row[key]} {name}" for key, name in kinds if row[key]]
    return f"{row['cost']:g} F: {' + '.join(parts)}"


def _references(table: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Networks that no search found, for comparison."""
    return [
        ("random, all of them", table["random"]),
        ("largest network", table["largest"]),
        ("the best there is", table["best"]),
        *((f"operation {one['operation']} everywhere", one) for one in table["one_operation"]),
    ]


def make_tabular(tabular: Mapping[str, Any]) -> Markup:
    """The section of the page.

    Args:
        tabular: what ``study.json`` holds as ``tabular``.
    """
    named = [(_name(one), one) for one in tabular["tables"]]
    return section(
        "tabular",
        "True accuracies",
        "study.json and tabular.csv; in brackets and as whiskers: 95 % intervals of Student over "
        "seeds, not corrected for their number",
        "tabular",
        tabular=tabular,
        assumed=tabular["assumptions"],
        recommended=[
            (name, row)
            for name, one in named
            for row in one["rows"]
            if row["entry"] == tabular["recommended"]
        ],
        tables=[
            {
                "table": one,
                "name": name,
                "chart": _chart(one),
                "rows": [(row, _cost(row)) for row in one["rows"]],
                "references": _references(one),
            }
            for name, one in named
        ],
    )
