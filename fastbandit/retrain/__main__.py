"""``python -m fastbandit.retrain``: from a genotype to a robust network, trained from scratch."""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastbandit._files import plain_file
from fastbandit._program import program
from fastbandit.command import Request, preset_settings, take_option
from fastbandit.command_training import TrainingCommand, TrainingOptions
from fastbandit.config import merge, read_config_file
from fastbandit.distributed import Group
from fastbandit.genotype import Genotype
from fastbandit.retrain.config import PRESETS, RetrainConfig
from fastbandit.retrain.estimate import dry_run
from fastbandit.retrain.genotypes import named_run, search_settings, with_genotype
from fastbandit.retrain.loop import FILES, retrain, run_job
from fastbandit.runs.processes import Call
from fastbandit.runs.progress import Progress
from fastbandit.runs.training import FREE

__all__ = ["main", "parse"]


@dataclass(frozen=True)
class Options(TrainingOptions):
    """What to do with the configuration; none of it changes a result."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: digits (the default), smoke, mnist, fashion-mnist, cifar10; with a
    run folder: the preset of the same name as its search"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the run in this folder, with the configuration and genotype stored there"""
    dry_run: bool = False
    """train and validate a few batches, print memory and time that all will take, and stop"""


class RetrainCommand(TrainingCommand[RetrainConfig]):
    """Train the network of a genotype."""

    name = "retrain"
    config = RetrainConfig
    options = Options
    presets = PRESETS
    files = FILES
    # Neither epsilon nor the selection, by which the best weights so far were chosen.
    free = (
        *FREE, "epochs", "schedule", "warmup", "method", "replays", "beta", "drop_path_prob",
        "auxiliary_weight", "attack.steps", "attack.step_size", "attack.random_start",
    )  # fmt: skip
    description = (
        "Train the network of a genotype from scratch, adversarially. ABANDIT_MNIST_NORMAL_1 is a "
        "published one to begin with: with nothing else said it is trained on the embedded digits, "
        "minutes on a CPU."
    )

    def base(self, arguments: Sequence[str]) -> RetrainConfig:
        """Defaults < preset < run folder < file."""
        preset = take_option(arguments, "preset")
        file = take_option(arguments, "config")
        settings = {} if file is None else read_config_file(file)
        # The run folder gives defaults, so it is looked for before they are known.
        parsed = self.parse(arguments, RetrainConfig()).config.genotype
        where = named_run(str(parsed or settings.get("genotype", "")))
        of_run = search_settings(where)
        if preset is None and of_run.get("name") in PRESETS:
            preset = of_run["name"]
        base = RetrainConfig()
        if preset is not None:
            base = merge(base, preset_settings(PRESETS, preset), f"preset {preset}")
        base = merge(base, of_run, f"{where}/config.yaml")
        return merge(base, settings, f"--config {file}")

    def resolved(self, request: Request[RetrainConfig]) -> RetrainConfig:
        return with_genotype(request.config.resolve(), _genotype(request))[0]

    def run(
        self, request: Request[RetrainConfig], progress: Progress, group: Group | None
    ) -> tuple[Path, dict[str, Any]]:
        return retrain(
            request.config,
            request.out,
            force=request.options.force,
            progress=progress,
            group=group,
            callbacks=request.options.made(),
            genotype=_genotype(request),
        )

    def job(self, request: Request[RetrainConfig], name: str) -> Call:
        arguments = (request.config, request.out, request.options.force, _genotype(request))
        return Call(name, run_job, arguments)

    def figures(self, result: dict[str, Any]) -> dict[str, float]:
        accuracies = result["test"] or result["best"]
        return {"clean": accuracies["clean_accuracy"], "robust": accuracies["robust_accuracy"]}

    def estimate(self, request: Request[RetrainConfig], progress: Progress) -> dict[str, Any]:
        return dry_run(request.config, genotype=_genotype(request), progress=progress)

    def show_estimate(self, result: dict[str, Any]) -> None:
        print(f"data               {result['data']}")
        print(f"network            {result['parameters']:,} parameters, {result['macs']:,} MACs")
        print(f"epochs             {result['epochs']}")
        print(
            f"peak memory        {result['peak_memory_mb']:.0f} MiB"
            + (", extrapolated from smaller batches" if result["memory_extrapolated"] else "")
        )
        print(f"seconds per epoch  {result['seconds_per_epoch']:.2f}")
        print(f"attack at the end  {result['test_attack']}")
        print(
            f"measured           {result['images_measured']} of {result['batch_size']} images in "
            "a batch"
        )
        print(
            f"all of it          about {result['seconds_total'] / 60:.1f} minutes on "
            f"{result['device']}, {result['threads']} CPU threads"
        )

    def show(self, path: Path, result: dict[str, Any]) -> None:
        cost = result["cost"]
        print(
            f"retraining finished: {cost['epochs']} epochs in {cost['seconds_total'] / 60:.1f} "
            f"minutes, {cost['images_per_second']:.0f} images/s in training, "
            f"peak memory {cost['peak_memory_mb']:.0f} MiB"
        )
        print(
            f"network: {result['parameters']:,} parameters, {result['macs']:,} MACs "
            f"({2 * result['macs']:,} FLOPs); genotype {result['genotype_hash'][:12]}"
        )
        for name in ("best", "last"):
            accuracies = result[name]
            print(
                f"{name}, epoch {accuracies['epoch'] + 1:<4} validation  clean "
                f"{100 * accuracies['clean_accuracy']:.2f} %  robust "
                f"{100 * accuracies['robust_accuracy']:.2f} %  (n = {accuracies['n']})  "
                f"{path / accuracies['file']}"
            )
        test = result["test"]
        print(f"validation attack: {result['best']['attack']}")
        if test is not None:
            print(
                f"best, test                   clean {100 * test['clean_accuracy']:.2f} %  robust "
                f"{100 * test['robust_accuracy']:.2f} %  (n = {test['n']})"
            )
            print(f"test attack: {test['attack']}")
        for fired in result["overfitting"]:
            print(
                f"catastrophic overfitting in epoch {fired['epoch'] + 1}: on with {fired['attack']}"
            )
        print(f"next: {program('evaluate')} {path} --preset quick   (under several attacks)")
        print(f"run folder: {path}")


def _genotype(request: Request[RetrainConfig]) -> Genotype | None:
    """The genotype stored in the folder of ``--resume`` or ``--fork``; None where there is none
    yet."""
    folder = request.options.resume or request.options.fork
    if folder is None:
        return None
    file = Path(folder) / "genotype.json"
    # Killed before it was stored: then it is where it was found.
    return Genotype.load(plain_file(file)) if file.is_file() else None


_COMMAND = RetrainCommand()
parse = _COMMAND.parse
main = _COMMAND.main

if __name__ == "__main__":
    raise SystemExit(main())
