"""Searches on the true accuracies of a table: what a reward says, and what the bandits come to.

A network is ``count`` cells side by side; its true accuracy is the mean of theirs. Two measurements
of it can be had:

- the **reward** of shared weights, which a bandit is credited with. For a cell it is the truth, and
  biases that stay the same through a search - half of their variance is a number for each
  operation on each edge, half one for each function that a cell may compute - so large that reward
  and truth of uniform cells have the correlation ``rho``; and noise of each draw;
- the accuracy after a **short training** of the network alone: the truth, and noise of each
  training, so large that it has the correlation ``short_rho`` with the truth.

Biases of the cells are averaged like their accuracies, and noise falls by the root of their number.
All numbers are functions of a seed, so whatever is run on a seed meets the same biases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbandit.bandit import Bandits, BanditSettings
from fastbandit.bandit.mixes import GAMMA_UNIFORMS, draw, mix_shares
from fastbandit.bandit.policies import POLICIES
from fastbandit.bandit.simulation import World
from fastbandit.ops.philox import philox4x32
from fastbandit.study.tabular.candidates import Candidates
from fastbandit.study.tabular.table import Table

__all__ = ["TabularWorld", "search"]

# The second word of the Philox counters, and the fourth: far from those that a bandit of the same
# seed draws (its second word is a sample's number).
_PURPOSES = {
    "edges": 0,
    "functions": 1,
    "noise": 2,
    "short": 3,
    "draw": 4,
    "fit": 5,
    "ties": 6,
    "mix": 7,
}
_FIRST = 2**31 + 16
_TAG = 2**31
# Of a network with as many cells or more.
_STAGES = 3
# Of the Dirichlet law of random mixes.
_CONCENTRATION = 0.5
# Elements of the largest tensor: what bounds how many searches run at a time.
_ELEMENTS = 2**24


def uniforms(seeds: Tensor, purpose: str, index: Tensor, number: int = 0) -> Tensor:
    """Uniform numbers in [0, 1), float64 of the shape of ``index``: functions of the arguments.

    Args:
        seeds: int64 [b].
        index: int64 [b, ...] or [...] that broadcasts with it, in [0, 2**32).
        number: in [0, 2**31), another set of numbers each.
    """
    seeds = seeds.view(-1, *[1] * (index.dim() - 1))
    counter = (index, _FIRST + _PURPOSES[purpose], number, _TAG)
    high, low, _, _ = philox4x32(counter, (seeds & (2**32 - 1), seeds >> 32))
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


def normals(seeds: Tensor, purpose: str, index: Tensor, number: int = 0) -> Tensor:
    """Standard normal numbers; see :func:`uniforms`."""
    uniform = uniforms(seeds, purpose, index, number)
    return torch.special.ndtri(uniform.clamp(min=2.0**-54))


@dataclass(frozen=True)
class TabularWorld:
    """A table, the networks that count, and what is measured of one."""

    table: Table
    candidates: Candidates
    spread: float
    """standard deviation of the accuracies of allowed cells, of any size"""
    parameters: Tensor
    """int64 [operations]: of each operation"""
    costs: Tensor
    """int64 [operations]: what each adds to the size that the budget of the candidates bounds"""
    rho: float = 1.0
    """correlation of the reward of a uniform cell with its accuracy, less the noise"""
    noise: float = 0.02
    """standard deviation of the reward of a cell from draw to draw"""
    rise: float = 0.3
    """how much the rewards rise over a search, as the shared weights are trained"""
    short_rho: float = 0.9
    """correlation of the accuracy after a short training with that after a full one"""

    @property
    def count(self) -> int:
        """Cells of a network."""
        return self.candidates.count

    @property
    def rows(self) -> int:
        """Edges of a network."""
        return self.count * self.table.edges

    def stages(self) -> list[int]:
        """The stage of each row: thirds of the cells, as of a network that is reduced twice."""
        cell = torch.arange(self.rows) // self.table.edges
        return (cell * min(_STAGES, self.count) // self.count).tolist()

    def constraints(self) -> dict[str, Any]:
        """What bandits are told of the rows and of the budget."""
        costs = self.costs.expand(self.rows, -1)
        return {"groups": self.stages(), "costs": costs, "budget": self.candidates.budget}

    def codes(self, choice: Tensor) -> Tensor:
        """The cells [..., count] of paths [..., rows]."""
        cells = choice.unflatten(-1, (self.count, self.table.edges))
        return (cells * self.table.place_values).sum(-1)

    def paths(self, codes: Tensor) -> Tensor:
        """The paths [..., rows] of cells [..., count]."""
        cells = codes.unsqueeze(-1) // self.table.place_values % self.table.operations
        return cells.flatten(-2)

    def accuracy(self, codes: Tensor) -> Tensor:
        """True accuracy of networks [..., count]: [...]."""
        return self.table.accuracy[codes].mean(-1)

    def edge_bias(self, seeds: Tensor) -> Tensor:
        """The reward's bias for each operation on each edge, float64 [b, rows, operations]."""
        operations = self.table.operations
        index = torch.arange(self.rows * operations).view(1, self.rows, operations)
        # The mean over the operations of an edge is the same for all networks: no part of rho.
        share = operations / (operations - 1) / self.table.edges
        return self._bias() * math.sqrt(share) * normals(seeds, "edges", index)

    def _bias(self) -> float:
        """Standard deviation of each of the two biases of a cell."""
        return self.spread * math.sqrt((1 / self.rho**2 - 1) / 2)

    def expected(self, seeds: Tensor, edge_bias: Tensor, codes: Tensor) -> Tensor:
        """The rewards of networks [b, n, count] without noise, float64 [b, n]."""
        paths = self.paths(codes)  # [b, n, rows]
        bias = edge_bias.unsqueeze(1).expand(*paths.shape, -1)
        edges = bias.gather(-1, paths.unsqueeze(-1)).squeeze(-1).sum(-1) / self.count
        place = torch.arange(self.count) * len(self.table.accuracy)
        functions = normals(seeds, "functions", place + self.table.same[codes]).mean(-1)
        return self.accuracy(codes) + edges + self._bias() * functions

    def noises(self, seeds: Tensor, samples: int) -> Tensor:
        """The noise of each reward, float64 [b, samples]."""
        index = torch.arange(samples).unsqueeze(0)
        return self.noise / math.sqrt(self.count) * normals(seeds, "noise", index)

    def short(self, seeds: Tensor, codes: Tensor, first: int) -> Tensor:
        """Accuracies after short trainings of networks [b, n, count], float64 [b, n].

        Args:
            first: how many networks of a seed were trained before; each training has its noise.
        """
        index = (first + torch.arange(codes.shape[1])).unsqueeze(0)
        size = self.spread / math.sqrt(self.count) * math.sqrt(1 / self.short_rho**2 - 1)
        return self.accuracy(codes) + size * normals(seeds, "short", index)

    def draw(self, seeds: Tensor, number: int, first: int = 0) -> Tensor:
        """Uniform candidates, int64 [b, number, count]: the same ones from ``first`` on."""
        shape = (1, number, self.count, 2)
        index = torch.arange(first * self.count * 2, (first + number) * self.count * 2)
        return self.candidates.draw(uniforms(seeds, "draw", index.view(shape)))

    def mixes(self, seeds: Tensor, number: int) -> Tensor:
        """Candidates each with a random mix of operations, int64 [b, number, count].

        The shares of the operations are drawn from a Dirichlet law, then an operation for each edge
        by them; a path that is no candidate is changed as little as possible.
        """
        operations = self.table.operations
        index = torch.arange(number * operations * GAMMA_UNIFORMS)
        index = index.view(1, number, operations, GAMMA_UNIFORMS)
        every = torch.ones(self.rows, operations, dtype=torch.bool)
        shares = mix_shares(_CONCENTRATION, uniforms(seeds, "mix", index), every)
        chance = uniforms(seeds, "mix", torch.arange(number * self.rows).view(1, number, -1), 1)
        path = draw(shares, chance)  # [b, number, rows]
        none = torch.zeros(len(seeds), self.rows, operations, dtype=torch.float64)
        fitted = [self.fit(seeds, path[:, i], none, 2**30 + i) for i in range(number)]
        return self.codes(torch.stack(fitted, 1))

    def scores(self, effects: Tensor) -> Tensor:
        """What effects [b, rows, operations] add up to in each candidate cell, [b, count, m]."""
        cells = self.paths(self.candidates.codes.unsqueeze(-1))  # [m, edges]
        flat = effects.unflatten(1, (self.count, self.table.edges)).flatten(2)
        hot = torch.nn.functional.one_hot(cells, self.table.operations).flatten(1)
        return flat @ hot.to(flat.dtype).T

    def chances(self, seeds: Tensor) -> Tensor:
        """Uniform numbers that decide between equal scores, float64 [b, count, m].

        Those of a seed are the same ones for all, moved around the circle by one of its own:
        numbers for every cell of every seed would take longer than all else.
        """
        shape = (self.count, len(self.candidates.codes))
        index = torch.arange(shape[0] * shape[1]).view(1, *shape)
        own = uniforms(seeds, "ties", index[:, :1, :1], 1)
        return (uniforms(seeds.new_zeros(1), "ties", index) + own) % 1.0

    def size(self, codes: Tensor) -> Tensor:
        """Parameters of cells, int64 of the shape of the codes."""
        return self.parameters[self.paths(codes.unsqueeze(-1))].sum(-1)

    def largest(self, seeds: Tensor) -> Tensor:
        """One of the candidates with the most parameters, at random, int64 [b, count]."""
        size = self.size(self.candidates.codes)
        networks = []
        for part in seeds.split(self.at_a_time()):
            scores = size + self.chances(part) / (2 * self.count)
            networks.append(self.candidates.best(scores)[0][:, 0])
        return torch.cat(networks)

    def at_a_time(self, number: int = 1) -> int:
        """How many seeds :meth:`scores`, and the ``number`` best by it, have room for."""
        states = len(self.candidates.codes) + (self.candidates.high + 1) * number * number
        return max(1, _ELEMENTS // (self.count * states))

    def fit(self, seeds: Tensor, path: Tensor, cost: Tensor, number: int) -> Tensor:
        """Paths, with as few changes as make them candidates, int64 [b, rows].

        Args:
            path: int64 [b, rows].
            cost: float64 [b, rows, operations], in [0, 1): what decides between candidates with as
                many changes: the smallest sum.
            number: which draw; equal sums are decided at random.
        """
        outside = (~self.candidates.contain(self.codes(path))).nonzero().squeeze(1)
        path = path.clone()
        for part in outside.split(self.at_a_time()) if len(outside) else ():
            index = torch.arange(cost[0].numel()).view(1, *cost.shape[1:])
            chance = uniforms(seeds[part], "fit", index, number)
            # Every change counts 1, and all that decides between equal ones less than 1 in sum.
            change = 1.0 + (0.5 * cost[part] + 1e-6 * chance) / self.rows
            change.scatter_(-1, path[part].unsqueeze(-1), 0.0)
            path[part] = self.paths(self.candidates.best(self.scores(-change))[0][:, 0])
        return path


def search(world: TabularWorld, settings: BanditSettings, seeds: Tensor) -> Tensor:
    """Runs a search of one policy for each seed, on the printed schedule.

    The bandits keep to the budget as those of a search do (:mod:`fastbandit.bandit.budget`). Of a
    path without a way from input to output, where that is asked for, as few edges as possible get
    another operation within the budget: one that is alive where there is one, at random. The
    survivor is changed in the same way, by the policy's own scores; that of ``random``, which has
    none, at random.

    Args:
        seeds: int64 [b].

    Returns:
        The networks, int64 [b, count].
    """
    settings.check()
    size = POLICIES[settings.policy].simulated_at_a_time
    size = max(1, min(size, _ELEMENTS // (64 * world.rows * world.table.operations)))
    return torch.cat([_search(world, settings, part) for part in seeds.split(size)])


def _search(world: TabularWorld, settings: BanditSettings, seeds: Tensor) -> Tensor:
    rows, operations = world.rows, world.table.operations
    constraints = world.constraints()
    none = Bandits(rows, operations, settings, seed=seeds[:0], **constraints)
    total = none.total_samples
    evaluated = settings.evaluations_per_epoch * (total - none.initial_samples)
    rewards = total + evaluated
    bandits = Bandits(rows, operations, settings, seed=seeds, room_for=rewards, **constraints)
    trend = World(start=0.0, rise=world.rise)
    bias, noise = world.edge_bias(seeds), world.noises(seeds, rewards)
    while not bandits.finished:
        extra = settings.evaluations_per_epoch if bandits.phase == "search" else 0
        # It ends at what a full training gives.
        level = trend.level(bandits.trained + 1, total) - world.rise
        for trained in (True, *[False] * extra):
            number = bandits.samples
            dead = 0.999 * (~bandits.alive).double()
            choice = world.fit(seeds, bandits.sample(trained=trained), dead, number)
            codes = world.codes(choice).unsqueeze(1)
            reward = world.expected(seeds, bias, codes).squeeze(1) + level
            bandits.credit(choice, reward + noise[:, number], trained=trained)
        while bandits.due:
            bandits.prune()
    score = bandits.score()
    if settings.policy == "random":
        score = torch.zeros_like(score)
    best, worst = score.amax(-1, keepdim=True), score.amin(-1, keepdim=True)
    cost = 0.999 * (best - score) / (best - worst).amax((-1, -2), keepdim=True).clamp(min=1e-300)
    path = world.fit(seeds, bandits.final(), cost, rewards)
    return world.codes(path)
