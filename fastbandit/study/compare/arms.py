"""The networks that a search is compared with: of its size, the largest, of one operation."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbandit.config import ConfigError
from fastbandit.data import DataSource
from fastbandit.genotype import Genotype
from fastbandit.operations import OperationOptions
from fastbandit.runs.environment import derive_seed
from fastbandit.search.config import SearchConfig
from fastbandit.search.networks import EDGES_PER_NODE, random_genotype
from fastbandit.search.sizes import Sizes

__all__ = ["Chance", "Matched"]

# Networks drawn and compared at a time.
_CHUNK = 500


@dataclass(frozen=True)
class Matched:
    """A random network of nearly the size of another.

    Attributes:
        wanted: parameters of the other.
        parameters: its own.
        draws: networks that were drawn until it was found.
    """

    genotype: Genotype
    wanted: int
    parameters: int
    draws: int

    def facts(self) -> dict[str, Any]:
        """What is recorded of it."""
        return {
            "wanted_parameters": self.wanted,
            "parameters": self.parameters,
            "draws": self.draws,
            "share_off": self.parameters / self.wanted - 1,
        }


class Chance:
    """Networks of a search's space that no search has found.

    Args:
        config: space, width, options and budget.
        source: the images, whose shape decides sizes.
    """

    def __init__(self, config: SearchConfig, source: DataSource) -> None:
        self.config, self.source, self.space = config, source, config.search_space()
        self.sizes = Sizes.of_search(config, source)
        self.kept = EDGES_PER_NODE[config.edges_per_node]

    def random(self, *purpose: str | int) -> Genotype:
        """A network within the budget, if there is one, every operation equally likely on an edge.

        Args:
            purpose: decides the draw, together with the search's seed.
        """
        return random_genotype(self.config, "compare", *purpose, source=self.source)

    def genotype(self, choice: Sequence[int], rank: Sequence[float] | None = None) -> Genotype:
        """The network of a choice.

        Args:
            choice: an arm for each row.
            rank: for each row, where a node keeps only its best edges.
        """
        rows, arms = self.space.rows, self.space.arms
        return Genotype.from_choices(
            self.space,
            list(choice),
            mean=[[0.0 if rank is None else rank[row]] * arms for row in range(rows)],
            edges_per_node=self.kept,
            options=OperationOptions.of(self.config),
            macro={"layers": self.space.cell_types, "channels": self.config.init_channels},
        )

    # A network of the size of another.

    def matched(
        self, other: Genotype, *, tolerance: float, draws: int, nearest: bool, number: int
    ) -> Matched:
        """A random network of about the size of another.

        The first of the drawn ones within the tolerance. They are drawn so that all networks of one
        size are equally likely, and their mean size is the wanted one; uniform draws would seldom
        meet a size that is not an average one.

        Args:
            other: the network, which does not count itself.
            tolerance: share of its parameters.
            draws: how many to draw at most.
            nearest: take the nearest one where none is within the tolerance.
            number: decides the draws, together with the search's seed.

        Raises:
            ConfigError: none is within the tolerance.
        """
        wanted = self.sizes.of(other).parameters
        seed = derive_seed(self.config.seed, "compare", "matched", number)
        generator = torch.Generator().manual_seed(seed)
        probabilities, best = self._probabilities(wanted), None
        for start in range(0, draws, _CHUNK):
            n = min(_CHUNK, draws - start)
            choice = torch.multinomial(probabilities, n, replacement=True, generator=generator).T
            rank = torch.rand((n, self.space.rows), generator=generator, dtype=torch.float64)
            sizes = self._edges(choice, rank) + self.sizes.base_parameters
            away = (sizes - wanted).abs()
            within = torch.nonzero(away <= tolerance * wanted).flatten().tolist()
            for place in within or away.argsort().tolist():
                genotype = self.genotype(choice[place].tolist(), rank[place].tolist())
                if genotype.hash == other.hash:
                    continue
                match = Matched(genotype, wanted, int(sizes[place]), start + place + 1)
                if within:
                    return match
                if best is None or away[place] < abs(best.parameters - wanted):
                    best = match
                break
        if best is None:
            raise ConfigError(
                f"compare.draws: expected another network than the found one among {draws:,} "
                f"random ones of space {self.config.space}, got none"
            )
        if not nearest:
            raise ConfigError(
                f"compare.tolerance: expected a random network within {100 * tolerance:g} % of "
                f"{wanted:,} parameters among {draws:,}; the nearest has {best.parameters:,} "
                f"({100 * (best.parameters / wanted - 1):+.1f} %). --compare.nearest takes it"
            )
        return best

    def _probabilities(self, wanted: int) -> Tensor:
        """Probabilities [rows, arms] under which a network has ``wanted`` parameters on average.

        An arm weighs exp(t size), so networks of one size are equally likely; t moves the mean.
        """
        sizes = self.sizes.parameters.double()
        kept = torch.ones(len(sizes), 1, dtype=torch.float64)
        if self.kept != "all":
            for first, end in self._nodes():
                kept[first:end] = min(1.0, self.kept / (end - first))
        scale = max(float(sizes.max()), 1.0)
        low, high = -200.0, 200.0
        for _ in range(80):
            middle = (low + high) / 2
            probabilities = torch.softmax(middle * sizes / scale, 1)
            mean = float((kept * probabilities * sizes).sum()) + self.sizes.base_parameters
            low, high = (middle, high) if mean < wanted else (low, middle)
        return probabilities

    def _edges(self, choice: Tensor, rank: Tensor) -> Tensor:
        """Parameters of the edges that are kept, int64 [n], for choices and ranks [n, rows]."""
        sizes = self.sizes.parameters[torch.arange(self.space.rows), choice]
        if self.kept == "all":
            return sizes.sum(1)
        total = torch.zeros(len(choice), dtype=torch.int64)
        for first, end in self._nodes():
            # The best edges of the node; ties: the earlier one, as a genotype has it.
            order = rank[:, first:end].sort(dim=1, descending=True, stable=True).indices
            total += sizes[:, first:end].gather(1, order[:, : self.kept]).sum(1)
        return total

    def _nodes(self) -> list[tuple[int, int]]:
        """First and last row (not included) of the edges into each node of each cell."""
        edges = self.space.edges
        # Edges of one node stand together, and no node is the last of one cell and of the next.
        into = [(row // len(edges), edges[row % len(edges)][1]) for row in range(self.space.rows)]
        sizes = [len(list(rows)) for _, rows in itertools.groupby(into)]
        ends = list(itertools.accumulate(sizes))
        return list(zip([0, *ends], ends, strict=False))

    # Single networks.

    def largest(self) -> Genotype:
        """The largest network; within the budget, if there is one, and then in its unit."""
        budget = self.config.budget()
        unit = self.config.budgeted or "parameters"
        table = self.sizes.costs(unit)
        if budget is None or budget.high is None:
            return self.genotype(table.argmax(1).tolist(), table.amax(1).double().tolist())
        # A budget asks for all edges, so a size is that of its edges and the rest.
        return self.genotype(largest_sum(table.tolist(), budget.high - self.sizes.base(unit)))

    def one_operation(self) -> list[tuple[str, Genotype]]:
        """For each operation the network that has it on every edge; a budget is not asked."""
        rows = self.space.rows
        return [
            (name, self.genotype([arm] * rows)) for arm, name in enumerate(self.space.operations)
        ]


def largest_sum(rows: Sequence[Sequence[int]], most: int) -> list[int]:
    """One entry of each row with the largest sum that is not above ``most``, by position.

    Raises:
        ConfigError: the smallest sum is above ``most``.
    """
    least = sum(min(row) for row in rows)
    if least > most:
        raise ConfigError(
            f"largest network: expected room for {least:,} beside what all networks have, got "
            f"{most:,}"
        )
    unit = math.gcd(*(size for row in rows for size in row)) or 1
    rows, most = [[size // unit for size in row] for row in rows], most // unit
    mask = (1 << (most + 1)) - 1
    # Bit s of reachable[r]: the first r rows can have the sum s.
    reachable = [1]
    for row in rows:
        sums = functools.reduce(int.__or__, (reachable[-1] << size for size in set(row)))
        reachable.append(sums & mask)
    left = reachable[-1].bit_length() - 1
    chosen: list[int] = []
    for number in range(len(rows) - 1, -1, -1):
        position = next(
            position
            for position, size in enumerate(rows[number])
            if size <= left and reachable[number] >> (left - size) & 1
        )
        chosen.append(position)
        left -= rows[number][position]
    return chosen[::-1]
