"""Progress of a run: live on a terminal, one line every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars
from rich.text import Text

__all__ = ["Progress", "Update", "accuracies", "format_seconds"]

#: Is called with the number of steps that are done and a line that describes the last one.
Update = Callable[[int, str], None]


def format_seconds(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    minutes, second = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{second:02}" if hours else f"{minutes}:{second:02}"


def accuracies(metrics: dict[str, Any]) -> str:
    """The figures of an epoch as part of a line, without those that were not measured."""
    parts = (
        ("loss", "loss {:.3f}", 1),
        ("clean_accuracy", "clean {:.1f} %", 100),
        ("robust_accuracy", "robust {:.1f} %", 100),
        ("images_per_second", "{:.0f} images/s", 1),
    )
    return "  ".join(
        text.format(factor * metrics[name])
        for name, text, factor in parts
        if metrics.get(name) is not None
    )


class _ToGo(TimeRemainingColumn):
    """What is left, and says so."""

    def render(self, task: Task) -> Text:
        return Text.assemble("to go ", super().render(task))


class _InAll(TimeElapsedColumn):
    """The time since the beginning of all steps, and says so."""

    def render(self, task: Task) -> Text:
        return Text.assemble(super().render(task), " in all")


class Progress:
    """Shows a run on standard error, so that standard output holds the result alone.

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
        """One line that stays, about something that the user did not ask for."""
        self.line(f"note: {text}")

    def line(self, text: str) -> None:
        """One line that stays."""
        if self.console is not None:
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def working(self, begins: str) -> Iterator[Callable[[str], None]]:
        """Show that something goes on whose steps are not counted; the yielded function says what.

        Args:
            begins: a line that says what begins.
        """
        console = self.console
        if console is None:
            yield lambda text: None
            return
        self.line(begins)
        if not console.is_terminal:
            yield lambda text: None
            return
        with Bars(self._spinner(), TextColumn("{task.description}"), TimeElapsedColumn(),
                  console=console) as bars:  # fmt: skip
            task = bars.add_task("", total=None)
            yield lambda text: bars.update(task, description=escape(text), refresh=True)

    def _spinner(self) -> SpinnerColumn:
        """Turns also while a step takes long."""
        assert self.console is not None
        return SpinnerColumn("line" if self.console.options.ascii_only else "dots")

    @contextmanager
    def steps(
        self, begins: str, total: int, done: int = 0, *, alike: bool = True
    ) -> Iterator[Update]:
        """Show how far a number of steps has come; the yielded function is called after each.

        Args:
            begins: a line that says what begins.
            total: the number of steps.
            done: those that an earlier process did.
            alike: whether all take about as long, so that it can be told how long the rest takes;
                else the time since the beginning is shown.
        """
        console = self.console
        if console is None:
            yield lambda now, text: None
            return
        self.line(begins)
        if console.is_terminal:
            # What was shown last stays, also when it is interrupted.
            clock = _ToGo(compact=True) if alike else _InAll()
            with Bars(
                self._spinner(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                clock,
                console=console,
                refresh_per_second=4,
            ) as bars:
                task = bars.add_task("", total=total, completed=done)
                yield lambda now, text: bars.update(
                    task, completed=now, description=escape(text), refresh=True
                )
            return
        started, last = time.monotonic(), -self.interval

        def update(now: int, text: str) -> None:
            nonlocal last
            elapsed = time.monotonic() - started
            if elapsed - last < self.interval and now < total:
                return
            last = elapsed
            if not alike:
                self.line(f"{text}  {format_seconds(elapsed)} in all")
                return
            to_go = elapsed / max(now - done, 1) * (total - now)
            self.line(f"{text}  to go {format_seconds(to_go)}")

        yield update
