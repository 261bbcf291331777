"""Paths whose costs add up to something within a budget: draws, the best one, and whether any is.

A path has one arm in each row, and its size is a base and the sum of the costs of its arms, all of
them whole numbers. How a path within the budget is drawn from a law of each row:

1. the path that was drawn without regard to the budget, if it is within;
2. else up to 32 draws from the tilted law, ``p exp(-t cost)``, which is the one nearest to the law
   (in relative entropy) of all with its mean size: t brings the mean into the budget. Given the
   size of a path, the tilted law is the law itself, so only the sizes are moved;
3. else the repair: of the draw that came nearest, the fewest rows change, and of these changes the
   most likely is taken.

The best path within a budget is a knapsack problem, solved by dynamic programming over sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ATTEMPTS", "SizeBudget", "whole_costs"]

#: Draws from the tilted law before the repair.
ATTEMPTS = 32
# Each arm alive keeps this share of the law of its row, so that a budget can be met whatever the
# law: the last path of a block of balanced draws has no choice of its own.
_SHARE = 1e-3
# What a row that changes costs in the repair: more than the likelihoods of all rows, none above
# -log(_SHARE / arms), can make up for.
_STAY = 1e4
# Sizes that the dynamic programming tells apart. With more of them it rounds, and keeps away from
# the ends of the budget.
_MOST_SIZES = 2**17
# Sums that the search for any path tells apart: 8 MB for each row.
_MOST_SUMS = 2**26
# Cells of a table that holds the bandits solved at a time.
_MOST_CELLS = 2**19
# Steps of Newton's method and of halving at most, and where the latter begins: there the law gives
# nearly all to the smallest or the largest arms.
_STEPS = 60
_STEEPEST = 1e5


class SizeBudget:
    """The sizes of paths, and those that a path may have.

    Args:
        costs: [rows, arms], whole numbers >= 0: what each arm adds to the size of a path.
        base: what all paths have, a whole number >= 0.
        budget: the smallest and the largest size, which may be infinite.

    Raises:
        ValueError: numbers of another kind, or a budget that no path meets.
    """

    def __init__(
        self, costs: Tensor | Sequence[Sequence[int]], base: int, budget: Sequence[float]
    ) -> None:
        self.costs = whole_costs(costs)
        if not float(base).is_integer() or base < 0:
            raise ValueError(f"base_cost: expected a whole number >= 0, got {base!r}")
        self.base = int(base)
        ends = [float(end) for end in budget]
        if len(ends) != 2 or math.isnan(ends[0]) or not ends[0] <= ends[1]:
            raise ValueError(
                f"budget: expected the smallest and the largest size, got {list(budget)!r}"
            )
        self.low, self.high = ends
        alive = torch.ones_like(self.costs, dtype=torch.bool)
        if not self.possible(alive):
            smallest = self.base + int(self.costs.amin(1).sum())
            largest = self.base + int(self.costs.amax(1).sum())
            raise ValueError(
                f"budget: expected one that a path can meet; they have {smallest:,} to "
                f"{largest:,}, and none has {self}"
            )

    def __str__(self) -> str:
        low, high = (f"{end:,.0f}" if math.isfinite(end) else "any" for end in self.ends)
        return f"{low} to {high}"

    @property
    def ends(self) -> tuple[float, float]:
        """The smallest and the largest size."""
        return self.low, self.high

    def size(self, choice: Tensor) -> Tensor:
        """The sizes of paths, int64 [...] of int64 [..., rows]."""
        costs = self.costs.to(choice.device)
        row = torch.arange(len(costs), device=choice.device)
        return self.base + costs[row, choice].sum(-1)

    def holds(self, choice: Tensor) -> Tensor:
        """Whether paths are within the budget, bool [...]."""
        size = self.size(choice)
        return (size >= self.low) & (size <= self.high)

    def usable(self, alive: Tensor) -> Tensor:
        """Arms alive without those that every path within the budget lacks, bool [..., rows, arms].

        By the smallest and the largest size of the paths through an arm.
        """
        costs = self.costs.to(alive.device)
        while True:
            low = torch.where(alive, costs, torch.iinfo(torch.int64).max).amin(-1, keepdim=True)
            high = torch.where(alive, costs, -1).amax(-1, keepdim=True)
            least = self.base + low.sum(-2, keepdim=True) - low + costs
            most = self.base + high.sum(-2, keepdim=True) - high + costs
            left = alive & (least <= self.high) & (most >= self.low)
            if torch.equal(left, alive):
                return left
            alive = left

    # --- draws ----------------------------------------------------------------------------------

    def law(self, law: Tensor, alive: Tensor) -> Tensor:
        """The tilted law, whose mean size is within the budget, float64 [..., rows, arms].

        Args:
            law: float64 [..., rows, arms], of each row on its own, >= 0 with any sum.
            alive: bool [..., rows, arms].
        """
        return self._tilted(_shared(law, alive))

    def _tilted(self, probabilities: Tensor) -> Tensor:
        costs = self.costs.to(probabilities.device).double()
        logs = probabilities.log()
        mean, variance = _moments(probabilities, costs)
        mean = mean + self.base
        # By a standard deviation within, so that about one draw in three misses.
        inside = variance.sqrt().clamp(max=(self.high - self.low) / 2)
        target = torch.maximum(mean.clamp(max=self.high - inside), self.low + inside)
        # Where the mean is within the budget it stays.
        target = torch.where((mean >= self.low) & (mean <= self.high), mean, target)
        # By Newton's method within a bracket. The mean falls as t grows, by the variance; t is in
        # units of the largest difference of a row's costs.
        unit = (costs.amax(-1) - costs.amin(-1)).amax().clamp(min=1.0)
        tilt = torch.zeros_like(mean)
        low, high = tilt - _STEEPEST, tilt + _STEEPEST
        for _ in range(_STEPS):
            tilted = (logs - (tilt / unit)[..., None, None] * costs).softmax(-1)
            mean, variance = _moments(tilted, costs)
            miss = mean + self.base - target
            done = miss.abs() <= 1e-3 * unit
            if bool(done.all()):
                break
            low, high = torch.where(miss > 0, tilt, low), torch.where(miss > 0, high, tilt)
            step = tilt + miss * unit / variance.clamp(min=1e-300)
            step = torch.where((step > low) & (step < high), step, (low + high) / 2)
            tilt = torch.where(done, tilt, step)
        return tilted

    def draw(self, law: Tensor, alive: Tensor, uniform: Tensor) -> Tensor:
        """Paths within the budget, from the tilted law; steps 2 and 3 of the module's docstring.

        Args:
            law: float64 [..., rows, arms], of each row on its own.
            alive: bool [..., rows, arms]; a path of arms alive is within the budget.
            uniform: float64 [..., rows, :data:`ATTEMPTS`], in [0, 1).

        Returns:
            int64 [..., rows].
        """
        shared = _shared(law, alive)
        sums = self._tilted(shared).cumsum(-1)
        reached = (sums / sums[..., -1:]).unsqueeze(-2) > uniform.unsqueeze(-1)
        reached = reached & alive.unsqueeze(-2)
        # A uniform number is below 1, and so is the last sum of no row.
        drawn = reached.int().argmax(-1).transpose(-1, -2)  # [..., attempts, rows]
        size = self.size(drawn)
        outside = (self.low - size).clamp(min=0) + (size - self.high).clamp(min=0)
        # The first of those that are within; where none is, the first of the nearest.
        nearest = outside == outside.amin(-1, keepdim=True)
        first = nearest.int().argmax(-1)
        index = first[..., None, None].expand(*first.shape, 1, drawn.shape[-1])
        choice = drawn.gather(-2, index).squeeze(-2)
        missed = ~self.holds(choice)
        if bool(missed.any()):
            choice[missed] = self._repaired(choice[missed], shared[missed], alive[missed])
        return choice

    def repair(self, choice: Tensor, law: Tensor, alive: Tensor) -> Tensor:
        """Paths within the budget that differ from ``choice`` in the fewest rows.

        Of several the most likely one under ``law``; shapes as in :meth:`draw`.
        """
        return self._repaired(choice, _shared(law, alive), alive)

    def _repaired(self, choice: Tensor, probabilities: Tensor, alive: Tensor) -> Tensor:
        staying = torch.zeros_like(probabilities).scatter_(-1, choice.unsqueeze(-1), _STAY)
        return self.best(probabilities.log() + staying, alive)

    # --- the best path --------------------------------------------------------------------------

    def best(self, worth: Tensor, alive: Tensor) -> Tensor:
        """The path within the budget whose arms have the largest sum of ``worth``.

        By dynamic programming over the sizes of the paths of the first rows. It is exact where the
        sizes, in units of their greatest common divisor, are at most 131,072; above that, sizes are
        rounded, and a path nearer to an end of the budget than the rounding is taken only where
        no other is found.

        Args:
            worth: float64 [..., rows, arms], finite where alive.
            alive: bool [..., rows, arms]; a path of arms alive is within the budget.

        Returns:
            int64 [..., rows].

        Raises:
            ValueError: no path of arms alive is within the budget.
        """
        batch = worth.shape[:-2]
        free = torch.where(alive, worth, -math.inf).argmax(-1)
        good = self.holds(free)
        if bool(good.all()):
            return free
        flat = free.reshape(-1, free.shape[-1])
        todo = (~good.reshape(-1)).nonzero().squeeze(-1)
        worth = worth.reshape(-1, *worth.shape[-2:])[todo].cpu()
        alive = alive.reshape(-1, *alive.shape[-2:])[todo].cpu()
        flat[todo] = self._solve(worth, alive).to(flat.device)
        return flat.reshape(*batch, -1)

    def _solve(self, worth: Tensor, alive: Tensor) -> Tensor:
        """:meth:`best` of bandits [bandits, rows, arms] on the CPU."""
        least = self.costs.amin(1, keepdim=True)
        costs, base = self.costs - least, self.base + int(least.sum())
        unit = max(1, math.gcd(*costs.flatten().tolist()))
        most = int(costs.amax(1).sum())
        rounded = unit
        while most // rounded >= _MOST_SIZES:
            rounded *= 2
        exact = rounded == unit
        steps = costs // unit if exact else ((costs + rounded // 2) // rounded)
        margin = 0 if exact else len(costs)  # rounding moves each row by half a unit at most
        # Sizes above the largest are of no use.
        cells = int(steps.amax(1).sum()) + 1
        first = 0 if self.low <= base else math.ceil((self.low - base) / rounded)
        last = cells - 1
        if self.high < math.inf:
            last = min(last, math.floor((self.high - base) / rounded))
        choice = torch.empty(worth.shape[:-1], dtype=torch.int64)
        window = (first + margin if first else first), (last - margin if last < cells - 1 else last)
        at_a_time = max(1, _MOST_CELLS // cells)
        for start in range(0, len(worth), at_a_time):
            part = slice(start, start + at_a_time)
            choice[part] = self._programmed(worth[part], alive[part], steps, cells, window)
        for i in (~self.holds(choice)).nonzero().squeeze(-1).tolist():
            path = None if exact else self._any(alive[i])
            if path is None:
                raise ValueError(
                    f"budget: no path of the arms left has {self}; the nearest to it "
                    f"has {int(self.size(choice[i])):,}"
                )
            choice[i] = path
        return choice

    @staticmethod
    def _programmed(
        worth: Tensor, alive: Tensor, steps: Tensor, cells: int, window: tuple[int, int]
    ) -> Tensor:
        """The best paths with sizes in the window, in steps; any path where there is none."""
        bandits, rows, arms = worth.shape
        worth = torch.where(alive, worth, -math.inf)
        value = torch.full((bandits, cells), -math.inf, dtype=torch.float64)
        value[:, 0] = 0.0
        kind = torch.uint8 if arms <= 255 else torch.int32
        taken = torch.zeros((rows, bandits, cells), dtype=kind)
        for row in range(rows):
            new = torch.full_like(value, -math.inf)
            for arm in range(arms):
                step = int(steps[row, arm])
                offer = value[:, : cells - step] + worth[:, row, arm, None]
                kept = new[:, step:]
                better = offer > kept
                kept.copy_(torch.where(better, offer, kept))
                taken[row, :, step:].masked_fill_(better, arm)
            value = new
        first, last = window
        inside = torch.full_like(value, -math.inf)
        inside[:, first : last + 1] = value[:, first : last + 1]
        end = inside.argmax(1)
        lost = inside.amax(1) == -math.inf
        end = torch.where(lost, value.argmax(1), end)
        choice = torch.empty((bandits, rows), dtype=torch.int64)
        each = torch.arange(bandits)
        for row in reversed(range(rows)):
            chosen = taken[row, each, end].long()
            choice[:, row] = chosen
            end = end - steps[row, chosen]
        return choice

    # --- whether there is one -------------------------------------------------------------------

    def possible(self, alive: Tensor) -> bool:
        """Whether a path of arms alive, bool [rows, arms], is within the budget."""
        if not bool(alive.any(-1).all()):
            return False
        costs, low, high = self._extremes(alive)
        least, most = self.base + int(low.sum()), self.base + int(high.sum())
        if least > self.high or most < self.low:
            return False
        if least >= self.low or most <= self.high:
            return True
        # From the smallest path to the largest, an arm of one row at a time: no step is longer
        # than the longest between neighbours, so none jumps over a wider budget.
        ordered = torch.where(alive.cpu(), costs, high.unsqueeze(1)).sort(1).values
        if self.high - self.low >= int(ordered.diff(dim=1).amax()):
            return True
        return self._any(alive) is not None

    def _extremes(self, alive: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alive, costs = alive.cpu(), self.costs
        low = torch.where(alive, costs, torch.iinfo(torch.int64).max).amin(1)
        return costs, low, torch.where(alive, costs, -1).amax(1)

    def _any(self, alive: Tensor) -> Tensor | None:
        """A path of arms alive within the budget, int64 [rows], or None: by the set of all sums.

        Bit i of a whole number of Python says whether a sum i is possible. Above 67 million sums,
        in units of the costs' greatest common divisor, they are rounded, and a path nearer to an
        end of the budget than the rounding is not found.
        """
        costs, low, high = self._extremes(alive)
        costs = costs - low.unsqueeze(1)
        base, most = self.base + int(low.sum()), int((high - low).sum())
        arms = [
            [(arm, int(costs[row, arm])) for arm in range(costs.shape[1]) if alive[row, arm]]
            for row in range(len(costs))
        ]
        divisor = max(1, math.gcd(*(cost for row in arms for _, cost in row)))
        unit = divisor
        while most // unit >= _MOST_SUMS:
            unit *= 2
        # Each row is rounded by half a unit at most.
        margin = 0 if unit == divisor else len(arms)
        steps = [[(arm, (cost + unit // 2) // unit) for arm, cost in row] for row in arms]
        first = max(0, math.ceil((self.low - base) / unit) + margin) if self.low > base else 0
        last = sum(max(step for _, step in row) for row in steps)
        if self.high < base + most:
            last = min(last, math.floor((self.high - base) / unit) - margin)
        if last < first:
            return None
        every = (1 << (last + 1)) - 1
        sums = [1]
        for row in steps:
            reached = 0
            for step in {step for _, step in row if step <= last}:
                reached |= sums[-1] << step
            sums.append(reached & every)
        inside = sums[-1] >> first
        if not inside:
            return None
        # From a sum within the budget back through the rows, the first arm that leads to it.
        total = first + (inside & -inside).bit_length() - 1
        path = []
        for row, before in zip(reversed(steps), reversed(sums[:-1]), strict=True):
            arm, step = next(
                (arm, step) for arm, step in row if total >= step and before >> (total - step) & 1
            )
            path.append(arm)
            total -= step
        return torch.tensor(path[::-1])


def _shared(probabilities: Tensor, alive: Tensor) -> Tensor:
    """The law with a small share for each arm alive; 0 elsewhere. Its sum may be another than 1."""
    share = alive.double() / alive.sum(-1, keepdim=True)
    # A law that gives all to arms that are not alive counts for nothing.
    probabilities = torch.where(alive, probabilities, 0.0)
    probabilities = probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-300)
    mixed = (1.0 - _SHARE) * probabilities + _SHARE * share
    return mixed / mixed.sum(-1, keepdim=True)


def _moments(probabilities: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the sum of costs, [...] each; added in the order of rows and arms."""
    weighted = probabilities * costs
    mean = weighted.cumsum(-1)[..., -1]
    square = (weighted * costs).cumsum(-1)[..., -1] - mean**2
    return mean.cumsum(-1)[..., -1], square.clamp(min=0.0).cumsum(-1)[..., -1]


def whole_costs(costs: Tensor | Sequence[Sequence[int]]) -> Tensor:
    """Costs as int64 [rows, arms] on the CPU."""
    tensor = torch.as_tensor(costs).detach().cpu()
    if tensor.dim() != 2 or tensor.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise ValueError(
            f"costs: expected whole numbers [rows, arms], got {tensor.dtype} {list(tensor.shape)}"
        )
    whole = tensor.to(torch.int64)
    if not bool((tensor.double() == whole.double()).all()) or bool((whole < 0).any()):
        raise ValueError(
            "costs: expected whole numbers >= 0 (a latency: in nanoseconds), got others"
        )
    return whole
