"""The cells that one arm for each edge of a search space describes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from fastbandit.space import CELL_NAMES, SearchSpace

__all__ = ["ZERO", "cells_of"]

#: The operation that leaves an edge out.
ZERO = "zero"


def cells_of(
    space: SearchSpace,
    choice: Sequence[int],
    mean: Sequence[Sequence[float]] | None,
    edges_per_node: Literal["all", 1, 2],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Cells as the JSON form of a genotype has them.

    Arguments and errors: :meth:`fastbandit.genotype.Genotype.from_choices`.

    Returns:
        The cells, and the edges that hold another operation than the chosen ``zero``, which would
        have left their node without a term.
    """
    arms = space.check_choice(choice)
    if edges_per_node not in ("all", 1, 2):
        raise ValueError(
            f"from_choices: edges_per_node: expected 'all', 1 or 2, got {edges_per_node!r}"
        )
    keep = space.inputs + space.nodes if edges_per_node == "all" else edges_per_node
    if edges_per_node != "all" and mean is None:
        raise ValueError(
            f"from_choices: mean: needed to rank edges when edges_per_node is {edges_per_node}"
        )
    table: Sequence[Sequence[float]] | None = None
    if mean is not None:
        table = mean.tolist() if hasattr(mean, "tolist") else mean
        if len(table) != space.rows or any(len(row) != space.arms for row in table):
            raise ValueError(f"from_choices: mean: expected {space.rows} rows of {space.arms} arms")

    def score(row: int, arm: int) -> float:
        value = 0.0 if table is None else float(table[row][arm])
        return value if value == value else float("-inf")

    cells, replaced = [], []
    for cell in range(space.cell_types):
        nodes: list[list[tuple[int, int]]] = [[] for _ in range(space.nodes)]  # source, row
        for edge, (source, node) in enumerate(space.edges):
            nodes[node - space.inputs].append((source, space.row(cell, edge)))
        for edges in nodes:
            if all(space.operations[arms[row]] == ZERO for _, row in edges):
                # Something has to reach the node: the best operation of the edge from the newest.
                row = edges[-1][1]
                others = [arm for arm in range(space.arms) if space.operations[arm] != ZERO]
                arms[row] = max(others, key=partial(score, row))
                replaced.append(space.edge_name(row))
        kept = nodes
        if edges_per_node != "all":
            kept = [
                sorted(
                    sorted(
                        (edge for edge in edges if space.operations[arms[edge[1]]] != ZERO),
                        key=lambda edge: -score(edge[1], arms[edge[1]]),
                    )[:keep]
                )
                for edges in nodes
            ]
        cells.append(
            {
                "name": CELL_NAMES[cell],
                "nodes": [
                    [{"op": space.operations[arms[row]], "source": source} for source, row in edges]
                    for edges in kept
                ],
                "concat": list(range(space.inputs, space.inputs + space.nodes)),
            }
        )
    return cells, replaced
