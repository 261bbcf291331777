"""The result of an evaluation: its tables, its line of provenance, its files."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from fastbandit._intervals import wilson
from fastbandit.attacks._model import Oracle
from fastbandit.attacks.registry import ATTACKS
from fastbandit.evaluate.grid import AttackGrid, Evaluation
from fastbandit.evaluate.sanity import Evidence, judge
from fastbandit.runs.environment import environment, peak_memory_mb
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.tensors import save_tensors
from fastbandit.threat import NORM_NAMES, ThreatModel, format_fraction

RESULT = "evaluation.json"
_SCHEMA = 1


def _share(correct: int, n: int) -> dict[str, Any]:
    return {
        "correct": correct,
        "n": n,
        "accuracy": correct / n if n else None,
        "interval": list(wilson(correct, n)) if n else None,
    }


def table(evaluation: Evaluation, number: int) -> dict[str, Any]:
    """The table of one radius."""
    threat, grid = evaluation.threats[number], evaluation.grids[f"radius{number}"]
    right = evaluation.candidates(f"radius{number}")
    clean = int(right.sum())
    attacks = []
    still_correct = right.clone()
    for position, (plan, work) in enumerate(zip(grid.plans, grid.work, strict=True)):
        fell = grid.success(position)
        still_correct &= ~fell
        correct = clean - int(fell.sum()) if grid.every else int(still_correct.sum())
        attacks.append(
            {
                "name": plan.name,
                "describe": plan.describe,
                "settings": plan.settings,
                "attacked": int(grid.tried(position).sum()),
                "fooled": int(fell.sum()),
                **_share(correct, evaluation.n),
                "seconds": work["seconds"],
                "forward_passes": int(work["forward"]),
                "backward_passes": int(work["backward"]),
                "unconfirmed": int((grid.unconfirmed >> position & 1).sum()),
            }
        )
    plain = threat.to_dict()
    keys = ("norm", "epsilon", "epsilon_value", "lower", "upper", "bn_mode")
    return {
        "threat": {key: plain[key] for key in keys},
        "attacked_images": "all" if grid.every else "standing",
        "clean": _share(clean, evaluation.n),
        "attacks": attacks,
        "worst_case": _share(int(still_correct.sum()), evaluation.n),
        "provenance": provenance(evaluation, threat, grid),
    }


def provenance(evaluation: Evaluation, threat: ThreatModel, grid: AttackGrid) -> str:
    """The one line that stands beside a robust accuracy."""
    config = evaluation.config
    names = ", ".join(plan.name for plan in grid.plans) or "no attack"
    training = evaluation.subject.training
    rule = training.get("checkpoint_rule") or training.get("rule")
    budgets = [
        f"{plan.name} {plan.budget}"
        for plan in sorted(grid.plans, key=lambda plan: plan.black_box)
        if plan.budget is not None
    ]
    notes = {
        note
        for attack in ATTACKS.values()
        if (note := attack.note(getattr(config, attack.section, None))) is not None
    }
    precision: str = config.precision
    if precision != "float32":
        precision += ", successes confirmed in float32"
    parts = [
        f"n {evaluation.n} ({config.split} images of {evaluation.source.name})",
        f"seed {config.seed}",
        f"worst case of {names}",
        *budgets,
        *sorted(notes),
        f"norm {NORM_NAMES[threat.norm]}",
        f"epsilon {format_fraction(Fraction(threat.epsilon))}",
        f"dtype {precision}",
        "batch norm eval",
        f"checkpoint rule: {rule or 'not recorded'}",
    ]
    return "; ".join(parts)


def sanity(evaluation: Evaluation) -> dict[str, Any]:
    """The verdicts of the sanity checks."""
    config, checks = evaluation.config, evaluation.grids["checks"]
    sample = evaluation.candidates("checks")
    fingerprint = evaluation.fingerprint
    return judge(
        Evidence(
            answers={
                plan.key: checks.success(position)[sample]
                for position, plan in enumerate(checks.plans)
            },
            n=int(sample.sum()) if config.checks.images else 0,
            norm=config.norm,
            steps=config.checks.steps,
            queries=config.checks.queries,
            transfer=_transfer_against_white_box(evaluation),
            unconfirmed=_unconfirmed(evaluation),
            fallen=evaluation.grids["radius0"].any_success()[sample],
            fixed=(fingerprint.randomised, len(fingerprint.logits)),
        )
    )


def _transfer_against_white_box(evaluation: Evaluation) -> tuple[int, int, int] | None:
    """Images fooled by transfer alone, by white-box attacks alone, and all that were attacked."""
    grid, main = evaluation.grids["transfer"], evaluation.grids["radius0"]
    if not grid.plans:
        return None
    right = evaluation.candidates("transfer")
    by_transfer = grid.any_success() & right
    white = torch.zeros_like(right)
    for position, plan in enumerate(main.plans):
        if not plan.black_box:
            white |= main.success(position)
    alone, other = int((by_transfer & ~white).sum()), int((white & ~by_transfer).sum())
    return alone, other, int(right.sum())


def _unconfirmed(evaluation: Evaluation) -> tuple[int, int] | None:
    """Images that stand though the copy was fooled, at the radius with the most; and all."""
    if evaluation.fast is None and evaluation.config.precision == "float32":
        return None
    right = ~evaluation.grids["clean"].success(0)
    denied = max(
        int((right & (grid.unconfirmed != 0) & ~grid.any_success()).sum())
        for name, grid in evaluation.grids.items()
        if name.startswith("radius")
    )
    return denied, int(right.sum())


def _transfer(evaluation: Evaluation) -> list[dict[str, Any]] | None:
    grid = evaluation.grids["transfer"]
    if evaluation.surrogate is None:
        return None
    clean = int(evaluation.candidates("transfer").sum())
    return [
        {
            "from": evaluation.surrogate[1],
            "threat": {"norm": evaluation.config.norm, "epsilon": evaluation.config.epsilon},
            "counts_in_worst_case": False,
            "attacks": [
                {
                    "name": plan.name,
                    "describe": plan.describe,
                    "settings": plan.settings,
                    "attacked": int(grid.tried(position).sum()),
                    **_share(clean - int(grid.success(position).sum()), evaluation.n),
                    "seconds": grid.work[position]["seconds"],
                }
                for position, plan in enumerate(grid.plans)
            ],
        }
    ]


def _cross_check(evaluation: Evaluation) -> dict[str, Any] | None:
    grid = evaluation.grids["reference"]
    if not grid.plans:
        return None
    right = evaluation.candidates("reference")
    n = int(right.sum())
    theirs = grid.success(0)[right]
    ours = evaluation.grids["radius0"].any_success()[right]
    both = int((ours & theirs).sum())
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    # Over the images that both were tried on, which the model has right.
    counts = {
        "ours": _share(n - both - only_ours, n),
        "reference": _share(n - both - only_theirs, n),
    }
    interval = counts["reference"]["interval"]
    within = interval is None or counts["ours"]["accuracy"] <= interval[1]
    return {
        "describe": grid.plans[0].describe,
        "of": "images that the model classifies correctly",
        "n": n,
        "fooled_by_both": both,
        "fooled_by_ours_alone": only_ours,
        "fooled_by_reference_alone": only_theirs,
        "fooled_by_neither": n - both - only_ours - only_theirs,
        "agreement": (n - only_ours - only_theirs) / n if n else None,
        **counts,
        "verdict": "not weaker than the reference by more than its interval"
        if within
        else "weaker than the reference by more than its interval",
        "seconds": grid.work[0]["seconds"],
    }


def _robustbench(
    evaluation: Evaluation, main: dict[str, Any], cross_check: dict[str, Any] | None
) -> Any:
    """The fields of RobustBench's model claims; what it asks of a paper is left null."""

    def percent(share: float | None) -> str | None:
        return None if share is None else f"{100 * share:.2f}"

    reference = None
    whole = cross_check is not None and evaluation.config.cross_check_limit is None
    if whole and cross_check is not None:
        reference = cross_check["reference"]["correct"] / evaluation.n
    return {
        "link": None,
        "name": None,
        "authors": None,
        "additional_data": None,
        "number_forward_passes": 1,
        "dataset": evaluation.source.name,
        "venue": None,
        "architecture": _architecture_name(evaluation),
        "eps": main["threat"]["epsilon"],
        "threat_model": "Linf" if evaluation.config.norm == "linf" else "L2",
        "clean_acc": percent(main["clean"]["accuracy"]),
        "reported": percent(main["worst_case"]["accuracy"]),
        # Only the reference's own figure may bear this name.
        "autoattack_acc": percent(reference),
    }


def _architecture_name(evaluation: Evaluation) -> str:
    facts = evaluation.subject.facts
    if facts["genotype_hash"] is None:
        return str(facts["architecture"]["class"])
    built = facts["architecture"]
    return (
        f"fastbandit genotype {facts['genotype_hash'][:12]}, "
        f"{built['cells']} cells, {built['channels']} channels"
    )


def finish(evaluation: Evaluation) -> dict[str, Any]:
    """Write the files and return the result (None of it on a process that is not the first)."""
    evaluation.save()
    results = [table(evaluation, number) for number in range(len(evaluation.threats))]
    cross_check = _cross_check(evaluation)
    work = [entry for grid in evaluation.grids.values() for entry in grid.work]
    facts = environment(evaluation.device)
    seconds: dict[str, float] = {}
    for name, grid in evaluation.grids.items():
        phase = "attacks" if name.startswith("radius") else name
        for entry in grid.work:
            seconds[phase] = seconds.get(phase, 0.0) + entry["seconds"]
    result = {
        "schema_version": _SCHEMA,
        "command": "evaluate",
        "status": "finished",
        "model": {**evaluation.subject.facts, "fingerprint": evaluation.fingerprint.to_dict()},
        "data": {
            "name": evaluation.source.name,
            "description": evaluation.source.description,
            "split": evaluation.config.split,
            "n": evaluation.n,
            "digest": evaluation.source.digest,
        },
        "seed": evaluation.config.seed,
        "results": results,
        "suspicion": sanity(evaluation),
        "fast_copy": None
        if evaluation.subject.fast is None
        else {"used": evaluation.fast is not None, "differs": evaluation.differing},
        "cross_check": cross_check,
        "cross_check_left_out": evaluation.reference_left_out,
        "transfer": _transfer(evaluation),
        "robustbench": _robustbench(evaluation, results[0], cross_check),
        "cost": {
            "seconds_total": evaluation.seconds,
            "seconds": seconds,
            "unit_of_passes": "images",
            "forward_passes": int(sum(entry["forward"] for entry in work)),
            "backward_passes": int(sum(entry["backward"] for entry in work)),
            "peak_memory_mb": peak_memory_mb(evaluation.device),
            "device": str(evaluation.device),
            "device_name": facts["device_name"],
            "threads": torch.get_num_threads(),
            "processes": 1 if evaluation.group is None else evaluation.group.size,
        },
        "versions": {key: facts[key] for key in ("fastbandit", "torch", "python", "cuda")},
    }
    if evaluation.folder is not None:
        _write_tensors(evaluation, evaluation.folder)
        evaluation.folder.write_json(RESULT, result)
    return result


def outcome_of(evaluation: Evaluation) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What became of each image, and what the numbers mean: see docs/evaluate.md, images."""
    clean = evaluation.grids["clean"]
    outcome = {
        "id": torch.arange(evaluation.n),
        "label": evaluation.labels.cpu(),
        "clean_correct": ~clean.success(0),
    }
    facts: dict[str, Any] = {"attacks": [p.name for p in evaluation.grids["radius0"].plans]}
    for number, threat in enumerate(evaluation.threats):
        key = "broken_by" if number == 0 else f"broken_by_{number}"
        outcome[key] = evaluation.grids[f"radius{number}"].first()
        facts[key] = format_fraction(Fraction(threat.epsilon))
    return outcome, facts


def _write_tensors(evaluation: Evaluation, folder: RunFolder) -> None:
    outcome, facts = outcome_of(evaluation)
    save_tensors(folder.path / "images.safetensors", outcome, "images", facts)
    ids = evaluation.example_ids
    adversarial = evaluation.examples
    with Oracle(evaluation.model, batch_size=evaluation.config.batch_size) as oracle:
        # -1: the answer is not finite.
        predictions = [
            _prediction(oracle.logits(x, exact=True)).cpu()
            if len(ids)
            else torch.empty(0, dtype=torch.int64)
            for x in (evaluation.pixels(ids), adversarial.to(evaluation.device))
        ]
    save_tensors(
        folder.path / "examples.safetensors",
        {
            "clean": evaluation.images[ids.to(evaluation.images.device)].cpu(),
            "adversarial": adversarial,
            "label": evaluation.labels[ids.to(evaluation.labels.device)].cpu(),
            "prediction_clean": predictions[0],
            "prediction_adversarial": predictions[1],
            "id": ids,
        },
        "examples",
        {"norm": evaluation.config.norm, "epsilon": evaluation.config.epsilon},
    )


def _prediction(logits: Tensor) -> Tensor:
    """The predicted class, -1 where the answer is not finite, int64 [N]."""
    return logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1)
