"""The settings of a study, and its presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastbandit import space
from fastbandit.bandit import POLICIES, BanditSettings
from fastbandit.bandit.simulation import World
from fastbandit.config import LATER, Config, ConfigError, Range, at_least
from fastbandit.search.config import FinalConfig, SearchConfig
from fastbandit.study.compare.config import CompareConfig, check_claim
from fastbandit.study.entries import parse_entry
from fastbandit.study.tabular.config import TabularConfig

__all__ = ["PARTS", "PRESETS", "RealConfig", "SimulatedConfig", "StudyConfig", "parse_entry"]

#: The studies on simulated searches, in the order of the tables.
PARTS = ("policies", "rate", "space", "evaluations", "bonus")


@dataclass(frozen=True)
class SimulatedConfig:
    """The studies on simulated searches. An entry is a policy, or POLICY,SETTING=VALUE,... with
    the settings of a search's --bandit."""

    parts: tuple[str, ...] = PARTS
    """which studies: policies, rate, space, evaluations, bonus; none: no simulation"""
    seeds: int = 100
    """searches for each setting; every setting meets the same ones"""
    rounds: int = 3
    """T of the schedule"""
    world: World = field(default_factory=World)
    policies: tuple[str, ...] = (
        "random",
        "printed",
        "printed,bonus=0.1",
        "printed,bonus=0",
        "printed,bonus=0.1,rate=0.2",
        *(name for name in POLICIES if name not in ("random", "printed")),
        "ridge,evaluations-per-epoch=4",
    )
    """entries of the study of policies; the first printed one is what the others are tested with"""
    rates: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """lambda in the study of rates"""
    rate_policies: tuple[str, ...] = ("printed", "printed,bonus=0.1")
    """entries of the study of rates"""
    arms: tuple[int, ...] = (7, 8, 9, 10, 11)
    """numbers of operations in the study of the space's size"""
    space_policies: tuple[str, ...] = ("random", "printed", "detrended", "ridge")
    """entries of the study of the space's size"""
    evaluations: tuple[int, ...] = (0, 1, 2, 4)
    """R, paths that are only evaluated for each that is trained, in the study of evaluations"""
    evaluations_policies: tuple[str, ...] = ("printed", "detrended", "ridge")
    """entries of the study of evaluations"""
    bonuses: tuple[float, ...] = (0.0, 0.03, 0.1, 0.3, 1.0)
    """factors on the confidence radius in the study of the bonus"""
    bonus_policies: tuple[str, ...] = ("printed", "ucb1", "thompson")
    """entries of the study of the bonus"""

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ConfigError(
                f"simulated.parts: expected some of {', '.join(PARTS)}, got {unknown[0]!r}"
            )
        if self.parts and self.seeds < 2:
            raise ConfigError(
                f"simulated.seeds: expected 2 or more, for a standard error, got {self.seeds}"
            )
        if self.world.effect <= 0:
            raise ConfigError(
                "simulated.world.effect: expected a positive number, the unit of the results, "
                f"got {self.world.effect}"
            )
        list(self.settings())

    def settings(self) -> Iterator[tuple[str, str, str, World, BanditSettings]]:
        """Every setting to simulate: part, entry, x (a number as text, or ""), world, bandits."""
        studies: dict[str, tuple[Sequence[str], str, Sequence[float]]] = {
            "policies": (self.policies, "", [math.nan]),
            "rate": (self.rate_policies, "rate", self.rates),
            "space": (self.space_policies, "arms", self.arms),
            "evaluations": (self.evaluations_policies, "evaluations_per_epoch", self.evaluations),
            "bonus": (self.bonus_policies, "bonus", self.bonuses),
        }
        for part in self.parts:
            entries, name, values = studies[part]
            for entry in entries:
                printed = BanditSettings(rounds=self.rounds)
                base, searched = parse_entry(entry, printed, f"simulated {part}")
                if searched is not None:
                    raise ConfigError(
                        f"simulated {part}: {entry!r}: space is for real data; simulated searches "
                        "have simulated.world.arms"
                    )
                for value in values:
                    world, settings = self.world, base
                    change: dict[str, Any] = {name: value}
                    try:
                        if name == "arms":
                            world = dataclasses.replace(world, **change)
                        elif name:
                            settings = dataclasses.replace(base, **change)
                            settings.check()
                    except ValueError as error:
                        raise ConfigError(f"simulated {part}: {error}") from None
                    yield part, entry, "" if not name else f"{value:g}", world, settings


@dataclass(frozen=True)
class RealConfig:
    """The study on real data: searches, and networks trained from scratch."""

    policies: tuple[str, ...] = ("printed", "ridge", "ridge,evaluations-per-epoch=4")
    """entries, as in the simulation; space=NAME searches another space"""
    seeds: Annotated[int, at_least(1)] = 3
    """searches for each entry"""
    random: Annotated[int, at_least(0)] = 6
    """random networks of the space"""
    epochs: Annotated[int, at_least(1)] = 8
    """epochs in which each network is trained from scratch"""
    train_limit: Annotated[int | None, at_least(4)] = None
    """training images of the networks (a stratified choice); None: all, also those that
    search.train_limit keeps from the searches"""
    repeats: Annotated[int, at_least(1)] = 1
    """how often each network is trained, each time from another seed"""

    def __post_init__(self) -> None:
        for entry in self.policies:
            _, searched = parse_entry(entry, BanditSettings(), "real.policies")
            if searched is not None:
                space.get(searched)


_TABULAR, _COMPARE = TabularConfig(), CompareConfig()


@dataclass(frozen=True)
class StudyConfig(Config):
    """Everything that decides the result of a study."""

    name: str = "study"
    """part of the run folder's name"""
    data: str | None = None
    """'digits' or a path, as in a search; None: simulated searches only"""
    seed: Annotated[int, Range("a whole number in [0, 2^62)", least=0, below=2**62)] = 0
    """decides everything random"""
    threads: Annotated[int, at_least(0)] = 0
    """CPU threads, 0: as torch chooses; one is best for the simulation where others compute too"""
    simulated: SimulatedConfig = field(default_factory=SimulatedConfig)
    tabular: Annotated[TabularConfig, LATER] = _TABULAR
    real: RealConfig = field(default_factory=RealConfig)
    compare: Annotated[CompareConfig, LATER] = _COMPARE
    search: SearchConfig = field(
        default_factory=lambda: SearchConfig(final=FinalConfig(tune_epochs=0, network_epochs=0))
    )
    """settings of the searches on real data, and of the training from scratch"""

    def check(self) -> None:
        default = SearchConfig()
        for name, instead in (("data", "--data"), ("seed", "--seed"), ("threads", "--threads")):
            if getattr(self.search, name) != getattr(default, name):
                raise ConfigError(
                    f"search.{name}: the study sets it, give {instead}; "
                    f"got {getattr(self.search, name)!r}"
                )
        if self.search.final.network_epochs:
            raise ConfigError(
                "search.final.network_epochs: the study trains the networks itself, give "
                f"real.epochs; got {self.search.final.network_epochs}"
            )
        if self.search.bandit.policy != default.bandit.policy:
            raise ConfigError(
                "search.bandit.policy: the entries of real.policies set it, got "
                f"{self.search.bandit.policy!r}"
            )
        if self.compare.searches:
            self._check_compare()
        if self.data is None and not self.simulated.parts and self.tabular.file is None:
            raise ConfigError(
                "nothing to do: expected --data or one of simulated.parts, or tabular.file; "
                "got none of them"
            )

    def _check_compare(self) -> None:
        """A comparison is a study of its own."""
        if self.data is None:
            raise ConfigError("data: expected a data set to compare networks on, got None")
        for name, default in (
            ("simulated", SimulatedConfig()),
            ("tabular", TabularConfig()),
            ("real", RealConfig()),
        ):
            section = getattr(self, name)
            if section != default and not (name == "simulated" and not section.parts):
                raise ConfigError(
                    f"{name}: expected no settings with compare.searches {self.compare.searches}, "
                    "which makes a comparison and no other study"
                )
        _, searched = parse_entry(self.compare.policy, self.search.bandit, "compare.policy")
        if searched is not None:
            space.get(searched)
        check_claim(self.compare)
        if "best" in self.compare.arms:
            rungs = self.search.final.rungs
            if not rungs or min(rungs) < 1:
                raise ConfigError(
                    "search.final.rungs: expected 1 epoch or more for one rung or more, by which "
                    f"the arm best is chosen; got {', '.join(map(str, rungs)) or 'none'}"
                )
            if self.search.edges_per_node != "all":
                raise ConfigError(
                    "compare.arms: expected edges_per_node all with the arm best, whose candidates "
                    f"keep all their edges; got {self.search.edges_per_node}"
                )

    def search_of(self, entry: str, seed: int) -> SearchConfig:
        """The search of one entry and seed."""
        bandit, searched = parse_entry(entry, self.search.bandit, "real.policies")
        return dataclasses.replace(
            self.search,
            data=self.data or self.search.data,
            seed=self.seed + seed,
            threads=self.threads,
            space=searched or self.search.space,
            bandit=bandit,
        )


# The comparison with random networks: so small that 12 searches and two arms of 12 fit into an
# afternoon of two cores. Test images 0 to 899 of the digits were looked at before, by whoever chose
# this recipe; the rest is for the end. The budget is about the mean size of random networks, so
# that nothing can win by its size.
_COMPARED: dict[str, Any] = {
    "searches": 12,
    "policy": "hierarchical,mixes=0.5",
    "train_limit": 2000,
    "apgd_steps": 20,
    "margin": 1.5,
    "pilot": {"images": "0:900"},
}
_SEARCHED: dict[str, Any] = {
    "layers": 2,
    "train_limit": 2400,
    "attack": {"epsilon": "0.1"},
    "bandit": {"rounds": 1},
    "parameters": "17k:23k",
    "final": {
        "step_size": "0.01",
        "tune_epochs": 0,
        "network_epochs": 0,
        "tournament": 16,
        "train_portion": 0.5,
    },
}

# What each preset changes.
PRESETS: dict[str, dict[str, Any]] = {
    # The simulated studies in full: minutes, most of them for ridge with evaluated paths.
    "simulated": {},
    "smoke": {
        "name": "smoke",
        "simulated": {
            "seeds": 4,
            "rounds": 1,
            "world": {"rows": 12},
            "rates": [0.2, 0.7],
            "arms": [4, 5],
            "evaluations": [0, 1],
            "bonuses": [0.1, 1.0],
        },
    },
    # True accuracies from a table that the user has: section "True accuracies" of docs/study.md.
    "tabular": {
        "name": "tabular",
        "simulated": {"parts": []},
        "tabular": {
            "file": "nas-robbench-201.npz",
            "budgets": ["none", *(f"parameters={9 * n}:{9 * n}" for n in (1, 2, 3))],
        },
    },
    # Seconds: whether the machinery works, no result.
    "smoke-tabular": {
        "name": "smoke-tabular",
        "simulated": {"parts": []},
        "tabular": {
            "file": "nas-robbench-201.npz",
            "cells": [1, 2],
            "budgets": ["none", "convolutions=0:1"],
            "rhos": [0.7],
            "rounds": 1,
            "seeds": 8,
            "policies": ["random", "printed", "ridge"],
            "searches": [
                "best-of,trainings=4",
                "supernet,trainings=9",
                "model,trainings=4,tournament=2",
            ],
            "recommended": "model,trainings=4,tournament=2",
        },
    },
    # Hours, on one core. Each search is the default one.
    "digits": {
        "name": "digits",
        "data": "digits",
        "simulated": {"parts": []},
        "real": {"seeds": 5, "random": 15},
    },
    # Forty minutes on one core: one round of each number of arms (53 paths) in place of three, two
    # thirds of the images, and epsilon 0.1: at 0.2 the shared weights learn nothing in that time.
    "digits-small": {
        "name": "digits-small",
        "data": "digits",
        "simulated": {"parts": []},
        "real": {
            "policies": ["printed", "ridge,evaluations-per-epoch=4"],
            "seeds": 3,
            "random": 6,
            "epochs": 6,
        },
        "search": {
            "train_limit": 2560,
            "train_portion": 0.75,
            "attack": {"epsilon": "0.1"},
            "bandit": {"rounds": 1},
            "final": {"step_size": "0.01"},
        },
    },
    # Seconds, real data: whether the machinery works, no result.
    "smoke-digits": {
        "name": "smoke-digits",
        "data": "digits",
        "simulated": {"parts": []},
        "real": {
            "policies": ["printed", "ridge"],
            "seeds": 1,
            "random": 1,
            "epochs": 1,
            "train_limit": 64,
        },
        "search": {
            "space": "general7-light",
            "init_channels": 2,
            "train_limit": 64,
            "test_limit": 64,
            "bandit": {"rounds": 1},
            "final": {"steps": 2, "step_size": "0.1"},
        },
    },
    "compare-digits": {
        "name": "compare-digits",
        "data": "digits",
        "simulated": {"parts": []},
        "compare": {**_COMPARED, "test": "900:1797"},
        "search": _SEARCHED,
    },
    # Nothing else but the images: Fashion-MNIST at half its height and width, so that two cores
    # need an hour or two. Give --data PATH where its folder has another name.
    "compare-fashion": {
        "name": "compare-fashion",
        "data": "fashion-mnist",
        "simulated": {"parts": []},
        "compare": {**_COMPARED, "test": "2000:3000"},
        "search": {**_SEARCHED, "image_size": 14},
    },
    # A minute or two: whether the machinery works, no result.
    "compare-smoke": {
        "name": "compare-smoke",
        "data": "digits",
        "simulated": {"parts": []},
        "compare": {
            "searches": 2,
            "claim": False,
            "epochs": 1,
            "train_limit": 64,
            "repeats": 2,
            "test": "900:932",
            "apgd_steps": 2,
            "attacks": "pgd-2,apgd-ce",
            "pilot": {
                "networks": 3,
                "images": "0:32",
                "attacks": "pgd-2",
                "differences": [2.0, 5.0],
                "simulations": 200,
            },
        },
        "search": {
            "space": "general7-light",
            "layers": 2,
            "init_channels": 2,
            "train_limit": 64,
            "bandit": {"rounds": 1},
            "final": {"steps": 2, "step_size": "0.1", "rungs": [1, 2]},
        },
    },
}

StudyConfig.presets = PRESETS
