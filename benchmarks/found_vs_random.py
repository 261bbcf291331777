"""Is the architecture that a search found better than a random one?

Trains the found network and random networks of the same space from scratch, all in the same way and
as ``python -m fastbandit.study`` does, and measures clean and robust accuracy on the test images,
which no search has seen::

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
from fastbandit._files import write_atomic
from fastbandit.config import merge
from fastbandit.data import load
from fastbandit.genotype import Genotype
from fastbandit.runs.folder import RunFolder
from fastbandit.search import SearchConfig
from fastbandit.study.real import train_from_scratch, training_settings


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
    searched, source = space.get(config.space), load(config.data)
    results: dict[str, list[dict[str, Any]]] = {"found": [], "random": []}

    def train(genotype: Genotype, seed: int) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            settings = training_settings(config, arguments.epochs, seed)
            return train_from_scratch(genotype, settings, Path(folder) / "run", source)

    for seed in range(arguments.repeats):
        results["found"].append(train(found, seed))
        print("found ", results["found"][-1], flush=True)
    generator = torch.Generator().manual_seed(0)
    for seed in range(arguments.random):
        choice = torch.randint(len(searched.operations), (searched.rows,), generator=generator)
        genotype = Genotype.from_choices(searched, choice, options=found.options)
        results["random"].append(train(genotype, seed))
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
