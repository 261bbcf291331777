"""The page of a study: its tables and charts in one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from fastbandit.report.charts import Points, whisker_chart
from fastbandit.report.html import Section, document, render, section
from fastbandit.report.settings import study_configuration
from fastbandit.report.tabular import make_tabular

__all__ = ["make_page"]

_STYLES = ("s1", "s2", "s3", "s4")
# The same policy has the same colour in every chart.
_OWN_STYLES = {"printed": "s1", "detrended": "s2", "ridge": "s3", "random": "s4"}
# Title, name of x and what is to be said, for each study on simulated searches.
_PARTS = {
    "policies": (
        "Policy against policy",
        "",
        "Every policy trains the same number of paths, on the same effects and noise. "
        "evaluations-per-epoch=R: for each path trained, R more are evaluated with the shared "
        "weights.",
    ),
    "rate": ("Lambda", "lambda, the weight of the new accuracy (Eq. 4.11)", ""),
    "space": ("Size of the space", "operations on each edge", "More operations train more paths."),
    "evaluations": (
        "Paths that are only evaluated",
        "R, evaluated for each path that is trained",
        "",
    ),
    "bonus": ("Bonus", "factor on the confidence radius sqrt(2 ln N / n)", ""),
}
_SIMULATED = (
    "study.json; means over seeds, whiskers are 95 % intervals of Student; p of Wilcoxon's "
    "signed-rank test over seeds, not corrected for the number of tests"
)
_REAL = (
    "study.json; intervals of Student over networks; p of the Mann-Whitney test on robust "
    "accuracies, not corrected for the number of tests"
)


def _part(name: str, rows: Sequence[Mapping[str, Any]]) -> Markup:
    title, x_label, words = _PARTS[name]
    possible = [(rows[0]["possible_mean"], "best possible"), (0.0, "chance")]
    if name == "policies":
        groups = [Points.of("policy", range(len(rows)), rows, "s1")]
        labels = [row["entry"] for row in rows]
    else:
        labels = list(dict.fromkeys(row["x"] for row in rows))
        entries = list(dict.fromkeys(row["entry"] for row in rows))
        groups = []
        styles = {entry: _OWN_STYLES[entry] for entry in entries if entry in _OWN_STYLES}
        free = [style for style in _STYLES if style not in styles.values()] or list(_STYLES)
        others = [entry for entry in entries if entry not in styles]
        styles |= {entry: free[i % len(free)] for i, entry in enumerate(others)}
        for entry in entries:
            members = [row for row in rows if row["entry"] == entry]
            places = [labels.index(row["x"]) for row in members]
            groups.append(Points.of(entry, places, members, styles[entry]))
    chart = whisker_chart(
        groups,
        labels,
        title=title,
        x_label=x_label,
        y_label="advantage, sd of an effect",
        joined=name != "policies",
        # What is possible grows with the number of arms: no one line there.
        lines=possible[1:] if name == "space" else possible,
        height=420 if name == "policies" else 320,
    )
    head = x_label.split(",")[0]
    return section(
        name, title, _SIMULATED, "study_simulated", words=words, chart=chart, head=head, rows=rows
    )


def _simulated(simulated: Mapping[str, Any]) -> list[Section]:
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in simulated["rows"]:
        parts.setdefault(row["part"], []).append(row)
    world, number = simulated["world"], len(simulated["seeds"])
    words = (
        f"Simulated searches: {world['rows']} edges, {world['arms']} operations on each (unless "
        f"said otherwise), additive effects of standard deviation {world['effect']:g}, noise "
        f"{world['noise']:g}, a {world['trend']} rise from {world['start']:g} by "
        f"{world['rise']:g}; {number} seeds. Shown is by how much the surviving arms "
        "are better than average ones, in standard deviations of an effect, mean over edges."
    )
    return [
        ("", "", render("paragraph", words=words)),
        *((name, "", _part(name, rows)) for name, rows in parts.items()),
    ]


def _real_chart(groups: Sequence[Mapping[str, Any]], kind: str) -> Markup:
    """Mean and interval of each group of networks, and every network."""
    shares = [group[f"{kind}_accuracy"] for group in groups]
    means = Points.of("mean and 95 % interval", range(len(groups)), shares, "s1", 100)
    each = [(at, 100 * value) for at, share in enumerate(shares) for value in share["values"]]
    places, values = [at for at, _ in each], [value for _, value in each]
    nothing = [math.nan] * len(each)
    return whisker_chart(
        [means, Points("one network", places, values, nothing, nothing, "s2")],
        [group["name"] for group in groups],
        title=f"{kind} accuracy",
        x_label="",
        y_label=f"{kind} accuracy, %",
        joined=False,
    )


def _real(real: Mapping[str, Any]) -> Section:
    charts = [(kind, _real_chart(real["groups"], kind)) for kind in ("robust", "clean")]
    title = "Real data: networks trained from scratch"
    return "real", "", section("real", title, _REAL, "study_real", real=real, charts=charts)


def make_page(
    name: str, result: Mapping[str, Any], environment: Mapping[str, Any], config: str
) -> str:
    """The page.

    Args:
        name: of the study.
        result: what ``study.json`` holds.
        environment: what ``env.json`` holds.
        config: the text of ``config.yaml``.
    """
    sections: list[Section] = []
    if result["simulated"] is not None:
        sections += _simulated(result["simulated"])
    if result.get("tabular") is not None:
        sections.append(("tabular", "", make_tabular(result["tabular"])))
    if result["real"] is not None:
        sections.append(_real(result["real"]))
    sections.append(("config", "", study_configuration(config)))
    title = f"{name}: fastbandit study"
    return document(
        "study_page", title, sections, name=name, environment=environment, compared=None
    )
