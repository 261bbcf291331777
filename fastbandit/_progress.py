"""Progress of a search: live on a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fastbandit.bandit import AntiBandit

__all__ = ["Progress", "format_seconds"]

Show = Callable[[dict[str, Any]], None]


def format_seconds(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


class Progress:
    """Shows a search on standard error, so that standard output holds the result alone.

    Args:
        interval: seconds between two lines where standard error is no terminal.
    """

    def __init__(self, interval: float = 5.0) -> None:
        self.interval = interval
        self.console: Console | None = Console(stderr=True, highlight=False)

    @classmethod
    def silent(cls) -> Progress:
        """A progress that shows nothing, for use from Python."""
        progress = cls()
        progress.console = None
        return progress

    def note(self, text: str) -> None:
        """One line that stays."""
        if self.console is not None:
            self.console.print(f"note: {text}", markup=False, soft_wrap=True)

    def result(self, text: str) -> None:
        """One line with a result, that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def running(
        self, path: Path, space: str, rows: int, bandit: AntiBandit, *, resumed: bool
    ) -> Iterator[Show]:
        """Within the context, the yielded function is called with the metrics of each epoch."""
        if self.console is None:
            yield lambda metrics: None
            return
        done = bandit.trained
        begins = f"goes on after epoch {done}" if resumed and done else "begins"
        self.console.print(
            f"search {begins}: {space}, {rows} edges, {bandit.arms_left} arms each, "
            f"{bandit.total_samples} epochs; run folder {path}",
            markup=False,
            soft_wrap=True,
        )
        started, first = time.monotonic(), done

        def to_go() -> float:
            finished = bandit.trained - first
            rest = bandit.total_samples - bandit.trained
            return (time.monotonic() - started) / max(finished, 1) * rest

        if self.console.is_terminal:
            with Live(console=self.console, refresh_per_second=4, transient=True) as live:
                yield lambda metrics: live.update(_panel(metrics, bandit, to_go()))
            return
        last = -self.interval

        def line(metrics: dict[str, Any]) -> None:
            nonlocal last
            now = time.monotonic() - started
            if now - last < self.interval and not bandit.finished:
                return
            last = now
            assert self.console is not None
            self.console.print(
                f"epoch {bandit.trained}/{bandit.total_samples}  arms {bandit.arms_left}  "
                f"loss {metrics['loss']:.3f}  clean {100 * metrics['clean_accuracy']:.1f} %  "
                f"robust {100 * metrics['robust_accuracy']:.1f} %  "
                f"{metrics['images_per_second']:.0f} images/s  "
                f"to go {format_seconds(to_go())}",
                markup=False,
                soft_wrap=True,
            )

        yield line

    @contextmanager
    def training(
        self,
        path: Path,
        title: str,
        epochs: int,
        done: int,
        *,
        resumed: bool,
        what: str = "retraining",
    ) -> Iterator[Show]:
        """As :meth:`running`, for the training of one network over a number of epochs."""
        console = self.console
        if console is None:
            yield lambda metrics: None
            return
        begins = f"goes on after epoch {done}" if resumed and done else "begins"
        console.print(
            f"{what} {begins}: {title}, {epochs} epochs; run folder {path}",
            markup=False,
            soft_wrap=True,
        )
        started = time.monotonic()

        def said(metrics: dict[str, Any]) -> str:
            finished = metrics["epoch"] + 1 - done
            rest = (time.monotonic() - started) / finished * (epochs - metrics["epoch"] - 1)
            accuracy = (
                ""
                if metrics["clean_accuracy"] is None
                else f"clean {100 * metrics['clean_accuracy']:.1f} %  "
                f"robust {100 * metrics['robust_accuracy']:.1f} %  "
            )
            return (
                f"epoch {metrics['epoch'] + 1}/{epochs}  loss {metrics['loss']:.3f}  {accuracy}"
                f"{metrics['images_per_second']:.0f} images/s  to go {format_seconds(rest)}"
            )

        if console.is_terminal:
            bar = ProgressBar(epochs, done, width=50)
            with Live(console=console, refresh_per_second=4, transient=True) as live:

                def panel(metrics: dict[str, Any]) -> None:
                    bar.update(metrics["epoch"] + 1)
                    table = Table.grid()
                    table.add_row(Text(said(metrics)))
                    table.add_row(bar)
                    live.update(table)

                yield panel
            return
        last = -self.interval

        def line(metrics: dict[str, Any]) -> None:
            nonlocal last
            now = time.monotonic() - started
            if now - last < self.interval and metrics["epoch"] + 1 < epochs:
                return
            last = now
            assert console is not None
            console.print(said(metrics), markup=False, soft_wrap=True)

        yield line


def _panel(metrics: dict[str, Any], bandit: AntiBandit, to_go: float) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in (
        ("epoch", f"{bandit.trained} of {bandit.total_samples}, {format_seconds(to_go)} to go"),
        ("edges", f"{bandit.mean.shape[0]}, {bandit.arms_left} arms left on each"),
        ("loss", f"{metrics['loss']:.3f} on attacked images"),
        (
            "validation",
            f"clean {100 * metrics['clean_accuracy']:.1f} %   "
            f"robust {100 * metrics['robust_accuracy']:.1f} %",
        ),
        ("speed", f"{metrics['images_per_second']:.0f} images/s in training"),
    ):
        table.add_row(Text(name, style="dim"), value)
    table.add_row("", ProgressBar(bandit.total_samples, bandit.trained, width=50))
    return table
