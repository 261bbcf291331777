"""fastbandit: anti-bandit search for architectures that stay accurate under attack.

Importing the package loads no third-party module; ``fastbandit.attacks`` and the others are loaded
when they are first asked for. The kernels are in :mod:`fastbandit.ops` (loads torch and nothing
else); the commands are ``python -m fastbandit.search``, ``.retrain``, ``.evaluate``, ``.report``,
``.study``, ``.export`` and ``.info``.
"""

from typing import TYPE_CHECKING

from fastbandit._lazy import lazy
from fastbandit._version import __version__

if TYPE_CHECKING:
    from fastbandit import attacks as attacks
    from fastbandit import bandit as bandit
    from fastbandit import callbacks as callbacks
    from fastbandit import childparent as childparent
    from fastbandit import config as config
    from fastbandit import data as data
    from fastbandit import distributed as distributed
    from fastbandit import export as export
    from fastbandit import genotype as genotype
    from fastbandit import info as info
    from fastbandit import latency as latency
    from fastbandit import model_code as model_code
    from fastbandit import models as models
    from fastbandit import nn as nn
    from fastbandit import operations as operations
    from fastbandit import ops as ops
    from fastbandit import packed as packed
    from fastbandit import report as report
    from fastbandit import retrain as retrain
    from fastbandit import runs as runs
    from fastbandit import search as search
    from fastbandit import space as space
    from fastbandit import study as study
    from fastbandit import threat as threat
    from fastbandit import training as training
    from fastbandit.evaluate.once import evaluate
    from fastbandit.info import build_info
    from fastbandit.models import load

_MODULES = (
    "attacks",
    "bandit",
    "callbacks",
    "childparent",
    "config",
    "data",
    "distributed",
    "evaluate",  # the package of the command, which can be called: see its docstring
    "export",
    "genotype",
    "info",
    "latency",
    "model_code",
    "models",
    "nn",
    "operations",
    "ops",
    "packed",
    "report",
    "retrain",
    "runs",
    "search",
    "space",
    "study",
    "threat",
    "training",
)

__all__ = ["__version__", "build_info", "evaluate", "load"]
__getattr__ = lazy(__name__, {"build_info": "info", "load": "models"}, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
