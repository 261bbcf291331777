"""``bandit.jsonl`` of a search with CP-NAS: its lines, and the bandit that they lead to."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from fastbandit.bandit.log import (
    Abandon,
    BanditLine,
    End,
    Sample,
    expect_same,
    prune,
    read_line,
)
from fastbandit.childparent.bandit import ChildParent, ChildParentSettings, Gap

__all__ = ["ChildParentSample", "ChildParentStart", "replay"]

Accuracy = Annotated[float, Field(ge=0, le=1)]

_MOST_REPLAYED = 1_000_000  # arms of a log, which may be a stranger's


class ChildParentStart(BanditLine):
    """The first line of a search with CP-NAS: what it takes to replay the rest."""

    event: Literal["start"] = "start"
    algorithm: Literal["cp-nas"]
    space: str
    operations: Annotated[list[str], Field(min_length=1)]
    edges: Annotated[list[str], Field(min_length=1)]
    rounds: int
    beta: float
    gap: Gap
    carry: bool
    seed: int

    @classmethod
    def of(
        cls,
        space: str,
        operations: Sequence[str],
        edges: Sequence[str],
        settings: ChildParentSettings,
        seed: int,
    ) -> ChildParentStart:
        """The line of a search that begins."""
        return cls(
            algorithm="cp-nas",
            space=space,
            operations=list(operations),
            edges=list(edges),
            **{**dataclasses.asdict(settings), "beta": float(settings.beta)},
            seed=seed,
        )

    def bandit(self) -> ChildParent:
        """The bandit of the search, before its first path.

        Raises:
            ValueError: a setting out of its range.
        """
        arms = len(self.edges) * len(self.operations)
        if arms > _MOST_REPLAYED:
            raise ValueError(f"expected at most {_MOST_REPLAYED:,} arms, got {arms:,}")
        return ChildParent(len(self.edges), len(self.operations), self.settings, seed=self.seed)

    @property
    def settings(self) -> ChildParentSettings:
        """The settings, not checked."""
        return ChildParentSettings(self.rounds, self.beta, self.gap, self.carry)


class ChildParentSample(Sample):
    """A path that was credited, with what its score is made of: the accuracies of child and parent,
    and what is taken off for its latency, where that counts."""

    child_accuracy: Accuracy
    parent_accuracy: Accuracy
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


def replay(lines: Iterable[Mapping[str, Any]]) -> ChildParent:
    """Run the bandit again from its log and check that the log explains itself.

    Every recorded path is credited with its two accuracies; the score has to be the recorded one,
    and where the schedule says that arms are abandoned, the rule has to abandon what was recorded.
    Which path the seed would have drawn is not compared: the record decides.

    Args:
        lines: the parsed lines of ``bandit.jsonl``, in order: a :class:`ChildParentStart`, then
            :class:`ChildParentSample`, ``abandon`` (one for each row), ``attack`` (not looked at)
            and ``end``. A log that stops early is a run that is not finished.

    Returns:
        The bandit after the last line.

    Raises:
        ValueError: a line that is not what the run leads to, with its number (from 1).
    """
    bandit: ChildParent | None = None
    start: ChildParentStart | None = None
    expected: dict[int, Abandon] = {}
    ended = False
    for number, line in enumerate(lines, start=1):
        event = line.get("event") if isinstance(line, Mapping) else None
        try:
            if bandit is None or start is None:
                if event != "start":
                    raise ValueError(f"event: expected start, got {event!r}")
                start = read_line(ChildParentStart, line)
                bandit = start.bandit()
            elif ended:
                raise ValueError("nothing may follow the end event")
            elif event == "abandon":
                if not expected:
                    abandoned = prune(bandit, start.edges, start.operations)
                    expected = {one.row: one for one in abandoned}
                _check_abandon(read_line(Abandon, line), expected)
            elif expected:
                raise ValueError(f"expected abandon events of rows {sorted(expected)}, got {event}")
            elif event == "sample":
                sample = read_line(ChildParentSample, line)
                expect_same("sample", bandit.samples, sample.sample)
                accuracies = (sample.child_accuracy, sample.parent_accuracy)
                z = bandit.repeat(sample.choice, *accuracies, sample.penalty)
                expect_same("reward", z, sample.reward)
            elif event == "end":
                end = read_line(End, line)
                expect_same("sample", bandit.samples, end.sample)
                if bandit.due:
                    raise ValueError("expected abandon events, got end")
                expect_same("choice", bandit.final().tolist(), end.choice)
                ended = True
            elif event not in ("attack", "reward"):
                raise ValueError(
                    f"event: expected sample, abandon, attack, reward or end, got {event!r}"
                )
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"bandit log, line {number}: {error}") from error
    if bandit is None:
        raise ValueError("bandit log: no start event, the log is empty")
    return bandit


def _check_abandon(stated: Abandon, expected: dict[int, Abandon]) -> None:
    if stated.row not in expected:
        raise ValueError(f"row: expected one of {sorted(expected)}, got {stated.row!r}")
    wanted = expected.pop(stated.row)
    for name in type(stated).model_fields:
        if name in stated.model_fields_set:
            expect_same(name, getattr(wanted, name), getattr(stated, name))
