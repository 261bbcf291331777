"""``python -m fastbandit.evaluate MODEL``: the command."""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastbandit.command import CommonOptions, base_config, guard, resumed_config
from fastbandit.config import ConfigError, merge, to_plain
from fastbandit.distributed import Group, first_to_speak, launched
from fastbandit.evaluate.config import PRESETS, EvaluateConfig
from fastbandit.evaluate.estimate import dry_run
from fastbandit.evaluate.result import RESULT
from fastbandit.evaluate.run import EvaluationFolder, evaluate_model
from fastbandit.evaluate.subject import prepare
from fastbandit.models import find_model
from fastbandit.runs.progress import Progress
from fastbandit.runs.tensors import RunError

__all__ = ["main", "parse"]


@dataclass(frozen=True)
class Options(CommonOptions):
    """What to do with the configuration; none of it changes a result."""

    model: tyro.conf.Positional[str | None] = None
    """a model file, or the folder of a retraining run"""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: quick (seconds), standard, digits, mnist, cifar10"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of the result; default: evaluation-<norm>-<epsilon> beside the model"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the evaluation in this folder, with the model and configuration stored there"""
    force: bool = False
    """replace a finished evaluation, or one of another configuration, in the folder"""
    peer_timeout: float = 600.0
    """seconds to wait for another process before it counts as gone"""
    dry_run: bool = False
    """measure the model on a few batches, print the most that the evaluation can take, and stop"""


@dataclass(frozen=True)
class _Command:
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = field(
        default_factory=EvaluateConfig
    )


def parse(arguments: Sequence[str]) -> _Command:
    """Options and configuration: defaults < preset < file < flags."""
    base = base_config(EvaluateConfig(), PRESETS, arguments)
    return tyro.cli(
        _Command,
        default=_Command(config=base),
        args=list(arguments),
        prog="python -m fastbandit.evaluate",
        description="Clean and robust accuracy of a trained network: many attacks, the worst case "
        "of each image, and checks of whether to trust it.",
    )


def _percent(share: dict[str, Any]) -> str:
    if share["accuracy"] is None:
        return "no image"
    low, high = share["interval"]
    return (
        f"{100 * share['accuracy']:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]  "
        f"({share['correct']} of {share['n']})"
    )


def _print_result(path: Path, result: dict[str, Any]) -> None:
    for found in result["results"]:
        threat = found["threat"]
        norm = "L-infinity" if threat["norm"] == "linf" else "L2"
        print(f"{norm}, epsilon {threat['epsilon']}")
        print(f"  {'clean':12} {_percent(found['clean'])}")
        for attack in found["attacks"]:
            note = ""
            if attack["unconfirmed"]:
                note = f", {attack['unconfirmed']} not confirmed in float32"
            print(
                f"  {attack['name']:12} {_percent(attack)}  "
                f"{attack['fooled']} of {attack['attacked']} attacked fall, "
                f"{attack['seconds']:.1f} s{note}"
            )
        print(f"  {'worst case':12} {_percent(found['worst_case'])}")
        print(f"  {found['provenance']}")
    for found in result["transfer"] or []:
        for attack in found["attacks"]:
            print(f"transfer     {attack['name']:12} {_percent(attack)}")
    if result["fast_copy"] is not None and not result["fast_copy"]["used"]:
        print(
            "the copy with frozen batch norms computes something else: attacks followed the "
            "network itself"
        )
    check = result["cross_check"]
    if check is not None:
        print(
            f"cross-check  of {check['n']} images both fool {check['fooled_by_both']}, ours alone "
            f"{check['fooled_by_ours_alone']}, the reference alone "
            f"{check['fooled_by_reference_alone']}: {check['verdict']}"
        )
    print(f"suspicion: {result['suspicion']['verdict']}")
    for one in result["suspicion"]["checks"]:
        print(f"  {one['verdict']:10} {one['name']}: {one['detail']}")
    print(f"evaluation: {path / RESULT}")


def _stored(folder: Path) -> tuple[str, EvaluateConfig]:
    """Model file and configuration of the evaluation in ``folder``."""
    plain = EvaluationFolder.read_config(folder, RESULT)
    identity = plain.pop("model", None)
    for key in ("data_digest", "transfer_digest"):
        plain.pop(key, None)
    if not isinstance(identity, dict):
        raise RunError(f"{folder}: expected the folder of an evaluation")
    if identity.get("file") is None:
        raise RunError(
            f"{folder}: its model came from Python; call evaluate_model with it again to go on"
        )
    return os.path.normpath(folder / identity["file"]), merge(
        EvaluateConfig(), plain, f"{folder}/config.yaml"
    )


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    options, config = command.options, command.config
    model, out = options.model, options.out
    if options.resume is not None:
        folder = Path(options.resume)
        stored_model, stored = _stored(folder)
        if model is not None and not find_model(model).samefile(stored_model):
            raise ConfigError(f"--resume: expected the model {stored_model}, got {model}")
        config = resumed_config(config, stored, options.resume, out)
        model, out = stored_model, options.resume
    if model is None:
        raise ConfigError("expected a MODEL: a model file or the folder of a retraining run")
    speaks = not launched() or os.environ["RANK"] == "0"
    if options.print_config or options.dry_run:
        if not speaks:
            return 0
        if options.print_config:
            import yaml

            _, resolved = prepare(model, config)
            print(yaml.safe_dump(to_plain(resolved), sort_keys=False), end="")
            return 0
        measured = dry_run(model, config)
        if options.json:
            print(json.dumps(measured))
        else:
            print(f"images               {measured['images']}")
            print(f"peak memory          {measured['peak_memory_mb']:.0f} MiB")
            print(f"clean                {measured['seconds_clean']:.1f} s")
            print(
                f"all, at most         {measured['seconds_most'] / 60:.1f} minutes on "
                f"{measured['device']}, {measured['threads']} CPU threads, if no image ever fell"
            )
        return 0
    if not launched():
        path, result = evaluate_model(model, config, out, force=options.force, progress=Progress())
    else:
        _, resolved = prepare(model, config)
        kind = torch.device(resolved.device).type
        with Group.join(kind, timeout=options.peer_timeout) as group:
            path, result = evaluate_model(
                model, config, out, force=options.force, progress=Progress(), group=group
            )
            if group.rank:
                return 0
    if options.json:
        print(json.dumps({"evaluation": str(path), **result}))
    else:
        _print_result(path, result)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return guard("evaluate", lambda: _run(given), reports=first_to_speak)


if __name__ == "__main__":
    raise SystemExit(main())
