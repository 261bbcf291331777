"""Images and labels that a program passes: arrays, columns, Datasets, DataLoaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler

from fastbandit.data.arrays import (
    Part,
    as_nchw,
    as_uint8,
    numbered,
    reading,
    say_rounded,
    tensor_as_nchw,
)
from fastbandit.data.encoded import Decoder
from fastbandit.data.fitting import AS_IS, Fit
from fastbandit.data.sets import DataError, ImageSet

__all__ = ["from_python", "images_of", "labels_of"]

# What columns, and the entries of a Dataset's items, are called.
IMAGES = ("image", "img", "images", "x", "pixel_values")
LABELS = ("label", "labels", "y", "target")
_ARRAYS = (torch.Tensor, np.ndarray)
# Those that numpy has.
_FLOATS = (torch.float16, torch.float32, torch.float64)


def images_of(source: Any, where: str, fit: Fit = AS_IS) -> ImageSet:
    """Images with their labels, of any kind that :func:`from_python` takes, text labels apart.

    Raises:
        DataError: they cannot be used; the message says why.
    """
    part = from_python(source, where, fit=fit)
    if part.names:
        raise DataError(
            f"{where}: expected integer labels, as the model counts its classes, got text such as "
            f"{part.names[0]!r}"
        )
    say_rounded(part)
    images = torch.from_numpy(np.require(part.images, requirements=["C", "W"]))
    return ImageSet(images, torch.from_numpy(np.require(part.labels, np.int64, ["C", "W"])))


def from_python(source: Any, where: str, names: Sequence[str] = (), fit: Fit = AS_IS) -> Part:
    """Read what :func:`fastbandit.data.load` takes from Python.

    Args:
        where: what messages call it.
        names: the classes in their order, where labels are text; by default those that occur, in
            alphabetical order.
        fit: what images of several sizes or colours are brought to; of arrays, which have one size,
            nothing is changed here.

    Raises:
        DataError: it is none of these, or an image or label in it cannot be used.
    """
    if isinstance(source, ImageSet):
        return Part(_numpy(source.images, where), _numpy(source.labels, where), where)
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], _ARRAYS):
        values, given = source
        return _pair(values, labels_of(given, where), where, names)
    if isinstance(source, (tuple, list)) and len(source) == 2 and _are_images(source[0]):
        images, given = source
        return _from_pairs(images, labels_of(given, where), where, names, fit)
    if isinstance(source, DataLoader):
        return _from_loader(source, where, names, fit)
    if hasattr(source, "columns") and hasattr(source, "iloc"):
        # A DataFrame of pandas, without the package: each of its columns is a sequence.
        source = {str(name): source[name].tolist() for name in source.columns}
    if isinstance(source, Mapping):
        return _from_columns(source, where, names, fit)
    if (
        isinstance(source, (str, bytes))
        or not hasattr(source, "__getitem__")
        or not hasattr(source, "__len__")
    ):
        raise DataError(
            f"{where}: expected a path (of training data), a pair (images, labels) of tensors, "
            f"arrays or lists, a DataFrame or dict of columns, an ImageSet, a DataLoader or a "
            f"map-style Dataset, got {type(source).__name__}"
        )
    return _from_items(_items(source, where), where, names, fit)


def _are_images(value: Any) -> bool:
    """Whether it is a list of images, not the first item (image, label) of a data set of two."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_is_image, value))


def _is_image(value: Any) -> bool:
    if isinstance(value, _ARRAYS):
        return value.ndim > 1  # a label may be an array of one number
    return isinstance(value, bytes) or (hasattr(value, "convert") and hasattr(value, "mode"))


def labels_of(labels: Any, where: str) -> np.ndarray | torch.Tensor:
    """A tensor or an array of labels: as it is, or made of a sequence or a column.

    Raises:
        DataError: it is none of these.
    """
    if isinstance(labels, _ARRAYS):
        return labels
    column = isinstance(labels, Sequence) and not isinstance(labels, str | bytes)
    if not column and not hasattr(labels, "__array__"):
        raise DataError(
            f"{where}: expected labels [N], integers or text, got {type(labels).__name__}"
        )
    with reading(where, "labels [N]"):
        if column:
            labels = [x.tolist() if isinstance(x, torch.Tensor) else x for x in labels]
            if len({isinstance(x, str) for x in labels}) > 1:
                # Of an array all would become text.
                raise DataError(f"{where}: expected labels all integers or all text, got both")
        return np.asarray(labels)


def _numpy(value: Any, where: str) -> np.ndarray:
    """Return a tensor or array as an array; numpy has no bfloat16, so floats become float32."""
    with reading(where, "numbers"):
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu()
            if value.is_floating_point() and value.dtype not in _FLOATS:
                value = value.to(torch.float32)
            return value.numpy()
        return np.asarray(value)


def _pair(images: Any, labels: Any, where: str, names: Sequence[str]) -> Part:
    values = _numpy(images, where)
    layout = tensor_as_nchw if isinstance(images, torch.Tensor) else as_nchw
    numbers, classes = numbered(_numpy(labels, where), where, names)
    pixels, moved = as_uint8(layout(values, where), where)
    return Part(pixels, numbers, where, classes, moved)


def _named(entries: Mapping[str, Any], accepted: Sequence[str], what: str, where: str) -> str:
    names = [name for name in accepted if name in entries]
    if len(names) != 1:
        raise DataError(
            f"{where}: expected one {what} of {', '.join(accepted)}, got "
            f"{', '.join(names) or ', '.join(map(str, list(entries)[:8])) or 'none'}"
        )
    return names[0]


def _from_columns(columns: Mapping[str, Any], where: str, names: Sequence[str], fit: Fit) -> Part:
    """Columns of equal length by name; an image is an array, a Pillow image or an encoded file."""
    images = columns[_named(columns, IMAGES, "column of images", where)]
    labels = columns[_named(columns, LABELS, "column of labels", where)]
    if isinstance(images, _ARRAYS):
        return _pair(images, labels_of(labels, where), where, names)
    return _from_pairs(images, labels, where, names, fit)


def _from_pairs(images: Any, labels: Any, where: str, names: Sequence[str], fit: Fit) -> Part:
    """Images and their labels, one by one."""
    if len(images) != len(labels):
        raise DataError(
            f"{where}: expected as many labels as images, got {len(images)} images and "
            f"{len(labels)} labels"
        )
    rows = zip(images, labels, strict=True)
    return _from_items(
        ((f"{where}: row {i}", image, label) for i, (image, label) in enumerate(rows)),
        where,
        names,
        fit,
    )


def _items(dataset: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    # By position up to the length: a Dataset need not raise IndexError at its end.
    for i in range(len(dataset)):
        here = f"{where}: item {i}"
        item = dataset[i]
        if isinstance(item, Mapping):
            image = item[_named(item, IMAGES, "image", here)]
            yield here, image, item[_named(item, LABELS, "label", here)]
            continue
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{here}: expected (image, label), got {type(item).__name__}")
        yield here, item[0], item[1]


def _from_items(
    items: Iterable[tuple[str, Any, Any]], where: str, names: Sequence[str], fit: Fit
) -> Part:
    images: list[np.ndarray] = []
    labels: list[Any] = []
    moved = 0.0
    decode: Decoder | None = None
    for here, image, label in items:
        if isinstance(image, Mapping) and "bytes" in image:
            image = image["bytes"]  # as Hugging Face's datasets keep an image undecoded
        if isinstance(image, bytes) or (hasattr(image, "convert") and hasattr(image, "mode")):
            decode = decode or Decoder(where, fit)
            if isinstance(image, bytes):
                decode.stored += len(image)
                chw = decode(image, here)
            else:
                chw = decode.array(image, here)
        else:
            values = _numpy(image, here)
            if values.ndim not in (2, 3):
                raise DataError(
                    f"{here}: expected an image [C, H, W] or [H, W] (tensor), or [H, W, C], "
                    f"[C, H, W] or [H, W] (array), got {type(image).__name__} "
                    f"{list(values.shape)}"
                )
            layout = tensor_as_nchw if isinstance(image, torch.Tensor) else as_nchw
            (chw,), change = as_uint8(layout(values[None], here), here)
            moved = max(moved, change)
            chw = fit.array(chw, here) if fit else chw
        if images and chw.shape != images[0].shape:
            raise DataError(
                f"{here}: expected [C, H, W] = {list(images[0].shape)} as in item 0, got "
                f"{list(chw.shape)}; image_size=N and image_color='rgb' make all alike"
            )
        images.append(chw)
        labels.append(_label(label, here, labels))
    if not images:
        raise DataError(f"{where}: expected images, got an empty dataset")
    with reading(where, "labels of 64 bits"):
        text = isinstance(labels[0], str)
        numbers, classes = numbered(np.asarray(labels, None if text else np.int64), where, names)
        return Part(np.stack(images), numbers, where, classes, moved)


def _label(label: Any, here: str, before: Sequence[Any]) -> Any:
    """One label: a text where those before are, else an integer."""
    if isinstance(label, str) and (not before or isinstance(before[0], str)):
        return label
    value = _numpy(label, here)
    if value.size != 1 or value.dtype.kind not in "iu" or (before and isinstance(before[0], str)):
        kind = "a text label" if before and isinstance(before[0], str) else "an integer label"
        raise DataError(f"{here}: expected {kind}, got {label!r:.40}")
    return int(value.reshape(()))


def _from_loader(loader: DataLoader[Any], where: str, names: Sequence[str], fit: Fit) -> Part:
    """All batches of a DataLoader, in the order of its dataset where it would shuffle it."""
    if isinstance(loader.sampler, RandomSampler | SequentialSampler) and loader.batch_size:
        # As a whole and in one order: a data set is read once.
        loader = DataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
        )
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    moved = 0.0
    for i, batch in enumerate(loader):
        here = f"{where}: batch {i}"
        if isinstance(batch, Mapping):
            images = batch[_named(batch, IMAGES, "entry of images", here)]
            labels = batch[_named(batch, LABELS, "entry of labels", here)]
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            images, labels = batch
        else:
            raise DataError(
                f"{here}: expected (images, labels), got {type(batch).__name__}"
                + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
            )
        values = _numpy(images, here)
        layout = tensor_as_nchw if isinstance(images, torch.Tensor) else as_nchw
        pixels, change = as_uint8(layout(values, here), here)
        moved = max(moved, change)
        if fit:
            pixels = np.stack([fit.array(image, here) for image in pixels])
        parts.append((pixels, _numpy(labels, here)))
        if parts[0][0].shape[1:] != parts[-1][0].shape[1:]:
            raise DataError(
                f"{here}: expected [C, H, W] = {list(parts[0][0].shape[1:])} as in batch 0, got "
                f"{list(parts[-1][0].shape[1:])}; image_size=N and image_color='rgb' make all alike"
            )
    if not parts:
        raise DataError(f"{where}: expected batches of images, got none")
    numbers, classes = numbered(np.concatenate([labels for _, labels in parts]), where, names)
    return Part(np.concatenate([images for images, _ in parts]), numbers, where, classes, moved)
