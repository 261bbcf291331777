"""Any number of bandits on one schedule: their state, their draws, and when an arm goes.

The schedule is that of Algorithm 8: an initial pass that gives every arm one sample, then rounds
after each of which every row abandons one arm, until one is left. All of it is written on leading
dimensions ``...``: a search has one bandit, a simulation thousands.

Randomness is counter-based: each number is a pure function of the seed, of what it is for, of
how many samples were credited before and of its place. There is no generator to save, torch's
global generator is neither read nor moved, and a run that goes on from a checkpoint or that is
replayed from its log draws the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.bandit.budget import ATTEMPTS, SizeBudget, whole_costs
from fastbandit.bandit.mixes import GAMMA_UNIFORMS, draw, mix_shares
from fastbandit.bandit.policies import POLICIES, History
from fastbandit.bandit.settings import BanditSettings
from fastbandit.ops.philox import philox4x32

__all__ = ["Bandits", "counter_uniform"]

# What a uniform number is for: the third word of its Philox counter.
_PURPOSES = {"initial": 0, "sample": 1, "prune": 2, "budget": 3, "mix": 4}
# The fourth word. The random start of an attack has the high half of an image's index there, which
# is below 2**31, so no number is used twice should a caller use one seed for both.
_COUNTER_TAG = 2**31


def counter_uniform(
    seed: int | Tensor,
    purpose: str,
    number: int,
    rows: int,
    columns: int,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform numbers in [0, 1), 53 bits each, a function of the arguments alone.

    Args:
        seed: in [0, 2**63); or int64 [...] of them, for as many bandits at once.
        purpose: ``initial`` (the permutations of the initial pass), ``sample``, ``prune``,
            ``budget`` (paths drawn again because of their size) or ``mix``.
        number: which draw.
        rows, columns: how many for each seed.
        device: where an int seed's numbers are made.

    Returns:
        float64 [..., rows, columns].
    """
    if isinstance(seed, Tensor):
        seed, device = seed[..., None, None], seed.device
    index = torch.arange(rows * columns, device=device).view(rows, columns)
    counter = (index, number, _PURPOSES[purpose], _COUNTER_TAG)
    high, low, _, _ = philox4x32(counter, (seed & (2**32 - 1), seed >> 32))
    # 27 and 26 bits: the 53 that a float64 holds exactly.
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


class Bandits:
    """Bandits that share one schedule, [...] of them, each with one reward per sample and a seed.

    Paths are not checked here; :class:`fastbandit.bandit.AntiBandit` does that.

    Args:
        rows: rows of each bandit (edges of the network).
        arms: number of arms K of each row (operations of the space).
        settings: the policy and its settings.
        seed: in [0, 2**63); or int64 [...] of them, one for each bandit.
        device: where the tensors live.
        room_for: samples that memory is taken for at first.
        groups: the stage of each row, whole numbers >= 0, for policies that use it; None: one.
        costs: [rows, arms], whole numbers >= 0, what each arm adds to the size of a path, such as
            parameters.
        base_cost: the size that all paths have, a whole number >= 0.
        budget: the smallest and the largest size of a path, of which the largest may be infinite.
            All paths drawn are within it (:mod:`fastbandit.bandit.budget` says how), arms are
            abandoned so that some path is, and so is :meth:`final`. None: any size.

    Attributes:
        mean: float64 [..., rows, arms], m; 0 for an arm not credited yet.
        count: int64 [..., rows, arms], n.
        alive: bool [..., rows, arms].

    These three are the state itself, not copies: read them, do not write.

    Raises:
        ValueError: a setting out of its range; for an unknown policy, the known ones; a budget that
            no path meets, groups or costs of another shape.
    """

    mean: Tensor
    count: Tensor
    alive: Tensor

    def __init__(
        self,
        rows: int,
        arms: int,
        settings: BanditSettings | None = None,
        *,
        seed: int | Tensor = 0,
        device: torch.device | str = "cpu",
        room_for: int = 64,
        groups: Sequence[int] | None = None,
        costs: Tensor | Sequence[Sequence[int]] | None = None,
        base_cost: int = 0,
        budget: Sequence[float] | None = None,
    ) -> None:
        self.rows = rows
        self.arms = arms
        settings = BanditSettings() if settings is None else settings
        settings.check()
        self.settings = settings.as_floats()
        self.device = torch.device(device)
        self._seed = seed
        self.groups = None if groups is None else tuple(int(group) for group in groups)
        if self.groups is not None and (len(self.groups) != rows or min(self.groups) < 0):
            raise ValueError(
                f"groups: expected {rows} whole numbers >= 0, one for each row, got {groups!r}"
            )
        self.costs = None if costs is None else whole_costs(costs)
        if self.costs is not None and self.costs.shape != (rows, arms):
            raise ValueError(f"costs: expected shape {[rows, arms]}, got {list(self.costs.shape)}")
        if self.costs is None and budget is not None:
            raise ValueError("budget: expected costs beside it, got none")
        self.base_cost = base_cost
        #: The sizes of paths and the budget; None where there is none.
        self.sizes: SizeBudget | None = None
        if self.costs is not None and budget is not None:
            self.sizes = SizeBudget(self.costs, base_cost, budget)
        self._policy = POLICIES[self.settings.policy]()
        batch = seed.shape if isinstance(seed, Tensor) else ()
        shape = (*batch, rows, arms)
        self.mean = torch.zeros(shape, dtype=torch.float64, device=self.device)
        self.count = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.alive = torch.ones(shape, dtype=torch.bool, device=self.device)
        self._arms_left = arms
        self._samples = 0
        self._trained_total = 0
        # What was credited, with room at the end; the room doubles when it is used up.
        room = (*batch, room_for)
        self._choice = torch.zeros((*room, rows), dtype=torch.int64, device=self.device)
        self._reward = torch.zeros(room, dtype=torch.float64, device=self.device)
        self._trained = torch.zeros(room_for, dtype=torch.bool, device=self.device)
        # A uniformly random permutation of the arms in each row. The sort is stable, so that
        # equal keys (one in 2**53) have the same order everywhere.
        keys = self._uniform("initial", 0, arms)
        self._initial = keys.argsort(dim=-1, stable=True)  # [..., rows, arms]

    # --- where the run stands -------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Networks credited so far: N of every row."""
        return self._samples

    @property
    def trained(self) -> int:
        """Networks trained and credited so far, without those that were only evaluated."""
        return self._trained_total

    @property
    def arms_left(self) -> int:
        """Arms alive in each row."""
        return self._arms_left

    @property
    def round(self) -> int:
        """0 in the initial pass, then 1 + the number of arms abandoned in each row."""
        return 0 if self.phase == "initial" else 1 + self.arms - self._arms_left

    @property
    def phase(self) -> str:
        """``initial``, ``search`` or ``finished``."""
        if self._trained_total < self.initial_samples:
            return "initial"
        return "search" if self._arms_left > 1 else "finished"

    @property
    def finished(self) -> bool:
        """One arm is left everywhere, and the initial pass is over."""
        return self.phase == "finished"

    @property
    def in_round(self) -> int:
        """c: paths trained since the last arm was abandoned; 0 in the initial pass."""
        return max(0, self._trained_total - self._trained_before(self._arms_left))

    @property
    def due(self) -> bool:
        """:meth:`prune` has to be called now. Some policies abandon several in a row: ``while``."""
        return self.phase == "search" and self.in_round >= self._budget(self._arms_left)

    @property
    def initial_samples(self) -> int:
        """Paths of the initial pass: K, or 0 for a policy without one."""
        return self.arms if self._policy.initial_pass else 0

    @property
    def total_samples(self) -> int:
        """Paths a whole run trains; K + T (K + ... + 2) with the printed schedule."""
        return self._trained_before(1)

    @property
    def history(self) -> History:
        """All that was credited, in order."""
        n = self._samples
        return History(self._choice[..., :n, :], self._reward[..., :n], self._trained[:n])

    @property
    def drawn(self) -> Tensor:
        """How often each arm was drawn, int64 [..., rows, arms]."""
        return self.count

    def score(self) -> Tensor:
        """What the policy holds of each arm, float64 [..., rows, arms], as scaled accuracy.

        Its mean, unless the policy says otherwise; meant for the arms alive.
        """
        return self._policy.score(self)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """``(lower, upper)`` of Eqs. 4.9 and 4.12 as of now, float64 [..., rows, arms] each."""
        return ops.bandit_bounds(self.mean, self.count, bonus=self.settings.bonus)

    def probabilities(self, *, trained: bool = True) -> Tensor:
        """The law of the next draw of a path, float64 [..., rows, arms].

        In the initial pass, without replacement: the arms not tried yet share it equally. With a
        budget it is the tilted law, whose mean size is within
        (:meth:`fastbandit.bandit.SizeBudget.law`).

        Args:
            trained: as in :meth:`sample`.
        """
        if self.sizes is None:
            return self._probabilities(trained)
        with self._usable() as usable:
            return self.sizes.law(self._probabilities(trained), usable)

    def _probabilities(self, trained: bool) -> Tensor:
        """The law without regard to the budget; with one, as weights of the arms of use."""
        if self._mixed(trained):
            number = self._samples + self._uncredited
            uniform = counter_uniform(
                self._seed, "mix", number, self.arms, GAMMA_UNIFORMS, self.device
            )
            return mix_shares(self.settings.mixes, uniform, self.alive)
        if self.phase == "initial":
            untried = self._untried()
            return untried.double() / untried.sum(-1, keepdim=True).clamp(min=1)
        return self._policy.probabilities(self)

    def _mixed(self, trained: bool) -> bool:
        """Whether the next path has a random mix of its own."""
        if not self.settings.mixes:
            return False
        return not trained or (self.phase == "initial" and self._policy.mixed_initial_pass)

    def _untried(self) -> Tensor:
        """Arms that the initial pass has not drawn yet, bool [..., rows, arms].

        With a budget those of them that are of use, or all that are where there is none.
        """
        if self.sizes is not None:
            untried = (self.drawn == 0) & self.alive
            return torch.where(untried.any(-1, keepdim=True), untried, self.alive)
        drawn = self._trained_total + self._uncredited
        return torch.ones_like(self.alive).scatter_(-1, self._initial[..., :drawn], False)

    def uniform(self, purpose: str, columns: int = 1, *, number: int | None = None) -> Tensor:
        """Uniform numbers in [0, 1) for a policy, float64 [..., rows, columns], 53 bits each.

        Args:
            purpose: ``sample`` or ``prune``; each has its own numbers.
            columns: how many for each row.
            number: which draw. Default: the number of samples credited or drawn (sample), or of
                arms alive (prune), so that each draw has new numbers. A policy that keeps one
                permutation over several draws passes the number of the first.
        """
        if purpose == "sample":
            drawn = self._samples + self._uncredited
            return self._uniform(purpose, drawn if number is None else number, columns)
        if purpose == "prune":
            return self._uniform(purpose, self._arms_left if number is None else number, columns)
        raise ValueError(f"uniform: purpose: expected sample or prune, got {purpose!r}")

    def final(self) -> Tensor:
        """The surviving arm of each row, int64 [..., rows].

        Before the end of a run: the arm alive with the highest score of the policy (its mean,
        unless the policy says otherwise), the lowest index among equals. With a budget it is the
        path within it whose scores have the largest sum
        (:meth:`fastbandit.bandit.SizeBudget.best`).
        """
        if self.sizes is not None:
            return self.sizes.best(self.score(), self.alive)
        return torch.where(self.alive, self.score(), -math.inf).argmax(-1)

    # --- the run --------------------------------------------------------------------------------

    def sample(self, *, trained: bool = True) -> Tensor:
        """Draw a path of each bandit, int64 [..., rows].

        In the initial pass each arm of a row is drawn once, in a random order; with a budget, in
        that order as far as the sizes allow it, and what they keep out stays untried. With the
        setting ``mixes`` and a policy that needs no sample of every arm
        (``Policy.mixed_initial_pass``), the initial pass is K paths each with a mix of its own.

        Args:
            trained: False for a path that is only evaluated; with ``mixes`` it has a mix of its
                own.
        """
        if self.sizes is None:
            return self._drawn(trained)
        with self._usable() as usable:
            choice = self._drawn(trained)
            outside = ~self.sizes.holds(choice)
            if bool(outside.any()):
                uniform = self._uniform("budget", self._samples + self._uncredited, ATTEMPTS)
                choice[outside] = self.sizes.draw(
                    self._probabilities(trained)[outside], usable[outside], uniform[outside]
                )
        return choice

    def _drawn(self, trained: bool) -> Tensor:
        """A path without regard to the budget."""
        if self._mixed(trained):
            number = self._samples + self._uncredited
            return draw(
                self._probabilities(trained), self._uniform("sample", number, 1).squeeze(-1)
            )
        if self.phase == "initial":
            # Without a budget the first untried arm has the position of the path.
            untried = self._untried().gather(-1, self._initial)
            position = untried.int().argmax(-1, keepdim=True)
            return self._initial.gather(-1, position).squeeze(-1)
        return self._policy.sample(self)

    def credit(self, choice: Tensor, reward: Tensor | float, *, trained: bool = True) -> None:
        """Credit the arms of a path of each bandit, drawn here or elsewhere.

        Args:
            choice: int64 [..., rows], arms alive.
            reward: a number, or float64 [...].
            trained: False for a path that was only evaluated: it counts in n and N, not in the
                schedule.
        """
        value = self.settings.scale * reward
        self._policy.credit(
            self, choice, value.unsqueeze(-1) if isinstance(value, Tensor) else value
        )
        n = self._samples
        if n == len(self._trained):
            self._make_room(max(2 * n, 64))
        self._choice[..., n, :] = choice
        self._reward[..., n] = reward
        self._trained[n] = trained
        self._samples += 1
        self._trained_total += trained

    def prune(self) -> Tensor:
        """Abandon one arm in each row; returns which, int64 [..., rows].

        With a budget, arms of no use go first: those that every path within it lacks. Where the
        arms left would have no path within it, rows spare an arm of the best path that there is and
        abandon the next one, as few rows as it takes; the last abandonment then leaves that path.
        """
        abandoned = self._policy.prune(self)
        if self.sizes is not None:
            useless = self.alive & ~self.sizes.usable(self.alive)
            first = useless.int().argmax(-1)
            abandoned = self._spare(torch.where(useless.any(-1), first, abandoned))
        self.alive.scatter_(-1, abandoned.unsqueeze(-1), False)
        self._arms_left -= 1
        return abandoned

    def known(self) -> dict[str, Any]:
        """What is known of rows and arms, as plain values: arguments of the constructor.

        Those that are not at their default.
        """
        constraints: dict[str, Any] = {}
        if self.groups is not None:
            constraints["groups"] = list(self.groups)
        if self.costs is not None:
            constraints |= {"costs": self.costs.tolist(), "base_cost": self.base_cost}
        if self.sizes is not None:
            constraints["budget"] = self.sizes.ends
        return constraints

    # --- inside ---------------------------------------------------------------------------------

    @contextmanager
    def _usable(self) -> Iterator[Tensor]:
        """``alive`` without the arms of no use to the budget, for the policy to see."""
        assert self.sizes is not None
        every = self.alive
        self.alive = self.sizes.usable(every)
        try:
            yield self.alive
        finally:
            self.alive = every

    def _spare(self, abandoned: Tensor) -> Tensor:
        """The arms to abandon so that a path within the budget is left."""
        assert self.sizes is not None
        rows, arms = self.rows, self.arms
        alive = self.alive.reshape(-1, rows, arms)
        chosen = abandoned.reshape(-1, rows).clone()
        left = alive.scatter(-1, chosen.unsqueeze(-1), False)
        lost = [i for i, arms_left in enumerate(left) if not self.sizes.possible(arms_left)]
        if not lost:
            return abandoned
        worth = self._policy.worth(self).reshape(-1, rows, arms)
        kept = self.sizes.best(worth[lost], alive[lost])
        if self._arms_left == 2:
            # The other one of the two that are alive.
            chosen[lost] = alive[lost].scatter(-1, kept.unsqueeze(-1), False).int().argmax(-1)
            return chosen.view_as(abandoned)
        every = self.alive
        spared = alive.clone()
        spared[lost] = alive[lost].scatter(-1, kept.unsqueeze(-1), False)
        try:
            # What the policy abandons if those of the path are not there.
            self.alive = spared.view_as(every)
            instead = self._policy.prune(self).reshape(-1, rows)
        finally:
            self.alive = every
        for i, path in zip(lost, kept, strict=True):
            one, other = chosen[i], instead[i]
            loss = worth[i].gather(-1, other.unsqueeze(-1)) - worth[i].gather(-1, one.unsqueeze(-1))
            order = loss.squeeze(-1).argsort(stable=True).tolist()
            for row in (row for row in order if int(one[row]) == int(path[row])):
                one[row] = other[row]
                if self.sizes.possible(alive[i].scatter(-1, one.unsqueeze(-1), False)):
                    break
        return chosen.view_as(abandoned)

    @property
    def _uncredited(self) -> int:
        """Paths that are drawn and not credited."""
        return 0

    def _make_room(self, size: int) -> None:
        """Room for ``size`` samples; what is credited stays."""
        choice, reward, trained = self.history
        more = size - self._samples
        self._choice = torch.cat(
            [choice, choice.new_empty(*choice.shape[:-2], more, self.rows)], -2
        )
        self._reward = torch.cat([reward, reward.new_empty(*reward.shape[:-1], more)], -1)
        self._trained = torch.cat([trained, trained.new_empty(more)])

    def _budget(self, arms: int) -> int:
        return self._policy.budget(self, arms)

    def _trained_before(self, arms_left: int) -> int:
        """Paths trained when a row gets down to `arms_left` arms."""
        rounds = sum(self._budget(k) for k in range(self.arms, arms_left, -1))
        return self.initial_samples + rounds

    def _uniform(self, purpose: str, number: int, columns: int) -> Tensor:
        return counter_uniform(self._seed, purpose, number, self.rows, columns, self.device)
