"""How one sampled path is trained and scored: what the search asks of an algorithm."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from fastbandit.distributed import Team
from fastbandit.training import Engine

__all__ = ["Path", "PathResult", "Trial", "TrialResult"]


@dataclass(frozen=True)
class Path:
    """The path that the supernet is set to on this process.

    Attributes:
        choices: the arms of all paths that are computed at a time, [rows] each; with one process
            that trains paths one after the other this one's is the first.
        modules, parameters: those of the path alone.
        team: the processes, where there are several; each may have another path.
    """

    choices: list[Tensor]
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    team: Team | None
    engine: Engine

    @property
    def paths(self) -> int:
        """How many paths are computed at a time."""
        return 1 if self.team is None else self.team.paths

    @property
    def place(self) -> int:
        """Which of them is this process's."""
        return 0 if self.team is None else self.team.path

    @property
    def scope(self) -> dict[str, Any]:
        """Bounds a training or an evaluation to the path."""
        return {
            "modules": self.modules,
            "parameters": self.parameters,
            "team": self.team,
            "engine": self.engine,
        }


@dataclass(frozen=True)
class PathResult:
    """What is known of a path after it was trained or evaluated.

    Attributes:
        score: what the bandit is credited with.
        log: figures for the path's line in ``bandit.jsonl``: ``clean_accuracy`` and
            ``robust_accuracy``, or none.
        metrics: figures for its line in ``metrics.jsonl``; progress shows ``loss``,
            ``clean_accuracy`` and ``robust_accuracy`` (the latter two may be None).
    """

    score: float
    log: dict[str, float]
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrialResult:
    """What is known of all paths that were trained at the same time, on every process.

    Attributes:
        paths: one for each path.
        metrics: figures that they share; progress shows ``images_per_second``.
        events: lines for ``bandit.jsonl``.
    """

    paths: list[PathResult]
    metrics: dict[str, Any]
    events: list[dict[str, Any]]


class Trial(Protocol):
    """One way to train and to score a path. The search calls:

    0. :meth:`prepare` until it returns None, before the first path;
    1. for each path that it draws :meth:`train`, or only :meth:`evaluate` for a path that is
       scored with the weights as they are;
    2. at the end :meth:`measure`, on the path found.
    """

    @property
    def paths_at_a_time(self) -> int:
        """Paths that are drawn at a time, where each process does not have one of its own."""

    @property
    def tunes(self) -> bool:
        """Whether the path found is trained on with the shared weights, at the end."""

    def prepare(self, done: int) -> dict[str, Any] | None:
        """Do one step of what comes before the first path; returns its figures for
        ``metrics.jsonl``, or None where nothing is left to do.

        Args:
            done: epochs of it that are done: steps whose ``phase`` was ``supernet``.
        """

    def train(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        """Train the path for one epoch and score it.

        Args:
            number: the epoch of the first of the paths computed at a time.
            rate: the learning rate.
            samples: paths that the bandit was credited with so far; for the log.
        """

    def tune(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        """Train the path found for one more epoch, with the shared weights; as :meth:`train`."""

    def evaluate(self, path: Path, number: int) -> list[PathResult]:
        """Score a path with the weights as they are; a result for each path."""

    def measure(self, path: Path, *, trained: bool) -> dict[str, Any]:
        """The figures of the path found, for the summary: ``final`` and ``test``, each with
        ``split``, ``n``, ``clean_accuracy``, ``robust_accuracy`` and ``attack``; None without test
        images.

        Args:
            trained: whether its weights are those that the last epoch has trained.
        """

    def describe(self) -> dict[str, Any]:
        """What a genotype says about how its paths were scored."""

    def summary(self) -> dict[str, Any]:
        """What the summary of the search says about the trial."""

    def state(self) -> dict[str, Any]:
        """Plain values: what :meth:`restore` needs."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
