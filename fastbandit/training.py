"""One adversarial epoch and one evaluation: what search and retraining share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit._graphs import Graphs, Recorded, Recorder
from fastbandit._inputs import Batches, Input, ReadyInput, Start, input_of
from fastbandit.attacks import perturb, perturb_from
from fastbandit.attacks._model import check_answer, misclassified, with_autograd
from fastbandit.attacks.ball import perturbed
from fastbandit.distributed import Team
from fastbandit.nn.norm import BatchNorm2d, Moves
from fastbandit.threat import ThreatModel

__all__ = [
    "Batches",
    "Cost",
    "DivergenceError",
    "Engine",
    "Evaluation",
    "Graphs",
    "Objective",
    "Precision",
    "Step",
    "TrainingResult",
    "cosine",
    "evaluate",
    "is_out_of_memory",
    "reestimate_batchnorm",
    "reset_batchnorm",
    "train_epoch",
]

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Engine:
    """How steps are computed; what they compute stays the same, up to rounding.

    precision: ``bfloat16`` runs the model under autocast, which computes convolutions and matrix
    products in bfloat16; weights, gradients of weights, batch-norm statistics, logits, loss and the
    perturbation stay float32. graphs: None launches every kernel of every step.
    """

    precision: Precision = "float32"
    graphs: Graphs | None = None

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(
                f"precision: expected one of {', '.join(get_args(Precision))}, "
                f"got {self.precision!r}"
            )

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """What a forward pass runs in. Nothing is kept of the weights' copies: a step changes the
        weights, and a graph that is replayed must make its copies anew."""
        if self.precision == "float32":
            return nullcontext()
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)

    @property
    def input_dtype(self) -> torch.dtype:
        """What the first layer of a model computes in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    @property
    def records(self) -> bool:
        """Whether steps are recorded as graphs."""
        return self.graphs is not None and self.graphs.reason is None


_EAGER = Engine()


@dataclass(frozen=True)
class Step:
    """One mini-batch as an :class:`Objective` sees it.

    images: [N, C, H, W] in [0, 1]; labels, index: [N] int64, index the images' ids; seed, index
    and offset (a number, or an int64 tensor on the device) key the random start; modules and
    parameters are those that the forward pass uses. start: the beginning of the attack, where one
    pass over the bytes has drawn it, for one use.
    """

    model: nn.Module
    images: Tensor
    labels: Tensor
    index: Tensor
    threat: ThreatModel
    seed: int
    offset: int | Tensor
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    # Only for this step as it is: dataclasses.replace leaves it out.
    start: Start | None = field(default=None, init=False, repr=False, compare=False)

    def attacked(self, **options: Any) -> Any:
        """The model's logits at the images that the threat model's attack gives; without an
        attack, at the images.

        options: further arguments of the model's ``forward``.
        """
        if not self.threat.attacks:
            return self.model(self.images, **options)
        taken = None if self.start is None else self.start.take()
        if taken is None:
            return self.model(perturbed(self.images, self.perturb()), **options)
        point = self._continue(*taken)
        return self.model.forward_normalized(point, **options)  # type: ignore[operator]

    def _continue(self, delta: Tensor, point: Tensor) -> Tensor:
        """The attack from a start that is drawn; changes delta, returns the model's input."""
        return perturb_from(
            self.model,
            self.images,
            self.labels,
            self.threat,
            delta,
            point,
            modules=self.modules,
            parameters=self.parameters,
        )

    def perturb(self) -> Tensor:
        """The perturbation that the threat model finds for this batch."""
        taken = None if self.start is None else self.start.take()
        if taken is not None:
            self._continue(*taken)
            return taken[0]
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

    #: Forward passes of a step that move the running statistics of batch norm.
    moving_passes = 1
    #: Whether :meth:`losses` asks the step for its attack, which may then be drawn beforehand.
    attacks_by_step = True

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (loss, logits [N, classes]) once for each step of the optimiser on this batch.

        The optimiser has made its step, and ``.grad`` of what the loss depends on is filled, when
        the generator goes on after a yield.
        """
        logits = step.attacked()
        yield F.cross_entropy(logits, step.labels), logits

    @property
    def recordable(self) -> bool:
        """Whether a mini-batch can be recorded as a graph.

        It then has one step, and nothing but its attributes and the :class:`Step` bears on it. A
        subclass has to say so of itself.
        """
        return type(self) is Objective

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


def synchronise(device: torch.device) -> None:
    """Wait for what was launched, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _count_correct(engine: Engine, task: Step) -> tuple[Tensor, Tensor]:
    """Correctly classified images, clean and attacked (0 without an attack), on the device."""

    def correct(logits: Any) -> Tensor:
        return (~misclassified(check_answer(logits, task.images), task.labels)).sum()

    with engine.autocast(task.images.device), torch.no_grad():
        if not task.threat.attacks:
            clean = correct(task.model(task.images))
            return clean, torch.zeros_like(clean)
        # A copy: the model may change its input in place, and the attack begins at the images.
        return correct(task.model(task.images.clone())), correct(task.attacked())


def _is_plain(value: object) -> bool:
    """Whether ``value`` is a number, a text or a tuple of such, which compare by what they say."""
    if type(value) is tuple:
        return all(inner is None or _is_plain(inner) for inner in value)
    return type(value) in (bool, int, float, str)


def _place(tensor: Tensor) -> Hashable:
    """Where a recorded step finds ``tensor``, and what it takes it for."""
    form = tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad
    return id(tensor), tensor.data_ptr(), form


def _form(tensors: Iterable[Tensor]) -> Hashable:
    """Equal for batches that fit the same buffers."""
    return tuple((t.shape, t.dtype, t.stride(), t.device) for t in tensors)


def _settings(module: nn.Module) -> Hashable:
    """What decides what ``module`` computes and is no longer asked for in a recorded step: which
    module it is, its mode, its numbers, where its tensors lie."""
    own = vars(module)
    tensors = (*module._parameters.values(), *module._buffers.values())
    return (
        id(module),
        type(module),
        own.get("forward"),
        module._compiled_call_impl,
        tuple(_place(tensor) for tensor in tensors if tensor is not None),
        # A count of batches is no setting. Nor is None, so that an attribute which is put back to
        # the None of its class changes nothing.
        tuple((n, value) for n, value in own.items() if n != "batches" and _is_plain(value)),
    )


def _update(optimizer: torch.optim.Optimizer) -> Hashable:
    """The same of an optimiser, whose rate is told to a recorded step."""
    groups = []
    for group in optimizer.param_groups:
        state = [s for p in group["params"] for s in optimizer.state.get(p, {}).values()]
        tensors = [*group["params"], *(s for s in state if isinstance(s, Tensor))]
        plain = [(n, value) for n, value in group.items() if n != "lr" and _is_plain(value)]
        groups.append((tuple(map(_place, tensors)), tuple(plain)))
    return id(optimizer), tuple(groups)


@dataclass(frozen=True)
class _Work:
    """What the steps of an epoch have in common."""

    source: Input
    model: nn.Module
    threat: ThreatModel
    seed: int
    modules: list[nn.Module]
    parameters: list[nn.Parameter]

    @property
    def key(self) -> Hashable:
        """Equal for work that one recorded step can do: it does again what it did at first, on the
        same tensors, so all that decided that belongs here.

        Of two paths of a supernet it is the modules that differ: pools and identities have no
        parameters.
        """
        modules = tuple(map(_settings, dict.fromkeys([self.model, *self.modules])))
        parameters = tuple(map(_place, self.parameters))
        return self.source.key, self.threat, self.seed, modules, parameters

    @property
    def watched(self) -> bool:
        """Whether hooks look into a step. A recorded one would call them no more."""
        watches: list[Any] = [nn.modules.module._has_any_global_hook()]
        for module in (self.model, *self.modules):
            watches += [module._forward_hooks, module._forward_pre_hooks]
            watches += [module._backward_hooks, module._backward_pre_hooks]
        for parameter in self.parameters:
            watches += [parameter._backward_hooks, parameter._post_accumulate_grad_hooks]
        return any(watches)

    def step(self, tensors: tuple[Tensor, ...], offset: int | Tensor) -> Step:
        """The step on the batch that the source makes of ``tensors``."""
        x, y, ids, start = self.source.batch(tensors, self.seed, offset)
        step = Step(
            self.model,
            x,
            y,
            ids,
            self.threat,
            self.seed,
            offset,
            self.modules,
            self.parameters,
        )
        object.__setattr__(step, "start", start)  # the class is frozen
        return step


def _fill_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum of zeros where there is none yet, with which SGD's first step is the same.

    With some parameters that have momentum and some that have none, as in a supernet, SGD would
    go through them one by one, and its fused form would fail; a graph cannot make it.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if group["momentum"] == 0 or group["dampening"] != 0:
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if parameter.requires_grad and state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


class _RecordedTraining:
    """A training step on fixed buffers: attack, gradients, clipping, update.

    What may differ between its calls lies in tensors: the batch, the learning rate, the number of
    the draw, the factor of the running statistics.
    """

    def __init__(
        self,
        recorder: Recorder,
        engine: Engine,
        work: _Work,
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
        self._values: tuple[float, ...] = ()

        def run(*buffers: Tensor) -> None:
            step = work.step(buffers, self._offset)
            with self._numbers_on_the_device(optimizer):
                with engine.autocast(device):
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
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
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


def _recorded_training(
    engine: Engine,
    work: _Work,
    tensors: tuple[Tensor, ...],
    optimizer: torch.optim.Optimizer,
    grad_clip: float | None,
    objective: Objective,
) -> _RecordedTraining | None:
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
        _form(tensors),
        _update(optimizer),
        grad_clip,
        engine.precision,
        type(objective),
        tuple(sorted(vars(objective).items())),
    )
    found: _RecordedTraining = engine.graphs.recorded(
        "train",
        key,
        lambda recorder: _RecordedTraining(
            recorder, engine, work, tensors, optimizer, grad_clip, objective
        ),
    )
    found.start()
    return found


class _RecordedEvaluation:
    """One batch of an evaluation on fixed buffers; the model is in evaluation mode."""

    def __init__(
        self,
        recorder: Recorder,
        engine: Engine,
        work: _Work,
        tensors: tuple[Tensor, ...],
    ) -> None:
        device = tensors[-1].device
        self.clean = torch.zeros((), dtype=torch.int64, device=device)
        self.robust = torch.zeros((), dtype=torch.int64, device=device)
        self._offset = torch.zeros((), dtype=torch.int64, device=device)
        self._work = work  # a graph holds what it reads by address alone

        def run(*buffers: Tensor) -> None:
            found, withstood = _count_correct(engine, work.step(buffers, self._offset))
            self.clean += found
            self.robust += withstood

        self._step = Recorded(recorder, tensors, run)

    def __call__(self, tensors: tuple[Tensor, ...], *, offset: int) -> None:
        self._offset.fill_(offset)
        self._step(*tensors)

    def start(self) -> None:
        self.clean.zero_()
        self.robust.zero_()


def _recorded_evaluation(
    engine: Engine, work: _Work, tensors: tuple[Tensor, ...]
) -> _RecordedEvaluation:
    assert engine.graphs is not None
    key = (work.key, _form(tensors), engine.precision)
    found: _RecordedEvaluation = engine.graphs.recorded(
        "evaluate",
        key,
        lambda recorder: _RecordedEvaluation(recorder, engine, work, tensors),
    )
    found.start()
    return found


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
    engine: Engine = _EAGER,
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
    _fill_momentum(optimizer)
    recorded, usual = None, None
    source: Input = ReadyInput(batches)
    if objective.attacks_by_step:
        source = input_of(batches, model, threat, engine.input_dtype)
    work = _Work(source, model, threat, seed, used, learned)
    records = engine.records and objective.recordable and not work.watched
    for tensors in source.epoch(epoch):
        batch_count += 1
        n = len(tensors[-1])
        if batch_count == 1:
            usual = _form(tensors)
        elif records and _form(tensors) == usual:
            if recorded is None:
                recorded = _recorded_training(
                    engine, work, tensors, optimizer, grad_clip, objective
                )
                records = recorded is not None
            if recorded is not None:
                rate = optimizer.param_groups[0]["lr"]
                if learning_rate is not None:
                    rate = learning_rate(steps)
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                recorded(tensors, rate=rate, offset=epoch)
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
    mine = images
    if team is not None:
        team.average_batchnorm(used)
        sums = team.total(torch.stack([loss_sum, correct.double(), loss_sum.new_tensor(images)]))
        loss_sum, correct, images = sums[0], sums[1], int(sums[2])
    mean_loss = float(loss_sum) / images
    synchronise(device)
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
    engine: Engine = _EAGER,
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
        work = _Work(
            input_of(batches, model, threat, engine.input_dtype), model, threat, seed, used, learned
        )
        records = engine.records and not work.watched
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
                usual = _form(tensors)
            elif records and _form(tensors) == usual:
                recorded = recorded or _recorded_evaluation(engine, work, tensors)
                recorded(tensors, offset=offset)
                continue
            found, withstood = _count_correct(engine, work.step(tensors, offset))
            clean += found
            robust += withstood
    finally:
        for module, was in modes:
            module.training = was
    if recorded is not None:
        clean += recorded.clean
        robust += recorded.robust
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
    engine: Engine = _EAGER,
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
    work = _Work(source, model, threat, seed, used, learned)
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
