"""An epoch of a supernet in which every batch trains another path."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastbandit.attacks._model import misclassified
from fastbandit.nn.supernet import Supernet
from fastbandit.threat import ThreatModel
from fastbandit.training.batches import Batches, input_of
from fastbandit.training.cost import Cost
from fastbandit.training.epoch import TrainingResult, end_epoch
from fastbandit.training.objectives import Objective
from fastbandit.training.steps import EAGER, Engine, Work, fill_momentum

__all__ = ["train_paths"]


def train_paths(
    supernet: Supernet,
    batches: Batches,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    threat: ThreatModel,
    *,
    paths: Iterator[Tensor],
    seed: int,
    cost: Cost,
    grad_clip: float | None = None,
    learning_rate: Callable[[int], float],
    engine: Engine = EAGER,
) -> TrainingResult:
    """One epoch of adversarial training, a path of its own for each batch.

    Weights that a batch's path does not use stay as they are, momentum included. Running
    statistics of batch norms are of no use afterwards: they are of many paths.

    Args:
        supernet, batches, epoch, optimizer, threat, seed, cost, grad_clip, engine: as in
            :func:`train_epoch`; no step is recorded, since each is another.
        paths: the choice [rows] of each batch.
        learning_rate: the rate of the step of that number, counted within this epoch.

    Raises:
        DivergenceError: the loss became NaN or infinite.
    """
    device = next(supernet.parameters()).device
    objective = Objective()
    supernet.train()
    started = time.perf_counter()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    images = steps = 0
    source = input_of(batches, supernet, threat, engine.input_dtype)
    for tensors in source.epoch(epoch):
        supernet.set_path(next(paths))
        learned = list(supernet.path_parameters())
        work = Work(source, supernet, threat, seed, list(supernet.path_modules()), learned)
        optimizer.param_groups[0]["params"] = learned
        optimizer.param_groups[0]["lr"] = learning_rate(steps)
        fill_momentum(optimizer)
        step = work.step(tensors, epoch)
        with engine.autocast(device):
            loss, logits = next(objective.losses(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if grad_clip is not None:
            nn.utils.clip_grad_norm_(learned, grad_clip)
        optimizer.step()
        steps += 1
        with torch.no_grad():
            loss_sum += loss.double() * len(step.labels)
            correct += (~misclassified(logits, step.labels)).sum()
        images += len(step.labels)
    return end_epoch(
        f"epoch {epoch + 1}: the training loss of the supernet",
        float(loss_sum),
        correct,
        images,
        started,
        device,
        objective.passes(threat),
        cost=cost,
        batches=steps,
        own_images=images,
    )
