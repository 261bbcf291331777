"""How robust a network is, and how sure that is.

Clean accuracy, a list of attacks, and the worst case of all of them image by image, which is the
number; each with its number of images and interval. Checks of the kind that catch gradient masking
stand beside it with a verdict each.

What is known about an image is one bit for each attack, so an evaluation can stop anywhere, go on
with another batch size or number of processes, and give the same result.
"""

from typing import TYPE_CHECKING

from fastbandit._lazy import lazy

if TYPE_CHECKING:
    from fastbandit.evaluate.__main__ import main, parse
    from fastbandit.evaluate.config import PRESETS, ChecksConfig, EvaluateConfig
    from fastbandit.evaluate.estimate import dry_run
    from fastbandit.evaluate.run import evaluate_model

__all__ = [
    "PRESETS",
    "ChecksConfig",
    "EvaluateConfig",
    "dry_run",
    "evaluate_model",
    "main",
    "parse",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("PRESETS", "ChecksConfig", "EvaluateConfig"), "config"),
        "dry_run": "estimate",
        "evaluate_model": "run",
        **dict.fromkeys(("main", "parse"), "__main__"),
    },
)
