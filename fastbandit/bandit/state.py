"""What a policy sees of its bandits: the state of each row, and all that was credited."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from fastbandit.bandit.settings import BanditSettings

__all__ = ["History", "State"]


class History(NamedTuple):
    """All that was credited, in order; the position in it is the sample's index."""

    choice: Tensor  # [..., samples, rows], int64
    reward: Tensor  # [..., samples], float64
    trained: Tensor  # [samples], bool: False for a path that was only evaluated


class State(Protocol):
    """What a policy sees of its bandits; :class:`fastbandit.bandit.Bandits` is one."""

    rows: int
    arms: int
    settings: BanditSettings
    mean: Tensor  # [..., rows, arms], float64
    count: Tensor  # [..., rows, arms], int64
    alive: Tensor  # [..., rows, arms], bool
    groups: tuple[int, ...] | None  # [rows]: the stage of each row
    costs: Tensor | None  # [rows, arms], int64: what each arm adds to the size of a path
    base_cost: int

    @property
    def arms_left(self) -> int: ...

    @property
    def drawn(self) -> Tensor: ...  # [..., rows, arms], int64: count, and what is drawn ahead

    @property
    def history(self) -> History: ...

    # [..., rows, columns]
    def uniform(self, purpose: str, columns: int = 1, *, number: int | None = None) -> Tensor: ...
