"""One adversarial epoch and one evaluation: what search and retraining share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastbandit.attacks._model import misclassified, with_autograd
from fastbandit.distributed import Team
from fastbandit.nn.norm import reset_running_stats as reset_batchnorm
from fastbandit.threat import ThreatModel
from fastbandit.training.batches import Batches, Input, ReadyInput, input_of
from fastbandit.training.cost import Cost, synchronise
from fastbandit.training.keys import form_of
from fastbandit.training.objectives import Objective
from fastbandit.training.recorded import recorded_evaluation, recorded_training
from fastbandit.training.steps import EAGER, Engine, Work, count_correct, fill_momentum

__all__ = [
    "DivergenceError",
    "Evaluation",
    "TrainingResult",
    "cosine",
    "end_epoch",
    "evaluate",
    "reestimate_batchnorm",
    "reset_batchnorm",
    "train_epoch",
]


class DivergenceError(ValueError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class TrainingResult:
    """loss: mean cross-entropy on the attacked images; accuracy: in [0, 1], on the same."""

    loss: float
    accuracy: float
    images: int
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Correctly classified images out of ``images``, clean and under attack."""

    clean_correct: int
    robust_correct: int
    images: int
    seconds: float

    @property
    def clean_accuracy(self) -> float:
        return self.clean_correct / self.images

    @property
    def robust_accuracy(self) -> float:
        return self.robust_correct / self.images


def cosine(epoch: int, epochs: int, peak: float, lowest: float = 0.0) -> float:
    """Learning rate of one epoch of ``epochs``: a half cosine from ``peak`` to ``lowest``."""
    return lowest + (peak - lowest) * 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))


def train_epoch(
    model: nn.Module,
    batches: Batches,
    epoch: int,
    optimizer: torch.optim.Optimizer,
    threat: ThreatModel,
    *,
    seed: int,
    cost: Cost,
    grad_clip: float | None = None,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    team: Team | None = None,
    objective: Objective | None = None,
    learning_rate: Callable[[int], float] | None = None,
    after_step: Callable[[], None] | None = None,
    engine: Engine = EAGER,
) -> TrainingResult:
    """One epoch of adversarial training: lines 10 to 13 of Algorithm 8 for every mini-batch.

    Args:
        model: logits for images in [0, 1]; left in train mode.
        batches: gives this epoch's (images, labels, image ids).
        epoch: number of the epoch; the random start is drawn anew from (seed, image id, epoch).
        optimizer: one of its steps is the algorithm's ``theta <- theta - grad``.
        threat: the adversary trained against; without steps this is ordinary training.
        cost: the ledger that this epoch is added to.
        grad_clip: largest 2-norm of the gradient, None for no clipping.
        modules, parameters: those the forward pass uses (default: all of the model's).
        team: the processes that share this epoch; :meth:`Team.use` has been called. The result
            is that of the team, the cost this process's.
        objective: what is minimised; None is Algorithm 8.
        learning_rate: the rate of the optimiser's step of that number, counted within this epoch;
            None leaves the optimiser's own.
        after_step: called after each step of the optimiser, as for averaging weights.
        engine: precision and CUDA graphs. Of a graph the first batch of an epoch is computed as
            ever, and every batch of another size; another objective than Algorithm 8's, too.

    The host waits for the device once, at the end.

    Raises:
        DivergenceError: the loss became NaN or infinite.
    """
    used = list(model.modules() if modules is None else modules)
    learned = list(model.parameters() if parameters is None else parameters)
    device = learned[0].device
    model.train()
    started = time.perf_counter()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    images = batch_count = steps = 0
    objective = Objective() if objective is None else objective
    updated = [p for group in optimizer.param_groups for p in group["params"]] if team else learned
    fill_momentum(optimizer)
    recorded, usual = None, None
    source: Input = ReadyInput(batches)
    if objective.attacks_by_step:
        source = input_of(batches, model, threat, engine.input_dtype)
    work = Work(source, model, threat, seed, used, learned)
    records = engine.records_epoch(batches) and objective.recordable and not work.watched
    for tensors in source.epoch(epoch):
        batch_count += 1
        n = len(tensors[-1])
        if batch_count == 1:
            usual = form_of(tensors)
        elif records and form_of(tensors) == usual:
            if recorded is None:
                recorded = recorded_training(engine, work, tensors, optimizer, grad_clip, objective)
                records = recorded is not None
            if recorded is not None:
                lr = optimizer.param_groups[0]["lr"]
                if learning_rate is not None:
                    lr = learning_rate(steps)
                    for group in optimizer.param_groups:
                        group["lr"] = lr
                recorded(tensors, rate=lr, offset=epoch)
                steps += 1
                if after_step is not None:
                    after_step()
                images += n
                continue
        weight, counts = 1.0, True
        sharing: AbstractContextManager[None] = nullcontext()
        if team is not None:
            part, weight, counts = team.part(n), team.weight(n), team.counts(n)
            sharing = team.batch(n, used)
            tensors = tuple(tensor[part] for tensor in tensors)
        with sharing:
            step = work.step(tensors, epoch)
            losses = objective.losses(step)
            while True:
                # Forward passes and attacks only: the backward pass of a step knows by itself.
                with engine.autocast(device):
                    try:
                        loss, logits = next(losses)
                    except StopIteration:
                        break
                if learning_rate is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(steps)
                optimizer.zero_grad(set_to_none=True)
                (loss if team is None else weight * loss).backward()
                if team is not None:
                    team.combine()
                if grad_clip is not None:
                    nn.utils.clip_grad_norm_(updated, grad_clip)
                optimizer.step()
                steps += 1
                if after_step is not None:
                    after_step()
        if counts:
            # The last loss and logits of a batch, where it has several steps.
            with torch.no_grad():
                loss_sum += loss.double() * len(step.labels)
                correct += (~misclassified(logits, step.labels)).sum()
            images += len(step.labels)
        # The nodes of a backward pass remember their stream, and a graph is recorded on another.
        del step, losses, loss, logits
    if recorded is not None:
        loss_sum += recorded.loss_sum
        correct += recorded.correct
    own_images = images
    if team is not None:
        team.average_batchnorm(used)
        sums = team.total(torch.stack([loss_sum, correct.double(), loss_sum.new_tensor(images)]))
        loss_sum, correct, images = sums[0], sums[1], int(sums[2])
    return end_epoch(
        f"epoch {epoch + 1}: the training loss",
        float(loss_sum),
        correct,
        images,
        started,
        device,
        objective.passes(threat),
        cost=cost,
        batches=batch_count,
        own_images=own_images,
    )


def end_epoch(
    what: str,
    loss_sum: float,
    correct: Tensor,
    images: int,
    started: float,
    device: torch.device,
    passes: tuple[int, int],
    *,
    cost: Cost,
    batches: int,
    own_images: int,
) -> TrainingResult:
    """The result of an epoch of training, which enters the ledger.

    Args:
        what: begins the message of an error.
        loss_sum, correct, images: of all processes.
        started: on the clock of :func:`time.perf_counter`.
        passes: forward and backward passes of a batch.
        batches, own_images: batches, and images of this process.

    Raises:
        DivergenceError: the loss became NaN or infinite.
    """
    mean_loss = loss_sum / images
    synchronise(device)
    seconds = time.perf_counter() - started
    cost.forward_passes += batches * passes[0]
    cost.backward_passes += batches * passes[1]
    cost.images_trained += own_images
    cost.add_seconds("train", seconds)
    if not math.isfinite(mean_loss):
        raise DivergenceError(f"{what} is {mean_loss}; lower --learning-rate or set --grad-clip")
    return TrainingResult(mean_loss, int(correct) / images, images, seconds)


@with_autograd
def evaluate(
    model: nn.Module,
    batches: Batches,
    threat: ThreatModel,
    *,
    seed: int,
    cost: Cost,
    offset: int = 0,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    team: Team | None = None,
    engine: Engine = EAGER,
) -> Evaluation:
    """Accuracy on clean and on attacked images, in evaluation mode, which is undone afterwards.

    Arguments as :func:`train_epoch`; ``offset`` numbers the random starts of this evaluation. An
    answer that is not finite is no correct one.

    Raises:
        TypeError, ValueError: the model's answer is no logits [N, classes].
    """
    used = list(model.modules() if modules is None else modules)
    learned = list(model.parameters() if parameters is None else parameters)
    device = learned[0].device
    modes = [(module, module.training) for module in used]
    started = time.perf_counter()
    clean = torch.zeros((), dtype=torch.int64, device=device)
    robust = torch.zeros((), dtype=torch.int64, device=device)
    images = steps = 0
    recorded, usual = None, None
    try:
        for module, _ in modes:
            module.training = False
        work = Work(
            input_of(batches, model, threat, engine.input_dtype), model, threat, seed, used, learned
        )
        records = engine.records_epoch(batches) and not work.watched
        for tensors in work.source.epoch(0):
            steps += 1
            if team is not None:
                part = team.share(len(tensors[-1]))
                tensors = tuple(tensor[part] for tensor in tensors)
            n = len(tensors[-1])
            if not n:
                continue
            images += n
            if steps == 1:
                usual = form_of(tensors)
            elif records and form_of(tensors) == usual:
                recorded = recorded or recorded_evaluation(engine, work, tensors)
                recorded(tensors, offset=offset)
                continue
            still_correct, withstood = count_correct(engine, work.step(tensors, offset))
            clean += still_correct
            robust += withstood
    finally:
        for module, was in modes:
            module.training = was
    if recorded is not None:
        clean += recorded.clean
        robust += recorded.robust
    own_images = images
    if team is not None:
        clean, robust, total = team.total(torch.stack([clean, robust, clean.new_tensor(images)]))
        images = int(total)
    correct = int(clean)
    robust_correct = int(robust) if threat.attacks else correct
    seconds = time.perf_counter() - started
    passes = threat.steps if threat.attacks else 0
    cost.forward_passes += steps * (passes + (2 if threat.attacks else 1))
    cost.backward_passes += steps * passes
    cost.images_evaluated += own_images
    cost.add_seconds("validate", seconds)
    return Evaluation(correct, robust_correct, images, seconds)


def reestimate_batchnorm(
    model: nn.Module,
    batches: Batches,
    threat: ThreatModel,
    *,
    count: int,
    seed: int,
    cost: Cost,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
    team: Team | None = None,
    engine: Engine = EAGER,
) -> None:
    """Batch-norm statistics for a path that is evaluated without having been trained last.

    They are reset and averaged over ``count`` training batches, attacked as in training, because
    that is what a trained path's statistics are the average of. No weight changes.
    """
    used = list(model.modules() if modules is None else modules)
    learned = list(model.parameters() if parameters is None else parameters)
    started = time.perf_counter()
    reset_batchnorm(used)
    model.train()
    steps = 0
    source = input_of(batches, model, threat, engine.input_dtype)
    work = Work(source, model, threat, seed, used, learned)
    for tensors in source.epoch(0):
        sharing: AbstractContextManager[None] = nullcontext()
        if team is not None:
            n = len(tensors[-1])
            part, sharing = team.part(n), team.batch(n, used)
            tensors = tuple(tensor[part] for tensor in tensors)
        step = work.step(tensors, 0)
        with sharing, engine.autocast(step.images.device), torch.no_grad():
            step.attacked()
        steps += 1
        if steps == count:
            break
    if team is not None:
        team.average_batchnorm(used)
    passes = threat.steps if threat.attacks else 0
    cost.forward_passes += steps * (passes + 1)
    cost.backward_passes += steps * passes
    synchronise(learned[0].device)
    cost.add_seconds("statistics", time.perf_counter() - started)
