"""The settings of the studies on a table of true accuracies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from fastbandit.bandit import BanditSettings
from fastbandit.config import SHARE, ConfigError, Range, at_least
from fastbandit.study.entries import parse_entry
from fastbandit.study.tabular.searches import parse_search

__all__ = ["TabularConfig", "parse_budget"]

_UNITS = ("convolutions", "parameters")
_CORRELATION = Range("a correlation in (0, 1]", above=0, most=1)


@dataclass(frozen=True)
class TabularConfig:
    """The study on a table of true accuracies, such as NAS-RobBench-201 (Wu et al., ICLR 2024).
    docs/study.md says what a table is and what everything means."""

    file: str | None = None
    """the table, an .npz file; None: no such study"""
    column: str = "cifar10#val_pgd_8_acc"
    """which of its accuracies"""
    networks: Literal["path", "all"] = "path"
    """path: only cells with a path from input to output are candidates; all: every cell"""
    parameters: tuple[int, ...] = (0, 0, 1, 9, 0)
    """of each operation, in multiples of a 1x1 convolution; the largest is the convolution that a
    budget counts"""
    none: Annotated[int, at_least(0)] = 0
    """the operation that lets nothing through"""
    cells: tuple[int, ...] = (1,)
    """numbers of cells side by side"""
    budgets: tuple[str, ...] = ("none",)
    """size budgets of a cell (the mean cell of many): none, convolutions=LOW:HIGH,
    parameters=LOW:HIGH"""
    rhos: tuple[float, ...] = (1.0, 0.7, 0.4)
    """correlations of the reward with the truth"""
    noise: Annotated[float, at_least(0)] = 0.02
    """standard deviation of the reward of a cell from draw to draw"""
    rise: Annotated[float, Range("a number in [0, 1]", least=0, most=1)] = 0.3
    """how much rewards rise over a search, fast at first"""
    rounds: Annotated[int, at_least(1)] = 3
    """T of the schedule"""
    short_rho: Annotated[float, _CORRELATION] = 0.9
    """correlation of the accuracies after a short and after a full training: an assumption"""
    short_cost: Annotated[float, SHARE] = 0.125
    """cost of a short training, as a share of a full one: an assumption"""
    supernet_cost: Annotated[float, at_least(0)] = 1.0
    """cost of a search with shared weights, in full trainings: an assumption"""
    seeds: Annotated[int, at_least(2)] = 1000
    """searches for each setting"""
    policies: tuple[str, ...] = (
        "random",
        "printed",
        "printed,bonus=0.1",
        "successive-halving",
        "ridge",
        "ridge,evaluations-per-epoch=4",
    )
    """entries: policies of the bandit, as in the other studies"""
    searches: tuple[str, ...] = (
        "full,trainings=4",
        "full,trainings=8",
        "full,trainings=16",
        "full,trainings=32",
        "supernet,trainings=235",
        "supernet,trainings=235,tournament=8",
        "best-of,trainings=8",
        "best-of,trainings=24",
        "model,trainings=32,within=any",
        "model,trainings=32,features=counts,within=any",
        "model,trainings=16",
        "model,trainings=16,tournament=8",
        "model,trainings=16,features=counts",
        "model,trainings=16,features=counts,tournament=8",
        "model,trainings=16,features=hierarchical",
        "model,trainings=16,features=hierarchical,tournament=8",
        "model,trainings=16,features=neighbours,tournament=8",
        "model,trainings=16,features=neighbours,tournament=8,rounds=4",
    )
    """composed searches: best-of, full, model or supernet, with trainings, features (additive,
    counts, hierarchical, neighbours), tournament, rounds, within (budget, any) and draws (uniform,
    mix)"""
    recommended: str = "model,trainings=16,features=neighbours,tournament=8,rounds=4"
    """the entry that has to beat random networks, and not to lose against the best of as many as
    cost the same"""

    def __post_init__(self) -> None:
        for budget in self.budgets:
            parse_budget(budget)
        for entry in self.policies:
            self.bandit(entry)
        for entry in self.searches:
            parse_search(entry, "tabular.searches")
        for name in ("cells", "budgets", "rhos"):
            if not getattr(self, name):
                raise ConfigError(f"tabular.{name}: expected one or more, got none")
        for cells in self.cells:
            if not 1 <= cells <= 32:
                raise ConfigError(f"tabular.cells: expected numbers in 1..32, got {cells}")
        for rho in self.rhos:
            if not _CORRELATION.holds(rho):
                raise ConfigError(f"tabular.rhos: expected {_CORRELATION.expected}, got {rho}")
        if min(self.parameters, default=-1) < 0:
            raise ConfigError(
                "tabular.parameters: expected a number >= 0 for each operation, got "
                f"{list(self.parameters)}"
            )
        if self.file is not None and self.recommended not in (*self.policies, *self.searches):
            raise ConfigError(
                "tabular.recommended: expected an entry of tabular.policies or tabular.searches, "
                f"got {self.recommended!r}"
            )

    def bandit(self, entry: str) -> BanditSettings:
        """The settings of an entry of ``policies``.

        Raises:
            ConfigError: see :func:`~fastbandit.study.entries.parse_entry`.
        """
        printed = BanditSettings(rounds=self.rounds)
        settings, space = parse_entry(entry, printed, "tabular.policies")
        if space is not None:
            raise ConfigError(
                f"tabular.policies: {entry!r}: space is for real data; this study has a table"
            )
        return settings


def parse_budget(text: str) -> tuple[str, tuple[int, int] | None]:
    """A budget as its unit and its ends; ``none`` has no ends.

    Raises:
        ConfigError: it is none.
    """
    if text == "none":
        return "parameters", None
    match = re.fullmatch(rf"({'|'.join(_UNITS)})=(\d{{1,6}}):(\d{{1,6}})", text)
    if not match or int(match[2]) > int(match[3]):
        raise ConfigError(
            "tabular.budgets: expected none, convolutions=LOW:HIGH or parameters=LOW:HIGH, got "
            f"{text!r}"
        )
    return match[1], (int(match[2]), int(match[3]))
