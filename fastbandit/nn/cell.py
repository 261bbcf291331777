"""What the cells of the supernet and of a final network have in common."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.nn.shortcuts import Plain
from fastbandit.ops.norm_sum import computed as total
from fastbandit.ops.norm_sum import fork, waits

__all__ = ["Term", "compiling", "concatenate", "run_nodes", "summand", "terms_of", "total"]

Term = Tensor | ops.Normalized
"""What is added up; see :func:`fastbandit.ops.norm_sum`."""


class Summand(Protocol):
    """A module whose last step is a sum or a batch norm, which a node can do for all its terms."""

    def terms(self, x: Tensor) -> list[Term]:
        """What ``forward(x)`` is the sum of; none where it is 0 and the sum of a node needs no
        gradient of it."""


_PLAIN: dict[type, Plain[nn.Module]] = {}
Kind = TypeVar("Kind", bound=type)


def summand(kind: Kind) -> Kind:
    """Class decorator of a :class:`Summand`."""
    _PLAIN[kind] = Plain(kind)
    return kind


def compiling() -> bool:
    """Whether a compiler or exporter looks on; it is shown the layers themselves."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting()


def terms_of(operation: Callable[[Tensor], Tensor], x: Tensor) -> list[Term]:
    """What ``operation(x)`` is the sum of.

    An operation to which something is attached (see :class:`~fastbandit.nn.shortcuts.Plain`), or
    that is no :class:`Summand`, is called.
    """
    question = _PLAIN.get(type(operation))
    module: Any = operation
    plain = question is not None and not compiling() and bool(question(module))
    if not plain:
        return [operation(x)]
    terms: list[Term] = module.terms(x)
    return terms


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
    operations = list(operations)
    given, last = len(values), len(edges) - 1
    readers = [_readers(value, i, given, edges, operations) for i, value in enumerate(values)]
    terms: list[Term] = []  # of the next node
    for index, ((source, node), operation) in enumerate(zip(edges, operations, strict=True)):
        ends = index == last or edges[index + 1][1] != node
        x = next(readers[source])
        if ends and not terms:
            # A batch norm that is not added to anything is best left to the operation.
            values.append(operation(x))
        else:
            terms += terms_of(operation, x)
            if not ends:
                continue
            values.append(total(terms))
            terms = []
        readers.append(_readers(values[-1], node, given, edges, operations))
    return [next(left) for left in readers]


def _readers(
    value: Tensor,
    node: int,
    given: int,
    edges: Sequence[tuple[int, int]],
    operations: Sequence[Callable[[Tensor], Tensor]],
) -> Iterator[Tensor]:
    """``value`` of a node for each edge from it, in order, and then for whoever gets the node.

    Operations that are known here get a tensor each, so that their gradients are added at once
    where that is faster; any other may look at which tensor it is.
    """
    if not waits(value):
        return itertools.repeat(value)
    reading = [o for (source, _), o in zip(edges, operations, strict=True) if source == node]
    # The inputs of a cell are not read after it; the gradients of two are added by one operation.
    if (
        len(reading) + (node >= given) < 3
        or compiling()
        or not all(type(operation) in _PLAIN for operation in reading)
    ):
        return itertools.repeat(value)
    return iter(fork(value, len(reading) + 1))


def concatenate(values: Sequence[Tensor]) -> Tensor:
    """The given nodes along the channels; a single one is not copied."""
    return values[0] if len(values) == 1 else torch.cat(list(values), dim=1)
