"""The networks that a search is compared with: of its size, the largest, of one operation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastbandit import space
from fastbandit.config import ConfigError
from fastbandit.genotype import Genotype
from fastbandit.nn.operations import make
from fastbandit.operations import OperationOptions
from fastbandit.runs.environment import derive_seed
from fastbandit.search.config import SearchConfig
from fastbandit.search.networks import EDGES_PER_NODE
from fastbandit.space import reduction_cells

__all__ = ["Matched", "Sizes", "candidate"]

# Networks drawn and compared at a time.
_CHUNK = 500
_FIXED = "expected edges_per_node all, where the size follows from the operations alone"


@dataclass(frozen=True)
class Matched:
    """A random network, and how near its size is to the one that was wanted."""

    genotype: Genotype
    parameters: int
    draws: int


class Sizes:
    """Parameters of the networks of a search's space, as they are retrained.

    Args:
        config: space, width and options.
        in_channels, classes: of the images.
    """

    def __init__(self, config: SearchConfig, in_channels: int, classes: int) -> None:
        self.config, self.space = config, space.get(config.space)
        self.in_channels, self.classes = in_channels, classes

    def genotype(self, choice: Sequence[int], rank: Sequence[float] | None = None) -> Genotype:
        """The network of a choice.

        Args:
            choice: an arm for each row.
            rank: for each row, where a node keeps only its best edges.
        """
        rows, arms = self.space.rows, self.space.arms
        mean = [[0.0 if rank is None else rank[row]] * arms for row in range(rows)]
        return Genotype.from_choices(
            self.space,
            list(choice),
            mean=mean,
            edges_per_node=EDGES_PER_NODE[self.config.edges_per_node],
            options=OperationOptions.of(self.config),
            macro={"layers": self.space.cell_types, "channels": self.config.init_channels},
        )

    def of(self, genotype: Genotype) -> int:
        """All parameters of the network."""
        from fastbandit.models import Architecture

        architecture = Architecture(
            in_channels=self.in_channels,
            classes=self.classes,
            channels=self.config.init_channels,
            cells=self.space.cell_types,
            **vars(genotype.options),
        )
        return sum(p.numel() for p in architecture.build(genotype).parameters())

    @cached_property
    def table(self) -> Tensor:
        """Parameters of each operation on each row, int64 [rows, arms]."""
        options, channels = OperationOptions.of(self.config), self.config.init_channels
        known: dict[tuple[str, int, int], int] = {}
        reductions = reduction_cells(self.space.cell_types)
        rows = []
        for cell in range(self.space.cell_types):
            stride = 2 if cell in reductions else 1
            channels *= stride
            for source, _ in self.space.edges:
                row = []
                for name in self.space.operations:
                    key = (name, channels, stride if source == 0 else 1)
                    if key not in known:
                        made = make(*key, options=options)
                        known[key] = sum(p.numel() for p in made.parameters())
                    row.append(known[key])
                rows.append(row)
        return torch.tensor(rows)

    @cached_property
    def rest(self) -> int:
        """Parameters beside those of the edges."""
        choice = [0] * self.space.rows
        return self.of(self.genotype(choice)) - int(self._edges(torch.tensor([choice]), None)[0])

    def _edges(self, choice: Tensor, rank: Tensor | None) -> Tensor:
        """Parameters of the edges that are kept, int64 [n], for choices [n, rows]."""
        rows = torch.arange(self.space.rows)
        sizes = self.table[rows, choice]
        kept = EDGES_PER_NODE[self.config.edges_per_node]
        if kept == "all":
            return sizes.sum(1)
        if rank is None:
            rank = torch.zeros(sizes.shape, dtype=torch.float64)
        total = torch.zeros(len(choice), dtype=torch.int64)
        for first, end in self._nodes():
            # The best edges of the node; ties: the earlier one, as a genotype has it.
            order = rank[:, first:end].sort(dim=1, descending=True, stable=True).indices
            total += sizes[:, first:end].gather(1, order[:, : int(kept)]).sum(1)
        return total

    def _nodes(self) -> list[tuple[int, int]]:
        """First and last row (not included) of the edges into each node of each cell."""
        found: list[tuple[int, int]] = []
        edges = self.space.edges
        for cell in range(self.space.cell_types):
            start = 0
            for position, (_, node) in enumerate(edges):
                if position + 1 == len(edges) or edges[position + 1][1] != node:
                    base = cell * len(edges)
                    found.append((base + start, base + position + 1))
                    start = position + 1
        return found

    # Networks of chance.

    def _law(self, wanted: int) -> Tensor:
        """Probabilities [rows, arms] under which a network has ``wanted`` parameters on average.

        Among networks of one size all have the same probability: each weighs exp(t size), and t
        is what moves the mean.
        """
        sizes = self.table.double()
        share = torch.ones(len(sizes), 1, dtype=torch.float64)
        kept = EDGES_PER_NODE[self.config.edges_per_node]
        if kept != "all":
            for first, end in self._nodes():
                share[first:end] = min(1.0, int(kept) / (end - first))
        scale = float(sizes.max()) or 1.0
        low, high = -200.0, 200.0
        law = torch.softmax(0 * sizes, 1)
        for _ in range(80):
            middle = (low + high) / 2
            law = torch.softmax(middle * sizes / scale, 1)
            mean = float((share * law * sizes).sum()) + self.rest
            low, high = (middle, high) if mean < wanted else (low, middle)
        return law

    def matched(
        self, wanted: int, seed: int, *, tolerance: float, draws: int, without: str, nearest: bool
    ) -> Matched:
        """A random network of about ``wanted`` parameters.

        The first of the drawn ones within the tolerance. They are drawn so that all networks of one
        size have the same probability, and sizes lie around the wanted one; uniform draws would
        seldom meet a size that is not an average one.

        Args:
            wanted: parameters.
            seed: decides the draws.
            tolerance: share of ``wanted``.
            draws: how many to draw at most.
            without: hash of a genotype that does not count.
            nearest: take the nearest one where none is within the tolerance.

        Raises:
            ConfigError: none is within the tolerance.
        """
        generator = torch.Generator().manual_seed(derive_seed(seed, "matched"))
        law, rows = self._law(wanted), self.space.rows
        best: tuple[int, list[int], list[float], int] | None = None
        for start in range(0, draws, _CHUNK):
            n = min(_CHUNK, draws - start)
            choice = torch.multinomial(law, n, replacement=True, generator=generator).T
            rank = torch.rand((n, rows), generator=generator, dtype=torch.float64)
            sizes = self._edges(choice, rank) + self.rest
            away = (sizes - wanted).abs()
            within = torch.nonzero(away <= tolerance * wanted).flatten().tolist()
            for place in within or [int(away.argmin())]:
                found = (int(away[place]), choice[place].tolist(), rank[place].tolist(), start)
                genotype = self.genotype(found[1], found[2])
                if genotype.hash == without:
                    continue
                if within:
                    return Matched(genotype, int(sizes[place]), start + place + 1)
                if best is None or found[0] < best[0]:
                    best = found
        if best is None:
            raise ConfigError(
                f"compare.draws: expected another network than the found one among {draws:,} "
                f"random ones of space {self.config.space}, got none"
            )
        genotype = self.genotype(best[1], best[2])
        parameters = self.of(genotype)
        if not nearest:
            raise ConfigError(
                f"compare.tolerance: expected a random network within {100 * tolerance:g} % of "
                f"{wanted:,} parameters among {draws:,}; the nearest has {parameters:,} "
                f"({100 * (parameters / wanted - 1):+.1f} %). --compare.nearest takes it"
            )
        return Matched(genotype, parameters, draws)

    def random(self, seed: int) -> Genotype:
        """A network of the space, every operation with the same probability."""
        generator = torch.Generator().manual_seed(seed)
        choice = torch.randint(self.space.arms, (self.space.rows,), generator=generator)
        rank = torch.rand(self.space.rows, generator=generator, dtype=torch.float64)
        return self.genotype(choice.tolist(), rank.tolist())

    # Single networks.

    def largest(self, most: int | None) -> Genotype:
        """The network with most parameters, at most ``most``.

        Raises:
            ConfigError: none is so small, or a limit where nodes keep some edges only.
        """
        kept = self.config.edges_per_node
        if most is None:
            choice = self.table.argmax(1)
            rank = self.table.amax(1).double()
            return self.genotype(choice.tolist(), rank.tolist())
        if kept != "all":
            raise ConfigError(f"compare.most_parameters: {_FIXED}; got {kept}")
        room = most - self.rest
        # Bit s of reachable[r]: the first r rows can have s parameters together.
        reachable = [1]
        rows = self.table.tolist()
        for sizes in rows:
            sums = 0
            for size in set(sizes):
                sums |= reachable[-1] << size
            reachable.append(sums & ((1 << max(room + 1, 0)) - 1))
        if not reachable[-1]:
            smallest = int(self.table.amin(1).sum()) + self.rest
            raise ConfigError(
                f"compare.most_parameters: expected {smallest:,} or more, what the smallest "
                f"network of space {self.config.space} has; got {most:,}"
            )
        left = reachable[-1].bit_length() - 1
        backwards: list[int] = []
        for row in range(len(rows) - 1, -1, -1):
            arm = next(
                arm
                for arm, size in enumerate(rows[row])
                if size <= left and reachable[row] >> (left - size) & 1
            )
            backwards.append(arm)
            left -= rows[row][arm]
        return self.genotype(backwards[::-1])

    def one_operation(self) -> list[tuple[str, Genotype]]:
        """For each operation the network that has it on every edge."""
        rows = self.space.rows
        return [
            (name, self.genotype([arm] * rows)) for arm, name in enumerate(self.space.operations)
        ]


def candidate(sizes: Sizes, seed: int, number: int, draw: int) -> Genotype:
    """Candidate ``draw`` of the best-of-m selection ``number``."""
    return sizes.random(derive_seed(seed, "compare", "candidate", number, draw))


def facts(matched: Matched, wanted: int) -> dict[str, Any]:
    """What is recorded of a matched network."""
    return {
        "wanted_parameters": wanted,
        "parameters": matched.parameters,
        "draws": matched.draws,
        "share_off": matched.parameters / wanted - 1,
    }
