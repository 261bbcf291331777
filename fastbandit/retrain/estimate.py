"""What a retraining will cost, measured on a few batches."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from fastbandit.data import DataSource, Loader
from fastbandit.genotype import Genotype
from fastbandit.models import multiply_adds
from fastbandit.retrain.config import RetrainConfig
from fastbandit.retrain.genotypes import with_genotype
from fastbandit.retrain.loop import Retraining
from fastbandit.retrain.setup import build
from fastbandit.runs.cost import measure_throughput, seconds_to_save
from fastbandit.runs.environment import peak_memory_mb
from fastbandit.runs.preflight import Preflight
from fastbandit.runs.progress import Progress
from fastbandit.runs.session import Session, torch_settings
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, Engine, evaluate

__all__ = ["dry_run"]


def dry_run(
    config: RetrainConfig,
    *,
    source: DataSource | None = None,
    genotype: Genotype | None = None,
    progress: Progress | None = None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """What the retraining will cost, measured on a few batches. Writes nothing lasting.

    It takes about half a minute at most: where whole batches would take longer, smaller ones are
    measured and the rest is extrapolated.

    Args:
        progress: where it is shown what is measured; None shows nothing.
        seconds: what measuring may take; None: those of :class:`Preflight`.

    Returns:
        ``epochs``, ``parameters``, ``macs``, ``seconds_setup``, ``seconds_per_epoch`` (training,
        guard, validation and checkpoint), ``seconds_test``, ``seconds_total``,
        ``peak_memory_mb`` in MiB (of small batches, extrapolated, where ``memory_extrapolated``),
        ``images_measured`` in a batch, ``device``, ``threads``. On a CPU memory is the process's,
        so it is right in a process that did nothing before.

    Raises:
        OutOfMemoryError: not even this fits.
    """
    config, genotype = with_genotype(config.resolve(), genotype)
    session = Session(config)
    shown = progress or Progress.silent()
    measuring = Preflight(seconds)
    with (
        shown.working("measuring a few steps of the network") as say,
        torch_settings(config.threads, bool(config.deterministic)),
        session.oom_hint("in the dry run"),
    ):
        started = time.perf_counter()
        setup = build(config, genotype, None, source)
        seconds_setup = time.perf_counter() - started
        current = Retraining(setup, session)
        for group in setup.optimizer.param_groups:
            group["lr"] = 0.0

        def train(batches: int) -> tuple[float, int]:
            cost = current.cost = Cost()
            current.train(setup.weights.first(batches))
            return cost.seconds["train"], cost.images_trained

        def step(images: int) -> None:
            current.cost = Cost()
            current.train(setup.weights.sized(images).first(1))

        images = measuring.images(config.batch_size, step)
        say(f"training, {images} images in a batch")
        whole = images == config.batch_size
        if not whole:
            for name in ("weights", "validation", "guard", "test"):
                if (loader := getattr(setup, name)) is not None:
                    setattr(setup, name, loader.sized(images))

        def validate(
            loader: Loader, threat: ThreatModel, engine: Engine, batches: int
        ) -> tuple[float, int]:
            cost = Cost()
            few = loader.first(batches)
            evaluate(current.evaluated, few, threat, seed=0, cost=cost, engine=engine)
            return cost.seconds["validate"], cost.images_evaluated

        def validation(loader: Loader, threat: ThreatModel, batches: int) -> float:
            action = partial(validate, loader, threat, current.engine)
            throughput = measure_throughput(action, batches, recorded=current.engine.records)
            return throughput.of(len(loader.index))

        train(1)
        training = measure_throughput(train, 3, recorded=current.training_engine.records)
        seconds = training.of(len(setup.weights.index))
        say("validation")
        validation(setup.validation, current.selection, 1)
        seconds += validation(setup.validation, current.selection, 2) / config.selection.every
        if current.guard is not None:
            attacks = current.guard.attacks(current.threat)
            checked = sum(validation(setup.guard, attack, 2) for attack in attacks)
            seconds += checked / config.guard.every
        test = 0.0
        if setup.test is not None:
            engine = current.test_engine()
            final = partial(validate, setup.test, config.final_threat(), engine)
            test = measure_throughput(final, 1, recorded=engine.records).of(len(setup.test.index))
        seconds += seconds_to_save(current.state())
        batch = max(config.batch_size, config.evaluation_batch_size)
        peak = (
            peak_memory_mb(setup.device)
            if whole
            else measuring.peak_memory_mb(setup.device, batch, step)
        )
        plain = setup.architecture.build(genotype)
        return {
            "epochs": config.epochs,
            "parameters": sum(p.numel() for p in plain.parameters()),
            "macs": multiply_adds(plain, setup.source.train.shape),
            "peak_memory_mb": peak,
            "memory_extrapolated": measuring.extrapolated,
            "images_measured": images,
            "batch_size": config.batch_size,
            "data": setup.source.name,
            "test_attack": config.final_threat().describe(),
            "seconds_setup": seconds_setup,
            "seconds_per_epoch": seconds,
            "seconds_test": test,
            "seconds_total": seconds_setup + config.epochs * seconds + test,
            "device": config.device,
            "threads": torch.get_num_threads(),
        }
