"""Synthetic folders of searches, retraining runs and evaluations, for tests of what reads them.

A small bandit is simulated with numpy, so that the files agree with each other: the means, counts
and bounds of abandoned arms are those that the choices and rewards lead to.
"""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fastbandit import space
from fastbandit.genotype import Genotype

THREAT = {
    "norm": "linf",
    "epsilon": "8/255",
    "epsilon_value": 8 / 255,
    "lower": 0.0,
    "upper": 1.0,
    "step_size": None,
    "step_value": 10 / 255,
    "steps": 1,
    "random_start": True,
    "bn_mode": "train",
}


def make_run(
    folder: Path,
    *,
    name: str = "synthetic",
    space_name: str = "robust9-light",
    rounds: int = 3,
    stop_after: int | None = None,
    policy: str = "printed",
    bonus: float = 1.0,
    seed: int = 0,
) -> Path:
    """Write a run folder; one that is not finished where ``stop_after`` samples end it early."""
    searched = space.get(space_name)
    rows, arms = searched.rows, searched.arms
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)

    quality = generator.normal(0, 0.01, (rows, arms))
    mean, count = np.zeros((rows, arms)), np.zeros((rows, arms), dtype=int)
    alive = np.ones((rows, arms), dtype=bool)
    first = np.stack([generator.permutation(arms) for _ in range(rows)])
    total = arms + rounds * (arms * (arms + 1) // 2 - 1)
    rate, validation, every = 0.7, 719, np.arange(rows)
    bandit: list[dict[str, Any]] = [
        {
            "event": "start",
            "space": space_name,
            "operations": list(searched.operations),
            "edges": list(searched.edge_names),
            "policy": policy,
            "rate": rate,
            "rounds": rounds,
            "bonus": bonus,
            "seed": seed,
        }
    ]
    metrics: list[dict[str, Any]] = []
    history: list[dict[str, Any]] = []

    def genotype(choice: np.ndarray) -> Genotype:
        return Genotype.from_choices(searched, choice.tolist(), macro={"channels": 16, "layers": 6})

    def best() -> np.ndarray:
        return np.where(alive, mean, -np.inf).argmax(1)

    since, round_number = 0, 0
    for sample in range(total if stop_after is None else stop_after):
        phase = "initial" if sample < arms else "search"
        n = count.sum(1, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            bonus_now = bonus * np.sqrt(2 * np.log(np.maximum(n, 1)) / np.maximum(count, 1))
        if phase == "initial":
            choice, law = first[:, sample], np.full((rows, arms), 1 / (arms - sample))
        else:
            weight = np.where(alive, np.exp(-(mean - bonus_now)), 0.0)
            law = weight / weight.sum(1, keepdims=True)
            choice = (law.cumsum(1) > generator.random((rows, 1))).argmax(1)
        trend = 0.82 * (1 - math.exp(-(sample + 2) / 22)) + 0.08
        robust = trend * 0.75 + quality[every, choice].sum() * 0.2 + generator.normal(0, 0.015)
        clean = trend + quality[every, choice].sum() * 0.15 + generator.normal(0, 0.01)
        # Accuracies are a whole number of images.
        robust, clean = (
            round(min(max(a, 0.0), 1.0) * validation) / validation for a in (robust, clean)
        )
        left = int(alive[0].sum())
        bandit.append(
            {
                "event": "sample",
                "sample": sample,
                "phase": phase,
                "choice": choice.tolist(),
                "probability": law[every, choice].tolist(),
                "clean_accuracy": clean,
                "robust_accuracy": robust,
                "reward": robust,
            }
        )
        metrics.append(
            {
                "epoch": sample,
                "phase": phase,
                "arms": left,
                "loss": 2.3 * math.exp(-sample / 40) + 0.5 + float(generator.normal(0, 0.03)),
                "train_accuracy": robust,
                "clean_accuracy": clean,
                "robust_accuracy": robust,
                "reward": robust,
                "learning_rate": 0.05 * (1 + math.cos(math.pi * sample / total)) / 2,
                "seconds_train": 2.5,
                "seconds_validate": 0.75,
                "seconds_total": 3.5,
                "images_per_second": 288.0,
                "peak_memory_mb": 700.0 + sample / 2,
            }
        )
        fresh = count[every, choice] == 0
        mean[every, choice] = np.where(
            fresh, robust, (1 - rate) * mean[every, choice] + rate * robust
        )
        count[every, choice] += 1
        if phase == "initial":
            continue
        since += 1
        if since < left * rounds:
            continue
        since, round_number, left = 0, round_number + 1, left - 1
        n = sample + 1
        bonus_now = bonus * np.sqrt(2 * np.log(n) / count)
        score = np.where(alive, mean + bonus_now, np.inf)
        if policy == "random":
            score = np.where(alive, generator.random((rows, arms)), np.inf)
        gone = score.argmin(1)
        alive[every, gone] = False
        for row, arm in enumerate(gone.tolist()):
            edge = searched.edge_name(row)
            bandit.append(
                {
                    "event": "abandon",
                    "sample": n,
                    "round": round_number,
                    "row": row,
                    "cell": edge[0],
                    "edge": edge,
                    "arm": arm,
                    "operation": searched.operations[arm],
                    "mean": mean[row, arm],
                    "count": int(count[row, arm]),
                    "lower": mean[row, arm] - bonus_now[row, arm],
                    "upper": mean[row, arm] + bonus_now[row, arm],
                    "total": n,
                    "arms_left": left,
                }
            )
        history.append(
            {
                "sample": n,
                "arms_left": left,
                "choice": best().tolist(),
                "genotype": genotype(best()).to_dict(),
            }
        )

    config = {
        "name": name,
        "data": "digits",
        "space": space_name,
        "seed": seed,
        "device": "cpu",
        "learning_rate": 0.05,
        "attack": {
            "epsilon": "8/255",
            "steps": 1,
            "step_size": None,
            "random_start": True,
            "clip": "image",
            "bn_mode": "train",
        },
        "bandit": {"policy": policy, "rate": rate, "rounds": rounds, "bonus": bonus},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(
        folder / "env.json",
        {
            "date": "2026-01-31T12:00:00+00:00",
            "fastbandit": "0.1.0",
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
            "platform": "Linux",
            "device": "cpu",
            "threads": 2,
            "kernels": {"cpu": {"loaded": True, "path": "_kernels_cpu.so"}, "cuda": None},
        },
    )
    write_json(
        folder / "split.json",
        {
            "data": "digits",
            "digest": "0123456789abcdef",
            "weights": list(range(718)),
            "validation": list(range(718, 718 + validation)),
            "test": list(range(360)),
        },
    )
    if stop_after is None:
        bandit.append({"event": "end", "sample": total, "choice": best().tolist()})
        found = genotype(best())
        found.save(folder / "genotype.json")
        attack = "PGD-20, L-infinity, epsilon 8/255, step 0.02, random start"
        write_json(
            folder / "summary.json",
            {
                "status": "finished",
                "run_id": "a1b2c3d4e5f6",
                "name": name,
                "genotype": "genotype.json",
                "genotype_hash": found.hash,
                "data": {
                    "name": "digits",
                    "weights": 718,
                    "validation": validation,
                    "test": 360,
                    "classes": 10,
                },
                "selection": "the last arm on every edge, weights of the search's last epoch",
                "threat": THREAT,
                "reward": "robust",
                "final": {
                    "split": "validation",
                    "n": validation,
                    "clean_accuracy": 640 / validation,
                    "robust_accuracy": 480 / validation,
                    "attack": attack,
                },
                "test": {
                    "split": "test",
                    "n": 360,
                    "clean_accuracy": 315 / 360,
                    "robust_accuracy": 240 / 360,
                    "attack": attack,
                },
                "cost": {
                    "epochs": total,
                    "seconds_total": 3.5 * total,
                    "seconds_train": 2.5 * total,
                    "seconds_validate": 0.75 * total,
                    "seconds_other": 0.25 * total,
                    "images_per_second": 288.0,
                    "images_trained": 718 * total,
                    "images_evaluated": validation * total,
                    "forward_passes": 36 * total,
                    "backward_passes": 12 * total,
                    "peak_memory_mb": 770.5,
                    "device": "cpu",
                    "threads": 2,
                },
                "versions": {"torch": "2.13.0+cpu", "fastbandit": "0.1.0"},
            },
        )
    write_lines(folder / "bandit.jsonl", bandit)
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "genotypes.jsonl", history)
    return folder


# --- retraining runs and evaluations --------------------------------------------------------


def make_retraining(
    folder: Path,
    found: Genotype,
    *,
    name: str = "retrained",
    epochs: int = 12,
    stop_after: int | None = None,
    overfitted: int | None = None,
    seed: int = 0,
) -> Path:
    """Write the folder of a retraining run; unfinished where ``stop_after`` epochs end it early.

    Args:
        overfitted: an epoch at which the guard against catastrophic overfitting speaks.
    """
    generator = np.random.default_rng(seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    n = 500
    metrics = []
    for epoch in range(epochs if stop_after is None else stop_after):
        rise = 1 - math.exp(-(epoch + 1) / 4)
        clean = round(n * min(1.0, 0.15 + 0.78 * rise + float(generator.normal(0, 0.01)))) / n
        robust = round(n * min(1.0, 0.1 + 0.55 * rise + float(generator.normal(0, 0.01)))) / n
        line: dict[str, Any] = {
            "epoch": epoch,
            "loss": 2.2 * math.exp(-epoch / 6) + 0.7,
            "train_accuracy": min(1.0, robust + 0.04),
            "clean_accuracy": clean,
            "robust_accuracy": robust,
            "learning_rate": 0.1 * (1 - epoch / epochs),
            "seconds_train": 5.25,
            "seconds_validate": 1.5,
            "seconds_total": 7.0,
            "images_per_second": 640.0,
            "peak_memory_mb": 500.0 + epoch,
        }
        if overfitted is not None:
            line["overfitting"] = {
                "steps": 1,
                "trained": 0.5,
                "strong": 0.0125 if epoch == overfitted else 0.45,
                "images": 256,
                "overfitted": epoch == overfitted,
            }
            if epoch == overfitted:
                line["overfitting"]["back_to"] = epoch - 1
        metrics.append(line)
    write_lines(folder / "metrics.jsonl", metrics)
    found.save(folder / "genotype.json")
    config = {"name": name, "data": "digits", "epochs": epochs, "seed": seed, "method": "fgsm"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    write_json(
        folder / "env.json",
        {"command": "retrain", "date": "2026-02-01T08:00:00+00:00", "torch": "2.13.0+cpu"},
    )
    write_json(folder / "split.json", {"data": "digits", "validation": list(range(n))})
    if stop_after is not None:
        return folder
    best = max(metrics, key=lambda line: line["robust_accuracy"])
    parts = {
        part: {
            "epoch": line["epoch"],
            "clean_accuracy": line["clean_accuracy"],
            "robust_accuracy": line["robust_accuracy"],
            "n": n,
            "attack": "PGD-10, L-infinity, epsilon 8/255, step 2/255, random start",
            "file": f"model-{part}.safetensors",
        }
        for part, line in (("best", best), ("last", metrics[-1]))
    }
    write_json(
        folder / "summary.json",
        {
            "status": "finished",
            "command": "retrain",
            "run_id": f"beef0000{seed:04d}",
            "name": name,
            "genotype_hash": found.hash,
            "parameters": 123456 + seed,
            "macs": 7654321,
            "method": "fgsm",
            "threat": THREAT,
            "data": {"name": "digits", "train": 3323, "validation": n, "test": 1797},
            "selection": "best robust accuracy on the validation images",
            **parts,
            "test": {
                "n": 1797,
                "clean_accuracy": 1650 / 1797,
                "robust_accuracy": 1111 / 1797,
                "attack": "PGD-20, L-infinity, epsilon 8/255",
                "of": "best",
            },
            "cost": {
                "epochs": epochs,
                "seconds_total": 7.0 * epochs + 4.5,
                "seconds_train": 5.25 * epochs,
                "seconds_validate": 1.5 * epochs,
                "forward_passes": 104 * epochs,
                "backward_passes": 52 * epochs,
                "peak_memory_mb": 512.5,
                "device": "cpu",
            },
            "versions": {"torch": "2.13.0+cpu"},
        },
    )
    return folder


def measured(correct: int, n: int) -> dict[str, Any]:
    """A share as an evaluation writes it; the interval is not Wilson's, to be told from it."""
    value = correct / n
    limits = [max(0.0, value - 0.0213), min(1.0, value + 0.0217)]
    return {"correct": correct, "n": n, "accuracy": value, "interval": limits}


def make_evaluation(
    folder: Path,
    found: Genotype,
    *,
    epsilons: tuple[str, ...] = ("8/255",),
    norm: str = "linf",
    n: int = 1000,
    clean: int = 912,
    attacks: tuple[str, ...] = ("FGSM", "PGD-20", "APGD-CE", "Square"),
    drop: float = 0.3,
    suspicious: bool = False,
    run_id: str | None = None,
    examples: int = 4,
    shape: tuple[int, int, int] = (1, 8, 8),
    seed: int = 0,
) -> Path:
    """Write the folder of a finished evaluation.

    Args:
        drop: share of the images that the first attack fells at 8/255; later ones a tenth of it.
        run_id: of the retraining run whose weights were evaluated, where the file says so.
        examples: images kept as examples, of ``shape`` [C, H, W].
    """
    import torch

    from fastbandit.runs.tensors import save_tensors

    generator = np.random.default_rng(seed + 2)
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for epsilon in epsilons:
        radius = float(Fraction(epsilon))
        standing, entries = clean, []
        for position, name in enumerate(attacks):
            share = drop * radius / (8 / 255) * (1.0 if position == 0 else 0.1)
            attacked, standing = standing, max(0, standing - round(clean * share))
            entries.append(
                {
                    "name": name,
                    "describe": f"{name}, {norm}, epsilon {epsilon}, step 2/255",
                    "settings": {"steps": 20, "restarts": 1},
                    "attacked": attacked,
                    "fooled": attacked - standing,
                    **measured(standing, n),
                    "seconds": 1.25 + position,
                    "forward_passes": 21 * (position + 1),
                    "backward_passes": 20 * (position + 1),
                    "unconfirmed": position,
                }
            )
        results.append(
            {
                "threat": {**THREAT, "norm": norm, "epsilon": epsilon, "epsilon_value": radius},
                "attacked_images": "standing",
                "clean": measured(clean, n),
                "attacks": entries,
                "worst_case": measured(standing, n),
                "provenance": f"n = {n}; seed {seed}; {', '.join(attacks)}; {norm} {epsilon}; "
                "float32; bn_mode eval; checkpoint best",
            }
        )
    (folder / "config.yaml").write_text(f"name: evaluation\nseed: {seed}\n", encoding="utf-8")
    write_json(
        folder / "env.json",
        {"command": "evaluate", "date": "2026-02-02T09:00:00+00:00", "torch": "2.13.0+cpu"},
    )
    verdict = "suspicious" if suspicious else "ok"
    training = {} if run_id is None else {"run_id": run_id}
    write_json(
        folder / "evaluation.json",
        {
            "schema_version": 1,
            "command": "evaluate",
            "status": "finished",
            "model": {
                "file": "model-best.safetensors",
                "genotype_hash": found.hash,
                "parameters": 123456,
                "architecture": {"channels": 8},
                "training": training,
            },
            "data": {"name": "digits", "description": "", "split": "test", "n": n, "digest": "ab"},
            "results": results,
            "suspicion": {
                "verdict": verdict,
                "checks": [
                    {"name": "epsilon 0", "verdict": "ok", "detail": "equal to clean"},
                    {"name": "zero gradients", "verdict": verdict, "detail": "3 of 1,000 images"},
                    {"name": "black-box", "verdict": "skipped", "detail": "no second model"},
                ],
            },
            "cross_check": {"with": "pyautoattack", "agree": 998, "n": n},
            "transfer": [
                {
                    "from": {"file": "another.safetensors", "genotype_hash": None},
                    "threat": {"norm": norm, "epsilon": epsilons[0]},
                    "attacks": [{"name": "MI-FGSM", "attacked": clean, **measured(805, n)}],
                }
            ],
            "robustbench": {"clean_acc": "91.2", "dataset": "digits"},
            "cost": {
                "seconds_total": 17.75,
                "seconds": {"clean": 0.5, "attacks": 16.25},
                "unit_of_passes": "images",
                "forward_passes": 4321,
                "backward_passes": 1234,
            },
            "versions": {"torch": "2.13.0+cpu"},
        },
    )
    pixels = torch.from_numpy(generator.random((examples, *shape), dtype=np.float32))
    moved = torch.from_numpy(generator.uniform(-0.03, 0.03, pixels.shape).astype(np.float32))
    label = torch.arange(examples) % 10
    save_tensors(
        folder / "examples.safetensors",
        {
            "clean": pixels,
            "adversarial": (pixels + moved).clamp(0, 1),
            "label": label,
            "prediction_clean": label.clone(),
            "prediction_adversarial": (label + 3) % 10,
            "id": 100 + torch.arange(examples),
        },
        "examples",
        {},
    )
    return folder


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    path.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
