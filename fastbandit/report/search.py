"""The folder of a search, read for the report: its logs, and the bandit after each sample."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbandit.bandit import POLICIES, Bandits, BanditSettings
from fastbandit.bandit.log import LINES, Abandon, BanditLine, End, Line, Sample, Start
from fastbandit.childparent import ChildParentSample, ChildParentStart, Means
from fastbandit.report.charts import DIVERGING_STEPS
from fastbandit.report.html import count, get
from fastbandit.report.reading import (
    EpochNumber,
    Folder,
    check_config,
    parse,
    read_config,
    read_lines,
    read_optional,
)

__all__ = ["ArmHistory", "Metrics", "Run", "read_run", "split_size", "totals"]

# What a page is made of at most; a stranger's folder may ask for any amount.
_MOST_ARMS = 20_000  # edges by operations; the largest space has 756
_MOST_STATES = 20_000_000  # arms by samples
_MOST_SAMPLES = 20_000  # 11 arms with T = 300; each is credited again by the policy


class Metrics(Line):
    epoch: EpochNumber
    phase: str
    arms: int
    loss: float | None = None
    train_accuracy: float | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    reward: float | None = None
    learning_rate: float | None = None
    seconds_train: float | None = None
    seconds_validate: float | None = None
    seconds_total: float | None = None
    images_per_second: float | None = None
    peak_memory_mb: float | None = None


@dataclass
class Run(Folder):
    """A search."""

    split: dict[str, Any] | None = None
    start: Start | ChildParentStart | None = None
    samples: list[Sample] = field(default_factory=list)
    abandons: list[Abandon] = field(default_factory=list)
    end: End | None = None
    metrics: list[Metrics] = field(default_factory=list)

    @cached_property
    def epochs(self) -> list[int]:
        """Paths trained up to each sample, itself included: the epoch a sample belongs to."""
        return np.cumsum([line.trained for line in self.samples], dtype=np.int64).tolist()

    def epoch_at(self, samples: int) -> int:
        """Paths trained among the first ``samples`` samples."""
        return self.epochs[min(samples, len(self.epochs)) - 1] if samples and self.epochs else 0

    @cached_property
    def _schedule(self) -> tuple[int, int]:
        """Paths that the whole search trains, and those of the initial pass."""
        assert self.start is not None
        bandits = _bandits(self.start)
        return bandits.total_samples, bandits.initial_samples

    @property
    def planned_epochs(self) -> int:
        """Paths that the whole search trains: K + T (K + ... + 2), Algorithm 8."""
        done = self.epoch_at(len(self.samples))
        if self.start is None or self.end is not None:
            return done
        return max(self._schedule[0], done)

    @property
    def planned(self) -> int:
        """Samples of the whole search: the paths trained and those that are only evaluated."""
        done = len(self.samples)
        if self.start is None or self.end is not None:
            return done
        more = max(0, self.planned_epochs - self._schedule[1])
        if isinstance(self.start, ChildParentStart):
            return self.planned_epochs
        return max(self.planned_epochs + self.start.settings.evaluations_per_epoch * more, done)

    @property
    def prunings(self) -> list[tuple[int, int, int]]:
        """(sample, round, arms left) of each round, in order."""
        return sorted({(a.sample, a.round, a.arms_left) for a in self.abandons})

    @cached_property
    def history(self) -> ArmHistory | None:
        return None if self.start is None else ArmHistory(self)


def _known(settings: BanditSettings) -> BanditSettings:
    """The settings, with the paper's rule in place of a policy that is not known here."""
    return (
        settings if settings.policy in POLICIES else dataclasses.replace(settings, policy="printed")
    )


def _bandits(start: Start | ChildParentStart) -> Bandits | Means:
    """Bandits that are credited with what a log says, whatever its policy would have drawn."""
    if isinstance(start, ChildParentStart):
        return Means(len(start.edges), len(start.operations), start.settings)
    return Bandits(len(start.edges), len(start.operations), _known(start.settings))


class ArmHistory:
    """The bandit's state after every sample, from the choices and rewards of the log.

    Attributes:
        mean, count: [samples + 1, rows, arms], after so many samples; the mean of an arm that has
            not been tried is NaN.
        life: [rows, arms], samples after which the arm was abandoned; a number larger than any
            sample for those alive.
        round: [rows, arms], the round in which it was, likewise. Rounds may share a sample.
        explained: False where a logged mean is not what the policy gives, as with one that is not
            known here and credits its arms in another way.
    """

    ALIVE = np.iinfo(np.int64).max

    def __init__(self, run: Run) -> None:
        assert run.start is not None
        bandits = _bandits(run.start)
        shape = (len(run.samples) + 1, bandits.rows, bandits.arms)
        # CP-NAS has no bounds, and so no bonus.
        self.bonus = bandits.settings.bonus if isinstance(bandits, Bandits) else 0.0
        self.choice = np.array([s.choice for s in run.samples], dtype=np.int64).reshape(
            -1, bandits.rows
        )
        self.mean, self.count = np.full(shape, np.nan), np.zeros(shape, dtype=np.int64)
        for i, sample in enumerate(run.samples, 1):
            bandits.credit(torch.tensor(sample.choice), sample.reward, trained=sample.trained)
            self.count[i] = bandits.count.numpy()
            self.mean[i] = np.where(self.count[i] > 0, bandits.mean.numpy(), np.nan)
        self.life = np.full(shape[1:], self.ALIVE)
        self.round = np.full(shape[1:], self.ALIVE)
        self.explained = True
        for line in run.abandons:
            self.life[line.row, line.arm] = line.sample
            self.round[line.row, line.arm] = line.round
            times = int(self.count[line.sample, line.row, line.arm])
            mean = float(self.mean[line.sample, line.row, line.arm])
            same = times == 0 or math.isclose(mean, line.mean, rel_tol=1e-6, abs_tol=1e-9)
            self.explained &= same and times == line.count

    def upper(self, sample: int, row: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Eq. 4.12, s_U = m + bonus sqrt(2 ln N / n), after ``sample`` samples; [arms]."""
        times = self.count[sample, row]
        bonus = self.bonus * np.sqrt(2 * math.log(max(int(times.sum()), 1)) / np.maximum(times, 1))
        return np.where(times > 0, self.mean[sample, row] + bonus, np.inf)

    def levels(self, limit: float) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Class of each arm's m against the mean of the arms then alive, [samples, rows, arms].

        -1 where it has not been tried; 0 is ``-limit`` or less, the last class ``limit`` or more.
        """
        difference = self.difference
        scaled = np.rint((difference / limit + 1) / 2 * (DIVERGING_STEPS - 1))
        classes = np.clip(np.nan_to_num(scaled), 0, DIVERGING_STEPS - 1).astype(np.int64)
        return np.where(np.isnan(difference), -1, classes)

    @cached_property
    def difference(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """m of each arm less the mean m of its edge's arms tried and alive, after each sample."""
        mean = self.mean[1:]
        when = np.arange(1, len(mean) + 1)[:, None, None]
        # An arm abandoned after s samples is still alive while the s-th is drawn.
        mean = np.where(when <= self.life[None], mean, np.nan)
        tried = ~np.isnan(mean)
        total = np.where(tried, mean, 0.0).sum(-1, keepdims=True)
        return mean - total / np.maximum(tried.sum(-1, keepdims=True), 1)


def split_size(run: Run, part: str) -> int | None:
    """Images of a part of the data: from the summary, else from the stored split."""
    value = get(run.summary, "data", part)
    if value is None:
        value = get(run.split, part)
    if isinstance(value, list):
        return len(value)
    return count(value)


def totals(run: Run) -> dict[str, float | None]:
    """Cost so far from the metrics, for a run without a summary."""

    def total(name: str) -> float | None:
        values = [v for line in run.metrics if (v := getattr(line, name)) is not None]
        return sum(values) if values else None

    peaks = [line.peak_memory_mb for line in run.metrics if line.peak_memory_mb is not None]
    pairs = [
        (line.images_per_second * line.seconds_train, line.seconds_train)
        for line in run.metrics
        if line.images_per_second is not None and line.seconds_train
    ]
    images, seconds = sum(p[0] for p in pairs), sum(p[1] for p in pairs)
    return {
        "seconds_total": total("seconds_total"),
        "seconds_train": total("seconds_train"),
        "seconds_validate": total("seconds_validate"),
        "images_per_second": images / seconds if seconds else None,
        "peak_memory_mb": max(peaks) if peaks else None,
    }


def _out_of_range(run: Run, line: Line) -> str:
    """What a bandit with the settings of the log would not take, or an empty string."""
    if isinstance(line, Start | ChildParentStart):
        try:
            (_known(line.settings) if isinstance(line, Start) else line.settings).check()
        except ValueError as error:
            return str(error)
    if isinstance(line, Sample) and isinstance(run.start, Start):
        policy = POLICIES[_known(run.start.settings).policy]
        if problem := policy.reward_problem(line.reward):
            return f"reward: {problem}"
    return ""


def _kind_of(run: Run, value: Mapping[str, Any]) -> type[BanditLine] | None:
    """Which line of which algorithm it is; None for one that is not known."""
    event = value.get("event")
    if event == "start" and "algorithm" in value:
        return ChildParentStart
    if event == "sample" and isinstance(run.start, ChildParentStart):
        return ChildParentSample
    return LINES.get(event) if isinstance(event, str) else None


def _read_bandit(run: Run) -> None:
    """The bandit's log, as far as each line follows from those before it."""
    name = "bandit.jsonl"
    for position, value in read_lines(run, name):
        event = value.get("event")
        if event in ("attack", "reward"):  # a stronger adversary; the summary lists them
            continue
        kind = _kind_of(run, value)
        if kind is None:
            run.notes.append(f"{name}: line {position}: unknown event {event!r}; it is left out")
            continue
        line = parse(run, name, position, kind, value)
        if line is None:
            continue
        problem = _out_of_range(run, line)
        if problem:
            run.notes.append(f"{name}: line {position}: {problem}; the line is left out")
            continue
        if isinstance(line, Start | ChildParentStart) and run.start is None:
            size = len(line.edges) * len(line.operations)
            if size > _MOST_ARMS:
                run.notes.append(
                    f"{name}: {len(line.edges):,} edges of {len(line.operations):,} operations: "
                    f"expected at most {_MOST_ARMS:,} arms; the log is left out"
                )
                return
            run.start = line
            continue
        if run.start is None or isinstance(line, Start | ChildParentStart):
            where = "comes before the start event" if run.start is None else "starts again"
            run.notes.append(f"{name}: line {position} {where}; it is left out")
            continue
        rows, arms = len(run.start.edges), len(run.start.operations)
        assert isinstance(line, (Sample, Abandon, End))
        if isinstance(line, Abandon):
            fits = 0 <= line.row < rows and 0 <= line.arm < arms
        else:
            fits = len(line.choice) == rows and all(0 <= arm < arms for arm in line.choice)
        # Samples count from 0, so each of the three carries the number credited before it.
        if not fits or line.sample != len(run.samples):
            # Means and counts after it cannot be known.
            run.notes.append(
                f"{name}: line {position} ({event}, sample {line.sample}) does not follow from the "
                f"{len(run.samples)} samples before it on {rows} edges of {arms} operations; "
                "it and what comes after it are left out"
            )
            return
        if isinstance(line, Sample):
            if len(run.samples) == _MOST_SAMPLES:
                run.notes.append(
                    f"{name}: expected at most {_MOST_SAMPLES:,} samples; line {position} and what "
                    "comes after it are left out"
                )
                return
            if (len(run.samples) + 2) * rows * arms > _MOST_STATES:
                run.notes.append(
                    f"{name}: expected at most {_MOST_STATES:,} arms in all samples; line "
                    f"{position} and what comes after it are left out"
                )
                return
            run.samples.append(line)
        elif isinstance(line, Abandon):
            run.abandons.append(line)
        else:
            run.end = line


def read_run(folder: Path, summary: Mapping[str, Any] | None) -> Run:
    """Everything the page needs of a search.

    Raises:
        ReportError: ``folder`` is not a run.
    """
    run = Run(folder, *read_config(folder), label=folder.name)
    run.environment = read_optional(run, "env.json")
    run.split = read_optional(run, "split.json")
    run.summary = dict(summary) if summary is not None else read_optional(run, "summary.json")
    check_config(run)
    _read_bandit(run)
    for position, value in read_lines(run, "metrics.jsonl"):
        line = parse(run, "metrics.jsonl", position, Metrics, value)
        if line is not None:
            run.metrics.append(line)
    if isinstance(run.start, Start) and run.history is not None and not run.history.explained:
        run.notes.append(
            f"bandit.jsonl: m and n of abandoned arms are not those of Eq. 4.11 with the logged "
            f"rewards (policy {run.start.settings.policy}); arms over time "
            "are drawn with Eq. 4.11"
        )
    return run
