"""The reference implementation of AutoAttack, to compare with: package pyautoattack."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fastbandit.attacks._attack import Attack, AttackResult
from fastbandit.attacks._model import Oracle, finite_images, misclassified
from fastbandit.attacks.ball import Ball


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

        device = images.device
        attack = AutoAttack(
            oracle.exact,
            norm={"linf": "Linf", "l2": "L2"}[ball.norm],
            eps=ball.epsilon,
            version="standard",
            seed=seed % 2**31,
            device=device,
        )
        targets = min(9, self.classes - 1)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
        # It seeds torch's own generator.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            adversarial, _ = attack.run_standard_evaluation(
                images.contiguous(), labels, batch_size=oracle.batch_size or len(images)
            )
        logits = oracle.logits(adversarial, exact=True)
        return AttackResult(adversarial, misclassified(logits, labels) & finite_images(adversarial))

    def passes(self) -> tuple[float, float]:
        # 100 steps, 9 targets of 100, FAB-T with 9 targets of 100, 5,000 queries.
        return 100 + 900 + 1800 + 5000, 100 + 900 + 900

    def describe(self, ball: Ball) -> str:
        return (
            f"AutoAttack standard (APGD-CE, APGD-T, FAB-T, Square), pyautoattack {self.release}, "
            f"{ball.describe()}"
        )

    def facts(self, ball: Ball) -> dict[str, Any]:
        package = {"package": "pyautoattack", "version": self.release}
        return {**package, "norm": ball.norm, "attacks": "standard"}
