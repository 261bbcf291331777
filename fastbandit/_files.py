"""Files on disk: written whole or not at all, read with an error that names the file."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

__all__ = ["FileError", "read_json", "write_atomic"]


class FileError(ValueError):
    """A file that cannot be read as what it should be; the message starts with its name."""


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that a reader sees the old content or the new, never a part.

    The bytes go to a temporary name in the same folder, are flushed to the disk and renamed over
    ``path``; a crash at any moment leaves at most a stray hidden ``.tmp`` file. Text is written
    as UTF-8 with its line ends as they are. The folder must exist.

    Raises:
        OSError: the folder does not exist or cannot be written to. ``path`` is untouched then.
    """
    target = Path(path)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    # Opened by hand and not by tempfile, which would make the result readable by its owner only.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(temporary, flags, 0o666)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(target.parent)


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value of the JSON file ``path``.

    Raises:
        FileError: the file is missing, unreadable, not UTF-8 or not JSON (NaN and infinities
            are not JSON). The message holds the file name and the reason.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path}: not UTF-8 text (byte {error.start} is not)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL byte inside the name
        reason = getattr(error, "strerror", None) or str(error)
        raise FileError(f"{path}: cannot be read: {reason}") from None
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise FileError(f"{path}: not usable JSON: nested too deeply") from None
    except ValueError as error:  # includes json.JSONDecodeError and integers beyond Python's limit
        raise FileError(f"{path}: not valid JSON: {error}") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable where the system can (POSIX); elsewhere do nothing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
