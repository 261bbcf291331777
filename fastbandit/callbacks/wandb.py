"""Weights & Biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastbandit.callbacks.base import Callback, RunInfo, numbers, shown_epoch

__all__ = ["WandB"]


class WandB(Callback):
    """Sends settings and metrics to Weights & Biases; needs ``pip install wandb``.

    A run has there the name of its folder, and an id made of that and of its configuration, so that
    one that goes on after an interruption goes on there too.

    Args:
        settings: more arguments of ``wandb.init``, such as ``project`` (default ``fastbandit``),
            ``entity``, ``mode="offline"``.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, **settings: Any) -> None:
        import wandb

        self._wandb, self._settings = wandb, {"project": "fastbandit", **settings}
        self._run: Any = None

    def on_start(self, run: RunInfo) -> None:
        self._run = self._wandb.init(
            **{
                "name": run.path.name,
                "id": f"{run.path.name}-{run.run_id[:12]}",
                "resume": "allow",
                "config": dict(run.config),
                "dir": str(run.path),
                "job_type": run.command,
                **self._settings,
            }
        )

    def on_epoch(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        self._run.log(numbers(metrics), step=shown_epoch(metrics))

    def on_end(self, run: RunInfo, summary: Mapping[str, Any]) -> None:
        self._run.finish()

    def on_error(self, run: RunInfo, error: BaseException) -> None:
        if self._run is not None:
            self._run.finish(exit_code=1)
