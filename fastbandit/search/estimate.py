"""What a search will cost, measured on a few steps of real paths."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbandit.data import Loader
from fastbandit.nn.binary import use_full_precision
from fastbandit.retrain.estimate import dry_run as retrain_dry_run
from fastbandit.runs.cost import measure_throughput, seconds_to_save
from fastbandit.runs.environment import peak_memory_mb
from fastbandit.runs.preflight import Preflight
from fastbandit.runs.progress import Progress
from fastbandit.runs.session import Session, torch_settings
from fastbandit.search import networks
from fastbandit.search.adversarial import FEW_STATISTICS_BATCHES, Adversarial
from fastbandit.search.config import SearchConfig
from fastbandit.search.loop import SearchRun
from fastbandit.search.setup import build
from fastbandit.search.tournament import alone_settings
from fastbandit.search.trial import Path
from fastbandit.threat import ThreatModel
from fastbandit.training import (
    Cost,
    evaluate,
    reestimate_batchnorm,
    reset_batchnorm,
    train_epoch,
)

__all__ = ["dry_run"]

# What measuring one kind of network that is trained alone may take.
_SECONDS_NETWORK = 2.0


def dry_run(
    config: SearchConfig, processes: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """What the search will cost, measured on a few steps of real paths. Writes nothing lasting.

    The paths measured are those of the initial pass, in which every edge tries every arm once: the
    mean of their times is that of paths drawn uniformly. Momentum of all weights is allocated, as
    it is towards the end of a search. Paths are trained as :class:`Adversarial` does.

    It takes about half a minute at most: where whole batches would take longer, smaller ones and
    fewer paths are measured, and the rest is extrapolated.

    Args:
        processes: networks that are trained alone at a time.
        progress: where it is shown what is measured; None shows nothing.

    Returns:
        ``epochs``; ``seconds_per_epoch`` (mean, with validation, paths that are only evaluated and
        the checkpoint), ``seconds_per_epoch_widest``, ``seconds_setup``, ``seconds_tuning`` (the
        epochs after the last pruning), ``seconds_final`` (the attack on the found path),
        ``networks`` that are trained from scratch, ``seconds_network`` (for each of them),
        ``seconds_supernet`` (before the first path), ``trainings_alone`` and ``seconds_alone`` (to
        score paths and in the tournament) and ``seconds_total`` of all; ``peak_memory_mb`` in MiB
        on those paths and ``peak_memory_mb_widest`` on the widest, which a search is unlikely to
        meet (a small batch extrapolated where ``memory_extrapolated``); ``paths_measured`` of
        ``paths``, with ``images_measured`` in a batch. On a CPU memory is the process's, so it is
        right in a process that did nothing before.

    Raises:
        OutOfMemoryError: not even this fits.
    """
    config = config.resolve()
    session = Session(config)
    shown = progress or Progress.silent()
    measuring = Preflight()
    with (
        shown.working(f"measuring a few steps of the space {config.space}") as say,
        torch_settings(config.threads, bool(config.deterministic)),
        session.oom_hint("in the dry run"),
    ):
        started = time.perf_counter()
        setup = build(config)
        seconds_setup = time.perf_counter() - started
        current = SearchRun(setup, session)
        for parameter in setup.supernet.parameters():
            setup.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        # The first steps of a process pay for what is loaded and planned once.
        bandit = config.make_bandit(setup.source)
        paths = [bandit.sample(ahead=True) for _ in range(bandit.arms)]
        largest = torch.as_tensor(setup.supernet.widest_path())
        images = measuring.images(config.batch_size, partial(_step, current, paths[0]))
        whole = images == config.batch_size
        if not whole:
            for name in ("weights", "statistics", "validation", "guard"):
                setattr(setup, name, getattr(setup, name).sized(images))
        _measure(current, paths[0])
        measured: list[dict[str, float]] = []
        parents: list[dict[str, float]] = []
        for choice in paths:
            if measured and measuring.over:
                break
            say(f"path {len(measured) + 1} of {len(paths)}, {images} images in a batch")
            measured.append(_measure(current, choice))
            if config.search_space().binary and config.cp.parent:
                # Each path is trained and scored in full precision too.
                use_full_precision(setup.supernet, True)
                parents.append(_measure(current, choice))
                use_full_precision(setup.supernet, False)
        mean = {name: sum(one[name] for one in measured) / len(measured) for name in measured[0]}
        for name in mean if parents else ():
            mean[name] += sum(one[name] for one in parents) / len(parents)
        save = seconds_to_save(current.state())
        say("the widest path, for memory")
        batch = max(config.batch_size, config.evaluation_batch_size)

        def peak_of(choice: Tensor) -> float:
            if whole:
                return peak_memory_mb(setup.device)
            step = partial(_step, current, choice)
            return measuring.peak_memory_mb(setup.device, batch, step)

        peak = peak_of(paths[0])
        widest = _measure(current, largest)
        peak_widest = max(peak, peak_of(largest))
        evaluations = config.bandit.evaluations_per_epoch
        # None in the initial pass.
        share = (bandit.total_samples - bandit.initial_samples) / bandit.total_samples

        def epoch(seconds: dict[str, float]) -> float:
            only_evaluated = seconds["statistics"] + seconds["validate"]
            return seconds["train"] + seconds["validate"] + evaluations * share * only_evaluated

        per_epoch = epoch(mean) + save
        final, epochs = config.final, bandit.total_samples
        tuning = final.tune_epochs * (mean["train"] + mean["validate"] + save)
        supernet = config.supernet.epochs * (mean["train"] + save)
        if config.supernet.epochs:
            # Paths are only evaluated then.
            per_epoch = mean["statistics"] + mean["validate"] + save
        if config.rewards == "alone":
            per_epoch = tuning = 0.0
        networks_trained, seconds_network = 0, 0.0
        if final.network_epochs:
            networks_trained = 1 + final.random_networks + final.reference
            say("a network trained from scratch")
            seconds_network = retrain_dry_run(
                networks.retrain_config(config, networks.REFERENCE),
                source=setup.source,
                genotype=networks.reference_genotype(config, setup.source),
                seconds=_SECONDS_NETWORK,
            )["seconds_total"]
        trainings = _trainings_alone(config, bandit.total_samples)
        reference = networks.reference_genotype(config, setup.source)
        alone = 0.0
        for length, count, at_once in trainings:
            one = retrain_dry_run(
                alone_settings(config, length),
                source=setup.source,
                genotype=reference,
                seconds=_SECONDS_NETWORK,
            )
            alone += math.ceil(count / min(processes, at_once)) * one["seconds_total"]
        return {
            "space": config.space,
            "data": setup.source.name,
            "epochs_tuning": final.tune_epochs,
            "network_epochs": final.network_epochs,
            "test_attack": config.final_threat().describe(),
            "paths": len(paths),
            "paths_measured": len(measured),
            "images_measured": images,
            "batch_size": config.batch_size,
            "memory_extrapolated": measuring.extrapolated,
            "epochs": epochs,
            "peak_memory_mb": peak,
            "peak_memory_mb_widest": peak_widest,
            "seconds_setup": seconds_setup,
            "seconds_per_epoch": per_epoch,
            "seconds_per_epoch_widest": epoch(widest) + save,
            "seconds_tuning": tuning,
            "seconds_supernet": supernet,
            "trainings_alone": sum(count for _, count, _ in trainings),
            "seconds_alone": alone,
            "seconds_final": mean["final"],
            "networks": networks_trained,
            "seconds_network": seconds_network,
            "seconds_total": seconds_setup
            + supernet
            + epochs * per_epoch
            + alone
            + tuning
            + mean["final"]
            + networks_trained * seconds_network,
            "parameters": sum(p.numel() for p in setup.supernet.parameters()),
            "device": config.device,
            "threads": torch.get_num_threads(),
        }


def _trainings_alone(config: SearchConfig, samples: int) -> list[tuple[int, int, int]]:
    """Networks that are trained alone: epochs, how many, and how many can be at a time.

    What follows where a supernet fails its check is not among them.
    """
    trainings = []
    if config.rewards == "alone":
        trainings.append((config.alone.epochs, samples + 1, config.alone.paths))
    elif config.supernet.epochs and config.supernet.check:
        trainings.append((config.alone.epochs, config.supernet.check, config.supernet.check))
    entries = config.final.tournament
    for epochs in config.final.rungs if entries else ():
        trainings.append((epochs, entries, entries))
        entries = max(1, math.ceil(config.final.keep * entries))
    return trainings


def _train(current: SearchRun, path: Path, loader: Loader) -> tuple[float, int]:
    """Train the path by the real step, which changes nothing at a learning rate of 0; seconds and
    images."""
    setup, cost, trial = current.setup, Cost(), current.trial
    assert isinstance(trial, Adversarial)
    setup.optimizer.param_groups[0]["lr"] = 0.0
    train_epoch(
        setup.supernet,
        loader,
        0,
        setup.optimizer,
        trial.threat,
        seed=0,
        cost=cost,
        grad_clip=current.config.grad_clip,
        **path.scope,
    )
    return cost.seconds["train"], cost.images_trained


def _step(current: SearchRun, choice: Tensor, images: int) -> None:
    """One training step of a path with so many images."""
    path = current.use_path([choice], None)
    reset_batchnorm(path.modules)
    _train(current, path, current.setup.weights.sized(images).first(1))


def _measure(current: SearchRun, choice: Tensor) -> dict[str, float]:
    """Seconds that each part of a search takes with this path, from a few batches."""
    config, setup = current.config, current.setup
    path = current.use_path([choice], None)
    trial = current.trial
    assert isinstance(trial, Adversarial)
    model, threat = setup.supernet, trial.threat

    def train(batches: int) -> tuple[float, int]:
        return _train(current, path, setup.weights.first(batches))

    def validate(threat: ThreatModel, batches: int) -> tuple[float, int]:
        few, cost = setup.validation.first(batches), Cost()
        evaluate(model, few, threat, seed=0, cost=cost, **path.scope)
        return cost.seconds["validate"], cost.images_evaluated

    recorded = current.engine.records
    reset_batchnorm(path.modules)
    train(1)
    training = measure_throughput(train, 3, recorded=recorded)
    # An evaluation is two forward passes and the steps of its attack.
    without = dataclasses.replace(trial.reward_threat, steps=0)
    validate(without, 1)
    clean = measure_throughput(partial(validate, without), 2, recorded=recorded).per_image
    reward = measure_throughput(partial(validate, trial.reward_threat), 3, recorded=recorded)
    step = max((reward.per_image - 2 * clean) / trial.reward_threat.steps, clean)
    final = 2 * clean + step * config.final.steps
    checked = 0.0
    if trial.guard is not None:
        attacks = trial.guard.attacks(threat)
        checked = sum(2 * clean + step * attack.steps for attack in attacks)
    cost = Cost()
    reestimate_batchnorm(model, setup.statistics, threat, count=2, seed=0, cost=cost, **path.scope)
    batches = min(2, len(setup.statistics))
    test = 0 if setup.test is None else len(setup.test.index)
    return {
        "train": training.of(len(setup.weights.index)),
        "validate": reward.of(len(setup.validation.index))
        + checked * len(setup.guard.index) / config.guard.every,
        "statistics": cost.seconds["statistics"]
        * min(FEW_STATISTICS_BATCHES * config.batch_size, len(setup.statistics.index))
        / min(batches * setup.statistics.batch_size, len(setup.statistics.index)),
        "final": final * (len(setup.validation.index) + test),
    }
