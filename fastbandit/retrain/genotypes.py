"""The genotype of a retraining: where it is found, and that a run keeps the one it began with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastbandit._files import plain_file
from fastbandit._latest import command_of, newest
from fastbandit._suggest import did_you_mean
from fastbandit.config import ConfigError
from fastbandit.genotype import Genotype, GenotypeError
from fastbandit.retrain.config import RetrainConfig
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.tensors import RunError

__all__ = ["check_genotype", "find_genotype", "named_run", "search_settings", "with_genotype"]


def named_run(where: str) -> str:
    """``where``, with the name of the newest search in place of ``runs/latest``.

    Raises:
        GenotypeError: there is no finished search.
    """
    if not where:
        return where
    what = "the folder of a finished search"
    return str(newest(where, _found_by_search, what, GenotypeError) or where)


def _found_by_search(folder: Path) -> Path | None:
    file = folder / "genotype.json"
    # A retraining keeps its genotype, too, but the same command again means the same search.
    return file if file.is_file() and command_of(folder) in (None, "search") else None


def find_genotype(where: str) -> Genotype:
    """The genotype of a file, of a run folder (``runs/latest``: the newest search there) or of a
    published name.

    Raises:
        GenotypeError: there is none, or it is damaged.
    """
    where = named_run(where)
    path = Path(where)
    if where and path.is_dir():
        if not (path / "genotype.json").is_file():
            raise GenotypeError(
                f"{path}: expected a folder with genotype.json, as a finished search leaves it"
            )
        return Genotype.load(plain_file(path / "genotype.json"))
    if where in Genotype.names():
        return Genotype.published(where)
    if path.is_file():
        return Genotype.load(path)
    raise GenotypeError(
        f"{where or 'genotype'}: expected a genotype file, the folder of a search or one of "
        f"{', '.join(Genotype.names())}{did_you_mean(where, Genotype.names())}"
    )


def search_settings(where: str) -> dict[str, Any]:
    """What a run folder says about data and adversary, as settings of a retraining."""
    path = Path(where)
    if not where or not (path / "config.yaml").is_file():
        return {}
    stored = RunFolder.read_config(path)
    settings: dict[str, Any] = {name: stored[name] for name in ("name", "data") if name in stored}
    attack = stored.get("attack")
    if isinstance(attack, dict) and "epsilon" in attack:
        settings["attack"] = {"epsilon": attack["epsilon"]}
    return settings


def with_genotype(
    config: RetrainConfig, genotype: Genotype | None
) -> tuple[RetrainConfig, Genotype]:
    """The genotype that a configuration means, and the configuration with its hash."""
    if genotype is None:
        # By its own name: there will be newer ones.
        config = dataclasses.replace(config, genotype=named_run(config.genotype))
    chosen = find_genotype(config.genotype) if genotype is None else genotype
    if config.genotype_hash not in (None, chosen.hash):
        raise ConfigError(
            f"genotype_hash: expected {config.genotype_hash}, got {chosen.hash} from "
            f"{config.genotype or 'the genotype given'}"
        )
    return dataclasses.replace(config, genotype_hash=chosen.hash), chosen


def check_genotype(folder: RunFolder, genotype: Genotype) -> None:
    """See that a run goes on with the genotype it began with, the parts without a hash included."""
    file = plain_file(folder.path / "genotype.json")
    if not file.is_file():
        return
    stored = Genotype.load(file)
    if (stored.hash, stored.macro, stored.options) != (
        genotype.hash, genotype.macro, genotype.options
    ):  # fmt: skip
        raise RunError(
            f"{file}: the run was begun with {stored.macro} and {stored.options}, got "
            f"{genotype.macro} and {genotype.options} around hash {genotype.hash[:12]}; --resume "
            f"{file.parent} goes on with what is stored there, another --out begins anew"
        )
