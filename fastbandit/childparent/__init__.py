"""CP-NAS, the child-parent search for 1-bit networks: its bandit and its log."""

from fastbandit.childparent.bandit import ChildParent, ChildParentSettings, Means, score
from fastbandit.childparent.log import ChildParentSample, ChildParentStart, replay

__all__ = [
    "ChildParent",
    "ChildParentSample",
    "ChildParentSettings",
    "ChildParentStart",
    "Means",
    "replay",
    "score",
]
