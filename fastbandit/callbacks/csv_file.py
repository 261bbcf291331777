"""Metrics as a table, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastbandit._files import MEGABYTE, FileError, csv_text, read_text, write_atomic
from fastbandit.callbacks.base import Callback, RunInfo, flat, shown_epoch

__all__ = ["Csv"]


class Csv(Callback):
    """Writes a CSV file with a row for each epoch, replaced whole at each, so never half written.

    Columns are the fields of ``metrics.jsonl``; one that comes later (a phase of its own) is added,
    and rows before have nothing there. ``epoch`` counts from 1, as what the command prints does.

    Args:
        path: the file; None: ``metrics.csv`` in the run folder.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: list[dict[str, Any]] = []
        self._columns: dict[str, None] = {}

    def on_start(self, run: RunInfo) -> None:
        self._rows, self._columns = [], {}
        file = self._file(run)
        if run.epoch == 0 or not file.exists():
            return
        rows = csv.DictReader(io.StringIO(read_text(file, 64 * MEGABYTE)))
        if "epoch" not in (rows.fieldnames or ()):
            raise FileError(f"{file}: expected a table of epochs, with a column epoch; got another")
        self._columns = dict.fromkeys(rows.fieldnames or ())
        earlier = 0  # of a version that counted from 0
        for row in rows:
            number = row["epoch"]
            if not (number or "").isdecimal():
                raise FileError(f"{file}: expected a number of an epoch, got {number!r}")
            if not self._rows and int(number) == 0:
                earlier = 1
            if int(number) + earlier <= run.epoch:
                self._rows.append({**row, "epoch": int(number) + earlier})

    def on_epoch(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        row = {**flat(metrics), "epoch": shown_epoch(metrics)}
        self._columns |= dict.fromkeys(row)
        self._rows.append(row)
        write_atomic(self._file(run), csv_text(list(self._columns), self._rows))

    def _file(self, run: RunInfo) -> Path:
        return self.path or run.path / "metrics.csv"
