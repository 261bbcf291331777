"""The folder of an evaluation, read for the report.

Nothing in a file is trusted: a value of another kind than expected is left out, and where the
page would show less than the file holds, or files disagree, a note says so.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastbandit._files import MEGABYTE, plain_file
from fastbandit._identity import Fingerprint
from fastbandit.report.html import count, finite, get
from fastbandit.report.reading import (
    Folder,
    check_config,
    genotype_digest,
    lenient_config,
    read_optional,
    without_folder,
)
from fastbandit.report.shares import Share, read_share
from fastbandit.threat import parse_fraction

__all__ = [
    "EVALUATION",
    "EXAMPLES",
    "Attack",
    "Evaluation",
    "Examples",
    "Result",
    "radius_of",
    "read_evaluation",
]

EVALUATION, EXAMPLES = "evaluation.json", "examples.safetensors"
_LARGEST_EXAMPLES = 128 * MEGABYTE


@dataclass(frozen=True)
class Attack:
    """One attack of one threat.

    ``attacked``: images that it was run on; ``fooled``: how many of them it changed the class of.
    """

    name: str
    describe: str
    share: Share
    attacked: int | None = None
    fooled: int | None = None
    unconfirmed: int | None = None
    seconds: float | None = None
    forward: int | None = None
    backward: int | None = None


@dataclass(frozen=True)
class Result:
    """One threat: clean accuracy, each attack, the worst case over all of them."""

    threat: dict[str, Any]
    clean: Share | None
    attacks: list[Attack]
    worst: Share | None
    provenance: str | None
    #: Every attack was run on all images that are classified rightly, not only on those that
    #: stood after the attacks before it.
    every: bool = False

    @property
    def norm(self) -> str:
        return str(self.threat.get("norm") or "linf")

    @property
    def epsilon(self) -> str:
        epsilon = self.threat.get("epsilon")
        return "not recorded" if epsilon is None else str(epsilon)

    @property
    def radius(self) -> float | None:
        """Epsilon as a number."""
        return radius_of(self.threat)


def radius_of(threat: Mapping[str, Any]) -> float | None:
    """Epsilon of a threat as a number; None where it is none."""
    value = finite(threat.get("epsilon_value"))
    if value is None:
        try:
            value = float(parse_fraction(str(threat.get("epsilon")), "epsilon"))
        except ValueError:
            return None
    return value if value >= 0 else None


@dataclass(frozen=True)
class Examples:
    """Images before and after the attack, uint8 [m, C, H, W], with labels and predictions [m]."""

    clean: np.ndarray[Any, Any]
    adversarial: np.ndarray[Any, Any]
    #: Adversarial less clean, in units of the full range, not rounded to 8 bits.
    difference: np.ndarray[Any, Any]
    label: list[int]
    before: list[int]
    after: list[int]
    identity: list[int]


@dataclass
class Evaluation(Folder):
    """An evaluation; ``summary`` is what evaluation.json holds."""

    results: list[Result] = field(default_factory=list)
    digest: str | None = None
    examples: Examples | None = None

    @property
    def model(self) -> Any:
        """What the files say of the model; the configuration alone where it is not finished."""
        return get(self.summary, "model") or get(self.config, "model")

    @property
    def weights(self) -> str | None:
        """Digest of the model: of its file, or of the class and tensors of one from Python."""
        digest = get(self.model, "digest")
        return digest if isinstance(digest, str) and digest else None

    @cached_property
    def fingerprint(self) -> Fingerprint | None:
        return Fingerprint.read(get(self.summary, "model", "fingerprint"))

    @property
    def data(self) -> tuple[Any, ...]:
        """Which images were attacked: digest of the set, or its name, and part."""
        name = get(self.summary, "data", "digest") or get(self.summary, "data", "name")
        return str(name), str(get(self.summary, "data", "split"))

    @property
    def suspicious(self) -> bool:
        return get(self.summary, "suspicion", "verdict") == "suspicious"


def _read_result(value: Any, where: str, notes: list[str]) -> Result | None:
    if not isinstance(value, Mapping):
        notes.append(f"{where}: expected an object, got {type(value).__name__}")
        return None
    threat = value.get("threat")
    if not isinstance(threat, Mapping):
        notes.append(f"{where}.threat: expected an object, got {type(threat).__name__}")
        return None
    attacks = []
    listed = value.get("attacks")
    if not isinstance(listed, list):
        notes.append(f"{where}.attacks: expected a list, got {type(listed).__name__}")
        listed = []
    for position, entry in enumerate(listed):
        place = f"{where}.attacks[{position}]"
        share = read_share(entry, place, notes)
        if share is None:
            if entry is None:
                notes.append(f"{place}: expected an object, got NoneType")
            continue
        attacks.append(
            Attack(
                name=str(entry.get("name") or f"attack {position + 1}"),
                describe=str(entry.get("describe") or ""),
                share=share,
                attacked=count(entry.get("attacked")),
                fooled=count(entry.get("fooled")),
                unconfirmed=count(entry.get("unconfirmed")),
                seconds=finite(entry.get("seconds")),
                forward=count(entry.get("forward_passes")),
                backward=count(entry.get("backward_passes")),
            )
        )
    clean = read_share(value.get("clean"), f"{where}.clean", notes)
    worst = read_share(value.get("worst_case"), f"{where}.worst_case", notes)
    if worst is not None:
        for attack in attacks:
            if worst.accuracy > attack.share.accuracy + 1e-9:
                notes.append(
                    f"{where}: the worst case, {worst.accuracy:.6g}, is above the accuracy under "
                    f"{attack.name}, {attack.share.accuracy:.6g}; it can be no larger"
                )
    line = value.get("provenance")
    every = value.get("attacked_images") == "all"
    provenance = None if line is None else str(line)
    return Result(dict(threat), clean, attacks, worst, provenance, every)


def read_evaluation(folder: Path, summary: Mapping[str, Any] | None) -> Evaluation:
    config, text, notes = lenient_config(folder, (EVALUATION,))
    run = Evaluation(folder, config, text, notes=notes, label=folder.name)
    run.environment = read_optional(run, "env.json")
    run.summary = dict(summary) if summary is not None else read_optional(run, EVALUATION)
    check_config(run)
    listed = get(run.summary, "results")
    if isinstance(listed, list):
        for position, value in enumerate(listed):
            result = _read_result(value, f"{EVALUATION}: results[{position}]", run.notes)
            if result is not None:
                run.results.append(result)
    elif run.summary is not None:
        kind = type(listed).__name__
        run.notes.append(f"{EVALUATION}: results: expected a list, got {kind}")
    run.digest = genotype_digest(run)
    run.examples = _read_examples(run)
    return run


def _read_examples(run: Evaluation) -> Examples | None:
    file = run.folder / EXAMPLES
    if not os.path.lexists(file):
        return None
    from fastbandit.runs.tensors import CheckpointError, load_tensors

    try:
        tensors, _ = load_tensors(plain_file(file), "examples", _LARGEST_EXAMPLES)
        clean, adversarial = tensors["clean"], tensors["adversarial"]
        if clean.ndim != 4 or clean.shape != adversarial.shape or 0 in clean.shape[1:]:
            raise ValueError(
                "clean and adversarial: expected two of one shape [m, C, H, W], got "
                f"{list(clean.shape)} and {list(adversarial.shape)}"
            )
        images = []
        for name, tensor in (("clean", clean), ("adversarial", adversarial)):
            if str(tensor.dtype) == "torch.uint8":
                images.append(tensor.double().numpy() / 255)
                continue
            pixels = tensor.double().numpy()
            if not (np.isfinite(pixels).all() and pixels.min(initial=0.0) >= -1e-6):
                raise ValueError(f"{name}: expected values in [0, 1] or uint8")
            if pixels.max(initial=0.0) > 1 + 1e-6:
                raise ValueError(f"{name}: expected values in [0, 1], got {pixels.max():.6g}")
            images.append(pixels)
        columns = []
        for name in ("label", "prediction_clean", "prediction_adversarial", "id"):
            if name == "id" and name not in tensors:
                columns.append(list(range(len(clean))))
                continue
            values = tensors[name]
            if values.shape != clean.shape[:1]:
                raise ValueError(
                    f"{name}: expected shape {list(clean.shape[:1])}, got {list(values.shape)}"
                )
            columns.append([int(value) for value in values.tolist()])
    except KeyError as error:
        run.notes.append(f"{EXAMPLES}: expected a tensor {error}, there is none")
        return None
    except (CheckpointError, ValueError, OSError) as error:
        message = without_folder(str(error), run.folder)
        run.notes.append(message if message.startswith(EXAMPLES) else f"{EXAMPLES}: {message}")
        return None
    eight = [np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8) for image in images]
    return Examples(eight[0], eight[1], images[1] - images[0], *columns)
