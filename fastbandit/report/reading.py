"""The files of any run folder, read for the report: what they say, and what could not be read.

Nothing is trusted: a line of a log that cannot be used is left out and noted, and so is the last
line that a killed process did not finish.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from fastbandit._files import (
    MEGABYTE,
    FileError,
    parse_json,
    plain_file,
    read_bytes,
    read_sealed,
    read_text,
)
from fastbandit._yaml import LARGEST_YAML, parse_yaml
from fastbandit.bandit.log import Line
from fastbandit.report.html import get

__all__ = [
    "EpochNumber",
    "Folder",
    "ReportError",
    "check_config",
    "genotype_digest",
    "lenient_config",
    "parse",
    "read_config",
    "read_lines",
    "read_optional",
    "without_folder",
]

# What a page is made of at most; longer ones would be of no use to a reader, and a stranger's
# folder may ask for any amount.
_LARGEST_LOG = 64 * MEGABYTE
_MOST_LINES = 200_000
_MOST_NOTES = 50  # of one file

#: An epoch's number in a log; a larger one than anybody trains would empty the charts.
EpochNumber = Annotated[int, Field(ge=0, lt=10_000_000)]

_AnyLine = TypeVar("_AnyLine", bound=Line)


class ReportError(ValueError):
    """A folder that is not a run, or a file that cannot be the report; the message says why."""


@dataclass
class Folder:
    """What the files of any run say, and what could not be read of them (``notes``).

    ``key`` and ``label`` name it on a page of several runs; ``key`` is empty where it is alone.
    """

    folder: Path
    config: dict[str, Any]
    config_text: str
    environment: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    key: str = ""
    label: str = ""

    @property
    def finished(self) -> bool:
        return self.summary is not None and self.summary.get("status") == "finished"

    def size(self, name: str) -> Any:
        """A count of the network that the summary states, such as ``parameters``."""
        value = get(self.summary, name)
        return get(self.summary, "model", name) if value is None else value

    def note(self, text: str) -> None:
        """Say once what could not be read: several sections read the same."""
        if text not in self.notes:
            self.notes.append(text)


def read_optional(run: Folder, name: str) -> dict[str, Any] | None:
    """A JSON object of the folder; None where it is missing, and with a note where damaged."""
    try:
        if not plain_file(run.folder / name).is_file():
            return None
        value = read_sealed(run.folder / name)
    except FileError as error:
        run.notes.append(without_folder(str(error), run.folder))
        return None
    if not isinstance(value, dict):
        run.notes.append(f"{name}: expected an object, got {type(value).__name__}; left out")
        return None
    return value


def without_folder(message: str, folder: Path) -> str:
    return message.removeprefix(f"{folder}/")


def as_finished(run: Folder, name: str, data: bytes) -> bool:
    """Whether a file is as it was when the run was finished; a note where it is not."""
    files = None if run.summary is None else run.summary.get("files")
    stated = files.get(name) if isinstance(files, dict) else None
    if stated is None or stated == hashlib.sha256(data).hexdigest():
        return True
    run.notes.append(
        f"{name}: damaged or edited: not as it was when the run was finished; it is left out"
    )
    return False


def read_lines(run: Folder, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, value) of each line of a log that can be read; a note for each that cannot.

    A process killed while it writes leaves a last line without its end, which is no error.
    """
    try:
        data = read_bytes(plain_file(run.folder / name), _LARGEST_LOG)
    except FileNotFoundError:
        return
    except FileError as error:
        run.notes.append(f"{without_folder(str(error), run.folder)}; it is left out")
        return
    except OSError as error:
        run.notes.append(f"{name}: cannot be read: {error.strerror}")
        return
    if not as_finished(run, name, data):
        return
    before = len(run.notes)
    lines = data.split(b"\n", _MOST_LINES)
    if len(lines) > _MOST_LINES:
        run.notes.append(f"{name}: what comes after line {_MOST_LINES:,} is left out")
        lines.pop()
    for position, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(run.notes) - before > _MOST_NOTES:
            run.notes.append(f"{name}: what comes after line {position - 1} is left out")
            return
        try:
            value = parse_json(line)
            if not isinstance(value, dict):
                raise ValueError("not an object")
        except ValueError:  # UnicodeDecodeError is one
            if position == len(lines):
                run.notes.append(
                    f"{name}: the last line ({position}) is cut off, as when a process is killed "
                    "while writing it; it is left out"
                )
            else:
                run.notes.append(f"{name}: line {position} is not a JSON object; it is left out")
            continue
        yield position, value


def parse(
    run: Folder, name: str, position: int, kind: type[_AnyLine], value: Any
) -> _AnyLine | None:
    """A line of a log as its model; None, with a note, where it does not fit."""
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        run.notes.append(f"{name}: line {position}: {where}: {first['msg']}; the line is left out")
        return None


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The configuration of a run and its text.

    Raises:
        ReportError: ``folder`` is not a run.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing there"
        raise ReportError(f"{folder}: expected a run folder, got {what}")
    file = folder / "config.yaml"
    try:
        if not file.exists() and not file.is_symlink():
            raise ReportError(
                f"{folder}: not a run folder: expected config.yaml in it, as python -m "
                "fastbandit.search, .retrain and .evaluate write it"
            )
        text = read_text(plain_file(file), LARGEST_YAML)
    except FileError as error:
        raise ReportError(str(error)) from None
    try:
        config = parse_yaml(text)
    except ValueError as error:
        raise ReportError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(config, dict):
        raise ReportError(f"{file}: expected a mapping, got {type(config).__name__}")
    return config, text


def lenient_config(folder: Path, others: Sequence[str]) -> tuple[dict[str, Any], str, list[str]]:
    """A configuration; empty with a note where it cannot be read but the run's results can."""
    try:
        return (*read_config(folder), [])
    except ReportError as error:
        if not any((folder / name).is_file() for name in others):
            raise
        message = without_folder(str(error), folder)
        return {}, "", [message.replace(f"{folder}: not a run folder", "config.yaml: missing")]


def check_config(run: Folder) -> None:
    """Leave the configuration out, with a note, where it is not that of the finished run."""
    if run.config_text and not as_finished(run, "config.yaml", run.config_text.encode()):
        run.config, run.config_text = {}, ""


def genotype_digest(run: Folder) -> str | None:
    """The genotype's hash: as the summary says, else that of genotype.json."""
    from fastbandit.genotype import Genotype

    stated = get(run.summary, "genotype_hash") or get(run.summary, "model", "genotype_hash")
    if isinstance(stated, str) and stated:
        return stated
    file = run.folder / "genotype.json"
    try:
        if not plain_file(file).is_file():
            return None
        return Genotype.load(file).hash
    except (ValueError, OSError) as error:
        run.notes.append(without_folder(str(error), run.folder))
        return None
