"""What the cells of the supernet and of a final network have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Plan", "accumulate", "concatenate", "run_nodes"]

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
        total: Tensor | None = None
        for source, operation in edges:
            total = accumulate(total, operation(values[source]), values)
        assert total is not None
        values.append(total)
    return values


def accumulate(total: Tensor | None, term: Tensor, nodes: Sequence[Tensor]) -> Tensor:
    """total + term, in place where the sum so far is nobody else's: it may be a node itself
    (skip_connect) or a view, but no operation keeps its result for the backward pass. Under
    autocast terms differ in dtype, and the sum has the wider one."""
    if total is None:
        return term
    if torch.compiler.is_compiling():  # a compiler reuses memory itself, and stops at _is_view
        return total + term
    if total._is_view() or total.dtype != term.dtype or any(total is node for node in nodes):
        return total + term
    return total.add_(term)


def concatenate(values: Sequence[Tensor]) -> Tensor:
    """The given nodes along the channels; a single one is not copied."""
    return values[0] if len(values) == 1 else torch.cat(list(values), dim=1)
