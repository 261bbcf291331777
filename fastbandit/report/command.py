"""The command and the function behind it: which folders, which file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastbandit._files import write_atomic
from fastbandit._program import examples, in_browser, program
from fastbandit.command import guard
from fastbandit.report.folders import collect, named_run
from fastbandit.report.matching import Collection
from fastbandit.report.page import make_joint_page, make_page
from fastbandit.report.reading import ReportError

__all__ = ["main", "write_report"]


def write_report(
    run_dir: str | Path | Sequence[str | Path],
    out: str | Path | None = None,
    *,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Write the report of one or more runs, finished or not, as one HTML file.

    An older file is replaced.

    Args:
        run_dir: the run folder, or several: of searches, retraining runs and evaluations.
            Evaluations below the folder of a retraining run are found by themselves.
            ``runs/latest`` is the run there that wrote last.
        out: file to write; default ``report.html`` in the run folder, and for several in the
            current folder.
        summary: what summary.json (evaluation.json) of the first folder is going to hold, for a
            command that writes that file last.

    Returns:
        The file written.

    Raises:
        ReportError: a folder is not that of a run, or ``out`` names a folder.
        OSError: the file cannot be written; an older one is left as it was.
    """
    folders = [run_dir] if isinstance(run_dir, (str, os.PathLike)) else list(run_dir)
    paths = [named_run(Path(folder)) for folder in folders]
    if not paths:
        raise ReportError("write_report: run_dir: expected at least one run folder, got none")
    return _write(collect(paths, summary), _target(paths, out))


def _target(folders: Sequence[Path], out: str | Path | None) -> Path:
    if out is not None:
        return Path(out)
    return folders[0] / "report.html" if len(folders) == 1 else Path("report.html")


def _write(collection: Collection, target: Path) -> Path:
    if target.is_dir():
        raise ReportError(f"{target}: expected a file to write to, got a folder")
    if collection.runs == collection.searches and len(collection.searches) == 1:
        run = collection.searches[0]
        run.key = ""
        page = make_page(run)
    else:
        page = make_joint_page(collection)
    write_atomic(target, page)
    return target


@dataclass(frozen=True)
class _Command:
    run: tyro.conf.Positional[tuple[Path, ...]]
    """run folders, as python -m fastbandit.search, .retrain and .evaluate write them
    (runs/latest: the one that wrote last); evaluations below a retraining run's folder are found by
    themselves"""
    out: Path | None = None
    """file to write; default: report.html in the run folder, for several in the current folder"""
    json: bool = False
    """print the result as one line of JSON"""


def _run(arguments: Sequence[str] | None) -> int:
    command = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(_Command),
        args=None if arguments is None else list(arguments),
        prog=program("report"),
        description="Write the report of searches, retraining runs and evaluations, finished or "
        "not, as one offline HTML file." + examples("report"),
    )
    if not command.run:
        raise ReportError("RUN: expected at least one run folder, got none")
    folders = [named_run(folder) for folder in command.run]
    collection = collect(folders)
    path = _write(collection, _target(folders, command.out))
    alone = len(collection.runs) == 1
    notes = [
        note if alone else f"{run.key} ({run.label}): {note}"
        for run in collection.runs
        for note in run.notes
    ]
    if command.json:
        result: dict[str, Any] = {
            "report": str(path),
            "bytes": path.stat().st_size,
            "status": "finished" if all(run.finished for run in collection.runs) else "unfinished",
        }
        if alone and collection.searches:
            result["samples"] = len(collection.searches[0].samples)
            result["planned"] = collection.searches[0].planned
        else:
            result["searches"] = len(collection.searches)
            result["retrainings"] = len(collection.retrainings)
            result["evaluations"] = len(collection.evaluations)
            result["suspicious"] = sum(run.suspicious for run in collection.evaluations)
        print(json.dumps({**result, "notes": notes}))
    else:
        for note in notes:
            print(f"note: {note}")
        print(f"report: {path}")
        print(f"next: {in_browser(path)}   (shows it)")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return guard("report", lambda: _run(arguments))
