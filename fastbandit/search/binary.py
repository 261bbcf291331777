"""The settings of a search for 1-bit networks, and what its two algorithms do differently."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from torch import Tensor

from fastbandit.bandit import POLICIES, AntiBandit, log, replay
from fastbandit.childparent import (
    ChildParent,
    ChildParentSample,
    ChildParentSettings,
    ChildParentStart,
)
from fastbandit.childparent import replay as replay_child_parent
from fastbandit.config import LATER, POSITIVE, ConfigError, at_least
from fastbandit.runs.environment import derive_seed

if TYPE_CHECKING:
    from fastbandit.search.config import SearchConfig
    from fastbandit.search.trial import PathResult

__all__ = [
    "BinaryConfig",
    "BinarySettings",
    "CpConfig",
    "check_binary",
    "credit",
    "explained",
    "start_line",
]


@dataclass(frozen=True)
class CpConfig:
    """Child and parent (CP-NAS): every path is trained 1-bit and in full precision."""

    rounds: Annotated[int, at_least(1)] = 3
    """T of Algorithm 9: with K arms left an edge abandons one after T K paths"""
    beta: Annotated[float, at_least(0)] = 0.5
    """weight of the gap between the parent's and the child's accuracy in the score (Eq. 4.15)"""
    gap: Literal["reward", "penalty"] = "reward"
    """whether a gap adds to the score, as printed, or is taken off it"""
    carry: bool = False
    """judge an arm by all its scores, not by those of the round alone, as printed"""
    weights: Literal["separate", "latent"] = "separate"
    """weights of child and parent: two supernets, or one whose signs are the child's weights"""
    parent: bool = True
    """train the parent too; without it the score is the child's accuracy, at half the cost"""
    learning_rate: Annotated[float, POSITIVE] = 0.005
    """learning rate of the child (Adam) at the start; it falls as that of the parent does"""
    latency_weight: Annotated[float, at_least(0), LATER] = 0.0
    """accuracy that the score of a path loses where its packed network takes as long as the mean of
    all paths, in proportion; latencies are those of a table measured once a machine; 0: none"""

    def settings(self) -> ChildParentSettings:
        """Those of the schedule and the score."""
        return ChildParentSettings(self.rounds, self.beta, self.gap, self.carry)


@dataclass(frozen=True)
class BinaryConfig:
    """How 1-bit layers are built; for a space of 1-bit networks."""

    ste: Literal["poly", "clip", "tanh", "identity"] = "poly"
    """derivative that stands for that of the sign of a map"""
    weight_ste: Literal["clip", "identity"] = "clip"
    """the same for weights"""
    alpha: Literal["filter", "layer", "none"] = "filter"
    """scale of 1-bit weights: their mean magnitude over a filter or a layer, or none"""
    preprocess: Literal["binary", "full"] = "binary"
    """the 1x1 convolutions of a cell's inputs: 1-bit where their stride is 1, or real"""
    pad: Literal["zero", "plus_one"] = "zero"
    """what surrounds the map of a 1-bit convolution"""
    pre_bn: bool = False
    """batch norm before each sign, in place of one after each 1-bit convolution"""


class BinarySettings:
    """The options of operations that a search has in its section ``binary``."""

    if TYPE_CHECKING:
        binary: BinaryConfig

        def search_space(self) -> Any: ...

    @property
    def preprocess(self) -> str:
        return self.binary.preprocess if self.search_space().binary else "full"

    @property
    def ste(self) -> str:
        return self.binary.ste

    @property
    def weight_ste(self) -> str:
        return self.binary.weight_ste

    @property
    def alpha(self) -> str:
        return self.binary.alpha

    @property
    def pad(self) -> str:
        return self.binary.pad

    @property
    def pre_bn(self) -> bool:
        return self.binary.pre_bn


def check_binary(config: SearchConfig) -> None:
    """Rules between the settings of 1-bit networks and the others.

    Raises:
        ConfigError: two settings that exclude each other.
    """
    binary = config.search_space().binary
    if not binary:
        if config.algorithm == "cp-nas":
            raise ConfigError(
                "algorithm: expected anti-bandit in a space without 1-bit operations, or a space "
                f"such as binary8 with cp-nas; got cp-nas with {config.space}"
            )
        for name, default in (("cp", CpConfig()), ("binary", BinaryConfig())):
            section = getattr(config, name)
            for field in dataclasses.fields(section):
                value, usual = getattr(section, field.name), getattr(default, field.name)
                if value != usual:
                    raise ConfigError(
                        f"{name}.{field.name}: expected {usual!r} in a space without 1-bit "
                        f"operations ({config.space}), got {value!r}"
                    )
        return
    for name, value, usual in (
        ("rewards", config.rewards, "shared"),
        ("supernet.epochs", config.supernet.epochs, 0),
        ("precision", config.precision, "float32"),
    ):
        if value != usual:
            raise ConfigError(
                f"{name}: expected {usual} in a space of 1-bit operations, whose paths are trained "
                f"as child and parent; got {value}"
            )
    if config.cp.latency_weight and config.algorithm != "cp-nas":
        raise ConfigError(
            "cp.latency_weight: expected 0 with anti-bandit, whose policies are for accuracies (a "
            f"budget is --latency), got {config.cp.latency_weight}"
        )
    if not config.cp.parent and (config.cp.beta != CpConfig().beta or config.cp.gap == "penalty"):
        raise ConfigError(
            "cp.beta, cp.gap: expected their defaults without cp.parent, where there is no gap; "
            f"got {config.cp.beta} and {config.cp.gap}"
        )
    if config.algorithm == "cp-nas":
        if config.bandit != type(config.bandit)():
            raise ConfigError(
                "bandit: expected the defaults with algorithm cp-nas, which has no bandit; got "
                f"{config.bandit}"
            )
        if config.budgeted or config.final.tournament:
            raise ConfigError(
                f"{config.budgeted or 'final.tournament'}: expected none with algorithm cp-nas, "
                "whose permutations try every arm and which proposes no candidates"
            )
        return
    usual = CpConfig()
    for name in ("rounds", "carry"):
        value = getattr(config.cp, name)
        if value != getattr(usual, name):
            raise ConfigError(
                f"cp.{name}: expected {getattr(usual, name)!r} with algorithm anti-bandit, whose "
                f"schedule is that of --bandit.*; got {value!r}"
            )
    outside = config.cp.gap == "penalty" or config.cp.beta > 1
    if config.cp.parent and outside and POLICIES[config.bandit.policy].accuracies:
        raise ConfigError(
            f"cp.beta, cp.gap: expected a score in [0, 1], as policy {config.bandit.policy} asks "
            f"for: gap reward and beta 1 at most; got {config.cp.gap} and {config.cp.beta}"
        )


# --- what the two algorithms do differently -------------------------------------------------------


def start_line(config: SearchConfig, bandit: AntiBandit | ChildParent) -> log.BanditLine:
    """The first line of the log of ``bandit``."""
    searched = config.search_space()
    seed = derive_seed(config.seed, "bandit")
    facts = (config.space, searched.operations, searched.edge_names)
    if isinstance(bandit, ChildParent):
        return ChildParentStart.of(*facts, config.cp.settings(), seed)
    return log.Start.of(*facts, config.bandit, seed, **bandit.known())


def credit(
    bandit: AntiBandit | ChildParent,
    choice: Tensor,
    probability: Tensor,
    result: PathResult,
    *,
    trained: bool,
) -> log.Sample:
    """Credit a path with its score; returns the line for the bandit's log."""
    kind = ChildParentSample if isinstance(bandit, ChildParent) else log.Sample
    unknown = set(result.log) - set(kind.model_fields)
    if unknown:
        raise TypeError(f"bandit.jsonl: a sample has no {min(unknown)}; metrics may have it")
    line = kind(
        sample=bandit.samples,
        phase=bandit.phase,
        choice=choice.tolist(),
        probability=probability.tolist(),
        **result.log,  # type: ignore[arg-type]
        reward=result.score,
    )
    if not trained:
        line.trained = False
    if isinstance(line, ChildParentSample):
        assert isinstance(bandit, ChildParent)
        bandit.credit(choice, line.child_accuracy, line.parent_accuracy, line.penalty)
    else:
        assert isinstance(bandit, AntiBandit)
        bandit.credit(choice, result.score, trained=trained)
    return line


def explained(config: SearchConfig, lines: Iterable[Mapping[str, Any]]) -> Tensor:
    """The arms that the bandit's log leads to, int64 [rows].

    Raises:
        ValueError: a line that is not what the run leads to.
    """
    again = replay_child_parent if config.algorithm == "cp-nas" else replay
    return again(lines).final()
