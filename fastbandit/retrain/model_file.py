"""The two networks that a retraining keeps, best and last, as model files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbandit.models import BEST, save_model
from fastbandit.retrain.setup import Setup
from fastbandit.threat import ThreatModel

__all__ = ["Record", "selection_rule", "write_model"]


@dataclass(frozen=True)
class Record:
    """How the weights of one epoch did on the validation images."""

    epoch: int
    clean_correct: int
    robust_correct: int
    images: int

    def better_than(self, other: Record | None) -> bool:
        """More robust; of two alike the more accurate one, then the earlier one."""
        if other is None:
            return True
        return (self.robust_correct, self.clean_correct) > (
            other.robust_correct,
            other.clean_correct,
        )

    def facts(self, attack: ThreatModel, file: str) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "clean_accuracy": self.clean_correct / self.images,
            "robust_accuracy": self.robust_correct / self.images,
            "n": self.images,
            "split": "validation",
            "attack": attack.describe(),
            "file": file,
        }


def selection_rule(setup: Setup) -> str:
    """How the best epoch is chosen, in words."""
    selection = setup.config.selection_threat()
    n = len(setup.splits["validation"])
    what = "robust accuracy" if selection.attacks else "accuracy"
    averaged = ", of the averaged weights" if setup.config.ema_decay else ""
    return (
        f"best: the epoch with the highest {what} on {n} validation images held out of the "
        f"training set{averaged} ({selection.describe()}; of two alike the one with more "
        "clean accuracy, then the earlier one); last: the last epoch; the test set is looked "
        "at once, at the end"
    )


def write_model(
    path: Path,
    setup: Setup,
    weights: dict[str, Tensor],
    record: Record,
    selection: ThreatModel,
    run_id: str,
) -> None:
    """Write the network of one epoch.

    Args:
        path: the file; ``model-best.safetensors`` or ``model-last.safetensors``.
        record: how the weights did.
        selection: the attack of the record.
    """
    config = setup.config
    save_model(
        path,
        weights,
        genotype=setup.genotype,
        architecture=setup.architecture,
        data={
            "name": setup.source.name,
            "digest": setup.source.digest,
            "shape": list(setup.source.train.shape),
            "classes": setup.source.classes,
            "class_names": list(setup.source.class_names),
        },
        training={
            "run_id": run_id,
            "seed": config.seed,
            "method": config.method,
            "threat": config.training_threat().to_dict(),
            "epochs": config.epochs,
            "epoch": record.epoch,
            "checkpoint": "best" if path.name == BEST else "last",
            "rule": selection_rule(setup),
            "weights": "averaged" if config.ema_decay else "of that epoch",
            "validation": record.facts(selection, path.name),
        },
    )
