"""What the commands that train share: process-wide settings, memory that ran out, the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastbandit.distributed import Team
from fastbandit.run import RunError, RunFolder
from fastbandit.training import Cost, is_out_of_memory

__all__ = [
    "OutOfMemoryError",
    "accounting",
    "check_same",
    "memory_enough_for",
    "torch_settings",
]


class OutOfMemoryError(ValueError):
    """There is not enough memory; the message suggests a batch size. The run can go on."""


@contextmanager
def torch_settings(threads: int, deterministic: bool) -> Iterator[None]:
    """The process-wide settings of a run, undone afterwards; 0 threads: as they are."""
    before = torch.get_num_threads()
    was = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    # Deterministic mode would also fill every new buffer, for code that reads what it never wrote.
    # Ours does not, and a run makes tens of thousands of buffers in an epoch.
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    try:
        memory.fill_uninitialized_memory = False
        if threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


@contextmanager
def memory_enough_for(batch_size: int, evaluation_batch_size: int, when: str) -> Iterator[None]:
    """Turn an allocator's error into what can be done about it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no more to be had"
        smaller, evaluated = (
            half - half % 8 if (half := size // 2) >= 16 else half
            for size in (batch_size, evaluation_batch_size)
        )
        hint = (
            f"or start a new run with --batch-size {smaller} --evaluation-batch-size "
            f"{max(evaluated, 1)}, which needs about half"
            if smaller >= 2
            else "or start a new run with fewer --init-channels"
        )
        raise OutOfMemoryError(
            f"out of memory {when} with batches of {batch_size} images to train and "
            f"{evaluation_batch_size} to evaluate ({reason}). The same command "
            f"goes on from the last epoch where there is more memory, also on more "
            f"processes; {hint}"
        ) from error


def check_same(folder: RunFolder, name: str, value: dict[str, Any]) -> None:
    """Store ``value``, or see that what was stored when the run began is the same."""
    if not (folder.path / name).is_file():
        folder.write_json(name, value)
        return
    stored = folder.read_json(name)
    if stored != value:
        changed = (
            [k for k in value if stored.get(k) != value[k]] if isinstance(stored, dict) else []
        )
        raise RunError(
            f"{folder.path / name}: the data changed since the run began "
            f"({', '.join(changed) or 'the file is not a mapping'} differ); "
            "restore the data, or start a new run with another --out"
        )


@contextmanager
def accounting(cost: Cost, team: Team | None) -> Iterator[None]:
    """What the processes compute in this context enters the ledger of each, counted once."""
    names = ("forward_passes", "backward_passes", "images_trained", "images_evaluated")
    before = [getattr(cost, name) for name in names]
    yield
    if team is None:
        return
    added = [getattr(cost, name) - old for name, old in zip(names, before, strict=True)]
    # A batch that is divided is still one batch; its images are counted where they are.
    if not team.leads:
        added[:2] = 0, 0
    total = team.group.sum_(torch.tensor(added, device=team.group.device)).tolist()
    for name, old, more in zip(names, before, total, strict=True):
        setattr(cost, name, old + more)
