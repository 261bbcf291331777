"""Writes the generated parts of docs/formats.md: the fields that pydantic models declare.

    python docs/formats.py

``bandit.jsonl`` is that of ``fastbandit.bandit.log``, ``genotype.json`` that of
``fastbandit.genotype``. What a field means stands here; a field without a meaning is an error.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import BaseModel

from fastbandit.bandit.log import LINES
from fastbandit.childparent import ChildParentSample, ChildParentStart
from fastbandit.genotype import Cell, Edge, Genotype, Macro, Search

PAGE = Path(__file__).resolve().parent / "formats.md"

LOG = {
    "event": "which line it is",
    "space": "the search space",
    "operations": "names of the arms, in their order",
    "edges": "names of the rows, in their order",
    "policy": "name of the policy",
    "rate": "lambda of Eq. 4.11",
    "rounds": "T",
    "bonus": "factor on the confidence radius",
    "scale": "factor on the accuracies",
    "seed": "of the bandit",
    "evaluations_per_epoch": "R; there where it is not the default",
    "mixes": "concentration of the random mixes; likewise",
    "groups": "the stage of each row, where the policy uses it",
    "costs": "what each arm adds to the size of a path, by row, where that is used",
    "base_cost": "the size that all paths have, likewise",
    "budget_low": "the smallest size of a path, where there is a budget",
    "budget_high": "the largest; there where it has an end",
    "sample": "paths credited before",
    "phase": "`initial` or `search`",
    "choice": "the arm of each row",
    "probability": "of each of these arms when it was drawn",
    "clean_accuracy": "on the validation images",
    "robust_accuracy": "the same under the attack of the reward",
    "reward": "what was credited",
    "trained": "false: only evaluated",
    "round": "the abandonment, from 1",
    "row": "the edge, by number",
    "cell": "the cell type",
    "edge": "the edge, by name",
    "arm": "the arm abandoned, by number",
    "operation": "the arm, by name",
    "mean": "its running performance",
    "count": "n, how often it was credited",
    "lower": "its lower bound; null where it is infinite",
    "upper": "its upper bound; null where it is infinite",
    "score": "what it was judged by",
    "total": "N",
    "arms_left": "on each row, after this abandonment",
    "epoch": "in which overfitting was found, from 0",
    "strong": "accuracy under a stronger attack",
    "rewarded": "accuracy under the attack of the reward as it was",
    "restarts": "accuracy under random starts through several surrogates",
    "queries": "accuracy under the Square attack",
    "steps": "of the attack from now on",
    "attack": "that attack in words",
}
# What means something else in one line.
LOG_OF = {
    ("attack", "trained"): "accuracy under the training attack as it was",
    ("reward", "epoch"): "in which masking was found",
}
CHILD_PARENT = {
    "algorithm": "`cp-nas`",
    "beta": "weight of the gap in the score (Eq. 4.15)",
    "gap": "`reward` as printed, or `penalty`",
    "carry": "whether an arm is judged by all its scores",
    "phase": "`search`",
    "reward": "z, the score",
    "child_accuracy": "A_C on the validation images, of the 1-bit path",
    "parent_accuracy": "A_P, of the same path in full precision",
    "penalty": "what the latency of the path takes off the score; there where it counts",
}
GENOTYPE = {
    "name": "of a published one",
    "source": "where a published one comes from",
    "space": "the search space",
    "operations": "the names that an edge may hold",
    "options": "how operations with variants are built",
    "inputs": "earlier cells that a cell reads; written where there are 2",
    "cells": "a list of cells, by type",
    "macro": "the network around the cells",
    "search": "the search that found it",
    "cells[].name": "a, b, c, ...",
    "cells[].nodes": "for each node the list of edges into it",
    "cells[].concat": "nodes in the output",
    "cells[].inputs": "not written: that of the genotype",
    "cells[].nodes[][].op": "the operation",
    "cells[].nodes[][].source": "the node it comes from; 0 is the input, or 0 and 1 are",
    "macro.layers": "cells in the chain",
    "macro.channels": "C of the first cell",
    "macro.reductions": "indices of the cells that halve the map",
    "macro.stem": "width of the stem, in units of `channels`",
    "macro.denoise_blocks": "denoising blocks after the cells V // 4, 2 V // 4, 3 V // 4",
    "macro.bn_eps": "what every batch norm adds to the variance",
    "search.run_id": "of the search",
    "search.seed": "of the search",
    "search.budget": "of the search, as others record it",
}


def _kind(hint: Any) -> str:
    """A type in the words of JSON."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "text"
    if origin is typing.Annotated:
        return _kind(inner[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(one) for one in inner)
    if origin in (list, tuple):
        kind = _kind(inner[0])
        return (
            f"list of {kind.replace('list', 'lists', 1)}" if "list" in kind else f"list of {kind}s"
        )
    if origin is dict or dataclasses.is_dataclass(hint) or issubclass(hint, BaseModel):
        return "object"
    return {bool: "bool", int: "integer", float: "number", str: "text", NoneType: "null"}[hint]


def _rows(
    model: type[BaseModel], prefix: str, meanings: dict[str, str], own: Iterable[str] = ()
) -> list[str]:
    rows = []
    for name, field in model.model_fields.items():
        if name in own:
            continue
        default = "" if field.is_required() else json.dumps(field.get_default(), default=vars)
        default = "" if len(default) > 20 else default
        meaning = meanings[f"{prefix}{name}"]
        rows.append(f"| `{prefix}{name}` | {_kind(field.annotation)} | {default} | {meaning} |")
    return rows


def _table(rows: list[str]) -> str:
    return "\n".join(["| field | type | default | |", "| --- | --- | --- | --- |", *rows])


def bandit_part() -> str:
    """The lines of bandit.jsonl."""
    parts = []
    for event, model in LINES.items():
        meanings = LOG | {name: text for (of, name), text in LOG_OF.items() if of == event}
        words = (model.__doc__ or "").strip().splitlines()[0]
        rows = _rows(model, "", meanings, own=("event",))
        parts.append(f'`"event": "{event}"` {words}\n\n{_table(rows)}')
    return "\n\n".join(parts)


def genotype_part() -> str:
    """The fields of genotype.json."""
    places: list[tuple[Any, str]] = [
        (Genotype, ""),
        (Cell, "cells[]."),
        (Edge, "cells[].nodes[][]."),
        (Macro, "macro."),
        (Search, "search."),
    ]
    return _table([row for model, prefix in places for row in _rows(model, prefix, GENOTYPE)])


def child_parent_part() -> str:
    """The lines of bandit.jsonl that CP-NAS has in place of those of the bandit."""
    parts = []
    for event, model in (("start", ChildParentStart), ("sample", ChildParentSample)):
        words = (model.__doc__ or "").strip().splitlines()[0]
        rows = _rows(model, "", LOG | CHILD_PARENT, own=("event",))
        parts.append(f'`"event": "{event}"` {words}\n\n{_table(rows)}')
    return "\n\n".join(parts)


PARTS = {
    "bandit.jsonl": bandit_part,
    "bandit.jsonl of CP-NAS": child_parent_part,
    "genotype.json": genotype_part,
}


def page(text: str) -> str:
    """``text`` with its generated parts made anew."""
    for name, make in PARTS.items():
        begin, end = f"<!-- generated: {name} -->\n", f"<!-- end: {name} -->\n"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{make()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
