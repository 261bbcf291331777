"""The page of a study: its tables and charts in one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fastbandit.report.charts import Points, whisker_chart
from fastbandit.report.html import document, folded, header, paragraph, plain_table, section, wide
from fastbandit.report.settings import configuration
from fastbandit.report.tabular import make_tabular

__all__ = ["make_page"]

_STYLES = ("s1", "s2", "s3", "s4")
# The same policy has the same colour in every chart.
_OWN_STYLES = {"printed": "s1", "detrended": "s2", "ridge": "s3", "random": "s4"}
# Title, name of x and what is to be said, for each study on simulated searches.
_PARTS = {
    "policies": (
        "Policy against policy",
        "policy",
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


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _points(
    name: str, places: Sequence[int], rows: Sequence[Mapping[str, Any]], style: str
) -> Points:
    mean, low, high = ([row[key] for row in rows] for key in ("mean", "low", "high"))
    return Points(name, places, mean, low, high, style)


def _part(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    title, x_label, words = _PARTS[name]
    possible = [(rows[0]["possible_mean"], "best possible"), (0.0, "chance")]
    y_label = "advantage, sd of an effect"
    if name == "policies":
        groups = [_points("policy", range(len(rows)), rows, "s1")]
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
            mine = [row for row in rows if row["entry"] == entry]
            places = [labels.index(row["x"]) for row in mine]
            groups.append(_points(entry, places, mine, styles[entry]))
    chart = whisker_chart(
        groups,
        labels,
        title=title,
        x_label="" if name == "policies" else x_label,
        y_label=y_label,
        joined=name != "policies",
        # What is possible grows with the number of arms: no one line there.
        lines=possible[1:] if name == "space" else possible,
        height=420 if name == "policies" else 320,
    )
    heads = ["policy", x_label.split(",")[0] if name != "policies" else "", "advantage", "s.e."]
    heads += ["95 % interval", "best arm kept", "s.e.", "best possible", "trained", "evaluated"]
    heads += ["Wilcoxon p", "against", "CPU seconds"]
    cells = [
        [
            row["entry"],
            row["x"],
            f"{row['mean']:.3f}",
            f"{row['standard_error']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{100 * row['best_kept_mean']:.1f} %",
            f"{100 * row['best_kept_standard_error']:.1f} %",
            f"{row['possible_mean']:.3f}",
            f"{row['trained']:,}",
            f"{row['evaluated']:,}",
            _p(row["p"]),
            row["against"] or "",
            f"{row['cpu_seconds']:.1f}",
        ]
        for row in rows
    ]
    figures = folded("The figures", plain_table(heads, cells, 2))
    source = (
        "study.json; means over seeds, whiskers are 95 % intervals of Student; p of Wilcoxon's "
        "signed-rank test over seeds, not corrected for the number of tests"
    )
    return section(name, title, f"{paragraph(words)}\n{wide(chart)}\n{figures}", source)


def _simulated(found: Mapping[str, Any]) -> str:
    world = found["world"]
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for row in found["rows"]:
        parts.setdefault(row["part"], []).append(row)
    words = (
        f"Simulated searches: {world['rows']} edges, {world['arms']} operations on each (unless "
        f"said otherwise), additive effects of standard deviation {world['effect']:g}, noise "
        f"{world['noise']:g}, a {world['trend']} rise from {world['start']:g} by "
        f"{world['rise']:g}; {len(found['seeds'])} seeds. Shown is by how much the surviving arms "
        "are better than average ones, in standard deviations of an effect, mean over edges."
    )
    sections = "\n".join(_part(name, rows) for name, rows in parts.items())
    return f"{paragraph(words)}\n{sections}"


def _real(found: Mapping[str, Any]) -> str:
    groups = found["groups"]
    labels = [group["name"] for group in groups]
    charts = []
    for key, name in (("robust_accuracy", "robust"), ("clean_accuracy", "clean")):
        means = Points(
            "mean and 95 % interval",
            range(len(groups)),
            [100 * group[key]["mean"] for group in groups],
            [_percent(group[key]["low"]) for group in groups],
            [_percent(group[key]["high"]) for group in groups],
            "s1",
        )
        each = [
            (place, 100 * value)
            for place, group in enumerate(groups)
            for value in group[key]["values"]
        ]
        nothing = [float("nan")] * len(each)
        single = Points(
            "one network", [p for p, _ in each], [v for _, v in each], nothing, nothing, "s2"
        )
        charts.append(
            f"<h3>{name} accuracy</h3>"
            + wide(
                whisker_chart(
                    [means, single],
                    labels,
                    title=f"{name} accuracy",
                    x_label="",
                    y_label=f"{name} accuracy, %",
                    joined=False,
                )
            )
        )
    heads = ["networks", "number", "clean", "95 % interval", "robust", "95 % interval"]
    heads += ["parameters", "minutes of search", "p against random", "p against printed"]
    cells = []
    for group in groups:
        clean, robust = group["clean_accuracy"], group["robust_accuracy"]
        seconds = group["search_seconds"]
        cells.append(
            [
                group["name"],
                str(len(group["networks"])),
                f"{100 * clean['mean']:.2f} %",
                _interval(clean),
                f"{100 * robust['mean']:.2f} %",
                _interval(robust),
                f"{group['parameters']:,.0f}",
                "" if seconds is None else f"{seconds / 60:.1f}",
                _p(robust["p"].get("random networks")),
                _p(robust["p"].get("printed")),
            ]
        )
    words = paragraph(
        f"Data: {found['data']}. Every network is trained from scratch in the same way. Attack: "
        f"{found['attack']}; n = {found['n']:,} test images."
    )
    source = (
        "study.json; intervals of Student over networks; p of the Mann-Whitney test on robust "
        "accuracies, not corrected for the number of tests"
    )
    body = f"{words}\n{''.join(charts)}\n{plain_table(heads, cells, 1)}"
    return section("real", "Real data: networks trained from scratch", body, source)


def _percent(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def _interval(found: Mapping[str, Any]) -> str:
    if found["low"] is None:
        return ""
    return f"{100 * found['low']:.2f} to {100 * found['high']:.2f} %"


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
    parts = []
    if result["simulated"] is not None:
        parts.append(_simulated(result["simulated"]))
    if result.get("tabular") is not None:
        parts.append(make_tabular(result["tabular"]))
    if result["real"] is not None:
        parts.append(_real(result["real"]))
    facts = ", ".join(
        f"{key} {environment[key]}"
        for key in ("date", "fastbandit", "torch", "cpu", "device_name", "threads")
        if key in environment
    )
    body = "\n".join(parts)
    head = header(name, [f'<p class="meta">{escape(facts)}</p>'])
    settings = section("config", "Configuration", folded("config.yaml", configuration(config)))
    return document(f"{name}: fastbandit study", head, [], f"{body}\n{settings}", dated=False)
