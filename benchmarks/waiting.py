"""Images per second of training sampled paths of a search, by how OpenMP's threads wait.

    python benchmarks/waiting.py [--busy 2] [--turns 3]

Each setting has a process of its own, for the runtime reads it once; the settings take turns, so
that what else the machine does falls on all. ``--busy`` starts so many processes beside them that
do nothing but compute. The first path of a process warms up and is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

SETTINGS = {
    "the runtime's own": {},
    "short spin": {"GOMP_SPINCOUNT": "10000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def measure(paths: int, batches: int) -> list[float]:
    """Images per second of each path."""
    from fastbandit.runs.session import Session
    from fastbandit.search import SearchConfig
    from fastbandit.search.loop import SearchRun
    from fastbandit.search.setup import build
    from fastbandit.training import Cost, reset_batchnorm, train_epoch

    config = SearchConfig().resolve()
    setup = build(config)
    running, bandit = SearchRun(setup, Session(config)), config.make_bandit()
    rates = []
    for place in [bandit.sample(ahead=True) for _ in range(paths + 1)]:
        path = running.use_path([place], None)
        reset_batchnorm(path.modules)
        cost = Cost()
        train_epoch(
            setup.supernet,
            setup.weights.first(batches),
            0,
            setup.optimizer,
            config.training_threat(),
            seed=0,
            cost=cost,
            grad_clip=config.grad_clip,
            **path.scope,
        )
        rates.append(cost.images_trained / cost.seconds["train"])
    return rates[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--busy", type=int, default=0)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--paths", type=int, default=3)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.paths, arguments.batches)))
        return
    chosen = {name for setting in SETTINGS.values() for name in setting}
    clean = {name: value for name, value in os.environ.items() if name not in chosen}
    command = [sys.executable, __file__, "--worker"]
    command += ["--paths", str(arguments.paths), "--batches", str(arguments.batches)]
    found: dict[str, list[float]] = {name: [] for name in SETTINGS}
    endless = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(endless) for _ in range(arguments.busy)]
    try:
        for _ in range(arguments.turns):
            for name, setting in SETTINGS.items():
                text = subprocess.check_output(command, env=clean | setting, text=True)
                found[name] += json.loads(text.splitlines()[-1])
    finally:
        for process in busy:
            process.kill()
    result = {
        "cpus": os.cpu_count(),
        "busy": arguments.busy,
        "images_per_second": found,
        "median": {name: statistics.median(rates) for name, rates in found.items()},
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
