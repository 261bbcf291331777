"""The page of a comparison: its claims, arms, tests, sizes, cost and protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

from fastbandit.report.html import (
    document,
    folded,
    header,
    paragraph,
    plain_table,
    section,
    tile,
    wide,
)
from fastbandit.report.scatter import Cloud, Strip, scatter_chart, strip_chart
from fastbandit.report.settings import configuration

__all__ = ["make_page"]

_STYLES = {"search": "s1", "matched": "s2", "best": "s3", "largest": "s4", "one-operation": "s5"}
_NAMES = {
    "search": "search",
    "matched": "random, same size",
    "best": "best of m random",
    "largest": "largest",
    "one-operation": "one operation",
}


def _points(value: float | None) -> str:
    return "" if value is None else f"{100 * value:+.2f}"


def _interval(low: float | None, high: float | None, sign: str = "") -> str:
    if low is None or high is None:
        return ""
    return f"{100 * low:{sign}.2f} to {100 * high:{sign}.2f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _nan(value: float | None) -> float:
    return float("nan") if value is None else 100 * value


def _claims(found: Mapping[str, Any]) -> str:
    if found["claims"] is None:
        tiles = [tile("claims", "none registered")]
    else:
        rules = found["protocol"]["claim"]
        tiles = [
            tile(escape(name), "shown" if good else "not shown", escape(rules[name]))
            for name, good in found["claims"].items()
        ]
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _tests(found: Mapping[str, Any]) -> str:
    heads = ["test", "difference, points", "95 % interval", "Hodges-Lehmann", "Mann-Whitney p"]
    heads += ["p adjusted (Holm)", "smallest p possible"]
    rows = [
        [
            one["name"],
            _points(one["difference"]),
            _interval(one["low"], one["high"], "+"),
            _points(one["hodges_lehmann"]),
            f"{one['p']:.2g}",
            f"{one['p_adjusted']:.2g}",
            f"{one['smallest_p']:.2g}",
        ]
        for one in found["tests"]
    ]
    margin = found["protocol"]["margin_points"]
    words = (
        "Two-sided tests on robust accuracy, one value for each network, the mean of its "
        f"trainings; intervals of the difference of means after Welch. Level "
        f"{found['protocol']['alpha']:g}; margin of non-inferiority {margin:g} points."
    )
    body = f"{_claims(found)}{paragraph(words)}{plain_table(heads, rows, 1) if rows else ''}"
    return section("tests", "What was shown", body, "study.json")


def _note(one: Mapping[str, Any]) -> str:
    return (
        f"{one['name']}: robust {100 * one['robust_accuracy']:.2f} %, "
        f"{one['parameters']:,} parameters, {one['genotype'][:12]}"
    )


def _arms(found: Mapping[str, Any]) -> str:
    strips = []
    for arm in found["arms"]:
        mine = [one for one in found["networks"] if one["arm"] == arm["name"]]
        robust = arm["robust_accuracy"]
        # Networks of one operation are no sample of anything.
        sample = arm["name"] != "one-operation"
        strips.append(
            Strip(
                _NAMES[arm["name"]],
                [100 * one["robust_accuracy"] for one in mine],
                [_note(one) for one in mine],
                100 * robust["mean"],
                _nan(robust["low"]) if sample else float("nan"),
                _nan(robust["high"]) if sample else float("nan"),
                _STYLES[arm["name"]],
            )
        )
    chart = strip_chart(strips, title="robust accuracy of each arm", y_label="robust accuracy, %")
    heads = ["arm", "networks", "clean, %", "robust, %", "95 % interval", "sd", "parameters"]
    latency = "latency_table_ms" in found["arms"][0]
    heads += ["MACs", *["ms, by the table"] * latency, "R2 of size"]
    rows = [
        [
            _NAMES[arm["name"]],
            str(arm["networks"]),
            f"{100 * arm['clean_accuracy']['mean']:.2f}",
            f"{100 * arm['robust_accuracy']['mean']:.2f}",
            _interval(arm["robust_accuracy"]["low"], arm["robust_accuracy"]["high"]),
            ""
            if arm["robust_accuracy"]["sd"] is None
            else f"{100 * arm['robust_accuracy']['sd']:.2f}",
            f"{arm['parameters']:,.0f}",
            f"{arm['macs']:,.0f}",
            *[f"{arm['latency_table_ms']:.3f}" for _ in range(latency)],
            _share(arm["size_r_squared"]),
        ]
        for arm in found["arms"]
    ]
    words = f'<p class="provenance">{escape(found["attack"])}</p>'
    note = paragraph(
        "A point is a network, the mean of its trainings; bars are means with 95 % intervals of "
        "Student. R2 of size: the share of the variance within an arm that a line over log "
        "parameters explains."
    )
    body = f"{words}{wide(chart)}{plain_table(heads, rows, 1)}{note}"
    return section("arms", "Robust accuracy by arm", body, "study.json")


def _size(found: Mapping[str, Any]) -> str:
    clouds = []
    for arm in found["arms"]:
        mine = [one for one in found["networks"] if one["arm"] == arm["name"]]
        clouds.append(
            Cloud(
                _NAMES[arm["name"]],
                [one["parameters"] for one in mine],
                [100 * one["robust_accuracy"] for one in mine],
                [_note(one) for one in mine],
                _STYLES[arm["name"]],
            )
        )
    chart = scatter_chart(
        clouds,
        title="size against robust accuracy",
        x_label="parameters",
        y_label="robust accuracy, %",
    )
    size = found["size"]
    words = "Too few networks to say what size explains."
    if size["r_squared"] is not None:
        words = (
            f"Size alone, as log parameters, explains {100 * size['r_squared']:.0f} % of the "
            f"variance of robust accuracy over the {size['networks']} networks that are not of one "
            f"operation; Spearman {size['spearman']:.2f} (p = {size['p']:.2g})."
        )
    body = f"{wide(chart)}{paragraph(words)}"
    return section("size", "Size against accuracy", body, "study.json")


def _networks(found: Mapping[str, Any]) -> str:
    latency = "latency_table_ms" in found["networks"][0]
    heads = ["arm", "network", "genotype", "parameters", "MACs", *["ms, by the table"] * latency]
    heads += ["clean, %", "robust, %", "each training, %"]
    rows = [
        [
            _NAMES[one["arm"]],
            one["name"],
            one["genotype"][:12],
            f"{one['parameters']:,}",
            f"{one['macs']:,}",
            *[f"{one['latency_table_ms']:.3f}" for _ in range(latency)],
            f"{100 * one['clean_accuracy']:.2f}",
            f"{100 * one['robust_accuracy']:.2f}",
            ", ".join(f"{100 * value:.2f}" for value in one["robust_accuracies"]),
        ]
        for one in found["networks"]
    ]
    body = folded(f"{len(rows)} networks", plain_table(heads, rows, 3))
    return section("networks", "Every network", body, "study.json; every training: compare.csv")


def _cost(found: Mapping[str, Any]) -> str:
    heads = ["arm", "passes to find", "images trained to find", "minutes", "passes to train"]
    heads += ["minutes", "minutes of attacks"]
    rows = [
        [
            _NAMES[arm],
            f"{one['finding']['passes']:,.0f}",
            f"{one['finding']['images_trained']:,.0f}",
            f"{one['finding']['seconds_total'] / 60:.1f}",
            f"{one['training']['passes']:,.0f}",
            f"{one['training']['seconds_total'] / 60:.1f}",
            f"{one['seconds_attacks'] / 60:.1f}",
        ]
        for arm, one in found["cost"].items()
    ]
    note = paragraph(
        "All networks of an arm together. Passes are batches passed forward and backward, of "
        "attacks and evaluations too; what the searches trained alone is included."
    )
    return section("cost", "Cost", f"{plain_table(heads, rows, 1)}{note}", "the runs' cost ledgers")


def _pilot(pilot: Mapping[str, Any]) -> str:
    found, size = pilot["components"], pilot["size"]
    rank = "" if size["spearman"] is None else f"{size['spearman']:.2f} (p = {size['p']:.2g})"
    facts = [
        ("networks", f"{found['groups']}, {found['repeats']} trainings each"),
        ("robust accuracy on", pilot["images"]),
        ("mean", f"{100 * pilot['mean']:.2f} %"),
        ("sd between networks", f"{100 * found['between']:.2f} points"),
        ("sd between trainings of one", f"{100 * found['within']:.2f} points"),
        (
            "intraclass correlation",
            f"{found['icc']:.2f} ({100 * pilot['icc_level']:.0f} % interval {found['low']:.2f} to "
            f"{found['high']:.2f})",
        ),
        ("Spearman of parameters with accuracy", rank),
        ("R2 of log parameters", _share(size["r_squared"])),
        (f"sd of a network, {pilot['repeats']} trainings", f"{100 * pilot['sd']:.2f} points"),
        ("its upper limit (80 %)", f"{100 * pilot['sd_upper']:.2f} points"),
    ]
    heads = ["difference, points", "normal approximation", "rank test, simulated"]
    heads += ["normal, sd at its upper limit"]
    rows = [
        [
            f"{row['difference']:g}",
            str(row["normal"]),
            "more than 5000" if row["simulated"] is None else str(row["simulated"]),
            str(row["normal_upper"]),
        ]
        for row in pilot["table"]
    ]
    words = (
        f"Networks of each arm, two-sided level {pilot['level']:g} (the first step of Holm's "
        f"procedure), power {pilot['power']:g}, both arms with the sd of a random network."
    )
    body = plain_table(["pilot", ""], facts, 2)
    if rows:
        body += paragraph(words) + plain_table(heads, rows, 0)
    return section("pilot", "Pilot: how many networks an arm needs", body, "pilot.json")


def _protocol(found: Mapping[str, Any]) -> str:
    text = json.dumps(found["protocol"], indent=1)
    body = (
        f"<p>SHA-256 <code>{escape(found['sha256'])}</code> of the canonical JSON (sorted keys, no "
        f"spaces), fixed before the first compared network was trained.</p>"
        f"{folded('protocol.json', configuration(text))}"
    )
    return section("protocol", "Protocol", body, "protocol.json")


def make_page(
    name: str, result: Mapping[str, Any], environment: Mapping[str, Any], config: str
) -> str:
    """The page.

    Args:
        name: of the study.
        result: the section ``compare`` of ``study.json``.
        environment: what ``env.json`` holds.
        config: the text of ``config.yaml``.
    """
    parts = [
        _tests(result),
        _arms(result),
        _size(result),
        _networks(result),
        _cost(result),
        *([] if result["pilot"] is None else [_pilot(result["pilot"])]),
        _protocol(result),
        section("config", "Configuration", folded("config.yaml", configuration(config))),
    ]
    facts = ", ".join(
        f"{key} {environment[key]}"
        for key in ("date", "fastbandit", "torch", "cpu", "device_name", "threads", "jobs")
        if key in environment
    )
    data = result["protocol"]["data"]
    first, end = data["test_images"]
    lines = [
        f'<p class="meta">{escape(facts)}</p>',
        f"<p>Data: {escape(str(data['name']))}, test images {first:,} to {end - 1:,} "
        f"(n = {result['n']:,}), opened once, after every network was trained. Protocol "
        f"<code>{escape(result['sha256'][:16])}</code>.</p>",
    ]
    links = [("tests", "tests"), ("arms", "arms"), ("size", "size"), ("networks", "networks")]
    links += [("cost", "cost")] + ([] if result["pilot"] is None else [("pilot", "pilot")])
    links += [("protocol", "protocol"), ("config", "configuration")]
    body = "\n".join(parts)
    title = f"{name}: fastbandit comparison"
    return document(title, header(name, lines), links, body, dated=False)
