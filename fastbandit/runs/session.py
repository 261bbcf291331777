"""One run: where it writes, with whom, how it begins and how it goes on."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastbandit._files import json_value
from fastbandit.callbacks.base import Callback, RunInfo
from fastbandit.config import ConfigError, to_plain
from fastbandit.distributed import Group
from fastbandit.runs.environment import derive_seed, environment, run_id
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.progress import Progress
from fastbandit.runs.tensors import RunError
from fastbandit.training import is_out_of_memory

__all__ = [
    "OutOfMemoryError",
    "Resumable",
    "Session",
    "check_group_device",
    "oom_hint",
    "resolve_device",
    "torch_settings",
]


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


class OutOfMemoryError(ValueError):
    """There is not enough memory; the message suggests a batch size. The run can go on."""


def _use_deterministic_algorithms(mode: bool, *, warn_only: bool = False) -> None:
    """torch's function of this name, which loads torch's compiler only to tell it; that takes a
    second, and most runs have no use for it."""
    if "torch._inductor.config" in sys.modules:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode((1 if warn_only else 2) if mode else 0)


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
    variables = {}
    if deterministic:
        # Without the first torch refuses a matrix product on a GPU; its compiler, where something
        # loads that later, reads the second.
        variables = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}
    variables = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(variables)
    try:
        memory.fill_uninitialized_memory = False
        torch.backends.cudnn.allow_tf32 = False
        if threads:
            torch.set_num_threads(threads)
        _use_deterministic_algorithms(deterministic)
        yield
    finally:
        torch.set_num_threads(before)
        _use_deterministic_algorithms(was, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill
        torch.backends.cudnn.allow_tf32 = tf32
        for name in variables:
            os.environ.pop(name, None)


@contextmanager
def oom_hint(batch_size: int, evaluation_batch_size: int, when: str) -> Iterator[None]:
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


class Resumable(Protocol):
    """What a session saves and goes on with."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that :meth:`restore` needs."""

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from a state."""


class Session:
    """A run of one configuration, on one process or several.

    Every process of the run has one. Only that of the first has a folder and shows progress.

    Attributes:
        config: the resolved configuration.
        path: the run folder; of other processes it is known once :meth:`resume` has returned.
        folder: where files go; None on a process that writes none, and without a run folder.
        group: all processes of the run; None where there is one.
        progress: where progress is shown.

    Args:
        callbacks: are told of the run, in the first process alone.
    """

    def __init__(
        self, config: Any, *, group: Group | None = None, callbacks: Sequence[Callback] = ()
    ) -> None:
        self.config, self.group = config, group
        self._callbacks = tuple(callbacks) if self.is_main else ()
        self._told: RunInfo | None = None
        self._epochs: list[dict[str, Any]] = []
        self.path = Path()
        self.folder: RunFolder | None = None
        self.progress = Progress.silent()
        self._started = time.perf_counter()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.group is None or self.group.rank == 0

    @property
    def processes(self) -> int:
        return 1 if self.group is None else self.group.size

    @property
    def run_id(self) -> str:
        """Names the configuration."""
        return run_id(to_plain(self.config))

    @contextmanager
    def open(
        self,
        files: RunFiles,
        out: str | Path | None,
        *,
        root: str | Path,
        name: str,
        force: bool,
        progress: Progress | None,
        identity: Mapping[str, Any] | None = None,
    ) -> Iterator[None]:
        """Within the context the run folder is this run's alone.

        Args:
            files: what the command writes.
            out: the folder; None: that of an unfinished run of the same configuration below
                ``root``, else a new one there, named after ``name``.
            force: replace what a finished or a different run left there.
            progress: where progress is shown; None shows none.
            identity: what decides whose folder it is, beside the configuration.

        Raises:
            RunError: the folder holds something else, or another process writes it.
        """
        if not self.is_main:
            yield
            return
        self.progress = progress or Progress.silent()
        # As YAML gives it back: lists where the configuration has tuples.
        plain = json_value({**to_plain(self.config), **(identity or {})})
        path = None if out is None else Path(out)
        path = path or RunFolder.find_unfinished(Path(root), plain, files.result)
        self.path = path or RunFolder.fresh_path(Path(root), name)
        with RunFolder.open(self.path, plain, force=force, files=files) as folder:
            self.folder = folder
            try:
                yield
            except BaseException as error:
                self._tell_error(error)
                raise

    def finished(self, splits: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """The stored result of a run that is finished, on every process; None if it is not.

        Args:
            splits: the images by use, which have to be those that the run had.

        Raises:
            RunError: the result cannot be read, or the data changed.
        """
        stored: dict[str, Any] | None = None
        folder = self.folder
        if folder is not None and (result := folder.stored(folder.config)) is not None:
            if splits is not None and (folder.path / "split.json").is_file():
                self._check_same("split.json", splits)
            stored = {"path": str(folder.path), "result": result}
            self.progress.note(
                f"{folder.path}: all is done: the run of this configuration is finished, and this "
                "is its stored result; --force runs it again"
            )
        stored = self.broadcast(stored)
        if stored is None:
            return None
        self.path = Path(stored["path"])
        return dict(stored["result"])

    def resume(
        self,
        job: Resumable,
        *,
        device: torch.device,
        splits: dict[str, Any],
        begin: Callable[[RunFolder, float], None],
    ) -> bool:
        """Go on from the last checkpoint, on every process; without one, begin.

        Args:
            job: gets the state.
            splits: the images by use: stored, and compared when the run goes on.
            begin: is called with the folder and the seconds that the run took so far where there
                is no checkpoint, before the first one is written.

        Returns:
            Whether there was a checkpoint; always False on a process that is not the first.

        Raises:
            CheckpointError: it is damaged or does not fit.
            RunError: the data changed since the run began, or differ between processes.
        """
        folder, resumed = self.folder, False
        if folder is not None:
            resumed = folder.load_checkpoint(job.restore)
            self._check_same("split.json", splits)
            now = environment(device)
            if folder.files.command:
                now = {"command": folder.files.command, **now}
            now["processes"] = self.processes
            if resumed:
                self._note_changes(folder.read_json("env.json"), now)
            else:
                folder.write_json("env.json", now)
                begin(folder, time.perf_counter() - self._started)
                self.save(job)
        if self.group is not None:
            digest = derive_seed(0, json.dumps(splits))
            self.group.check_same("the data", torch.tensor(digest))
            self.share(job)
        if folder is not None and self._callbacks:
            log = folder.path / "metrics.jsonl"
            done = log.read_bytes().count(b"\n") if resumed and log.is_file() else 0
            config = json_value(to_plain(self.config))
            self._told = RunInfo(folder.files.command, folder.path, self.run_id, config, done)
            for one in self._callbacks:
                one.on_start(self._told)
        return resumed

    def _tell_error(self, error: BaseException) -> None:
        """Tell all callbacks, whatever one of them raises: the user has to see ``error``."""
        told, self._told = self._told, None
        if told is None:
            return
        for one in self._callbacks:
            try:
                one.on_error(told, error)
            except Exception as failed:
                self.progress.note(f"{type(one).__name__}.on_error: {failed}")

    def share(self, job: Resumable) -> None:
        """Give every process the first one's state and the folder's path."""
        assert self.group is not None
        tensors, state = job.state()
        shared, tensors = self.group.broadcast({"path": str(self.path), "state": state}, tensors)
        if self.group.rank:
            job.restore(tensors, shared["state"])
        self.path = Path(shared["path"])

    def append(self, name: str, *values: dict[str, Any]) -> None:
        """Add lines to a log; see :meth:`RunFolder.append`."""
        if self.folder is not None:
            self.folder.append(name, *values)
            if name == "metrics.jsonl" and self._callbacks:
                self._epochs += values

    def save(self, job: Resumable) -> None:
        """Write a checkpoint, and tell of the epochs that it holds."""
        if self.folder is not None:
            self.folder.save_checkpoint(*job.state())
        epochs, self._epochs = self._epochs, []
        for metrics in epochs:
            for one in self._callbacks:
                assert self._told is not None
                # A copy: nothing that one does with it is seen by the next.
                one.on_epoch(self._told, dict(metrics))

    def finish(self, summary: dict[str, Any] | None) -> dict[str, Any]:
        """Write the result, which makes the run finished; returns it on every process.

        Args:
            summary: the result; None on a process that writes no files.
        """
        if self.folder is not None and summary is not None:
            self.folder.write_json(self.folder.files.result, summary)
            if self._told is not None:
                for one in self._callbacks:
                    one.on_end(self._told, dict(summary))
        result: dict[str, Any] = self.broadcast(summary)
        return result

    def broadcast(self, value: Any) -> Any:
        """The value of the first process, on every process."""
        if self.group is not None:
            value, _ = self.group.broadcast(value, {})
        return value

    def oom_hint(self, when: str) -> Any:
        """Turn an allocator's error within the context into what can be done about it."""
        return oom_hint(self.config.batch_size, self.config.evaluation_batch_size, when)

    def _check_same(self, name: str, value: dict[str, Any]) -> None:
        """Store ``value``, or see that what was stored when the run began is the same."""
        folder = self.folder
        assert folder is not None
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

    def _note_changes(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        """Say what is different since the run began, where bytes depend on it."""
        for name in ("threads", "torch", "cpu", "device_name", "processes"):
            if then.get(name) != now[name]:
                self.progress.note(
                    f"{name} was {then.get(name)} and is {now[name]} now: "
                    "the run goes on, but not to the same bytes"
                )
