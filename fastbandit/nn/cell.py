"""What the cells of the supernet and of a final network have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["concatenate", "run_nodes"]


def run_nodes(
    inputs: Tensor | Sequence[Tensor],
    edges: Sequence[tuple[int, int]],
    operations: Iterable[Callable[[Tensor], Tensor]],
) -> list[Tensor]:
    """Every node of a cell: node j is the sum of o(node i) over its edges i -> j.

    Args:
        inputs: node 0, the input of the cell after preprocessing, [N, C, H, W]; or nodes 0 and 1.
        edges: (source, node) of each edge, those into the first node after the inputs first, at
            least one into each node.
        operations: that of each edge.

    Returns:
        Nodes 0, 1, 2, ...
    """
    values = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    terms = 0  # of the last node
    for (source, node), operation in zip(edges, operations, strict=True):
        y = operation(values[source])
        if node == len(values):
            values.append(y)
            terms = 1
        else:
            values[node] = _add(values[node], y, terms)
            terms += 1
    return values


def _add(total: Tensor, term: Tensor, terms: int) -> Tensor:
    """total + term, in place where the total is a sum that was made here.

    What a module returned may be somebody else's too: skip_connect returns the node itself, a hook
    keeps it, another module's backward pass needs it. Under autocast terms differ in dtype, and
    the sum has the wider one.
    """
    # A compiler reuses memory itself.
    if terms < 2 or total.dtype != term.dtype or torch.compiler.is_compiling():
        return total + term
    return total.add_(term)


def concatenate(values: Sequence[Tensor]) -> Tensor:
    """The given nodes along the channels; a single one is not copied."""
    return values[0] if len(values) == 1 else torch.cat(list(values), dim=1)
