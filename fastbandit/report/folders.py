"""The folders of a page: what command made each, and the evaluations found below them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastbandit._files import FileError, plain_file, read_sealed
from fastbandit._latest import command_of, last_written, newest
from fastbandit.report.evaluation import EVALUATION, Evaluation, read_evaluation
from fastbandit.report.html import get
from fastbandit.report.matching import Collection, match, name_runs
from fastbandit.report.reading import Folder, ReportError, without_folder
from fastbandit.report.retraining import Retraining, read_retraining
from fastbandit.report.search import Run, read_run

__all__ = ["collect", "named_run", "read_folder"]

# Evaluations are looked for so many levels below a retraining run, among so many folders.
_DEEPEST, _MOST_FOLDERS = 8, 10_000


#: What reads the folder of each command.
_READERS: dict[str, Callable[[Path, Mapping[str, Any] | None], Folder]] = {
    "search": read_run,
    "retrain": read_retraining,
    "evaluate": read_evaluation,
}


def _stated(value: Mapping[str, Any] | None) -> str | None:
    """The command that a file names, where it is one that the report knows."""
    command = get(value, "command")
    return command if isinstance(command, str) and command in _READERS else None


def _stated_in(file: Path) -> str | None:
    try:
        return _stated(read_sealed(plain_file(file)))
    except FileError:
        return None


def _command(folder: Path) -> str:
    """Which command wrote a folder: what its env.json says, else what its other files look like.

    Searches of older versions do not say it; ``search`` stands where no file decides.
    """
    if stated := _stated_in(folder / "env.json"):
        return stated
    if (folder / EVALUATION).is_file():
        return "evaluate"
    if stated := _stated_in(folder / "summary.json"):
        return stated
    if (folder / "bandit.jsonl").is_file():
        return "search"
    return "retrain" if any(folder.glob("model-*.safetensors")) else "search"


def named_run(folder: Path) -> Path:
    """``folder``, or in place of one such as ``runs/latest`` the run there that wrote last.

    Raises:
        ReportError: there is no run.
    """
    return newest(folder, last_written, "a run folder", ReportError) or folder


def read_folder(folder: Path, summary: Mapping[str, Any] | None = None) -> Folder:
    """A run of any command, finished or not.

    Args:
        summary: what the file that the command writes last is going to hold.

    Raises:
        ReportError: ``folder`` is not a run.
    """
    if not folder.is_dir():
        return read_run(folder, summary)
    if command_of(folder) == "study":
        raise ReportError(
            f"{folder}: the folder of a study: its page is {folder / 'study.html'}; give the runs "
            "in its folder searches"
        )
    return _READERS[_stated(summary) or _command(folder)](folder, summary)


def _evaluations_below(folder: Path) -> Iterator[Path]:
    """Folders of evaluations inside that of a retraining run, by name. Links are not followed."""
    below = [folder]
    below_all: list[Path] = []
    for _ in range(_DEEPEST):
        below = [
            Path(entry.path)
            for parent in below
            for entry in _entries(parent)
            if entry.is_dir(follow_symlinks=False)
        ][: _MOST_FOLDERS - len(below_all)]
        below_all += below
    for path in sorted(below_all):
        named = any((path / name).is_file() for name in (EVALUATION, "env.json"))
        if named and _command(path) == "evaluate":
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


def collect(folders: Sequence[Path], summary: Mapping[str, Any] | None = None) -> Collection:
    """Read the folders and the evaluations below those of retraining runs, each once.

    Args:
        summary: for the first folder, see :func:`read_folder`.

    Raises:
        ReportError: one of ``folders`` is not a run.
    """
    collection = Collection()
    seen: set[Path] = set()

    def add(run: Folder) -> None:
        seen.add(run.folder.resolve())
        kinds: tuple[tuple[type[Folder], list[Any]], ...] = (
            (Run, collection.searches),
            (Retraining, collection.retrainings),
            (Evaluation, collection.evaluations),
        )
        next(runs for kind, runs in kinds if isinstance(run, kind)).append(run)

    for position, folder in enumerate(folders):
        if folder.resolve() not in seen:
            add(read_folder(folder, summary if position == 0 else None))
    for retraining in collection.retrainings:
        for path in _evaluations_below(retraining.folder):
            if path.resolve() in seen:
                continue
            try:
                add(read_folder(path))
            except ReportError as error:
                retraining.notes.append(without_folder(str(error), retraining.folder))
                seen.add(path.resolve())
    name_runs(collection)
    match(collection)
    return collection
