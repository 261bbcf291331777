"""The reference implementation of AutoAttack, all four parts: package pyautoattack."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit.attacks._attack import Attack, AttackResult, check_radius
from fastbandit.attacks._model import (
    LARGEST_SEED,
    Oracle,
    aimed,
    finite_images,
    misclassified,
    with_autograd,
)
from fastbandit.attacks.ball import Ball
from fastbandit.threat import parse_whole

#: Classes that its loss needs.
FEWEST_CLASSES = 4


def has_reference() -> bool:
    """Whether the package is installed."""
    return importlib.util.find_spec("pyautoattack") is not None


@dataclass(frozen=True)
class ReferenceAutoAttack(Attack):
    """AutoAttack, standard version, on every image it is given."""

    name = "reference"

    classes: int
    """outputs of the model, 4 or more for its DLR loss"""
    release: str
    """version of the package"""
    targets: int = 9
    """classes that its targeted attacks aim at; all others where there are fewer"""

    def __post_init__(self) -> None:
        parse_whole(self.classes, "classes", FEWEST_CLASSES)
        parse_whole(self.targets, "targets", 1)

    @property
    def aimed_at(self) -> int:
        """Classes that its targeted attacks aim at, of this model."""
        return min(self.targets, self.classes - 1)

    @classmethod
    def of_release(cls, classes: int) -> ReferenceAutoAttack:
        """That of the package that is installed.

        Raises:
            ImportError: none is.
        """
        import pyautoattack  # noqa: F401

        return cls(classes, version("pyautoattack"))

    def title(self, norm: str) -> str:
        return "AutoAttack"

    def run(
        self, oracle: Oracle, images: Tensor, labels: Tensor, ids: Tensor, seed: int, ball: Ball
    ) -> AttackResult:
        from pyautoattack import AutoAttack

        outputs = oracle.logits(images[:1], exact=True).shape[1]
        if outputs != self.classes:
            raise ValueError(
                f"classes: expected {outputs}, the model's outputs, got {self.classes}"
            )
        device = images.device
        attack = AutoAttack(
            oracle.exact,
            norm={"linf": "Linf", "l2": "L2"}[ball.norm],
            eps=ball.epsilon,
            version="standard",
            seed=seed % 2**31,
            device=device,
        )
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = self.aimed_at
        # It seeds torch's own generator.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            adversarial, _ = attack.run_standard_evaluation(
                images.contiguous(), labels, batch_size=oracle.batch_size or len(images)
            )
        logits = oracle.logits(adversarial, exact=True)
        return AttackResult(adversarial, misclassified(logits, labels) & finite_images(adversarial))

    def passes(self) -> tuple[float, float]:
        # 100 steps, as many for each target, FAB-T with as many again, 5,000 queries.
        steps = 100 * self.aimed_at
        return 100 + steps + 2 * steps + 5000, 100 + steps + steps

    def describe(self, ball: Ball) -> str:
        # All other classes, up to nine, are the standard.
        few = "" if self.aimed_at >= min(9, self.classes - 1) else f" with {self.aimed_at} targets"
        return (
            f"AutoAttack standard{few} (APGD-CE, APGD-T, FAB-T, Square), pyautoattack "
            f"{self.release}, {ball.describe()}"
        )

    def facts(self, ball: Ball) -> dict[str, Any]:
        package = {"package": "pyautoattack", "version": self.release}
        return {**package, "norm": ball.norm, "attacks": "standard", "targets": self.aimed_at}


@with_autograd
def autoattack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    norm: str = "linf",
    targets: int = 9,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """AutoAttack, standard version: APGD-CE, APGD-T, FAB-T and Square of the reference package.

    What it returns is what the reference returns for these batches and this seed.

    Args:
        images: float32.
        targets: classes that APGD-T and FAB-T aim at.
        index: None: its random numbers belong to a batch, not to an image.

    Other arguments as of :func:`fastbandit.attacks.apgd_ce`.

    Raises:
        ImportError: pyautoattack is not installed.
        ValueError, TypeError: as :func:`fastbandit.attacks.pgd`; ValueError also for a model of
            fewer than four classes.
    """
    if not has_reference():
        raise ImportError(
            "AutoAttack needs the package pyautoattack (extra eval); Ensemble is APGD-CE, APGD-T "
            "and Square without it, and without FAB-T"
        )
    ball = check_radius(norm, epsilon)
    seed = parse_whole(seed, "seed", most=LARGEST_SEED)
    if index is not None:
        raise ValueError(
            "index: expected None: the random numbers of the reference AutoAttack belong to the "
            "batch, not to the image"
        )
    images, labels, ids, oracle = aimed(model, images, labels, None, batch_size=batch_size)
    if images.dtype != torch.float32:
        raise TypeError(f"images: expected float32 for the reference, got {images.dtype}")
    if not ball.epsilon or not len(images):
        return images.clone()
    targets = parse_whole(targets, "targets", 1)
    with oracle:
        classes = oracle.logits(images[:1]).shape[1]
        if classes < FEWEST_CLASSES:
            raise ValueError(
                f"model: expected {FEWEST_CLASSES} classes or more for the reference's DLR loss, "
                f"got {classes}"
            )
        attack = ReferenceAutoAttack(classes, version("pyautoattack"), targets)
        return attack.run(oracle, images, labels, ids, seed, ball).adversarial
