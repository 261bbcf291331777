"""Searches without networks: thousands of bandits at once on made-up accuracies.

A :class:`World` says what a path's accuracy is: the training trend, an effect for the arm of each
row, and noise. :func:`simulate` runs one policy on many such searches at the same time, as
:class:`fastbandit.bandit.Bandits`: bandit i of a simulation makes the choices that an
:class:`fastbandit.bandit.AntiBandit` with the i-th seed makes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastbandit.bandit.bandits import Bandits, counter_uniform
from fastbandit.bandit.policies import POLICIES
from fastbandit.bandit.settings import BanditSettings

__all__ = ["Outcome", "World", "simulate"]


@dataclass(frozen=True)
class World:
    """What the accuracy of a path is made of, in accuracies in [0, 1]."""

    rows: int = 60
    """edges of the network"""
    arms: int = 9
    """operations on each edge"""
    effect: float = 0.01
    """standard deviation of the effects, one for each arm of each edge; they add up"""
    noise: float = 0.01
    """standard deviation of the noise of each accuracy"""
    start: float = 0.3
    """accuracy of an average path at the start"""
    rise: float = 0.3
    """how much it rises over the search"""
    trend: Literal["saturating", "linear", "late"] = "saturating"
    """how it rises: fast at first, evenly, or fast at the end"""

    def __post_init__(self) -> None:
        for name in ("rows", "arms"):
            if getattr(self, name) < 1:
                raise ValueError(f"world.{name}: expected 1 or more, got {getattr(self, name)}")
        for name in ("effect", "noise"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"world.{name}: expected a number >= 0, got {value}")
        if self.trend not in ("saturating", "linear", "late"):
            raise ValueError(
                f"world.trend: expected saturating, linear or late, got {self.trend!r}"
            )
        if not 0 <= self.start <= 1 or not 0 <= self.start + self.rise <= 1:
            raise ValueError(
                "world.start, world.rise: expected accuracies in [0, 1] at both ends, got "
                f"{self.start} and {self.start + self.rise}"
            )

    def level(self, trained: int, total: int) -> float:
        """Accuracy of an average path when ``trained`` of ``total`` paths have been trained."""
        time = trained / max(total, 1)
        share = {
            "saturating": (1 - math.exp(-4 * time)) / (1 - math.exp(-4)),
            "linear": time,
            "late": time**3,
        }[self.trend]
        return self.start + self.rise * share

    def effects(self, seeds: Tensor) -> Tensor:
        """The effects of the worlds with these seeds, float64 [bandits, rows, arms]."""
        return self.effect * _normal(seeds, "effects", self.rows * self.arms).unflatten(
            1, (self.rows, self.arms)
        )

    def noises(self, seeds: Tensor, samples: int) -> Tensor:
        """The noise of each sample, float64 [bandits, samples]."""
        return self.noise * _normal(seeds, "noise", samples)

    def accuracy(self, effects: Tensor, choice: Tensor, level: float, noise: Tensor) -> Tensor:
        """Accuracies of paths. They add up without end: a good path may be above 1.

        Clipping them would hide the differences between good paths from every policy.

        Args:
            effects: [..., rows, arms].
            choice: int64 [..., rows].
            level: of :meth:`level`.
            noise: [...].

        Returns:
            [...].
        """
        gain = effects.gather(-1, choice.unsqueeze(-1)).squeeze(-1)
        # In the order of the rows for any layout: one bandit and thousands get the same bits.
        return level + gain.cumsum(-1)[..., -1] + noise


def _normal(seeds: Tensor, what: str, columns: int) -> Tensor:
    """float64 [bandits, columns]; other numbers than those the bandit of the seed draws."""
    number = {"effects": 2**31, "noise": 2**31 + 1}[what]
    uniform = counter_uniform(seeds, "sample", number, 1, columns).squeeze(1)
    return torch.special.ndtri(uniform.clamp(min=2.0**-54))


@dataclass(frozen=True)
class Outcome:
    """What a policy came to in each search."""

    final: Tensor  # int64 [bandits, rows]: the surviving arms
    advantage: Tensor  # float64 [bandits]: their effect less that of an average arm, mean over rows
    best_kept: Tensor  # float64 [bandits]: share of rows whose best arm survived
    trained: int  # paths trained in each search
    evaluated: int  # paths that were only evaluated


def simulate(
    world: World,
    settings: BanditSettings,
    seeds: Tensor,
    *,
    chunk: int | None = None,
) -> Outcome:
    """Runs a search for each seed; the seed decides its effects, its noise and all draws.

    Two policies on the same seeds meet the same effects, and the same noise sample by sample.

    Args:
        world: what accuracies are made of.
        settings: the policy and its settings.
        seeds: int64 [bandits], in [0, 2**63), one for each search.
        chunk: searches at a time, which bounds the memory; default: what fits the policy.

    Raises:
        ValueError: seeds of another shape, dtype or range, or a setting out of its range.
    """
    if seeds.dim() != 1 or seeds.dtype != torch.int64 or len(seeds) < 1 or int(seeds.min()) < 0:
        raise ValueError(
            "simulate: seeds: expected int64 [bandits], at least one, >= 0; got "
            f"{str(seeds.dtype).removeprefix('torch.')} {list(seeds.shape)}"
        )
    settings.check()
    if chunk is None:
        chunk = POLICIES[settings.policy].simulated_at_a_time
    parts = [_simulate(world, settings, part) for part in _parts(seeds, chunk)]
    return dataclasses.replace(
        parts[0],
        final=torch.cat([one.final for one in parts]),
        advantage=torch.cat([one.advantage for one in parts]),
        best_kept=torch.cat([one.best_kept for one in parts]),
    )


def _parts(seeds: Tensor, chunk: int) -> Iterator[Tensor]:
    for start in range(0, len(seeds), max(1, chunk)):
        yield seeds[start : start + max(1, chunk)]


def _simulate(world: World, settings: BanditSettings, seeds: Tensor) -> Outcome:
    # The schedule is the same for any number of bandits, also for none.
    none = Bandits(world.rows, world.arms, settings, seed=seeds[:0])
    total = none.total_samples
    evaluated = settings.evaluations_per_epoch * (total - none.initial_samples)
    bandits = Bandits(world.rows, world.arms, settings, seed=seeds, room_for=total + evaluated)
    effects = world.effects(seeds)
    noise = world.noises(seeds, total + evaluated)
    while not bandits.finished:
        extra = settings.evaluations_per_epoch if bandits.phase == "search" else 0
        level = world.level(bandits.trained + 1, total)
        for trained in (True, *[False] * extra):
            choice = bandits.sample(trained=trained)
            reward = world.accuracy(effects, choice, level, noise[:, bandits.samples])
            bandits.credit(choice, reward, trained=trained)
        while bandits.due:
            bandits.prune()
    final = bandits.alive.int().argmax(-1)
    kept = effects.gather(-1, final.unsqueeze(-1)).squeeze(-1)
    return Outcome(
        final=final,
        advantage=(kept - effects.mean(-1)).mean(-1),
        best_kept=(final == effects.argmax(-1)).double().mean(-1),
        trained=total,
        evaluated=evaluated,
    )
