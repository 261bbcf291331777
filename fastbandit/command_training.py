"""The shell of commands that train for epochs: callbacks, forks, several seeds."""

from __future__ import annotations

import dataclasses
import json
import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import torch
import tyro

from fastbandit._files import json_value
from fastbandit._latest import newest
from fastbandit._program import program
from fastbandit.callbacks.named import make
from fastbandit.command import Command, Request, RunOptions, take_option
from fastbandit.config import ConfigError, to_plain
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.fork import fork
from fastbandit.runs.processes import Call, run_calls
from fastbandit.runs.progress import Progress
from fastbandit.runs.training import TrainingConfig

if TYPE_CHECKING:
    from fastbandit.callbacks import Callback

__all__ = ["TrainingCommand", "TrainingOptions"]

T = TypeVar("T", bound=TrainingConfig)

#: That many runs are no slip of the keyboard.
MOST_SEEDS = 1000


@dataclass(frozen=True)
class TrainingOptions(RunOptions):
    """Options of a command that trains for epochs."""

    fork: Annotated[str | None, tyro.conf.arg(metavar="RUN")] = None
    """go on from the last epoch of this run with other settings, in a folder of its own (--out);
    all other settings are those of the run"""
    callbacks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """who is told of the epochs: csv (metrics.csv in the run folder), tensorboard, mlflow, wandb,
    or code of your own, my_package.my_module:MyCallback"""

    seeds: Annotated[str | None, tyro.conf.arg(metavar="N,N-N,...")] = None
    """run once for each of these seeds, such as 0-4 or 0,2,5-7, in folders seed-N of --out; one
    after the other, or one on each GPU at a time where there are several"""

    def seed_list(self) -> list[int]:
        """The seeds.

        Raises:
            ConfigError: they are none, or one comes twice.
        """
        seeds: list[int] = []
        for part in (self.seeds or "").split(","):
            first, dash, last = (word.strip() for word in part.partition("-"))
            if not first.isdecimal() or (dash and not last.isdecimal()):
                break
            low, high = int(first), int(last or first)
            if not 0 <= high - low < MOST_SEEDS - len(seeds):
                break
            seeds += range(low, high + 1)
        else:
            if len(set(seeds)) == len(seeds):
                return seeds
        raise ConfigError(
            f"--seeds: expected at most {MOST_SEEDS} different seeds such as 0-4 or 0,2,5-7, got "
            f"{self.seeds!r}"
        )

    def made(self) -> list[Callback]:
        """The callbacks.

        Raises:
            ConfigError: there is none of a name, or its library is not installed.
        """
        try:
            return make(self.callbacks)
        except ValueError as error:
            raise ConfigError(f"--{error}") from error


class TrainingCommand(Command[T]):
    """A command that trains for epochs."""

    #: What it writes.
    files: ClassVar[RunFiles]
    #: Settings that may differ from those of a run that is forked.
    free: ClassVar[tuple[str, ...]]

    def prepare(self, arguments: Sequence[str]) -> Request[T]:
        name = take_option(arguments, "fork")
        return super().prepare(arguments) if name is None else self._forked(name, arguments)

    def begin(self, request: Request[T], arguments: Sequence[str], many: bool) -> Request[T] | None:
        options = request.options
        for name in ("fork", "seeds"):
            if many and getattr(options, name) is not None:
                raise ConfigError(
                    f"--{name}: expected one process, got several of torchrun; what one process "
                    "has begun goes on there with --resume"
                )
        if options.seeds is not None:
            self._run_seeds(request, arguments)
            return None
        return request if options.fork is None else self._fork(request)

    def _forked(self, fork: str, arguments: Sequence[str]) -> Request[T]:
        """The request of ``--fork``: the settings stored there, and those that are given."""
        for name in ("resume", "preset", "config"):
            if take_option(arguments, name) is not None:
                raise ConfigError(
                    f"--fork takes its settings from {fork}: expected the others as flags of their "
                    f"own, got --{name}"
                )
        folder = newest(fork, self._own, f"a folder of {self.name}", ConfigError) or Path(fork)
        request = self.parse(arguments, self.stored(folder))
        options = dataclasses.replace(request.options, fork=str(folder))
        return dataclasses.replace(request, options=options)

    def _fork(self, request: Request[T]) -> Request[T]:
        """Make the folder that ``--fork`` asks for, unless it is there and goes on; names it."""
        source = Path(request.options.fork)
        plain = json_value(to_plain(self.resolved(request)))
        if request.out is not None:
            path = Path(request.out)
            begun = (path / "config.yaml").is_file() and RunFolder.read_config(path) == plain
        else:
            unfinished = RunFolder.find_unfinished(Path("runs"), plain, self.files.result)
            begun = unfinished is not None and not unfinished.samefile(source)
            path = (
                unfinished if unfinished and begun else RunFolder.fresh_path(Path("runs"), "fork")
            )
        if not begun:
            fork(source, path, plain, self.files, self.free)
        return dataclasses.replace(request, out=str(path))

    # Several seeds.

    @abstractmethod
    def job(self, request: Request[T], name: str) -> Call:
        """The run of a request as a call that another process can make; it returns ``run`` and
        ``result``."""

    @abstractmethod
    def figures(self, result: dict[str, Any]) -> dict[str, float]:
        """Clean and robust accuracy of a result, by name."""

    def _run_seeds(self, request: Request[T], arguments: Sequence[str]) -> None:
        """One run for each seed; prints them all, their mean and standard deviation."""
        options = request.options
        seeds = options.seed_list()
        for name in ("resume", "fork", "seed"):
            if take_option(arguments, name) is not None:
                raise ConfigError(f"--seeds: expected without --{name}")
        requests = [
            dataclasses.replace(
                request,
                config=dataclasses.replace(request.config, seed=seed),
                out=None if request.out is None else str(Path(request.out) / f"seed-{seed}"),
            )
            for seed in seeds
        ]
        device = torch.device(self.resolved(requests[0]).device)
        gpus = torch.cuda.device_count() if device.type == "cuda" and device.index is None else 1
        if gpus > 1 and options.callbacks:
            raise ConfigError(
                f"--callbacks: expected none with --seeds on {gpus} GPUs, whose runs are in "
                "processes of their own; --device cuda:0 runs them here"
            )
        results: dict[int, tuple[Path, dict[str, Any]]] = {}
        progress = Progress()
        if gpus == 1:
            for position, one in enumerate(requests):
                progress.line(f"seed {seeds[position]} ({position + 1} of {len(seeds)})")
                results[position] = self.run(one, progress, None)
        else:

            def done(position: int, made: dict[str, Any]) -> None:
                results[position] = (Path(made["run"]), made["result"])
                progress.line(f"seed {seeds[position]} ({len(results)} of {len(seeds)} are done)")

            calls = [
                self.job(one, f"seed {seed}") for one, seed in zip(requests, seeds, strict=True)
            ]
            run_calls(calls, gpus, done)
        self._show_seeds(seeds, [results[position] for position in range(len(seeds))], options.json)

    def _show_seeds(
        self, seeds: Sequence[int], runs: Sequence[tuple[Path, dict[str, Any]]], as_json: bool
    ) -> None:
        rows = [self.figures(result) for _, result in runs]
        names = list(rows[0])
        columns = {name: [row[name] for row in rows] for name in names}
        mean = {name: statistics.fmean(values) for name, values in columns.items()}
        several = len(rows) > 1
        sd = {n: statistics.stdev(values) if several else None for n, values in columns.items()}
        if as_json:
            listed = [
                {"seed": seed, self.folder_key: str(path), **result}
                for seed, (path, result) in zip(seeds, runs, strict=True)
            ]
            print(json.dumps({"seeds": listed, "mean": mean, "sd": sd}))
            return
        print(f"{'seed':<12}" + "".join(f"{name:>18}" for name in names) + "   run folder")
        for seed, row, (path, _) in zip(seeds, rows, runs, strict=True):
            shares = "".join(f"{100 * row[name]:>16.2f} %" for name in names)
            print(f"{seed:<12}{shares}   {path}")
        print(f"{'mean':<12}" + "".join(f"{100 * mean[name]:>16.2f} %" for name in names))
        if several:
            # Of the mean of n runs it is the square root of n smaller.
            texts = "".join(f"{100 * value:>16.2f} %" for value in sd.values() if value is not None)
            print(f"{'sd':<12}{texts}")
        folders = " ".join(str(path) for path, _ in runs)
        print(f"one page about all: {program('report')} {folders}")
