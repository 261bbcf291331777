"""How good the operations are that Algorithm 9 keeps, in a simulation: no network is trained.

28 edges of 8 operations. The child's accuracy is 0.5 plus the sum of the effects of its operations,
of deviation 0.01; that of the parent has effects that correlate with these by 0.7; both have noise
of deviation 0.01. Writes, for each rule and search, how far the operations that are left lie above
the average of all, in deviations of the effect (the best of eight: 1.42)::

    python benchmarks/child_parent.py --out benchmarks/results/child-parent/simulation.csv

The numbers are the same on every machine.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from fastbandit._files import write_atomic
from fastbandit.childparent import ChildParent

EDGES, OPERATIONS, CORRELATION, DEVIATION = 28, 8, 0.7, 0.01

RULES: dict[str, dict[str, Any]] = {
    "printed, beta 0": {"beta": 0.0},
    "printed, beta 0.5": {"beta": 0.5},
    "printed, beta 1": {"beta": 1.0},
    "printed, beta 2": {"beta": 2.0},
    "penalty, beta 0.5": {"beta": 0.5, "gap": "penalty"},
    "penalty, beta 1": {"beta": 1.0, "gap": "penalty"},
    "printed, beta 0, T = 1": {"beta": 0.0, "rounds": 1},
    "carry, beta 0": {"beta": 0.0, "carry": True},
    "carry, beta 0.5": {"beta": 0.5, "carry": True},
}


def simulate(seed: int, **settings: Any) -> float:
    """Mean effect, in deviations, of the operations that one search keeps."""
    draws = torch.Generator().manual_seed(1000 + seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    child = normal(EDGES, OPERATIONS)
    parent = CORRELATION * child + math.sqrt(1 - CORRELATION**2) * normal(EDGES, OPERATIONS)
    bandit = ChildParent(EDGES, OPERATIONS, seed=seed, **settings)
    noise = normal(bandit.total_samples, 2)
    rows = torch.arange(EDGES)
    while not bandit.finished:
        choice = bandit.sample()
        sums = torch.stack([child[rows, choice].sum(), parent[rows, choice].sum()])
        bandit.credit(choice, *(0.5 + DEVIATION * (sums + noise[bandit.samples])).tolist())
        if bandit.due:
            bandit.prune()
    return float(child[rows, bandit.final()].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the CSV file")
    parser.add_argument("--searches", type=int, default=150, help="of each rule")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rule", "seed", "survivors"])
    for rule, settings in RULES.items():
        found = [simulate(seed, **settings) for seed in range(options.searches)]
        writer.writerows([rule, seed, f"{one:.6f}"] for seed, one in enumerate(found))
        error = statistics.stdev(found) / math.sqrt(len(found))
        print(f"{rule:<24} {statistics.mean(found):.3f} +- {error:.3f}", flush=True)
    write_atomic(options.out, text.getvalue())


if __name__ == "__main__":
    main()
