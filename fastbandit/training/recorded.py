"""Steps that are recorded once and replayed: one of training, and one of evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastbandit.attacks._model import misclassified
from fastbandit.nn.norm import BatchNorm2d, Moves
from fastbandit.training.cuda_graphs import Recorded, Recorder
from fastbandit.training.halves import Halves
from fastbandit.training.keys import form_of, update_of
from fastbandit.training.objectives import Objective
from fastbandit.training.steps import Engine, Work, count_correct

__all__ = ["RecordedEvaluation", "RecordedTraining", "recorded_evaluation", "recorded_training"]


class RecordedTraining:
    """A training step on fixed buffers: attack, gradients, clipping, update.

    What may differ between its calls lies in tensors: the batch, the learning rate, the number of
    the draw, the factor of the running statistics.
    """

    def __init__(
        self,
        recorder: Recorder,
        engine: Engine,
        work: Work,
        tensors: tuple[Tensor, ...],
        optimizer: torch.optim.Optimizer,
        grad_clip: float | None,
        objective: Objective,
    ) -> None:
        device = tensors[-1].device
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self._rate = torch.zeros((), device=device)
        self._offset = torch.zeros((), dtype=torch.int64, device=device)
        self._held = work, optimizer  # a graph holds what it reads by address alone
        self._norms = [m for m in work.modules if isinstance(m, BatchNorm2d)]
        self._moves = Moves(self._norms)
        half = engine.input_dtype if engine.precision != "float32" else None
        halves = Halves(work.modules, half)
        self._values: tuple[float, ...] = ()

        def run(*buffers: Tensor) -> None:
            step = work.step(buffers, self._offset)
            with self._numbers_on_the_device(optimizer):
                with engine.autocast(device), halves.put():
                    loss, logits = next(objective.losses(step))
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                if grad_clip is not None:
                    nn.utils.clip_grad_norm_(work.parameters, grad_clip)
                optimizer.step()
                self._moves.make()
            with torch.no_grad():
                self.loss_sum += loss.double() * len(step.labels)
                self.correct += (~misclassified(logits, step.labels)).sum()

        self._step = Recorded(recorder, tensors, run)

    @contextmanager
    def _numbers_on_the_device(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Learning rate and factor as tensors; the counts of batches are left as they are."""
        seen = [norm.batches for norm in self._norms]
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            for norm in self._norms:
                norm.moves = self._moves
            for group in optimizer.param_groups:
                group["lr"] = self._rate
            yield
        finally:
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = lr
            for norm, count in zip(self._norms, seen, strict=True):
                norm.moves, norm.batches = None, count

    def start(self) -> None:
        self.loss_sum.zero_()
        self.correct.zero_()
        self._moves.start()

    def __call__(self, tensors: tuple[Tensor, ...], *, rate: float, offset: int) -> None:
        factor = 0.0
        for norm in self._norms:
            if norm.momentum is not None:
                factor = norm.momentum
                continue
            norm.batches += 1
            factor = 1.0 / norm.batches
        values = (rate, offset, factor)
        if values != self._values:
            self._rate.fill_(rate)
            self._offset.fill_(offset)
            self._moves.fill(factor)
            self._values = values
        self._step(*tensors)


def recorded_training(
    engine: Engine,
    work: Work,
    tensors: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    grad_clip: float | None,
    objective: Objective,
) -> RecordedTraining | None:
    """The step of this path as a graph; None where one factor does not serve its batch norms."""
    assert engine.graphs is not None
    norms = [m for m in work.modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    kinds = {(m.momentum, m.batches) if isinstance(m, BatchNorm2d) else None for m in norms}
    if None in kinds or len(kinds) > 1 or len(optimizer.param_groups) != 1:
        return None
    # A cumulative average has another factor in each of several passes.
    if objective.moving_passes > 1 and any(m.momentum is None for m in norms):
        return None
    key = (
        work.key,
        form_of(tensors),
        update_of(optimizer),
        grad_clip,
        engine.precision,
        type(objective),
        tuple(sorted(vars(objective).items())),
    )
    training: RecordedTraining = engine.graphs.recorded(
        "train",
        key,
        lambda recorder: RecordedTraining(
            recorder, engine, work, tensors, optimizer, grad_clip, objective
        ),
    )
    training.start()
    return training


class RecordedEvaluation:
    """One batch of an evaluation on fixed buffers; the model is in evaluation mode."""

    def __init__(
        self,
        recorder: Recorder,
        engine: Engine,
        work: Work,
        tensors: tuple[Tensor, ...],
    ) -> None:
        device = tensors[-1].device
        self.clean = torch.zeros((), dtype=torch.int64, device=device)
        self.robust = torch.zeros((), dtype=torch.int64, device=device)
        self._offset = torch.zeros((), dtype=torch.int64, device=device)
        self._work = work  # a graph holds what it reads by address alone

        def run(*buffers: Tensor) -> None:
            still_correct, withstood = count_correct(engine, work.step(buffers, self._offset))
            self.clean += still_correct
            self.robust += withstood

        self._step = Recorded(recorder, tensors, run)

    def __call__(self, tensors: tuple[Tensor, ...], *, offset: int) -> None:
        self._offset.fill_(offset)
        self._step(*tensors)

    def start(self) -> None:
        self.clean.zero_()
        self.robust.zero_()


def recorded_evaluation(
    engine: Engine, work: Work, tensors: tuple[Tensor, ...]
) -> RecordedEvaluation:
    assert engine.graphs is not None
    key = (work.key, form_of(tensors), engine.precision)
    evaluation: RecordedEvaluation = engine.graphs.recorded(
        "evaluate",
        key,
        lambda recorder: RecordedEvaluation(recorder, engine, work, tensors),
    )
    evaluation.start()
    return evaluation
