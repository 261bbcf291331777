"""The genotype file: one found or published architecture, as JSON.

::

    {
      "format": "fastbandit.genotype", "schema_version": 1,
      "name": "...", "source": "where it comes from" or null,
      "space": "robust9", "operations": ["max_pool_3x3", ...],     the names an edge may hold
      "options": {"denoise": "dot", "denoise_1x1": false, "gabor": "pixels"},
      "cells": [{"name": "a",
                 "nodes": [[{"op": "conv_3x3", "source": 0}], ...],   edges into node 1, 2, ...
                 "concat": [1, 2, 3, 4]}, ...],                       nodes in the output
      "macro": {"layers": 10, "channels": 48, "reductions": [3, 6], "stem": 3,
                "denoise_blocks": false, "bn_eps": 1e-5} or null,
      "search": {"run_id": "...", "seed": 0, "budget": {...}} or null,
      "hash": "64 hexadecimal digits", "checksum": "8 hexadecimal digits"
    }

Node 0 is the input of a cell. With ``"inputs": 2`` (absent: 1) nodes 0 and 1 are the outputs of the
two cells before, the list of edges begins with those into node 2, and two cells are the normal and
the reduction cell, as in DARTS (Liu et al., ICLR 2019). ``macro.stem`` is the width of the stem in
units of ``channels``.
``hash`` is the SHA-256 of what the network computes: the cells, and those options that bear on
operations the cells hold; not names, macro or search. Two edges of a node may stand in any order.
Options that came after the format are in file and hash only where they are not at their default.
``checksum`` covers all that the file says (CRC-32 of its canonical JSON without this entry), so
that a damaged byte of macro or search is noticed too. A file without hash or checksum is accepted,
for instance one edited by hand; one with a wrong hash or checksum is not.

The same architecture as text in the manner of DARTS: :mod:`fastbandit.darts_text`.

This module loads pydantic but not torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    field_validator,
    model_validator,
)

from fastbandit import darts_text
from fastbandit._choices import cells_of
from fastbandit._files import MEGABYTE, FileError, checksum, read_json, write_atomic
from fastbandit._suggest import did_you_mean
from fastbandit.operations import (
    OF_CELLS,
    OF_TRAINING,
    OPERATIONS,
    OperationOptions,
    without_defaults,
)
from fastbandit.space import (
    CELL_NAMES,
    OPERATION_NAMES,
    SPACES,
    SearchSpace,
    get,
    reduction_cells,
)

__all__ = ["Cell", "Edge", "Genotype", "GenotypeError", "Macro", "Options", "Search"]

#: The options of a genotype.
Options = OperationOptions
_OPTIONS = dataclasses.asdict(OperationOptions())  # by name, with their defaults

FORMAT = "fastbandit.genotype"
SCHEMA_VERSION = 1
_PUBLISHED = Path(__file__).parent / "_data" / "genotypes"
_LARGEST_FILE = MEGABYTE  # ours have 20 thousand bytes
_MOST_NODES = 64  # of a cell


class GenotypeError(ValueError):
    """A genotype that cannot be read or does not describe a network; one message says why."""


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Edge(_Model):
    """One incoming edge of a node: the operation and the node it reads."""

    op: StrictStr
    source: Annotated[StrictInt, Field(ge=0)]

    @field_validator("op")
    @classmethod
    def _known(cls, op: str) -> str:
        if op not in OPERATION_NAMES:
            raise ValueError(f"unknown operation; expected one of {', '.join(OPERATION_NAMES)}")
        return op


Inputs = Annotated[StrictInt, Field(ge=1, le=2)]


class Cell(_Model):
    """One cell: the incoming edges of each node, and the nodes its output concatenates.

    The first node is 1, or 2 where the cell has two ``inputs``; a file says that once, of the
    genotype.
    """

    name: StrictStr
    nodes: Annotated[tuple[tuple[Edge, ...], ...], Field(min_length=1, max_length=_MOST_NODES)]
    concat: Annotated[tuple[StrictInt, ...], Field(min_length=1)]
    inputs: Inputs = 1

    @model_validator(mode="after")
    def _is_a_cell(self) -> Cell:
        for node, edges in enumerate(self.nodes, start=self.inputs):
            if not edges:
                raise ValueError(f"node {node}: expected at least one incoming edge, got none")
            sources = [edge.source for edge in edges]
            if max(sources) >= node:
                raise ValueError(
                    f"node {node}: expected sources 0 to {node - 1}, got {max(sources)}"
                )
            if len(set(sources)) < len(sources):
                raise ValueError(f"node {node}: expected one edge from each source, got {sources}")
        expected = range(self.inputs, self.inputs + len(self.nodes))
        if len(set(self.concat)) < len(self.concat) or not set(self.concat) <= set(expected):
            raise ValueError(
                f"concat: expected different nodes from {expected[0]} to {expected[-1]}, "
                f"got {list(self.concat)}"
            )
        return self

    @property
    def edges(self) -> tuple[tuple[int, int, str], ...]:
        """(source, node, operation) of each edge, those into the first node first."""
        return tuple(
            (edge.source, node, edge.op)
            for node, edges in enumerate(self.nodes, start=self.inputs)
            for edge in edges
        )


class Macro(_Model):
    """The network around the cells.

    Args:
        layers: cells in the chain; None: not known.
        channels: C of the first cell; None: not known.
        reductions: indices of the cells that halve the map; by default layers // 3 and
            2 * layers // 3.
        stem: width of the stem, in units of ``channels``.
        denoise_blocks: hand-placed denoising blocks after cells V // 4, 2 V // 4, 3 V // 4.
        bn_eps: what every batch norm adds to the variance. The released networks have 1e-3; a file
            that does not say has 1e-5.
    """

    layers: Annotated[StrictInt, Field(ge=1, le=1000)] | None = None
    channels: Annotated[StrictInt, Field(ge=1, le=65536)] | None = None
    reductions: tuple[StrictInt, ...] = ()
    stem: Annotated[StrictInt, Field(ge=1, le=64)] = 3
    denoise_blocks: StrictBool = False
    bn_eps: Annotated[StrictFloat, Field(gt=0, lt=1)] = 1e-5

    @model_validator(mode="before")
    @classmethod
    def _default_reductions(cls, data: Any) -> Any:
        if isinstance(data, dict) and "reductions" not in data:
            layers = data.get("layers")
            if isinstance(layers, int) and layers >= 1:
                return data | {"reductions": reduction_cells(layers)}
        return data

    @model_validator(mode="after")
    def _reductions_exist(self) -> Macro:
        cells, layers = list(self.reductions), self.layers or 0
        if cells != sorted(set(cells)) or any(not 0 <= cell < layers for cell in cells):
            raise ValueError(
                f"reductions: expected ascending cell indices below {layers}, got {cells}"
            )
        return self


class Search(_Model):
    """Where a found genotype comes from; a search may record more than these."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)

    run_id: StrictStr
    seed: StrictInt | None = None
    budget: dict[StrictStr, JsonValue] = {}


class Genotype(_Model):
    """One architecture; immutable. See the module's docstring for the file and its fields."""

    name: StrictStr | None = None
    source: StrictStr | None = None
    space: StrictStr | None = None
    operations: Annotated[tuple[StrictStr, ...], Field(max_length=len(OPERATION_NAMES))] = ()
    options: OperationOptions = OperationOptions()
    inputs: Inputs = 1
    cells: Annotated[tuple[Cell, ...], Field(min_length=1, max_length=len(CELL_NAMES))]
    macro: Macro | None = None
    search: Search | None = None

    @field_validator("options", mode="before")
    @classmethod
    def _known_options(cls, data: Any) -> Any:
        """No other options, and neither 1 nor "yes" for a bool, which pydantic would take."""
        if isinstance(data, Mapping):
            for name, value in data.items():
                if name not in _OPTIONS:
                    raise ValueError(f"{name}: expected one of {', '.join(_OPTIONS)}")
                if isinstance(_OPTIONS[name], bool) and not isinstance(value, bool):
                    raise ValueError(f"{name}: expected true or false, got {value!r:.80}")
        return data

    @model_validator(mode="before")
    @classmethod
    def _tell_cells(cls, data: Any) -> Any:
        """A file says once how many inputs its cells have."""
        if isinstance(data, dict) and isinstance(cells := data.get("cells"), list | tuple):
            inputs = data.get("inputs", 1)
            return data | {
                "cells": [
                    {"inputs": inputs, **cell} if isinstance(cell, dict) else cell for cell in cells
                ]
            }
        return data

    @model_validator(mode="before")
    @classmethod
    def _default_operations(cls, data: Any) -> Any:
        """Without a list of operations: those of the space, or of all spaces."""
        if isinstance(data, dict) and not data.get("operations"):
            space = data.get("space")
            operations = SPACES.get(space, OPERATION_NAMES) if isinstance(space, str) else None
            return data | {"operations": operations or OPERATION_NAMES}
        return data

    @model_validator(mode="after")
    def _cells_fit_the_space(self) -> Genotype:
        unknown = [name for name in self.operations if name not in OPERATION_NAMES]
        if unknown:
            raise ValueError(f"operations: unknown: {', '.join(unknown)}")
        for index, cell in enumerate(self.cells):
            if cell.inputs != self.inputs:
                raise ValueError(
                    f"cells[{index}].inputs: expected {self.inputs} as in the genotype, "
                    f"got {cell.inputs}"
                )
            if cell.name != CELL_NAMES[index]:
                raise ValueError(
                    f"cells[{index}].name: expected {CELL_NAMES[index]!r}, got {cell.name!r}"
                )
            for edges in cell.nodes:
                for edge in edges:
                    if edge.op not in self.operations:
                        raise ValueError(
                            f"cells[{index}]: operation {edge.op!r} is not in the list of "
                            f"operations ({', '.join(self.operations)})"
                        )
        return self

    # -- reading and writing ---------------------------------------------------------------

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Genotype:
        """Read a genotype file.

        Raises:
            GenotypeError: the file is missing, damaged or something else; the message starts with
                its name and says what is wrong.
        """
        try:
            data = read_json(path, _LARGEST_FILE)
        except FileError as error:
            raise GenotypeError(str(error)) from None
        return cls.from_dict(data, where=str(path))

    @classmethod
    def from_dict(cls, data: Any, *, where: str = "genotype") -> Genotype:
        """A genotype from the value of its JSON form; ``where`` begins the error messages.

        Raises:
            GenotypeError: see :meth:`load`.
        """
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            raise GenotypeError(
                f'{where}: not a genotype: expected a JSON object with "format": "{FORMAT}"'
            )
        fields = dict(data)
        said = fields.pop("checksum", None)
        if said is not None and said != checksum(fields):
            raise GenotypeError(
                f"{where}: checksum: expected {checksum(fields)} for what the file says, got "
                f"{said!r:.80}; it was damaged or edited (without its checksum it is read as it is)"
            )
        fields.pop("format")
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION or isinstance(version, bool):
            raise GenotypeError(
                f"{where}: schema_version: expected {SCHEMA_VERSION}, got {version!r}"
            )
        stated = fields.pop("hash", None)
        genotype = cls._build(where, fields)
        if stated is not None and stated != genotype.hash:
            raise GenotypeError(
                f"{where}: hash: expected {genotype.hash} for these cells, got {stated!r}; the "
                "file was damaged or edited (without its hash it is read as it is)"
            )
        return genotype

    @classmethod
    def _build(cls, where: str, fields: Mapping[str, Any]) -> Genotype:
        try:
            return cls.model_validate(dict(fields))
        except ValidationError as error:
            raise GenotypeError(f"{where}: {_first_error(error)}") from None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form: plain values, with format, schema version and hash."""
        body = self.model_dump(mode="json")
        body["options"] = without_defaults(body["options"])
        for cell in body["cells"]:
            del cell["inputs"]
        if self.inputs == 1:
            del body["inputs"]
        return {"format": FORMAT, "schema_version": SCHEMA_VERSION, **body, "hash": self.hash}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the genotype file; it appears whole or not at all."""
        body = self.to_dict()
        write_atomic(path, json.dumps({**body, "checksum": checksum(body)}, indent=1) + "\n")

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names of the published genotypes that ship with the package."""
        return tuple(sorted(path.stem for path in _PUBLISHED.glob("*.json")))

    @classmethod
    def published(cls, name: str) -> Genotype:
        """A published genotype by name.

        Raises:
            GenotypeError: there is none of that name; the message lists those there are.
        """
        if name not in cls.names():
            raise GenotypeError(
                f"published genotype: expected one of {', '.join(cls.names())}, got {name!r}"
                f"{did_you_mean(str(name), cls.names())}"
            )
        return cls.load(_PUBLISHED / f"{name}.json")

    @property
    def hash(self) -> str:
        """SHA-256 of what the network computes, 64 hexadecimal digits; see the module."""
        content = {
            "cells": [
                {
                    "concat": list(cell.concat),
                    "nodes": [
                        sorted([edge.source, edge.op] for edge in edges) for edges in cell.nodes
                    ],
                }
                for cell in self.cells
            ],
            "options": {
                name: value
                for name, value in self._options_in_use().items()
                if name not in OF_TRAINING
            },
            "version": 1,
        }
        if self.inputs != 1:
            content["inputs"] = self.inputs
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def _options_in_use(self) -> dict[str, Any]:
        used = {edge.op for cell in self.cells for edges in cell.nodes for edge in edges}
        names = {*OF_CELLS, *(name for op in used for name in OPERATIONS[op].options)}
        return {
            name: value
            for name, value in without_defaults(vars(self.options)).items()
            if name in names
        }

    # -- from a search ----------------------------------------------------------------------

    @classmethod
    def from_choices(
        cls,
        space: SearchSpace | str,
        choice: Sequence[int],
        mean: Sequence[Sequence[float]] | None = None,
        edges_per_node: Literal["all", 1, 2] = "all",
        *,
        options: OperationOptions | Mapping[str, Any] | None = None,
        macro: Macro | Mapping[str, Any] | None = None,
        search: Search | Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> Genotype:
        """The architecture that a search ends with.

        Args:
            space: the space that was searched, or its name.
            choice: one arm for each row of the space; a sequence or a tensor.
            mean: running performance of every arm, [rows, arms]; needed to rank the edges of a
                node when ``edges_per_node`` is a number.
            edges_per_node: ``all``: a node sums over all earlier nodes, as in the text of the
                paper; 1 or 2: it keeps the edges whose chosen arm has the largest mean (the
                released networks keep one). Ties: the earlier source. NaN ranks last. ``zero`` is
                not kept then.
            options, macro, search, name: as in the file.

        A node whose edges all hold ``zero`` would be nothing. On its edge from the newest node the
        other operation with the largest mean (without ``mean``: the first one) takes its place;
        ``search`` then lists the edge under ``zero_replaced``.

        Raises:
            ValueError: a wrong length, an arm out of range, no ``mean`` where it is needed.
        """
        space = get(space) if isinstance(space, str) else space
        cells, replaced = cells_of(space, choice, mean, edges_per_node)
        search = _plain(search)
        if replaced and search is not None:
            search["zero_replaced"] = replaced
        return cls._build(
            "from_choices",
            {
                "name": name,
                "space": space.name,
                "operations": space.operations,
                "options": _plain(options) or {},
                "inputs": space.inputs,
                "cells": cells,
                "macro": _plain(macro),
                "search": search,
            },
        )

    # -- the text of DARTS ------------------------------------------------------------------

    def to_darts(self) -> str:
        """The architecture (not names, macro or search) as text; see the module's docstring."""
        cells = {
            cell.name: ([[(e.op, e.source) for e in edges] for edges in cell.nodes], cell.concat)
            for cell in self.cells
        }
        options = self._options_in_use().items()
        changed = {k: value for k, value in options if value != _OPTIONS[k]}
        return darts_text.write(cells, changed, self.inputs)

    @classmethod
    def from_darts(cls, text: str, *, space: str | None = None) -> Genotype:
        """Read what :meth:`to_darts` writes; ``NAME = Genotype(...)`` gives it that name.

        The text is parsed as literals and never evaluated; ``range(a, b)`` may stand for a
        concat. ``space`` names the search space, which the text does not say. A genotype of DARTS
        itself (``normal``, ``reduce``) is read too, with the operations that it has there; see
        :mod:`fastbandit.darts_text`.

        Raises:
            GenotypeError: the text is something else.
        """
        try:
            fields = darts_text.read(text, _MOST_NODES)
        except darts_text.DartsTextError as error:
            raise GenotypeError(str(error)) from None
        return cls._build("DARTS text", {**fields, "space": space})

    # -- a picture --------------------------------------------------------------------------

    def svg(self) -> str:
        """The cells drawn, as one self-contained SVG document."""
        from fastbandit.report.cells import draw_genotype

        return draw_genotype(self)

    def _repr_svg_(self) -> str:
        """The drawing, in a notebook."""
        return self.svg()


def _plain(
    value: BaseModel | OperationOptions | Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    if value is None:
        return None
    if isinstance(value, OperationOptions):
        return dataclasses.asdict(OperationOptions.of(value))
    return value.model_dump() if isinstance(value, BaseModel) else dict(value)


def _first_error(error: ValidationError) -> str:
    """``cells[0].nodes[1][0].op: what is wrong, got ...`` of the first error of several."""
    details = error.errors(include_url=False, include_context=False)
    first = details[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    if len(place) > 80:
        place = place[:77] + "..."
    message = first["msg"].removeprefix("Value error, ")
    # The input of an error about a whole object is that object: too long to repeat.
    given = first["input"]
    got = "" if isinstance(given, dict | list | tuple | BaseModel) else f", got {given!r:.80}"
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{place + ': ' if place else ''}{message}{got}{more}"
