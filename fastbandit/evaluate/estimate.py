"""What an evaluation can take at most, measured on a few batches."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit.attacks._model import Oracle, cross_entropy, with_autograd
from fastbandit.evaluate.config import EvaluateConfig
from fastbandit.evaluate.run import begun, memory_enough_for
from fastbandit.model_code import ModelCode
from fastbandit.runs.environment import peak_memory_mb
from fastbandit.runs.preflight import Preflight
from fastbandit.runs.progress import Progress
from fastbandit.training.cost import synchronise

__all__ = ["dry_run"]


@with_autograd
def dry_run(
    model: nn.Module | ModelCode | str | Path,
    config: EvaluateConfig,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The most that the evaluation can take, from a few batches. Writes nothing.

    Args:
        progress: where it is shown what is measured; None shows nothing.

    Returns:
        ``images``; ``seconds_forward`` and ``seconds_backward`` of one image; ``seconds_most``, if
        no image ever fell, and ``seconds_clean``; ``attacks`` by name; ``peak_memory_mb`` (of small
        batches, extrapolated, where ``memory_extrapolated``).
    """
    shown, measuring = progress or Progress.silent(), Preflight()
    with (
        shown.working("measuring a few batches of the model") as say,
        memory_enough_for(config),
        begun(model, config) as current,
    ):
        subject, config, device = current.subject, current.config, current.device
        times = {}
        attacked = subject.network if subject.fast is None else subject.fast
        with Oracle(attacked, precision=getattr(torch, config.precision)) as oracle:

            def batch(images: int) -> tuple[Tensor, Tensor]:
                few = torch.arange(images)
                return current.pixels(few), current.labels[few].to(device)

            def step(images: int) -> None:
                pixels, labels = batch(images)
                oracle.gradient(pixels, cross_entropy, labels)
                synchronise(device)

            size = min(config.batch_size, current.n)
            images = measuring.images(size, step)
            x, y = batch(images)
            say(f"{images} images in a batch")
            for name, action in (
                ("forward", lambda: oracle.logits(x)),
                ("both", lambda: oracle.gradient(x, cross_entropy, y)),
            ):
                action()
                synchronise(device)
                started = time.perf_counter()
                for _ in range(3):
                    action()
                synchronise(device)
                times[name] = (time.perf_counter() - started) / 3 / images
            peak = (
                peak_memory_mb(device)
                if images == size
                else measuring.peak_memory_mb(device, size, step)
            )
        backward = max(times["both"] - times["forward"], 0.0)
        most = 0.0
        for name, grid in current.grids.items():
            n = min(config.checks.images, current.n) if name == "checks" else current.n
            most += n * sum(
                plan.forward * times["forward"] + plan.backward * backward for plan in grid.plans
            )
        return {
            "images": current.n,
            "data": current.source.name,
            "attacks": [plan.name for plan in current.grids["radius0"].plans],
            "seconds_forward": times["forward"],
            "seconds_backward": backward,
            "seconds_clean": times["forward"] * current.n * current.grids["clean"].plans[0].forward,
            "seconds_most": most,
            "peak_memory_mb": peak,
            "memory_extrapolated": measuring.extrapolated,
            "device": config.device,
            "threads": torch.get_num_threads(),
        }
