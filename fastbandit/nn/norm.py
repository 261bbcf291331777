"""Normalisation: of a network's input, and batch norm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.nn.shortcuts import Plain

__all__ = [
    "BatchNorm2d",
    "Moves",
    "Normalize",
    "is_batch_norm",
    "reset_running_stats",
    "set_eps",
    "use_cumulative_average",
]


class Normalize(nn.Module):
    """(x - mean) / std for each channel: the first layer of every model, whose input is in [0, 1].

    Args:
        channels: channels of the input.
        mean, std: one number for each channel, or one for all; None stands for 0 and 1.

    Raises:
        ValueError: their number is not ``channels``, or a std is not positive and finite.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels: int,
        mean: Sequence[float] | float | None = None,
        std: Sequence[float] | float | None = None,
    ) -> None:
        super().__init__()
        for name, given, default in (("mean", mean, 0.0), ("std", std, 1.0)):
            values = default if given is None else given
            vector = [values] * channels if isinstance(values, int | float) else list(values)
            vector = [float(value) for value in vector]
            if len(vector) != channels:
                raise ValueError(
                    f"Normalize: {name}: expected 1 number or {channels}, got {len(vector)}"
                )
            if not all(map(math.isfinite, vector)) or (name == "std" and min(vector) <= 0):
                kind = "positive finite" if name == "std" else "finite"
                raise ValueError(f"Normalize: {name}: expected {kind} numbers, got {vector}")
            self.register_buffer(name, torch.tensor(vector).view(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose cumulative average costs no host synchronisation.

    As ``torch.nn.BatchNorm2d`` (same parameters, buffers and state dict), including
    ``track_running_stats``: set to False in training mode it uses batch statistics and leaves the
    running ones alone. With ``momentum=None`` the running statistics are the mean over all batches
    since the last :meth:`reset_running_stats`; torch reads their number back from the device at
    every forward, here it is a Python integer that is written to ``num_batches_tracked`` when the
    state is saved. With a momentum batches are not counted.

    Raises:
        ValueError: in training mode with a single value for each channel (N = H = W = 1), whose
            variance does not exist.
    """

    batches: int  # seen since the last reset, in cumulative mode; set by reset_running_stats
    # In a step that is recorded once and replayed: what moves the running statistics, by a factor
    # that lies on the device, since a Python number would be replayed too. None: this layer does.
    moves: Moves | None = None
    # Normalises with the statistics of several processes: (x, weight, bias, running mean and
    # variance or None, factor, eps) -> y. None: those of the batch at hand.
    synchronise: Callable[..., Tensor] | None = None

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, affine=affine)

    def reset_running_stats(self) -> None:
        if self.track_running_stats:
            self.batches = 0
        super().reset_running_stats()

    def forward(self, x: Tensor) -> Tensor:
        term = self.term(x)
        return term if isinstance(term, Tensor) else term.close()

    def term(self, x: Tensor) -> Tensor | ops.Normalized:
        """:meth:`forward` as a term of :func:`fastbandit.ops.norm_sum`.

        Normalised already, except with the statistics of the batch at hand.
        """
        if not self.training:
            if self.moves is not None:
                self.moves.make()
            return torch.batch_norm(
                x, self.weight, self.bias, self.running_mean, self.running_var,
                False, 0.0, self.eps, torch.backends.cudnn.enabled,
            )  # fmt: skip
        if x.numel() == x.size(1):
            raise ValueError(
                f"BatchNorm2d: training needs more than one value for each channel, "
                f"got a batch of shape {tuple(x.shape)}"
            )
        if not self.track_running_stats:
            if self.synchronise is not None:
                return self.synchronise(x, self.weight, self.bias, None, 0.0, self.eps)
            return ops.Normalized(x, self.weight, self.bias, eps=self.eps)
        factor = self.next_factor()
        if self.moves is not None and self.running_mean is not None:
            # With a momentum of 1 the running statistics are those of the batch.
            mean, var = self.moves.take(self)
            keep = partial(self.moves.keep, self)
            return ops.Normalized(x, self.weight, self.bias, mean, var, 1.0, self.eps, keep=keep)
        if self.synchronise is not None:
            running = (self.running_mean, self.running_var)
            return self.synchronise(x, self.weight, self.bias, running, factor, self.eps)
        return ops.Normalized(
            x, self.weight, self.bias, self.running_mean, self.running_var, factor, self.eps
        )

    def fold(self, weight: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that is ``weight``'s and this after it, in evaluation
        mode with running statistics; several weights are of convolutions side by side."""
        mean, variance = self.running_mean, self.running_var
        assert mean is not None
        assert variance is not None
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        bias = -mean * scale if self.bias is None else self.bias - mean * scale
        joined = torch.cat(weight) if isinstance(weight, tuple) else weight
        return joined * scale.view(-1, 1, 1, 1), bias

    def next_factor(self) -> float:
        """By how much the running statistics move towards those of one more batch; counts it."""
        if self.momentum is not None:
            return self.momentum
        self.batches += 1
        return 1.0 / self.batches

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.fill_(self.batches)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if self.num_batches_tracked is not None:
            self.batches = int(self.num_batches_tracked)


is_batch_norm = Plain(BatchNorm2d)


class Moves:
    """The running statistics of many batch norms, moved by one operation in place of three each.

    For a step that is recorded: a layer whose ``moves`` this is has the statistics of its batch
    written to buffers of this object, and :meth:`make` moves the running ones of all layers that
    did. Whatever reads a running statistic in between calls it first.

    Args:
        norms: those that may take part.
    """

    def __init__(self, norms: Iterable[BatchNorm2d]) -> None:
        self._batch: dict[BatchNorm2d, tuple[Tensor, Tensor]] = {}
        widths: dict[torch.dtype, int] = {}
        for norm in norms:
            if (mean := norm.running_mean) is not None:
                self._batch[norm] = mean.new_zeros(len(mean)), mean.new_zeros(len(mean))
                widths[mean.dtype] = max(len(mean), widths.get(mean.dtype, 0))
        # As many numbers as the widest layer has channels: the one operation wants its three
        # lists alike.
        self._factors = {
            dtype: next(iter(self._batch)).running_mean.new_zeros(width, dtype=dtype)  # type: ignore
            for dtype, width in widths.items()
        }
        self._waiting: dict[BatchNorm2d, tuple[Tensor, Tensor]] = {}

    def start(self) -> None:
        """Forget old batches: torch takes 0 times what lies in a buffer, which is NaN for a NaN."""
        for batch in self._batch.values():
            torch._foreach_zero_(batch)

    def fill(self, factor: float) -> None:
        """By how much the next steps move."""
        for tensor in self._factors.values():
            tensor.fill_(factor)

    def take(self, norm: BatchNorm2d) -> tuple[Tensor, Tensor]:
        """Mean and variance [C] for ``norm`` to write, which :meth:`make` takes account of."""
        if norm in self._waiting:
            self.make()
        self._waiting[norm] = self._batch[norm]
        return self._batch[norm]

    def keep(self, norm: BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
        """Take account of these in place of what ``norm`` would have written."""
        self._waiting[norm] = mean, variance

    @torch.no_grad()
    def make(self) -> None:
        """running <- running + factor (batch - running), for all that wait."""
        running: list[Tensor] = []
        batch: list[Tensor] = []
        for norm, statistics in self._waiting.items():
            running += [norm.running_mean, norm.running_var]  # type: ignore[list-item]
            batch += statistics
        self._waiting.clear()
        if running:
            factors = [self._factors[tensor.dtype][: len(tensor)] for tensor in running]
            torch._foreach_lerp_(running, batch, factors)


def use_cumulative_average(module: nn.Module) -> None:
    """Switch every BatchNorm2d in ``module`` to cumulative averages (``momentum=None``)."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.momentum = None


def set_eps(module: nn.Module, eps: float) -> None:
    """Let every BatchNorm2d in ``module`` add ``eps`` to the variance."""
    for layer in module.modules():
        if isinstance(layer, BatchNorm2d):
            layer.eps = eps


def reset_running_stats(modules: Iterable[nn.Module]) -> None:
    """Forget the running statistics of those of ``modules`` that are batch norms.

    The modules themselves are looked at, not their children: pass ``model.modules()`` or
    ``supernet.path_modules()``.
    """
    for layer in modules:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.reset_running_stats()
