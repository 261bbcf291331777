"""The run folder: what a run writes, and how it goes on after any interruption.

A run's state is one checkpoint file, replaced atomically after every epoch, and a few logs that
only grow. The checkpoint remembers how long each log was when it was written; resuming cuts the
logs back to that length, so whatever a killed process wrote after its last checkpoint is gone and
is written again, byte for byte.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import platform
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from fastbandit._files import FileError, read_json, write_atomic
from fastbandit._version import __version__

__all__ = [
    "CheckpointError",
    "RunError",
    "RunFolder",
    "canonical_json",
    "derive_seed",
    "environment",
    "load_tensors",
    "peak_memory_mb",
    "run_id",
    "save_tensors",
]

# One key for everything: the order of several keys in a safetensors header is not fixed, and two
# runs of the same seed must give the same bytes.
_METADATA_KEY = "fastbandit"


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why and what to do."""


class CheckpointError(RunError):
    """A tensor file that is damaged, or is not one of ours."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def run_id(config: dict[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the resolved configuration."""
    return hashlib.sha256(canonical_json(config).encode()).hexdigest()[:12]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) of its own for each purpose, from the run's one seed."""
    text = canonical_json([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of torch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0.0  # unknown
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, processor, threads, backends."""
    from fastbandit import _native

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "fastbandit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(terse=True),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "kernels": _native.status(),
    }


# --- tensor files ---------------------------------------------------------------------------


def _digest(tensors: dict[str, Tensor]) -> int:
    """CRC-32 over names and bytes: safetensors itself does not notice a flipped bit."""
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


def save_tensors(
    path: Path, tensors: dict[str, Tensor], kind: str, metadata: dict[str, Any]
) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"kind": kind, "version": 1, "crc32": _digest(cpu), **metadata}
    write_atomic(path, save(cpu, metadata={_METADATA_KEY: canonical_json(header)}))


def load_tensors(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that :func:`save_tensors` wrote.

    Raises:
        CheckpointError: not a safetensors file, not ours, of another kind or version, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = (file.metadata() or {}).get(_METADATA_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from None
    if header is None:
        raise CheckpointError(f"{path}: a safetensors file, but not one that fastbandit wrote")
    try:
        metadata = json.loads(header)
        found = (metadata["kind"], metadata["version"])
        crc = metadata["crc32"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged: its metadata cannot be read") from None
    if found != (kind, 1):
        raise CheckpointError(
            f"{path}: expected a {kind} of version 1, got {found[0]!r} of version {found[1]!r}"
        )
    if crc != _digest(tensors):
        raise CheckpointError(f"{path}: damaged: the checksum of its tensors does not match")
    return tensors, metadata


# --- run folders ----------------------------------------------------------------------------


class RunFolder:
    """One run's files. Holds a lock while open, so that two processes never write one run.

    Use :meth:`open` to get one; use it as a context manager.
    """

    LOGS = ("metrics.jsonl", "bandit.jsonl", "genotypes.jsonl")

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: Any = None

    # The configuration that decides whether a folder belongs to a run.

    @staticmethod
    def read_config(path: Path) -> dict[str, Any]:
        """The resolved configuration stored in the folder.

        Raises:
            RunError: no configuration there, or one that cannot be read.
        """
        file = path / "config.yaml"
        try:
            value = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise RunError(f"{path}: not a run folder: config.yaml: {reason}") from None
        if not isinstance(value, dict):
            raise RunError(f"{file}: expected a mapping, got {type(value).__name__}")
        return value

    @staticmethod
    def find_unfinished(root: Path, config: dict[str, Any]) -> Path | None:
        """The newest folder below ``root`` that holds an unfinished run of this configuration."""
        if not root.is_dir():
            return None
        for path in sorted(root.iterdir(), reverse=True):
            if (path / "config.yaml").is_file() and not (path / "summary.json").is_file():
                with contextlib.suppress(RunError):
                    if RunFolder.read_config(path) == config:
                        return path
        return None

    @staticmethod
    def fresh_path(root: Path, name: str) -> Path:
        """A path below ``root`` that does not exist: ``<date>-<name>``, numbered if taken."""
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
        date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
        path, number = root / f"{date}-{safe}", 1
        while path.exists():
            number += 1
            path = root / f"{date}-{safe}-{number}"
        return path

    @classmethod
    def open(cls, path: Path, config: dict[str, Any], *, force: bool = False) -> RunFolder:
        """Create the folder, or open it to go on with the same run.

        Args:
            config: resolved configuration, plain values; what is stored must equal it.
            force: throw away what a finished or a different run left there.

        Raises:
            RunError: the folder holds something else, a finished run or a run of another
                configuration, or another process is writing it. Nothing is changed then.
        """
        if path.exists() and not path.is_dir():
            raise RunError(f"{path}: expected a folder, got a file")
        # Dot files are ours too (the lock, remains of an interrupted write) or nobody's business.
        holds_files = path.is_dir() and any(not f.name.startswith(".") for f in path.iterdir())
        if holds_files and not (path / "config.yaml").is_file():
            raise RunError(
                f"{path}: holds files but no config.yaml, so it is not a run folder; "
                "choose another --out"
            )
        path.mkdir(parents=True, exist_ok=True)
        folder = cls(path)
        folder._acquire()
        try:
            folder._prepare(config, force)
        except BaseException:
            folder.close()
            raise
        return folder

    def _prepare(self, config: dict[str, Any], force: bool) -> None:
        path = self.path
        for stray in [*path.glob(".*.tmp"), *path.glob("checkpoints/.*.tmp")]:
            stray.unlink(missing_ok=True)
        if (path / "config.yaml").is_file():
            stored = None
            try:
                stored = self.read_config(path)
            except RunError:
                if not force:
                    raise
            if stored != config and not force:
                raise RunError(
                    f"{path}: holds a run of another configuration "
                    f"({_difference(stored or {}, config)}); choose another --out, "
                    "or pass --force to replace it"
                )
            if self.finished and not force:
                raise RunError(
                    f"{path}: holds a finished run of this configuration; "
                    "choose another --out, or pass --force to run it again"
                )
            if force and (stored != config or self.finished):
                self._clear()
        (path / "checkpoints").mkdir(exist_ok=True)
        if not (path / "config.yaml").is_file():
            write_atomic(
                path / "config.yaml",
                yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            )

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        names = (
            "summary.json",  # first: without it the rest counts as unfinished
            "config.yaml",
            "env.json",
            "split.json",
            "genotype.json",
            "weights.safetensors",
            "model-best.safetensors",
            "model-last.safetensors",
            "report.html",
            "checkpoints/latest.safetensors",
            "checkpoints/previous.safetensors",
            *self.LOGS,
        )
        for name in names:
            (self.path / name).unlink(missing_ok=True)

    def _acquire(self) -> None:
        try:
            import fcntl
        except ImportError:  # not a POSIX system: no lock, as before
            return
        lock = open(self.path / ".lock", "a")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise RunError(f"{self.path}: another process is writing this run") from None
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # Files.

    @property
    def finished(self) -> bool:
        """A run is finished when its summary, written last, is there."""
        return (self.path / "summary.json").is_file()

    def write_json(self, name: str, value: Any) -> None:
        write_atomic(self.path / name, json.dumps(value, indent=2, allow_nan=False) + "\n")

    def read_json(self, name: str) -> Any:
        return read_json(self.path / name)

    def append(self, name: str, *values: dict[str, Any]) -> None:
        """Add lines to a log. They count once the next checkpoint has been written."""
        text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
        with open(self.path / name, "ab") as log:
            log.write(text.encode())

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The values of a log.

        Raises:
            FileError: a line is not JSON.
        """
        file = self.path / name
        lines = []
        for number, line in enumerate(file.read_bytes().splitlines(), 1):
            try:
                lines.append(json.loads(line))
            except ValueError as error:
                raise FileError(f"{file}: line {number}: not valid JSON: {error}") from None
        return lines

    # Checkpoints.

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint, keeping the one before it; fix the logs' present lengths."""
        latest = self.path / "checkpoints" / "latest.safetensors"
        fresh = self.path / "checkpoints" / "next.safetensors"
        lengths = {
            name: (self.path / name).stat().st_size if (self.path / name).is_file() else 0
            for name in self.LOGS
        }
        # Written beside the other two first: a full disk then leaves both as they are.
        save_tensors(fresh, tensors, "checkpoint", {"state": state, "lengths": lengths})
        if latest.is_file():
            os.replace(latest, latest.with_name("previous.safetensors"))
        os.replace(fresh, latest)

    def load_checkpoint(self, restore: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> bool:
        """Hand the newest checkpoint to ``restore`` and cut the logs back to it.

        Returns:
            False where the run has no checkpoint yet; the logs are empty then.

        Raises:
            CheckpointError: it is damaged or foreign. Nothing is changed.
        """
        latest = self.path / "checkpoints" / "latest.safetensors"
        previous = latest.with_name("previous.safetensors")
        if not latest.is_file():
            # Killed between the two renames of save_checkpoint: the one before it is whole.
            latest = previous
        lengths = dict.fromkeys(self.LOGS, 0)
        found = latest.is_file()
        if found:
            hint = (
                f"; delete it to go on from {previous.name}, one epoch earlier"
                if latest != previous and previous.is_file()
                else "; delete the folder to start again"
            )
            try:
                tensors, metadata = load_tensors(latest, "checkpoint")
                lengths = {name: int(metadata["lengths"][name]) for name in self.LOGS}
                for name, length in lengths.items():
                    file = self.path / name
                    if (file.stat().st_size if file.is_file() else 0) < length:
                        raise CheckpointError(
                            f"{file}: expected at least {length} bytes, as when {latest.name} was "
                            "written; lines are missing, so the run cannot go on exactly"
                        )
                restore(tensors, metadata["state"])
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{latest}: damaged: {error!r}{hint}") from None
            except CheckpointError as error:
                raise CheckpointError(f"{error}{hint}") from None
        for name, length in lengths.items():
            file = self.path / name
            if file.is_file() and file.stat().st_size > length:
                os.truncate(file, length)
        return found


def _difference(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The first settings in which two configurations differ, in words."""
    found = []
    for key in dict.fromkeys([*stored, *wanted]):
        left, right = stored.get(key), wanted.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            if left != right:
                found.append(_difference(left, right, f"{prefix}{key}."))
        elif left != right:
            found.append(f"{prefix}{key}: {left!r} there, {right!r} asked for")
    return "; ".join(found[:3])
