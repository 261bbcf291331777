"""How robust a network is, and how sure that is.

Clean accuracy, a list of attacks, and the worst case of all of them image by image, which is the
number; each with its number of images and interval. Checks of the kind that catch gradient masking
stand beside it with a verdict each.

What is known about an image is one bit for each attack, so an evaluation can stop anywhere, go on
with another batch size or number of processes, and give the same result.

The package is also a function: ``fastbandit.evaluate(model, images, labels, epsilon="8/255")`` is
:func:`fastbandit.evaluate.once.evaluate`. Both have the name, so the module is callable.
"""

import inspect
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fastbandit._lazy import lazy

if TYPE_CHECKING:
    from fastbandit.evaluate.__main__ import main, parse
    from fastbandit.evaluate.config import PRESETS, ChecksConfig, EvaluateConfig
    from fastbandit.evaluate.estimate import dry_run
    from fastbandit.evaluate.robustness import Robustness, RobustnessWarning
    from fastbandit.evaluate.run import evaluate_model

__all__ = [
    "PRESETS",
    "ChecksConfig",
    "EvaluateConfig",
    "Robustness",
    "RobustnessWarning",
    "dry_run",
    "evaluate_model",
    "main",
    "parse",
]

__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("PRESETS", "ChecksConfig", "EvaluateConfig"), "config"),
        **dict.fromkeys(("Robustness", "RobustnessWarning"), "robustness"),
        "dry_run": "estimate",
        "evaluate_model": "run",
        **dict.fromkeys(("main", "parse"), "__main__"),
    },
)


class _CallableModule(ModuleType):
    """This module, which is called as the function of its name.

    What one calls is imported at the first call: ``python -m fastbandit.evaluate`` imports this
    module before it may load torch.
    """

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        from fastbandit.evaluate.once import evaluate

        return evaluate(*arguments, **settings)

    @property
    def __signature__(self) -> inspect.Signature:
        from fastbandit.evaluate.once import evaluate

        return inspect.signature(evaluate)


sys.modules[__name__].__class__ = _CallableModule
