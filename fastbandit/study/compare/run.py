"""A comparison from its pilot to its result, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from fastbandit._files import json_value, plain_file, write_atomic
from fastbandit._statistics import scipy_stats
from fastbandit.config import to_plain
from fastbandit.report.compare import make_page
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.tensors import RunError
from fastbandit.search.sizes import LATENCY, timed
from fastbandit.study.compare.arms import Chance
from fastbandit.study.compare.jobs import Work, closed, forget_images
from fastbandit.study.compare.pilot import run_pilot
from fastbandit.study.compare.protocol import (
    FILE,
    Frozen,
    attack_settings,
    freeze,
    make_protocol,
    read_frozen,
    test_images,
)
from fastbandit.study.compare.result import compare_csv, summarise
from fastbandit.study.compare.stages import (
    OPENED,
    check_unseen,
    open_images,
    run_arms,
    seal_networks,
)
from fastbandit.study.outcome import Page, in_folder

if TYPE_CHECKING:
    from fastbandit.study.config import StudyConfig

__all__ = ["STAGES", "Stage", "compare"]

Stage = Literal["pilot", "freeze", "run", "open"]
#: The stages in their order.
STAGES: tuple[Stage, ...] = ("pilot", "freeze", "run", "open")

Log = Callable[[str], None]


def compare(
    config: StudyConfig,
    files: RunFiles,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    until: Stage = "open",
    log: Log = lambda text: None,
) -> tuple[Path, dict[str, Any]]:
    """Run a comparison to the end of a stage, or go on with one that was interrupted.

    Args:
        files: what a study writes.
        until: the last stage to run.

    Returns:
        The run folder and ``{"compare": ...}``; of an unfinished comparison what is known so far.

    Raises:
        RunError: the folder holds something else, or a frozen protocol that is another.
        ConfigError: what is asked for cannot be.
    """
    processes = config.compare.processes
    # How many processes work decides no result, so the configuration of the run has none.
    config = dataclasses.replace(config, compare=dataclasses.replace(config.compare, processes=1))
    assert config.data is not None
    # Before there is a run folder: what cannot be is said and leaves nothing behind.
    scipy_stats()
    forget_images()
    test_images(config)
    attack_settings(config, config.compare.attacks)
    attack_settings(config, config.compare.pilot.attacks)
    used = config.search_of(config.compare.policy, 0)
    if used.budgeted == LATENCY:
        # One table for all arms: it is in the configuration that is stored, and in the protocol.
        timing = timed(used, closed(config.data, config.search)).timing
        config = dataclasses.replace(
            config, search=dataclasses.replace(config.search, timing=timing)
        )
    if out is not None and force and plain_file(Path(out) / OPENED).is_file():
        raise RunError(
            f"{Path(out) / OPENED}: --force does not replace a comparison whose test images are "
            "open, since nothing would say that they were opened before; compare in another --out"
        )
    if out is not None and not force:
        _adopt(Path(out), config, files, log)

    def work(folder: RunFolder) -> tuple[dict[str, Any], Page | None]:
        result = _stages(config, folder, Work(folder.path, processes, log), until)
        if result["stage"] != "opened":
            return {"compare": result}, None
        whole = {"simulated": None, "real": None, "compare": result}
        return whole, partial(make_page, config.name, result)

    return in_folder(
        config, files, work, out,
        kind="comparison", threads=1, root=root, force=force, log=log, jobs=processes,
    )  # fmt: skip


def _stages(config: StudyConfig, folder: RunFolder, work: Work, until: Stage) -> dict[str, Any]:
    path, log = folder.path, work.log
    assert config.data is not None
    drawn = Chance(config.search_of(config.compare.policy, 0), closed(config.data, config.search))
    pilot = _frozen_pilot(config, folder)
    if pilot is None:
        pilot = run_pilot(config, drawn, work)
        if pilot is not None:
            folder.write_json("pilot.json", pilot)
            write_atomic(path / "compare.csv", compare_csv(pilot))
    if until == "pilot":
        return {"stage": "pilot", "pilot": pilot}
    if read_frozen(path) is None:
        check_unseen(config, work)
    frozen = freeze(path, make_protocol(config, pilot))
    log(f"protocol {frozen.sha256[:16]} is frozen: {path / FILE}")
    _say_power(frozen, log)
    if until == "freeze":
        return {"stage": "frozen", "pilot": pilot, "sha256": frozen.sha256}
    members, candidates = run_arms(config, frozen, drawn, work)
    sealed = seal_networks(path, frozen, members)
    write_atomic(path / "compare.csv", compare_csv(pilot, members, candidates))
    if until == "run":
        return {"stage": "trained", "pilot": pilot, "sha256": frozen.sha256}
    open_images(config, sealed, members, work)
    write_atomic(path / "compare.csv", compare_csv(pilot, members, candidates))
    result: dict[str, Any] = json_value(summarise(frozen, pilot, members))
    return result


def _frozen_pilot(config: StudyConfig, folder: RunFolder) -> dict[str, Any] | None:
    """What the pilot had measured when the protocol was frozen: nothing changes it any more."""
    held = config.compare.pilot.networks and plain_file(folder.path / "pilot.json").is_file()
    if not held or read_frozen(folder.path) is None:
        return None
    pilot: dict[str, Any] = folder.read_json("pilot.json")
    return pilot


def _say_power(frozen: Frozen, log: Log) -> None:
    pilot = frozen.protocol["pilot"]
    if pilot is not None:
        log(
            f"n = {frozen.protocol['n']} networks an arm find a difference of "
            f"{pilot['detectable_points']:.2f} points with power {pilot['power']:g} (normal "
            f"approximation, level {pilot['level']:g}, sd of a network "
            f"{100 * pilot['sd_of_a_network']:.2f} points)"
        )


def _adopt(path: Path, config: StudyConfig, files: RunFiles, log: Log) -> None:
    """Give the folder of an unfinished comparison another configuration, where that is allowed.

    Until the protocol is frozen settings may change, n above all, and what was trained for the
    same settings is kept. From then on those may that are not part of the protocol.

    Raises:
        RunError: the protocol is frozen and is another one.
    """
    try:
        stored = RunFolder.read_config(path, files.result)
    except RunError:
        return  # said by who opens it
    wanted = json_value(to_plain(config))
    frozen = read_frozen(path)
    section = stored.get("compare")
    if stored == wanted or not (isinstance(section, dict) and section.get("searches")):
        return
    if plain_file(path / files.result).is_file():
        return
    with RunFolder.open(path, stored, files=files) as folder:
        if frozen is not None:
            # What the pilot measured stays as it is; its settings are compared with the rest.
            freeze(path, make_protocol(config, _frozen_pilot(config, folder)))
        write_atomic(
            path / "config.yaml", yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True)
        )
    log(f"{path}: goes on with other settings; what was trained for the same ones is kept")
