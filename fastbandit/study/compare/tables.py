"""A comparison as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["format_compare", "mean_text"]


def format_compare(result: Mapping[str, Any]) -> str:
    """What is known of a comparison, as tables of text."""
    lines: list[str] = []
    if result["pilot"] is not None:
        lines += _pilot(result["pilot"])
    if result["stage"] == "pilot":
        return "\n".join(lines) or "no pilot: compare.pilot.networks is 0"
    if lines:
        lines.append("")
    lines.append(f"protocol.json, SHA-256 {result['sha256']}")
    if result["stage"] != "opened":
        lines.append(
            "frozen; nothing is trained yet"
            if result["stage"] == "frozen"
            else "all networks are trained; the test images are closed"
        )
        return "\n".join(lines)
    lines += ["", *_arms(result), "", *_tests(result)]
    return "\n".join(lines)


def mean_text(share: Mapping[str, Any]) -> str:
    """A mean in percent, and its interval where there is one."""
    text = f"{100 * share['mean']:.2f}"
    if share["low"] is not None:
        text += f" ({100 * share['low']:.2f}, {100 * share['high']:.2f})"
    return text


def _pilot(pilot: Mapping[str, Any]) -> list[str]:
    variance, size = pilot["components"], pilot["size"]
    lines = [
        f"pilot: {variance['groups']} random networks, {variance['repeats']} trainings each; "
        f"robust accuracy on {pilot['images']}",
        f"mean {100 * pilot['mean']:.2f} %; sd between networks {100 * variance['between']:.2f}, "
        f"between trainings of one {100 * variance['within']:.2f} points; ICC "
        f"{variance['icc']:.2f} ({100 * pilot['icc_level']:.0f} % interval {variance['low']:.2f} "
        f"to {variance['high']:.2f})",
    ]
    if size["spearman"] is not None:
        lines.append(
            f"Spearman of parameters with robust accuracy {size['spearman']:.2f} "
            f"(p = {size['p']:.2g}); R2 of log parameters {size['r_squared']:.2f}"
        )
    lines += [
        f"sd of a network (mean of {pilot['repeats']} trainings) {100 * pilot['sd']:.2f} points, "
        f"at most {100 * pilot['sd_upper']:.2f} (80 %)",
        "",
        f"networks an arm, two-sided level {pilot['level']:g}, power {pilot['power']:g}",
        f"{'difference, points':<20}{'normal':>10}{'rank test':>12}{'normal, sd at most':>20}",
    ]
    for row in pilot["table"]:
        simulated = "> 5000" if row["simulated"] is None else str(row["simulated"])
        lines.append(
            f"{row['difference']:<20g}{row['normal']:>10}{simulated:>12}{row['normal_upper']:>20}"
        )
    return lines


def _arms(result: Mapping[str, Any]) -> list[str]:
    latency = "latency_table_ms" in result["arms"][0]
    lines = [
        f"{'arm':<15}{'networks':>9}{'clean %':>9}{'robust %':>26}{'parameters':>12}{'MACs':>12}"
        f"{'ms by table' if latency else '':>{12 * latency}}"
        f"{'R2 of size':>12}{'passes to find':>16}"
    ]
    for arm in result["arms"]:
        explained = arm["size_r_squared"]
        passes = arm["cost"]["forward_passes"] + arm["cost"]["backward_passes"]
        spent = f"{arm['latency_table_ms']:>12.3f}" if latency else ""
        lines.append(
            f"{arm['name']:<15}{arm['networks']:>9}{100 * arm['clean_accuracy']['mean']:>9.2f}"
            f"{mean_text(arm['robust_accuracy']):>26}{arm['parameters']:>12,.0f}{arm['macs']:>12,.0f}{spent}"
            f"{'-' if explained is None else format(explained, '.2f'):>12}{passes:>16,.0f}"
        )
    size = result["size"]
    if size["r_squared"] is not None:
        lines.append(
            f"size alone explains {100 * size['r_squared']:.0f} % of the variance of robust "
            f"accuracy over {size['networks']} networks (Spearman {size['spearman']:.2f})"
        )
    lines.append(
        f"in brackets: 95 % intervals of the mean over networks; a network is the mean of its "
        f"trainings; {result['attack']}"
    )
    return lines


def _tests(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for one in result["tests"]:
        text = f"{one['name']}: {100 * one['difference']:+.2f} points"
        if one["low"] is not None:
            text += f" (95 %: {100 * one['low']:+.2f} to {100 * one['high']:+.2f})"
        lines.append(
            f"{text}, Hodges-Lehmann {100 * one['hodges_lehmann']:+.2f}; Mann-Whitney p = "
            f"{one['p']:.2g}, adjusted (Holm) {one['p_adjusted']:.2g}"
        )
    if result["claims"] is None:
        lines.append("no claim was registered")
    else:
        lines += [
            f"{name}: {'shown' if good else 'not shown'} ({result['protocol']['claim'][name]})"
            for name, good in result["claims"].items()
        ]
    return lines
