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
in :data:`POLICIES` (:mod:`fastbandit.policies`): ``printed`` is the rule of the paper, Eqs. 4.9
to 4.13; ``random`` spends the same samples without learning from them.

Randomness is counter-based: each number is a pure function of the seed, of what it is for, of
how many samples were credited before and of its place. There is no generator to save, torch's
global generator is neither read nor moved, and a run that goes on from a checkpoint or that is
replayed from its log draws the same numbers.

Source: *Binary Neural Networks* (Zhang, Xu et al.), section 4.2 and Algorithm 8; Chen et al.,
"Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.ops.philox import philox4x32
from fastbandit.policies import POLICIES, History, Policy, Printed, Random, register

__all__ = [
    "POLICIES",
    "AntiBandit",
    "History",
    "Policy",
    "Printed",
    "Random",
    "counter_uniform",
    "register",
    "replay",
]

_STATE_VERSION = 1

# What a uniform number is for: the third word of its Philox counter.
_PURPOSES = {"initial": 0, "sample": 1, "prune": 2}
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
        purpose: ``initial`` (the permutations of the initial pass), ``sample`` or ``prune``.
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


class AntiBandit:
    """A set of bandits that share one schedule, one reward per sample and one seed.

    Args:
        rows: number of bandits (edges of the network).
        arms: number of arms K of each (operations of the space).
        policy: a name in :data:`POLICIES`.
        rate: lambda of Eq. 4.11, the weight of the new value, in (0, 1].
        rounds: T: with k arms alive, k * T paths are trained before every row abandons one.
        bonus: factor of ``sqrt(2 ln N / n)``, >= 0; 1 is the printed rule.
        scale: factor on the accuracies that are credited, > 0; 1 as printed, 100 for percent.
            ``mean`` and the bounds are in units of scaled accuracy, the history is not.
        seed: in [0, 2**63).
        device: where the tensors live.

    Attributes:
        mean: float64 [rows, arms], m; 0 for an arm not credited yet.
        count: int64 [rows, arms], n.
        alive: bool [rows, arms].

        These three are the state itself, not copies: read them, do not write.

    Raises:
        ValueError: an argument out of its range; for an unknown policy, the known ones.
    """

    mean: Tensor
    count: Tensor
    alive: Tensor

    def __init__(
        self,
        rows: int,
        arms: int,
        *,
        policy: str = "printed",
        rate: float = 0.7,
        rounds: int = 3,
        bonus: float = 1.0,
        scale: float = 1.0,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("rows", rows), ("arms", arms), ("rounds", rounds)):
            if not _is_int(value) or value < 1:
                raise ValueError(f"AntiBandit: {name}: expected an integer >= 1, got {value!r}")
        if rows * arms >= 2**32:
            raise ValueError(
                f"AntiBandit: rows * arms: expected less than 2**32, got {rows * arms}"
            )
        if policy not in POLICIES:
            raise ValueError(
                f"AntiBandit: policy: expected one of {', '.join(sorted(POLICIES))}, got {policy!r}"
            )
        if not _is_number(rate) or not 0.0 < rate <= 1.0:
            raise ValueError(f"AntiBandit: rate: expected a number in (0, 1], got {rate!r}")
        if not _is_number(bonus) or not 0.0 <= bonus < math.inf:
            raise ValueError(f"AntiBandit: bonus: expected a finite number >= 0, got {bonus!r}")
        if not _is_number(scale) or not 0.0 < scale < math.inf:
            raise ValueError(f"AntiBandit: scale: expected a finite number > 0, got {scale!r}")
        if not _is_int(seed) or not 0 <= seed < 2**63:
            raise ValueError(f"AntiBandit: seed: expected an integer in [0, 2**63), got {seed!r}")
        self.rows = rows
        self.arms = arms
        self.policy = policy
        self.rate = float(rate)
        self.rounds = rounds
        self.bonus = float(bonus)
        self.scale = float(scale)
        self.seed = seed
        self.device = torch.device(device)
        self._policy = POLICIES[policy]()
        self.mean = torch.zeros(rows, arms, dtype=torch.float64, device=self.device)
        self.count = torch.zeros(rows, arms, dtype=torch.int64, device=self.device)
        self.alive = torch.ones(rows, arms, dtype=torch.bool, device=self.device)
        self._arms_left = arms
        self._choices: list[Tensor] = []  # each int64 [rows]
        self._rewards: list[float] = []
        self._trained: list[bool] = []
        self._trained_total = 0
        # Drawn and not credited yet, in order; all of them to be trained, or none.
        self._pending: list[Tensor] = []
        self._pending_trained = True
        # A uniformly random permutation of the arms in each row. The sort is stable, so that
        # equal keys (one in 2**53) have the same order everywhere.
        keys = self._uniform("initial", 0, arms)
        self._initial = keys.argsort(dim=1, stable=True)  # [rows, arms]

    # --- where the run stands -------------------------------------------------------------------

    @property
    def samples(self) -> int:
        """Networks credited so far: N of every row."""
        return len(self._rewards)

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
        if self._trained_total < self.arms:
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
    def total_samples(self) -> int:
        """Paths a whole run trains; K + T (K + ... + 2) with the printed schedule."""
        return self._trained_before(1)

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
            return self.arms - self._trained_total - drawn
        return max(0, self._budget(self._arms_left) - self.in_round - drawn)

    @property
    def history(self) -> History:
        """All that was credited, in order."""
        if self._choices:
            choice = torch.stack(self._choices)
        else:
            choice = torch.empty(0, self.rows, dtype=torch.int64, device=self.device)
        reward = torch.tensor(self._rewards, dtype=torch.float64, device=self.device)
        trained = torch.tensor(self._trained, dtype=torch.bool, device=self.device)
        return History(choice, reward, trained)

    @property
    def drawn(self) -> Tensor:
        """How often each arm was drawn, int64 [rows, arms]: ``count`` and what is not credited."""
        drawn = self.count
        for choice in self._pending:
            index = choice.unsqueeze(1)
            drawn = drawn.scatter_add(1, index, torch.ones_like(index))
        return drawn

    def score(self) -> Tensor:
        """What the policy holds of each arm, float64 [rows, arms], in units of scaled accuracy.

        Its mean, unless the policy says otherwise; meant for the arms alive.
        """
        return self._policy.score(self)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """``(lower, upper)`` of Eqs. 4.9 and 4.12 as of now, float64 [rows, arms] each."""
        return ops.bandit_bounds(self.mean, self.count, bonus=self.bonus)

    def probabilities(self) -> Tensor:
        """The law of the next draw of a path to train, float64 [rows, arms].

        In the initial pass, without replacement: the arms not tried yet share it equally.
        """
        if self.phase == "initial":
            drawn = self._trained_total + len(self._pending)
            untried = torch.ones_like(self.alive).scatter_(1, self._initial[:, :drawn], False)
            return untried.double() / max(self.arms - drawn, 1)
        return self._policy.probabilities(self)

    def uniform(self, purpose: str, columns: int = 1, *, number: int | None = None) -> Tensor:
        """Uniform numbers in [0, 1) for a policy, float64 [rows, columns], 53 bits each.

        Args:
            purpose: ``sample`` or ``prune``; each has its own numbers.
            columns: how many for each row.
            number: which draw. Default: the number of samples credited or drawn (sample), or of
                arms alive (prune), so that each draw has new numbers. A policy that keeps one
                permutation over several draws passes the number of the first.
        """
        if purpose == "sample":
            drawn = self.samples + len(self._pending)
            return self._uniform(purpose, drawn if number is None else number, columns)
        if purpose == "prune":
            return self._uniform(purpose, self._arms_left if number is None else number, columns)
        raise ValueError(f"uniform: purpose: expected sample or prune, got {purpose!r}")

    # --- the run --------------------------------------------------------------------------------

    def sample(self, *, trained: bool = True, ahead: bool = False) -> Tensor:
        """Draws a path.

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
        if phase == "initial":
            choice = self._initial[:, self._trained_total + len(self._pending)].clone()
        else:
            choice = self._policy.sample(self)
        self._pending.append(choice)
        self._pending_trained = trained
        return choice.clone()

    def credit(
        self, choice: Tensor | Sequence[int], reward: float, *, trained: bool = True
    ) -> None:
        """Credits the arms of a path with its validation accuracy.

        Args:
            choice: int64 [rows] or a sequence of integers; what :meth:`sample` returned or, in
                a replay, the path that was recorded.
            reward: the accuracy a, in [0, 1].
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
        path = self._check_path(choice)
        value = float(reward)
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"credit: reward: expected an accuracy in [0, 1], got {value}")
        self._policy.credit(self, path, self.scale * value)
        self._choices.append(path)
        self._rewards.append(value)
        self._trained.append(trained)
        self._trained_total += trained
        del self._pending[0]

    def prune(self) -> Tensor:
        """Abandons one arm in each row.

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
        abandoned = self._policy.prune(self)
        self.alive.scatter_(1, abandoned.unsqueeze(1), False)
        self._arms_left -= 1
        return abandoned

    def final(self) -> Tensor:
        """The surviving arm of each row, int64 [rows].

        Before the end of a run: the arm alive with the highest score of the policy (its mean,
        unless the policy says otherwise), the lowest index among equals.
        """
        score = torch.where(self.alive, self.score(), -math.inf)
        return score.argmax(1)

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
        """Goes on from what :meth:`state_dict` of a bandit with the same settings returned.

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
        self._choices = list(loaded["history_choice"].unbind(0))
        self._rewards = loaded["history_reward"].tolist()
        self._trained = loaded["history_trained"].tolist()
        self._trained_total = sum(self._trained)
        pending = loaded["pending"]
        self._pending = [] if int(pending[0]) < 0 else [pending]
        self._pending_trained = state["pending_trained"]

    # --- inside ---------------------------------------------------------------------------------

    def _budget(self, arms: int) -> int:
        return self._policy.budget(self, arms)

    def _trained_before(self, arms_left: int) -> int:
        """Paths trained when a row gets down to `arms_left` arms."""
        return self.arms + sum(self._budget(k) for k in range(self.arms, arms_left, -1))

    def _settings(self) -> dict[str, Any]:
        names = ("policy", "rows", "arms", "rate", "rounds", "bonus", "scale", "seed")
        return {name: getattr(self, name) for name in names}

    def _check_path(self, choice: Tensor | Sequence[int]) -> Tensor:
        path = torch.as_tensor(choice)
        if path.is_floating_point() or path.is_complex() or path.dtype == torch.bool:
            raise ValueError(f"credit: choice: expected integers, got {path.dtype}")
        if path.shape != (self.rows,):
            raise ValueError(
                f"credit: choice: expected shape [{self.rows}], got {list(path.shape)}"
            )
        path = path.to(self.device, torch.int64, copy=True)
        inside = (path >= 0) & (path < self.arms)
        known = inside & self.alive.gather(1, path.clamp(0, self.arms - 1).unsqueeze(1)).squeeze(1)
        if not bool(known.all()):
            row = int((~known).int().argmax())
            arm = int(path[row])
            if bool(inside[row]):
                raise ValueError(f"credit: choice: arm {arm} of row {row} was abandoned")
            raise ValueError(
                f"credit: choice: expected an arm in 0..{self.arms - 1} in row {row}, got {arm}"
            )
        return path

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
        if not bool(((reward >= 0) & (reward <= 1)).all()):
            return "history_reward: expected values in [0, 1]"
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

    def _uniform(self, purpose: str, number: int, columns: int) -> Tensor:
        return counter_uniform(self.seed, purpose, number, self.rows, columns, self.device)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# --- replay -------------------------------------------------------------------------------------

# A log written on another machine may differ in the last bits of a logarithm or a root.
_REPLAY_TOLERANCE = 1e-9
# Arms of a log, which may be a stranger's; the largest space has 756.
_MOST_REPLAYED = 1_000_000


def replay(lines: Iterable[Mapping[str, Any]], *, device: torch.device | str = "cpu") -> AntiBandit:
    """Runs the bandit again from its log and checks that the log explains itself.

    Every recorded path is credited with its recorded reward; where the schedule says that arms
    are abandoned, the rule is applied and has to abandon what was recorded. Which path the seed
    would have drawn is not compared: the record decides.

    Args:
        lines: the parsed lines of ``bandit.jsonl``, in order. The events are ``start``
            (operations, edges, policy, rate, rounds, bonus, seed; scale, if not 1), ``sample``
            (sample, choice, reward; trained, if false), ``abandon`` (sample, row, arm and,
            compared when there: round, mean, count, lower, upper, score, total, arms_left), one
            line per row, ``attack`` (the training attack grew; not looked at) and ``end`` (sample,
            choice). A log that stops early is a run that is not
            finished.
        device: where the tensors of the result live.

    Returns:
        The bandit after the last line.

    Raises:
        ValueError: a line that is not what the run leads to, with its number (from 1).
    """
    bandit: AntiBandit | None = None
    abandonment: _Abandonment | None = None
    ended = False
    for number, line in enumerate(lines, start=1):
        where = f"bandit log, line {number}"
        event = line.get("event") if isinstance(line, Mapping) else None
        try:
            if ended:
                raise ValueError("nothing may follow the end event")
            if bandit is None:
                if event != "start":
                    raise ValueError(f"event: expected start, got {event!r}")
                bandit = _replay_start(line, device)
                continue
            if event == "abandon":
                if abandonment is None:
                    abandonment = _Abandonment(bandit)
                if abandonment.check(line):
                    abandonment = None
                continue
            if abandonment is not None:
                raise ValueError(f"expected abandon events of {abandonment.rows_left}, got {event}")
            if event == "sample":
                _replay_sample(bandit, line)
            elif event == "attack":
                pass  # the training attack grew; rewards are as recorded
            elif event == "end":
                _expect(line, "sample", bandit.samples)
                if bandit.due:
                    raise ValueError("expected abandon events, got end")
                _expect(line, "choice", bandit.final().tolist())
                ended = True
            else:
                raise ValueError(f"event: expected sample, abandon, attack or end, got {event!r}")
        except KeyError as error:
            raise ValueError(f"{where}: {event} event: {error.args[0]} is missing") from error
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
    if bandit is None:
        raise ValueError("bandit log: no start event, the log is empty")
    return bandit


def _replay_start(line: Mapping[str, Any], device: torch.device | str) -> AntiBandit:
    arms = len(line["edges"]) * len(line["operations"])
    if arms > _MOST_REPLAYED:
        raise ValueError(f"expected at most {_MOST_REPLAYED:,} arms, got {arms:,}")
    return AntiBandit(
        len(line["edges"]),
        len(line["operations"]),
        policy=line["policy"],
        rate=line["rate"],
        rounds=line["rounds"],
        bonus=line["bonus"],
        scale=line.get("scale", 1.0),
        seed=line["seed"],
        device=device,
    )


def _replay_sample(bandit: AntiBandit, line: Mapping[str, Any]) -> None:
    trained = line.get("trained", True)
    _expect(line, "sample", bandit.samples)
    if trained and bandit.due:
        raise ValueError("expected abandon events, got sample")
    if "phase" in line:
        _expect(line, "phase", bandit.phase)
    bandit.sample(trained=trained)
    bandit.credit(line["choice"], line["reward"], trained=trained)


class _Abandonment:
    """One abandonment of the rule, against the lines that recorded it, one per row."""

    def __init__(self, bandit: AntiBandit) -> None:
        lower, upper = bandit.bounds()
        self._round = bandit.round
        self._mean, self._count = bandit.mean.tolist(), bandit.count.tolist()
        self._lower, self._upper = lower.tolist(), upper.tolist()
        self._score = bandit.score().tolist()
        self._arm = bandit.prune().tolist()
        self._total = bandit.samples
        self._arms_left = bandit.arms_left
        self._rows = set(range(bandit.rows))

    @property
    def rows_left(self) -> str:
        return f"rows {', '.join(map(str, sorted(self._rows)))}"

    def check(self, line: Mapping[str, Any]) -> bool:
        """Compares one line; true when all rows are there."""
        row = line["row"]
        if row not in self._rows:
            raise ValueError(f"row: expected one of {self.rows_left}, got {row!r}")
        arm = self._arm[row]
        _expect(line, "sample", self._total)
        _expect(line, "arm", arm)
        values = {
            "round": self._round,
            "total": self._total,
            "arms_left": self._arms_left,
            "mean": self._mean[row][arm],
            "count": self._count[row][arm],
            "lower": self._lower[row][arm],
            "upper": self._upper[row][arm],
            "score": self._score[row][arm],
        }
        for key in values.keys() & line.keys():
            _expect(line, key, values[key])
        self._rows.remove(row)
        return not self._rows


def _expect(line: Mapping[str, Any], key: str, value: Any) -> None:
    recorded = line[key]
    if isinstance(value, float):
        same = _is_number(recorded) and math.isclose(
            recorded, value, rel_tol=_REPLAY_TOLERANCE, abs_tol=_REPLAY_TOLERANCE
        )
    else:
        same = recorded == value
    if not same:
        raise ValueError(f"{key}: the rule gives {value!r}, the log holds {recorded!r}")
