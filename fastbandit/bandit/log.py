"""``bandit.jsonl``: the lines of a search's bandit, and the bandit that they lead to.

The search writes them, :func:`replay` runs the bandit again from them, the report shows them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

from fastbandit.bandit.anti_bandit import AntiBandit
from fastbandit.bandit.settings import ALWAYS_RECORDED, BanditSettings, is_number

__all__ = [
    "LINES",
    "Abandon",
    "AttackChanged",
    "BanditLine",
    "End",
    "Line",
    "Observer",
    "RewardChanged",
    "Sample",
    "Start",
    "expect_same",
    "prune",
    "read_line",
    "replay",
]

# A log written on another machine may differ in the last bits of a logarithm or a root.
_REPLAY_TOLERANCE = 1e-9
# Arms of a log, which may be a stranger's; the largest space has 756.
_MOST_REPLAYED = 1_000_000

Accuracy = Annotated[float, Field(ge=0, le=1)]


class Line(BaseModel):
    """One line of a log. Names we do not know are left alone; infinities are not numbers."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, strict=True)


class BanditLine(Line):
    """One line of ``bandit.jsonl``."""

    event: str

    def to_line(self) -> dict[str, Any]:
        """The line as it is written: what was given, in the order of the fields."""
        return {"event": self.event, **self.model_dump(exclude_unset=True)}


class _StartOfAll(BanditLine):
    event: Literal["start"] = "start"
    space: str
    operations: Annotated[list[str], Field(min_length=1)]
    edges: Annotated[list[str], Field(min_length=1)]


def _start_fields() -> dict[str, Any]:
    """The settings and the seed; a setting that came later follows the seed and may be missing."""
    kinds = typing.get_type_hints(BanditSettings)
    # A stranger's log may hold any number; these the report can count with.
    limits: dict[Any, Any] = {
        int: Annotated[int, Field(ge=-1_000_000, le=1_000_000)],
        float: Annotated[float, Field(ge=-1e9, le=1e9)],
    }
    always: dict[str, Any] = {}
    later: dict[str, Any] = {}
    for field in dataclasses.fields(BanditSettings):
        kind = limits.get(kinds[field.name], kinds[field.name])
        if field.name in ALWAYS_RECORDED:
            # The first logs had no scale.
            always[field.name] = (kind, field.default if field.name == "scale" else ...)
        else:
            later[field.name] = (kind, field.default)
    return {**always, "seed": (int, ...), **later}


if TYPE_CHECKING:

    class _StartWithSettings(_StartOfAll):
        seed: int
else:
    _StartWithSettings = create_model("_StartWithSettings", __base__=_StartOfAll, **_start_fields())


# A stranger's log may hold any number.
_Count = Annotated[int, Field(ge=0, le=10**15)]


class Start(_StartWithSettings):
    """The first line: what it takes to replay the rest. Each setting has a name of its own."""

    groups: list[_Count] | None = None
    costs: list[list[_Count]] | None = None
    base_cost: _Count = 0
    budget_low: _Count | None = None
    budget_high: _Count | None = None

    @classmethod
    def of(
        cls,
        space: str,
        operations: Sequence[str],
        edges: Sequence[str],
        settings: BanditSettings,
        seed: int,
        **constraints: Any,
    ) -> Start:
        """The line of a search that begins.

        Args:
            constraints: what :meth:`fastbandit.bandit.Bandits.known` of its bandit returns.
        """
        facts: dict[str, Any] = {"operations": list(operations), "edges": list(edges)}
        if "budget" in constraints:
            low, high = constraints.pop("budget")
            constraints["budget_low"] = math.ceil(low)
            if high < math.inf:
                constraints["budget_high"] = math.floor(high)
        return cls(space=space, **facts, **settings.recorded(), seed=seed, **constraints)

    @property
    def known(self) -> dict[str, Any]:
        """What the bandit is given beside its settings, as :meth:`of` took it."""
        constraints: dict[str, Any] = {"groups": self.groups, "costs": self.costs}
        constraints["base_cost"] = self.base_cost
        if self.budget_low is not None:
            high = math.inf if self.budget_high is None else self.budget_high
            constraints["budget"] = (self.budget_low, high)
        return constraints

    @property
    def settings(self) -> BanditSettings:
        """The settings, not checked."""
        names = [field.name for field in dataclasses.fields(BanditSettings)]
        return BanditSettings(**{name: getattr(self, name) for name in names})


class Sample(BanditLine):
    """A path that was credited."""

    event: Literal["sample"] = "sample"
    sample: int
    phase: str
    choice: list[int]
    probability: list[float] | None = None
    clean_accuracy: Accuracy | None = None
    robust_accuracy: Accuracy | None = None
    reward: float
    trained: bool = True  # False: only evaluated, with weights that other paths trained


class Abandon(BanditLine):
    """An arm that one row abandoned."""

    event: Literal["abandon"] = "abandon"
    sample: int
    round: Annotated[int, Field(ge=1, le=1_000_000)]
    row: int
    cell: str
    edge: str
    arm: int
    operation: str
    mean: float
    count: int
    # The bounds of an arm that was never tried are infinite, which JSON lacks.
    lower: float | None = None
    upper: float | None = None
    score: float | None = None
    total: int
    arms_left: int


class AttackChanged(BanditLine):
    """The training attack grew, because of catastrophic overfitting in this epoch."""

    event: Literal["attack"] = "attack"
    sample: int
    epoch: int
    trained: float  # accuracy under the training attack as it was
    strong: float  # accuracy under a stronger one
    steps: int
    attack: str


class RewardChanged(BanditLine):
    """The attack of the reward became a worst case: it was found to overstate 1-bit networks."""

    event: Literal["reward"] = "reward"
    sample: int
    epoch: int
    rewarded: float  # accuracy under the attack of the reward as it was
    restarts: float  # under random starts through several surrogates
    queries: float  # under the Square attack


class End(BanditLine):
    """The last line: the arms that are left."""

    event: Literal["end"] = "end"
    sample: int
    choice: list[int]


#: The lines by their event.
LINES: dict[str, type[BanditLine]] = {
    "start": Start,
    "sample": Sample,
    "abandon": Abandon,
    "attack": AttackChanged,
    "reward": RewardChanged,
    "end": End,
}

_AnyLine = TypeVar("_AnyLine", bound=BanditLine)
Observer = Callable[[AntiBandit, BanditLine], None]


class Judged(Protocol):
    """What abandons arms and can say why: :class:`AntiBandit`, and others of its shape."""

    mean: Tensor
    count: Tensor

    @property
    def round(self) -> int: ...

    @property
    def samples(self) -> int: ...

    @property
    def arms_left(self) -> int: ...

    def bounds(self) -> tuple[Tensor, Tensor]: ...

    def score(self) -> Tensor: ...

    def prune(self) -> Tensor: ...


def prune(bandit: Judged, edges: Sequence[str], operations: Sequence[str]) -> list[Abandon]:
    """Abandon one arm in each row; returns the lines that say which and why."""
    number, total = bandit.round, bandit.samples
    lower, upper = (bound.tolist() for bound in bandit.bounds())
    mean, count, score = bandit.mean.tolist(), bandit.count.tolist(), bandit.score().tolist()
    return [
        Abandon(
            sample=total,
            round=number,
            row=row,
            cell=edges[row].partition(":")[0],
            edge=edges[row],
            arm=arm,
            operation=operations[arm],
            mean=mean[row][arm],
            count=count[row][arm],
            lower=_finite(lower[row][arm]),
            upper=_finite(upper[row][arm]),
            score=_finite(score[row][arm]),
            total=total,
            arms_left=bandit.arms_left,
        )
        for row, arm in enumerate(bandit.prune().tolist())
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- replay -------------------------------------------------------------------------------------


def replay(
    lines: Iterable[Mapping[str, Any]],
    observe: Observer | None = None,
    *,
    device: torch.device | str = "cpu",
) -> AntiBandit:
    """Run the bandit again from its log and check that the log explains itself.

    Every recorded path is credited with its recorded reward; where the schedule says that arms
    are abandoned, the rule is applied and has to abandon what was recorded. Which path the seed
    would have drawn is not compared: the record decides.

    Args:
        lines: the parsed lines of ``bandit.jsonl``, in order: :class:`Start`, then :class:`Sample`,
            :class:`Abandon` (one for each row; ``lower``, ``upper`` and ``score`` are compared
            where they are there), :class:`AttackChanged` and
            :class:`RewardChanged` (not looked at) and :class:`End`. A log
            that stops early is a run that is not finished.
        observe: called with the bandit and each line after the line was applied; the arms that
            all rows abandon together are gone from the first of their lines on.
        device: where the tensors of the result live.

    Returns:
        The bandit after the last line.

    Raises:
        ValueError: a line that is not what the run leads to, with its number (from 1).
    """
    replaying: _Replay | None = None
    for number, line in enumerate(lines, start=1):
        event = line.get("event") if isinstance(line, Mapping) else None
        try:
            if replaying is not None:
                taken = replaying.take(event, line)
            elif event == "start":
                start = read_line(Start, line)
                replaying, taken = _Replay(start, device), start
            else:
                raise ValueError(f"event: expected start, got {event!r}")
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"bandit log, line {number}: {error}") from error
        if observe is not None and taken is not None:
            observe(replaying.bandit, taken)
    if replaying is None:
        raise ValueError("bandit log: no start event, the log is empty")
    return replaying.bandit


class _Replay:
    """A bandit, and what its log has to say next."""

    def __init__(self, start: Start, device: torch.device | str) -> None:
        arms = len(start.edges) * len(start.operations)
        if arms > _MOST_REPLAYED:
            raise ValueError(f"expected at most {_MOST_REPLAYED:,} arms, got {arms:,}")
        self.start = start
        self.bandit = AntiBandit(
            len(start.edges),
            len(start.operations),
            start.settings,
            seed=start.seed,
            device=device,
            **start.known,
        )
        # The lines of an abandonment that are still to come, by row.
        self._expected: dict[int, Abandon] = {}
        self._ended = False

    def take(self, event: Any, line: Mapping[str, Any]) -> BanditLine | None:
        """Apply a line; returns it, or None for one that is not looked at."""
        if self._ended:
            raise ValueError("nothing may follow the end event")
        if event == "abandon":
            return self._abandon(line)
        if self._expected:
            raise ValueError(f"expected abandon events of {self._rows_left}, got {event}")
        if event == "sample":
            return self._sample(line)
        if event == "end":
            return self._end(line)
        if event in ("attack", "reward"):  # rewards are as recorded
            return None
        raise ValueError(f"event: expected sample, abandon, attack, reward or end, got {event!r}")

    @property
    def _rows_left(self) -> str:
        return f"rows {', '.join(map(str, sorted(self._expected)))}"

    def _sample(self, line: Mapping[str, Any]) -> Sample:
        bandit = self.bandit
        if bandit.due and line.get("trained", True):
            raise ValueError("expected abandon events, got sample")
        sample = read_line(Sample, line)
        expect_same("sample", bandit.samples, sample.sample)
        expect_same("phase", bandit.phase, sample.phase)
        bandit.repeat(sample.choice, sample.reward, trained=sample.trained)
        return sample

    def _abandon(self, line: Mapping[str, Any]) -> Abandon:
        if not self._expected:
            lines = prune(self.bandit, self.start.edges, self.start.operations)
            self._expected = {one.row: one for one in lines}
        stated = read_line(Abandon, line)
        if stated.row not in self._expected:
            raise ValueError(f"row: expected one of {self._rows_left}, got {stated.row!r}")
        expected = self._expected[stated.row]
        for name in ("sample", "arm", *type(stated).model_fields):
            if name in stated.model_fields_set:
                expect_same(name, getattr(expected, name), getattr(stated, name))
        del self._expected[stated.row]
        return stated

    def _end(self, line: Mapping[str, Any]) -> End:
        end = read_line(End, line)
        expect_same("sample", self.bandit.samples, end.sample)
        if self.bandit.due:
            raise ValueError("expected abandon events, got end")
        expect_same("choice", self.bandit.final().tolist(), end.choice)
        self._ended = True
        return end


def read_line(kind: type[_AnyLine], line: Mapping[str, Any]) -> _AnyLine:
    """The line as its kind; a ValueError says what is wrong with it."""
    try:
        return kind.model_validate(line)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "missing":
            raise ValueError(f"{line['event']} event: {name} is missing") from None
        raise ValueError(f"{name}: {first['msg']}, got {first['input']!r}") from None


def expect_same(name: str, value: Any, recorded: Any) -> None:
    """Refuse a recorded value that is not what the rule gives; the last bits may differ.

    Raises:
        ValueError: it is another one.
    """
    if isinstance(value, float):
        same = is_number(recorded) and math.isclose(
            recorded, value, rel_tol=_REPLAY_TOLERANCE, abs_tol=_REPLAY_TOLERANCE
        )
    else:
        same = recorded == value
    if not same:
        raise ValueError(f"{name}: the rule gives {value!r}, the log holds {recorded!r}")
