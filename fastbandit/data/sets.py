"""What a data set is once it has been read: arrays, their checks, splits and statistics."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


class DataError(ValueError):
    """A data set that cannot be used; the message says what, where, expected and got."""


def keyed_generator(*key: object) -> torch.Generator:
    """Return a CPU generator that depends on ``key`` alone.

    Counting numbers make poor seeds: neighbouring seeds and epochs would share streams as soon as
    they are added up, so the key is hashed.
    """
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


@dataclasses.dataclass(frozen=True, repr=False)
class ImageSet:
    """Images and their labels on one device.

    Args:
        images: uint8 ``[N, C, H, W]``, 0 is black and 255 white (1.0 in a batch).
        labels: int64 ``[N]``, from 0.

    Raises:
        DataError: wrong dtype, shape, count or device, or no image at all.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4:
            raise DataError(
                f"images: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise DataError(f"labels: expected int64 [N], got {labels.dtype} {list(labels.shape)}")
        if images.shape[0] != labels.shape[0]:
            raise DataError(
                f"expected as many labels as images, got {images.shape[0]} images and "
                f"{labels.shape[0]} labels"
            )
        if len(images) == 0:
            raise DataError(f"images: expected at least one, got {list(images.shape)}")
        if images.numel() == 0:
            raise DataError(f"images: expected at least one pixel, got {list(images.shape)}")
        if images.device != labels.device:
            raise DataError(
                f"images and labels: expected one device, got {images.device} and {labels.device}"
            )

    def __repr__(self) -> str:
        return f"ImageSet({len(self):,} images {list(self.shape)} on {self.device})"

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def device(self) -> torch.device:
        return self.images.device

    def to(self, device: torch.device | str) -> ImageSet:
        """Return the set on ``device`` (itself if it is there already)."""
        images, labels = self.images.to(device), self.labels.to(device)
        if images is self.images and labels is self.labels:
            return self
        return ImageSet(images, labels)

    def subset(self, index: Tensor | Sequence[int]) -> ImageSet:
        """Return the images at ``index`` (integers ``[n]``), in that order."""
        chosen = check_index(index, len(self)).to(self.device)
        return ImageSet(self.images[chosen], self.labels[chosen])

    def limit(self, n: int, *, stratified: bool = True) -> ImageSet:
        """Return at most ``n`` images, in their original order.

        Stratified, the first images of each class are taken, in the proportions of the whole set;
        otherwise simply the first ``n``.
        """
        if n >= max(1, len(self)):
            return self
        return self.subset(self.limit_index(n, stratified=stratified))

    def limit_index(self, n: int, *, stratified: bool = True) -> Tensor:
        """Return the positions, int64 and ascending, of the images that :meth:`limit` keeps."""
        if n < 1:
            raise DataError(f"limit: expected at least 1 image, got {n}")
        if not stratified or n >= len(self):
            return torch.arange(min(n, len(self)))
        labels = self.labels.cpu()
        members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        taken = _apportion([len(m) for m in members], n, keep_one=n >= len(members))
        chosen = torch.cat([m[:k] for m, k in zip(members, taken, strict=True)])
        return chosen.sort().values


@dataclasses.dataclass(frozen=True, repr=False)
class DataSource:
    """A data set as read.

    Args:
        name: short name, such as ``digits``.
        train: the training images.
        test: the test images, or None where the source has none.
        classes: number of classes; labels are 0 .. classes - 1.
        description: where the images come from, their licence where known, and what was done to
            them; belongs beside every figure obtained from them.
        digest: first 16 hexadecimal digits of the SHA-256 of all arrays.
        class_names: one name for each class, or empty where the source has none.
    """

    name: str
    train: ImageSet
    test: ImageSet | None
    classes: int
    description: str
    digest: str
    class_names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """Two lines: how many images of which shape, and where they come from."""
        tested = "no" if self.test is None else f"{len(self.test):,}"
        about = self.description if len(self.description) < 90 else f"{self.description[:87]}..."
        return (
            f"{self.name}: {len(self.train):,} training and {tested} test images "
            f"{list(self.train.shape)}, {self.classes} classes\n  {about}"
        )

    def to(self, device: torch.device | str) -> DataSource:
        """Return the data set on ``device``."""
        test = None if self.test is None else self.test.to(device)
        return dataclasses.replace(self, train=self.train.to(device), test=test)

    def limit(self, train: int | None = None, test: int | None = None) -> DataSource:
        """Return at most ``train`` and ``test`` images (stratified); None leaves a part whole."""
        fewer_train = self.train if train is None else self.train.limit(train)
        fewer_test = self.test
        if test is not None and self.test is not None:
            fewer_test = self.test.limit(test)
        if fewer_train is self.train and fewer_test is self.test:
            return self
        tested = "" if fewer_test is None else f" and {len(fewer_test):,} test"
        return dataclasses.replace(
            self,
            train=fewer_train,
            test=fewer_test,
            description=f"{self.description} Limited to {len(fewer_train):,} training{tested} "
            "images.",
            digest=digest_of(fewer_train, fewer_test),
        )


def digest_of(train: ImageSet, test: ImageSet | None) -> str:
    """Return 16 hexadecimal digits that name the contents of a data set."""
    digest = hashlib.sha256()
    for part in (train, test):
        if part is None:
            digest.update(b"none")
            continue
        for array in (part.images, part.labels):
            digest.update(f"{array.dtype}{list(array.shape)}".encode())
            digest.update(array.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def check_index(index: Tensor | Sequence[int], n: int) -> Tensor:
    """Return ``index`` as int64 ``[k]`` on the CPU, each entry in 0 .. n - 1."""
    tensor = torch.as_tensor(index).cpu()
    if tensor.numel() == 0:
        raise DataError("index: expected at least one image, got none")
    if tensor.dim() != 1 or tensor.dtype.is_floating_point or tensor.dtype == torch.bool:
        raise DataError(f"index: expected integers [n], got {tensor.dtype} {list(tensor.shape)}")
    tensor = tensor.to(torch.int64)
    low, high = int(tensor.min()), int(tensor.max())
    if low < 0 or high >= n:
        raise DataError(f"index: expected 0 .. {n - 1}, got {low} .. {high}")
    return tensor


def _apportion(sizes: Sequence[int], total: int, *, keep_one: bool) -> list[int]:
    """Share ``total`` among groups in proportion to ``sizes``, by largest remainder.

    No group gets more than its size. With ``keep_one`` each group gets at least one, taken from
    those that have most.
    """
    whole = sum(sizes)
    shares = [size * total // whole for size in sizes]
    # Python's sort is stable: of equal remainders the first group goes first.
    order = sorted(range(len(sizes)), key=lambda i: -(sizes[i] * total % whole))
    for i in order[: total - sum(shares)]:
        shares[i] += 1
    if keep_one:
        for i, share in enumerate(shares):
            if share == 0:
                shares[max(range(len(shares)), key=lambda j: shares[j])] -= 1
                shares[i] = 1
    return shares


def split(
    labels: Tensor, portion: float, seed: int, stratified: bool = True
) -> tuple[Tensor, Tensor]:
    """Divide images at random into two parts, the first with about ``portion`` of them.

    Stratified, every class is divided in the same proportion, and a class of two images or more
    is in both parts. The result depends on the arguments alone.

    Args:
        labels: integers ``[N]``, N >= 2.
        portion: share of the first part, between 0 and 1 (both excluded).
        seed: any integer.
        stratified: divide class by class.

    Returns:
        Two int64 tensors on the CPU, each sorted and not empty: every image is in exactly one.

    Raises:
        DataError: fewer than two images, or a portion outside (0, 1).
    """
    labels = torch.as_tensor(labels).cpu()
    n = labels.numel()
    if labels.dim() != 1 or n < 2:
        raise DataError(f"split: expected labels [N] with N >= 2, got {list(labels.shape)}")
    if not 0.0 < portion < 1.0:
        raise DataError(f"split: expected a portion between 0 and 1, got {portion}")
    generator = keyed_generator("split", seed)
    groups = [torch.arange(n)]
    if stratified:
        members = [torch.nonzero(labels == label).flatten() for label in labels.unique()]
        groups = [m for m in members if len(m) > 1]
        # Classes of one image are divided together; alone, such an image is for training.
        single = [m for m in members if len(m) == 1]
        if single:
            groups.append(torch.cat(single))
    first, second = [], []
    wanted = max(1, min(n - 1, round(portion * n)))
    for group, share in zip(
        groups, _apportion([len(g) for g in groups], wanted, keep_one=False), strict=True
    ):
        share = 1 if len(group) == 1 else max(1, min(len(group) - 1, share))
        shuffled = group[torch.randperm(len(group), generator=generator)]
        first.append(shuffled[:share])
        second.append(shuffled[share:])
    return torch.cat(first).sort().values, torch.cat(second).sort().values


def statistics(images: Tensor | ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel, in units of [0, 1].

    The sums are exact integers, so the result is the same on every device. A standard deviation
    below 1/255, one grey level, is raised to that: a constant channel must not be divided by 0.

    Args:
        images: uint8 ``[N, C, H, W]``, or an :class:`ImageSet`.

    Returns:
        Two tuples of C floats.
    """
    if isinstance(images, ImageSet):
        images = images.images
    if images.dtype != torch.uint8 or images.dim() != 4 or images.numel() == 0:
        raise DataError(
            f"statistics: expected uint8 [N, C, H, W], got {images.dtype} {list(images.shape)}"
        )
    mean, std = [], []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].flatten(), minlength=256).tolist()
        n = sum(counts)
        total = sum(value * count for value, count in enumerate(counts))
        squares = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / (255 * n))
        variance = (squares * n - total * total) / (n * n)
        std.append(max(variance**0.5, 1.0) / 255)
    return tuple(mean), tuple(std)
