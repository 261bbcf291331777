"""The smallest search that still has all parts, for tests that run one."""

from fastbandit import space
from fastbandit.config import merge
from fastbandit.search import SearchConfig

# 7 + 1 * (7 + ... + 2) = 34 epochs of one batch; in the small space, 8.
TINY = {
    "name": "tiny",
    "space": "general7-light",
    "init_channels": 2,
    "train_limit": 48,
    "test_limit": 32,
    "batch_size": 24,
    "evaluation_batch_size": 24,
    "threads": 1,
    "device": "cpu",
    "bandit": {"rounds": 1},
    "final": {"steps": 2, "step_size": "0.1", "tune_epochs": 0, "network_epochs": 0},
}


def tiny(**changes) -> SearchConfig:
    return merge(merge(SearchConfig(), TINY, "tiny"), changes, "test")


# What is left of a space: operations with weights of their own.
_LEFT = {"general7-light": slice(2, 5), "robust8-light": slice(-3, None), "gated3": slice(None)}


def small(name: str, **shape: int) -> space.SearchSpace:
    """Three operations on six edges of two cells: 3 + 1 * (3 + 2) = 8 epochs of a search."""
    if name not in _LEFT:
        return space.SearchSpace(name, space.SPACES[name], **shape)
    return space.SearchSpace(name, space.SPACES[name][_LEFT[name]], nodes=2, cell_types=2)


def few_edges(patch) -> None:
    """Make the space of :data:`TINY` have six edges, as the small one, and all its operations."""
    patch.setattr(space, "get", lambda name, **_: space.SearchSpace(name, space.SPACES[name], 2, 2))


def small_space(patch=None) -> None:
    """Make the space of :data:`TINY` small: for good, or as long as a ``MonkeyPatch`` lasts."""
    (setattr if patch is None else patch.setattr)(space, "get", small)
