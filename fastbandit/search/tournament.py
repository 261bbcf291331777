"""The tournament at the end of a search: candidates are trained alone, in rungs, and the best wins.

What shared weights say of a path is a weak guide to the network trained alone (Yu et al.,
"Evaluating the Search Phase of Neural Architecture Search", ICLR 2020), and nothing in Algorithm 8
compares its last path with another. Here candidates - of the bandit, at random, and of a model that
has learnt from the first of them - are trained from scratch for a few epochs each, with a schedule
that ends with them; the best are trained again for longer, and so on (successive halving, Jamieson
and Talwalkar, AISTATS 2016). They are judged on images that trained none of them, under an attack
of several steps. The test images have no part in it.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastbandit.bandit import AntiBandit
from fastbandit.bandit.hierarchical import HierarchicalRidge
from fastbandit.childparent import ChildParent
from fastbandit.data import DataSource
from fastbandit.genotype import Genotype
from fastbandit.operations import OperationOptions
from fastbandit.retrain.config import RetrainConfig
from fastbandit.retrain.loop import retrain
from fastbandit.runs.cost import COUNTS
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.processes import Call, Workers
from fastbandit.runs.session import Session
from fastbandit.search.networks import (
    FOLDER,
    finished_network,
    latency_words,
    random_choice,
    retrain_config,
)
from fastbandit.search.sizes import Sizes, measured, stages

if TYPE_CHECKING:
    from fastbandit.search.config import SearchConfig

__all__ = [
    "ALONE",
    "FILE",
    "MIXES",
    "Candidate",
    "Piece",
    "alone_settings",
    "candidates_of",
    "clear",
    "genotype_of",
    "hold",
    "judge",
    "judge_piece",
    "model_of",
    "reward_of",
    "run_tournament",
    "train_alone",
]

#: Where a search keeps what its tournament found.
FILE = "tournament.json"
#: Folders of the runs of networks trained alone: of candidates, and to score paths.
CANDIDATES, ALONE = "tournament", "alone"

Origin = Literal["bandit", "random", "model"]

# Of so many random mixes those are taken that the model expects most of.
_POOL = 2048
#: Concentration of the Dirichlet law of mixes: operations differ most in what they are worth on
#: average, and uniform draws give every network the same mix of them.
MIXES = 0.5


@dataclass(frozen=True)
class Candidate:
    """A network of the tournament.

    Attributes:
        choice: one arm for each row of the space.
        origin: who proposed it: the bandit, chance, or the model of the first rung's results.
    """

    choice: tuple[int, ...]
    origin: Origin


@dataclass(frozen=True)
class Piece:
    """One training: what it is and where it goes."""

    settings: RetrainConfig
    genotype: Genotype
    folder: Path


def hold(
    session: Session,
    source: DataSource,
    candidates: Sequence[Candidate],
    *,
    propose: int = 0,
    workers: Workers | None = None,
) -> dict[str, Any]:
    """Train the candidates in the rungs of ``session.config.final`` and find the best.

    Each training is a run of its own below the session's folder, so that an interrupted tournament
    goes on where it was. All of a rung see the same images in the same order, start from the same
    seed and meet the same attacks.

    Args:
        session: an open session of a :class:`~fastbandit.search.config.SearchConfig`.
        source: the images; those that test are not looked at.
        candidates: the networks of the first rung, no two the same.
        propose: so many more, chosen by the model of :func:`model_of` from the results of the first
            rung, enter it.
        workers: train several networks at a time; the result does not depend on them. None: one
            after the other, in this process.

    Returns:
        What ``tournament.json`` holds: ``candidates``, each with the figures of its ``rungs``;
        ``winner``, a position among them; ``rungs``; ``cost``, summed over all trainings.

    Raises:
        ValueError: no candidate.
    """
    config: SearchConfig = session.config
    workers = workers or Workers()
    if not candidates:
        raise ValueError("tournament: expected one candidate or more, got none")
    # Each network by itself, in a process: docs/decisions.md#networks-side-by-side
    folder = session.path / FOLDER / CANDIDATES
    # Nobody looks at them, so nobody can choose by them.
    unseen = dataclasses.replace(source, test=None)
    entries: list[dict[str, Any]] = []
    epochs = config.final.rungs
    for rung, length in enumerate(epochs):
        if rung == 0:
            _train(session, unseen, folder, 0, entries, candidates, workers)
            if propose:
                more = _proposals(config, source, entries, propose)
                _train(session, unseen, folder, 0, entries, more, workers)
            continue
        going = sorted(
            (number for number, one in enumerate(entries) if len(one["rungs"]) == rung),
            key=lambda number: _rank(entries[number], number),
        )
        going = sorted(going[: max(1, math.ceil(config.final.keep * len(going)))])
        session.progress.line(
            f"tournament: {len(going)} of {len(entries)} go on to {length} epochs"
        )
        _train(session, unseen, folder, rung, entries, going, workers)
    last = [number for number, one in enumerate(entries) if len(one["rungs"]) == len(epochs)]
    winner = min(last, key=lambda number: _rank(entries[number], number))
    trainings = [one for entry in entries for one in entry["rungs"]]
    return {
        "candidates": entries,
        "winner": winner,
        "rungs": [
            {"epochs": length, "networks": sum(len(one["rungs"]) > rung for one in entries)}
            for rung, length in enumerate(epochs)
        ],
        "attack": alone_settings(config, epochs[0]).selection_threat().describe(),
        "cost": {name: sum(one[name] for one in trainings) for name in ("seconds_total", *COUNTS)}
        | {"networks": len(trainings), "processes": workers.processes},
    }


def _rank(entry: dict[str, Any], number: int) -> tuple[float, float, int]:
    """Sorts the best first: by the reward of the last rung, by that of the one before, by place."""
    rewards = [-one["reward"] for one in entry["rungs"]]
    return rewards[-1], rewards[-2] if len(rewards) > 1 else 0.0, number


def reward_of(config: SearchConfig, accuracies: dict[str, Any]) -> float:
    """What the bandit is credited with, and what a tournament is won by."""
    clean, robust = accuracies["clean_accuracy"], accuracies["robust_accuracy"]
    return float({"robust": robust, "clean": clean, "mix": 0.5 * (robust + clean)}[config.reward])


def alone_settings(config: SearchConfig, epochs: int, *purpose: str | int) -> RetrainConfig:
    """How a network is trained alone to be compared with others.

    Args:
        epochs: after which the learning rate is 0.
        purpose: decides the seed, together with the search's; the same for networks to compare.
    """
    settings = retrain_config(config, "tournament", epochs)
    return dataclasses.replace(
        settings,
        seed=derive_seed(config.seed, *purpose),
        train_portion=config.final.train_portion,
        # Several networks at a time use the cores better than several threads of one so small.
        threads=1 if settings.device == "cpu" else settings.threads,
    )


def genotype_of(config: SearchConfig, choice: Sequence[int]) -> Genotype:
    """The network of a choice, all edges kept."""
    searched = config.search_space()
    return Genotype.from_choices(
        searched,
        choice,
        options=OperationOptions.of(config),
        macro={"layers": searched.cells, "channels": config.init_channels},
    )


def _train(
    session: Session,
    source: DataSource,
    folder: Path,
    rung: int,
    entries: list[dict[str, Any]],
    new: Sequence[Candidate] | Sequence[int],
    workers: Workers,
) -> None:
    """Train candidates for a rung and enter what is found; those of the first rung are new."""
    config: SearchConfig = session.config
    numbers: list[int] = []
    genotypes = [genotype_of(config, one.choice) for one in new if isinstance(one, Candidate)]
    # Before they are trained, on all cores.
    found_latencies = iter(measured(config, source, genotypes))
    for one in new:
        if isinstance(one, Candidate):
            genotype = genotype_of(config, one.choice)
            numbers.append(len(entries))
            entries.append(
                {
                    "number": len(entries),
                    "origin": one.origin,
                    "genotype_hash": genotype.hash,
                    "choice": list(one.choice),
                    "rungs": [],
                    **next(found_latencies),
                }
            )
        else:
            numbers.append(one)
    settings = alone_settings(config, config.final.rungs[rung], "tournament", rung)
    pieces = [
        Piece(
            settings,
            genotype_of(config, entries[number]["choice"]),
            folder / f"rung-{rung + 1}" / f"{number:03}",
        )
        for number in numbers
    ]
    epochs = config.final.rungs[rung]
    with session.progress.steps(
        f"tournament, rung {rung + 1} of {len(config.final.rungs)}: {len(pieces)} networks are "
        f"trained alone, {epochs} epochs each",
        len(pieces),
    ) as update:

        def enter(position: int, training: dict[str, Any]) -> None:
            entry = entries[numbers[position]]
            entry["rungs"].append(training)
            entry["parameters"], entry["macs"] = training.pop("parameters"), training.pop("macs")
            training["reward"] = reward_of(config, training)
            update(
                sum(len(entries[number]["rungs"]) > rung for number in numbers),
                f"network {entry['number'] + 1} ({entry['origin']}, {latency_words(entry)}"
                f"{entry['parameters']:,} parameters)  clean "
                f"{100 * training['clean_accuracy']:.1f} %  robust "
                f"{100 * training['robust_accuracy']:.1f} %",
            )

        train_alone(pieces, source, workers, enter)


def train_alone(
    pieces: Sequence[Piece],
    source: DataSource,
    workers: Workers,
    done: Callable[[int, dict[str, Any]], None],
) -> None:
    """:func:`judge` for each piece, several at a time; ``done`` is told of each as it ends."""
    calls = [
        Call(f"network {piece.folder.name}", judge_piece, (piece,), shared=source)
        for piece in pieces
    ]
    workers.run(calls, done)


def judge_piece(source: DataSource, piece: Piece) -> dict[str, Any]:
    return judge(piece.genotype, piece.settings, piece.folder, source)


def judge(
    genotype: Genotype, settings: RetrainConfig, folder: Path, source: DataSource
) -> dict[str, Any]:
    """Train a network alone; accuracy on the images that did not train it.

    Args:
        folder: the run, which goes on where it was stopped.
        source: the images, without any to test on.

    Raises:
        ValueError: there are test images: nothing may be chosen by them.
    """
    if source.test is not None:
        raise ValueError("judge: source: expected no test images, got some")
    summary = finished_network(folder, settings, genotype)
    if summary is None:
        _, summary = retrain(settings, folder, force=True, genotype=genotype, source=source)
    last, cost = summary["last"], summary["cost"]
    return {
        "epochs": settings.epochs,
        "parameters": summary["parameters"],
        "macs": summary["macs"],
        "clean_accuracy": last["clean_accuracy"],
        "robust_accuracy": last["robust_accuracy"],
        "n": last["n"],
        "overfitting": len(summary["overfitting"]),
        **{name: cost[name] for name in ("seconds_total", *COUNTS)},
    }


# Who takes part.


def model_of(config: SearchConfig, source: DataSource) -> HierarchicalRidge:
    """The model that learns from candidates: operations, stages, edges, and the size."""
    sizes = Sizes.of_search(config, source)
    return HierarchicalRidge(
        stages(config.search_space()),
        config.search_space().arms,
        sizes.parameters,
        base_cost=sizes.base_parameters,
    )


def candidates_of(
    config: SearchConfig, source: DataSource, bandit: AntiBandit | ChildParent
) -> tuple[list[Candidate], int]:
    """Who takes part, and how many more the model of the first rung's results adds.

    Of the bandit come the path that it ends with and those of its history and of random mixes that
    a model of its rewards expects most of; the others are drawn at random within the budget.
    """
    final = config.final
    # The path that the bandit ends with is always there.
    propose = min(round(final.from_model * final.tournament), final.tournament - 1)
    wanted = min(max(1, round(final.from_bandit * final.tournament)), final.tournament - propose)
    candidates = [Candidate(tuple(bandit.final().tolist()), "bandit")]
    # Algorithm 9 keeps no history of paths.
    history = bandit.history if isinstance(bandit, AntiBandit) else None
    if wanted > 1 and history is not None and len(history.reward):
        model = model_of(config, source).fit(history.choice, history.reward, history.trained)
        pool = [*history.choice.tolist(), *_mixes(config, source, "bandit's candidates")]
        candidates += [
            Candidate(one, "bandit") for one in _best(model, pool, candidates, wanted - 1)
        ]
    for number in range(_POOL):
        if len(candidates) >= final.tournament - propose:
            break
        drawn = tuple(_mix(config, source, "random", number))
        if all(drawn != one.choice for one in candidates):
            candidates.append(Candidate(drawn, "random"))
    return candidates, propose


def run_tournament(
    session: Session, source: DataSource, bandit: AntiBandit | ChildParent, workers: Workers
) -> dict[str, Any]:
    """The tournament of a search, or what is stored of it; its trainings leave no files."""
    folder = session.folder
    assert folder is not None
    if (folder.path / FILE).is_file():
        stored: dict[str, Any] = folder.read_json(FILE)
        return stored
    candidates, propose = candidates_of(session.config, source, bandit)
    result = hold(session, source, candidates, propose=propose, workers=workers)
    folder.write_json(FILE, result)
    return result


def _mix(config: SearchConfig, source: DataSource, *purpose: str | int) -> list[int]:
    """A path with a random mix of operations, within the budget."""
    drawn: list[int] = random_choice(
        config, "tournament", *purpose, source=source, mixes=MIXES
    ).tolist()
    return drawn


def _mixes(config: SearchConfig, source: DataSource, purpose: str) -> list[list[int]]:
    return [_mix(config, source, purpose, number) for number in range(_POOL)]


def _best(
    model: HierarchicalRidge,
    pool: Sequence[Sequence[int]],
    taken: Sequence[Candidate],
    count: int,
) -> list[tuple[int, ...]]:
    """The choices of the pool that the model expects most of, none of them known or twice."""
    mean, _ = model.predict(torch.tensor(list(map(list, pool))))
    seen = {one.choice for one in taken}
    choices: list[tuple[int, ...]] = []
    for position in _descending(mean):
        choice = tuple(pool[position])
        if choice not in seen:
            seen.add(choice)
            choices.append(choice)
        if len(choices) == count:
            break
    return choices


def _descending(values: Tensor) -> list[int]:
    """Positions by value, the largest first; of equal ones the first."""
    return torch.sort(values, descending=True, stable=True).indices.tolist()


def _proposals(
    config: SearchConfig, source: DataSource, entries: Sequence[dict[str, Any]], count: int
) -> list[Candidate]:
    """Networks that a model of the first rung's results expects most of."""
    model = model_of(config, source).fit(
        torch.tensor([one["choice"] for one in entries]),
        torch.tensor([one["rungs"][0]["reward"] for one in entries], dtype=torch.float64),
    )
    trained = [Candidate(tuple(one["choice"]), "random") for one in entries]
    pool = _mixes(config, source, "proposals")
    return [Candidate(one, "model") for one in _best(model, pool, trained, count)]


def clear(session: Session) -> None:
    """Remove the runs of networks trained alone to choose, whose figures are stored."""
    for name in (CANDIDATES, ALONE):
        folder = session.path / FOLDER / name
        if session.is_main and folder.is_dir():
            shutil.rmtree(folder)
