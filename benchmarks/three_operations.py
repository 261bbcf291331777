"""Do three operations beat random networks of the same size that have no max pooling?

An earlier look at the digits had found networks of identity, dil_conv_5x5 and sep_conv_m_5x5, drawn
uniformly on every edge, five points more robust than random ones, but they were larger and had no
max pooling. Here each has a partner: a random network without max pooling whose parameters are
within 3 % of its own, trained by the same recipe from the same seed and attacked alike, on test
images that took no part in finding the rule (900 to 1,796)::

    python benchmarks/three_operations.py --out FILE.csv --processes 2

An interrupted call goes on: rows of FILE.csv are not trained again. Where all of them are there, it
only computes the figures::

    python benchmarks/three_operations.py --out \
        benchmarks/results/cpu-epyc-zen3-2-cores/three-operations.csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastbandit._files import write_atomic
from fastbandit._statistics import mann_whitney, mean_interval, welch, wilcoxon
from fastbandit.data import DataSource, load
from fastbandit.retrain.loop import retrain
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.processes import Call, Workers
from fastbandit.search.config import AttackConfig, FinalConfig, SearchConfig
from fastbandit.search.networks import retrain_config
from fastbandit.search.sizes import Sizes
from fastbandit.search.tournament import genotype_of

RULE = ("skip_connect", "dil_conv_5x5", "sep_conv_m_5x5")
FIRST_IMAGE = 900
CONFIG = SearchConfig(
    layers=3,
    init_channels=8,
    train_limit=2000,
    threads=1,
    attack=AttackConfig(epsilon="0.1"),
    final=FinalConfig(network_epochs=8, steps=20, step_size=None),
)
COLUMNS = (
    *("arm", "network", "seed", "parameters", "macs"),
    *("clean_accuracy", "robust_accuracy", "n", "attack", "choice"),
)


def rule_choice(number: int) -> list[int]:
    """The three operations, uniformly on every edge."""
    searched = CONFIG.search_space()
    arms = [searched.operations.index(name) for name in RULE]
    generator = torch.Generator().manual_seed(derive_seed(11, "rule", number))
    drawn = torch.randint(3, (searched.rows,), generator=generator)
    return [arms[int(one)] for one in drawn]


def matched_choice(number: int, sizes: Sizes) -> list[int]:
    """A random network without max pooling of the size of :func:`rule_choice`, to 3 %.

    Networks of one size are equally likely: each weighs exp(t size), and t moves the mean size.
    """
    searched = CONFIG.search_space()
    rows = torch.arange(searched.rows)
    table = sizes.parameters.double()
    barred = torch.zeros(searched.arms, dtype=torch.float64)
    barred[searched.operations.index("max_pool_3x3")] = -torch.inf

    def total(choice: torch.Tensor) -> float:
        return float(table[rows, choice].sum()) + sizes.base_parameters

    wanted = total(torch.tensor(rule_choice(number)))
    low, high, law = -200.0, 200.0, table
    for _ in range(80):
        middle = (low + high) / 2
        law = torch.softmax(middle * table / table.max() + barred, 1)
        mean = float((law * table).sum()) + sizes.base_parameters
        low, high = (middle, high) if mean < wanted else (low, middle)
    generator = torch.Generator().manual_seed(derive_seed(11, "matched", number))
    for _ in range(100_000):
        choice = torch.multinomial(law, 1, generator=generator).squeeze(1)
        if abs(total(choice) - wanted) <= 0.03 * wanted:
            return choice.tolist()
    raise SystemExit(f"three_operations: no network within 3 % of {wanted:,.0f} parameters")


def train(
    source: DataSource, arm: str, number: int, seed: int, choice: list[int]
) -> dict[str, Any]:
    """One training; network i of both arms starts from the same seed and meets the same attack."""
    settings = dataclasses.replace(
        retrain_config(CONFIG, "control"), seed=derive_seed(5, number, seed), train_portion=0.75
    )
    with tempfile.TemporaryDirectory() as folder:
        genotype = genotype_of(CONFIG, choice)
        _, found = retrain(settings, Path(folder) / "run", genotype=genotype, source=source)
    test = found["test"]
    return {
        "arm": arm,
        "network": number,
        "seed": seed,
        "parameters": found["parameters"],
        "macs": found["macs"],
        "clean_accuracy": test["clean_accuracy"],
        "robust_accuracy": test["robust_accuracy"],
        "n": test["n"],
        "attack": test["attack"],
        "choice": " ".join(map(str, choice)),
    }


def figures(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What the rows say: of each arm, and of the difference between networks that are partners."""
    robust: dict[str, dict[int, list[float]]] = {"rule": {}, "matched": {}}
    sizes: dict[str, list[int]] = {"rule": [], "matched": []}
    for row in rows:
        sizes[row["arm"]].append(int(row["parameters"]))
        mine = robust[row["arm"]].setdefault(int(row["network"]), [])
        mine.append(100 * float(row["robust_accuracy"]))
    # Of a network, the mean of its trainings; partners in the same place.
    numbers = sorted(robust["rule"].keys() & robust["matched"].keys())
    means = {arm: [statistics.fmean(found[i]) for i in numbers] for arm, found in robust.items()}
    lines = []
    for arm, values in means.items():
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        lines.append(
            f"{arm:<8} {statistics.fmean(values):.2f} +- {spread:.2f} %, "
            f"{statistics.fmean(sizes[arm]):,.0f} parameters"
        )
    if len(numbers) < 2:
        return lines
    rule, matched = means["rule"], means["matched"]
    # Rounded, so that equal differences are ties.
    differences = [round(a - b, 9) for a, b in zip(rule, matched, strict=True)]
    difference, *paired = mean_interval(differences)
    _, *unpaired = welch(rule, matched)
    for name, (low, high), test, p in (
        ("paired", paired, "Wilcoxon", wilcoxon(differences, [0.0] * len(differences))),
        ("unpaired", unpaired, "Mann-Whitney", mann_whitney(rule, matched)),
    ):
        lines.append(
            f"difference {difference:+.2f} [{low:+.2f}, {high:+.2f}] {name}, {test} p = {p:.2g}"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", type=int, default=16, help="networks of each arm")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each network")
    parser.add_argument("--processes", type=int, default=1, help="trainings at a time")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    source = load("digits")
    assert source.test is not None
    kept = torch.arange(FIRST_IMAGE, len(source.test))
    source = dataclasses.replace(source, test=source.test.subset(kept))
    sizes = Sizes.of_search(CONFIG, source)
    rows: list[dict[str, Any]] = []
    if arguments.out.is_file():
        with arguments.out.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    known = {(row["arm"], int(row["network"]), int(row["seed"])) for row in rows}
    calls = []
    for number in range(arguments.networks):
        arms = {"rule": rule_choice(number), "matched": matched_choice(number, sizes)}
        calls += [
            Call(f"{arm} {number}", train, (source, arm, number, seed, choice))
            for arm, choice in arms.items()
            for seed in range(arguments.seeds)
            if (arm, number, seed) not in known
        ]

    def done(position: int, row: dict[str, Any]) -> None:
        rows.append(row)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda r: (r["arm"], int(r["network"]), int(r["seed"]))))
        write_atomic(arguments.out, text.getvalue())
        print(calls[position].name, row["parameters"], row["robust_accuracy"], flush=True)

    with Workers(arguments.processes) as workers:
        workers.run(calls, done)

    print("\n".join(figures(rows)))


if __name__ == "__main__":
    main()
