"""Kernels that anyone can use without the search.

Each op is declared once with ``torch.library`` and a plain-PyTorch reference; native kernels are
used where they are built (see :func:`fastbandit._native.status`). Importing this loads torch and
no other third-party package.
"""

from fastbandit import _native
from fastbandit.ops.bandit import (
    bandit_bounds,
    bandit_probabilities,
    bandit_prune_,
    bandit_sample,
    bandit_step_,
    bandit_update_,
)

__all__ = [
    "bandit_bounds",
    "bandit_probabilities",
    "bandit_prune_",
    "bandit_sample",
    "bandit_step_",
    "bandit_update_",
]

_native.load()
