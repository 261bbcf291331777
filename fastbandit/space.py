"""Search spaces as data: which operations an edge may hold, and which edges there are.

A cell has one input, node 0, and ``nodes`` intermediate nodes; node j sums one operation of every
earlier node i < j, so four nodes have ten edges. There are ``cell_types`` types of cell, named
a, b, c, ... A *row* is one edge of one cell type (``row = cell * len(edges) + edge``); a *choice*
holds one operation index, an *arm*, for every row.

A space with ``inputs=2`` describes the cells of DARTS (Liu et al., ICLR 2019): nodes 0 and 1 are
then the outputs of the two cells before, so four nodes have fourteen edges. With two types of cell
the first is the normal cell and the second the reduction cell.

The spaces of :data:`SPACES` are those of Table 4.1 of Zhang, Xu et al., "Binary Neural Networks",
section 4.2 (Chen et al., "Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020).
The ``-light`` twins hold the forms of DARTS in place of the dense convolutions. The spaces of
:data:`BINARY_SPACES` are those of 1-bit networks, with two inputs: ``binary8`` is that of CP-NAS
(Zhuo et al., IJCAI 2020; "Binary Neural Networks", section 4.3), ``binary7`` the same without
``zero``, and ``binary8-dense`` holds dense convolutions. The position of an operation in its space
is the arm's index. This module loads nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from fastbandit.operations import OPERATIONS

__all__ = [
    "BINARY_SPACES",
    "CELL_NAMES",
    "OPERATION_NAMES",
    "SPACES",
    "Place",
    "SearchSpace",
    "cell_sequence",
    "get",
    "placements",
    "reduction_cells",
    "widest",
]

#: Names of the cell types, in their order.
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
#: The operations of each space by its name, those of 1-bit networks too.
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

_BINARY = (
    "zero",
    "skip_connect",
    "bin_dil_conv_3x3",
    "bin_dil_conv_5x5",
    "max_pool_3x3",
    "avg_pool_3x3",
    "bin_sep_conv_3x3",
    "bin_sep_conv_5x5",
)
#: The spaces of 1-bit networks: cells of two inputs, a normal and a reduction cell.
BINARY_SPACES: dict[str, tuple[str, ...]] = {
    "binary8": _BINARY,
    "binary7": _BINARY[1:],
    "binary8-dense": (
        "zero",
        "skip_connect",
        "bin_conv_d2_3x3",
        "bin_conv_d2_5x5",
        "max_pool_3x3",
        "avg_pool_3x3",
        "bin_conv_3x3",
        "bin_conv_5x5",
    ),
}
SPACES |= BINARY_SPACES

# Cells in the chain of a search of a space with two inputs; with one there is one of each type.
_CELLS_OF_TWO_INPUTS = 6
# The published networks of ten cells spread the six types by hand: a a b b c d d e f f.
_PUBLISHED_TEN = (0, 0, 1, 1, 2, 3, 3, 4, 5, 5)

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
        chain: cells of a supernet. None: one of each type, or 6 where cells have two inputs.

    Raises:
        ValueError: one of these does not hold.
    """

    name: str
    operations: tuple[str, ...]
    nodes: int = 4
    cell_types: int = 6
    inputs: int = 1
    chain: int | None = None

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
        if set(self.operations) == {"zero"}:
            raise ValueError(
                f"search space {self.name!r}: operations: expected one that is not zero, got zero"
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
        if self.chain is not None and self.chain < self.least_cells:
            raise ValueError(
                f"search space {self.name!r}: cells: expected {self.least_cells} or more in the "
                f"chain, so that each of {self.cell_types} types is there, got {self.chain}"
            )

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(source, node) of each edge of a cell: 0->1; 0->2, 1->2; 0->3, 1->3, 2->3; ...

        With two inputs the first node is 2: 0->2, 1->2; 0->3, 1->3, 2->3; ...
        """
        nodes = range(self.inputs, self.inputs + self.nodes)
        return tuple((source, node) for node in nodes for source in range(node))

    @property
    def least_cells(self) -> int:
        """Cells of the shortest chain that has each type: three for normal and reduction cells, as
        both of two would halve the map."""
        return 3 if (self.inputs, self.cell_types) == (2, 2) else self.cell_types

    @property
    def cells(self) -> int:
        """Cells in the chain of a supernet."""
        if self.chain is not None:
            return self.chain
        return self.cell_types if self.inputs == 1 else max(self.cell_types, _CELLS_OF_TWO_INPUTS)

    @property
    def binary(self) -> bool:
        """Whether an edge may hold an operation with 1-bit weights and 1-bit input."""
        return any(OPERATIONS[name].binary for name in self.operations)

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


def get(
    name: str, *, nodes: int = 4, cell_types: int | None = None, cells: int | None = None
) -> SearchSpace:
    """The search space of that name in :data:`SPACES`.

    Args:
        nodes: intermediate nodes of a cell.
        cell_types: different cells. Default: 6; in a space of 1-bit networks 2, the normal and
            the reduction cell.
        cells: in the chain of a supernet; see :class:`SearchSpace`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in SPACES:
        raise ValueError(f"search space: expected one of {', '.join(SPACES)}, got {name!r}")
    inputs = 2 if name in BINARY_SPACES else 1
    if cell_types is None:
        cell_types = 2 if inputs == 2 else 6
    return SearchSpace(name, SPACES[name], nodes, cell_types, inputs, cells)


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


def cell_sequence(
    cells: int, types: int = 6, *, inputs: int = 1, reductions: Sequence[int] = ()
) -> tuple[int, ...]:
    """The type of each cell in a chain of ``cells``.

    Two types with two inputs are the normal and the reduction cell. Otherwise cell i has type
    ``types * i // cells``; six types in ten cells are laid out as published, a a b b c d d e f f.

    Args:
        inputs: of a cell.
        reductions: indices of the cells that halve the map.
    """
    if inputs == 2 and types == 2:
        return tuple(int(index in reductions) for index in range(cells))
    if cells == 10 and types == 6:
        return _PUBLISHED_TEN
    return tuple(types * index // cells for index in range(cells))


def reduction_cells(cells: int) -> tuple[int, ...]:
    """Indices of the cells that halve the map and double the channels: V // 3 and 2 V // 3."""
    if cells < 1:
        raise ValueError(f"reduction_cells: cells: expected >= 1, got {cells}")
    return tuple(sorted({cells // 3, 2 * cells // 3}))


class Place(NamedTuple):
    """Where an operation stands in a network: all that its size and its time depend on.

    Attributes:
        operation: its name.
        channels: of its input and its output.
        stride: 1 or 2.
        height, width: of its input.
    """

    operation: str
    channels: int
    stride: int
    height: int
    width: int


def placements(
    space: SearchSpace, channels: int, size: Sequence[int]
) -> Iterator[tuple[int, int, Place]]:
    """Row, arm and place of every operation on every edge of the chain of ``space.cells`` cells.

    A type of cell may be in the chain several times; its rows then come as often.

    Args:
        channels: C of the first cell.
        size: height and width of the images.
    """
    height, width = size
    reductions = reduction_cells(space.cells)
    kinds = cell_sequence(space.cells, space.cell_types, inputs=space.inputs, reductions=reductions)
    if space.cells == space.cell_types:
        kinds = tuple(range(space.cells))
    for cell, kind in enumerate(kinds):
        before = (height, width)
        stride = 2 if cell in reductions else 1
        channels *= stride
        height, width = -(-height // stride), -(-width // stride)
        for edge, (source, _) in enumerate(space.edges):
            # The inputs of the cell have the size from before the reduction.
            first = source < space.inputs
            area = before if first else (height, width)
            for arm, name in enumerate(space.operations):
                place = Place(name, channels, stride if first else 1, *area)
                yield space.row(kind, edge), arm, place
