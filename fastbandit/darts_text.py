"""A genotype as text in the manner of DARTS.

::

    Genotype(
        a=[('conv_3x3', 0), ('gab_filt_3x3', 1), ('sep_conv_3x3', 2), ('dtp_blok_3x3', 1)],
        a_concat=[1, 2, 3, 4],
        b=...
        gabor='released',
    )

A cell whose nodes have one edge each is a list of pairs (operation, source), one for each node;
any other cell is a list of such lists, one for each node. Options that are not the default and
bear on an operation of the cells follow the cells. Cells of two inputs have ``inputs=2`` there.

A genotype of DARTS itself has two cells of two inputs, ``normal`` and ``reduce``, and two edges for
each node: a list of pairs, two for each node, or a list of lists. Its names are read as what they
are there: ``sep_conv_3x3`` is ``sep_conv_m_3x3`` here, ``none`` is ``zero``, and pools have no
batch norm unless the text says ``pool_bn=True``. What can be written so is written so.

This module knows text and plain values; :class:`fastbandit.genotype.Genotype` says whether they
are a genotype. It loads neither pydantic nor torch.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastbandit.operations import OperationOptions
from fastbandit.space import CELL_NAMES

__all__ = ["DartsTextError", "read", "write"]

_LONGEST_TEXT = 1_000_000  # characters; the literal parser recurses
_OPTIONS = tuple(field.name for field in dataclasses.fields(OperationOptions))
# Names of DARTS for operations that have another one here.
_OURS = {
    "none": "zero",
    "sep_conv_3x3": "sep_conv_m_3x3",
    "sep_conv_5x5": "sep_conv_m_5x5",
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()}
_POOLS = ("max_pool_3x3", "avg_pool_3x3")


class DartsTextError(ValueError):
    """The text is no genotype of this package; one message says why."""


def write(
    cells: Mapping[str, tuple[Sequence[Sequence[tuple[str, int]]], Sequence[int]]],
    options: Mapping[str, Any],
    inputs: int = 1,
) -> str:
    """The text of cells and options.

    Args:
        cells: by name: the edges (operation, source) of each node, and the nodes of the output.
        options: those that the text states.
        inputs: of each cell.
    """
    held = {op for nodes, _ in cells.values() for edges in nodes for op, _ in edges}
    stated = dict(options)
    if inputs == 2 and len(cells) == 2 and held.isdisjoint(_OURS):
        cells = {
            name: ([[(_THEIRS.get(op, op), n) for op, n in edges] for edges in nodes], concat)
            for name, (nodes, concat) in zip(("normal", "reduce"), cells.values(), strict=True)
        }
        if held.intersection(_POOLS):
            # Pools of DARTS have no batch norm, so it is the other case that is said.
            stated = {"pool_bn": True, **stated}
            if not stated["pool_bn"]:
                del stated["pool_bn"]
    elif inputs != 1:
        stated = {"inputs": inputs, **stated}
    lines = []
    for name, (nodes, concat) in cells.items():
        value: list[Any] = list(nodes)
        if all(len(edges) == 1 for edges in nodes):
            value = [edges[0] for edges in nodes]
        if name == "normal" or name == "reduce":
            value = list(nodes)
            if all(len(edges) == 2 for edges in nodes):
                value = [edge for edges in nodes for edge in edges]
        lines.append(f"{name}={value!r}")
        lines.append(f"{name}_concat={list(concat)!r}")
    lines += [f"{key}={value!r}" for key, value in stated.items()]
    return "Genotype(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def read(text: str, most_nodes: int) -> dict[str, Any]:
    """Name, options and cells of a text, as the JSON form of a genotype has them.

    Args:
        text: parsed as literals and never evaluated.
        most_nodes: a ``range`` is not read further than one number beyond these.

    Raises:
        DartsTextError: the text is something else.
    """
    # The numbers of a concat begin with the number of inputs.
    name, keywords = _parse_call(text, most_nodes + 1)
    options = {key: keywords.pop(key) for key in _OPTIONS if key in keywords}
    if {"normal", "reduce"} & set(keywords):
        return {"name": name, "inputs": 2, **_read_darts(keywords, options)}
    inputs = keywords.pop("inputs", 1)
    first = inputs if type(inputs) is int else 1
    cells = []
    for cell in CELL_NAMES:
        if cell not in keywords:
            break
        nodes = _nodes(cell, keywords.pop(cell))
        concat = keywords.pop(f"{cell}_concat", list(range(first, first + len(nodes))))
        cells.append({"name": cell, "nodes": nodes, "concat": concat})
    if keywords:
        raise DartsTextError(
            f"DARTS text: unexpected {', '.join(sorted(keywords))}; expected cells a, b, c, "
            f"... without a gap, their a_concat, ..., and inputs, {', '.join(_OPTIONS)}"
        )
    if not cells:
        raise DartsTextError("DARTS text: expected cells a, b, c, ..., got none")
    return {"name": name, "options": options, "inputs": inputs, "cells": cells}


def _read_darts(keywords: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Options and cells of a genotype of DARTS."""
    cells = []
    for cell, theirs in zip(CELL_NAMES, ("normal", "reduce"), strict=False):
        if theirs not in keywords:
            raise DartsTextError(
                f"DARTS text: expected normal and reduce with cells of two inputs, got no {theirs}"
            )
        value = keywords.pop(theirs)
        nodes = _nodes(theirs, value)
        if all(len(edges) == 1 for edges in nodes) and _is_pair(value[0]):
            if len(nodes) % 2:
                raise DartsTextError(
                    f"DARTS text: {theirs}: expected two (operation, source) pairs for each node, "
                    f"got {len(nodes)} pairs"
                )
            nodes = [[*nodes[i], *nodes[i + 1]] for i in range(0, len(nodes), 2)]
        for edges in nodes:
            for edge in edges:
                edge["op"] = _OURS.get(edge["op"], edge["op"])
        concat = keywords.pop(f"{theirs}_concat", list(range(2, 2 + len(nodes))))
        cells.append({"name": cell, "nodes": nodes, "concat": concat})
    if keywords:
        raise DartsTextError(
            f"DARTS text: unexpected {', '.join(sorted(keywords))}; expected normal, reduce, "
            f"normal_concat, reduce_concat, and {', '.join(_OPTIONS)}"
        )
    held = {edge["op"] for cell in cells for edges in cell["nodes"] for edge in edges}
    if held.intersection(_POOLS):
        options = {"pool_bn": False, **options}
    return {"options": options, "cells": cells}


def _parse_call(text: str, most_nodes: int) -> tuple[str | None, dict[str, Any]]:
    """``[NAME =] Genotype(key=literal, ...)`` -> name, keywords."""
    shape = "expected Genotype(a=[('conv_3x3', 0), ...], a_concat=[1, 2, 3, 4], b=...)"
    if len(text) > _LONGEST_TEXT:
        raise DartsTextError(f"DARTS text: {shape}, got {len(text)} characters")
    try:
        statements = ast.parse(text.strip()).body
    except SyntaxError as error:
        raise DartsTextError(
            f"DARTS text: {shape}, got a syntax error in line {error.lineno}: {error.msg}"
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:
        # NUL characters, huge integers, brackets nested too deeply.
        raise DartsTextError(
            f"DARTS text: {shape}, got text that does not parse: {error}"
        ) from None
    name = None
    statement = statements[0] if len(statements) == 1 else None
    if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
        name = statement.targets[0].id
    call = statement.value if isinstance(statement, ast.Assign | ast.Expr) else None
    if not (
        isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "Genotype"
        and not call.args
        and all(keyword.arg is not None for keyword in call.keywords)
    ):
        raise DartsTextError(f"DARTS text: {shape}, got {text.strip()[:60]!r}")
    return name, {str(keyword.arg): _literal(keyword, most_nodes + 1) for keyword in call.keywords}


def _literal(keyword: ast.keyword, longest: int) -> Any:
    value = keyword.value
    try:
        if (
            isinstance(value, ast.Call)
            and isinstance(value.func, ast.Name)
            and value.func.id == "range"
            and not value.keywords
        ):
            return list(range(*map(ast.literal_eval, value.args))[:longest])
        return ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError, OverflowError):
        raise DartsTextError(
            f"DARTS text: {keyword.arg}: expected a literal (lists, tuples, strings, numbers)"
        ) from None


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and isinstance(item[0], str)


def _nodes(cell: str, value: Any) -> list[list[dict[str, Any]]]:
    """Pairs, or lists of pairs, as the nodes of a cell."""

    if isinstance(value, list | tuple) and value:
        nodes = [[item] if _is_pair(item) else item for item in value]
        if all(isinstance(edges, list | tuple) and all(map(_is_pair, edges)) for edges in nodes):
            return [[{"op": op, "source": source} for op, source in edges] for edges in nodes]
    raise DartsTextError(
        f"DARTS text: {cell}: expected a list of (operation, source) pairs, one for each node, "
        f"or a list of such lists, got {value!r:.80}"
    )
