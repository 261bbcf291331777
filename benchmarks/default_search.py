"""A whole search of the digits with and without kernels, over seeds: processor time, accuracies.

    python benchmarks/default_search.py --runs runs/default --seeds 0 1 2 3 4 --out FILE

Each search is a process of its own with one thread, so that several can run side by side
(``--at-once``) and that what else the machine does changes no result; time is therefore the
processor's, not the clock's. A search that is finished in the folder is read, not run again, and
one that was stopped goes on; its time is then that of all its processes. Searches of several
commits or configurations are refused.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml

from fastbandit._files import write_atomic

BACKENDS = ("native", "reference")
# The search alone, as printed, without what follows the last pruning.
SETTINGS = ["--preset", "digits-full", "--threads", "1", "--final.tune-epochs", "0"]
SETTINGS += ["--final.network-epochs", "0"]
# Two-sided 95 % quantiles of Student's t for n - 1 degrees of freedom, n = 2 to 10.
STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def run(folder: Path, backend: str, seed: int, options: list[str]) -> None:
    """The search of one seed, to its end; its processor time goes to a file beside the folder."""
    summary, clock = folder / "summary.json", folder.with_suffix(".seconds")
    if summary.exists() and clock.exists():
        return
    before = float(clock.read_text().split()[0]) if clock.exists() else 0.0
    command = [sys.executable, "-m", "fastbandit.search"]
    command += ["--resume", str(folder)] if folder.exists() else ["--out", str(folder)]
    command += [] if folder.exists() else ["--seed", str(seed), *SETTINGS, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("FASTBANDIT_BACKEND", None)
    if backend == "reference":
        environment["FASTBANDIT_BACKEND"] = "reference"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    write_atomic(clock, f"{before + usage.ru_utime + usage.ru_stime:.2f} {commit()}\n")
    if process.returncode:
        raise SystemExit(f"{folder} ended with {process.returncode}; see {log.name}")
    print(f"{backend} {seed}: {clock.read_text().split()[0]} s", flush=True)


def commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def read(folder: Path, seed: int) -> dict[str, Any]:
    summary = json.loads((folder / "summary.json").read_text())
    seconds, made_by = folder.with_suffix(".seconds").read_text().split()
    kept = {key: summary[key] for key in ("final", "test", "genotype_hash", "versions")}
    return {"seed": seed, "commit": made_by, "processor_seconds": float(seconds)} | kept


def check_same(rows: list[dict[str, Any]], folders: list[Path]) -> None:
    """All searches are those of one commit and, but for the seed, of one configuration."""
    configs = []
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        del config["seed"]
        configs.append(config)
    for folder, row, config in zip(folders, rows, configs, strict=True):
        if row["commit"] != rows[0]["commit"] or config != configs[0]:
            raise SystemExit(
                f"{folder}: expected the commit ({rows[0]['commit']}) and the configuration of "
                f"{folders[0]}, got another ({row['commit']})"
            )


def interval(values: list[float]) -> dict[str, float]:
    """Mean and its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    if not 1 < len(values) <= len(STUDENT_T) + 1:
        return {"mean": mean}
    half = STUDENT_T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder of the run folders")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--at-once", type=int, default=1, help="searches side by side")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("options", nargs="*", help="of the search, after --")
    arguments = parser.parse_args()
    tasks = [
        (arguments.runs / f"{backend}-{seed}", backend, seed)
        for seed in arguments.seeds
        for backend in BACKENDS
    ]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        list(pool.map(lambda task: run(*task, arguments.options), tasks))
    rows: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
    for folder, backend, seed in tasks:
        rows[backend].append(read(folder, seed))
    in_order = [rows[backend][at // len(BACKENDS)] for at, (_, backend, _) in enumerate(tasks)]
    check_same(in_order, [folder for folder, *_ in tasks])
    result: dict[str, Any] = {
        "command": " ".join(
            ["python -m fastbandit.search --seed SEED", *SETTINGS, *arguments.options]
        ),
        "torch": torch.__version__,
        "runs": rows,
        "ratio_of_median_seconds": statistics.median(
            row["processor_seconds"] for row in rows["reference"]
        )
        / statistics.median(row["processor_seconds"] for row in rows["native"]),
    }
    for key in ("clean_accuracy", "robust_accuracy"):
        values = {name: [row["test"][key] for row in found] for name, found in rows.items()}
        pairs = [a - b for a, b in zip(values["native"], values["reference"], strict=True)]
        result[key] = {name: interval(value) for name, value in values.items()}
        result[key]["native less reference"] = interval(pairs)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.out is not None:
        write_atomic(arguments.out, text + "\n")


if __name__ == "__main__":
    main()
