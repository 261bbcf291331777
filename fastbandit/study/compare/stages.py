"""The compared networks: searched, drawn, trained; then the test images, once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbandit._files import plain_file, read_sealed, write_sealed
from fastbandit.genotype import Genotype
from fastbandit.runs.environment import utc_now
from fastbandit.runs.tensors import RunError
from fastbandit.study.compare.arms import Chance
from fastbandit.study.compare.config import SEARCH
from fastbandit.study.compare.jobs import (
    COST,
    Job,
    Work,
    attack_job,
    file_sha256,
    network_job,
    search_job,
    tournament_job,
)
from fastbandit.study.compare.protocol import (
    Frozen,
    attack_settings,
    best_seed,
    network_seed,
    recipe,
    searches,
    test_images,
)

if TYPE_CHECKING:
    from fastbandit.study.config import StudyConfig

__all__ = [
    "OPENED",
    "Member",
    "Sealed",
    "check_unseen",
    "open_images",
    "run_arms",
    "seal_networks",
]

#: Says that the test images were opened, and for which weights.
OPENED = "opened.json"


@dataclasses.dataclass
class Member:
    """One network of an arm: where it comes from, its trainings, and their test accuracies."""

    arm: str
    number: int
    name: str
    genotype: Genotype
    origin: dict[str, Any] = dataclasses.field(default_factory=dict)
    cost: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(COST, 0.0))
    """of finding it, before it is trained by the recipe"""
    latency: int | None = None
    """by the table of the search, nanoseconds; None where latency is not the budget"""
    trained: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    attacked: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def passes(cost: dict[str, float]) -> float:
    """Batches passed forward and backward: the unit in which two costs are compared."""
    return cost["forward_passes"] + cost["backward_passes"]


def total(costs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Several costs together."""
    return {name: sum(one[name] for one in costs) for name in COST}


def run_arms(
    config: StudyConfig, frozen: Frozen, drawn: Chance, work: Work
) -> tuple[list[Member], list[dict[str, Any]]]:
    """Find and train every network of every arm.

    Returns:
        The networks, and the tournaments of the arm best.

    Raises:
        RunError: the test images are opened, and a network is not trained.
    """
    compare = config.compare
    searched = _do(
        work,
        [
            search_job(
                "search",
                used,
                # Its protocol in the name: a search for another one is none of this.
                work.folder / "searches" / f"compare-{frozen.sha256[:12]}-{number}",
                frozen.sha256,
            )
            for number, used in enumerate(searches(config))
        ],
    )
    members = [
        Member(
            SEARCH,
            number,
            f"{compare.policy} {number}",
            Genotype.from_dict(one["genotype"]),
            {"folder": one["folder"], "seed": one["seed"]},
            one["cost"],
        )
        for number, one in enumerate(searched)
    ]
    if "matched" in compare.arms:
        for number in range(compare.searches):
            match = drawn.matched(
                members[number].genotype,
                tolerance=compare.tolerance,
                draws=compare.draws,
                nearest=compare.nearest,
                number=number,
            )
            name = f"matched {number}"
            members.append(Member("matched", number, name, match.genotype, match.facts()))
    candidates: list[dict[str, Any]] = []
    if "best" in compare.arms:
        candidates = _best(config, frozen, work, searched)
        members += [
            Member(
                "best",
                number,
                f"best of {one['m']}, {number}",
                Genotype.from_dict(one["genotype"]),
                {name: one[name] for name in ("m", "rungs", "attack")},
                one["cost"],
            )
            for number, one in enumerate(candidates)
        ]
    if "largest" in compare.arms:
        members.append(Member("largest", 0, "largest", drawn.largest()))
    if "one-operation" in compare.arms:
        members += [
            Member("one-operation", number, name, genotype)
            for number, (name, genotype) in enumerate(drawn.one_operation())
        ]
    for member in members:
        member.latency = drawn.sizes.of(member.genotype).latency
    jobs = [
        network_job(
            f"{member.arm} {member.number}",
            member.genotype,
            recipe(config, compare.epochs, network_seed(config, member.arm, member.number, repeat)),
            work.folder,
            protocol=frozen.sha256,
            keeps=f"{member.arm}-{member.number}-{repeat}.safetensors",
        )
        for member in members
        for repeat in range(compare.repeats)
    ]
    trained = _do(work, jobs)
    for place, member in enumerate(members):
        member.trained = trained[place * compare.repeats : (place + 1) * compare.repeats]
    return members, candidates


def _best(
    config: StudyConfig, frozen: Frozen, work: Work, searched: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each search the tournament of as many random networks as its cost buys."""
    used = searches(config)[0]

    def job(number: int, candidates: int) -> Job:
        return tournament_job(
            f"best {number}",
            dataclasses.replace(used, seed=best_seed(config, number)),
            candidates,
            config.compare.mixes,
            work.folder,
            frozen.sha256,
        )

    # What a training of each rung costs does not depend on the network, so one of each says it.
    (alone,) = _do(work, [job(0, 1)])
    units = [passes(rung) for rung in alone["candidates"][0]["rungs"]]
    counts = [affordable(passes(one["cost"]), units, used.final.keep) for one in searched]
    return _do(work, [job(number, m) for number, m in enumerate(counts)])


def affordable(cost: float, units: Sequence[float], keep: float) -> int:
    """The largest number of candidates whose tournament costs no more, at least 1.

    Args:
        cost: what may be spent.
        units: what a training of each rung costs.
        keep: the share of a rung's candidates that enters the next.
    """

    def price(m: int) -> float:
        spent, going = 0.0, m
        for unit in units:
            spent += unit * going
            going = max(1, math.ceil(keep * going))
        return spent

    m = 1
    while price(m + 1) <= cost:
        m += 1
    return m


def _do(work: Work, jobs: list[Job]) -> list[dict[str, Any]]:
    """The pieces of the jobs, none of which may be left to do once the test images are open.

    Raises:
        RunError: one is.
    """
    if plain_file(work.folder / OPENED).is_file():
        missing = [job for job in jobs if not work.stored(job)]
        if missing:
            raise RunError(
                f"{work.folder / OPENED}: the test images are open, so nothing more is searched or "
                f"trained; {len(missing)} pieces are missing ({missing[0].call.name}): restore "
                "them, or compare anew in another --out, on other test images"
            )
    return work.do(jobs)


# --- the test images ------------------------------------------------------------------------


def check_unseen(config: StudyConfig, work: Work) -> None:
    """See that no pilot of this folder, whatever its settings were, attacked an image of the end.

    Raises:
        RunError: one did.
    """
    first, end = test_images(config)
    for key in work.pieces.keys("attacked"):
        # None: all of them, or a piece of an older version, which does not say it.
        seen = key.get("images") or [0, end]
        if seen[0] < end and first < seen[1]:
            raise RunError(
                f"{work.folder}: compare.test: expected test images that nobody has looked at, "
                f"got {first}:{end}; a pilot in this folder attacked {seen[0]}:{seen[1]}. Choose "
                "others, or compare anew in another --out"
            )


@dataclasses.dataclass(frozen=True)
class Sealed:
    """All networks of a comparison, trained and with their weights as they were stored.

    Only :func:`seal_networks` makes one, and without one no test image is attacked.
    """

    protocol: str
    models: dict[str, str]
    """SHA-256 of each model file, by name"""


def seal_networks(folder: Path, frozen: Frozen, members: Sequence[Member]) -> Sealed:
    """See that every network that the protocol names is trained and unchanged.

    Raises:
        RunError: one is missing, or its file is not the one that was stored.
    """
    protocol = frozen.protocol
    wanted = {
        (arm, number): len(seeds)
        for arm, networks in protocol["training"]["seeds"].items()
        for number, seeds in enumerate(networks)
    }
    got = {(one.arm, one.number): len(one.trained) for one in members}
    short = [key for key, count in wanted.items() if got.get(key, 0) < count]
    short += [key for key, count in got.items() if count < protocol["training"]["repeats"]]
    untrained = [arm for arm in protocol["arms"] if not any(key[0] == arm for key in got)]
    if short or untrained:
        arm, number = short[0] if short else (untrained[0], 0)
        raise RunError(
            f"{folder}: the test images stay closed: network {number} of arm {arm} is not trained"
        )
    models = {}
    for member in members:
        for one in member.trained:
            model = one["model"]
            path = folder / "models" / model["file"]
            digest = file_sha256(path) if plain_file(path).is_file() else "missing"
            if digest != model["sha256"]:
                raise RunError(
                    f"{path}: the test images stay closed: expected the weights that were stored "
                    f"(SHA-256 {model['sha256'][:16]}), got {digest[:16]}"
                )
            models[model["file"]] = digest
    return Sealed(frozen.sha256, models)


def open_images(config: StudyConfig, sealed: Sealed, members: Sequence[Member], work: Work) -> None:
    """Attack the test images of the protocol with the stored weights of every network, once.

    Raises:
        RunError: they were opened for other weights.
    """
    path = work.folder / OPENED
    content = {"protocol": sealed.protocol, "models": sealed.models}
    if plain_file(path).is_file():
        stored = read_sealed(path)
        if not isinstance(stored, dict) or {key: stored.get(key) for key in content} != content:
            raise RunError(f"{path}: the test images were opened for other networks than these")
    else:
        write_sealed(path, {"opened": utc_now(), **content})
    attack = attack_settings(config, config.compare.attacks)
    images = test_images(config)
    jobs = [
        attack_job(
            f"{member.arm} {member.number}, attacked",
            one,
            attack,
            images,
            work.folder,
            protocol=sealed.protocol,
        )
        for member in members
        for one in member.trained
    ]
    attacked = iter(work.do(jobs))
    for member in members:
        member.attacked = [next(attacked) for _ in member.trained]
