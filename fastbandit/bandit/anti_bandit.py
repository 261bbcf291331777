"""The anti-bandit: which path to train next, and which arms to abandon.

:class:`AntiBandit` is a set of bandits, one row per edge of a network, with the schedule of
Algorithm 8: an initial pass that gives every arm one sample, then rounds after each of which
every row abandons one arm, until one is left. It knows no network; a search calls::

    bandit = AntiBandit(rows=60, arms=9)
    while not bandit.finished:
        choice = bandit.sample()
        bandit.credit(choice, train_and_validate(choice))
        while bandit.due:
            bandit.prune()
    genotype = bandit.final()

How arms are drawn, credited and abandoned is the policy's part, a :class:`Policy` found by name
in :data:`POLICIES` (:mod:`fastbandit.bandit.policies`): ``printed`` is the rule of the paper, Eqs.
4.9 to 4.13; ``random`` spends the same samples without learning from them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbandit.bandit.bandits import Bandits
from fastbandit.bandit.settings import BanditSettings, is_integer

__all__ = ["AntiBandit", "check_path"]

_STATE_VERSION = 1
# What the search does with its bandit and the bandit itself does not know.
_NOT_IN_STATE = "evaluations_per_epoch"


class AntiBandit(Bandits):
    """A set of bandits that share one schedule, one reward per sample and one seed.

    Args:
        rows: number of bandits (edges of the network).
        arms: number of arms K of each (operations of the space).
        settings: the policy and its settings; default: those of the paper.
        seed: in [0, 2**63).
        device: where the tensors live.
        groups, costs, base_cost, budget: stages of the rows, sizes of the arms and what paths may
            have of them; see :class:`Bandits`.
        changes: settings by name, in place of those of ``settings``:

            - ``policy``: a name in :data:`POLICIES`;
            - ``rate``: lambda of Eq. 4.11, the weight of the new value, in (0, 1];
            - ``rounds``: T: with k arms alive, k * T paths are trained before every row abandons
              one;
            - ``bonus``: factor of ``sqrt(2 ln N / n)``, >= 0; 1 is the printed rule;
            - ``scale``: factor on the accuracies that are credited, > 0; 1 as printed, 100 for
              percent. ``mean`` and the bounds are in units of scaled accuracy, the history is not;
            - any other of :class:`fastbandit.bandit.BanditSettings`.

    Attributes:
        mean: float64 [rows, arms], m; 0 for an arm not credited yet.
        count: int64 [rows, arms], n.
        alive: bool [rows, arms].

    These three are the state itself, not copies: read them, do not write.

    Raises:
        ValueError: an argument out of its range; for an unknown policy, the known ones.
    """

    def __init__(
        self,
        rows: int,
        arms: int,
        settings: BanditSettings | None = None,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        groups: Sequence[int] | None = None,
        costs: Tensor | Sequence[Sequence[int]] | None = None,
        base_cost: int = 0,
        budget: Sequence[float] | None = None,
        **changes: Any,
    ) -> None:
        for name, value in (("rows", rows), ("arms", arms)):
            if not is_integer(value) or value < 1:
                raise ValueError(f"AntiBandit: {name}: expected an integer >= 1, got {value!r}")
        if rows * arms >= 2**32:
            raise ValueError(
                f"AntiBandit: rows * arms: expected less than 2**32, got {rows * arms}"
            )
        settings = dataclasses.replace(settings or BanditSettings(), **changes)
        settings.check("AntiBandit: ")
        if not is_integer(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"AntiBandit: seed: expected an integer in [0, 2**63), got {seed!r}")
        try:
            super().__init__(
                rows,
                arms,
                settings,
                seed=seed,
                device=device,
                groups=groups,
                costs=costs,
                base_cost=base_cost,
                budget=budget,
            )
        except ValueError as error:
            raise ValueError(f"AntiBandit: {error}") from None
        self.seed = seed
        # Drawn and not credited yet, in order; all of them to be trained, or none.
        self._pending: list[Tensor] = []
        self._pending_trained = True

    # --- where the run stands -------------------------------------------------------------------

    @property
    def pending(self) -> Tensor | None:
        """The path that is to be credited next, int64 [rows], or None where none is drawn."""
        return self._pending[0].clone() if self._pending else None

    @property
    def room(self) -> int:
        """Paths to train that can be drawn now, with ``ahead``, before the state has to change.

        What is left of the initial pass or of the round, less the paths drawn already. So a round
        of K * T paths never holds more of them, however many are trained at a time.
        """
        if self.phase == "finished":
            return 0
        drawn = len(self._pending) if self._pending_trained else 0
        if self.phase == "initial":
            return self.initial_samples - self._trained_total - drawn
        return max(0, self._budget(self._arms_left) - self.in_round - drawn)

    @property
    def drawn(self) -> Tensor:
        """How often each arm was drawn, int64 [rows, arms]: ``count`` and what is not credited."""
        drawn = self.count
        for choice in self._pending:
            index = choice.unsqueeze(1)
            drawn = drawn.scatter_add(1, index, torch.ones_like(index))
        return drawn

    # --- the run --------------------------------------------------------------------------------

    def sample(self, *, trained: bool = True, ahead: bool = False) -> Tensor:
        """Draw a path.

        Args:
            trained: it will be trained and counts in the schedule. False draws a path that is
                only evaluated; possible from the search phase on, also while a prune is due.
            ahead: draw although paths drawn before are not credited yet, as when several are
                trained at a time: all from the law as it is now (in the initial pass, the next
                arms), at most :attr:`room` of them. They are credited in the order of drawing.

        Returns:
            int64 [rows]: the chosen arm of each row.

        Raises:
            RuntimeError: the path drawn before is not credited yet (with ``ahead``: the round
                has no room for another, or it was drawn with another ``trained``), arms have to
                be abandoned first, the run is finished, or ``trained=False`` in the initial pass.
        """
        self._check_draw(trained, ahead)
        choice = super().sample(trained=trained)
        self._pending.append(choice)
        self._pending_trained = trained
        return choice.clone()

    def _check_draw(self, trained: bool, ahead: bool) -> None:
        phase = self.phase
        if self._pending and not ahead:
            raise RuntimeError(
                "sample: the path drawn before is not credited yet: call credit() first"
            )
        if self._pending and trained != self._pending_trained:
            raise RuntimeError(
                f"sample: trained: expected {self._pending_trained}, as the paths that are not "
                f"credited yet, got {trained}"
            )
        if phase == "finished":
            raise RuntimeError("sample: the run is finished, one arm is left in each row")
        if trained and self.due:
            raise RuntimeError(
                f"sample: {self.in_round} paths were trained with {self._arms_left} arms: "
                "an arm has to be abandoned now, call prune() first"
            )
        if phase == "initial" and not trained:
            raise RuntimeError(
                "sample: in the initial pass every path is trained: each arm gets one sample"
            )
        if trained and not self.room:
            raise RuntimeError(
                f"sample: the {len(self._pending)} paths drawn ahead are all that is left of "
                "this round: call credit() first"
            )

    def credit(
        self, choice: Tensor | Sequence[int], reward: Tensor | float, *, trained: bool = True
    ) -> None:
        """Credit the arms of a path with its validation accuracy.

        Args:
            choice: int64 [rows] or a sequence of integers; what :meth:`sample` returned.
            reward: the accuracy a, in [0, 1]; any finite number for a policy that says so.
            trained: as passed to :meth:`sample`. A path that was only evaluated counts in n and
                N, not in the schedule.

        Raises:
            RuntimeError: no path was drawn, or it was drawn with another ``trained``.
            ValueError: choice of a wrong shape or dtype, an index out of range, an arm that was
                abandoned, a reward outside [0, 1] or NaN. Nothing has changed then.
        """
        if not self._pending:
            raise RuntimeError("credit: no path was drawn: call sample() first")
        if trained != self._pending_trained:
            raise RuntimeError(
                f"credit: trained: expected {self._pending_trained}, as the path was drawn, "
                f"got {trained}"
            )
        path = check_path(choice, self.alive)
        if self.sizes is not None and not bool(self.sizes.holds(path)):
            raise ValueError(
                f"credit: choice: expected a path of {self.sizes}, got one of "
                f"{int(self.sizes.size(path)):,}"
            )
        value = float(reward)
        problem = self._policy.reward_problem(value)
        if problem:
            raise ValueError(f"credit: reward: {problem}")
        super().credit(path, value, trained=trained)
        del self._pending[0]

    def repeat(self, choice: Sequence[int], reward: float, *, trained: bool = True) -> None:
        """Credit a path that was drawn in another run, as a log has it; nothing is drawn.

        Arguments and errors are those of :meth:`sample` and :meth:`credit`.
        """
        self._check_draw(trained, ahead=False)
        self._pending, self._pending_trained = [torch.empty(0)], trained
        try:
            self.credit(choice, reward, trained=trained)
        finally:
            self._pending = []

    def prune(self) -> Tensor:
        """Abandon one arm in each row.

        Returns:
            int64 [rows]: the abandoned arms.

        Raises:
            RuntimeError: not :attr:`due`, or a path is drawn and not credited.
        """
        if self._pending:
            raise RuntimeError("prune: a path is drawn and not credited: call credit() first")
        if not self.due:
            if self.phase == "search":
                where = (
                    f"{self.in_round} of {self._budget(self._arms_left)} paths are trained "
                    f"with {self._arms_left} arms"
                )
            else:
                where = f"the phase is {self.phase}"
            raise RuntimeError(f"prune: not due: {where}")
        return super().prune()

    # --- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors (copies, on the CPU) and plain values: all that a run needs to go on.

        Raises:
            RuntimeError: several paths are drawn ahead; a state holds one.
        """
        if len(self._pending) > 1:
            raise RuntimeError(
                f"state_dict: {len(self._pending)} paths are drawn ahead and not credited, and a "
                "state holds one at most: call credit() first"
            )
        history = self.history
        pending = self._pending[0] if self._pending else torch.full((self.rows,), -1)
        tensors = {
            "mean": self.mean,
            "count": self.count,
            "alive": self.alive,
            "history_choice": history.choice,
            "history_reward": history.reward,
            "history_trained": history.trained,
            "pending": pending,
        }
        state: dict[str, Any] = {"version": _STATE_VERSION, **self._settings()}
        state["pending_trained"] = self._pending_trained
        for name, tensor in tensors.items():
            state[name] = tensor.detach().cpu().clone()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` of a bandit with the same settings returned.

        Raises:
            ValueError: keys missing or unknown, another version or other settings, tensors of
                other shapes or dtypes, or a state that no run can reach. Nothing has changed
                then.
        """
        loaded = self._check_state(state)
        self.mean = loaded["mean"]
        self.count = loaded["count"]
        self.alive = loaded["alive"]
        self._arms_left = int(self.alive[0].sum())
        self._choice = loaded["history_choice"]
        self._reward = loaded["history_reward"]
        self._trained = loaded["history_trained"]
        self._samples = len(self._trained)
        self._trained_total = int(self._trained.sum())
        pending = loaded["pending"]
        self._pending = [] if int(pending[0]) < 0 else [pending]
        self._pending_trained = state["pending_trained"]

    # --- inside ---------------------------------------------------------------------------------

    @property
    def _uncredited(self) -> int:
        return len(self._pending)

    def _settings(self) -> dict[str, Any]:
        settings = self.settings.recorded()
        settings.pop(_NOT_IN_STATE, None)
        size = {"rows": self.rows, "arms": self.arms}
        recorded = {"policy": self.settings.policy, **size, **settings, "seed": self.seed}
        constraints = self.known()
        if constraints:
            # Long lists, which the configuration of a run decides: a digest is enough to compare.
            text = json.dumps(constraints, sort_keys=True)
            recorded["known"] = hashlib.sha256(text.encode()).hexdigest()[:16]
        return recorded

    def _check_state(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of `state`, copied to the device, when all of it is sound."""
        where = "AntiBandit.load_state_dict"
        expected = self.state_dict()
        if set(state) != set(expected):
            missing = sorted(set(expected) - set(state))
            unknown = sorted(map(str, set(state) - set(expected)))
            raise ValueError(f"{where}: keys missing: {missing}, keys unknown: {unknown}")
        for name in ("version", *self._settings()):
            if type(state[name]) is not type(expected[name]) or state[name] != expected[name]:
                raise ValueError(
                    f"{where}: {name}: expected {expected[name]!r}, got {state[name]!r}"
                )
        if not isinstance(state["pending_trained"], bool):
            raise ValueError(
                f"{where}: pending_trained: expected a bool, got {state['pending_trained']!r}"
            )
        tensors = {}
        history = state["history_reward"]
        samples = len(history) if isinstance(history, Tensor) and history.dim() == 1 else 0
        for name, like in expected.items():
            if not isinstance(like, Tensor):
                continue
            tensor = state[name]
            shape = list(like.shape)
            if name.startswith("history"):
                shape[0] = samples
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{where}: {name}: expected a tensor, got {type(tensor).__name__}")
            if list(tensor.shape) != shape or tensor.dtype != like.dtype:
                raise ValueError(
                    f"{where}: {name}: expected {like.dtype} {shape}, "
                    f"got {tensor.dtype} {list(tensor.shape)}"
                )
            tensors[name] = tensor.detach().to(self.device, copy=True).contiguous()
        problem = self._contradiction(tensors)
        if problem:
            raise ValueError(f"{where}: {problem}")
        return tensors

    def _contradiction(self, state: dict[str, Tensor]) -> str:
        """What no run can have led to, or an empty string."""
        choice, reward = state["history_choice"], state["history_reward"]
        if self._policy.accuracies and not bool(((reward >= 0) & (reward <= 1)).all()):
            return "history_reward: expected values in [0, 1]"
        if not bool(reward.isfinite().all()):
            return "history_reward: expected finite values"
        if not bool(((choice >= 0) & (choice < self.arms)).all()):
            return f"history_choice: expected arms in 0..{self.arms - 1}"
        arm = torch.arange(self.arms, device=self.device)
        tally = (choice.unsqueeze(2) == arm).sum(0)
        if not torch.equal(tally, state["count"]):
            return "count: expected how often history_choice holds each arm, got other counts"
        if not bool(state["mean"].isfinite().all()):
            return "mean: expected finite values"
        left = state["alive"].sum(1)
        arms_left = int(left[0])
        if arms_left < 1 or not bool((left == arms_left).all()):
            return "alive: expected the same number of arms, 1 or more, in each row"
        if self.sizes is not None and not self.sizes.possible(state["alive"]):
            return f"alive: expected arms of which a path has {self.sizes}"
        trained = int(state["history_trained"].sum())
        # The initial pass leads up to the first round, so there is no lower end before it.
        first = self._trained_before(arms_left) if arms_left < self.arms else 0
        last = self._trained_before(max(arms_left - 1, 1))
        if not first <= trained <= last:
            return (
                f"history_trained: expected {first} to {last} trained paths "
                f"with {arms_left} arms alive, got {trained}"
            )
        pending = state["pending"]
        if bool((pending != -1).any()):
            inside = (pending >= 0) & (pending < self.arms)
            index = pending.clamp(0, self.arms - 1).unsqueeze(1)
            if not bool((inside & state["alive"].gather(1, index).squeeze(1)).all()):
                return "pending: expected -1 everywhere or an arm alive in each row"
        return ""


def check_path(choice: Tensor | Sequence[int], alive: Tensor) -> Tensor:
    """A path to credit as int64 [rows] of its own, on the device of ``alive``.

    Args:
        alive: bool [rows, arms].

    Raises:
        ValueError: another shape or dtype, an arm out of range or one that was abandoned.
    """
    rows, arms = alive.shape
    path = torch.as_tensor(choice)
    if path.is_floating_point() or path.is_complex() or path.dtype == torch.bool:
        raise ValueError(f"credit: choice: expected integers, got {path.dtype}")
    if path.shape != (rows,):
        raise ValueError(f"credit: choice: expected shape [{rows}], got {list(path.shape)}")
    path = path.to(alive.device, torch.int64, copy=True)
    inside = (path >= 0) & (path < arms)
    allowed = inside & alive.gather(1, path.clamp(0, arms - 1).unsqueeze(1)).squeeze(1)
    if not bool(allowed.all()):
        row = int((~allowed).int().argmax())
        arm = int(path[row])
        if bool(inside[row]):
            raise ValueError(f"credit: choice: arm {arm} of row {row} was abandoned")
        raise ValueError(
            f"credit: choice: expected an arm in 0..{arms - 1} in row {row}, got {arm}"
        )
    return path
