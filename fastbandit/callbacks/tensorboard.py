"""TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbandit.callbacks.base import Callback, RunInfo, numbers, shown_epoch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoard"]


class TensorBoard(Callback):
    """Writes scalars for ``tensorboard --logdir``; needs ``pip install tensorboard``.

    Args:
        folder: where event files go; None: ``tensorboard`` in the run folder. Epochs that an
            interruption makes the run repeat replace what was written of them.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        # Here, and not after an epoch of a run.
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._writer: SummaryWriter | None = None
        self._make = SummaryWriter

    def on_start(self, run: RunInfo) -> None:
        self._close()
        # Also at the beginning: an earlier run, replaced by --force, may have left its events.
        self._writer = self._make(
            str(self.folder or run.path / "tensorboard"), purge_step=run.epoch + 1
        )
        if run.epoch == 0:
            settings = json.dumps(run.config, indent=1, default=str)
            self._writer.add_text("config", "\n".join(f"    {x}" for x in settings.splitlines()))

    def on_epoch(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        assert self._writer is not None
        for name, value in numbers(metrics).items():
            self._writer.add_scalar(name, value, shown_epoch(metrics))
        self._writer.flush()

    def on_end(self, run: RunInfo, summary: Mapping[str, Any]) -> None:
        self._close()

    def on_error(self, run: RunInfo, error: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
