"""The ledger of a run: what it costs, and what it will cost."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbandit.distributed import Group, Team
from fastbandit.runs.tensors import save_tensors
from fastbandit.training import Cost

__all__ = [
    "COUNTS",
    "EpochTimer",
    "Throughput",
    "accounting",
    "cost_summary",
    "measure_throughput",
    "phase",
    "seconds_to_save",
]


#: What a ledger counts, beside seconds.
COUNTS = ("forward_passes", "backward_passes", "images_trained", "images_evaluated")


@dataclass(frozen=True)
class Throughput:
    """How long something takes that is done to images: seconds once, and for each image."""

    once: float
    per_image: float

    def of(self, images: int) -> float:
        return self.once + self.per_image * images


def measure_throughput(
    run: Callable[[int], tuple[float, int]], batches: int, *, recorded: bool
) -> Throughput:
    """The throughput of ``run``, which does a number of batches and returns seconds and images.

    Where steps are recorded the first two batches are not like the others: one is computed as
    ever, one recorded. The others are then told by the difference of two longer runs.
    """
    seconds, images = run(batches)
    if not recorded:
        return Throughput(0.0, seconds / images)
    again, same = run(batches)
    more, further = run(batches + 10)
    per_image = max(more - again, 0.0) / (further - same) if further > same else again / same
    return Throughput(max(seconds - per_image * images, 0.0), per_image)


@contextmanager
def accounting(cost: Cost, team: Team | None) -> Iterator[None]:
    """What the processes compute in this context enters the ledger of each, counted once."""
    before = [getattr(cost, name) for name in COUNTS]
    yield
    if team is None:
        return
    added = [getattr(cost, name) - old for name, old in zip(COUNTS, before, strict=True)]
    # A batch that is divided is still one batch; its images are counted where they are.
    if not team.leads:
        added[:2] = 0, 0
    total = team.group.sum_(torch.tensor(added, device=team.group.device)).tolist()
    for name, old, more in zip(COUNTS, before, total, strict=True):
        setattr(cost, name, old + more)


class EpochTimer:
    """Seconds since it was made; what no phase of the ledger has counted goes to ``other``."""

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._started, self._accounted = time.perf_counter(), sum(cost.seconds.values())

    def stop(self) -> float:
        """End it; returns the seconds."""
        seconds = time.perf_counter() - self._started
        accounted = sum(self._cost.seconds.values()) - self._accounted
        self._cost.add_seconds("other", seconds - accounted)
        return seconds


@contextmanager
def phase(cost: Cost, name: str) -> Iterator[None]:
    """Seconds of evaluation within the context count for a phase of this name."""
    before = cost.seconds.get("validate", 0.0)
    yield
    cost.add_seconds(name, cost.seconds["validate"] - before)
    cost.seconds["validate"] = before


def cost_summary(
    cost: Cost, peak_memory_mb: float, device: str, group: Group | None, **more: Any
) -> dict[str, Any]:
    """The section ``cost`` of a summary.

    Args:
        more: what the command adds, first.
    """
    return {
        **more,
        "seconds_total": sum(cost.seconds.values()),
        **{f"seconds_{name}": value for name, value in cost.seconds.items()},
        "images_per_second": cost.images_trained / cost.seconds["train"],
        "images_trained": cost.images_trained,
        "images_evaluated": cost.images_evaluated,
        "forward_passes": cost.forward_passes,
        "backward_passes": cost.backward_passes,
        "peak_memory_mb": peak_memory_mb,
        "device": device,
        "threads": torch.get_num_threads(),
        "processes": 1 if group is None else group.size,
    }


def seconds_to_save(state: tuple[dict[str, Tensor], dict[str, Any]]) -> float:
    """Seconds that a checkpoint takes, in a folder that is gone afterwards."""
    tensors, plain = state
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        save_tensors(Path(folder) / "checkpoint", tensors, "checkpoint", {"state": plain})
        return time.perf_counter() - started
