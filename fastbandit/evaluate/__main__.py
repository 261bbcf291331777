"""``python -m fastbandit.evaluate MODEL``: the command."""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastbandit._program import program
from fastbandit.command import Command, Request, RunOptions
from fastbandit.config import ConfigError, merge
from fastbandit.distributed import Group
from fastbandit.evaluate.config import PRESETS, EvaluateConfig
from fastbandit.evaluate.estimate import dry_run
from fastbandit.evaluate.result import RESULT
from fastbandit.evaluate.robustness import CUSTOM
from fastbandit.evaluate.run import evaluate_model
from fastbandit.evaluate.subject import prepare
from fastbandit.model_code import ModelCode, names_code
from fastbandit.models import find_model
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.progress import Progress
from fastbandit.runs.tensors import RunError

__all__ = ["main", "parse"]


@dataclass(frozen=True)
class Options(RunOptions):
    """What to do with the configuration; none of it changes a result."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")] = None
    """a model file, the folder of a retraining run (runs/latest: the newest run with a model), or
    code of your own that makes one: my_package.my_module:make_model"""
    weights: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """weights of a model of your own: .safetensors, or .pt of torch.save(model.state_dict(), FILE)
    """
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: quick (seconds), standard, binary (1-bit networks), digits, mnist,
    cifar10"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of the result; default: evaluation-<norm>-<epsilon> beside the model or its weights;
    of code without a file of weights, an unfinished one of this evaluation below runs/, else a new
    one there"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the evaluation in this folder, with the model and configuration stored there"""
    force: bool = False
    """replace a finished evaluation, or one of another configuration, in the folder"""
    dry_run: bool = False
    """measure the model on a few batches, print the most that the evaluation can take, and stop"""


class EvaluateCommand(Command[EvaluateConfig]):
    """Measure how robust a network is."""

    name = "evaluate"
    config = EvaluateConfig
    options = Options
    presets = PRESETS
    folder_key = "evaluation"
    description = (
        "Clean and robust accuracy of a trained network: many attacks, the worst case of each "
        "image, and checks of whether to trust it."
    )

    def stored(self, folder: Path) -> EvaluateConfig:
        return _stored(folder)[1]

    def prepare(self, arguments: Sequence[str]) -> Request[EvaluateConfig]:
        request = super().prepare(arguments)
        options = request.options
        if options.resume is not None:
            stored, _ = _stored(Path(options.resume))
            _check_stored(stored, options)
            named = stored if isinstance(stored, ModelCode) else ModelCode(stored)
            weights = None if named.weights is None else str(named.weights)
            options = dataclasses.replace(options, model=named.code, weights=weights)
        if options.model is None:
            raise ConfigError(
                "expected a MODEL: a model file, the folder of a retraining run, or "
                "my_package.my_module:make_model"
            )
        if options.weights is not None and not names_code(options.model):
            raise ConfigError(
                "--weights: expected beside code of your own such as "
                f"my_package.my_module:make_model; {options.model} has its weights in it"
            )
        return dataclasses.replace(request, options=options)

    def resolved(self, request: Request[EvaluateConfig]) -> EvaluateConfig:
        return prepare(_model(request.options), request.config)[1]

    def run(
        self, request: Request[EvaluateConfig], progress: Progress, group: Group | None
    ) -> tuple[Path, dict[str, Any]]:
        return evaluate_model(
            _model(request.options),
            request.config,
            request.out,
            force=request.options.force,
            progress=progress,
            group=group,
        )

    def estimate(self, request: Request[EvaluateConfig], progress: Progress) -> dict[str, Any]:
        return dry_run(_model(request.options), request.config, progress)

    def show_estimate(self, result: dict[str, Any]) -> None:
        print(f"images               {result['images']} of {result['data']}")
        print(f"attacks              {', '.join(result['attacks'])}")
        print(
            f"peak memory          {result['peak_memory_mb']:.0f} MiB"
            + (", extrapolated from smaller batches" if result["memory_extrapolated"] else "")
        )
        print(f"clean                {result['seconds_clean']:.1f} s")
        print(
            f"all, at most         {result['seconds_most'] / 60:.1f} minutes on "
            f"{result['device']}, {result['threads']} CPU threads, if no image ever fell"
        )

    def show(self, path: Path, result: dict[str, Any]) -> None:
        for evaluation in result["results"]:
            threat = evaluation["threat"]
            norm = "L-infinity" if threat["norm"] == "linf" else "L2"
            print(f"{norm}, epsilon {threat['epsilon']}")
            print(f"  {'clean':12} {_percent(evaluation['clean'])}")
            for attack in evaluation["attacks"]:
                note = ""
                if attack["unconfirmed"]:
                    note = f", {attack['unconfirmed']} not confirmed in float32"
                print(
                    f"  {attack['name']:12} {_percent(attack)}  "
                    f"{attack['fooled']} of {attack['attacked']} attacked fall, "
                    f"{attack['seconds']:.1f} s{note}"
                )
            print(f"  {'worst case':12} {_percent(evaluation['worst_case'])}")
            print(f"  {evaluation['provenance']}")
        for transfer in result["transfer"] or []:
            for attack in transfer["attacks"]:
                print(f"transfer     {attack['name']:12} {_percent(attack)}")
        if result["fast_copy"] is not None and not result["fast_copy"]["used"]:
            print(
                "the copy with frozen batch norms computes something else: attacks followed the "
                "network itself"
            )
        check = result["cross_check"]
        if check is not None:
            print(
                f"cross-check  of {check['n']} images both fool {check['fooled_by_both']}, "
                f"ours alone {check['fooled_by_ours_alone']}, the reference alone "
                f"{check['fooled_by_reference_alone']}: {check['verdict']}"
            )
        if left_out := result.get("cross_check_left_out"):  # not in files of older versions
            print(f"cross-check  left out: {left_out}")
        print(f"suspicion: {result['suspicion']['verdict']}")
        for one in result["suspicion"]["checks"]:
            print(f"  {one['verdict']:10} {one['name']}: {one['detail']}")
        print(f"next: {program('report')} {path}   (a page about it)")
        print(f"evaluation: {path / RESULT}")


def _model(options: Options) -> ModelCode | str:
    assert options.model is not None
    if not names_code(options.model):
        return options.model
    return ModelCode(options.model, None if options.weights is None else Path(options.weights))


def _check_stored(stored: ModelCode | str, options: Options) -> None:
    """Refuse another model beside ``--resume`` than the one of the folder."""
    given, weights = options.model, options.weights
    if isinstance(stored, ModelCode):
        same = given in (None, stored.code) and (
            weights is None
            or (stored.weights is not None and Path(weights).samefile(stored.weights))
        )
        name = stored.code
    else:
        same = weights is None and (given is None or find_model(given).samefile(stored))
        name = stored
    if not same:
        got = given if weights is None else f"{given or name} --weights {weights}"
        raise ConfigError(f"--resume: expected the model {name}, got {got}")


def _percent(share: dict[str, Any]) -> str:
    if share["accuracy"] is None:
        return "no image"
    low, high = share["interval"]
    return (
        f"{100 * share['accuracy']:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]  "
        f"({share['correct']} of {share['n']})"
    )


def _stored(folder: Path) -> tuple[ModelCode | str, EvaluateConfig]:
    """Model and configuration of the evaluation in ``folder``."""
    plain = RunFolder.read_config(folder, RESULT)
    identity = plain.pop("model", None)
    for key in ("data_digest", "transfer_digest"):
        plain.pop(key, None)
    if not isinstance(identity, dict):
        raise RunError(f"{folder}: expected the folder of an evaluation")
    config = merge(EvaluateConfig(), plain, f"{folder}/config.yaml")
    if config.data == CUSTOM and not os.path.lexists(CUSTOM):
        raise RunError(
            f"{folder}: its images came from Python; call fastbandit.evaluate (or evaluate_model) "
            f"with them again, out={str(folder)!r}, to go on"
        )
    if identity.get("code") is not None:
        weights = identity.get("weights")
        place = None if weights is None else Path(os.path.normpath(folder / weights))
        return ModelCode(str(identity["code"]), place), config
    if identity.get("file") is None:
        raise RunError(
            f"{folder}: its model came from Python; call fastbandit.evaluate (or evaluate_model) "
            f"with it again, out={str(folder)!r}, to go on"
        )
    return os.path.normpath(folder / identity["file"]), config


_COMMAND = EvaluateCommand()
parse = _COMMAND.parse
main = _COMMAND.main

if __name__ == "__main__":
    raise SystemExit(main())
