"""What the processes of test_distributed.py run: ``python _ranks.py checks|search ...``."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from _tiny import TINY, small_space, tiny
from safetensors.torch import save_file

from fastbandit.config import merge
from fastbandit.data import Loader
from fastbandit.distributed import Group, Team, synchronise_batchnorm
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.search import SearchConfig, main, search
from fastbandit.search import result as ending
from fastbandit.search import run as running
from fastbandit.search.loop import SearchRun

# 24 images to train on: batches of 21 and of 3, which is too few for two processes.
CONFIG = {
    **TINY,
    "test_limit": 33,
    "batch_size": 21,
    "evaluation_batch_size": 21,
    "final": {**TINY["final"], "steps": 1},
}


def configure(**changes) -> SearchConfig:
    return merge(tiny(**CONFIG), changes, "test")


class StopError(Exception):
    pass


def first_epochs(config, out, epochs, group=None) -> SearchRun:
    """A search in float64 that stops after so many epochs.

    In float32 these tiny networks have channels whose variance is next to nothing, and batch norm
    makes whole numbers of their rounding errors.
    """
    original, found = SearchRun.epoch, []
    build, batches = running.build, Loader.epoch

    def build_double(*arguments):
        setup = build(*arguments)
        setup.supernet.double()
        return setup

    def batches_double(self, number):
        return ((x.double(), y, ids) for x, y, ids in batches(self, number))

    def epoch(self):
        if self.bandit.trained >= epochs:
            found.append(self)
            raise StopError
        return original(self)

    SearchRun.epoch, running.build, Loader.epoch = epoch, build_double, batches_double
    try:
        search(config, out, group=group)
    except StopError:
        return found[0]
    finally:
        SearchRun.epoch, running.build, Loader.epoch = original, build, batches
    raise AssertionError("the search ended before")


def batchnorm_case(synchronise=None, part=slice(None)) -> dict[str, torch.Tensor]:
    """Outputs, gradients and statistics of a batch norm on a part of fixed numbers."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(7, 5, 3, 2, generator=generator) + 10).requires_grad_()
    factor = torch.randn(7, 5, 3, 2, generator=generator)
    layer = BatchNorm2d(5, momentum=None)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(5, generator=generator))
    if synchronise is not None:
        synchronise(layer)
    y = layer(x[part])
    (y * factor[part]).sum().backward()
    layer(2 * x.detach()[part])
    return {
        "y": y.detach(),
        "x_grad": x.grad[part],
        "weight_grad": layer.weight.grad,
        "bias_grad": layer.bias.grad,
        "mean": layer.running_mean,
        "var": layer.running_var,
    }


def checks(folder: Path) -> None:
    with Group.join("cpu", timeout=120) as group:
        rank = group.rank
        part = Team(group, 1).part(7)
        found = batchnorm_case(lambda layer: synchronise_batchnorm(layer, group), part)
        save_file(
            {k: v.contiguous() for k, v in found.items()}, folder / f"batchnorm{rank}.safetensors"
        )

        # Path 0 uses a and b, path 1 uses b and c.
        a, b, c = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
        team = Team(group, 2)
        assert team.use([[a, b], [b, c]]) == [a, b, c]
        (a if rank == 0 else c).grad = torch.full((2, 3), 1.0 + rank)
        b.grad = torch.full((2, 3), 10.0 + 10 * rank)
        team.combine()
        save_file({"a": a.grad, "b": b.grad, "c": c.grad}, folder / f"mean{rank}.safetensors")

        state = first_epochs(configure(sync_batchnorm=True), folder / "data", 3, group)
        save_file(dict(state.supernet.state_dict()), folder / f"data{rank}.safetensors")

        current = []
        original = ending.finish

        def finish(run, *rest):
            current.append(run)
            return original(run, *rest)

        ending.finish = finish
        config = configure(parallel="paths", bandit={"evaluations_per_epoch": 1})
        search(config, folder / "paths", group=group)

        ends = {"tune_epochs": 1, "network_epochs": 1}
        _, summary = search(configure(final=ends), folder / "networks", group=group)
        (folder / f"networks{rank}.json").write_text(json.dumps(summary))
        tensors, state = current[0].state()
        kept = {k: v for k, v in tensors.items() if "running" not in k and "tracked" not in k}
        save_file(kept, folder / f"paths{rank}.safetensors")
        within = threads_of_the_group()
    # A thread that was joined stays in /proc for a moment; one that the group is kept alive by
    # stays for good.
    deadline = time.monotonic() + 5
    while threads_of_the_group() and time.monotonic() < deadline:
        time.sleep(0.01)
    after = threads_of_the_group()
    (folder / f"threads{rank}.json").write_text(json.dumps([within, after]))


def threads_of_the_group() -> list[str]:
    """Those of this process that belong to the backend of a process group; [] without /proc."""
    names = (path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm"))
    return sorted(name for name in names if "gloo" in name)


def run_search(arguments: list[str]) -> int:
    """The command; with DIE_AT the last process kills itself at the end of that epoch."""
    original = SearchRun.epoch

    def epoch(self):
        if self.group.rank and self.bandit.trained >= int(os.environ["DIE_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    if "DIE_AT" in os.environ:
        SearchRun.epoch = epoch
    return main(arguments)


if __name__ == "__main__":
    small_space()
    if sys.argv[1] == "checks":
        checks(Path(sys.argv[2]))
    else:
        raise SystemExit(run_search(sys.argv[2:]))
