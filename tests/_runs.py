"""Synthetic run folders in the format of a search, for tests of what reads them.

A small bandit is simulated with numpy, so that the files agree with each other: the means, counts
and bounds of abandoned arms are those that the choices and rewards lead to.
"""

from __future__ import annotations

import json
import math
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


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
    path.write_text(text, encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
