"""Is the architecture that a search found better than a random one?

Retrains the found network and random networks of the same space from scratch, all in the same way
(fastbandit.retrain: a tenth of the training images chooses the best epoch), and measures clean and
robust accuracy on the test images, which no search has seen::

    python benchmarks/found_vs_random.py runs/2026-01-01-digits --random 5 --epochs 20
"""

from __future__ import annotations

import argparse
import json
import statistics as stats
import tempfile
from pathlib import Path
from typing import Any

import torch

from fastbandit import space
from fastbandit._cli import merge
from fastbandit._files import write_atomic
from fastbandit.genotype import Genotype
from fastbandit.retrain import RetrainConfig, retrain
from fastbandit.run import RunFolder
from fastbandit.search import SearchConfig


def train(genotype: Genotype, config: SearchConfig, epochs: int, seed: int) -> dict[str, Any]:
    """Train from scratch as the search trained; accuracy of the best epoch on the test images."""
    settings = {
        "name": "found-vs-random",
        "seed": seed,
        "epochs": epochs,
        "schedule": "cosine",
        "layers": None,
        "method": "fgsm" if config.attack.steps == 1 else "pgd",
        **{
            name: getattr(config, name)
            for name in (
                "data", "device", "threads", "init_channels", "batch_size", "learning_rate",
                "momentum", "weight_decay", "grad_clip", "crop_padding", "flip", "cutout_length",
            )
        },
        "attack": {
            name: getattr(config.attack, name)
            for name in ("epsilon", "steps", "step_size", "random_start", "clip", "bn_mode")
        },
        "final": {"steps": config.final.steps, "step_size": config.final.step_size},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        _, found = retrain(
            merge(RetrainConfig(), settings, "the search"), Path(folder) / "run", genotype=genotype
        )
    return {
        "genotype": genotype.hash,
        "seed": seed,
        "epoch": found["best"]["epoch"],
        "parameters": found["parameters"],
        "clean_accuracy": found["test"]["clean_accuracy"],
        "robust_accuracy": found["test"]["robust_accuracy"],
        "n": found["test"]["n"],
        "seconds": found["cost"]["seconds_train"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a finished search")
    parser.add_argument("--random", type=int, default=5, help="how many random networks")
    parser.add_argument("--epochs", type=int, default=20, help="epochs for each network")
    parser.add_argument("--repeats", type=int, default=1, help="seeds for the found network")
    parser.add_argument("--out", type=Path, help="write the raw figures to this JSON file")
    arguments = parser.parse_args()

    config = merge(SearchConfig(), RunFolder.read_config(arguments.run), str(arguments.run))
    found = Genotype.load(arguments.run / "genotype.json")
    searched = space.get(config.space)
    results: dict[str, list[dict[str, Any]]] = {"found": [], "random": []}
    for seed in range(arguments.repeats):
        results["found"].append(train(found, config, arguments.epochs, seed))
        print("found ", results["found"][-1], flush=True)
    generator = torch.Generator().manual_seed(0)
    for seed in range(arguments.random):
        choice = torch.randint(len(searched.operations), (searched.rows,), generator=generator)
        genotype = Genotype.from_choices(searched, choice, options=found.options)
        results["random"].append(train(genotype, config, arguments.epochs, seed))
        print("random", results["random"][-1], flush=True)

    print(f"\n{'':<8}{'networks':>9}{'clean':>16}{'robust':>16}{'parameters':>13}")
    for name, rows in results.items():
        columns = []
        for key in ("clean_accuracy", "robust_accuracy"):
            values = [100 * row[key] for row in rows]
            spread = f" +- {stats.stdev(values):.2f}" if len(values) > 1 else ""
            columns.append(f"{stats.mean(values):.2f}{spread}")
        size = stats.mean(row["parameters"] for row in rows)
        print(f"{name:<8}{len(rows):>9}{columns[0]:>16}{columns[1]:>16}{size:>13,.0f}")
    print(f"attack: {config.final_threat().describe()}; n = {results['found'][0]['n']}")
    if arguments.out is not None:
        write_atomic(arguments.out, json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
