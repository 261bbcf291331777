"""What a comparison says: arms, tests, claims, cost; and every network as a row."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from fastbandit._files import csv_text
from fastbandit._statistics import (
    hodges_lehmann,
    holm,
    mann_whitney,
    mean_limits,
    r_squared,
    smallest_p,
    spearman,
    welch,
)
from fastbandit.study.compare.jobs import COST
from fastbandit.study.compare.protocol import Frozen
from fastbandit.study.compare.stages import Member, passes, total

__all__ = ["compare_csv", "judge", "summarise"]

#: Of a row of the CSV file.
COLUMNS = (
    *("role", "arm", "number", "name", "repeat", "genotype", "parameters", "macs", "seed"),
    *("epochs", "validation_clean", "validation_robust", "test_n", "test_clean", "test_robust"),
    *("images_trained", "forward_passes", "backward_passes", "seconds", "model_sha256"),
)


def summarise(
    frozen: Frozen, pilot: dict[str, Any] | None, members: Sequence[Member]
) -> dict[str, Any]:
    """The result, from networks whose test accuracies are known."""
    networks = [_network(member) for member in members]
    arms = [_arm(arm, [one for one in networks if one["arm"] == arm]) for arm in _order(members)]
    compared = [one for one in networks if one["arm"] != "one-operation"]
    first = members[0].attacked[0]
    return {
        "stage": "opened",
        "protocol": frozen.protocol,
        "sha256": frozen.sha256,
        "pilot": pilot,
        "networks": networks,
        "arms": arms,
        **judge(frozen.protocol, {arm["name"]: arm["robust_accuracy"]["values"] for arm in arms}),
        "size": _size(compared),
        "n": first["n"],
        "attack": first["provenance"],
        "cost": _cost(members),
    }


def _order(members: Sequence[Member]) -> list[str]:
    return list(dict.fromkeys(member.arm for member in members))


def _network(member: Member) -> dict[str, Any]:
    trained, attacked = member.trained, member.attacked
    attacks = {
        name: statistics.fmean(one["attacks"][name] for one in attacked)
        for name in attacked[0]["attacks"]
    }
    return {
        "arm": member.arm,
        "number": member.number,
        "name": member.name,
        "genotype": member.genotype.hash,
        "origin": member.origin,
        "parameters": trained[0]["parameters"],
        "macs": trained[0]["macs"],
        **({} if member.latency is None else {"latency_table_ms": member.latency / 1e6}),
        "clean_accuracy": statistics.fmean(one["clean_accuracy"] for one in attacked),
        "robust_accuracy": statistics.fmean(one["robust_accuracy"] for one in attacked),
        "robust_accuracies": [one["robust_accuracy"] for one in attacked],
        "attacks": attacks,
        "cost": member.cost,
    }


def _arm(name: str, networks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    arm: dict[str, Any] = {"name": name, "networks": len(networks)}
    for key in ("clean_accuracy", "robust_accuracy"):
        values = [one[key] for one in networks]
        sd = statistics.stdev(values) if len(values) > 1 else None
        arm[key] = {**mean_limits(values), "sd": sd, "values": values}
    latency = [key for key in ("latency_table_ms",) if key in networks[0]]
    for key in ("parameters", "macs", *latency):
        arm[key] = statistics.fmean(one[key] for one in networks)
    sizes = [math.log(one["parameters"]) for one in networks]
    arm["size_r_squared"] = r_squared(sizes, arm["robust_accuracy"]["values"])
    spent = total([one["cost"] for one in networks])
    arm["cost"] = {key: value / len(networks) for key, value in spent.items()}
    return arm


def _size(networks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How much of robust accuracy size alone explains, over all networks but those of one op."""
    sizes = [math.log(one["parameters"]) for one in networks]
    robust = [one["robust_accuracy"] for one in networks]
    rank, p = spearman(sizes, robust)
    return {
        "r_squared": r_squared(sizes, robust),
        "spearman": rank,
        "p": p,
        "networks": len(networks),
    }


def judge(protocol: dict[str, Any], values: dict[str, Sequence[float]]) -> dict[str, Any]:
    """The tests and claims of a protocol.

    Args:
        values: robust accuracy of each network, by arm, in [0, 1].
    """
    alpha, margin = protocol["alpha"], protocol["margin_points"] / 100
    tests: list[dict[str, Any]] = []
    for one in protocol["tests"]:
        searched, drawn = (values[arm] for arm in one["arms"])
        if len(searched) < 2:
            difference, low, high = statistics.fmean(searched) - statistics.fmean(drawn), None, None
        else:
            difference, low, high = welch(searched, drawn)
        tests.append(
            {
                **one,
                "difference": difference,
                "low": low,
                "high": high,
                "hodges_lehmann": hodges_lehmann(searched, drawn),
                "p": mann_whitney(searched, drawn),
                "smallest_p": smallest_p(len(searched), len(drawn)),
            }
        )
    adjusted = holm({one["name"]: one["p"] for one in tests})
    for one in tests:
        one["p_adjusted"] = adjusted[one["name"]]
    claims: dict[str, bool | None] | None = None
    if protocol["claim"] is not None:
        by_arm = {one["arms"][1]: one for one in tests}
        claims = {}
        for name in protocol["claim"]:
            one = by_arm["matched" if name == "better than chance" else "best"]
            if name == "not inferior to best of m":
                claims[name] = one["low"] > -margin
            else:
                claims[name] = one["difference"] > 0 and one["p_adjusted"] < alpha
    return {"tests": tests, "claims": claims}


def _cost(members: Sequence[Member]) -> dict[str, Any]:
    """Of each arm: finding its networks, and training them by the recipe."""
    costs = {}
    for arm in _order(members):
        of_arm = [member for member in members if member.arm == arm]
        finding = total([member.cost for member in of_arm])
        training = total([one["cost"] for member in of_arm for one in member.trained])
        costs[arm] = {
            "finding": {**finding, "passes": passes(finding)},
            "training": {**training, "passes": passes(training)},
            "seconds_attacks": sum(one["seconds"] for member in of_arm for one in member.attacked),
        }
    return costs


# --- every network --------------------------------------------------------------------------


def compare_csv(
    pilot: dict[str, Any] | None,
    members: Sequence[Member] = (),
    candidates: Sequence[dict[str, Any]] = (),
) -> str:
    """``compare.csv``: a row for each network that was trained."""
    rows: list[dict[str, Any]] = []
    if pilot is not None:
        accuracy = "validation_robust" if "validation" in pilot["images"] else "test_robust"
        for number, one in enumerate(pilot["networks"]):
            rows += [
                {
                    "role": "pilot",
                    "number": number,
                    "repeat": repeat,
                    "genotype": one["genotype"],
                    "parameters": one["parameters"],
                    "macs": one["macs"],
                    accuracy: value,
                }
                for repeat, value in enumerate(one["robust_accuracy"])
            ]
    for number, one in enumerate(candidates):
        for entry in one["candidates"]:
            rows += [
                {
                    "role": f"candidate, rung {rung + 1}",
                    "arm": "best",
                    "number": number,
                    "name": f"candidate {entry['number']}",
                    "genotype": entry["genotype_hash"],
                    "parameters": entry["parameters"],
                    "macs": entry["macs"],
                    "epochs": trained["epochs"],
                    "validation_clean": trained["clean_accuracy"],
                    "validation_robust": trained["robust_accuracy"],
                    **_spent(trained),
                }
                for rung, trained in enumerate(entry["rungs"])
            ]
    for member in members:
        for repeat, one in enumerate(member.trained):
            row = {
                "role": "compared",
                "arm": member.arm,
                "number": member.number,
                "name": member.name,
                "repeat": repeat,
                **{key: one[key] for key in ("genotype", "parameters", "macs", "seed", "epochs")},
                "validation_clean": one["validation"]["clean_accuracy"],
                "validation_robust": one["validation"]["robust_accuracy"],
                **_spent(one["cost"]),
                "model_sha256": "" if one["model"] is None else one["model"]["sha256"],
            }
            if member.attacked:
                tested = member.attacked[repeat]
                row |= {
                    "test_n": tested["n"],
                    "test_clean": tested["clean_accuracy"],
                    "test_robust": tested["robust_accuracy"],
                }
            rows.append(row)
    return csv_text(COLUMNS, rows)


def _spent(cost: dict[str, Any]) -> dict[str, Any]:
    return {key.removesuffix("_total"): cost[key] for key in COST}
