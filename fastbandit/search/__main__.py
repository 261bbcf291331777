"""``python -m fastbandit.search``: the anti-bandit search for a robust architecture."""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import tyro

from fastbandit._program import program
from fastbandit.command import Request, base_config, take_option
from fastbandit.command_training import TrainingCommand, TrainingOptions
from fastbandit.config import ConfigError, merge
from fastbandit.distributed import Group
from fastbandit.runs.processes import Call, cores
from fastbandit.runs.progress import Progress
from fastbandit.runs.training import FREE
from fastbandit.search.adversarial import Adversarial
from fastbandit.search.config import PRESETS, RECOMMENDED, SearchConfig
from fastbandit.search.estimate import dry_run
from fastbandit.search.networks import FOUND, REFERENCE, network_name
from fastbandit.search.run import FILES, run_job, search

__all__ = ["main", "parse"]


@dataclass(frozen=True)
class Options(TrainingOptions):
    """What to do with the configuration; none of it changes a result."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: digits (the default where no --data is given), digits-full, smoke,
    mnist, cifar10, and for 1-bit networks digits-binary, digits-binary-robust, mnist-binary"""
    dry_run: bool = False
    """measure the widest path, print memory and time that the search will take, and stop"""
    processes: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """networks that are trained alone at a time, to score paths or in the tournament; default: one
    for each core, or for each GPU"""


class SearchCommand(TrainingCommand[SearchConfig]):
    """Search for an architecture."""

    name = "search"
    config = SearchConfig
    options = Options
    presets = PRESETS
    files = FILES
    # Not the attack: its rewards are already in the means.
    free = (*FREE, "learning_rate_min")
    #: What trains and scores a path, a :class:`~fastbandit.search.trial.Trial`.
    trial: ClassVar[type[Any]] = Adversarial
    description = (
        "Anti-bandit search (ABanditNAS) for an architecture that stays accurate under adversarial "
        "attack. With no argument: the embedded digits, minutes on a CPU."
    )

    def base(self, arguments: Sequence[str]) -> SearchConfig:
        base = base_config(self.default(), PRESETS, arguments)
        if all(take_option(arguments, name) is None for name in ("preset", "config", "resume")):
            if take_option(arguments, "data") is None:
                base = merge(base, PRESETS["digits"], "preset digits")
            else:  # of images of one's own nothing is left out unasked
                base = merge(base, RECOMMENDED, "the recommended search")
        return base

    def resolved(self, request: Request[SearchConfig]) -> SearchConfig:
        return request.config.resolve()

    def run(
        self, request: Request[SearchConfig], progress: Progress, group: Group | None
    ) -> tuple[Path, dict[str, Any]]:
        return search(
            request.config,
            request.out,
            force=request.options.force,
            progress=progress,
            group=group,
            callbacks=request.options.made(),
            trial=self.trial,
            processes=self._processes(request),
        )

    def _processes(self, request: Request[SearchConfig]) -> int:
        asked: int | None = request.options.processes
        if asked is not None and asked < 1:
            raise ConfigError(f"processes: expected 1 or more, got {asked}")
        if asked is not None:
            return asked
        device = torch.device(request.config.resolve().device)
        if device.type == "cuda":
            # A GPU that is named by its number is one.
            return torch.cuda.device_count() if device.index is None else 1
        return request.config.threads or cores()

    def job(self, request: Request[SearchConfig], name: str) -> Call:
        return Call(name, run_job, (request.config, request.out, request.options.force))

    def figures(self, result: dict[str, Any]) -> dict[str, float]:
        for row in result["networks"]:
            if row["name"] == FOUND:
                return {"clean": row["clean_accuracy"], "robust": row["robust_accuracy"]}
        # Without one that was trained from scratch.
        accuracies = result["test"] or result["final"]
        names = {"clean": "shared, clean", "robust": "shared, robust"}
        return {text: accuracies[f"{name}_accuracy"] for name, text in names.items()}

    def estimate(self, request: Request[SearchConfig], progress: Progress) -> dict[str, Any]:
        return dry_run(request.config, self._processes(request), progress)

    def show_estimate(self, result: dict[str, Any]) -> None:
        minutes = result["seconds_total"] / 60
        tuning = f", and {result['epochs_tuning']} of tuning" if result["epochs_tuning"] else ""
        print(f"data                 {result['data']}")
        print(f"space                {result['space']}: {result['parameters']:,} parameters")
        print(f"epochs               {result['epochs']}, each of another path{tuning}")
        print(
            f"peak memory          {result['peak_memory_mb']:.0f} MiB "
            f"(widest path {result['peak_memory_mb_widest']:.0f})"
            + (", extrapolated from smaller batches" if result["memory_extrapolated"] else "")
        )
        print(
            f"seconds per epoch    {result['seconds_per_epoch']:.2f} "
            f"(widest path {result['seconds_per_epoch_widest']:.2f})"
        )
        if result["networks"]:
            print(
                f"trained from scratch {result['networks']} networks, {result['network_epochs']} "
                f"epochs each, {result['seconds_network']:.0f} seconds each"
            )
        if result["trainings_alone"]:
            print(
                f"trained alone        {result['trainings_alone']} networks to score paths and in "
                f"the tournament, {result['seconds_alone']:.0f} seconds in all"
            )
        print(f"attack at the end    {result['test_attack']}")
        print(
            f"measured             {result['paths_measured']} of {result['paths']} paths, "
            f"{result['images_measured']} of {result['batch_size']} images in a batch"
        )
        print(
            f"whole command        about {minutes:.1f} minutes on {result['device']}, "
            f"{result['threads']} CPU threads"
        )

    def show(self, path: Path, result: dict[str, Any]) -> None:
        cost, final, test = result["cost"], result["final"], result["test"]
        tournament = result.get("tournament")
        networks = sum(row["seconds_total"] for row in result["networks"])
        trained = f", {networks / 60:.1f} minutes for the networks" if networks else ""
        print(
            f"search finished: {cost['epochs']} epochs in {cost['seconds_total'] / 60:.1f} minutes"
            f"{trained}, {cost['images_per_second']:.0f} images/s in training, "
            f"peak memory {cost['peak_memory_mb']:.0f} MiB"
        )
        for line in [*_tournament_lines(result), *_network_table(result)]:
            print(line)
        if result["networks"]:
            print("  (one training of each: a difference of a few points may be chance)")
            if all(row["robust_accuracy"] <= result["chance"] for row in result["networks"]):
                print("  (none is above chance under attack: trained too short to say anything)")
        alone = result.get("rewards") == "alone"
        print(
            "the last path's network, trained alone for a few epochs:"
            if alone
            else "with the supernet's shared weights, which do not judge an architecture:"
        )
        for accuracies in (final, test):
            if accuracies is not None:
                print(
                    f"  {'last' if tournament else 'found'} path, {accuracies['split']:<10} clean "
                    f"{100 * accuracies['clean_accuracy']:.2f} %  "
                    f"robust {100 * accuracies['robust_accuracy']:.2f} %  (n = {accuracies['n']})"
                )
        print(f"attack: {final['attack']}")
        print(f"genotype {result['genotype_hash'][:12]}: {path / 'genotype.json'}")
        print(f"report: {path / 'report.html'}")
        print(f"next: {program('retrain')} {path}   (this network, trained in full)")
        if result["name"] == result["data"]["name"] == "digits":
            print(
                f"      {program('search')} --preset digits-full   (six cells, all images, T = 3)"
            )
        print(f"run folder: {path}")


def _tournament_lines(summary: dict[str, Any]) -> list[str]:
    """Who took part in the tournament, and who won it."""
    tournament = summary.get("tournament")
    if tournament is None:
        return []
    entries = tournament["candidates"]
    winner = entries[tournament["winner"]]
    last = winner["rungs"][-1]
    origins = Counter(one["origin"] for one in entries)
    words = {"bandit": "of the bandit", "random": "at random", "model": "of the model"}
    rungs = ", ".join(
        f"{one['networks']} for {one['epochs']} epochs" for one in tournament["rungs"]
    )
    minutes = tournament["cost"]["seconds_total"] / 60
    return [
        f"tournament: {len(entries)} candidates "
        f"({', '.join(f'{count} {words[name]}' for name, count in origins.items())}); trained "
        f"alone {rungs}: {minutes:.1f} minutes in all",
        f"  winner: candidate {winner['number'] + 1}, {words[winner['origin']]}, validation clean "
        f"{100 * last['clean_accuracy']:.2f} %  robust {100 * last['robust_accuracy']:.2f} %  "
        f"(n = {last['n']}; {tournament['attack']})",
    ]


def _network_table(summary: dict[str, Any]) -> list[str]:
    """The networks trained from scratch, a line each, and what they are compared with."""
    rows = summary["networks"]
    if not rows:
        return []
    first = rows[0]
    latency = "latency_ms" in first
    lines = [
        f"{'trained from scratch, ' + str(first['epochs']) + ' epochs each':<34}"
        f"{'parameters':>12}{'ms (table)' if latency else '':>{18 * latency}}"
        f"{'clean':>10}{'robust':>10}   {first['split']} images, "
        f"n = {first['n']}"
    ]
    for row in sorted(rows, key=lambda row: row["name"] == REFERENCE):
        lines.append(
            f"  {network_name(row['name']):<32}{row['parameters']:>12,}{_latency(row)}"
            f"{100 * row['clean_accuracy']:>8.2f} %{100 * row['robust_accuracy']:>8.2f} %"
        )
    chance = f"{100 * summary['chance']:>8.2f} %"
    blank = f"{'':>{12 + 18 * latency}}"
    lines.append(f"  {'chance (the most frequent class)':<32}{blank}{chance}{chance}")
    if latency:
        lines.append(f"  ({_about_latency(summary['latency'])})")
    if summary.get("largest_parameters") is not None:
        lines.append(f"  {'largest network of the space':<32}{summary['largest_parameters']:>12,}")
    return lines


def _latency(row: dict[str, Any]) -> str:
    if "latency_ms" not in row:
        return ""
    text = f"{row['latency_ms']:.3g} ({row['latency_table_ms']:.3g})"
    return f"{text:>18}"


def _about_latency(facts: dict[str, Any]) -> str:
    rank = facts["rank_correlation"]
    return (
        f"ms: measured, batch {facts['batch_size']}, threads {facts['threads']}, "
        f"{facts['machine']['device']}; the budget holds the table's, whose rank correlation with "
        f"{facts['networks']} whole networks is {'unknown' if rank is None else f'{rank:.2f}'}"
    )


_COMMAND = SearchCommand()
parse = _COMMAND.parse
main = _COMMAND.main

if __name__ == "__main__":
    raise SystemExit(main())
