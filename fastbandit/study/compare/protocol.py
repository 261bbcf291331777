"""What is fixed before the first compared network is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch

from fastbandit._files import canonical_json, json_value, plain_file, read_sealed, write_sealed
from fastbandit._version import __version__
from fastbandit.config import ConfigError, merge
from fastbandit.evaluate.config import EvaluateConfig
from fastbandit.retrain.config import RetrainConfig
from fastbandit.runs.environment import derive_seed, utc_now
from fastbandit.runs.tensors import RunError
from fastbandit.search.config import SearchConfig
from fastbandit.study.compare.config import SEARCH, image_range
from fastbandit.study.compare.jobs import closed, opened
from fastbandit.study.real import training_settings

if TYPE_CHECKING:
    from fastbandit.study.config import StudyConfig

__all__ = [
    "FILE",
    "Frozen",
    "attack_settings",
    "best_seed",
    "freeze",
    "make_protocol",
    "network_seed",
    "read_frozen",
    "recipe",
    "searches",
    "test_images",
]

FILE = "protocol.json"


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A protocol and its SHA-256."""

    protocol: dict[str, Any]
    sha256: str


def searches(config: StudyConfig) -> list[SearchConfig]:
    """The independent searches."""
    compare = config.compare
    return [
        # One thread, so that the number of processes decides no result.
        dataclasses.replace(
            config.search_of(compare.policy, 0),
            seed=derive_seed(config.seed, "compare", "search", number),
            threads=1,
        ).resolve()
        for number in range(compare.searches)
    ]


def recipe(config: StudyConfig, epochs: int, seed: int) -> RetrainConfig:
    """How a network of the comparison is trained: the same for all arms."""
    used = dataclasses.replace(
        config.search_of(config.compare.policy, 0),
        threads=1,
        train_limit=config.compare.train_limit,
        test_limit=None,
    )
    return training_settings(used, epochs, seed).resolve()


def network_seed(config: StudyConfig, arm: str, number: int, repeat: int) -> int:
    """The seed of one training; no two compared trainings share one."""
    return derive_seed(config.seed, "compare", "training", arm, number, repeat)


def best_seed(config: StudyConfig, number: int) -> int:
    """The seed of a tournament of random networks: draws, images and trainings."""
    return derive_seed(config.seed, "compare", "best", number)


def attack_settings(config: StudyConfig, attacks: str) -> EvaluateConfig:
    """The attack on test images, worst case image by image."""
    search, compare = config.search, config.compare
    changes: dict[str, Any] = {
        "name": "compare",
        "data": config.data,
        "image_size": search.image_size,
        "image_color": search.image_color,
        "epsilon": str(search.attack.epsilon),
        "attacks": attacks,
        "seed": derive_seed(config.seed, "compare", "attack"),
        "device": search.device,
        "deterministic": search.deterministic,
        "threads": 1,
        "batch_size": search.evaluation_batch_size,
        "examples": 0,
        "apgd": {"steps": compare.apgd_steps},
        # Checks are for one model that is published; here they would cost more than the attack.
        "checks": {"images": 0},
    }
    if search.final.step_size is not None:
        changes["pgd"] = {"step_size": str(search.final.step_size)}
    try:
        return merge(EvaluateConfig(), changes, "compare").resolve()
    except ConfigError as error:
        raise ConfigError(f"compare.attacks: {error}") from None


def test_images(config: StudyConfig) -> tuple[int, int]:
    """The test images that are opened at the end: first, and one after the last.

    Raises:
        ConfigError: there are no such images.
    """
    assert config.data is not None
    images = image_range(config.compare.test, "compare.test")
    source = opened(config.data, config.search, images)
    assert source.test is not None
    return images or (0, len(source.test))


def make_protocol(config: StudyConfig, pilot: dict[str, Any] | None) -> dict[str, Any]:
    """All that decides the result, as plain values.

    Args:
        pilot: its result.
    """
    assert config.data is not None
    compare = config.compare
    used = searches(config)
    images = test_images(config)
    protocol: dict[str, Any] = {
        "version": 1,
        "seed": config.seed,
        "n": compare.searches,
        "data": {
            "name": config.data,
            "training_digest": closed(config.data, config.search).digest,
            "test_images": list(images),
            "test_digest": opened(config.data, config.search, images).digest,
        },
        "search": {
            "policy": compare.policy,
            "settings": {**dataclasses.asdict(used[0]), "seed": None},
            "seeds": [one.seed for one in used],
        },
        "training": {
            "settings": {**dataclasses.asdict(recipe(config, compare.epochs, 0)), "seed": None},
            "repeats": compare.repeats,
            "seeds": {
                arm: [
                    [network_seed(config, arm, number, repeat) for repeat in range(compare.repeats)]
                    for number in range(compare.searches)
                ]
                for arm in (SEARCH, *compare.tested)
            },
        },
        "arms": _arms(config),
        "attack": {
            "settings": dataclasses.asdict(attack_settings(config, compare.attacks)),
            "robust": "an image counts where no attack changes the class",
        },
        "tests": [
            {
                "name": f"{SEARCH} against {arm}",
                "arms": [SEARCH, arm],
                "test": "Mann-Whitney, two-sided, on means over the repeats of each network",
            }
            for arm in compare.tested
        ],
        "correction": "Holm",
        "alpha": compare.alpha,
        "margin_points": compare.margin,
        "claim": _claims(config) if compare.claim else None,
        "pilot": None if pilot is None else _of_pilot(pilot, config),
    }
    result: dict[str, Any] = json_value(protocol)
    return result


def _arms(config: StudyConfig) -> dict[str, Any]:
    compare = config.compare
    rules: dict[str, dict[str, Any]] = {
        "matched": {
            "rule": "for each found network the first of the drawn networks of its size; all "
            "networks of one size are equally likely",
            "tolerance": compare.tolerance,
            "draws": compare.draws,
            "nearest": compare.nearest,
        },
        "best": {
            "rule": "for each search the winner of a tournament of m random networks, by robust "
            "accuracy on images that train none of them; m is the largest number whose rungs cost "
            "no more passes, forward and backward, than the search, at least 1",
            "mixes": compare.mixes,
            "rungs": list(config.search.final.rungs),
            "keep": config.search.final.keep,
            "seeds": [best_seed(config, number) for number in range(compare.searches)],
        },
        "largest": {"rule": "the network with most parameters within the budget; not tested"},
        "one-operation": {"rule": "one operation on every edge, each of the space; not tested"},
    }
    return {SEARCH: {"rule": "one independent search, one network"}} | {
        arm: rules[arm] for arm in compare.arms
    }


def _claims(config: StudyConfig) -> dict[str, str]:
    compare = config.compare
    claims = {}
    if "matched" in compare.tested:
        claims["better than chance"] = (
            f"{SEARCH} has the larger mean than matched, and p adjusted is below {compare.alpha:g}"
        )
    if "best" in compare.tested:
        claims["not inferior to best of m"] = (
            f"the 95 % interval of {SEARCH} less best lies above -{compare.margin:g} points"
        )
        claims["better than best of m"] = (
            f"{SEARCH} has the larger mean than best, and p adjusted is below {compare.alpha:g}"
        )
    return claims


def _of_pilot(pilot: dict[str, Any], config: StudyConfig) -> dict[str, Any]:
    """What the pilot had said when n was fixed."""
    normal, n = NormalDist(), config.compare.searches
    level, power = config.compare.first_level, config.compare.power
    z = normal.inv_cdf(1 - level / 2) + normal.inv_cdf(power)
    return {
        "settings": dataclasses.asdict(config.compare.pilot),
        "images": pilot["images"],
        "sd_between": pilot["components"]["between"],
        "sd_within": pilot["components"]["within"],
        "sd_of_a_network": pilot["sd"],
        "level": level,
        "power": power,
        "detectable_points": 100 * pilot["sd"] * z * math.sqrt(2 / n),
    }


# --- the file -------------------------------------------------------------------------------


def protocol_sha256(protocol: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of a protocol."""
    return hashlib.sha256(canonical_json(protocol).encode()).hexdigest()


def read_frozen(folder: Path) -> Frozen | None:
    """The protocol that is frozen in the folder of a study; None where there is none.

    Raises:
        RunError: it does not have the hash that stands beside it.
        FileError: it cannot be read.
    """
    path = folder / FILE
    if not plain_file(path).is_file():
        return None
    stored = read_sealed(path)
    good = isinstance(stored, dict) and isinstance(stored.get("protocol"), dict)
    if not good or protocol_sha256(stored["protocol"]) != stored.get("sha256"):
        raise RunError(f"{path}: edited: the protocol does not have the SHA-256 that it was given")
    return Frozen(stored["protocol"], stored["sha256"])


def freeze(folder: Path, protocol: dict[str, Any]) -> Frozen:
    """Write the protocol, or see that the one that is written is the same.

    Raises:
        RunError: another one is frozen there; the message names what differs.
    """
    stored = read_frozen(folder)
    if stored is not None:
        differs = difference(_completed(stored.protocol), protocol)
        if differs is not None:
            name, then, now = differs
            raise RunError(
                f"{folder / FILE}: the protocol is frozen and {name} differs: {then} there, {now} "
                "now; go on with the settings of then, or compare anew in another --out"
            )
        return stored
    sha256 = protocol_sha256(protocol)
    content = {
        "sha256": sha256,
        "frozen": utc_now(),
        "versions": {"fastbandit": __version__, "torch": torch.__version__},
        "protocol": protocol,
    }
    write_sealed(folder / FILE, content)
    return Frozen(protocol, sha256)


def _completed(protocol: dict[str, Any]) -> dict[str, Any]:
    """The same with the settings that came later, which had their defaults then."""
    completed: dict[str, Any] = json_value(protocol)
    for part, config in (
        ("search", SearchConfig()),
        ("training", RetrainConfig()),
        ("attack", EvaluateConfig()),
    ):
        defaults = json_value(dataclasses.asdict(config))
        section = completed.get(part)
        if isinstance(section, dict) and isinstance(section.get("settings"), dict):
            section["settings"] = _filled(defaults, section["settings"])
    return completed


def _filled(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``given``, with the entries of ``defaults`` that it lacks, at every depth."""
    inner = {
        key: _filled(defaults[key], value)
        for key, value in given.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return {**defaults, **given, **inner}


def difference(then: Any, now: Any, name: str = "") -> tuple[str, str, str] | None:
    """The first field in which two plain values differ, and both its values as short text."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return None if then == now else (name, str(then)[:120], str(now)[:120])
    for key in dict.fromkeys([*then, *now]):
        path = f"{name}.{key}" if name else key
        if key not in then or key not in now:
            return path, str(then.get(key, "nothing"))[:120], str(now.get(key, "nothing"))[:120]
        deeper = difference(then[key], now[key], path)
        if deeper is not None:
            return deeper
    return None
