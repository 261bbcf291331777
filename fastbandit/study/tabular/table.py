"""A table of the accuracies of all cells of a small space, as a file that the user names.

The form, an ``.npz`` file of arrays of numbers and text:

- ``cells`` [n, edges]: the operation on each edge, from 0; all n = operations ** edges cells, once
  each, in any order. Edges are in the order of their targets: 0-1, 0-2, 1-2, 0-3, ...;
- ``accuracy`` [n, columns]: 100,000 times the accuracy;
- ``columns`` [columns]: their names;
- ``same_as`` [n]: the first cell (its row) that computes the same function.

NAS-RobBench-201 (Wu et al., "Robust NAS under adversarial training: benchmark, theory, and beyond",
ICLR 2024; CC BY-SA 4.0) can be written so. No table comes with this package.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastbandit.data import DataError
from fastbandit.data.files import Npz

__all__ = ["SCALE", "Table", "TableError", "read_table"]

#: What an accuracy of 1 is in the file.
SCALE = 100_000
# All cells of two operations on more edges would not fit the memory.
_MOST_EDGES = 24
_ARRAYS = ("cells", "accuracy", "columns", "same_as")


class TableError(ValueError):
    """A file that is no table of this form; the message starts with its name."""


@dataclass(frozen=True)
class Table:
    """The accuracies of one column, by code: the operations of a cell as digits, edge 0 first."""

    path: Path
    digest: str
    """SHA-256 of the file"""
    column: str
    operations: int
    edges: int
    accuracy: Tensor
    """float64 [operations ** edges], in [0, 1]"""
    same: Tensor
    """int64 [operations ** edges]: code of the cell that stands for all that compute the same"""

    @property
    def place_values(self) -> Tensor:
        """int64 [edges]: what an operation on each edge counts in a code."""
        powers = torch.arange(self.edges - 1, -1, -1)
        return torch.tensor(self.operations) ** powers

    @property
    def cells(self) -> Tensor:
        """int64 [operations ** edges, edges]: the operations of each code."""
        codes = torch.arange(len(self.accuracy)).unsqueeze(1)
        return codes // self.place_values % self.operations

    def connected(self, none: int) -> Tensor:
        """Cells with a path from input to output, bool [operations ** edges].

        Args:
            none: the operation that lets nothing through.

        Raises:
            TableError: the edges are not those of a complete graph of nodes.
        """
        nodes = 2
        while nodes * (nodes - 1) // 2 < self.edges:
            nodes += 1
        if nodes * (nodes - 1) // 2 != self.edges:
            raise TableError(
                f"{self.path}: cells: expected 1, 3, 6, 10, ... edges (each node with all before "
                f"it) to tell which cells have a path, got {self.edges}; give "
                "--tabular.networks all"
            )
        passes = self.cells != none
        reached = [torch.ones(len(self.accuracy), dtype=torch.bool)]
        edge = 0
        for target in range(1, nodes):
            now = torch.zeros_like(reached[0])
            for source in range(target):
                now |= reached[source] & passes[:, edge]
                edge += 1
            reached.append(now)
        return reached[-1]


def read_table(path: str | Path, column: str) -> Table:
    """Read and check a table, an ``.npz`` file.

    Raises:
        TableError: it cannot be read, or is not of the form that this module describes.
    """
    path = Path(path)
    if not path.is_file():
        raise TableError(f"{path}: expected a table of accuracies (.npz), found no such file")
    try:
        with Npz(path) as arrays:
            missing = [name for name in _ARRAYS if name not in arrays]
            if missing:
                raise TableError(
                    f"{path}: expected the arrays {', '.join(_ARRAYS)}, got "
                    f"{', '.join(arrays) or 'none'}"
                )
            cells, accuracy, columns, same_as = (arrays[name] for name in _ARRAYS)
    except DataError as error:
        raise TableError(str(error)) from None
    _integers(path, "cells", cells, 2)
    n, edges = cells.shape
    if not n or not 1 <= edges <= _MOST_EDGES:
        raise TableError(
            f"{path}: cells: expected cells of 1 to {_MOST_EDGES} edges, got {list(cells.shape)}"
        )
    operations = int(cells.max()) + 1
    _range(path, "cells", cells, 0, max(operations - 1, 0))
    if operations < 2 or n != operations**edges:
        raise TableError(
            f"{path}: cells: expected all {operations}^{edges} = {operations**edges:,} cells of "
            f"{operations} operations on {edges} edges, two operations or more; got {n:,}"
        )
    digits = operations ** np.arange(edges - 1, -1, -1, dtype=np.int64)
    codes = cells.astype(np.int64) @ digits
    distinct, counts = np.unique(codes, return_counts=True)
    if len(distinct) != n:
        twice = cells[np.flatnonzero(codes == distinct[counts.argmax()])[1]].tolist()
        raise TableError(f"{path}: cells: expected each cell once, got {twice} twice")
    if columns.ndim != 1 or columns.dtype.kind != "U" or len(set(columns.tolist())) < len(columns):
        raise TableError(
            f"{path}: columns: expected different names as text, got "
            f"{columns.dtype} {list(columns.shape)}"
        )
    names = columns.tolist()
    _integers(path, "accuracy", accuracy, 2)
    if accuracy.shape != (n, len(names)):
        raise TableError(
            f"{path}: accuracy: expected [{n}, {len(names)}], a column for each name, got "
            f"{list(accuracy.shape)}"
        )
    _range(path, "accuracy", accuracy, 0, SCALE)
    if column not in names:
        raise TableError(f"{path}: expected one of the columns {', '.join(names)}; got {column!r}")
    _integers(path, "same_as", same_as, 1)
    if same_as.shape != (n,):
        raise TableError(f"{path}: same_as: expected [{n}], got {list(same_as.shape)}")
    _range(path, "same_as", same_as, 0, n - 1)
    same_as = same_as.astype(np.int64)
    wrong = np.flatnonzero(
        (same_as[same_as] != same_as) | (accuracy[same_as] != accuracy).any(axis=1)
    )
    if len(wrong):
        raise TableError(
            f"{path}: same_as: expected a cell that stands for itself and has the same "
            f"accuracies, got {same_as[wrong[0]]} for cell {wrong[0]}"
        )
    values, same = np.empty(n), np.empty(n, dtype=np.int64)
    values[codes] = accuracy[:, names.index(column)] / SCALE
    same[codes] = codes[same_as]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = map(torch.from_numpy, (values, same))
    return Table(path, digest, column, operations, edges, *tensors)


def _integers(path: Path, name: str, array: np.ndarray, dimensions: int) -> None:
    if array.dtype.kind not in "iu" or array.ndim != dimensions:
        raise TableError(
            f"{path}: {name}: expected integers with {dimensions} dimensions, got "
            f"{array.dtype} {list(array.shape)}"
        )


def _range(path: Path, name: str, array: np.ndarray, least: int, most: int) -> None:
    bad = np.argwhere((array < least) | (array > most))
    if len(bad):
        place = tuple(bad[0].tolist())
        raise TableError(
            f"{path}: {name}: expected numbers in {least}..{most}, got {array[place]} at "
            f"{list(place)}"
        )
