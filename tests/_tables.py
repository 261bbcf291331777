"""Invented tables of accuracies, of the form that fastbandit/study/tabular/table.py describes."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

COLUMNS = ["clean", "robust"]


def arrays(operations: int = 5, edges: int = 3, seed: int = 0, interaction: float = 0.02):
    """All cells in a shuffled order; robust accuracies are additive but for the interaction.

    Cells without a path from input to output (operation 0 lets nothing through; three edges) all
    compute the same, and so have the same accuracies.
    """
    random = np.random.default_rng(seed)
    cells = np.array(list(itertools.product(range(operations), repeat=edges)), dtype=np.uint8)
    random.shuffle(cells)
    n = len(cells)
    effects = random.normal(0, 0.04, (edges, operations))
    robust = 0.5 + effects[np.arange(edges), cells].sum(1) + interaction * random.normal(size=n)
    accuracy = np.stack([robust + 0.2, robust], 1).clip(0, 1)
    accuracy = (100_000 * accuracy).round().astype(np.uint32)
    same_as = np.arange(n).astype(np.uint16)
    if edges == 3:
        dead = np.flatnonzero((cells[:, 1] == 0) & ((cells[:, 0] == 0) | (cells[:, 2] == 0)))
        accuracy[dead], same_as[dead] = 10_000, dead[0]
    return {
        "cells": cells, "accuracy": accuracy, "columns": np.array(COLUMNS), "same_as": same_as
    }  # fmt: skip


def write_table(path: Path, **changes) -> Path:
    """An invented table as a file.

    Args:
        changes: of :func:`arrays`; or arrays in place of its own, by name.
    """
    kinds = ("operations", "edges", "seed", "interaction")
    found = arrays(**{name: changes.pop(name) for name in kinds if name in changes})
    np.savez_compressed(path, **{**found, **changes})
    return path
