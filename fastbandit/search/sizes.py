"""What each operation adds to a network, in parameters, MACs and latency, and budgets of them.

The size of a network is that of what all networks of a search have (stem, preprocessing,
classifier) and, edge by edge, that of the operation chosen. Both are counted on the modules
themselves: :meth:`Sizes.of` is what ``Network`` and :func:`fastbandit.models.multiply_adds` give.
Latencies are those of a measured table (:mod:`fastbandit.latency`), in nanoseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import cache, cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from fastbandit.config import ConfigError
from fastbandit.data import DataSource, load
from fastbandit.genotype import Genotype
from fastbandit.latency import LatencyTable, Subject, measure_networks, table_of
from fastbandit.models import multiply_adds
from fastbandit.nn.network import Network
from fastbandit.nn.operations import make
from fastbandit.operations import OperationOptions
from fastbandit.space import Place, SearchSpace, placements, reduction_cells

if TYPE_CHECKING:
    from fastbandit.search.config import SearchConfig

__all__ = [
    "LATENCY",
    "MACS",
    "PARAMETERS",
    "Budget",
    "Images",
    "Size",
    "Sizes",
    "edge_parameters",
    "edges_of",
    "measured",
    "relative_latencies",
    "stages",
    "table_of_search",
    "timed",
]

#: What a budget is of: names of settings.
PARAMETERS, MACS, LATENCY = "parameters", "macs", "latency"

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([kMG]?)")
_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """The sizes that a network may have, both ends included.

    Args:
        low: the smallest, >= 0.
        high: the largest; None: any.

    Raises:
        ValueError: the largest is below the smallest.
    """

    low: int = 0
    high: int | None = None

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise ValueError(f"expected a budget from 0 or more upwards, got {self}")

    @classmethod
    def parse(cls, text: str, where: str) -> Budget:
        """``LOW:HIGH`` as a budget: ``40k:60k``, ``:60k`` (up to), ``1.5M:`` (from).

        Args:
            text: whole numbers, with the suffixes k, M and G for 10^3, 10^6 and 10^9; one side may
                be empty. A latency is in milliseconds, without suffix, and may have a fraction; the
                budget is then in nanoseconds.
            where: the name of the setting, which decides the unit and is in the message of an
                error.

        Raises:
            ValueError: another text, a fraction of one, or a high end below the low one.
        """
        parts = text.split(":")
        latency = where == LATENCY
        ends = [_milliseconds(part) if latency else _whole(part) for part in parts]
        unread = any(part and end is None for part, end in zip(parts, ends, strict=True))
        if len(parts) != 2 or unread or ends == [None, None]:
            kind, such = "whole numbers", "40k:60k, :60k or 1.5M:"
            if latency:
                kind, such = "milliseconds", "1.5:2.5, :2.5 or 1.5:"
            raise ValueError(
                f"{where}: expected LOW:HIGH, {kind} of which one may be missing, such as {such}, "
                f"got {text!r}"
            )
        if ends[1] is not None and ends[1] < (ends[0] or 0):
            raise ValueError(
                f"{where}: expected LOW:HIGH with a high end that is not below the low one, "
                f"got {text!r}"
            )
        return cls(ends[0] or 0, ends[1])

    def holds(self, size: float) -> bool:
        """Whether ``size`` is within the budget."""
        return self.low <= size and (self.high is None or size <= self.high)

    def ends(self) -> tuple[float, float]:
        """The smallest and the largest size, which may be infinite."""
        return float(self.low), float("inf") if self.high is None else float(self.high)

    def __str__(self) -> str:
        return f"{self.low:,} to {'any' if self.high is None else f'{self.high:,}'}"


def _whole(text: str) -> int | None:
    """A whole number with its suffix; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value = Decimal(match[1]) * _SUFFIXES[match[2]]
    return int(value) if value == int(value) else None


def _milliseconds(text: str) -> int | None:
    """Milliseconds as whole nanoseconds; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match is None or match[2]:
        return None
    return round(Decimal(match[1]) * 10**6)


class Images(NamedTuple):
    """What of the data decides the size of a network."""

    shape: tuple[int, ...]  # [C, H, W]
    classes: int

    @classmethod
    def of(cls, config: SearchConfig, source: DataSource | None = None) -> Images:
        """Those of ``source``; of the data that ``config.data`` names where there is none."""
        if source is None:
            return _images_named(config.data, config.image_size, config.image_color)
        return cls(tuple(source.train.shape), source.classes)


@cache
def _images_named(data: str, image_size: int | None, image_color: str | None) -> Images:
    source = load(data, image_size=image_size, image_color=image_color)
    return Images(tuple(source.train.shape), source.classes)


class Size(NamedTuple):
    """The size of a network; its latency by the table in nanoseconds, where there is one."""

    parameters: int
    macs: int
    latency: int | None = None


def stages(searched: SearchSpace) -> list[int]:
    """The stage of each row: its cell's place between the reductions, from 0.

    A cell that halves the map begins a stage. A network of six cells has three stages of two. A
    type of cell that is in several stages, as a normal cell is, counts as one of its own.
    """
    if searched.cells != searched.cell_types:
        return [cell for cell in range(searched.cell_types) for _ in searched.edges]
    reductions = reduction_cells(searched.cell_types)
    stage = [sum(cell >= one for one in reductions) for cell in range(searched.cell_types)]
    # Where the first cell halves the map there is nothing before it.
    return [stage[cell] - stage[0] for cell in range(searched.cell_types) for _ in searched.edges]


class Sizes:
    """Sizes of all networks of a space, counted once for each operation, width and stride.

    Args:
        searched: the space; networks have its ``cells``.
        channels: C of the first cell.
        options: how operations with variants are built.
        images: what the networks classify.
        table: how long operations take; None: nobody asks for latencies.
    """

    def __init__(
        self,
        searched: SearchSpace,
        channels: int,
        options: OperationOptions,
        images: Images,
        table: LatencyTable | None = None,
    ) -> None:
        self.searched, self.channels, self.options = searched, channels, options
        self.images, self.table = images, table

    @classmethod
    def of_search(cls, config: SearchConfig, source: DataSource | None = None) -> Sizes:
        """Those of a search's networks.

        Args:
            source: its images; None: those that ``config.data`` names, which are loaded.

        Raises:
            ConfigError: its table of latencies is one of other networks.
        """
        return _sizes(
            config.search_space(),
            config.init_channels,
            OperationOptions.of(config),
            Images.of(config, source),
            table_of_search(config, source),
        )

    def costs(self, unit: str) -> Tensor:
        """What each operation adds on each edge, int64 [rows, arms].

        Args:
            unit: ``parameters``, ``macs`` or ``latency``.
        """
        field = {PARAMETERS: "parameters", MACS: "macs", LATENCY: "latencies"}[unit]
        costs: Tensor = getattr(self, field)
        return costs

    def base(self, unit: str) -> int:
        """What all networks have, in the unit of :meth:`costs`."""
        if unit == LATENCY:
            return self._table.base
        return self.base_parameters if unit == PARAMETERS else self.base_macs

    # --- [rows, arms] ---------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> Tensor:
        """Parameters of each operation on each edge, int64 [rows, arms]."""
        return edge_parameters(self.searched, self.channels, self.options)

    @cached_property
    def macs(self) -> Tensor:
        """Multiply-adds of each operation on each edge for one image, int64 [rows, arms]."""
        return _table(
            self.searched,
            self.channels,
            self.options,
            self.images.shape[1:],
            multiply_adds,
        )

    @cached_property
    def latencies(self) -> Tensor:
        """Nanoseconds of each operation on each edge, int64 [rows, arms]."""
        return self._table.edges(self.searched, self.channels, self.images.shape[1:])

    @property
    def _table(self) -> LatencyTable:
        if self.table is None:
            raise ValueError("latency: expected a table of latencies (timing.table), got none")
        return self.table

    # --- the rest -------------------------------------------------------------------------------

    @cached_property
    def base_parameters(self) -> int:
        """Parameters of what all networks have."""
        network = self._network("meta")
        edges = edges_of(self._first, self.searched, self.parameters)
        return sum(p.numel() for p in network.parameters()) - edges

    @cached_property
    def base_macs(self) -> int:
        """Multiply-adds of what all networks have."""
        edges = edges_of(self._first, self.searched, self.macs)
        return multiply_adds(self._network("cpu"), self.images.shape) - edges

    @cached_property
    def _first(self) -> Genotype:
        """A network of the first arm on every edge."""
        return Genotype.from_choices(self.searched, [0] * self.searched.rows, options=self.options)

    def _network(self, device: str) -> Network:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return Network(
                self._first,
                in_channels=self.images.shape[0],
                classes=self.images.classes,
                channels=self.channels,
                cells=self.searched.cells,
            )

    # --- of one network -------------------------------------------------------------------------

    def of(self, genotype: Genotype) -> Size:
        """The size of a genotype's network; its edges may be some of those of the space."""
        latency = None
        if self.table is not None:
            latency = self.table.base + edges_of(genotype, self.searched, self.latencies)
        return Size(
            self.base_parameters + edges_of(genotype, self.searched, self.parameters),
            self.base_macs + edges_of(genotype, self.searched, self.macs),
            latency,
        )


# What is counted once serves all networks of a search.
_sizes = cache(Sizes)
_parsed = cache(LatencyTable.parse)


def _subject(config: SearchConfig, source: DataSource | None) -> Subject:
    images = Images.of(config, source)
    return Subject(
        config.search_space(),
        config.init_channels,
        OperationOptions.of(config),
        images.shape,
        images.classes,
    )


def table_of_search(config: SearchConfig, source: DataSource | None = None) -> LatencyTable | None:
    """The table that the settings hold, or this machine's; None where no latency is asked for.

    Raises:
        ConfigError: it cannot be read, or is one of other networks.
    """
    if config.budgeted != LATENCY and not config.cp.latency_weight:
        return None
    if not config.timing.table:
        return table_of(_subject(config, source), config.timing.conditions())
    try:
        table = _parsed(config.timing.table)
        table.check_subject(_subject(config, source), config.timing.conditions())
    except ValueError as error:
        raise ConfigError(f"timing.table: {error}") from None
    return table


def relative_latencies(
    config: SearchConfig, source: DataSource | None = None
) -> tuple[float, Tensor]:
    """By the table, what all networks have and what each operation on each edge adds, as shares of
    the mean latency of all paths: a number and float64 [rows, arms].

    Raises:
        ValueError: the settings ask for no latency.
    """
    table, subject = table_of_search(config, source), _subject(config, source)
    if table is None:
        raise ValueError("latency: expected settings that ask for a table of latencies")
    edges = table.edges(subject.space, subject.channels, subject.shape[1:]).double()
    mean = max(table.base + float(edges.mean(1).sum()), 1.0)
    return table.base / mean, edges / mean


def timed(config: SearchConfig, source: DataSource | None = None) -> SearchConfig:
    """The settings with the table of this machine, where a budget of latency needs one.

    A table that they hold stays, so that a run that goes on draws what it would have drawn.
    """
    table = table_of_search(config, source)
    if table is None or config.timing.table:
        return config
    return replace(config, timing=replace(config.timing, table=table.lines()))


def measured(
    config: SearchConfig, source: DataSource, genotypes: Sequence[Genotype]
) -> list[dict[str, float]]:
    """What a result says of the latencies of networks: measured whole, and by the table.

    The budget holds the latter, which does not change from one run to the next. Nothing where
    latency is not the budget.
    """
    if config.budgeted != LATENCY:
        return [{} for _ in genotypes]
    sizes, subject = Sizes.of_search(config, source), _subject(config, source)
    networks = [subject.build(genotype) for genotype in genotypes]
    whole = measure_networks(networks, subject.shape, config.timing.conditions())
    by_table = [sizes.of(genotype).latency for genotype in genotypes]
    return [
        {"latency_ms": own / 1e6, "latency_table_ms": (added or 0) / 1e6}
        for own, added in zip(whole, by_table, strict=True)
    ]


def edge_parameters(searched: SearchSpace, channels: int, options: OperationOptions) -> Tensor:
    """Parameters of each operation on each edge, int64 [rows, arms]; see :class:`Sizes`."""
    return _table(
        searched,
        channels,
        options,
        (1, 1),
        lambda module, _: sum(p.numel() for p in module.parameters()),
    )


def edges_of(genotype: Genotype, searched: SearchSpace, table: Tensor) -> int:
    """The sum over the edges of a genotype of what ``table`` [rows, arms] says of each."""
    rows, columns = [], []
    for index, cell in enumerate(genotype.cells):
        for source, node, name in cell.edges:
            rows.append(searched.row(index, searched.edges.index((source, node))))
            columns.append(searched.operations.index(name))
    return int(table[rows, columns].sum())


def _table(
    searched: SearchSpace,
    channels: int,
    options: OperationOptions,
    size: Sequence[int],
    count: Callable[[nn.Module, tuple[int, ...]], int],
) -> Tensor:
    """``count`` of every operation on every edge, with the shape of its input, [rows, arms]."""
    sizes: dict[Place, int] = {}
    table = torch.zeros(searched.rows, searched.arms, dtype=torch.int64)
    for row, arm, place in placements(searched, channels, size):
        if place not in sizes:
            with torch.random.fork_rng(devices=[]):
                module = make(place.operation, place.channels, place.stride, options=options)
            sizes[place] = count(module, (place.channels, place.height, place.width))
        table[row, arm] += sizes[place]
    return table
