"""The anti-bandit search for a robust architecture.

Algorithm 8 of *Binary Neural Networks* (Zhang, Xu et al.), that is ABanditNAS (Chen et al.,
"Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020): sample one operation for
every edge, train that path adversarially for one epoch, credit the bandit with its validation
accuracy, and after K * T samples abandon on every edge the arm with the smallest upper bound,
until one is left.
"""

from typing import TYPE_CHECKING

from fastbandit._lazy import lazy

if TYPE_CHECKING:
    from fastbandit.runs.session import OutOfMemoryError
    from fastbandit.search.__main__ import main, parse
    from fastbandit.search.config import (
        PRESETS,
        AttackConfig,
        BanditConfig,
        FinalConfig,
        SearchConfig,
    )
    from fastbandit.search.estimate import dry_run
    from fastbandit.search.run import search

__all__ = [
    "PRESETS",
    "AttackConfig",
    "BanditConfig",
    "FinalConfig",
    "OutOfMemoryError",
    "SearchConfig",
    "dry_run",
    "main",
    "parse",
    "search",
]

_CONFIG = ("PRESETS", "AttackConfig", "BanditConfig", "FinalConfig", "SearchConfig")
__getattr__ = lazy(
    __name__,
    {
        **dict.fromkeys(("main", "parse"), "__main__"),
        **dict.fromkeys(_CONFIG, "config"),
        "OutOfMemoryError": "run",
        "dry_run": "estimate",
        "search": "run",
    },
)
