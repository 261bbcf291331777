"""What the commands that train share: data by use, settings, memory that ran out, the ledger."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbandit._cli import ConfigError
from fastbandit._progress import Progress
from fastbandit.data import DataSource, ImageSet, split, statistics
from fastbandit.distributed import Group, Team
from fastbandit.overfitting import GuardConfig
from fastbandit.run import RunError, RunFolder, derive_seed
from fastbandit.training import Cost, is_out_of_memory

__all__ = [
    "OutOfMemoryError",
    "Pace",
    "Parts",
    "accounting",
    "check_group_device",
    "check_same",
    "divide",
    "finished_before",
    "memory_enough_for",
    "note_changes",
    "pace",
    "resolve_device",
    "sgd",
    "torch_settings",
]


class TrainingConfig(Protocol):
    """The settings that the search and the retraining have in common."""

    @property
    def seed(self) -> int: ...
    @property
    def train_limit(self) -> int | None: ...
    @property
    def test_limit(self) -> int | None: ...
    @property
    def train_portion(self) -> float: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def guard(self) -> GuardConfig: ...


@dataclass(frozen=True)
class Parts:
    """The images of a run by what they are for.

    Every index holds positions in the whole set, so that the stored split names images for good.
    """

    train: ImageSet
    weights: Tensor
    validation: Tensor
    guard: Tensor
    """images of the validation part, some of every class and always the same"""
    test: ImageSet | None
    test_index: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Any]
    """what a run folder stores of it"""


def divide(source: DataSource, config: TrainingConfig) -> Parts:
    """The images of ``source`` by what they are for.

    Raises:
        ConfigError: fewer than two images are left to train on.
    """
    train, test = source.train, source.test
    kept = train.limit_index(config.train_limit or len(train))
    weights, validation = (
        kept[part]
        for part in split(
            train.labels[kept], config.train_portion, derive_seed(config.seed, "split")
        )
    )
    if len(weights) < 2:
        raise ConfigError(
            f"train_portion: expected at least 2 images to train on, got {len(weights)}"
        )
    test_index = None
    if test is not None:
        test_index = test.limit_index(config.test_limit or len(test))
    mean, std = statistics(train.images[weights])
    return Parts(
        train,
        weights,
        validation,
        validation[train.subset(validation).limit_index(config.guard.images)],
        test,
        test_index,
        mean,
        std,
        splits={
            "data": source.name,
            "digest": source.digest,
            "weights": weights.tolist(),
            "validation": validation.tolist(),
            "test": [] if test_index is None else test_index.tolist(),
        },
    )


def sgd(network: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.SGD:
    """The optimiser of all weights."""
    return torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        # One launch for all weights, which also takes the learning rate of a graph from the device.
        # On a CPU it is four times as slow as one operation for all weights at a time.
        fused=device.type == "cuda",
        foreach=device.type != "cuda",
    )


def resolve_device(device: str, deterministic: bool | None) -> tuple[str, bool]:
    """Both settings with what was left open replaced by what it means here.

    Raises:
        ConfigError: it is none, or there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {device} was asked for, but torch sees no CUDA device")
    return device, kind == "cpu" if deterministic is None else deterministic


def check_group_device(device: str, group: Group | None) -> None:
    """Refuse one numbered GPU for several processes.

    Raises:
        ConfigError: ``device`` names one.
    """
    if group is not None and torch.device(device).index is not None:
        raise ConfigError(
            f"device: expected cuda with several processes, each of which takes one GPU; "
            f"got {device}"
        )


def note_changes(progress: Progress, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Say what is different since the run began, where bytes depend on it."""
    for name in ("threads", "torch", "cpu", "device_name", "processes"):
        if then.get(name) != now[name]:
            progress.note(
                f"{name} was {then.get(name)} and is {now[name]} now: "
                "the run goes on, but not to the same bytes"
            )


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
    # Left to itself cuDNN computes float32 convolutions in TF32, with ten bits of mantissa. Who
    # wants that asks for bfloat16; what is called float32 here is float32.
    tf32 = torch.backends.cudnn.allow_tf32
    workspace = "CUBLAS_WORKSPACE_CONFIG"
    sets_workspace = deterministic and workspace not in os.environ
    if sets_workspace:
        os.environ[workspace] = ":4096:8"  # or torch refuses a matrix product on a GPU
    try:
        memory.fill_uninitialized_memory = False
        torch.backends.cudnn.allow_tf32 = False
        if threads:
            torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.allow_tf32 = tf32
        if sets_workspace:
            os.environ.pop(workspace, None)


@dataclass(frozen=True)
class Pace:
    """How long something takes that is done to images: seconds once, and for each image."""

    once: float
    per_image: float

    def of(self, images: int) -> float:
        return self.once + self.per_image * images


def pace(run: Callable[[int], tuple[float, int]], batches: int, *, recorded: bool) -> Pace:
    """The pace of ``run``, which does a number of batches and returns seconds and images.

    Where steps are recorded the first two batches are not like the others: one is computed as
    ever, one recorded. The others are then told by the difference of two longer runs.
    """
    seconds, images = run(batches)
    if not recorded:
        return Pace(0.0, seconds / images)
    again, same = run(batches)
    more, further = run(batches + 10)
    per_image = max(more - again, 0.0) / (further - same) if further > same else again / same
    return Pace(max(seconds - per_image * images, 0.0), per_image)


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


def finished_before(
    folder: RunFolder | None,
    group: Group | None,
    progress: Progress,
    splits: dict[str, Any] | None = None,
) -> tuple[Path, dict[str, Any]] | None:
    """Folder and stored result of a run that is finished, on every process; None if it is not.

    Args:
        folder: None on a process that is not the first.
        splits: the images by use, which have to be those that the run had.

    Raises:
        RunError: the result cannot be read, or the data changed.
    """
    found: dict[str, Any] | None = None
    if folder is not None and folder.finished:
        if splits is not None and (folder.path / "split.json").is_file():
            check_same(folder, "split.json", splits)
        found = {"path": str(folder.path), "result": folder.result()}
        progress.note(
            f"{folder.path}: all is done: the run of this configuration is finished, and this is "
            "its stored result; --force runs it again"
        )
    if group is not None:
        found, _ = group.broadcast(found, {})
    return (Path(found["path"]), found["result"]) if found else None


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
