"""The study on real data: searches, and networks trained from scratch."""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastbandit._files import plain_file
from fastbandit._statistics import mann_whitney, mean_limits
from fastbandit.config import ConfigError, to_plain
from fastbandit.data import DataSource, load
from fastbandit.genotype import Genotype
from fastbandit.retrain.config import RetrainConfig
from fastbandit.retrain.loop import retrain
from fastbandit.runs.environment import derive_seed
from fastbandit.search.config import SearchConfig
from fastbandit.search.networks import random_genotype, retrain_config
from fastbandit.search.run import search
from fastbandit.study.config import StudyConfig
from fastbandit.study.pieces import Pieces

__all__ = ["run_real", "train_from_scratch", "training_key", "training_settings"]


def training_settings(config: SearchConfig, epochs: int, seed: int) -> RetrainConfig:
    """How the networks of a study are trained: data, adversary, batches and width of the search.

    ``seed`` decides everything random, the starts of the attack on the test images included.
    """
    final = dataclasses.replace(config.final, network_epochs=epochs)
    settings = retrain_config(dataclasses.replace(config, final=final), "study")
    return dataclasses.replace(settings, seed=seed)


def training_key(genotype: Genotype, settings: RetrainConfig, digest: str) -> dict[str, Any]:
    """What decides a training: a part of the name of its piece.

    Args:
        digest: of the images; a name says nothing of what the data hold now.
    """
    macro = genotype.macro  # has a part in the network, but none in the hash
    return {
        "genotype": genotype.hash,
        "macro": None if macro is None else macro.model_dump(mode="json"),
        "data": digest,
        "training": to_plain(settings),
    }


def train_from_scratch(
    genotype: Genotype, settings: RetrainConfig, folder: Path, source: DataSource
) -> dict[str, Any]:
    """Train a network by the code of a retraining; accuracy on the test images.

    The test images are looked at once, with the weights of the last epoch.

    Args:
        folder: the run, which goes on where it was stopped.
        source: the images, with some to test on.
    """
    _, summary = retrain(settings, folder, genotype=genotype, source=source)
    test = summary["test"]
    return {
        "genotype": genotype.hash,
        "parameters": summary["parameters"],
        "clean_accuracy": test["clean_accuracy"],
        "robust_accuracy": test["robust_accuracy"],
        "n": test["n"],
        "attack": test["attack"],
        "seconds": summary["cost"]["seconds_total"],
    }


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text.replace("=", "-"))


def _search(
    config: SearchConfig, path: Path, source: DataSource
) -> tuple[Genotype, dict[str, Any]]:
    """A search; a finished one gives its stored result, of other data an error."""
    _, summary = search(config, path, source=source)
    cost = summary["cost"]
    return Genotype.load(plain_file(path / "genotype.json")), {
        "genotype": summary["genotype_hash"],
        "trained": cost["epochs"],
        "evaluated": cost["paths_only_evaluated"],
        "seconds": cost["seconds_total"],
        "shared_clean_accuracy": summary["final"]["clean_accuracy"],
        "shared_robust_accuracy": summary["final"]["robust_accuracy"],
    }


def run_real(
    config: StudyConfig, folder: Path, pieces: Pieces, log: Callable[[str], None]
) -> dict[str, Any] | None:
    if config.data is None:
        return None
    real = config.real
    groups: list[dict[str, Any]] = []
    source = load(
        config.data, image_size=config.search.image_size, image_color=config.search.image_color
    )
    if source.test is None:
        raise ConfigError(f"data: {config.data}: expected a set with test images, got none")

    def network(group: str, number: int, genotype: Genotype, used: SearchConfig) -> dict[str, Any]:
        trained = []
        for repeat in range(real.repeats):
            # Network i of every group starts from the same seed and meets the same attack.
            seed = derive_seed(config.seed, "network", number, repeat)
            settings = training_settings(used, real.epochs, seed)
            key = training_key(genotype, settings, source.digest)
            stored = pieces.done("network", key)
            run = folder / "training" / pieces.path("network", key).stem

            def make(settings: RetrainConfig = settings, run: Path = run) -> dict[str, Any]:
                run.parent.mkdir(exist_ok=True)
                return train_from_scratch(genotype, settings, run, source)

            result = pieces.get("network", key, make)
            # Its result is stored.
            if run.exists():
                shutil.rmtree(run)
            trained.append(result)
            log(
                f"network {group} {number}: clean {100 * result['clean_accuracy']:.2f} %, robust "
                f"{100 * result['robust_accuracy']:.2f} %  "
                f"({'stored' if stored else format(result['seconds'], '.0f') + ' s'})"
            )
        return {
            "genotype": genotype.hash,
            "trained": trained,
            **{
                name: statistics.fmean(one[name] for one in trained)
                for name in ("clean_accuracy", "robust_accuracy", "parameters")
            },
        }

    def training(used: SearchConfig) -> SearchConfig:
        """The same for every network of a space."""
        return dataclasses.replace(used, seed=config.seed, train_limit=real.train_limit)

    for entry in real.policies:
        members, searches = [], []
        for number in range(real.seeds):
            used = config.search_of(entry, number)
            path = folder / "searches" / f"{_slug(entry)}-seed{used.seed}"
            path.parent.mkdir(exist_ok=True)
            genotype, facts = _search(used, path, source)
            searches.append({"folder": str(path.relative_to(folder)), "seed": used.seed, **facts})
            log(f"search {entry} {number}: {facts['seconds'] / 60:.1f} minutes")
            members.append(network(entry, number, genotype, training(used)))
        groups.append({"name": entry, "networks": members, "searches": searches})
    base = config.search_of(config.search.bandit.policy, 0)
    drawn = [
        network("random", number, random_genotype(base, "random network", number), training(base))
        for number in range(real.random)
    ]
    if drawn:
        groups.append({"name": "random networks", "networks": drawn, "searches": []})
    _summarise(groups)
    first = groups[0]["networks"][0]["trained"][0]
    return {"data": config.data, "groups": groups, "n": first["n"], "attack": first["attack"]}


def _summarise(groups: list[dict[str, Any]]) -> None:
    """Adds means, intervals and the tests against random networks and the printed rule."""
    for group in groups:
        for name in ("clean_accuracy", "robust_accuracy"):
            values = [one[name] for one in group["networks"]]
            p = {
                other["name"]: mann_whitney(values, [one[name] for one in other["networks"]])
                for other in groups
                if other is not group and other["name"] in ("printed", "random networks")
            }
            group[name] = {**mean_limits(values), "values": values, "p": p}
        group["parameters"] = statistics.fmean(one["parameters"] for one in group["networks"])
        seconds = [one["seconds"] for one in group["searches"]]
        group["search_seconds"] = statistics.fmean(seconds) if seconds else None
