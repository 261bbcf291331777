"""Networks that a search may end with: cells of a table side by side, within a size budget.

A network of ``count`` cells is ``count`` codes of a :class:`~fastbandit.study.tabular.table.Table`;
its accuracy is the mean of theirs. The budget bounds the mean size of its cells. All questions -
a uniform draw, the mean of all, the best by a score that adds up over cells - are answered by
dynamic programs over the total size, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Candidates"]


@dataclass(frozen=True)
class _Group:
    """Members of one size."""

    size: int
    members: Tensor  # int64 [m]: positions in Candidates.codes


class Candidates:
    """All networks of ``count`` allowed cells whose total size is in the budget.

    Args:
        allowed: bool [n]: cells that may be used.
        size: int64 [n], >= 0: the size of a cell.
        budget: the least and the most mean size of a network's cells; None: any.
        count: cells of a network.

    Attributes:
        codes: int64 [m]: allowed cells that are part of a network within the budget.

    Raises:
        ValueError: there is no such network.
    """

    def __init__(
        self, allowed: Tensor, size: Tensor, budget: tuple[int, int] | None, count: int = 1
    ) -> None:
        self.count = count
        #: The least and the most total size; None: any.
        self.budget = None if budget is None else (count * budget[0], count * budget[1])
        # Without a budget all cells are of one size, so the programs below have one state.
        size = torch.zeros_like(size) if budget is None else size
        self.low, self.high = self.budget or (0, 0)
        codes = allowed.nonzero().squeeze(1)
        sizes = [int(one) for one in size[codes].unique() if one <= self.high]
        # ways[c][t]: networks from their c-th cell on, where the cells before have the size t.
        last = torch.zeros(self.high + 1, dtype=torch.float64)
        last[self.low :] = 1
        self._ways = [last]
        for _ in range(count):
            before = torch.zeros_like(last)
            for one in sizes:
                number = int((size[codes] == one).sum())
                before[: self.high + 1 - one] += number * self._ways[0][one:]
            self._ways.insert(0, before)
        if not sizes or not self._ways[0][0] > 0:
            raise ValueError(
                f"no network of {count} cells within the budget; sizes of the cells: "
                f"{', '.join(str(int(one)) for one in size[codes].unique()) or 'there are none'}"
            )
        used = [one for one in sizes if self._ways[1][one] > 0]
        self.codes = codes[torch.isin(size[codes], torch.tensor(used))]
        self._groups = [_Group(one, (size[self.codes] == one).nonzero().squeeze(1)) for one in used]
        self._position = torch.full((len(size),), -1)
        self._position[self.codes] = torch.arange(len(self.codes))
        self._size = size

    def contain(self, codes: Tensor) -> Tensor:
        """Which networks [..., count] are candidates, bool [...]."""
        total = self._size[codes].sum(-1)
        allowed = (self._position[codes] >= 0).all(-1)
        return allowed & (total >= self.low) & (total <= self.high)

    def weights(self) -> Tensor:
        """Shares of ``codes`` among the cells of uniform candidates, float64 [m]; they sum to 1."""
        ways = torch.zeros(len(self.codes), dtype=torch.float64)
        for group in self._groups:
            ways[group.members] = self._ways[1][group.size]
        return ways / ways.sum()

    def mean(self, value: Tensor) -> float:
        """Mean over all candidates of the mean of their cells' values [n], exactly."""
        return float((self.weights() * value[self.codes]).sum())

    def draw(self, uniform: Tensor) -> Tensor:
        """Uniform candidates, int64 [..., count].

        Args:
            uniform: float64 [..., count, 2], uniform numbers in [0, 1).
        """
        used = torch.zeros(uniform.shape[:-2], dtype=torch.int64)
        sizes = torch.tensor([group.size for group in self._groups])
        numbers = torch.tensor([len(group.members) for group in self._groups])
        members = torch.cat([group.members for group in self._groups])
        first = numbers.cumsum(0) - numbers
        cells = []
        for cell in range(self.count):
            total = used.unsqueeze(-1) + sizes
            ways = self._ways[cell + 1][total.clamp(max=self.high)]
            below = (numbers * torch.where(total <= self.high, ways, 0.0)).cumsum(-1)
            bar = uniform[..., cell, 0] * below[..., -1]
            # Rounding could put the bar on the end, where the last of no weight would be taken.
            group = (below <= bar.unsqueeze(-1)).sum(-1)
            group = torch.minimum(group, (below < below[..., -1:]).sum(-1))
            place = (uniform[..., cell, 1] * numbers[group]).long()
            cells.append(self.codes[members[first[group] + place]])
            used = used + sizes[group]
        return torch.stack(cells, -1)

    def best(self, score: Tensor, number: int = 1) -> tuple[Tensor, Tensor]:
        """The candidates whose scores, added over cells, are the largest.

        Args:
            score: float64 [b, count, m]: of each of ``codes`` in each place.
            number: how many; fewer where there are fewer candidates.

        Returns:
            Networks, int64 [b, number, count], and their scores [b, number], the best first.
        """
        if self.count == 1:
            value, place = score[:, 0].topk(min(number, score.shape[-1]))
            return self.codes[place].unsqueeze(-1), value
        b, states = len(score), self.high + 1
        value = torch.full((b, states, number), -torch.inf, dtype=score.dtype)
        value[:, 0, 0] = 0
        trail: list[tuple[Tensor, Tensor, Tensor]] = []
        for cell in range(self.count):
            best = torch.full((b, states, number), -torch.inf, dtype=score.dtype)
            before = torch.zeros(b, states, number, dtype=torch.int64)
            chosen, size = torch.zeros_like(before), torch.zeros_like(before)
            for group in self._groups:
                here, place = score[:, cell, group.members].topk(min(number, len(group.members)))
                reach = states - group.size
                # [b, reach, number, here]: each way so far with each cell of the group.
                sums = value[:, :reach, :, None] + here[:, None, None, :]
                ranks = torch.arange(number).view(-1, 1).expand(sums.shape[-2:])
                cells = group.members[place][:, None, None, :].expand(sums.shape)
                kept, index = torch.cat([best[:, group.size :], sums.flatten(2)], -1).topk(number)
                for old, new in (
                    (before, ranks.expand(sums.shape).flatten(2)),
                    (chosen, cells.flatten(2)),
                    (size, torch.full((b, reach, number * here.shape[-1]), group.size)),
                ):
                    both = torch.cat([old[:, group.size :], new], -1)
                    old[:, group.size :] = both.gather(-1, index)
                best[:, group.size :] = kept
            trail.append((before, chosen, size))
            value = best
        ends = value[:, self.low :].flatten(1)
        top, index = ends.topk(min(number, ends.shape[-1]))
        number_found = int((top > -torch.inf).sum(-1).min())
        top, index = top[:, :number_found], index[:, :number_found]
        state, rank = self.low + index // number, index % number
        row = torch.arange(b).unsqueeze(1)
        places = []
        for before, chosen, size in reversed(trail):
            places.append(chosen[row, state, rank])
            state, rank = state - size[row, state, rank], before[row, state, rank]
        return self.codes[torch.stack(places[::-1], -1)], top
