"""The cells that one arm for each edge of a search space describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from fastbandit.space import CELL_NAMES, SearchSpace

__all__ = ["cells_of"]


def cells_of(
    space: SearchSpace,
    choice: Sequence[int],
    mean: Sequence[Sequence[float]] | None,
    edges_per_node: Literal["all", 1, 2],
) -> list[dict[str, Any]]:
    """Cells as the JSON form of a genotype has them.

    Arguments and errors: :meth:`fastbandit.genotype.Genotype.from_choices`.
    """
    space.check_one_input("from_choices")
    arms = space.check_choice(choice)
    if edges_per_node not in ("all", 1, 2):
        raise ValueError(
            f"from_choices: edges_per_node: expected 'all', 1 or 2, got {edges_per_node!r}"
        )
    keep = space.nodes if edges_per_node == "all" else edges_per_node
    score = [0.0] * space.rows
    if edges_per_node != "all":
        if mean is None:
            raise ValueError(
                f"from_choices: mean: needed to rank edges when edges_per_node is {edges_per_node}"
            )
        table = mean.tolist() if hasattr(mean, "tolist") else mean
        if len(table) != space.rows or any(len(row) != space.arms for row in table):
            raise ValueError(f"from_choices: mean: expected {space.rows} rows of {space.arms} arms")
        score = [float(row[arm]) for row, arm in zip(table, arms, strict=True)]
        score = [value if value == value else float("-inf") for value in score]
    cells = []
    for cell in range(space.cell_types):
        nodes: list[list[tuple[int, int]]] = [[] for _ in range(space.nodes)]  # source, row
        for edge, (source, node) in enumerate(space.edges):
            nodes[node - 1].append((source, space.row(cell, edge)))
        cells.append(
            {
                "name": CELL_NAMES[cell],
                "nodes": [
                    [
                        {"op": space.operations[arms[row]], "source": source}
                        for source, row in sorted(
                            sorted(edges, key=lambda edge: -score[edge[1]])[:keep]
                        )
                    ]
                    for edges in nodes
                ],
                "concat": list(range(1, space.nodes + 1)),
            }
        )
    return cells
