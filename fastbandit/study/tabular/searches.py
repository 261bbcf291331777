"""Searches that are composed of shared rewards, short trainings, a model and a tournament."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from fastbandit.config import ConfigError
from fastbandit.study.entries import parse_settings
from fastbandit.study.tabular.models import MODELS, effects, neighbours
from fastbandit.study.tabular.world import TabularWorld

__all__ = ["Search", "best_of", "parse_search", "run_search"]

Kind = Literal["best-of", "full", "model", "supernet"]


@dataclass(frozen=True)
class Search:
    """One of

    - ``best-of``: ``trainings`` random networks within the budget, each trained shortly; the best;
    - ``full``: the same, each trained in full;
    - ``model``: ``trainings`` random networks, each trained shortly; ``features`` says which model
      learns from them; its best network within the budget;
    - ``supernet``: the same from the rewards of ``trainings`` random paths of one supernet.

    With a ``tournament`` the model's best networks that were not trained yet, so many, are trained
    shortly, and of all short trainings the best wins. They are chosen in ``rounds``: after each
    the model learns from what was trained.
    """

    kind: Kind
    trainings: int = 24
    features: str = "additive"
    tournament: int = 0
    rounds: int = 1
    within: Literal["budget", "any"] = "budget"
    """where the networks that a model learns from are drawn: within the budget, or any"""
    draws: Literal["uniform", "mix"] = "uniform"
    """how: uniformly, or each with a random mix of operations of its own"""

    @property
    def uses_rewards(self) -> bool:
        return self.kind == "supernet"

    @property
    def short(self) -> int:
        """Networks trained shortly."""
        return (self.trainings if self.kind in ("best-of", "model") else 0) + self.tournament

    @property
    def full(self) -> int:
        """Networks trained in full before the last one."""
        return self.trainings if self.kind == "full" else 0


def parse_search(text: str, where: str) -> Search:
    """``KIND,SETTING=VALUE,...`` as a search.

    Raises:
        ConfigError: an unknown kind or setting, or a value out of its range.
    """
    kind = text.split(",")[0].strip()
    if kind not in get_args(Kind):
        raise ConfigError(
            f"{where}: {text!r}: expected one of {', '.join(get_args(Kind))}, got {kind!r}"
        )
    hints = get_type_hints(Search)
    del hints["kind"]
    if kind in ("best-of", "full"):
        hints = {"trainings": int}
    _, values = parse_settings(text, hints, where, "a whole number")
    search = Search(kind, **values)  # type: ignore[arg-type]
    least = 2 if kind in ("model", "supernet") else 1
    for name, good, expected in (
        ("trainings", search.trainings >= least, f"{least} or more"),
        ("tournament", search.tournament >= 0, "0 or more"),
        (
            "rounds",
            search.rounds == 1 or (kind == "model" and 1 < search.rounds <= search.tournament),
            "1, or of a model 2 to tournament",
        ),
        ("features", search.features in MODELS, f"one of {', '.join(MODELS)}"),
    ):
        if not good:
            raise ConfigError(
                f"{where}: {text!r}: {name}: expected {expected}, got {getattr(search, name)!r}"
            )
    return search


def best_of(world: TabularWorld, seeds: Tensor, number: int, *, short: bool = True) -> Tensor:
    """The best of so many random candidates, by a training each, int64 [b, count].

    A larger number of a seed's networks begins with those of a smaller one.
    """
    codes = world.draw(seeds, number)
    value = world.short(seeds, codes, 0) if short else world.accuracy(codes)
    return _take(codes, value.argmax(-1))


def run_search(
    wanted: Search, world: TabularWorld, anywhere: TabularWorld, seeds: Tensor
) -> Tensor:
    """The network that each search comes to, int64 [b, count].

    Args:
        world: whose candidates are within the budget.
        anywhere: the same without a budget.
        seeds: int64 [b].
    """
    if wanted.kind in ("best-of", "full"):
        return best_of(world, seeds, wanted.trainings, short=wanted.kind == "best-of")
    if wanted.features == "neighbours" and world.count > 1:
        raise ConfigError(
            "tabular.searches: features=neighbours: expected networks of one cell, whose scores it "
            f"can list; got {world.count} cells"
        )
    number = max(1, wanted.tournament)
    if world.count > 1 and wanted.tournament:
        number += wanted.trainings  # so many of the best may be trained already
    size = 2**22 // (wanted.trainings * (wanted.trainings + world.rows * world.table.operations))
    if wanted.features == "neighbours":
        size = min(size, 2**22 // (len(world.candidates.codes) * (wanted.trainings + number)))
    size = max(1, min(size, world.at_a_time(number)))
    parts = [_with_model(wanted, world, anywhere, part) for part in seeds.split(size)]
    return torch.cat(parts)


def _with_model(
    wanted: Search, world: TabularWorld, anywhere: TabularWorld, seeds: Tensor
) -> Tensor:
    source = world if wanted.within == "budget" else anywhere
    draw = source.draw if wanted.draws == "uniform" else source.mixes
    trained = draw(seeds, wanted.trainings)
    if wanted.uses_rewards:
        value = source.expected(seeds, source.edge_bias(seeds), trained)
        value = value + source.noises(seeds, wanted.trainings)
    else:
        value = source.short(seeds, trained, 0)
    best = world.candidates.best
    if not wanted.tournament:
        return best(_scores(wanted, world, seeds, trained, value))[0][:, 0]
    if wanted.uses_rewards:
        chosen, _ = best(_scores(wanted, world, seeds, trained, value), wanted.tournament)
        return _take(chosen, world.short(seeds, chosen, 0).argmax(-1))
    each, rest = divmod(wanted.tournament, wanted.rounds)
    for number in range(wanted.rounds):
        scores = _scores(wanted, world, seeds, trained, value)
        chosen = _untrained(world, scores, trained, each + (number < rest))
        value = torch.cat([value, world.short(seeds, chosen, trained.shape[1])], 1)
        trained = torch.cat([trained, chosen], 1)
    value = torch.where(world.candidates.contain(trained), value, -torch.inf)
    return _take(trained, value.argmax(-1))


def _untrained(world: TabularWorld, scores: Tensor, trained: Tensor, number: int) -> Tensor:
    """The best networks that were not trained yet, int64 [b, number, count].

    Args:
        scores: float64 [b, count, m].
        trained: int64 [b, n, count]; after a round the model's best are often those.
        number: how many; fewer where a seed has fewer left.
    """
    asked = number
    while True:
        top, _ = world.candidates.best(scores, asked)
        repeated = (top.unsqueeze(2) == trained.unsqueeze(1)).all(-1).any(-1)
        left = top.shape[1] - int(repeated.sum(1).max())
        if left >= number or top.shape[1] < asked:
            break
        asked += number - left
    order = repeated.int().argsort(dim=1, stable=True)[:, : min(left, number)]
    return top[torch.arange(len(top)).unsqueeze(1), order]


def _scores(
    wanted: Search, world: TabularWorld, seeds: Tensor, trained: Tensor, value: Tensor
) -> Tensor:
    """What the model says of each candidate cell in each place, float64 [b, count, m]."""
    paths = world.paths(trained)
    if wanted.features == "neighbours":
        cells = world.paths(world.candidates.codes.unsqueeze(-1))
        score = neighbours(paths, value, cells).unsqueeze(1)
    else:
        score = world.scores(
            effects(wanted.features, paths, value, world.parameters, world.stages())
        )
    return score + 1e-9 * world.chances(seeds)


def _take(codes: Tensor, index: Tensor) -> Tensor:
    """The network [b, count] of [b, n, count] at each index [b]."""
    return codes[torch.arange(len(codes)), index]
