"""Retraining: from a genotype to a robust network, trained from scratch.

The genotype is a file, the folder of a search or the name of a published one. The network is
trained adversarially on one part of the training images; the other part chooses the epoch whose
weights are kept as best, and tells catastrophic overfitting. The test images are looked at once,
at the end.
"""

from typing import TYPE_CHECKING

from fastbandit._lazy import lazy

if TYPE_CHECKING:
    from fastbandit.retrain.__main__ import main, parse
    from fastbandit.retrain.config import (
        PRESETS,
        AttackConfig,
        FinalConfig,
        RetrainConfig,
        SelectionConfig,
    )
    from fastbandit.retrain.estimate import dry_run
    from fastbandit.retrain.genotypes import find_genotype
    from fastbandit.retrain.loop import retrain

__all__ = [
    "PRESETS",
    "AttackConfig",
    "FinalConfig",
    "RetrainConfig",
    "SelectionConfig",
    "dry_run",
    "find_genotype",
    "main",
    "parse",
    "retrain",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("main", "parse"), "__main__"),
        **dict.fromkeys(
            ("PRESETS", "AttackConfig", "FinalConfig", "RetrainConfig", "SelectionConfig"), "config"
        ),
        "dry_run": "estimate",
        "find_genotype": "genotypes",
        "retrain": "loop",
    },
)
