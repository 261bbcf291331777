"""What is told of a run while it goes on, and whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Callback", "RunInfo", "flat", "shown_epoch"]


@dataclass(frozen=True)
class RunInfo:
    """A run that begins or goes on.

    Attributes:
        command: ``search`` or ``retrain``.
        path: its folder.
        run_id: names its configuration.
        config: its settings, as ``config.yaml`` has them.
        epoch: epochs that are done, each of them a line of ``metrics.jsonl``; above 0 the run goes
            on. What was told of these epochs stays; those after them are told (again).
    """

    command: str
    path: Path
    run_id: str
    config: Mapping[str, Any]
    epoch: int


class Callback:
    """Is told of a run. A subclass has those methods that it needs.

    They are called in the first process of a run alone, one after the other. What one of them
    raises ends the run, which goes on from its last epoch when it is started again.
    """

    def on_start(self, run: RunInfo) -> None:
        """The run begins, or goes on after an interruption. Not called of one that is finished."""

    def on_epoch(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        """An epoch is over, and stored: an interruption from now on does not repeat it.

        Args:
            metrics: the line of ``metrics.jsonl``; ``epoch`` counts from 0, as in that file. What
                is shown counts from 1: :func:`shown_epoch`.
        """

    def on_end(self, run: RunInfo, summary: Mapping[str, Any]) -> None:
        """The run is finished.

        Args:
            summary: what ``summary.json`` holds.
        """

    def on_error(self, run: RunInfo, error: BaseException) -> None:
        """The run ends by an error or an interruption (KeyboardInterrupt). It can go on later."""


def shown_epoch(metrics: Mapping[str, Any]) -> int:
    """The number of an epoch as terminal and report have it, and tables and charts here: from 1."""
    return int(metrics["epoch"]) + 1


def flat(
    values: Mapping[str, Any] | Sequence[Any], separator: str = ".", prefix: str = ""
) -> dict[str, Any]:
    """Nested mappings as one, keys joined by ``separator``; sequences are left as they are."""
    entries: dict[str, Any] = {}
    if not isinstance(values, Mapping):
        return {prefix: values}
    for key, value in values.items():
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            entries |= flat(value, separator, name)
        else:
            entries[name] = value
    return entries


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an epoch; flags count as 0 and 1, texts and what is unknown are left out."""
    return {
        name: float(value)
        for name, value in flat(metrics).items()
        if name != "epoch" and isinstance(value, bool | int | float)
    }
