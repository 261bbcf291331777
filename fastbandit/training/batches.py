"""Where a step's images come from: ready batches, or one pass over the bytes that also draws the
random start and writes what the model reads first.

The pass gives the bits of the single operations, so which of the two is taken changes no result.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastbandit.data import Loader
from fastbandit.nn.network import Network
from fastbandit.nn.norm import Normalize
from fastbandit.nn.shortcuts import Plain
from fastbandit.nn.supernet import Supernet
from fastbandit.threat import ThreatModel

__all__ = ["Batch", "Batches", "BytesInput", "Input", "ReadyInput", "Start", "input_of"]

Batch = tuple[Tensor, Tensor, Tensor]


class Batches(Protocol):
    """What a loader offers: its batches (images, labels, image ids) of a numbered epoch."""

    def epoch(self, number: int) -> Iterator[Batch]: ...


class Start:
    """The perturbation that an attack begins with, and the normalised input that belongs to it.

    An attack changes both in place, so they can be taken once.
    """

    def __init__(self, delta: Tensor, point: Tensor) -> None:
        self._taken: tuple[Tensor, Tensor] | None = (delta, point)

    def take(self) -> tuple[Tensor, Tensor] | None:
        """(delta, point) at the first call, None afterwards."""
        taken, self._taken = self._taken, None
        return taken


@dataclass(frozen=True)
class ReadyInput:
    """Batches that come as tensors of images."""

    batches: Batches

    @property
    def key(self) -> Hashable:
        return None

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        """What :meth:`batch` needs of each batch; the last of the tensors are the ids."""
        return self.batches.epoch(number)

    def batch(
        self, tensors: tuple[Tensor, ...], seed: int, offset: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Start | None]:
        """Images, labels, ids and the start of their attack, if it was made too."""
        x, y, ids = tensors
        return x, y, ids, None


@dataclass(frozen=True)
class BytesInput:
    """Batches that are made of a loader's bytes, with start and model input, when they are used.

    What :meth:`epoch` yields are the ids alone, so a recorded step makes its own batch. The draws
    of an epoch lie in one tensor, which the next epoch overwrites.
    """

    loader: Loader
    threat: ThreatModel
    mean: Tensor  # [C]
    std: Tensor  # [C]
    dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        # What a recorded step has taken from here for good; the contents of the tensors may change.
        images, draws = self.loader.images, self.loader._draws
        tensors = (images.images, images.labels, self.mean, self.std, draws)
        return (
            id(self.loader),
            self.loader.augment,
            self.loader.memory_format,
            self.dtype,
            tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        )

    def epoch(self, number: int) -> Iterator[tuple[Tensor, ...]]:
        for ids in self.loader.ids(number):
            yield (ids,)

    def batch(
        self, tensors: tuple[Tensor, ...], seed: int, offset: int | Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Start | None]:
        (ids,) = tensors
        x, delta, point = self.loader.started(
            ids,
            self.mean,
            self.std,
            epsilon=self.threat.epsilon_value,
            seed=seed,
            offset=offset,
            lower=self.threat.lower,
            upper=self.threat.upper,
            out_dtype=self.dtype,
        )
        return x, self.loader.images.labels[ids], ids, Start(delta, point)


Input = ReadyInput | BytesInput

_is_supernet, _is_network, _is_normalize = Plain(Supernet), Plain(Network), Plain(Normalize)


def input_of(batches: Batches, model: nn.Module, threat: ThreatModel, dtype: torch.dtype) -> Input:
    """The one pass where it applies.

    That is: a loader of ours, an attack in L-infinity from a random start, and a model of ours in
    float32 that nothing looks into or changes, because the pass goes round its ``forward``.

    Args:
        dtype: what the model's first layer computes in.
    """
    if type(batches) is not Loader or not (_is_supernet(model) or _is_network(model)):
        return ReadyInput(batches)
    normalize: Any = model.normalize
    applies = (
        threat.attacks
        and threat.norm == "linf"
        and threat.random_start
        and _is_normalize(normalize)
        and normalize.mean.dtype == torch.float32
        and normalize.mean.device == batches.device
    )
    if not applies:
        return ReadyInput(batches)
    return BytesInput(batches, threat, normalize.mean.flatten(), normalize.std.flatten(), dtype)
