"""Batches from images that already lie on the device."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.data.sets import DataError, ImageSet, check_index, keyed_generator
from fastbandit.ops.augment_images import DRAWS


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes to training images, in this order.

    Args:
        crop_padding: pixels of black added on each side before a random crop to the original
            size; 0 for none.
        flip: mirror left and right with probability one half.
        cutout_length: side of a square, in pixels, that is painted over; its centre is uniform
            over the image, so a part may lie outside (DeVries and Taylor, "Improved
            Regularization of Convolutional Neural Networks with Cutout"); 0 for none.
        cutout_fill: colour of that square, one value in [0, 1] for each channel; empty for
            black. The paper paints after normalisation, which is the mean of the training images.
    """

    crop_padding: int = 0  # pixels
    flip: bool = False
    cutout_length: int = 0  # pixels
    cutout_fill: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise DataError(f"Augment: {name}: expected a number of pixels >= 0, got {value!r}")
        if not isinstance(self.flip, bool):
            raise DataError(f"Augment: flip: expected True or False, got {self.flip!r}")
        if not all(0.0 <= value <= 1.0 for value in self.cutout_fill):
            raise DataError(
                f"Augment: cutout_fill: expected values in [0, 1], got {self.cutout_fill}"
            )

    @property
    def active(self) -> bool:
        """Whether anything is changed at all."""
        return self.crop_padding > 0 or self.flip or self.cutout_length > 0


class Loader:
    """Yields batches of an :class:`ImageSet` as float32 in [0, 1].

    Order and augmentation are functions of the seed, the number of the epoch and the position of
    an image in the set. They do not depend on the batch size, the device or what was drawn
    before, so there is no state to save: to resume, ask for the epoch by its number.

    Args:
        images: the set that ``index`` refers to.
        index: integers ``[n]``: which images to yield.
        batch_size: images in a batch; the last one may be smaller.
        device: where the images lie and the batches are made; None leaves them where they are.
        augment: random changes, or None.
        seed: any integer.
        shuffle: a new order in each epoch; otherwise that of ``index``.
        drop_last: leave out a last batch that is not full.
        memory_format: layout of the batches.

    Raises:
        DataError: an index out of range, a batch size below 1, or no full batch with
            ``drop_last``.
    """

    def __init__(
        self,
        images: ImageSet,
        index: Tensor | Sequence[int],
        *,
        batch_size: int,
        device: torch.device | str | None = None,
        augment: Augment | None = None,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"Loader: batch_size: expected at least 1, got {batch_size}")
        self.index = check_index(index, len(images))
        if drop_last and len(self.index) < batch_size:
            raise DataError(
                f"Loader: expected at least one full batch of {batch_size} with drop_last, got "
                f"{len(self.index)} images"
            )
        channels = images.shape[0]
        if augment is not None and len(augment.cutout_fill) not in (0, channels):
            raise DataError(
                f"Loader: cutout_fill: expected a value for each of {channels} channels, got "
                f"{len(augment.cutout_fill)}"
            )
        self.images = images if device is None else images.to(device)
        self.device = self.images.device
        self.batch_size = batch_size
        self.augment = augment if augment is not None and augment.active else None
        self.seed = seed
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.memory_format = memory_format
        fill = self.augment.cutout_fill if self.augment is not None else ()
        self._fill = torch.tensor(fill, device=self.device) if fill else None
        self._draws: Tensor | None = None
        self._placed: Tensor | None = None
        self._limit: int | None = None

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        exact = len(self.index) / self.batch_size
        batches = math.floor(exact) if self.drop_last else math.ceil(exact)
        return batches if self._limit is None else min(batches, self._limit)

    def sized(self, batch_size: int) -> Loader:
        """This loader with other batches, of the same images in the same order."""
        other = copy.copy(self)
        other.batch_size, other._draws, other._placed = batch_size, None, None
        return other

    def first(self, batches: int) -> Loader:
        """This loader, of which each epoch ends after so many batches."""
        few = copy.copy(self)
        few._limit, few._draws, few._placed = batches, None, None
        return few

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield the batches of one epoch.

        Args:
            number: which epoch, from 0.

        Yields:
            images float32 ``[n, C, H, W]`` in [0, 1], labels int64 ``[n]`` and ids int64 ``[n]``,
            the positions of the images in the set; all on the device.
        """
        draws = None if self.augment is None else self._table(self.augment, number)
        for ids in self._order(number):
            yield self._images(ids, draws), self.images.labels[ids], ids

    def ids(self, number: int) -> Iterator[Tensor]:
        """Yield the ids of the batches of one epoch, for :meth:`started`.

        The epoch's draws go into one tensor that every epoch uses, where a recorded step finds
        them. Use the ids of a batch before the next ones are asked for, from any epoch.
        """
        drawn = None if self.augment is None else self._table(self.augment, number)
        for ids in self._order(number):
            self._place(drawn)
            yield ids

    def _place(self, drawn: Tensor | None) -> None:
        """Put the draws of an epoch where a recorded step finds them, if others lie there."""
        if drawn is None:
            self._draws = None
        elif self._draws is None:
            self._draws = drawn.clone()
        elif self._placed is not drawn:
            self._draws.copy_(drawn)
        self._placed = drawn

    def started(
        self,
        ids: Tensor,
        mean: Tensor,
        std: Tensor,
        *,
        epsilon: float,
        seed: int,
        offset: int | Tensor,
        lower: float | None,
        upper: float | None,
        out_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The images ``ids`` of the epoch that :meth:`ids` began, the start of their attack and
        the model's input: :func:`fastbandit.ops.augment_start_normalize`."""
        image, delta, point = ops.augment_start_normalize(
            self.images.images,
            ids,
            mean,
            std,
            epsilon=epsilon,
            seed=seed,
            offset=offset,
            lower=lower,
            upper=upper,
            draws=self._draws,
            out_dtype=out_dtype,
            memory_format=self.memory_format,
            **self._changes(),
        )
        # With one channel or one pixel a tensor has both layouts, and only its strides say which is
        # meant. Of image + delta torch makes a contiguous one then, so the input is one, too.
        if point.is_contiguous():
            point = point.flatten().view(point.shape)
        return image, delta, point

    def _order(self, number: int) -> Iterator[Tensor]:
        """The ids of one epoch, batch by batch, on the device."""
        order = self.index
        if self.shuffle:
            generator = keyed_generator("order", self.seed, number)
            order = order[torch.randperm(len(order), generator=generator)]
        order = order.to(self.device)
        for batch in range(len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def _draw(self, augment: Augment, number: int) -> dict[str, Tensor]:
        """Draw for all images of the set, int64 ``[N]`` each, so that a row belongs to an id.

        Each kind has its own stream: switching one on leaves the others as they were.
        """
        n = len(self.images)
        _, height, width = self.images.shape
        ranges = {}
        if augment.crop_padding:
            ranges["crop_row"] = 2 * augment.crop_padding + 1
            ranges["crop_column"] = 2 * augment.crop_padding + 1
        if augment.flip:
            ranges["flip"] = 2
        if augment.cutout_length:
            ranges["cutout_row"] = height
            ranges["cutout_column"] = width
        return {
            kind: torch.randint(high, (n,), generator=keyed_generator(kind, self.seed, number)).to(
                self.device
            )
            for kind, high in ranges.items()
        }

    def _table(self, augment: Augment, number: int) -> Tensor:
        """The draws of an epoch as :func:`fastbandit.ops.augment_images` takes them, [N, 5]."""
        drawn = self._draw(augment, number)
        nothing = torch.zeros(len(self.images), dtype=torch.int64, device=self.device)
        return torch.stack([drawn.get(kind, nothing) for kind in DRAWS], dim=1)

    def _images(self, ids: Tensor, draws: Tensor | None) -> Tensor:
        """Return the images ``ids`` as float32 ``[n, C, H, W]``, augmented by their draws."""
        return ops.augment_images(
            self.images.images,
            ids,
            draws=draws,
            memory_format=self.memory_format,
            **self._changes(),
        )

    def _changes(self) -> dict[str, Any]:
        """What the ops that make batches want to know of the augmentation."""
        augment = self.augment or Augment()
        return {
            "crop_padding": augment.crop_padding,
            "flip": augment.flip,
            "cutout_length": augment.cutout_length,
            "cutout_fill": self._fill,
        }
