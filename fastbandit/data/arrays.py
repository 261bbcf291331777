"""From arrays of any kind to checked uint8 images and int64 labels."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fastbandit.data.sets import DataError, DataSource, ImageSet, digest_of

# A float image of 8 bits is k / 255 up to rounding; more than this is another image.
_ROUNDING = 1e-4
# Images whose brightest pixel is below this were very likely stored on another scale.
DIM = 32


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the test images of a source: uint8 ``[N, C, H, W]``, integers ``[N]``.

    ``where`` is what a message calls them; ``names`` are those of the classes, where the labels
    were given as text. ``moved`` is by how much the largest change of a pixel, in [0, 1], stored as
    8 bits.
    """

    images: np.ndarray
    labels: np.ndarray
    where: str
    names: tuple[str, ...] = ()
    moved: float = 0.0


@contextmanager
def reading(where: object, kind: str) -> Iterator[None]:
    """Turn whatever a parser raises on a damaged file into a :class:`DataError`.

    Parsers of foreign formats raise nearly anything on nonsense (``zipfile`` alone six kinds), so
    the list is not written out.
    """
    try:
        yield
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(f"{where}: needs more memory than there is") from error
    except OSError as error:
        raise DataError(f"{where}: cannot be read as {kind}: {error}") from error
    except Exception as error:
        raise DataError(
            f"{where}: damaged, or not {kind}: {type(error).__name__}: {error}"
        ) from error


def as_uint8(values: np.ndarray, where: str) -> tuple[np.ndarray, float]:
    """Pixels as uint8: integers 0 .. 255 as they are, floats in [0, 1] as round(255 x).

    Returns:
        them, and how far the pixel is moved that is moved most, in [0, 1].

    Raises:
        DataError: a NaN, a value out of range, or pixels that are neither; names the first image.
    """
    if values.dtype == np.uint8:
        return values, 0.0
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255), 0.0
    if values.dtype.kind not in "iuf":
        raise DataError(f"{where}: expected images of uint8 or float in [0, 1], got {values.dtype}")
    high = 1.0 if values.dtype.kind == "f" else 255
    good = (values >= 0) & (values <= high)  # False for NaN
    if not good.all():
        hint = "images are not normalised beforehand, that is a layer of the model"
        if values.dtype.kind == "f":
            hint += "; pass values 0 .. 255 as integers, or divided by 255"
        position = tuple(int(i) for i in np.unravel_index(int(np.argmin(good)), good.shape))
        raise DataError(
            f"{where}: image {position[0]}: expected values in [0, 1] (float) or 0 .. 255 "
            f"(integer), got {values[position]} as {values.dtype}; {hint}"
        )
    if values.dtype.kind != "f":
        return values.astype(np.uint8), 0.0
    scaled = values.astype(np.float64) * 255
    levels = np.rint(scaled)
    scaled -= levels
    moved = float(np.abs(scaled).max(initial=0.0)) / 255
    # In half precision k / 255 itself is a little beside it.
    return levels.astype(np.uint8), moved if moved > np.finfo(values.dtype).eps / 2 else 0.0


def say_rounded(part: Part) -> None:
    """Warn where storing 8 bits for each channel makes other images of these."""
    if part.moved > _ROUNDING:
        warnings.warn(
            f"{part.where}: not of 8 bits: images are rounded to 1/255, which moves pixels by up "
            f"to {part.moved:.2g}; accuracies may differ a little from those of the images as they "
            "are",
            stacklevel=_outside(),
        )


def _outside() -> int:
    """The ``stacklevel`` for a caller of this function of who called the package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("fastbandit"):
        level, frame = level + 1, frame.f_back
    return level


def as_nchw(values: np.ndarray, where: str) -> np.ndarray:
    """Return an array ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` as the last.

    C is 1 or 3, which tells the layouts apart; where both could be meant, the array is refused.
    """
    if values.ndim == 3:
        return values[:, None]
    if values.ndim == 4:
        first, last = values.shape[1] in (1, 3), values.shape[3] in (1, 3)
        if first and last:
            raise DataError(
                f"{where}: {list(values.shape)} may be [N, C, H, W] or [N, H, W, C]; pass a torch "
                "tensor [N, C, H, W] from Python"
            )
        if last:
            return values.transpose(0, 3, 1, 2)
        if first:
            return values
    raise DataError(
        f"{where}: expected images [N, H, W], [N, H, W, C] or [N, C, H, W] with 1 or 3 channels, "
        f"got {list(values.shape)}"
    )


def tensor_as_nchw(values: np.ndarray, where: str) -> np.ndarray:
    """Return what was a tensor ``[N, H, W]`` or ``[N, C, H, W]`` as the last, for any C.

    Tensors have their channels first. One that has 1 or 3 channels only if they are last was very
    likely meant so, and is refused.
    """
    if values.ndim == 3:
        return values[:, None]
    if values.ndim != 4:
        raise DataError(
            f"{where}: expected a tensor of images [N, H, W] or [N, C, H, W], got "
            f"{list(values.shape)}"
        )
    channels, height, width = values.shape[1:]
    if channels not in (1, 3) and width in (1, 3):
        raise DataError(
            f"{where}: expected a tensor of images [C, H, W], got {[channels, height, width]}, "
            f"which looks like [H, W, C]; permute the channels to the front (images that do have "
            f"{channels} channels and a width of {width} go into an ImageSet)"
        )
    return values


def as_labels(values: np.ndarray, where: str) -> np.ndarray:
    """Return labels ``[N]`` (or ``[N, 1]``) of any integer type as int64 ``[N]``."""
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.dtype == object and all(type(x) is int or isinstance(x, np.integer) for x in values):
        with reading(where, "labels of 64 bits"):
            values = np.asarray([int(x) for x in values], np.int64)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        hint = "; for labels in one-hot form pass their argmax" if values.ndim == 2 else ""
        raise DataError(
            f"{where}: expected integer labels [N], got {values.dtype} {list(values.shape)}{hint}"
        )
    if values.size and int(values.max()) > np.iinfo(np.int64).max:
        raise DataError(f"{where}: expected labels from 0, got {values.max()}")
    return values.astype(np.int64)


def numbered(
    labels: np.ndarray, where: str, names: Sequence[str]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 [N], and the names of the classes where they are text."""
    text = labels.dtype.kind == "U" or (
        labels.dtype == object and all(isinstance(label, str) for label in labels.flat)
    )
    if not text or labels.ndim != 1 or not labels.size:
        if names:
            raise DataError(
                f"{where}: expected labels as text, as in the training data, got "
                f"{labels.dtype} {list(labels.shape)}"
            )
        return as_labels(labels, where), ()
    classes = tuple(names) or tuple(sorted({str(label) for label in labels}))
    number = {name: i for i, name in enumerate(classes)}
    for position, label in enumerate(labels):
        if str(label) not in number:
            raise DataError(
                f"{where}: label {position}: expected one of the training data's "
                f"{len(classes)} classes, got {str(label)!r}"
            )
    return np.asarray([number[str(label)] for label in labels], np.int64), classes


def _check(part: Part, classes: int, shape: tuple[int, ...]) -> None:
    if len(part.labels) != len(part.images):
        raise DataError(
            f"{part.where}: expected as many labels as images, got {len(part.images)} images and "
            f"{len(part.labels)} labels"
        )
    if part.images.size == 0:
        raise DataError(f"{part.where}: expected images, got {list(part.images.shape)}")
    if part.images.shape[1:] != shape:
        raise DataError(
            f"{part.where}: expected images [C, H, W] = {list(shape)} as in the training set, got "
            f"{list(part.images.shape[1:])}"
        )
    wrong = np.flatnonzero((part.labels < 0) | (part.labels >= classes))
    if wrong.size:
        raise DataError(
            f"{part.where}: label {wrong[0]}: expected 0 .. {classes - 1}, got "
            f"{part.labels[wrong[0]]}"
        )


# The parts of a data set beside the training images, the test set of choice first.
HELD_OUT = ("test", "val", "valid", "validation")


def choose_test(names: Collection[str], where: object) -> tuple[str | None, str]:
    """Return which of the parts ``names`` beside the training images is the test set, and a note.

    That is ``test``; without it, the validation part, for validation images are always taken from
    the training images. Where both are there the validation part is not read, and a warning says
    so. The note, empty or a sentence after a space, belongs into the description.

    Raises:
        DataError: several validation parts and no test part.
    """
    parts = [part for part in HELD_OUT if part in names]
    if not parts:
        return None, ""
    if parts[0] == "test":
        if len(parts) == 1:
            return "test", ""
        note = (
            f"{' and '.join(parts[1:])} is not read: the test images are those of test, and "
            "validation images are taken from the training images"
        )
        warnings.warn(f"{where}: {note}", stacklevel=3)
        return "test", f" {note[0].upper()}{note[1:]}."
    if len(parts) > 1:
        raise DataError(f"{where}: expected one part to test on, got {' and '.join(parts)}")
    return parts[0], f" The test images are those of {parts[0]}; there are no others."


def assemble(
    name: str,
    train: Part,
    test: Part | None,
    description: str,
    *,
    classes: int | None = None,
    class_names: Sequence[str] = (),
) -> DataSource:
    """Check the parts against each other and build the :class:`DataSource`.

    Without ``classes`` the number is that of the largest training label plus one, and each class
    must have a training image: a gap is a sign of labels that count from 1, or of a part of a
    data set.
    """
    named = classes is not None
    largest = int(train.labels.max()) if train.labels.size else -1
    count = largest + 1 if classes is None else classes
    _check(train, max(count, 1), train.images.shape[1:])
    present = np.unique(train.labels)
    if len(present) < 2 or count < 2:
        raise DataError(
            f"{train.where}: expected images of two classes or more, got only class {present[0]}"
        )
    if not named and len(present) < count:
        expected = np.arange(len(present))
        missing = int(expected[present != expected][0])
        raise DataError(
            f"{train.where}: expected labels 0 .. {count - 1} with an image for each, got none of "
            f"class {missing}; labels count from 0 (from Python, load(..., classes={count}) "
            "accepts the gap)"
        )
    if test is not None:
        _check(test, count, train.images.shape[1:])
    for part in (train, test):
        if part is not None:
            say_rounded(part)
        if part is not None and (brightest := int(part.images.max())) < DIM:
            warnings.warn(
                f"{part.where}: the brightest pixel is {brightest} of 255; is the scale right?",
                stacklevel=3,
            )
    sets = [
        None
        if part is None
        else ImageSet(
            torch.from_numpy(np.require(part.images, requirements=["C", "W"])),
            torch.from_numpy(np.require(part.labels, np.int64, ["C", "W"])),
        )
        for part in (train, test)
    ]
    assert sets[0] is not None
    return DataSource(
        name=name,
        train=sets[0],
        test=sets[1],
        classes=count,
        description=description,
        digest=digest_of(sets[0], sets[1]),
        class_names=tuple(class_names),
    )
