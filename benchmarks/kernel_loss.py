"""What the kernel-level loss and the two-step training give on the digits: an ablation.

Trains one 1-bit network from scratch with each setting and seed, clean, and writes the accuracy of
the best epoch on the test images::

    python benchmarks/kernel_loss.py --out benchmarks/results/binary/kernel-loss.csv

All settings of a seed have the same initial weights and batches. ``--epochs 2 --seeds 1 --channels
8 --train-limit 200`` shows that it runs. Runs that are in the file are not made again.
"""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import tempfile
from pathlib import Path
from typing import Any

from fastbandit import space
from fastbandit._files import write_atomic
from fastbandit.config import merge
from fastbandit.genotype import Genotype
from fastbandit.retrain import RetrainConfig, retrain

SETTINGS: dict[str, dict[str, Any]] = {
    "one step": {},
    "two steps": {"steps": 2},
    "kernel 1e-4": {"kernel_weight": 1e-4},
    "kernel 1e-2": {"kernel_weight": 1e-2},
    "center 1e-4": {"center_weight": 1e-4},
    "center 1e-2": {"center_weight": 1e-2},
    "kernel 1e-4, center 1e-4": {"kernel_weight": 1e-4, "center_weight": 1e-4},
}
FIELDS = ("setting", "seed", "epochs", "test_images", "test_accuracy", "validation_accuracy")


def network() -> Genotype:
    """1-bit separable 3x3 from both inputs of a cell and from the node before, in both types."""
    edges = {
        node: [source for source, end in space.get("binary8").edges if end == node]
        for node in (2, 3, 4, 5)
    }
    nodes = [
        [{"op": "bin_sep_conv_3x3", "source": s} for s in sources if s < 2 or s == node - 1]
        for node, sources in edges.items()
    ]
    cells = [{"name": name, "nodes": nodes, "concat": [2, 3, 4, 5]} for name in ("a", "b")]
    return Genotype(inputs=2, cells=cells, options={"preprocess": "binary"})


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    changes = {
        "seed": seed, "epochs": options.epochs, "init_channels": options.channels, "layers": 4,
        "method": "clean", "train_limit": options.train_limit, "test_limit": options.test_limit,
        "device": "cpu", "threads": 1, "binary": SETTINGS[name],
    }  # fmt: skip
    config = merge(RetrainConfig(), changes, "kernel_loss")
    with tempfile.TemporaryDirectory() as folder:
        _, summary = retrain(config, Path(folder) / "run", genotype=network())
    return {
        "setting": name,
        "seed": seed,
        "epochs": options.epochs,
        "test_images": summary["test"]["n"],
        "test_accuracy": summary["test"]["clean_accuracy"],
        "validation_accuracy": summary["best"]["clean_accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--train-limit", type=int)
    parser.add_argument("--test-limit", type=int)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if options.out.is_file():
        rows = list(csv.DictReader(options.out.read_text().splitlines()))
    made = {(row["setting"], int(row["seed"]), int(row["epochs"])) for row in rows}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for name in SETTINGS:
            if (name, seed, options.epochs) in made:
                continue
            rows.append(train(name, seed, options))
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomic(options.out, text.getvalue())
    for name in SETTINGS:
        found = [100 * float(row["test_accuracy"]) for row in rows if row["setting"] == name]
        error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else float("nan")
        print(f"{name:26} {statistics.mean(found):6.2f} +- {error:.2f} %  ({len(found)} seeds)")


if __name__ == "__main__":
    main()
