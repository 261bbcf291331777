"""Images per second of one training step on two Gloo ranks against one rank, a thread each.

    python benchmarks/two_ranks.py [--space robust9-light] [--batch 128] [--steps 5]

Data-parallel: both ranks compute halves of the same batch. The two arrangements are measured in
turn, so that what else the machine does falls on both; the ratio is that of the medians. On a
machine that does other work two processes get more of it than one, so that wall-clock time flatters
them: ``--cpu-time`` takes the processor's time of rank 0, which leaves out waiting for the other.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from fastbandit.distributed import Group, Team
from fastbandit.nn.supernet import Supernet
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, train_epoch


class SameBatch:
    """The same random batch, so many times."""

    def __init__(self, batch: int, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(batch, 3, 32, 32, generator=generator)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.labels = torch.randint(0, 10, (batch,), generator=generator)
        self.count = count

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for _ in range(self.count):
            yield self.images, self.labels, torch.arange(len(self.labels))


def measure(space: str, batch: int, steps: int, cpu_time: bool, group: Group | None) -> list[float]:
    """Seconds of each step."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Supernet(space, in_channels=3, classes=10, channels=16)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    order = torch.randperm(model.rows, generator=torch.Generator().manual_seed(1))
    model.set_path([int(place) % model.arms for place in order])
    modules, parameters = list(model.path_modules()), list(model.path_parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, foreach=True)
    team = None if group is None else Team(group, 1)
    if team is not None:
        optimizer.param_groups[0]["params"] = team.use([parameters])
    threat = ThreatModel(epsilon="8/255", steps=1, bn_mode="train")
    clock = time.process_time if cpu_time else time.perf_counter
    seconds = []
    for _ in range(steps + 1):
        if group is not None:
            group.barrier()
        started = clock()
        train_epoch(
            model,
            SameBatch(batch, 1),
            0,
            optimizer,
            threat,
            seed=0,
            cost=Cost(),
            grad_clip=5.0,
            modules=modules,
            parameters=parameters,
            team=team,
        )
        seconds.append(clock() - started)
    return seconds[1:]


def run(arguments: argparse.Namespace, ranks: int) -> list[float]:
    """Seconds of each step on so many ranks, in processes of their own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--worker", "--space", arguments.space]
    command += ["--batch", str(arguments.batch), "--steps", str(arguments.steps)]
    command += ["--cpu-time"] if arguments.cpu_time else []
    workers = []
    for rank in range(ranks):
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        workers.append(subprocess.Popen(command, env=environment, stdout=pipe, text=True))
    text, _ = workers[0].communicate()
    for worker in workers:
        if worker.wait():
            raise SystemExit("a worker failed; its message is above")
    seconds: list[float] = json.loads(text.splitlines()[-1])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="robust9-light")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        task = (arguments.space, arguments.batch, arguments.steps, arguments.cpu_time)
        if os.environ["WORLD_SIZE"] == "1":
            print(json.dumps(measure(*task, None)))
            return
        with Group.join("cpu", timeout=600) as group:
            print(json.dumps(measure(*task, group)))
        return
    found: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(arguments.turns):
        for ranks, seconds in found.items():
            seconds += run(arguments, ranks)
    median = {ranks: statistics.median(seconds) for ranks, seconds in found.items()}
    result = {
        "space": arguments.space,
        "batch": arguments.batch,
        "clock": "processor time of rank 0" if arguments.cpu_time else "wall clock",
        "seconds": {str(ranks): seconds for ranks, seconds in found.items()},
        "images_per_second": {
            str(ranks): arguments.batch / seconds for ranks, seconds in median.items()
        },
        "ratio": median[1] / median[2],
        "torch": torch.__version__,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
