"""Pruning by Optuna."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fastbandit.callbacks.base import Callback, RunInfo, numbers

if TYPE_CHECKING:
    import optuna

__all__ = ["OptunaPruning"]


class OptunaPruning(Callback):
    """Reports a metric of each epoch to a trial, and ends the run when the trial is to be pruned.

    Args:
        trial: of the study whose objective calls ``search`` or ``retrain``.
        metric: a field of ``metrics.jsonl``. Epochs without it are not reported.
            Steps count from 0, as Optuna's pruners assume of them.

    Raises:
        ImportError: Optuna is not installed.
    """

    def __init__(self, trial: optuna.Trial, metric: str = "robust_accuracy") -> None:
        import optuna

        self.trial, self.metric = trial, metric
        self._pruned = optuna.TrialPruned
        self._seen: set[str] = set()

    def on_epoch(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        """Raises ``optuna.TrialPruned``, which Optuna takes for what it is."""
        values = numbers(metrics)
        self._seen |= set(metrics)
        if self.metric not in values:
            return
        epoch = int(metrics["epoch"])
        self.trial.report(values[self.metric], epoch)
        if self.trial.should_prune():
            raise self._pruned(
                f"pruned after epoch {epoch + 1}: {self.metric} {values[self.metric]:.4f}"
            )

    def on_end(self, run: RunInfo, summary: Mapping[str, Any]) -> None:
        if self._seen and self.metric not in self._seen:
            raise ValueError(
                f"OptunaPruning: expected a field of {run.path / 'metrics.jsonl'} as metric: "
                f"{', '.join(sorted(self._seen))}; got {self.metric!r}"
            )
