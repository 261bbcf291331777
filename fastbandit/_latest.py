"""What a path such as ``runs/latest`` means: the newest folder of the kind that is asked for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from fastbandit._files import FileError, plain_file, read_sealed

__all__ = ["command_of", "last_written", "newest"]

_LATEST = "latest"


def newest(
    path: str | os.PathLike[str],
    dated: Callable[[Path], Path | None],
    what: str,
    error: type[Exception],
) -> Path | None:
    """The folder that a path such as ``runs/latest`` means: the newest one of its kind there.

    Args:
        dated: of a folder, the file whose time is its age; None where it is of another kind.
        what: the kind, for a message: ``a folder with a model``.
        error: what is raised where there is none.

    Returns:
        None where ``path`` ends otherwise, or something has that very name.
    """
    path = Path(path)
    if path.name != _LATEST or os.path.lexists(path):
        return None
    candidates = [(file, folder) for folder in path.parent.glob("*/") if (file := dated(folder))]
    if not candidates:
        raise error(f"{path}: expected {what} in {path.parent}, got none")
    return max(candidates, key=lambda pair: pair[0].stat().st_mtime_ns)[1]


def last_written(folder: Path) -> Path | None:
    """The file that a run wrote last; None where the folder is not that of a run."""
    if not (folder / "config.yaml").is_file():
        return None
    # A page that is made again makes a run no newer.
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix != ".html"]
    return max(files, key=lambda file: file.stat().st_mtime_ns)


def command_of(folder: Path) -> str | None:
    """The command that wrote a folder, as its env.json says; older searches do not say it."""
    try:
        stated = read_sealed(plain_file(folder / "env.json"))
    except FileError:
        return None
    command = stated.get("command") if isinstance(stated, dict) else None
    return command if isinstance(command, str) else None
