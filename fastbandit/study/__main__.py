"""``python -m fastbandit.study``: do policies find better arms, and do better networks follow?"""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastbandit import space
from fastbandit._program import in_browser
from fastbandit.command import Command, CommonOptions, Request
from fastbandit.config import ConfigError
from fastbandit.distributed import Group
from fastbandit.runs.progress import Progress
from fastbandit.study.config import PRESETS, StudyConfig
from fastbandit.study.run import study
from fastbandit.study.tables import format_tables
from fastbandit.study.tabular.run import plan

__all__ = ["main", "parse"]


@dataclass(frozen=True)
class Options(CommonOptions):
    """What to do with the configuration; none of it changes a result."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: simulated (the default), smoke, tabular, smoke-tabular, digits,
    digits-small, smoke-digits, compare-digits, compare-fashion, compare-smoke"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """run folder; default: an unfinished study of this configuration below runs/, else a new one"""
    force: bool = False
    """replace a finished study, or one of another configuration, in --out"""
    until: Literal["pilot", "freeze", "run", "open"] = "open"
    """the last stage of a comparison: pilot, freeze (the protocol), run (all networks), open (the
    test images)"""
    download: bool = False
    """fetch the images that --data names (mnist, fashion-mnist, cifar10) where they are not yet"""
    dry_run: bool = False
    """say what there is to do, and stop"""


class StudyCommand(Command[StudyConfig]):
    """Compare policies."""

    name = "study"
    config = StudyConfig
    options = Options
    presets = PRESETS
    several_processes = False
    description = (
        "Compare the policies of the search with each other and with chance: on simulated "
        "searches, with --tabular.file on a table of true accuracies, and with --data on real "
        "searches."
    )

    def run(
        self, request: Request[StudyConfig], progress: Progress, group: Group | None
    ) -> tuple[Path, dict[str, Any]]:
        options = request.options
        if options.until != "open" and not request.config.compare.searches:
            raise ConfigError(
                f"--until: expected a comparison (--compare.searches N), which has a stage "
                f"{options.until}; this study has none"
            )
        with progress.working(f"study {request.config.name}"):
            return study(
                request.config,
                request.out,
                force=options.force,
                until=options.until,
                log=progress.line,
            )

    def estimate(self, request: Request[StudyConfig], progress: Progress) -> dict[str, Any]:
        return _plan(request.config)

    def show_estimate(self, result: dict[str, Any]) -> None:
        for name, count in result.items():
            print(f"{name.replace('_', ' '):<20} {count:,}")

    def show(self, path: Path, result: dict[str, Any]) -> None:
        print(format_tables(result))
        print(f"run folder: {path}")
        charts = path / "study.html"
        if charts.is_file():
            print(f"charts: {charts}")
            print(f"next: {in_browser(charts)}   (shows them)")


def _plan(config: StudyConfig) -> dict[str, int]:
    """How many pieces there are to make."""
    if config.compare.searches:
        return _plan_compare(config)
    settings, real = len(list(config.simulated.settings())), config.real
    searches = epochs = networks = 0
    if config.data is not None:
        searches = real.seeds * len(real.policies)
        bandits = [config.search_of(entry, 0).make_bandit() for entry in real.policies]
        epochs = real.seeds * sum(bandit.total_samples for bandit in bandits)
        networks = (searches + real.random) * real.repeats
    return {
        "simulated_settings": settings,
        "simulated_searches": settings * config.simulated.seeds,
        **(plan(config.tabular) if config.tabular.file is not None else {}),
        "searches": searches,
        "search_epochs": epochs,
        "networks": networks,
        "network_epochs": networks * real.epochs,
    }


def _plan_compare(config: StudyConfig) -> dict[str, int]:
    """The same of a comparison; how many candidates a search's cost buys is known when it ran."""
    compare, arms = config.compare, config.compare.arms
    used = config.search_of(compare.policy, 0)
    single = ("largest" in arms) + ("one-operation" in arms) * space.get(used.space).arms
    networks = (1 + len(compare.tested)) * compare.searches + single
    pilot = compare.pilot.networks * compare.pilot.repeats
    return {
        "pilot_trainings": pilot,
        "pilot_epochs": pilot * compare.epochs,
        "searches": compare.searches,
        "search_epochs": compare.searches * used.make_bandit().total_samples,
        "networks": networks,
        "trainings": networks * compare.repeats,
        "training_epochs": networks * compare.repeats * compare.epochs,
        "attacked": networks * compare.repeats,
    }


_COMMAND = StudyCommand()
parse = _COMMAND.parse
main = _COMMAND.main

if __name__ == "__main__":
    raise SystemExit(main())
