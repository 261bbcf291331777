"""The folder of a retraining run, read for the report."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from fastbandit.bandit.log import Line
from fastbandit.report.html import count, get
from fastbandit.report.reading import (
    EpochNumber,
    Folder,
    check_config,
    genotype_digest,
    lenient_config,
    parse,
    read_lines,
    read_optional,
)
from fastbandit.report.shares import Share, make_share

__all__ = ["Epoch", "Retraining", "read_retraining"]


class Epoch(Line):
    """One epoch of a retraining; what else the line holds is kept in ``model_extra``."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    epoch: EpochNumber
    loss: float | None = None
    train_accuracy: float | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    learning_rate: float | None = None
    seconds_total: float | None = None
    images_per_second: float | None = None
    peak_memory_mb: float | None = None


@dataclass
class Retraining(Folder):
    """A retraining run, finished or not."""

    split: dict[str, Any] | None = None
    epochs: list[Epoch] = field(default_factory=list)
    digest: str | None = None
    #: Clean and robust accuracy of the summary's parts ``best``, ``last`` and ``test``.
    measured: dict[str, tuple[Share | None, Share | None]] = field(default_factory=dict)

    @property
    def planned(self) -> int | None:
        return count(self.config.get("epochs"))

    @cached_property
    def model_files(self) -> dict[str, str]:
        """Name of each model file in the folder by its digest, the best first."""
        files: dict[str, str] = {}
        for name in ("model-best.safetensors", "model-last.safetensors"):
            file, digest = self.folder / name, hashlib.sha256()
            if not file.is_file():
                continue
            try:
                with open(file, "rb") as opened:
                    while piece := opened.read(2**20):
                        digest.update(piece)
            except OSError as error:
                self.notes.append(f"{name}: cannot be read: {error.strerror}")
                continue
            files.setdefault(digest.hexdigest()[:16], name)
        return files


def read_retraining(folder: Path, summary: Mapping[str, Any] | None) -> Retraining:
    config, text, notes = lenient_config(folder, ("metrics.jsonl", "summary.json"))
    run = Retraining(folder, config, text, notes=notes, label=folder.name)
    run.environment = read_optional(run, "env.json")
    run.split = read_optional(run, "split.json")
    run.summary = dict(summary) if summary is not None else read_optional(run, "summary.json")
    check_config(run)
    for position, value in read_lines(run, "metrics.jsonl"):
        line = parse(run, "metrics.jsonl", position, Epoch, value)
        if line is not None:
            run.epochs.append(line)
    for part in ("best", "last", "test"):
        section = get(run.summary, part)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            kind = type(section).__name__
            run.notes.append(f"summary.json: {part}: expected an object, got {kind}")
            continue
        shares = [
            None
            if section.get(f"{kind}_accuracy") is None
            else make_share(
                section[f"{kind}_accuracy"],
                section.get("n"),
                where=f"summary.json: {part}.{kind}_accuracy",
                notes=run.notes,
            )
            for kind in ("clean", "robust")
        ]
        run.measured[part] = (shares[0], shares[1])
    run.digest = genotype_digest(run)
    return run
