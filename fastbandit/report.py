"""``python -m fastbandit.report RUN``: what a search did, as one HTML file that needs no network.

The page is built from the files of a run folder alone, finished or not: accuracies with their
intervals, the cells drawn, every edge's arms over time, every abandoned arm with the reason, cost,
configuration and environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from fastbandit._files import write_atomic
from fastbandit._report.page import make_page, wilson
from fastbandit._report.reading import ReportError, Run, read_run

__all__ = ["ReportError", "main", "wilson", "write_report"]


def write_report(
    run_dir: str | Path, out: str | Path | None = None, *, summary: Mapping[str, Any] | None = None
) -> Path:
    """Write the report of a run, finished or not, as one HTML file; an older one is replaced.

    Args:
        run_dir: the run folder.
        out: file to write; default ``report.html`` in the run folder.
        summary: what summary.json is going to hold, for a search that writes that file last.

    Returns:
        The file written.

    Raises:
        ReportError: ``run_dir`` is not a run folder, or ``out`` names a folder.
        OSError: the file cannot be written; an older one is left as it was.
    """
    folder = Path(run_dir)
    return _write(read_run(folder, summary), out)


def _write(run: Run, out: str | Path | None) -> Path:
    target = Path(out) if out is not None else run.folder / "report.html"
    if target.is_dir():
        raise ReportError(f"{target}: expected a file to write to, got a folder")
    write_atomic(target, make_page(run))
    return target


@dataclass(frozen=True)
class _Command:
    run: tyro.conf.Positional[Path]
    """run folder, as python -m fastbandit.search writes it"""
    out: Path | None = None
    """file to write; default: report.html in the run folder"""
    json: bool = False
    """print the result as one line of JSON"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    command = tyro.cli(
        tyro.conf.configure(tyro.conf.FlagCreatePairsOff)(_Command),
        args=None if arguments is None else list(arguments),
        prog="python -m fastbandit.report",
        description="Write the report of a search, finished or not, as one offline HTML file.",
    )
    try:
        run = read_run(command.run, None)
        path = _write(run, command.out)
    except ReportError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 1
    if command.json:
        result = {
            "report": str(path),
            "bytes": path.stat().st_size,
            "status": "finished" if run.finished else "unfinished",
            "samples": len(run.samples),
            "planned": run.planned,
            "notes": run.notes,
        }
        print(json.dumps(result))
    else:
        for note in run.notes:
            print(f"note: {note}")
        print(f"report: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
