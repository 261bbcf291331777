"""Search spaces as data: which operations an edge may hold, and which edges there are.

A cell has one input, node 0, and ``nodes`` intermediate nodes; node j sums one operation of every
earlier node i < j, so four nodes have ten edges. There are ``cell_types`` types of cell, named
a, b, c, ... A *row* is one edge of one cell type (``row = cell * len(edges) + edge``); a *choice*
holds one operation index, an *arm*, for every row.

A space with ``inputs=2`` describes the cells of DARTS (Liu et al., 2019): nodes 0 and 1 are then
the outputs of the two cells before.

The spaces of :data:`SPACES` are those of Table 4.1 of Zhang, Xu et al., "Binary Neural Networks",
section 4.2 (Chen et al., "Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020).
The ``-light`` twins hold the forms of DARTS in place of the dense convolutions. The position of an
operation in its space is the arm's index. This module loads nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from fastbandit.operations import OPERATIONS

__all__ = [
    "CELL_NAMES",
    "OPERATION_NAMES",
    "SPACES",
    "SearchSpace",
    "get",
    "reduction_cells",
    "widest",
]

CELL_NAMES = "abcdefghijklmnopqrstuvwxyz"

_GENERAL = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "conv_3x3",
    "conv_5x5",
    "sep_conv_3x3",
    "sep_conv_5x5",
)
_LIGHT = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "sep_conv_m_3x3",
    "sep_conv_m_5x5",
)
_ROBUST = ("gab_filt_3x3", "dtp_blok_3x3")

# A 1x1 depthwise convolution only scales channels; dil_conv_1x1 keeps it so that every arm of the
# light spaces has the one composition.
SPACES: dict[str, tuple[str, ...]] = {
    "general7": _GENERAL,
    "robust8": (*_GENERAL, "gab_filt_3x3"),
    "robust9": (*_GENERAL, *_ROBUST),
    "robust10": (*_GENERAL, *_ROBUST, "conv_1x1"),
    "robust11": (*_GENERAL, *_ROBUST, "conv_1x1", "conv_7x7"),
    "general7-light": _LIGHT,
    "robust8-light": (*_LIGHT, "gab_filt_3x3"),
    "robust9-light": (*_LIGHT, *_ROBUST),
    "robust10-light": (*_LIGHT, *_ROBUST, "dil_conv_1x1"),
    "robust11-light": (*_LIGHT, *_ROBUST, "dil_conv_1x1", "dil_conv_7x7"),
}

#: Every operation there is, each once.
OPERATION_NAMES: tuple[str, ...] = tuple(OPERATIONS)


@dataclass(frozen=True)
class SearchSpace:
    """One search space: the operations of an edge and the shape of a cell.

    Args:
        name: as in :data:`SPACES`, or any name for a space of your own.
        operations: operation names in the order of their arms; each one of
            :data:`OPERATION_NAMES`, none twice.
        nodes: intermediate nodes of a cell, at least 1.
        cell_types: different cells, 1 to 26.
        inputs: earlier cells that a cell reads, 1 or 2; nodes below this number are these.

    Raises:
        ValueError: one of these does not hold.
    """

    name: str
    operations: tuple[str, ...]
    nodes: int = 4
    cell_types: int = 6
    inputs: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", tuple(self.operations))
        unknown = [name for name in self.operations if name not in OPERATION_NAMES]
        if unknown or not self.operations:
            raise ValueError(
                f"search space {self.name!r}: operations: expected one or more of "
                f"{', '.join(OPERATION_NAMES)}, got {', '.join(unknown) or 'none'}"
            )
        if len(set(self.operations)) < len(self.operations):
            raise ValueError(
                f"search space {self.name!r}: operations: expected each once, "
                f"got {', '.join(self.operations)}"
            )
        if self.nodes < 1:
            raise ValueError(f"search space {self.name!r}: nodes: expected >= 1, got {self.nodes}")
        if not 1 <= self.cell_types <= len(CELL_NAMES):
            raise ValueError(
                f"search space {self.name!r}: cell_types: expected 1 to {len(CELL_NAMES)}, "
                f"got {self.cell_types}"
            )
        if self.inputs not in (1, 2):
            raise ValueError(
                f"search space {self.name!r}: inputs: expected 1 or 2, got {self.inputs}"
            )

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(source, node) of each edge of a cell: 0->1; 0->2, 1->2; 0->3, 1->3, 2->3; ...

        With two inputs the first node is 2: 0->2, 1->2; 0->3, 1->3, 2->3; ...
        """
        nodes = range(self.inputs, self.inputs + self.nodes)
        return tuple((source, node) for node in nodes for source in range(node))

    def check_one_input(self, user: str) -> None:
        """Refuse two inputs on behalf of ``user``, which builds cells of one.

        Raises:
            ValueError: :attr:`inputs` is not 1.
        """
        if self.inputs != 1:
            raise ValueError(
                f"{user}: space: expected cells of one input, got {self.inputs} inputs "
                f"({self.name!r})"
            )

    @property
    def arms(self) -> int:
        """Operations to choose from on each edge."""
        return len(self.operations)

    @property
    def rows(self) -> int:
        """Edges of all cell types together: the length of a choice."""
        return self.cell_types * len(self.edges)

    def row(self, cell: int, edge: int) -> int:
        """The row of edge number ``edge`` of cell type number ``cell``."""
        return cell * len(self.edges) + edge

    def edge_name(self, row: int) -> str:
        """Name of a row, such as ``'a:0->1'``: cell type, source, node."""
        if not 0 <= row < self.rows:
            raise ValueError(f"edge_name: row: expected 0 to {self.rows - 1}, got {row}")
        cell, edge = divmod(row, len(self.edges))
        source, node = self.edges[edge]
        return f"{CELL_NAMES[cell]}:{source}->{node}"

    @property
    def edge_names(self) -> tuple[str, ...]:
        """The name of every row."""
        return tuple(self.edge_name(row) for row in range(self.rows))

    def check_choice(self, choice: Sequence[int]) -> list[int]:
        """``choice`` as a list of ints; a tensor or an array will do.

        Raises:
            ValueError: its length is not :attr:`rows` or an arm is out of range.
        """
        values = choice.tolist() if hasattr(choice, "tolist") else list(choice)
        if len(values) != self.rows:
            raise ValueError(
                f"search space {self.name!r}: choice: expected {self.rows} arms "
                f"({self.cell_types} cells of {len(self.edges)} edges), got {len(values)}"
            )
        for row, arm in enumerate(values):
            if isinstance(arm, bool) or not isinstance(arm, int) or not 0 <= arm < self.arms:
                raise ValueError(
                    f"search space {self.name!r}: choice[{row}] ({self.edge_name(row)}): "
                    f"expected an arm from 0 to {self.arms - 1}, got {arm!r}"
                )
        return values


def get(name: str, *, nodes: int = 4, cell_types: int = 6) -> SearchSpace:
    """The search space of that name in :data:`SPACES`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in SPACES:
        raise ValueError(f"search space: expected one of {', '.join(SPACES)}, got {name!r}")
    return SearchSpace(name, SPACES[name], nodes, cell_types)


def widest(
    space: SearchSpace | str, *, by: Literal["memory", "compute"] = "memory", channels: int = 16
) -> list[int]:
    """The choice that costs most: what a pre-flight has to survive.

    Args:
        space: the space or its name.
        by: ``memory``: most activations kept for the backward pass, multiplications break ties;
            ``compute``: the other way round. The two differ only where one arm keeps little but
            multiplies much (``conv_7x7``).
        channels: width at which multiplications are compared.

    Returns:
        One arm for each row; the lowest index among equals.
    """
    space = get(space) if isinstance(space, str) else space
    if by not in ("memory", "compute"):
        raise ValueError(f"widest: by: expected 'memory' or 'compute', got {by!r}")

    def cost(arm: int) -> tuple[int, int]:
        operation = OPERATIONS[space.operations[arm]]
        work = operation.dense * channels + operation.fixed
        return (operation.maps, work) if by == "memory" else (work, operation.maps)

    return [max(range(space.arms), key=cost)] * space.rows


def reduction_cells(cells: int) -> tuple[int, ...]:
    """Indices of the cells that halve the map and double the channels: V // 3 and 2 V // 3."""
    if cells < 1:
        raise ValueError(f"reduction_cells: cells: expected >= 1, got {cells}")
    return tuple(sorted({cells // 3, 2 * cells // 3}))
