"""The work of a comparison: a search, a training, an attack; each stored as a piece.

What trains gets images without test images, so it cannot look at any.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastbandit._files import plain_file
from fastbandit.config import ConfigError, to_plain
from fastbandit.data import DataSource, load
from fastbandit.data.sets import digest_of
from fastbandit.evaluate.config import EvaluateConfig
from fastbandit.evaluate.run import evaluate_model
from fastbandit.genotype import Genotype
from fastbandit.models import BEST
from fastbandit.retrain.config import RetrainConfig
from fastbandit.retrain.loop import retrain
from fastbandit.runs.folder import RunFiles
from fastbandit.runs.processes import Call, run_calls
from fastbandit.runs.session import Session, torch_settings
from fastbandit.runs.tensors import RunError
from fastbandit.runs.training import TrainingConfig
from fastbandit.search.config import SearchConfig
from fastbandit.search.networks import FOLDER, random_choice
from fastbandit.search.run import search
from fastbandit.search.tournament import FILE, MIXES, Candidate, genotype_of, hold
from fastbandit.study.pieces import Pieces
from fastbandit.study.real import training_key

__all__ = [
    "COST",
    "Job",
    "Work",
    "attack_job",
    "closed",
    "file_sha256",
    "forget_images",
    "network_job",
    "opened",
    "search_job",
    "tournament_job",
]

#: What is counted of a run; two costs are compared by their passes.
COST = ("images_trained", "forward_passes", "backward_passes", "seconds_total")

Images = tuple[int, int] | None


def closed(data: str, settings: TrainingConfig | EvaluateConfig) -> DataSource:
    """The images without any test image, of the size and colours that ``settings`` ask for."""
    return _closed(data, settings.image_size, settings.image_color)


@lru_cache(maxsize=2)
def _closed(data: str, size: int | None, color: str | None) -> DataSource:
    source = load(data, image_size=size, image_color=color)
    return dataclasses.replace(source, test=None, digest=digest_of(source.train, None))


def opened(data: str, settings: TrainingConfig | EvaluateConfig, images: Images) -> DataSource:
    """The images with those test images that ``images`` says (first, end), None: all.

    Raises:
        ConfigError: there are no such test images.
    """
    return _opened(data, settings.image_size, settings.image_color, images)


@lru_cache(maxsize=4)
def _opened(data: str, size: int | None, color: str | None, images: Images) -> DataSource:
    source = load(data, image_size=size, image_color=color)
    if source.test is None:
        raise ConfigError(f"data: {data}: expected a set with test images, got none")
    if images is None:
        return source
    first, end = images
    if end > len(source.test):
        raise ConfigError(
            f"compare: test images {first}:{end}: expected at most the {len(source.test):,} of "
            f"{data}"
        )
    test = source.test.subset(range(first, end))
    return dataclasses.replace(
        source,
        test=test,
        description=f"{source.description} Test images {first} to {end - 1} only.",
        digest=digest_of(source.train, test),
    )


def forget_images() -> None:
    """What was read is read again, as the files may have changed."""
    _closed.cache_clear()
    _opened.cache_clear()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    return hashlib.sha256(plain_file(path).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Job:
    """One piece of work.

    Attributes:
        kind, key: name the piece.
        call: makes it.
        scratch: a folder that is removed once the piece is stored.
        say: the piece in a few words.
    """

    kind: str
    key: dict[str, Any]
    call: Call
    scratch: Path | None
    say: Callable[[Mapping[str, Any]], str]


class Work:
    """Does jobs, several at a time, and stores what they make.

    Args:
        folder: the run folder of the study.
        processes: jobs at a time.
        log: is called with a line about each finished job.
    """

    def __init__(self, folder: Path, processes: int, log: Callable[[str], None]) -> None:
        self.folder, self.processes, self.log = folder, processes, log
        self.pieces = Pieces(folder / "pieces")

    def stored(self, job: Job) -> bool:
        """Whether its piece is stored."""
        return self.pieces.done(job.kind, job.key)

    def do(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """The pieces of all jobs, in their order; those that are stored are not made again."""
        results: dict[int, dict[str, Any]] = {}
        count = len(jobs)

        def keep(position: int, made: dict[str, Any] | None) -> None:
            job = jobs[position]
            # Read back or stored, whichever it is, by the one that checks.
            result = self.pieces.get(job.kind, job.key, lambda: made or {})
            if job.scratch is not None and job.scratch.exists():
                shutil.rmtree(job.scratch)
            results[position] = result
            stored = "" if made is not None else "  (stored)"
            self.log(f"{job.call.name} [{len(results)}/{count}]: {job.say(result)}{stored}")

        missing = []
        for position, job in enumerate(jobs):
            if self.stored(job):
                keep(position, None)
            else:
                missing.append(position)
        if missing:
            run_calls(
                [jobs[position].call for position in missing],
                self.processes,
                lambda number, made: keep(missing[number], made),
            )
        return [results[position] for position in range(count)]


# --- a search -------------------------------------------------------------------------------


def search_job(name: str, config: SearchConfig, path: Path, protocol: str) -> Job:
    """A search with its whole settings, in its own run folder."""
    key = {
        "protocol": protocol,
        "data": closed(config.data, config).digest,
        "search": to_plain(config),
    }
    call = Call(name, _search, (config, path))
    return Job("found", key, call, None, _say_search)


def _search(config: SearchConfig, path: Path) -> dict[str, Any]:
    path.parent.mkdir(exist_ok=True)
    _, summary = search(config, path, source=closed(config.data, config))
    genotype = Genotype.load(plain_file(path / "genotype.json"))
    return {
        "genotype": genotype.to_dict(),
        "hash": genotype.hash,
        "folder": f"{path.parent.name}/{path.name}",
        "seed": config.seed,
        "cost": search_cost(summary),
    }


def search_cost(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a search computed, the networks that it trains alone included."""
    parts = [summary["cost"], *summary["networks"]]
    if "tournament" in summary:
        parts.append(summary["tournament"]["cost"])
    return {name: sum(part[name] for part in parts) for name in COST}


def _say_search(result: Mapping[str, Any]) -> str:
    return f"{result['hash'][:12]}, {result['cost']['seconds_total'] / 60:.1f} minutes"


# --- a tournament of random networks --------------------------------------------------------

_TOURNAMENT = RunFiles("study", result=FILE, folders=(), trees=(FOLDER,))


def tournament_job(
    name: str, config: SearchConfig, candidates: int, mixes: bool, folder: Path, protocol: str
) -> Job:
    """The tournament of a search, with random networks alone.

    Args:
        config: of the search; its seed decides draws, images and trainings.
        mixes: whether the networks have random mixes of the operations.
        folder: of the study.
    """
    key = {
        "protocol": protocol,
        "data": closed(config.data, config).digest,
        "search": to_plain(config),
        "candidates": candidates,
        "mixes": mixes,
    }
    path = folder / "training" / Pieces(folder).path("best", key).stem
    call = Call(name, _tournament, (config, candidates, mixes, path))
    return Job("best", key, call, path, _say_tournament)


def _tournament(config: SearchConfig, count: int, mixes: bool, path: Path) -> dict[str, Any]:
    path.parent.mkdir(exist_ok=True)
    source, session = closed(config.data, config), Session(config)
    candidates: list[Candidate] = []
    draw = 0
    while len(candidates) < count:
        choice = random_choice(
            config, "compare", "candidate", draw, source=source, mixes=MIXES if mixes else None
        )
        one = Candidate(tuple(choice.tolist()), "random")
        draw += 1
        # In a space so small that all are drawn, again and again, some come twice.
        if one not in candidates or draw > 100 * count:
            candidates.append(one)
    with (
        torch_settings(config.threads, bool(config.deterministic)),
        session.open(_TOURNAMENT, path, root=path.parent, name="best", force=False, progress=None),
    ):
        held = session.finished()
        if held is None:
            held = session.finish(hold(session, source, candidates))
    winner = held["candidates"][held["winner"]]
    genotype = genotype_of(config, winner["choice"])
    return {
        "genotype": genotype.to_dict(),
        "hash": genotype.hash,
        "m": count,
        "attack": held["attack"],
        "rungs": held["rungs"],
        "candidates": [
            {name: value for name, value in one.items() if name not in ("choice", "origin")}
            for one in held["candidates"]
        ],
        "winner": held["winner"],
        "cost": {name: held["cost"][name] for name in COST},
    }


def _say_tournament(result: Mapping[str, Any]) -> str:
    winner = result["candidates"][result["winner"]]
    return (
        f"best of {result['m']}, {winner['parameters']:,} parameters, "
        f"{100 * winner['rungs'][-1]['robust_accuracy']:.2f} % of the images that judge, "
        f"{result['cost']['seconds_total']:.0f} s"
    )


# --- a training -----------------------------------------------------------------------------


def network_job(
    name: str,
    genotype: Genotype,
    settings: RetrainConfig,
    folder: Path,
    *,
    protocol: str | None,
    keeps: str = "",
) -> Job:
    """A network trained alone, on images without test images.

    Args:
        folder: of the study.
        protocol: the hash of the protocol that it belongs to; None: none, as in a pilot.
        keeps: name of its model file, which is kept; empty: none is.
    """
    training = training_key(genotype, settings, closed(settings.data, settings).digest)
    key = {"protocol": protocol, **training, "model": keeps}
    run = folder / "training" / Pieces(folder).path("alone", key).stem
    model = folder / "models" / keeps if keeps else None
    call = Call(name, _train, (genotype.to_dict(), settings, run, model))
    return Job("alone", key, call, run, _say_network)


def _train(
    genotype: dict[str, Any], settings: RetrainConfig, run: Path, model: Path | None
) -> dict[str, Any]:
    run.parent.mkdir(exist_ok=True)
    _, summary = retrain(
        settings, run, genotype=Genotype.from_dict(genotype), source=closed(settings.data, settings)
    )
    if summary["test"] is not None:
        raise RunError(f"{run}: a training of a comparison looked at test images")
    digest = None
    if model is not None:
        model.parent.mkdir(exist_ok=True)
        # A copy: where this is stopped, the run is still whole.
        temporary = model.with_name(f".{model.name}.{os.getpid()}.tmp")
        shutil.copyfile(run / BEST, temporary)
        os.replace(temporary, model)
        digest = file_sha256(model)
    best = summary["best"]
    return {
        "genotype": summary["genotype_hash"],
        "parameters": summary["parameters"],
        "macs": summary["macs"],
        "seed": settings.seed,
        "epochs": settings.epochs,
        "validation": {
            name: best[name] for name in ("clean_accuracy", "robust_accuracy", "n", "attack")
        },
        "overfitting": len(summary["overfitting"]),
        "cost": {name: summary["cost"][name] for name in COST},
        "model": None if model is None else {"file": model.name, "sha256": digest},
    }


def _say_network(result: Mapping[str, Any]) -> str:
    accuracy = result["validation"]
    return (
        f"{result['parameters']:,} parameters, validation images clean "
        f"{100 * accuracy['clean_accuracy']:.2f} %, robust "
        f"{100 * accuracy['robust_accuracy']:.2f} %, "
        f"{result['cost']['seconds_total']:.0f} s"
    )


# --- an attack on test images ---------------------------------------------------------------


def attack_job(
    name: str,
    network: Mapping[str, Any],
    config: EvaluateConfig,
    images: Images,
    folder: Path,
    *,
    protocol: str | None,
) -> Job:
    """The stored weights of ``network``, the piece of a training, attacked on some test images."""
    model = network["model"]
    key = {
        "protocol": protocol,
        "model": model["sha256"],
        "data": opened(config.data, config, images).digest,
        "images": None if images is None else list(images),
        "attack": to_plain(config),
    }
    out = folder / "training" / Pieces(folder).path("attacked", key).stem
    call = Call(name, _attack, (folder / "models" / model["file"], config, images, out))
    return Job("attacked", key, call, out, _say_attack)


def _attack(model: Path, config: EvaluateConfig, images: Images, out: Path) -> dict[str, Any]:
    out.parent.mkdir(exist_ok=True)
    _, result = evaluate_model(model, config, out, source=opened(config.data, config, images))
    radius = result["results"][0]
    return {
        "n": radius["worst_case"]["n"],
        "clean_accuracy": radius["clean"]["accuracy"],
        "robust_accuracy": radius["worst_case"]["accuracy"],
        "attacks": {one["name"]: one["accuracy"] for one in radius["attacks"]},
        "provenance": radius["provenance"],
        "seconds": result["cost"]["seconds_total"],
    }


def _say_attack(result: Mapping[str, Any]) -> str:
    return (
        f"clean {100 * result['clean_accuracy']:.2f} %, worst case "
        f"{100 * result['robust_accuracy']:.2f} % of {result['n']:,} test images"
    )
