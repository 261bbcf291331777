"""The run folder: what a run writes, and how it goes on after any interruption.

A run's state is one checkpoint file, replaced atomically after every epoch, and a few logs that
only grow. The checkpoint remembers how long each log was when it was written and the digest of its
content; resuming cuts the logs back to that length, so whatever a killed process wrote after its
last checkpoint is gone and is written again, byte for byte.

Every file says whether it is as it was written. Tensor files carry a checksum of tensors and
metadata, JSON files one of their content; the checkpoint holds digests of the configuration and of
the logs, and the result, written last, those of the text files beside it. JSON files without a
seal come from older versions and are read as they are. A run folder may be a stranger's, so links,
pipes and devices in it are refused.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import yaml
from torch import Tensor

from fastbandit._files import (
    MEGABYTE,
    FileError,
    naming,
    parse_json,
    plain_file,
    read_sealed,
    read_text,
    sync_folder,
    write_atomic,
    write_sealed,
)
from fastbandit._yaml import LARGEST_YAML, parse_yaml
from fastbandit.runs.environment import config_digest
from fastbandit.runs.logs import Log
from fastbandit.runs.tensors import CheckpointError, RunError, load_tensors, save_tensors

__all__ = ["RunFiles", "RunFolder"]


@dataclass(frozen=True)
class RunFiles:
    """What a command writes into its run folders.

    ``force`` removes these files and folders, and nothing else.
    """

    command: str = ""
    #: Written last; a run is finished when it is there.
    result: str = "summary.json"
    #: Logs that only grow, and are cut back to the last checkpoint.
    logs: tuple[str, ...] = ("metrics.jsonl", "bandit.jsonl", "genotypes.jsonl")
    #: Files beside those that a run of any command has.
    files: tuple[str, ...] = ()
    #: Folders made at the start.
    folders: tuple[str, ...] = ("checkpoints",)
    #: Folders that ``force`` removes with all that is in them.
    trees: tuple[str, ...] = ()

    @property
    def all(self) -> tuple[str, ...]:
        """All files but ``config.yaml``, which comes first and goes last, and the result."""
        return (*_FILES, *self.files)


# Of any command: a folder may hold what another command left there.
_FILES = (
    "env.json",
    "split.json",
    "genotype.json",
    "weights.safetensors",
    "model-best.safetensors",
    "model-last.safetensors",
    "model-best.md",
    "model-last.md",
    "report.html",
    "checkpoints/latest.safetensors",
    "checkpoints/previous.safetensors",
    "checkpoints/next.safetensors",
    *RunFiles.logs,
)


class RunFolder:
    """One run's files. Holds a lock while open, so that two processes never write one run.

    Use :meth:`open` to get one; use it as a context manager. Where the file system has no locks
    (some network and cluster file systems) a run goes on without, and a warning says so once.
    """

    #: Text files whose digests the result holds.
    _DIGESTED = ("config.yaml", "env.json", "split.json", "genotype.json", "study.json")
    # There from the first to the last moment of a removal, so that one that was cut short is
    # brought to its end by the next call.
    _CLEARING = ".clearing"

    def __init__(self, path: Path, files: RunFiles = RunFiles()) -> None:
        self.path, self.files = path, files
        self.config: dict[str, Any] = {}
        self._lock: Any = None
        self._logs: dict[str, Log] = {}

    # The configuration that decides whether a folder belongs to a run.

    @classmethod
    def read_config(cls, path: Path, result: str = "summary.json") -> dict[str, Any]:
        """The resolved configuration stored in the folder.

        Args:
            result: the file that a finished run has.

        Raises:
            RunError: no configuration there, or one that cannot be read, or not the one that a
                finished run had.
        """
        file = path / "config.yaml"
        try:
            text = read_text(plain_file(file), LARGEST_YAML)
            value = parse_yaml(text)
        except ValueError as error:
            reason = str(error).removeprefix(f"{file}: ").removeprefix("cannot be read: ")
            raise RunError(f"{path}: not a run folder: config.yaml: {reason}") from None
        if not isinstance(value, dict):
            raise RunError(f"{file}: expected a mapping, got {type(value).__name__}")
        try:
            stated = read_sealed(plain_file(path / result))
        except FileError:
            return value  # not finished, or said by who reads the result
        files = stated.get("files") if isinstance(stated, dict) else None
        digest = files.get("config.yaml") if isinstance(files, dict) else None
        if digest is not None and digest != hashlib.sha256(text.encode()).hexdigest():
            raise RunError(f"{file}: damaged or edited: not as it was when the run was finished")
        return value

    @staticmethod
    def find_unfinished(
        root: Path, config: dict[str, Any], result: str = "summary.json"
    ) -> Path | None:
        """The newest folder below ``root`` that holds an unfinished run of this configuration."""
        if not root.is_dir():
            return None
        for path in sorted(root.iterdir(), reverse=True):
            if (path / "config.yaml").is_file() and not (path / result).is_file():
                with contextlib.suppress(RunError):
                    if RunFolder.read_config(path, result) == config:
                        return path
        return None

    @staticmethod
    def fresh_path(root: Path, name: str) -> Path:
        """A path below ``root`` that does not exist: ``<date>-<name>``, numbered if taken."""
        safe = re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.") or "run"
        date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d")
        path, number = root / f"{date}-{safe}", 1
        while os.path.lexists(path):
            number += 1
            path = root / f"{date}-{safe}-{number}"
        return path

    @classmethod
    def open(
        cls,
        path: Path,
        config: dict[str, Any],
        *,
        force: bool = False,
        files: RunFiles = RunFiles(),
    ) -> RunFolder:
        """Create the folder, or open it to go on with the same run.

        A finished run of this configuration is opened too, and left as it is; see
        :attr:`finished`.

        Args:
            config: resolved configuration, plain values; what is stored must equal it.
            force: throw away what a finished or a different run left there.
            files: what the command writes.

        Raises:
            RunError: the folder holds something else or a run of another configuration, or
                another process is writing it. Nothing is changed then.
            FileError: a link, a pipe or a device is in the place of one of its files.
        """
        if os.path.lexists(path) and not path.is_dir():
            raise RunError(f"{path}: expected a folder, got a file")
        # Dot files are ours too (the lock, remains of an interrupted write) or nobody's business.
        holds = {f.name for f in path.iterdir()} if path.is_dir() else set()
        strange = {name for name in holds if not name.startswith(".")}
        if strange == {"checkpoints"} and not any((path / "checkpoints").iterdir()):
            strange = set()  # as older versions leave it when they are killed at the start
        if strange and not holds & {"config.yaml", cls._CLEARING}:
            raise RunError(
                f"{path}: holds files but no config.yaml, so it is not a run folder; "
                "choose another --out"
            )
        with naming(path):
            path.mkdir(parents=True, exist_ok=True)
        folder = cls(path, files)
        folder.config = config
        folder._check_files()
        folder._acquire()
        try:
            folder._prepare(config, force)
        except BaseException:
            folder.close()
            raise
        return folder

    def _check_files(self) -> None:
        for name in (*self.files.folders, *self.files.trees):
            plain_file(self.path / name, folder=True)
        for name in ("config.yaml", self.files.result, *self.files.all, ".lock", self._CLEARING):
            plain_file(self.path / name)

    def _prepare(self, config: dict[str, Any], force: bool) -> None:
        """Whatever moment it is stopped at, the next call brings it to its end."""
        path = self.path
        if (path / self._CLEARING).is_file():
            self._clear()
        places = (path, *(path / name for name in (*self.files.folders, *self.files.trees)))
        for stray in (file for place in places for file in place.glob(".*.tmp")):
            if stray.is_symlink() or not stray.is_dir():
                stray.unlink(missing_ok=True)
        if (path / "config.yaml").is_file():
            stored = None
            try:
                stored = self.read_config(path, self.files.result)
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
                return
            if force and (stored != config or self.finished):
                self._clear()
        # First of all, since without it the folder is nobody's.
        if not (path / "config.yaml").is_file():
            write_atomic(
                path / "config.yaml",
                yaml.safe_dump(config, sort_keys=False, allow_unicode=True),
            )
        for name in self.files.folders:
            (path / name).mkdir(exist_ok=True)

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        marker = self.path / self._CLEARING
        write_atomic(marker, b"")
        # The result first: without it the rest counts as unfinished for who reads meanwhile.
        for name in (self.files.result, *self.files.all, "config.yaml"):
            (self.path / name).unlink(missing_ok=True)
        for name in self.files.trees:
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
        sync_folder(self.path)
        marker.unlink()

    def _acquire(self) -> None:
        if sys.platform == "win32":
            windows = filelock.FileLock(self.path / ".lock", blocking=False)
            try:
                windows.acquire()
            except filelock.Timeout:
                raise RunError(f"{self.path}: another process is writing this run") from None
            self._lock = windows
            return
        # Not filelock's: older versions say of a file system without locks that another process
        # holds it (docs/decisions.md#folder-lock).
        import fcntl

        lock = open(self.path / ".lock", "a")  # noqa: SIM115 - held as long as the run
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno not in _NO_LOCKS:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise RunError(f"{self.path}: another process is writing this run") from None
                raise OSError(error.errno, error.strerror, str(self.path / ".lock")) from error
            _warn_of_no_locks(self.path)
            return
        self._lock = lock

    def close(self) -> None:
        if self._lock is not None:
            self._lock.release() if sys.platform == "win32" else self._lock.close()
            self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # Files.

    @property
    def finished(self) -> bool:
        """A run is finished when its result, written last, is there, and no one is clearing it."""
        return (self.path / self.files.result).is_file() and not (
            self.path / self._CLEARING
        ).is_file()

    def stored(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """The result, if the run is finished and of this configuration; None if it is not.

        Raises:
            RunError: configuration or result cannot be read, or are not what was written.
        """
        if not self.finished or self.read_config(self.path, self.files.result) != config:
            return None
        return self.result()

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a sealed JSON file; the result with the digests of the text files beside it."""
        if name == self.files.result:
            value = {**value, "files": self._digests()}
        write_sealed(self.path / name, value, indent=2)

    def read_json(self, name: str) -> Any:
        """What :meth:`write_json` was given.

        Raises:
            FileError: missing, damaged or edited.
        """
        value = read_sealed(plain_file(self.path / name))
        if name == self.files.result and isinstance(value, dict):
            value.pop("files", None)
        return value

    def result(self) -> dict[str, Any]:
        """The result of a finished run.

        Raises:
            RunError: it cannot be read, or is not what was written.
        """
        try:
            value = self.read_json(self.files.result)
        except FileError as error:
            raise RunError(f"{error}; pass --force to run it again") from None
        if not isinstance(value, dict):
            raise RunError(f"{self.path / self.files.result}: expected an object; pass --force")
        return value

    def _digests(self) -> dict[str, str]:
        digests = {}
        for name in (*self._DIGESTED, *self.files.logs):
            if name != self.files.result and (self.path / name).is_file():
                log = Log()
                log.read(self.path / name)
                digests[name] = log.sha256.hexdigest()
        return digests

    def _log(self, name: str) -> Log:
        if name not in self._logs:
            log = Log()
            if plain_file(self.path / name).is_file():
                log.read(self.path / name)
            self._logs[name] = log
        return self._logs[name]

    def append(self, name: str, *values: dict[str, Any]) -> None:
        """Add lines to a log. They count once the next checkpoint has been written."""
        text = "".join(json.dumps(value, allow_nan=False) + "\n" for value in values)
        data, log, file = text.encode(), self._log(name), self.path / name
        with naming(plain_file(file)), open(file, "ab") as stream:
            stream.write(data)
        log.add(data)

    def lines(self, name: str) -> Iterator[dict[str, Any]]:
        """The values of a log, one at a time.

        Raises:
            FileError: a line is not JSON, or longer than 16 MiB.
        """
        file = self.path / name
        with naming(plain_file(file)), open(file, "rb") as stream:
            number = 0
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                try:
                    if len(line) > _LONGEST_LINE:
                        raise ValueError(f"expected at most {_LONGEST_LINE:,} bytes")
                    value = parse_json(line)
                except ValueError as error:
                    raise FileError(f"{file}: line {number}: not valid JSON: {error}") from None
                yield value

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The values of a log; see :meth:`lines`."""
        return list(self.lines(name))

    # Checkpoints.

    def save_checkpoint(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace the checkpoint, keeping the one before it; fix the logs' present content."""
        latest = self.path / "checkpoints" / "latest.safetensors"
        fresh = self.path / "checkpoints" / "next.safetensors"
        logs = {name: self._log(name) for name in self.files.logs}
        metadata = {
            "state": state,
            "config": config_digest(self.config),
            "lengths": {name: log.length for name, log in logs.items()},
            "digests": {name: log.sha256.hexdigest() for name, log in logs.items()},
        }
        # Written beside the other two first: a full disk then leaves both as they are.
        save_tensors(fresh, tensors, "checkpoint", metadata)
        if latest.is_file():
            os.replace(latest, latest.with_name("previous.safetensors"))
        os.replace(fresh, latest)

    def forget(self) -> None:
        """Remove the checkpoints; the configuration stays."""
        for name in ("latest", "previous"):
            (self.path / "checkpoints" / f"{name}.safetensors").unlink(missing_ok=True)

    def load_checkpoint(self, restore: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> bool:
        """Hand the newest checkpoint to ``restore`` and cut the logs back to it.

        Returns:
            False where the run has no checkpoint yet; the logs are empty then.

        Raises:
            CheckpointError: it is damaged or foreign, or a log does not hold what it held. Nothing
                is changed.
        """
        latest = self.path / "checkpoints" / "latest.safetensors"
        previous = latest.with_name("previous.safetensors")
        if not latest.is_file():
            # Killed between the two renames of save_checkpoint: the one before it is whole.
            latest = previous
        logs = {name: Log() for name in self.files.logs}
        exists = latest.is_file()
        if exists:
            hint = (
                f"; delete it to go on from {previous.name}, one epoch earlier"
                if latest != previous and previous.is_file()
                else "; delete the folder to start again"
            )
            try:
                tensors, metadata = load_tensors(plain_file(latest), "checkpoint")
                if metadata["version"] > 1 and metadata["config"] != config_digest(self.config):
                    raise CheckpointError(
                        f"{latest}: expected a checkpoint of the configuration in config.yaml, got "
                        "one of another"
                    )
                for name, log in logs.items():
                    digest = metadata["digests"][name] if metadata["version"] > 1 else None
                    self._read_log(name, log, int(metadata["lengths"][name]), digest, latest.name)
                restore(tensors, metadata["state"])
            except (KeyError, TypeError, AttributeError) as error:
                raise CheckpointError(f"{latest}: damaged: {error!r}{hint}") from None
            except CheckpointError as error:
                raise CheckpointError(f"{error}{hint}") from None
        for name, log in logs.items():
            self._cut(self.path / name, log.length)
        self._logs = logs
        return exists

    def _read_log(self, name: str, log: Log, length: int, digest: str | None, by: str) -> None:
        """Read the part of a log that counts, and see that it is as it was."""
        file = self.path / name
        if plain_file(file).is_file():
            log.read(file, length)
        if log.length < length:
            raise CheckpointError(
                f"{file}: expected at least {length} bytes, as when {by} was "
                "written; lines are missing, so the run cannot go on exactly"
            )
        if digest not in (None, log.sha256.hexdigest()):
            raise CheckpointError(
                f"{file}: damaged or edited: its first {length} bytes are not those it held when "
                f"{by} was written"
            )

    @staticmethod
    def _cut(file: Path, length: int) -> None:
        if not plain_file(file).is_file():
            return
        status = file.stat()
        if status.st_nlink > 1:
            # Another name shares the file, in a snapshot made of links or elsewhere; what is
            # written from now on is ours alone.
            with naming(file), open(file, "rb") as stream:
                data = stream.read(length)
            write_atomic(file, data)
        elif status.st_size > length:
            os.truncate(file, length)


# What a file system that has no locks answers: EINVAL and ENOSYS on some cluster file systems.
_NO_LOCKS = {
    errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL
}  # fmt: skip
_LONGEST_LINE = 16 * MEGABYTE
_warned_of_no_locks = False


def _warn_of_no_locks(path: Path) -> None:
    global _warned_of_no_locks
    if not _warned_of_no_locks:
        _warned_of_no_locks = True
        warnings.warn(
            f"{path}: the file system has no locks, so that a second process could write the same "
            "run; see to it that none does",
            RuntimeWarning,
            stacklevel=4,
        )


def _difference(stored: dict[str, Any], wanted: dict[str, Any], prefix: str = "") -> str:
    """The first settings in which two configurations differ, in words."""
    differences = []
    for key in dict.fromkeys([*stored, *wanted]):
        left, right = stored.get(key), wanted.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            if left != right:
                differences.append(_difference(left, right, f"{prefix}{key}."))
        elif left != right:
            differences.append(f"{prefix}{key}: {left!r} there, {right!r} asked for")
    return "; ".join(differences[:3])
