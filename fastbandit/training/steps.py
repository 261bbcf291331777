"""How one step is computed: its precision, batch and attack, and what an epoch's steps share."""

from __future__ import annotations

from collections.abc import Hashable, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastbandit.attacks import perturb, perturb_from
from fastbandit.attacks._model import check_answer, misclassified
from fastbandit.attacks.ball import perturbed
from fastbandit.threat import ThreatModel
from fastbandit.training.batches import Input, Start
from fastbandit.training.cuda_graphs import Graphs
from fastbandit.training.keys import place_of, settings_of

__all__ = ["EAGER", "Engine", "Precision", "Step", "Work", "count_correct", "fill_momentum"]

Precision = Literal["float32", "bfloat16"]

# A recording takes as long as two or three eager steps, and the first batch is eager.
LEAST_BATCHES = 4


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

    def records_epoch(self, batches: Any) -> bool:
        """The same for the steps on ``batches``: not where they say that they are less than
        LEAST_BATCHES."""
        return self.records and not (isinstance(batches, Sized) and len(batches) < LEAST_BATCHES)


EAGER = Engine()


@dataclass(frozen=True)
class Step:
    """One mini-batch as an :class:`~fastbandit.training.Objective` sees it.

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


@dataclass(frozen=True)
class Work:
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
        modules = tuple(map(settings_of, dict.fromkeys([self.model, *self.modules])))
        parameters = tuple(map(place_of, self.parameters))
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


def count_correct(engine: Engine, task: Step) -> tuple[Tensor, Tensor]:
    """Correctly classified images, clean and attacked (0 without an attack), on the device."""

    def correct(logits: Any) -> Tensor:
        return (~misclassified(check_answer(logits, task.images), task.labels)).sum()

    with engine.autocast(task.images.device), torch.no_grad():
        if not task.threat.attacks:
            clean = correct(task.model(task.images))
            return clean, torch.zeros_like(clean)
        # A copy: the model may change its input in place, and the attack begins at the images.
        return correct(task.model(task.images.clone())), correct(task.attacked())


def fill_momentum(optimizer: torch.optim.Optimizer) -> None:
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
