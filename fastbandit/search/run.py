"""A search from its beginning to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbandit.callbacks import Callback
from fastbandit.config import ConfigError
from fastbandit.data import DataSource
from fastbandit.distributed import Group
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.processes import Workers
from fastbandit.runs.progress import Progress, accuracies
from fastbandit.runs.session import (
    OutOfMemoryError,
    Session,
    check_group_device,
    torch_settings,
)
from fastbandit.search import result
from fastbandit.search.adversarial import Adversarial
from fastbandit.search.child_parent import ChildParentTrial
from fastbandit.search.config import SearchConfig
from fastbandit.search.loop import MakeTrial, SearchRun
from fastbandit.search.networks import FOLDER, Networks, chance
from fastbandit.search.prepared import Prepared
from fastbandit.search.setup import Setup, build
from fastbandit.search.sizes import LATENCY, table_of_search, timed
from fastbandit.search.tournament import FILE
from fastbandit.training import Graphs

__all__ = ["FILES", "OutOfMemoryError", "search"]

#: What a search writes: the runs of the networks trained from scratch are in its folder.
FILES = RunFiles("search", files=(FILE,), trees=(FOLDER,))


def search(
    config: SearchConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    progress: Progress | None = None,
    group: Group | None = None,
    source: DataSource | None = None,
    trial: MakeTrial = Adversarial,
    processes: int = 1,
    callbacks: Sequence[Callback] = (),
) -> tuple[Path, dict[str, Any]]:
    """Run a search to its end, or go on with one that was interrupted.

    Args:
        config: the settings; see :class:`SearchConfig`.
        out: run folder; None: an unfinished run of the same configuration below ``root``, else a
            new folder there.
        force: replace what a finished or a different run left in ``out``.
        progress: where progress is shown; None shows none.
        group: the processes that run this search together, each of them calling this function;
            None: this one alone. Only the first reads and writes files, and shows progress.
        source: the images, for instance :func:`fastbandit.data.load` of a torch Dataset; None:
            those that ``config.data`` names. To go on with a run, give the same images again:
            their digest is stored and compared.
        trial: makes what trains and scores a path. It is not in ``config.yaml``: one with another
            result has a configuration of its own, a subclass of :class:`SearchConfig`.
        processes: networks of the final tournament that are trained at a time, each in a process of
            its own (and on a GPU of its own, as far as there are some). With more than 1 the caller
            keeps its own start below ``if __name__ == "__main__":``.
        callbacks: are told of the epochs of the search (:mod:`fastbandit.callbacks`), not of those
            of networks that are trained alone.

    Returns:
        The run folder and its summary; of a finished run of the same configuration in ``out``
        those that are stored, unless ``force`` is given.

    Raises:
        OutOfMemoryError: there is not enough memory; the run goes on from its last epoch.
        ValueError: settings, data, run folder or checkpoint cannot be used; the message says why.
        OSError: a file could not be written; the run goes on from its last checkpoint.
    """
    config = config.resolve()
    check_group_device(config.device, group)
    if group is None or group.rank == 0:
        config = timed(config, source)
    if group is not None and config.budgeted == LATENCY:
        # One process measures; all of them draw by its table.
        lines, _ = group.broadcast(list(config.timing.table), {})
        config = replace(config, timing=replace(config.timing, table=tuple(lines)))
    session = Session(config, group=group, callbacks=callbacks)
    if config.final.tournament and group is not None:
        raise ConfigError(
            f"final.tournament: expected 0 on {group.size} processes that train one network "
            f"together, got {config.final.tournament}; one process with --processes "
            f"{group.size} trains {group.size} candidates at a time, on as many GPUs as there are"
        )
    workers = Workers(processes)
    prepared = config.rewards == "alone" or config.supernet.epochs > 0
    if prepared and group is not None:
        raise ConfigError(
            f"rewards, supernet.epochs: expected shared and 0 on {group.size} processes that train "
            f"one network together, got {config.rewards} and {config.supernet.epochs}"
        )
    if config.search_space().binary and trial is Adversarial:
        if group is not None:
            raise ConfigError(
                f"space: expected one without 1-bit operations on {group.size} processes that "
                f"train one network together, got {config.space}"
            )
        trial = ChildParentTrial
    if prepared:
        if trial is not Adversarial:
            raise ConfigError(
                "rewards, supernet.epochs: expected shared and 0 with a trial of one's own, which "
                f"says how paths are scored; got {config.rewards} and {config.supernet.epochs}"
            )
        trial = partial(Prepared, workers=workers)
    # Before there is a run folder: what cannot be is said and leaves nothing behind.
    Graphs(config.graphs, torch.device(config.device), processes=session.processes)
    with workers, torch_settings(config.threads, bool(config.deterministic)):
        setup = build(config, group, source)
        config.size_budget(setup.source)
        with session.open(FILES, out, root=root, name=config.name, force=force, progress=progress):
            done = session.finished(setup.splits)
            if done is None:
                done = _search(setup, session, trial, workers)
            return session.path, done


def run_job(config: SearchConfig, out: str | None, force: bool) -> dict[str, Any]:
    """:func:`search`, as a call of another process."""
    path, summary = search(config, out, force=force)
    return {"run": str(path), "result": summary}


def _search(setup: Setup, session: Session, trial: MakeTrial, workers: Workers) -> dict[str, Any]:
    current, config, progress = SearchRun(setup, session, trial), setup.config, session.progress
    graphs = current.engine.graphs
    if graphs is not None and graphs.reason and setup.device.type == "cuda":
        progress.note(f"no CUDA graphs: {graphs.reason}")

    def begin(folder: RunFolder, seconds: float) -> None:
        folder.append("bandit.jsonl", current.start_line())
        current.cost.add_seconds("setup", seconds)

    resumed = session.resume(current, device=setup.device, splits=setup.splits, begin=begin)
    table = table_of_search(config, setup.source)
    if table is not None:
        progress.line(str(table))
    networks = Networks(session, setup.source)
    networks.train_reference()
    bandit = current.bandit
    _prepare(current, session)
    begins = f"goes on after epoch {bandit.trained}" if resumed and bandit.trained else "begins"
    progress.line(_meaning(setup))
    with progress.steps(
        f"search {begins}: {config.space}, {current.space.rows} edges, {bandit.arms_left} arms "
        f"each, {bandit.total_samples} epochs; run folder {session.path}",
        bandit.total_samples,
        bandit.trained,
    ) as update:
        while not bandit.finished:
            with session.oom_hint(f"in epoch {bandit.trained + 1}"):
                metrics = current.epoch()
            update(
                bandit.trained,
                f"epoch {bandit.trained}/{bandit.total_samples}  arms {bandit.arms_left}  "
                f"{accuracies(metrics)}",
            )
    tuning = config.final.tune_epochs if current.trial.tunes else 0
    if current.tuned < tuning:
        begins = f"goes on after epoch {current.tuned}" if resumed and current.tuned else "begins"
        with progress.steps(
            f"tuning {begins}: the path found, with the shared weights, {tuning} epochs; "
            f"run folder {session.path}",
            tuning,
            current.tuned,
        ) as update:
            while current.tuned < tuning:
                with session.oom_hint(f"in tuning epoch {current.tuned + 1}"):
                    metrics = current.tune()
                update(
                    current.tuned, f"tuning epoch {current.tuned}/{tuning}  {accuracies(metrics)}"
                )
    with session.oom_hint("when the found path was measured"):
        return result.finish(current, networks, workers)


def _meaning(setup: Setup) -> str:
    """What the accuracies are that the epochs of a search show."""
    config = setup.config
    weights = (
        f"by its network trained alone for {config.alone.epochs} epochs"
        if config.rewards == "alone"
        else "with the weights that all paths share, which guide the search and judge no network"
    )
    return (
        f"each epoch is another path, scored {weights}: clean and robust accuracy of "
        f"{len(setup.splits['validation'])} validation images, chance "
        f"{100 * chance(setup.source, config):.1f} %"
    )


def _prepare(current: SearchRun, session: Session) -> None:
    """What comes before the first path, if anything."""
    epochs = current.config.supernet.epochs
    if not epochs:
        # A trial of one's own may prepare something else.
        while current.prepare() is not None:
            pass
        return
    with (
        session.progress.steps(
            f"supernet: {epochs} epochs of shared weights, one path a batch; run folder "
            f"{session.path}",
            epochs,
            current.prepared,
        ) as update,
        session.oom_hint("while the supernet was trained"),
    ):
        while (metrics := current.prepare()) is not None:
            if metrics["phase"] == "supernet":
                done = current.prepared
                update(done, f"epoch {done}/{epochs}  {accuracies(metrics)}")
