"""The page of a comparison: its claims, arms, tests, sizes, cost and protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from fastbandit.report.html import Section, document, section
from fastbandit.report.scatter import Cloud, Strip, scatter_chart, strip_chart
from fastbandit.report.settings import study_configuration

__all__ = ["make_page"]

# Words and colour class of each arm.
_ARMS = {
    "search": ("search", "s1"),
    "matched": ("random, same size", "s2"),
    "best": ("best of m random", "s3"),
    "largest": ("largest", "s4"),
    "one-operation": ("one operation", "s5"),
}
_ROBUST = "robust accuracy, %"
_NAMES = {arm: words for arm, (words, _) in _ARMS.items()}

# (anchor, title in the navigation, title, files) in the order of the page. The template of a
# section is called after its anchor.
_SECTIONS = (
    ("tests", "tests", "What was shown", "study.json"),
    ("arms", "arms", "Robust accuracy by arm", "study.json"),
    ("size", "size", "Size against accuracy", "study.json"),
    ("networks", "networks", "Every network", "study.json; every training: compare.csv"),
    ("cost", "cost", "Cost", "the runs' cost ledgers"),
    ("pilot", "pilot", "Pilot: how many networks an arm needs", "pilot.json"),
    ("protocol", "protocol", "Protocol", "protocol.json"),
)


def _charts(result: Mapping[str, Any]) -> tuple[Markup, Markup]:
    """Every network of each arm with the arm's mean, and robust accuracy over size."""
    strips, clouds = [], []
    for arm in result["arms"]:
        members = [one for one in result["networks"] if one["arm"] == arm["name"]]
        words, style = _ARMS[arm["name"]]
        accuracies = [100 * one["robust_accuracy"] for one in members]
        notes = [
            f"{one['name']}: robust {100 * one['robust_accuracy']:.2f} %, "
            f"{one['parameters']:,} parameters, {one['genotype'][:12]}"
            for one in members
        ]
        robust = arm["robust_accuracy"]
        # Networks of one operation are no sample of anything.
        sample = arm["name"] != "one-operation"
        low, high = (
            100 * robust[end] if sample and robust[end] is not None else math.nan
            for end in ("low", "high")
        )
        strips.append(Strip(words, accuracies, notes, 100 * robust["mean"], low, high, style))
        parameters = [one["parameters"] for one in members]
        clouds.append(Cloud(words, parameters, accuracies, notes, style))
    return (
        strip_chart(strips, title="robust accuracy of each arm", y_label=_ROBUST),
        scatter_chart(
            clouds, title="size against robust accuracy", x_label="parameters", y_label=_ROBUST
        ),
    )


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
    strips, scatter = _charts(result)
    values: dict[str, Any] = {
        "compared": result,
        "names": _NAMES,
        "strips": strips,
        "scatter": scatter,
        "protocol": json.dumps(result["protocol"], indent=1),
    }
    sections: list[Section] = [
        (anchor, link, section(anchor, title, files, f"compare_{anchor}", **values))
        for anchor, link, title, files in _SECTIONS
        if anchor != "pilot" or result["pilot"] is not None
    ]
    sections.append(("config", "configuration", study_configuration(config)))
    title = f"{name}: fastbandit comparison"
    return document(
        "study_page", title, sections, name=name, environment=environment, compared=result
    )
