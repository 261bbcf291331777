"""What the cells of the supernet and of a final network have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Plan", "concatenate", "run_nodes"]

#: For each node from 1 on, its incoming edges as (source node, operation); at least one each.
Plan = Sequence[Sequence[tuple[int, Callable[[Tensor], Tensor]]]]


def run_nodes(x: Tensor, plan: Plan) -> list[Tensor]:
    """Every node of a cell: node j is the sum of o(node i) over its edges i -> j.

    Args:
        x: node 0, the input of the cell after preprocessing, [N, C, H, W].
        plan: edges of each node; resolved by the caller, so that nothing is looked up here.

    Returns:
        Nodes 0, 1, 2, ...
    """
    values = [x]
    for edges in plan:
        source, operation = edges[0]
        total = operation(values[source])
        if len(edges) > 1:
            # Out of place: the first term may be another node itself (skip_connect). The result
            # is new and no backward needs it, so the other terms are added in place.
            source, operation = edges[1]
            total = total + operation(values[source])
            for source, operation in edges[2:]:
                total += operation(values[source])
        values.append(total)
    return values


def concatenate(values: Sequence[Tensor]) -> Tensor:
    """The given nodes along the channels; a single one is not copied."""
    return values[0] if len(values) == 1 else torch.cat(list(values), dim=1)
