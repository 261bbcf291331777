"""Which policy finds better arms, and do better networks follow?

Two halves. On **simulated** searches (:mod:`fastbandit.bandit.simulation`), hundreds of seeds in
seconds: policy against policy and against chance at the same number of trained paths, and what
lambda, the number of operations, paths that are only evaluated, and the bonus do. On **real** data
(``--data``), few and small: each policy searches several times, the networks found and random ones
are trained from scratch in the same way, and their accuracies are compared.

A **comparison** (``--compare.searches N``, :mod:`fastbandit.study.compare`) is the form of that in
which a claim can be shown: searches against random networks of their size and of their cost, by a
protocol that is frozen before, on test images that are opened once.

Every finished piece - one simulated setting, one search, one trained network - is stored, so the
same command goes on where it was stopped.
"""

from typing import TYPE_CHECKING

from fastbandit._lazy import lazy

if TYPE_CHECKING:
    from fastbandit.study.__main__ import main, parse
    from fastbandit.study.compare.config import CompareConfig
    from fastbandit.study.config import PRESETS, RealConfig, SimulatedConfig, StudyConfig
    from fastbandit.study.run import study

__all__ = [
    "PRESETS",
    "CompareConfig",
    "RealConfig",
    "SimulatedConfig",
    "StudyConfig",
    "main",
    "parse",
    "study",
]

_CONFIG = ("PRESETS", "RealConfig", "SimulatedConfig", "StudyConfig")
__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("main", "parse"), "__main__"),
        **dict.fromkeys(_CONFIG, "config"),
        "CompareConfig": "compare.config",
        "study": "run",
    },
)
