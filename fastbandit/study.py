"""``python -m fastbandit.study``: which policy finds better arms, and do better networks follow?

Two halves. On **simulated** searches (:mod:`fastbandit.simulation`), hundreds of seeds in
seconds: policy against policy and against chance at the same number of trained paths, and what
lambda, the number of operations, paths that are only evaluated, and the bonus do. On **real** data
(``--data``), few and small: each policy searches several times, the networks found and random ones
are trained from scratch in the same way, and their accuracies are compared.

Every finished piece - one simulated setting, one search, one trained network - is stored, so the
same command goes on where it was stopped.
"""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import dataclasses
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from fastbandit import _cli, data, run, space
from fastbandit._cli import ConfigError
from fastbandit._files import (
    FileError,
    canonical_json,
    plain_file,
    read_sealed,
    seal,
    write_atomic,
)
from fastbandit._final import random_genotype
from fastbandit._statistics import mann_whitney, mean_interval, standard_error, wilcoxon
from fastbandit.genotype import Genotype
from fastbandit.nn.network import Network
from fastbandit.report.study import make_page
from fastbandit.run import RunError, RunFolder, derive_seed
from fastbandit.search import FinalConfig, SearchConfig, search
from fastbandit.simulation import BanditSettings, World, simulate
from fastbandit.training import Cost, cosine, evaluate, train_epoch

__all__ = ["PRESETS", "RealConfig", "SimulatedConfig", "StudyConfig", "main", "study"]

#: The studies on simulated searches, in the order of the tables.
PARTS = ("policies", "rate", "space", "evaluations", "bonus")


@dataclass(frozen=True)
class SimulatedConfig:
    """The studies on simulated searches. An entry is a policy, or POLICY,SETTING=VALUE,...:
    rate, rounds, bonus, evaluations-per-epoch."""

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
        "ucb1",
        "thompson",
        "successive-halving",
        "detrended",
        "ridge",
        "ridge-thompson",
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
                base, searched = parse_entry(entry, self.rounds, f"simulated {part}")
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
                    except ValueError as error:
                        raise ConfigError(f"simulated {part}: {error}") from None
                    yield part, entry, "" if not name else f"{value:g}", world, settings


@dataclass(frozen=True)
class RealConfig:
    """The study on real data: searches, and networks trained from scratch."""

    policies: tuple[str, ...] = ("printed", "ridge", "ridge,evaluations-per-epoch=4")
    """entries, as in the simulation; space=NAME searches another space"""
    seeds: int = 3
    """searches for each entry"""
    random: int = 6
    """random networks of the space"""
    epochs: int = 8
    """epochs in which each network is trained from scratch"""
    train_limit: int | None = None
    """training images of the networks (a stratified choice); None: all, also those that
    search.train_limit keeps from the searches"""
    repeats: int = 1
    """how often each network is trained, each time from another seed"""

    def __post_init__(self) -> None:
        for name, least in (("seeds", 1), ("random", 0), ("epochs", 1), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"real.{name}: expected {least} or more, got {getattr(self, name)}"
                )
        if self.train_limit is not None and self.train_limit < 4:
            raise ConfigError(
                f"real.train_limit: expected None or 4 or more, got {self.train_limit}"
            )
        for entry in self.policies:
            _, searched = parse_entry(entry, 3, "real.policies")
            if searched is not None:
                space.get(searched)


@dataclass(frozen=True)
class StudyConfig:
    """Everything that decides the result of a study."""

    name: str = "study"
    """part of the run folder's name"""
    data: str | None = None
    """'digits' or a path, as in a search; None: simulated searches only"""
    seed: int = 0
    """decides everything random"""
    threads: int = 0
    """CPU threads, 0: as torch chooses; one is best for the simulation where others compute too"""
    simulated: SimulatedConfig = field(default_factory=SimulatedConfig)
    real: RealConfig = field(default_factory=RealConfig)
    search: SearchConfig = field(
        default_factory=lambda: SearchConfig(final=FinalConfig(tune_epochs=0, network_epochs=0))
    )
    """settings of the searches on real data, and of the training from scratch"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**62:
            raise ConfigError(f"seed: expected a whole number in [0, 2^62), got {self.seed}")
        if self.threads < 0:
            raise ConfigError(f"threads: expected 0 or more, got {self.threads}")
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
        if self.data is None and not self.simulated.parts:
            raise ConfigError(
                "nothing to do: expected --data or one of simulated.parts, got neither"
            )

    def search_of(self, entry: str, seed: int) -> SearchConfig:
        """The search of one entry and seed."""
        base = self.search.bandit
        given, searched = parse_entry(entry, base.rounds, "real.policies", base)
        bandit = dataclasses.replace(
            base,
            policy=given.policy,
            rate=given.rate,
            rounds=given.rounds,
            bonus=given.bonus,
            evaluations_per_epoch=given.evaluations_per_epoch,
        )
        return dataclasses.replace(
            self.search,
            data=self.data or self.search.data,
            seed=self.seed + seed,
            threads=self.threads,
            space=searched or self.search.space,
            bandit=bandit,
        )


def parse_entry(
    text: str, rounds: int, where: str, base: Any = None
) -> tuple[BanditSettings, str | None]:
    """``POLICY,SETTING=VALUE,...`` as settings, and the space it names, if any.

    Args:
        text: the entry.
        rounds: T where the entry does not set it.
        where: what the message of an error begins with.
        base: where other settings come from; default: those of the paper.

    Raises:
        ConfigError: an unknown policy or setting, or a value that is none.
    """
    name, *changes = (word.strip() for word in text.split(","))
    values: dict[str, Any] = {"policy": name, "rounds": rounds}
    kinds = {"rate": float, "rounds": int, "bonus": float, "evaluations_per_epoch": int}
    if base is not None:
        values |= {setting: getattr(base, setting) for setting in kinds}
    searched = None
    for change in changes:
        setting, equals, value = change.partition("=")
        setting = setting.strip().replace("-", "_")
        if setting == "space" and equals:
            searched = value.strip()
            continue
        if setting not in kinds or not equals:
            raise ConfigError(
                f"{where}: {text!r}: expected SETTING=VALUE with one of "
                f"{', '.join(kinds).replace('_', '-')}, space; got {change!r}"
            )
        try:
            values[setting] = kinds[setting](value)
        except ValueError:
            raise ConfigError(
                f"{where}: {text!r}: {setting}: expected a number, got {value!r}"
            ) from None
    try:
        return BanditSettings(**values), searched
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r}: {error}") from None


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
}


# --- pieces: what is done is stored -------------------------------------------------------------


class _Pieces:
    """Finished pieces of work in a folder, each in a file named by a hash of what it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(canonical_json(dict(key)).encode()).hexdigest()[:16]
        return self.folder / f"{kind}-{digest}.json"

    def done(self, kind: str, key: Mapping[str, Any]) -> bool:
        return self.path(kind, key).is_file()

    def get(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The piece, made and stored if it is not there.

        Raises:
            FileError: a stored piece is damaged or another.
        """
        path = self.path(kind, key)
        if not path.is_file():
            found = make()
            self.folder.mkdir(exist_ok=True)
            piece = seal({"key": dict(key), "result": found})
            text = json.dumps(piece, indent=1, allow_nan=False)
            write_atomic(path, text + "\n")
            return found
        stored = read_sealed(plain_file(path))
        if not isinstance(stored, dict) or stored.get("key") != json.loads(json.dumps(dict(key))):
            raise FileError(
                f"{path}: expected the piece of the study that its name says, got another; "
                "delete it to have it made again"
            )
        result = stored.get("result")
        if not isinstance(result, dict):
            raise FileError(f"{path}: expected a result; delete it to have it made again")
        return result


class _Folder(RunFolder):
    """The folder of a study: pieces and searches, and no checkpoint of its own."""

    FOLDERS = ()
    FILES = (*RunFolder.FILES, "study.json", "study.html")
    TREES = ("pieces", "searches")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _silent(text: str) -> None:
    pass


# --- simulated searches -------------------------------------------------------------------------


def _simulated(
    config: StudyConfig, pieces: _Pieces, say: Callable[[str], None]
) -> dict[str, Any] | None:
    wanted = list(config.simulated.settings())
    if not wanted:
        return None
    numbers = [derive_seed(config.seed, "simulated", i) for i in range(config.simulated.seeds)]
    seeds = torch.tensor(numbers)
    rows: list[dict[str, Any]] = []
    for position, (part, entry, x, world, settings) in enumerate(wanted, 1):
        key = {
            "world": _cli.to_plain(world),
            "settings": _cli.to_plain(settings),
            "seed": config.seed,
            "seeds": config.simulated.seeds,
        }

        def make(world: World = world, settings: BanditSettings = settings) -> dict[str, Any]:
            started, busy = time.perf_counter(), time.process_time()
            found = simulate(world, settings, seeds)
            busy = time.process_time() - busy
            best = world.effects(seeds)
            possible = (best.amax(-1) - best.mean(-1)).mean(-1) / world.effect
            return {
                "advantage": (found.advantage / world.effect).tolist(),
                "best_kept": found.best_kept.tolist(),
                "possible": possible.tolist(),
                "trained": found.trained,
                "evaluated": found.evaluated,
                "seconds": time.perf_counter() - started,
                "cpu_seconds": busy,
            }

        known = pieces.done("simulated", key)
        result = pieces.get("simulated", key, make)
        mean, low, high = mean_interval(result["advantage"])
        rows.append(
            {
                "part": part,
                "entry": entry,
                "x": x,
                "arms": world.arms,
                "settings": _cli.to_plain(settings),
                "mean": mean,
                "standard_error": standard_error(result["advantage"]),
                "low": low,
                "high": high,
                "best_kept_mean": statistics.fmean(result["best_kept"]),
                "best_kept_standard_error": standard_error(result["best_kept"]),
                "possible_mean": statistics.fmean(result["possible"]),
                **result,
            }
        )
        what = f"{part}: {entry}" + (f", {_X_NAMES[part]} {x}" if x else "")
        took = "stored" if known else f"{result['seconds']:.1f} s"
        say(
            f"simulated {position}/{len(wanted)}  {what}: {mean:.3f} "
            f"+- {rows[-1]['standard_error']:.3f}  ({took})"
        )
    _test_against(rows)
    return {
        "world": _cli.to_plain(config.simulated.world),
        "seeds": numbers,
        "unit": "standard deviations of an arm's effect",
        "rows": rows,
    }


_X_NAMES = {
    "policies": "policy",
    "rate": "lambda",
    "space": "operations",
    "evaluations": "R",
    "bonus": "bonus",
}
# The value of x that the others of an entry are tested against, seed by seed.
_REFERENCES = {"rate": "0.7", "evaluations": "0", "bonus": "1"}


def _test_against(rows: list[dict[str, Any]]) -> None:
    """Adds to each row what it is compared with and the p of Wilcoxon's test; None without."""
    for row in rows:
        if row["part"] == "policies":
            others = [r for r in rows if r["part"] == "policies" and r["entry"] == "printed"]
        else:
            others = [
                r
                for r in rows
                if (r["part"], r["entry"]) == (row["part"], row["entry"])
                and r["x"] == _REFERENCES.get(row["part"])
            ]
        row["against"], row["p"] = None, None
        if others and others[0] is not row:
            row["against"] = others[0]["entry"] if row["part"] == "policies" else others[0]["x"]
            row["p"] = wilcoxon(row["advantage"], others[0]["advantage"])


# --- real data ----------------------------------------------------------------------------------


def train_from_scratch(
    genotype: Genotype, config: SearchConfig, epochs: int, seed: int
) -> dict[str, Any]:
    """Train a network on ``config.train_limit`` images; accuracy on the test images.

    The adversary, batches and optimiser are the search's; the learning rate falls to 0 along a
    cosine. The test images are looked at once, with the weights of the last epoch.
    """
    config = config.resolve()
    source = data.load(config.data)
    if source.test is None:
        raise ConfigError(f"data: {config.data}: expected a set with test images, got none")
    device = torch.device(config.device)
    train_set, test_set = source.train, source.test.to(device)
    index = train_set.limit_index(config.train_limit or len(train_set))
    test_index = test_set.limit_index(config.test_limit or len(test_set))
    mean, std = data.statistics(train_set.images[index])
    train_set = train_set.to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights"))
        network = Network(
            genotype,
            in_channels=train_set.images.shape[1],
            classes=source.classes,
            channels=config.init_channels,
            mean=mean,
            std=std,
        ).to(device)
    batches = data.Loader(
        train_set,
        index,
        batch_size=config.batch_size,
        augment=data.Augment(config.crop_padding, config.flip, config.cutout_length),
        seed=derive_seed(seed, "order"),
        shuffle=True,
        drop_last=len(index) > config.batch_size,
    )
    test = data.Loader(test_set, test_index, batch_size=config.evaluation_batch_size)
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    cost = Cost()
    started, busy = time.perf_counter(), time.process_time()
    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = cosine(epoch, epochs, config.learning_rate)
        train_epoch(
            network,
            batches,
            epoch,
            optimizer,
            config.training_threat(),
            seed=derive_seed(seed, "attack"),
            cost=cost,
            grad_clip=config.grad_clip,
        )
    # The same attack for every network: it is they that are compared.
    threat = config.final_threat()
    found = evaluate(network, test, threat, seed=derive_seed(config.seed, "test"), cost=cost)
    return {
        "genotype": genotype.hash,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "clean_accuracy": found.clean_accuracy,
        "robust_accuracy": found.robust_accuracy,
        "n": found.images,
        "attack": threat.describe(),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - busy,
    }


def _random_genotype(config: SearchConfig, number: int) -> Genotype:
    """A network drawn uniformly from the space of a search."""
    return random_genotype(config, "random network", number)


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in text.replace("=", "-"))


def _found(path: Path, config: SearchConfig, digest: str) -> tuple[Genotype, dict[str, Any]]:
    """What a search found; searched, or taken from the folder where it is finished.

    Args:
        digest: of the data.
    """
    if (path / "summary.json").is_file():
        if RunFolder.read_config(path) != _cli.to_plain(config.resolve()):
            raise RunError(f"{path}: holds a search of another configuration; delete it")
        if (searched := read_sealed(plain_file(path / "split.json"))["digest"]) != digest:
            raise RunError(
                f"{path}: holds a search on other data (digest {searched} there, {digest} now); "
                "delete it"
            )
        summary = read_sealed(plain_file(path / "summary.json"))
    else:
        _, summary = search(config, path)
    cost = summary["cost"]
    return Genotype.load(plain_file(path / "genotype.json")), {
        "genotype": summary["genotype_hash"],
        "trained": cost["epochs"],
        "evaluated": cost["paths_only_evaluated"],
        "seconds": cost["seconds_total"],
        "shared_clean_accuracy": summary["final"]["clean_accuracy"],
        "shared_robust_accuracy": summary["final"]["robust_accuracy"],
    }


def _real(
    config: StudyConfig, folder: Path, pieces: _Pieces, say: Callable[[str], None]
) -> dict[str, Any] | None:
    if config.data is None:
        return None
    real = config.real
    groups: list[dict[str, Any]] = []
    # A name says nothing of what the data hold now.
    digest = data.load(config.data).digest

    def network(group: str, number: int, genotype: Genotype, used: SearchConfig) -> dict[str, Any]:
        trained = []
        for repeat in range(real.repeats):
            # Network i of every group starts from the same seed.
            seed = derive_seed(config.seed, "network", number, repeat)
            plain = _cli.to_plain(used)
            plain.pop("bandit")  # has no part in training from scratch
            macro = genotype.macro  # has a part in the network, but none in the hash
            key = {
                "genotype": genotype.hash,
                "macro": None if macro is None else macro.model_dump(mode="json"),
                "data": digest,
                "training": plain,
                "epochs": real.epochs,
                "seed": seed,
            }
            known = pieces.done("network", key)

            def make(seed: int = seed) -> dict[str, Any]:
                return train_from_scratch(genotype, used, real.epochs, seed)

            found = pieces.get("network", key, make)
            trained.append(found)
            say(
                f"network {group} {number}: clean {100 * found['clean_accuracy']:.2f} %, robust "
                f"{100 * found['robust_accuracy']:.2f} %  "
                f"({'stored' if known else format(found['seconds'], '.0f') + ' s'})"
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
            genotype, found = _found(path, used, digest)
            searches.append({"folder": str(path.relative_to(folder)), "seed": used.seed, **found})
            say(f"search {entry} {number}: {found['seconds'] / 60:.1f} minutes")
            members.append(network(entry, number, genotype, training(used)))
        groups.append({"name": entry, "networks": members, "searches": searches})
    base = dataclasses.replace(
        config.search,
        data=config.data,
        seed=config.seed,
        threads=config.threads,
    )
    drawn = [
        network("random", number, _random_genotype(base, number), training(base))
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
            mean, low, high = mean_interval(values)
            group[name] = {
                "mean": mean,
                "low": low if math.isfinite(low) else None,
                "high": high if math.isfinite(high) else None,
                "values": values,
            }
            group[name]["p"] = {
                other["name"]: mann_whitney(values, [one[name] for one in other["networks"]])
                for other in groups
                if other is not group and other["name"] in ("printed", "random networks")
            }
        group["parameters"] = statistics.fmean(one["parameters"] for one in group["networks"])
        seconds = [one["seconds"] for one in group["searches"]]
        group["search_seconds"] = statistics.fmean(seconds) if seconds else None


# --- the command --------------------------------------------------------------------------------


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def study(
    config: StudyConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    say: Callable[[str], None] = _silent,
) -> tuple[Path, dict[str, Any]]:
    """Run a study to its end, or go on with one that was interrupted.

    Args:
        config: the settings.
        out: run folder; None: an unfinished study of the same configuration below ``root``, else a
            new folder there.
        force: replace what a finished or a different study left in ``out``.
        say: is told of each finished piece in one line.

    Returns:
        The run folder and the content of its ``study.json``; of a finished study of the same
        configuration what is stored, unless ``force`` is given.

    Raises:
        RunError: the folder holds something else.
    """
    plain = _cli.to_plain(config)
    # As YAML gives it back: lists where the configuration has tuples.
    plain = json.loads(json.dumps(plain))
    path = Path(out) if out is not None else RunFolder.find_unfinished(Path(root), plain)
    path = path or RunFolder.fresh_path(Path(root), config.name)
    with _threads(config.threads), _Folder.open(path, plain, force=force) as folder:
        if folder.finished:
            folder.result()
            stored = folder.read_json("study.json")
            stored.pop("environment")
            say(
                f"{path}: all is done: the study of this configuration is finished, and this is "
                "its stored result; --force runs it again"
            )
            return path, stored
        if not (path / "env.json").is_file():
            device = torch.device(config.search.resolve().device)
            folder.write_json("env.json", run.environment(device))
        started = time.perf_counter()
        pieces = _Pieces(path / "pieces")
        result = {
            "simulated": _simulated(config, pieces, say),
            "real": _real(config, path, pieces, say),
        }
        environment = folder.read_json("env.json")
        folder.write_json("study.json", {**result, "environment": environment})
        page = make_page(config.name, result, environment, (path / "config.yaml").read_text())
        write_atomic(path / "study.html", page)
        folder.write_json(
            "summary.json",
            {"status": "finished", "seconds_last_call": time.perf_counter() - started},
        )
    return path, result


def format_tables(result: dict[str, Any]) -> str:
    """The result as tables of text."""
    lines: list[str] = []
    simulated = result["simulated"]
    if simulated is not None:
        seeds = len(simulated["seeds"])
        lines.append(
            f"simulated searches, {seeds} seeds; advantage of the surviving arms over average "
            "ones, in sd of an arm's effect, +- standard error"
        )
        parts: dict[str, list[dict[str, Any]]] = {}
        for row in simulated["rows"]:
            parts.setdefault(row["part"], []).append(row)
        for part, rows in parts.items():
            wide = max(len(row["entry"]) for row in rows)
            x_head = "" if part == "policies" else f"{_X_NAMES[part]:>11}"
            against = "printed" if part == "policies" else _REFERENCES.get(part, "")
            p_head = f"p against {against}" if against else ""
            lines += [
                "",
                f"{part:<{wide}}{x_head}{'advantage':>18}{'best arm kept':>18}"
                f"{'trained':>9}{'evaluated':>11}  {p_head}",
            ]
            for row in rows:
                x = "" if part == "policies" else f"{row['x']:>11}"
                value = f"{row['mean']:.3f} +- {row['standard_error']:.3f}"
                kept = (
                    f"{100 * row['best_kept_mean']:.1f} +- "
                    f"{100 * row['best_kept_standard_error']:.1f} %"
                )
                p = "" if row["p"] is None else f"{row['p']:.2g}"
                lines.append(
                    f"{row['entry']:<{wide}}{x}{value:>18}{kept:>18}"
                    f"{row['trained']:>9}{row['evaluated']:>11}  {p}"
                )
            if part != "space":
                lines.append(
                    f"{'best possible':<{wide}}{'':>{len(x_head)}}{rows[0]['possible_mean']:>8.3f}"
                )
    real = result["real"]
    if real is not None:
        if lines:
            lines.append("")
        groups = real["groups"]
        wide = max(len(group["name"]) for group in groups)
        lines.append(
            f"{'trained from scratch':<{max(wide, 20)}}{'networks':>9}{'clean %':>24}"
            f"{'robust %':>24}{'parameters':>11}{'search min':>11}  p (robust): random, printed"
        )
        for group in groups:
            cells = []
            for name in ("clean_accuracy", "robust_accuracy"):
                found = group[name]
                text = f"{100 * found['mean']:.2f}"
                if found["low"] is not None:
                    text += f" ({100 * found['low']:.2f}, {100 * found['high']:.2f})"
                cells.append(text)
            p = group["robust_accuracy"]["p"]
            tests = ", ".join(
                f"{p[name]:.2g}" if name in p else "-" for name in ("random networks", "printed")
            )
            minutes = group["search_seconds"]
            lines.append(
                f"{group['name']:<{max(wide, 20)}}{len(group['networks']):>9}{cells[0]:>24}"
                f"{cells[1]:>24}{group['parameters']:>11,.0f}"
                f"{'-' if minutes is None else format(minutes / 60, '.1f'):>11}  {tests}"
            )
        lines.append(
            f"in brackets: 95 % intervals of the mean over networks; tests: Mann-Whitney; attack: "
            f"{real['attack']}; n = {real['n']} test images"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Options(_cli.CommonOptions):
    """What to do with the configuration; none of it changes a result."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: simulated (the default), smoke, digits, digits-small, smoke-digits"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """run folder; default: an unfinished study of this configuration below runs/, else a new one"""
    force: bool = False
    """replace a finished study, or one of another configuration, in --out"""
    dry_run: bool = False
    """say what there is to do, and stop"""


@dataclass(frozen=True)
class _Command:
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    config: Annotated[StudyConfig, tyro.conf.arg(name="")] = field(default_factory=StudyConfig)


def parse(arguments: Sequence[str]) -> _Command:
    """Options and configuration: defaults < preset < file < flags.

    Raises:
        ValueError: an unknown preset, setting or value.
    """
    base = _cli.base_config(StudyConfig(), PRESETS, arguments)
    return tyro.cli(
        _Command,
        default=_Command(config=base),
        args=list(arguments),
        prog="python -m fastbandit.study",
        description="Compare the policies of the search with each other and with chance: on "
        "simulated searches, and with --data on real ones.",
    )


def _plan(config: StudyConfig) -> dict[str, int]:
    """How many pieces there are to make."""
    settings = list(config.simulated.settings())
    real = config.real if config.data is not None else None
    searches = [] if real is None else [config.search_of(entry, 0) for entry in real.policies]
    paths = [used.make_bandit().total_samples for used in searches]
    found = 0 if real is None else real.seeds * len(searches)
    return {
        "simulated_settings": len(settings),
        "simulated_searches": len(settings) * config.simulated.seeds,
        "searches": found,
        "search_epochs": sum(paths) * (real.seeds if real else 0),
        "networks": 0 if real is None else (found + real.random) * real.repeats,
        "network_epochs": 0 if real is None else (found + real.random) * real.repeats * real.epochs,
    }


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    options, config = command.options, command.config
    if options.print_config:
        import yaml

        plain = json.loads(json.dumps(_cli.to_plain(config)))
        print(yaml.safe_dump(plain, sort_keys=False), end="")
        return 0
    if options.dry_run:
        plan = _plan(config)
        if options.json:
            print(json.dumps(plan))
        else:
            for name, count in plan.items():
                print(f"{name.replace('_', ' '):<20} {count:,}")
        return 0
    path, result = study(config, options.out, force=options.force, say=_say)
    if options.json:
        print(json.dumps({"run": str(path), **result}))
    else:
        print(format_tables(result))
        print(f"charts: {path / 'study.html'}")
        print(f"run folder: {path}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return _cli.guard("study", lambda: _run(given))


if __name__ == "__main__":
    raise SystemExit(main())
