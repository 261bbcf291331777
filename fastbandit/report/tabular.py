"""The part of a study's page about a table of true accuracies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fastbandit.report.charts import Points, whisker_chart
from fastbandit.report.html import render, section, wide

__all__ = ["make_tabular"]

_STYLES = ("s1", "s2", "s3", "s4")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _points(mean: float, low: float, high: float) -> str:
    """A difference of accuracies, in points."""
    return f"{100 * mean:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def _verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _name(found: Mapping[str, Any]) -> str:
    cells = "one cell" if found["cells"] == 1 else f"{found['cells']} cells side by side"
    budget = "any size" if found["budget"] == "none" else f"budget {found['budget']}"
    return f"{cells}, {budget}"


def _cost(row: Mapping[str, Any]) -> str:
    parts = [
        f"{row[key]} {name}"
        for key, name in (
            ("supernets", "supernet"),
            ("short_trainings", "short"),
            ("full_trainings", "full"),
        )
        if row[key]
    ]
    return f"{row['cost']:g} F: {' + '.join(parts)}"


def _chart(found: Mapping[str, Any]) -> str:
    rows: Sequence[Mapping[str, Any]] = found["rows"]
    labels = list(dict.fromkeys(row["entry"] for row in rows))
    groups = []
    rhos = list(dict.fromkeys(row["rho"] for row in rows))
    for position, rho in enumerate(rhos):
        mine = [row for row in rows if row["rho"] == rho]
        mean, low, high = ([100 * row[key] for row in mine] for key in ("mean", "low", "high"))
        name = "no shared rewards" if rho is None else f"rho {rho:g}"
        places = [labels.index(row["entry"]) for row in mine]
        groups.append(Points(name, places, mean, low, high, _STYLES[position % len(_STYLES)]))
    lines = [
        (100 * found[name]["mean"], text)
        for name, text in (("random", "random"), ("largest", "largest"), ("best", "best there is"))
    ]
    return whisker_chart(
        groups,
        labels,
        title=_name(found),
        x_label="",
        y_label="true accuracy, %",
        joined=False,
        lines=lines,
        height=420,
    )


def _figures(found: Mapping[str, Any]) -> list[list[str]]:
    """The head of the table and its rows."""
    heads = ["entry", "rho", "cost", "accuracy, %", "s.e.", "parameters", "over random, points"]
    heads += ["against best of m at equal cost", "m", "", "CPU seconds"]
    lines = [
        [
            row["entry"],
            "" if row["rho"] is None else f"{row['rho']:g}",
            _cost(row),
            _percent(row["mean"]),
            _percent(row["standard_error"]),
            f"{row['parameters']:.1f}",
            _points(row["gain"], row["gain_low"], row["gain_high"]),
            _points(*(row[f"against_best_of{end}"] for end in ("", "_low", "_high"))),
            f"{row['best_of']:,}",
            _verdict(row["against_best_of_low"], row["against_best_of_high"]),
            f"{row['cpu_seconds']:.1f}",
        ]
        for row in found["rows"]
    ]
    blank = [""] * 6
    for name, text in (("random", "random, all of them"), ("largest", "largest network"),
                       ("best", "the best there is")):  # fmt: skip
        one = found[name]
        size = f"{one['parameters']:.1f}"
        lines.append([text, "", "", _percent(one["mean"]), "", size, *blank[1:]])
    for one in found["one_operation"]:
        name, size = f"operation {one['operation']} everywhere", f"{one['parameters']:.1f}"
        lines.append([name, "", "", _percent(one["mean"]), "", size, *blank[1:]])
    return [heads, *lines]


def _gates(found: Mapping[str, Any]) -> list[list[str]]:
    """How the recommended search does on each table; the head first."""
    heads = ["networks", "entry", "rho", "over random, points", "", "over best of m, points", "m"]
    lines = []
    for one in found["tables"]:
        for row in one["rows"]:
            if row["entry"] != found["recommended"]:
                continue
            lines.append(
                [
                    _name(one),
                    row["entry"],
                    "" if row["rho"] is None else f"{row['rho']:g}",
                    _points(row["gain"], row["gain_low"], row["gain_high"]),
                    _verdict(row["gain_low"], row["gain_high"]),
                    _points(*(row[f"against_best_of{end}"] for end in ("", "_low", "_high"))),
                    f"{row['best_of']:,}",
                    _verdict(row["against_best_of_low"], row["against_best_of_high"]),
                ]
            )
    return [[*heads, ""], *lines]


def make_tabular(found: Mapping[str, Any]) -> str:
    """The section of the page.

    Args:
        found: what ``study.json`` holds as ``tabular``.
    """
    tables = [
        (one, _name(one), Markup(wide(_chart(one))), _figures(one)) for one in found["tables"]
    ]
    body = render(
        "tabular", found=found, told=found["assumptions"], gates=_gates(found), tables=tables
    )
    source = (
        "study.json and tabular.csv; in brackets and as whiskers: 95 % intervals of Student over "
        "seeds, not corrected for their number"
    )
    return section("tabular", "True accuracies", body, source)
