"""One adversarial epoch and one evaluation: what search and retraining share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit.attacks import perturb
from fastbandit.distributed import Team
from fastbandit.threat import ThreatModel

__all__ = [
    "Batches",
    "Cost",
    "DivergenceError",
    "Evaluation",
    "Objective",
    "Step",
    "TrainingResult",
    "cosine",
    "evaluate",
    "is_out_of_memory",
    "reestimate_batchnorm",
    "reset_batchnorm",
    "train_epoch",
]

Batch = tuple[Tensor, Tensor, Tensor]


class Batches(Protocol):
    """What a loader offers: its batches (images, labels, image ids) of a numbered epoch."""

    def epoch(self, number: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Step:
    """One mini-batch as an :class:`Objective` sees it.

    images: [N, C, H, W] in [0, 1]; labels, index: [N] int64, index the images' ids; seed, index
    and offset key the random start; modules and parameters are those that the forward pass uses.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    index: Tensor
    threat: ThreatModel
    seed: int
    offset: int
    modules: list[nn.Module]
    parameters: list[nn.Parameter]

    def perturb(self) -> Tensor:
        """The perturbation that the threat model finds for this batch."""
        return perturb(
            self.model,
            self.images,
            self.labels,
            self.threat,
            seed=self.seed,
            index=self.index,
            offset=self.offset,
            modules=self.modules,
            parameters=self.parameters,
        )


class Objective:
    """What training minimises on a mini-batch; this one is that of Algorithm 8, lines 10 to 13.

    Cross-entropy at the images that the threat model's attack gives, one step of the optimiser.
    A subclass overrides :meth:`losses` and, where its number of passes differs, :meth:`passes`.
    """

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (loss, logits [N, classes]) once for each step of the optimiser on this batch.

        The optimiser has made its step, and ``.grad`` of what the loss depends on is filled, when
        the generator goes on after a yield.
        """
        point = step.images
        if step.threat.attacks:
            point = point + step.perturb()
        logits = step.model(point)
        yield F.cross_entropy(logits, step.labels), logits

    def passes(self, threat: ThreatModel) -> tuple[int, int]:
        """Forward and backward passes that a mini-batch takes."""
        count = (threat.steps if threat.attacks else 0) + 1
        return count, count


class DivergenceError(ValueError):
    """The loss is no longer a number."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had.

    A GPU's allocator has a class for it. The CPU's and the libraries' raise RuntimeError, so their
    words have to be read.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


@dataclass
class Cost:
    """Work done, counted: seconds by phase, batches passed forward and backward, images."""

    seconds: dict[str, float] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0
    images_trained: int = 0
    images_evaluated: int = 0

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])
        self.seconds = dict(self.seconds)


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


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    for x, y, ids in batches.epoch(epoch):
        weight, counts = 1.0, True
        sharing: AbstractContextManager[None] = nullcontext()
        if team is not None:
            n = len(y)
            part, weight, counts = team.part(n), team.weight(n), team.counts(n)
            sharing = team.batch(n, used)
            x, y, ids = x[part], y[part], ids[part]
        batch_count += 1
        with sharing:
            step = Step(model, x, y, ids, threat, seed, epoch, used, learned)
            for loss, prediction in objective.losses(step):
                logits = prediction
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
        if not counts:
            continue
        # The last loss and logits of a batch, where it has several steps.
        with torch.no_grad():
            loss_sum += loss.double() * len(y)
            correct += (logits.argmax(1) == y).sum()
        images += len(y)
    mine = images
    if team is not None:
        team.average_batchnorm(used)
        sums = team.total(torch.stack([loss_sum, correct.double(), loss_sum.new_tensor(images)]))
        loss_sum, correct, images = sums[0], sums[1], int(sums[2])
    mean_loss = float(loss_sum) / images
    _synchronise(device)
    seconds = time.perf_counter() - started
    forward, backward = objective.passes(threat)
    cost.forward_passes += batch_count * forward
    cost.backward_passes += batch_count * backward
    cost.images_trained += mine
    cost.add_seconds("train", seconds)
    if not math.isfinite(mean_loss):
        raise DivergenceError(
            f"epoch {epoch}: the training loss is {mean_loss}; "
            "lower --learning-rate or set --grad-clip"
        )
    return TrainingResult(mean_loss, int(correct) / images, images, seconds)


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
) -> Evaluation:
    """Accuracy on clean and on attacked images, in evaluation mode, which is undone afterwards.

    Arguments as :func:`train_epoch`; ``offset`` numbers the random starts of this evaluation.
    """
    used = list(model.modules() if modules is None else modules)
    learned = list(model.parameters() if parameters is None else parameters)
    device = learned[0].device
    modes = [(module, module.training) for module in used]
    started = time.perf_counter()
    clean = torch.zeros((), dtype=torch.int64, device=device)
    robust = torch.zeros((), dtype=torch.int64, device=device)
    images = steps = 0
    try:
        for module, _ in modes:
            module.training = False
        for x, y, ids in batches.epoch(0):
            steps += 1
            if team is not None:
                part = team.share(len(y))
                x, y, ids = x[part], y[part], ids[part]
                if not len(y):
                    continue
            with torch.no_grad():
                clean += (model(x).argmax(1) == y).sum()
            if threat.attacks:
                delta = perturb(
                    model,
                    x,
                    y,
                    threat,
                    seed=seed,
                    index=ids,
                    offset=offset,
                    modules=used,
                    parameters=learned,
                )
                with torch.no_grad():
                    robust += (model(x + delta).argmax(1) == y).sum()
            images += len(y)
    finally:
        for module, was in modes:
            module.training = was
    mine = images
    if team is not None:
        clean, robust, total = team.total(torch.stack([clean, robust, clean.new_tensor(images)]))
        images = int(total)
    correct = int(clean)
    robust_correct = int(robust) if threat.attacks else correct
    seconds = time.perf_counter() - started
    passes = threat.steps if threat.attacks else 0
    cost.forward_passes += steps * (passes + (2 if threat.attacks else 1))
    cost.backward_passes += steps * passes
    cost.images_evaluated += mine
    cost.add_seconds("validate", seconds)
    return Evaluation(correct, robust_correct, images, seconds)


def reset_batchnorm(modules: Iterable[nn.Module]) -> None:
    """Forget the running statistics of every batch norm among ``modules``."""
    for module in modules:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()


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
    for x, y, ids in batches.epoch(0):
        sharing: AbstractContextManager[None] = nullcontext()
        if team is not None:
            part, sharing = team.part(len(y)), team.batch(len(y), used)
            x, y, ids = x[part], y[part], ids[part]
        with sharing:
            point = x
            if threat.attacks:
                point = x + perturb(
                    model, x, y, threat, seed=seed, index=ids, modules=used, parameters=learned
                )
            with torch.no_grad():
                model(point)
        steps += 1
        if steps == count:
            break
    if team is not None:
        team.average_batchnorm(used)
    passes = threat.steps if threat.attacks else 0
    cost.forward_passes += steps * (passes + 1)
    cost.backward_passes += steps * passes
    cost.add_seconds("statistics", time.perf_counter() - started)
