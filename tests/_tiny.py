"""The smallest search that still has all parts, for tests that run one."""

from fastbandit.config import merge
from fastbandit.search import SearchConfig

# 7 + 1 * (7 + ... + 2) = 34 epochs of one batch; of a space cut down to three operations, 8.
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
