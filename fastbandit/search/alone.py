"""The settings of networks that are trained alone to choose, and of a supernet trained first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from fastbandit.config import ConfigError, Range, at_least

if TYPE_CHECKING:
    from fastbandit.search.config import SearchConfig

__all__ = ["AloneConfig", "SupernetConfig", "check_alone"]


@dataclass(frozen=True)
class SupernetConfig:
    """Shared weights that are trained before the first path is scored."""

    epochs: Annotated[int, at_least(0)] = 0
    """epochs that train the shared weights first, one path a batch, each operation of an edge as
    often as any other; paths are then evaluated only. 0: each path is trained for an epoch, as
    printed"""
    warmup: Annotated[float, Range("a share from 0 to 1", least=0, most=1)] = 0.1
    """share of these epochs in which the learning rate rises from 0"""
    check: Annotated[int, Range("0, or 4 or more", least=0)] = 8
    """networks that are trained alone (alone.epochs) to see whether the shared weights rank them
    alike; 0: none"""
    threshold: Annotated[float, Range("a number from -1 to 1", least=-1, most=1)] = 0.4
    """rank correlation below which paths are credited with the accuracy of their networks trained
    alone"""


@dataclass(frozen=True)
class AloneConfig:
    """Networks that are trained alone to score their paths, with rewards alone or where the check
    of the supernet asks for it."""

    epochs: Annotated[int, at_least(1)] = 3
    """epochs from scratch, with a schedule that ends with them"""
    paths: Annotated[int, at_least(1)] = 4
    """paths that are drawn at a time, so that several can be trained at a time"""


def check_alone(config: SearchConfig) -> None:
    """Rules between the settings of networks trained alone and the others.

    Raises:
        ConfigError: two settings that exclude each other, or one without effect.
    """
    supernet, final, alone = config.supernet, config.final, config.rewards == "alone"
    if supernet.epochs and alone:
        raise ConfigError(
            "supernet.epochs: expected 0 with rewards alone, which have no use for shared "
            f"weights, got {supernet.epochs}"
        )
    if 0 < supernet.check < 4:
        raise ConfigError(
            "supernet.check: expected 0, or 4 networks or more, so that their rank correlation "
            f"has an interval, got {supernet.check}"
        )
    if not supernet.epochs and supernet != SupernetConfig():
        raise ConfigError(
            "supernet.warmup, supernet.check, supernet.threshold: expected their defaults where "
            "no supernet is trained first (supernet.epochs 0)"
        )
    checked = supernet.epochs > 0 and supernet.check > 0
    if not (alone or checked) and config.alone != AloneConfig():
        raise ConfigError(
            "alone.epochs, alone.paths: expected their defaults where no path is scored by a "
            "network trained alone (rewards alone, or a supernet that is checked)"
        )
    if (alone or supernet.epochs) and config.bandit.evaluations_per_epoch:
        raise ConfigError(
            "bandit.evaluations_per_epoch: expected 0 with rewards alone or with supernet.epochs, "
            "where every path is scored in the same way; more samples are bandit.rounds; got "
            f"{config.bandit.evaluations_per_epoch}"
        )
    if supernet.epochs and config.graphs == "yes":
        raise ConfigError(
            "graphs: expected auto or no with supernet.epochs, whose steps each train another "
            "path and cannot be replayed; got yes"
        )
    if final.tournament:
        if not final.rungs or min(final.rungs) < 1:
            raise ConfigError(
                "final.rungs: expected 1 epoch or more for one rung or more, got "
                f"{', '.join(map(str, final.rungs)) or 'none'}"
            )
        if final.from_bandit + final.from_model > 1:
            raise ConfigError(
                "final.from_bandit, final.from_model: expected shares with a sum of 1 at most, "
                f"got {final.from_bandit} and {final.from_model}"
            )
    what = "final.tournament" if final.tournament else "rewards" if alone else "supernet.check"
    if not (alone or checked or final.tournament):
        return
    if config.edges_per_node != "all":
        raise ConfigError(
            f"{what}: expected edges_per_node all, since networks trained alone to choose keep all "
            f"their edges; got {config.edges_per_node}"
        )
    if config.reward in ("robust", "mix") and not config.training_threat().attacks:
        raise ConfigError(
            f"{what}: expected reward clean where networks are trained without an attack, since "
            f"none judges them either; got {config.reward}"
        )
    # What a retraining would refuse is refused before the search.
    from fastbandit.search.tournament import alone_settings

    lengths = (*((config.alone.epochs,) if alone or checked else ()),)
    for epochs in (*lengths, *(final.rungs if final.tournament else ())):
        alone_settings(config, epochs)
