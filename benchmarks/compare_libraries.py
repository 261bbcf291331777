"""The same job with other attack libraries and with this one: lines, result, seconds.

    OMP_NUM_THREADS=1 python benchmarks/compare_libraries.py            # on an idle machine
    python benchmarks/compare_libraries.py --check                      # small; writes nothing
    python benchmarks/compare_libraries.py --page                       # docs/comparison.md alone

Each file of benchmarks/comparison is a whole program for a user of one library: its lines are what
is counted. Every round runs each program once in a process of its own, in another order. The clock
starts when torch, the library, the network and the images are loaded, and stops when the program
ends. Results go to benchmarks/results/comparison/libraries.csv, a row for each process, and from
there to docs/comparison.md. Programs whose library is not installed are left out and named.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import csv
import importlib.util
import io
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ROOT / "benchmarks" / "comparison"
RESULTS = ROOT / "benchmarks" / "results" / "comparison" / "libraries.csv"
PAGE = ROOT / "docs" / "comparison.md"

JOBS = {
    "pgd": "PGD-20 in the L-infinity ball, step 0.015, one random start",
    "autoattack": "AutoAttack or what the library offers in its place",
}
# What a result alone does not say.
NOTES = {
    "pgd_fastbandit": "attacks only the images that still stand and checks successes in float32",
    "autoattack_fastbandit": "the preset `standard`: APGD-CE, APGD-T and Square on all images (no "
    "FAB-T), its checks, and the reference on 128 images",
    "autoattack_pyautoattack": "the reference: APGD-CE, APGD-T, FAB-T, Square",
    "autoattack_torchattacks": "four attacks of these names, with 10 steps each where the "
    "reference has 100",
}
FIELDS = ("job", "library", "version", "lines", "round", "images", "clean", "robust", "seconds",
          "processor_seconds", "threads", "machine", "torch")  # fmt: skip


def programs() -> list[Path]:
    """The programs, by job and library; ours first in each job."""
    found = [path for path in PROGRAMS.glob("*_*.py") if path.stem.partition("_")[0] in JOBS]
    return sorted(
        found,
        key=lambda path: (
            list(JOBS).index(path.stem.partition("_")[0]),
            not path.stem.endswith("_fastbandit"),
            path.stem,
        ),
    )


def lines_of(path: Path) -> int:
    """Lines that are not blank."""
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def modules_of(path: Path) -> list[str]:
    """What a program imports."""
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return found


def run_here(path: Path) -> dict[str, float]:
    """Run a program in this process, once everything is loaded; its figures and its time."""
    sys.path.insert(0, str(PROGRAMS))
    import torch

    for name in modules_of(path):
        importlib.import_module(name)
    setting = importlib.import_module("setting")
    loaded = setting.load()
    setting.load = lambda: loaded
    loaded[0](loaded[1])  # the first pass of a process pays for what is planned once
    torch.manual_seed(0)
    printed = io.StringIO()
    started, busy = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(printed):
        runpy.run_path(str(path), run_name="__main__")
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    clean, robust = map(float, printed.getvalue().split()[-2:])
    return {"clean": clean, "robust": robust, "seconds": seconds, "processor_seconds": busy}


def run_there(path: Path, environment: dict[str, str]) -> dict[str, float]:
    """The same in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--program", str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{path.name} ended with {done.returncode}:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(images: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each process, and a line on standard output."""
    import torch

    from fastbandit.info import processor

    chosen = []
    for path in programs():
        library = path.stem.partition("_")[2]
        if importlib.util.find_spec(library) is None:
            print(f"left out, not installed: {library} ({path.stem})")
            continue
        chosen.append(path)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            "COMPARISON_WEIGHTS": str(Path(folder) / "weights.pt"),
            "COMPARISON_IMAGES": str(images),
        }
        for number in range(rounds):
            # Nobody is always first, or always after the same one.
            order = chosen[number % len(chosen) :] + chosen[: number % len(chosen)]
            for path in order if number % 2 == 0 else order[::-1]:
                job, _, library = path.stem.partition("_")
                found = run_there(path, environment)
                rows.append(
                    {
                        "job": job,
                        "library": library,
                        "version": version(library),
                        "lines": lines_of(path),
                        "round": number + 1,
                        "images": images,
                        **found,
                        "threads": torch.get_num_threads(),
                        "machine": f"{os.cpu_count()} cores, {processor()}",
                        "torch": torch.__version__,
                    }
                )
                print(
                    f"round {number + 1} of {rounds}  {path.stem}: robust {found['robust']:.4f}, "
                    f"{found['seconds']:.2f} s ({found['processor_seconds']:.2f} s of processor)",
                    flush=True,
                )
    return rows


def write(rows: Sequence[dict[str, Any]], file: Path = RESULTS) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def page(rows: Sequence[dict[str, str]]) -> str:
    """docs/comparison.md: a table for each job."""
    first = rows[0]
    rounds = max(int(row["round"]) for row in rows)
    text = [
        "# The same job with other libraries",
        "",
        "<!-- made by benchmarks/compare_libraries.py -->",
        "",
        "A network of two convolutions, trained against FGSM on the embedded digits, and the "
        f"first {first['images']} test images, epsilon 0.15. Each program is a file of "
        "[benchmarks/comparison](../benchmarks/comparison), whose lines that are not blank are "
        "counted; the clock runs from when torch, library, network and images are loaded. Medians "
        f"and ranges of {rounds} interleaved rounds, a process each, {first['threads']} thread on "
        f"{first['machine']}, torch {first['torch']}. **Losses are bold**: a rival that is faster, "
        "shorter, or finds more images that fall.",
    ]
    for job, title in JOBS.items():
        found: dict[str, list[dict[str, str]]] = {}
        for row in rows:
            if row["job"] == job:
                found.setdefault(row["library"], []).append(row)
        if "fastbandit" not in found:
            continue
        ours = _medians(found["fastbandit"])
        text += ["", f"## {title}", ""]
        text += ["|  | lines | clean | robust | seconds | seconds of the processor | |"]
        text += ["| --- | --- | --- | --- | --- | --- | --- |"]
        for library, runs in found.items():
            mine, rival = _medians(runs), library != "fastbandit"
            seconds = [float(row["seconds"]) for row in runs]
            cells = [
                f"{library} {runs[0]['version']}",
                _bold(f"{mine['lines']:.0f}", rival and mine["lines"] < ours["lines"]),
                f"{100 * mine['clean']:.1f} %",
                _bold(f"{100 * mine['robust']:.1f} %", rival and mine["robust"] < ours["robust"]),
                _bold(f"{mine['seconds']:.2f}", rival and mine["seconds"] < ours["seconds"])
                + f" ({min(seconds):.2f} to {max(seconds):.2f})",
                f"{mine['processor_seconds']:.2f}",
                NOTES.get(f"{job}_{library}", ""),
            ]
            text.append(f"| {' | '.join(cells)} |")
    text += [
        "",
        "## RobustBench",
        "",
        "RobustBench's `benchmark(model, ...)` (1.1.1) attacks CIFAR-10, CIFAR-100 and ImageNet, "
        "which it loads itself, and takes no images of one's own, so this job cannot be given to "
        "it. What it runs there is AutoAttack `standard`, the program of the row `pyautoattack`. "
        "That is from its source; it was not run here: its files import a module `autoattack`, its "
        "metadata asks for "
        "`pyautoattack`, which has none of that name.",
        "",
    ]
    return "\n".join(text)


def _medians(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    names = ("lines", "clean", "robust", "seconds", "processor_seconds")
    return {name: statistics.median(float(row[name]) for row in rows) for name in names}


def _bold(text: str, loss: bool) -> str:
    return f"**{text}**" if loss else text


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="16 images, one round, no file")
    parser.add_argument("--page", action="store_true", help="write the page from the results alone")
    parser.add_argument("--program", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.program is not None:
        print(json.dumps(run_here(options.program)))
        return 0
    if options.check:
        rows = measure(16, 1)
        return 0 if all(0 <= row["robust"] <= row["clean"] <= 1 for row in rows) else 1
    if not options.page:
        write(measure(options.images, options.rounds))
    PAGE.write_text(page(read()), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
