"""The bandit of CP-NAS: which path to train next, and which arms to abandon.

:class:`ChildParent` is Algorithm 9 of Zhang, Xu et al., "Binary Neural Networks", section 4.3 (Zhuo
et al., "CP-NAS: Child-Parent Neural Architecture Search for 1-bit CNNs", IJCAI 2020). With K arms
alive on each edge a round is T repetitions of K paths. In each repetition every edge goes through a
random permutation of its arms, so that every arm is tried exactly T times. A path is trained twice,
1-bit (the child) and full-precision (the parent); its score is (Eq. 4.15)

    z = beta (A_P - A_C) + A_C,

credited to every operation of the path. After a round the mean of an arm's scores is turned into
``e = softmax(z-bar)`` over its edge (Eq. 4.16), the arm with the smallest e is abandoned, and
K <- K - 1, until one is left: T (K + ... + 2) paths. Where the text is silent, the defaults here
are named at :class:`ChildParentSettings`.

It has the shape of :class:`fastbandit.bandit.AntiBandit` and knows no network. Its randomness is
counter-based, so there is no generator to save, and it is replayed from its log by
:func:`fastbandit.childparent.replay`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastbandit.bandit.anti_bandit import check_path
from fastbandit.bandit.bandits import counter_uniform
from fastbandit.bandit.settings import is_integer, is_number

__all__ = ["ChildParent", "ChildParentSettings", "Gap", "Means", "score"]

Gap = Literal["reward", "penalty"]

_STATE_VERSION = 1


@dataclass(frozen=True)
class ChildParentSettings:
    """The schedule and the score of Algorithm 9.

    Args:
        rounds: T; 3 is not from the text, which does not say.
        beta: weight of the gap between the two accuracies, >= 0; at 0.5 the score is their mean.
        gap: ``reward``: z = beta (A_P - A_C) + A_C, as printed; ``penalty``: z = A_C -
            beta (A_P - A_C), which is what the text says of large beta.
        carry: an arm's mean is over all its scores; False: over those of the round, as printed.
    """

    rounds: int = 3
    beta: float = 0.5
    gap: Gap = "reward"
    carry: bool = False

    def check(self, where: str = "") -> None:
        """Check every setting.

        Args:
            where: what comes before the name of a setting in a message.

        Raises:
            ValueError: a setting out of its range.
        """
        for name, good, expected in (
            ("rounds", is_integer(self.rounds) and self.rounds >= 1, "an integer >= 1"),
            (
                "beta",
                is_number(self.beta) and 0 <= self.beta < math.inf,
                "a finite number >= 0",
            ),
            ("gap", self.gap in ("reward", "penalty"), "one of reward, penalty"),
            ("carry", isinstance(self.carry, bool), "true or false"),
        ):
            if not good:
                value = getattr(self, name)
                raise ValueError(f"{where}{name}: expected {expected}, got {value!r}")


def score(child: float, parent: float, *, beta: float = 0.5, gap: Gap = "reward") -> float:
    """z of Eq. 4.15 from the two accuracies; see :class:`ChildParentSettings`."""
    sign = 1.0 if gap == "reward" else -1.0
    return sign * beta * (parent - child) + child


class ChildParent:
    """Rows that share one schedule: every arm of each is tried T times, then the worst one goes.

    Args:
        rows: edges of the network.
        arms: operations K of each.
        settings: default those of :class:`ChildParentSettings`.
        seed: in [0, 2**63).
        changes: settings by name, in place of those of ``settings``.

    Attributes:
        mean: float64 [rows, arms], z-bar; 0 for an arm without a score.
        count: int64 [rows, arms], scores that it is the mean of.
        alive: bool [rows, arms].

    These three are the state itself, not copies: read them, do not write.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        rows: int,
        arms: int,
        settings: ChildParentSettings | None = None,
        *,
        seed: int = 0,
        **changes: Any,
    ) -> None:
        for name, value in (("rows", rows), ("arms", arms)):
            if not is_integer(value) or value < 1:
                raise ValueError(f"ChildParent: {name}: expected an integer >= 1, got {value!r}")
        if not is_integer(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"ChildParent: seed: expected an integer in [0, 2**63), got {seed!r}")
        settings = dataclasses.replace(settings or ChildParentSettings(), **changes)
        settings.check("ChildParent: ")
        self.rows, self.arms, self.settings, self.seed = rows, arms, settings, seed
        self.mean = torch.zeros(rows, arms, dtype=torch.float64)
        self.count = torch.zeros(rows, arms, dtype=torch.int64)
        self.alive = torch.ones(rows, arms, dtype=torch.bool)
        self._sum = torch.zeros(rows, arms, dtype=torch.float64)
        self._arms_left = arms
        self._samples = 0
        self._pending: list[Tensor] = []  # drawn and not credited yet, in order
        # The permutations of a repetition, a function of the state; by the repetition's number.
        self._order: tuple[int, Tensor] | None = None

    # --- where the run stands -------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Paths credited so far."""
        return self._samples

    @property
    def trained(self) -> int:
        """Paths trained so far: every path is."""
        return self._samples

    @property
    def arms_left(self) -> int:
        """Arms alive in each row: K."""
        return self._arms_left

    @property
    def round(self) -> int:
        """1 + the number of arms abandoned in each row."""
        return 1 + self.arms - self._arms_left

    @property
    def phase(self) -> str:
        """``search`` or ``finished``."""
        return "search" if self._arms_left > 1 else "finished"

    @property
    def finished(self) -> bool:
        """One arm is left everywhere."""
        return self._arms_left == 1

    @property
    def in_round(self) -> int:
        """Paths credited since the last arm was abandoned."""
        return self._samples - self._before(self._arms_left)

    @property
    def due(self) -> bool:
        """:meth:`prune` has to be called now."""
        return not self.finished and self.in_round >= self._budget(self._arms_left)

    @property
    def room(self) -> int:
        """Paths that can be drawn now, with ``ahead``, before the state has to change."""
        if self.finished:
            return 0
        return max(0, self._budget(self._arms_left) - self.in_round - len(self._pending))

    @property
    def initial_samples(self) -> int:
        """Paths of an initial pass: there is none."""
        return 0

    @property
    def total_samples(self) -> int:
        """Paths a whole run trains: T (K + ... + 2)."""
        return self._before(1)

    @property
    def pending(self) -> Tensor | None:
        """The path that is to be credited next, int64 [rows], or None where none is drawn."""
        return self._pending[0].clone() if self._pending else None

    def _budget(self, arms: int) -> int:
        return self.settings.rounds * arms

    def _before(self, arms_left: int) -> int:
        """Paths trained when a row gets down to ``arms_left`` arms."""
        return sum(self._budget(arms) for arms in range(self.arms, arms_left, -1))

    def score(self) -> Tensor:
        """z-bar, float64 [rows, arms]; an arm without a score has the lowest."""
        return torch.where(self.count > 0, self.mean, -math.inf)

    def shares(self) -> Tensor:
        """e of Eq. 4.16: the softmax of z-bar over the arms alive, float64 [rows, arms]."""
        return torch.where(self.alive, self.mean, -math.inf).softmax(-1)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """An arm has no bounds here: infinite ones, float64 [rows, arms] each."""
        infinite = torch.full_like(self.mean, math.inf)
        return -infinite, infinite

    def probabilities(self, *, trained: bool = True) -> Tensor:
        """The law of the next draw, float64 [rows, arms]: the arms not drawn in this repetition
        share it equally.

        Args:
            trained: as in :meth:`sample`; every path is.
        """
        drawn = self.in_round + len(self._pending)
        order = self._permutation(drawn // self._arms_left)
        left = torch.zeros_like(self.alive)
        left.scatter_(-1, order[:, drawn % self._arms_left :], True)
        return left.double() / left.sum(-1, keepdim=True)

    def final(self) -> Tensor:
        """The surviving arm of each row, int64 [rows]; before the end that with the largest z-bar,
        the lowest index among equals."""
        mean = torch.where(self.alive, self.score(), -math.inf)
        # Before the first score all are equal, and an abandoned arm is none of them.
        best = mean.max(-1, keepdim=True).values
        return (self.alive & (mean == best)).int().argmax(-1)

    # --- the run --------------------------------------------------------------------------------

    def _permutation(self, repetition: int) -> Tensor:
        """The arms alive of each row in the order of a repetition, int64 [rows, K]."""
        # One number for each repetition of the whole run.
        number = self.settings.rounds * (self.arms - self._arms_left) + repetition
        if self._order is None or self._order[0] != number:
            keys = counter_uniform(self.seed, "sample", number, self.rows, self.arms)
            # The sort is stable, so that equal keys (one in 2**53) have the same order everywhere.
            keys = torch.where(self.alive, keys, 2.0)
            order = keys.argsort(dim=-1, stable=True)[:, : self._arms_left]
            self._order = (number, order)
        return self._order[1]

    def sample(self, *, trained: bool = True, ahead: bool = False) -> Tensor:
        """Draw a path: the next arm of each row's permutation.

        Args:
            trained: every path is; False is refused.
            ahead: draw although paths drawn before are not credited yet, at most :attr:`room`.

        Returns:
            int64 [rows].

        Raises:
            RuntimeError: the path drawn before is not credited yet (with ``ahead``: the round has
                no room for another), an arm has to be abandoned first, or the run is finished.
            ValueError: ``trained`` is False.
        """
        self._check_draw(ahead)
        if not trained:
            raise ValueError("sample: trained: expected True, Algorithm 9 trains every path")
        drawn = self.in_round + len(self._pending)
        order = self._permutation(drawn // self._arms_left)
        choice = order[:, drawn % self._arms_left].clone()
        self._pending.append(choice)
        return choice.clone()

    def _check_draw(self, ahead: bool) -> None:
        if self._pending and not ahead:
            raise RuntimeError(
                "sample: the path drawn before is not credited yet: call credit() first"
            )
        if self.finished:
            raise RuntimeError("sample: the run is finished, one arm is left in each row")
        if self.due:
            raise RuntimeError(
                f"sample: {self.in_round} paths were trained with {self._arms_left} arms: "
                "an arm has to be abandoned now, call prune() first"
            )
        if not self.room:
            raise RuntimeError(
                f"sample: the {len(self._pending)} paths drawn ahead are all that is left of "
                "this round: call credit() first"
            )

    def credit(
        self,
        choice: Tensor | Sequence[int],
        child: Tensor | float,
        parent: Tensor | float,
        penalty: float = 0.0,
    ) -> float:
        """Credit the arms of a path with the score of its two accuracies.

        Args:
            choice: int64 [rows] or a sequence of integers; what :meth:`sample` returned.
            child, parent: validation accuracies in [0, 1] of the 1-bit path and of the
                full-precision one.
            penalty: what is taken off their score, 0 or more, such as for the path's latency.

        Returns:
            z, less the penalty.

        Raises:
            RuntimeError: no path was drawn.
            ValueError: choice of a wrong shape or dtype, an index out of range, an arm that was
                abandoned, an accuracy outside [0, 1] or NaN, a penalty below 0 or not finite.
                Nothing has changed then.
        """
        if not self._pending:
            raise RuntimeError("credit: no path was drawn: call sample() first")
        path = check_path(choice, self.alive)
        for name, value in (("child", float(child)), ("parent", float(parent))):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"credit: {name}: expected an accuracy in [0, 1], got {value}")
        if not 0.0 <= penalty < math.inf:
            raise ValueError(f"credit: penalty: expected a finite number >= 0, got {penalty}")
        if self.in_round == 0 and not self.settings.carry:
            # As printed: the scores of an earlier round are those of other weights.
            self._sum.zero_()
            self.count.zero_()
        z = score(float(child), float(parent), beta=self.settings.beta, gap=self.settings.gap)
        z -= penalty
        index = path.unsqueeze(1)
        self._sum.scatter_add_(1, index, torch.full_like(index, z, dtype=torch.float64))
        self.count.scatter_add_(1, index, torch.ones_like(index))
        self.mean = torch.where(self.count > 0, self._sum / self.count.clamp(min=1), 0.0)
        self._samples += 1
        del self._pending[0]
        return z

    def repeat(
        self, choice: Sequence[int], child: float, parent: float, penalty: float = 0.0
    ) -> float:
        """Credit a path that was drawn in another run, as a log has it; nothing is drawn.

        Arguments and errors are those of :meth:`sample` and :meth:`credit`.
        """
        self._check_draw(ahead=False)
        self._pending = [torch.empty(0)]
        try:
            return self.credit(choice, child, parent, penalty)
        finally:
            self._pending = []

    def prune(self) -> Tensor:
        """Abandon the arm with the smallest e in each row, the lowest index among equals.

        Returns:
            int64 [rows]: the abandoned arms.

        Raises:
            RuntimeError: not :attr:`due`, or a path is drawn and not credited.
        """
        if self._pending:
            raise RuntimeError("prune: a path is drawn and not credited: call credit() first")
        if not self.due:
            raise RuntimeError(
                "prune: not due: the run is finished"
                if self.finished
                else f"prune: not due: {self.in_round} of {self._budget(self._arms_left)} paths "
                f"are trained with {self._arms_left} arms"
            )
        # e grows with z-bar, so the smallest of one is that of the other; z-bar has no rounding of
        # an exponential.
        abandoned = torch.where(self.alive, self.mean, math.inf).argmin(-1)
        self.alive.scatter_(1, abandoned.unsqueeze(1), False)
        self._arms_left -= 1
        return abandoned

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors (copies) and plain values: all that a run needs to go on.

        Raises:
            RuntimeError: several paths are drawn ahead; a state holds one.
        """
        if len(self._pending) > 1:
            raise RuntimeError(
                f"state_dict: {len(self._pending)} paths are drawn ahead and not credited, and a "
                "state holds one at most: call credit() first"
            )
        pending = self._pending[0] if self._pending else torch.full((self.rows,), -1)
        return {
            "version": _STATE_VERSION,
            **self._facts(),
            "samples": self._samples,
            "sum": self._sum.clone(),
            "count": self.count.clone(),
            "alive": self.alive.clone(),
            "pending": pending.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` of a bandit with the same settings returned.

        Raises:
            ValueError: keys missing or unknown, another version or other settings, tensors of other
                shapes or dtypes, or a state that no run can reach. Nothing has changed then.
        """
        where = "ChildParent.load_state_dict"
        expected = self.state_dict()
        if set(state) != set(expected):
            missing = sorted(set(expected) - set(state))
            unknown = sorted(map(str, set(state) - set(expected)))
            raise ValueError(f"{where}: keys missing: {missing}, keys unknown: {unknown}")
        for name in ("version", *self._facts()):
            if type(state[name]) is not type(expected[name]) or state[name] != expected[name]:
                raise ValueError(
                    f"{where}: {name}: expected {expected[name]!r}, got {state[name]!r}"
                )
        for name, like in expected.items():
            tensor = state[name]
            if isinstance(like, Tensor) and not (
                isinstance(tensor, Tensor)
                and tensor.shape == like.shape
                and tensor.dtype == like.dtype
            ):
                raise ValueError(
                    f"{where}: {name}: expected {like.dtype} {list(like.shape)}, got "
                    + (
                        f"{tensor.dtype} {list(tensor.shape)}"
                        if isinstance(tensor, Tensor)
                        else type(tensor).__name__
                    )
                )
        problem = self._contradiction(state)
        if problem:
            raise ValueError(f"{where}: {problem}")
        self._sum, self.count, self.alive, pending = (
            state[name].detach().cpu().clone() for name in ("sum", "count", "alive", "pending")
        )
        self.mean = torch.where(self.count > 0, self._sum / self.count.clamp(min=1), 0.0)
        self._arms_left = int(self.alive[0].sum())
        self._samples, self._order = state["samples"], None
        self._pending = [] if int(pending[0]) < 0 else [pending]

    # --- inside ---------------------------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        settings = {**dataclasses.asdict(self.settings), "beta": float(self.settings.beta)}
        return {"rows": self.rows, "arms": self.arms, **settings, "seed": self.seed}

    def _contradiction(self, state: Mapping[str, Any]) -> str:
        """What no run can have led to, or an empty string."""
        samples = state["samples"]
        if not is_integer(samples):
            return f"samples: expected an integer, got {samples!r}"
        if not bool(state["sum"].isfinite().all()):
            return "sum: expected finite values"
        left = state["alive"].sum(1)
        arms_left = int(left[0])
        if arms_left < 1 or not bool((left == arms_left).all()):
            return "alive: expected the same number of arms, 1 or more, in each row"
        first, last = self._before(arms_left), self._before(max(arms_left - 1, 1))
        if not first <= samples <= last:
            return f"samples: expected {first} to {last} with {arms_left} arms alive, got {samples}"
        since = 0 if self.settings.carry else first
        if samples == first and arms_left < self.arms and not self.settings.carry:
            since = self._before(arms_left + 1)  # until the next score comes
        tally = state["count"].sum(1)
        if bool((state["count"] < 0).any()) or not bool((tally == samples - since).all()):
            return f"count: expected {samples - since} scores in each row, got other counts"
        pending = state["pending"]
        if bool((pending != -1).any()):
            inside = (pending >= 0) & (pending < self.arms)
            index = pending.clamp(0, self.arms - 1).unsqueeze(1)
            if not bool((inside & state["alive"].gather(1, index).squeeze(1)).all()):
                return "pending: expected -1 everywhere or an arm alive in each row"
        return ""


class Means:
    """The scores of the arms after each sample, of a log whose choices are taken as they are.

    As the state of :class:`ChildParent`, without its checks; for a report.
    """

    def __init__(self, rows: int, arms: int, settings: ChildParentSettings) -> None:
        self.rows, self.arms, self.settings = rows, arms, settings
        plan = ChildParent(rows, arms, settings)
        self.total_samples, self.initial_samples = plan.total_samples, 0
        self._begins = {plan._before(left) for left in range(1, arms + 1)}
        self._samples = 0
        self._sum = torch.zeros(rows, arms, dtype=torch.float64)
        self.count = torch.zeros(rows, arms, dtype=torch.int64)

    @property
    def mean(self) -> Tensor:
        """z-bar, float64 [rows, arms]; 0 for an arm without a score."""
        return torch.where(self.count > 0, self._sum / self.count.clamp(min=1), 0.0)

    def credit(self, choice: Tensor, reward: float, *, trained: bool = True) -> None:
        """Add the score of a path."""
        if self._samples in self._begins and not self.settings.carry:
            self._sum.zero_()
            self.count.zero_()
        index = choice.unsqueeze(1)
        self._sum.scatter_add_(1, index, torch.full_like(index, reward, dtype=torch.float64))
        self.count.scatter_add_(1, index, torch.ones_like(index))
        self._samples += 1
