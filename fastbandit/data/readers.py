"""Readers: from files and Python objects to a :class:`DataSource`."""

from __future__ import annotations

import dataclasses
import gzip
import importlib.resources
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastbandit.data.arrays import Part, as_labels, as_nchw, as_uint8, assemble, reading
from fastbandit.data.cifar import CLASSES as CIFAR_CLASSES
from fastbandit.data.cifar import read_cifar
from fastbandit.data.encoded import (
    Decoder,
    is_image_folder,
    parquet_files,
    read_image_folder,
    read_parquet,
    unpack,
)
from fastbandit.data.sets import DataError, DataSource, ImageSet

EMBEDDED = "digits"

# (training images, training labels, test images, test labels); the last two may be absent.
NPZ_KEYS: tuple[tuple[str, str, str | None, str | None], ...] = (
    ("train_images", "train_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_test", "y_test"),
    ("images", "labels", None, None),
)

LOOKED_FOR = """\
  IDX files             train-images-idx3-ubyte, train-labels-idx1-ubyte (t10k-... for testing),
                        each plain or .gz
  CIFAR-10              data_batch_1.bin ... data_batch_5.bin, test_batch.bin (binary), or
                        data_batch_1 ... data_batch_5, test_batch (Python)
  parquet               train*.parquet (test*.parquet), here or in data/
  CIFAR-10 JPEG copy    cifar10-jpeg.npz (cifar10-lossless-test.npz)
  image folder          train/<class>/*.png (test/<class>/*.png), or <class>/*.png\
"""

# The reports name how many original test images were used; the rest of the copy is lossy.
LOSSLESS_TEST_IMAGES = 1000


def load(
    source: Any,
    *,
    test: Any = None,
    name: str | None = None,
    classes: int | None = None,
) -> DataSource:
    """Read a data set.

    A text or path is one of:

    - ``digits``: the embedded data set (a folder of that name is ``./digits``);
    - a folder of IDX files, as MNIST and Fashion-MNIST are published, plain or ``.gz``;
    - a folder with CIFAR-10's binary files, or with its Python files (read by an unpickler that
      builds nothing but arrays, dicts, lists, bytes, text and integers);
    - an ``.npz`` file with ``train_images``, ``train_labels`` (and ``test_images``,
      ``test_labels``), or ``x_train``, ``y_train`` (``x_test``, ``y_test``), or ``images``,
      ``labels``; images ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with 1 or 3 channels;
      or with ``train_jpeg``, ``train_offsets``, ``train_labels`` (and the same for ``test``),
      encoded files end to end (needs Pillow);
    - a folder with ``train/<class>/*`` (and ``test/<class>/*``) or ``<class>/*``, images of one
      size and either all grey or all RGB (needs Pillow);
    - a ``.parquet`` file, or a folder with ``train*.parquet`` (and ``test*.parquet``), columns
      ``image`` and ``label`` (needs Pillow and pyarrow);
    - a folder with ``cifar10-jpeg.npz``; with ``cifar10-lossless-test.npz`` beside it, the test
      images are the first 1,000 originals.

    From Python, also a pair (images, labels) of tensors (``[N, H, W]`` or ``[N, C, H, W]``) or
    arrays (layouts as for ``.npz``), an :class:`ImageSet`, or a map-style torch Dataset of
    (image, label): tensors ``[C, H, W]`` or ``[H, W]``, arrays ``[H, W]`` or ``[H, W, C]``, or
    Pillow images. A dataset is read once, so it must not augment.

    Images are uint8 0 .. 255 or float in [0, 1]; floats are stored as round(255 x). Labels are
    integers from 0.

    Args:
        source: see above.
        test: test images, of the kinds that Python may pass; paths bring their own.
        name: name of the data set; by default that of the file or folder.
        classes: number of classes; by default the largest training label plus one.

    Raises:
        DataError: nothing usable there; the message names file and position, expected and got.
    """
    if isinstance(source, (str, os.PathLike)):
        if test is not None or classes is not None:
            raise DataError("load: expected test and classes with Python objects only, got a path")
        if os.fspath(source) == EMBEDDED:
            data = _digits()
        elif not os.fspath(source):
            raise DataError(f"load: expected {EMBEDDED} or a path, got an empty text")
        else:
            try:
                data = _load_path(Path(source).expanduser())
            except OSError as error:
                raise DataError(f"{source}: cannot be read: {error}") from error
        return data if name is None else dataclasses.replace(data, name=name)
    return assemble(
        name or "custom",
        _from_python(source, "training data"),
        None if test is None else _from_python(test, "test data"),
        "Passed from Python; float images are rounded to 1/255.",
        classes=classes,
    )


def _load_path(path: Path) -> DataSource:
    if path.is_file():
        if path.suffix == ".npz":
            return _read_npz(path)
        if path.suffix == ".parquet":
            return read_parquet(path.stem, [path], [])
        raise DataError(
            f"{path}: expected a .npz or .parquet file, or a folder; for IDX and CIFAR-10 files "
            f"name the folder that holds them"
        )
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder; expected {EMBEDDED} (embedded) or a path")
    with reading(path, "a folder"):
        names = {entry.name for entry in path.iterdir()}
    if any(_IDX_NAME.fullmatch(name) for name in names):
        return _read_idx_folder(path, names)
    for suffix in (".bin", ""):
        if any(re.fullmatch(rf"data_batch_\d+{re.escape(suffix)}", name) for name in names):
            return read_cifar(path, suffix)
    train, test = parquet_files(path)
    if train:
        return read_parquet(path.resolve().name, train, test)
    if "cifar10-jpeg.npz" in names:
        return _read_cifar_jpeg(path)
    if is_image_folder(path):
        return read_image_folder(path)
    raise DataError(f"{path}: found no data set; looked for\n{LOOKED_FOR}")


def _digits() -> DataSource:
    """Read the embedded digits (Alpaydin and Kaynak, 1998), the official split."""
    resource = importlib.resources.files("fastbandit") / "_data" / "digits.npz"
    parts = {}
    with (
        reading("the embedded digits", ".npz"),
        resource.open("rb") as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        for part in ("train", "test"):
            # The file keeps the values 0 .. 16 of the original; this is round(255 v / 16).
            values = arrays[f"{part}_images"].astype(np.int64)
            images = ((255 * values + 8) // 16).astype(np.uint8)[:, None]
            labels = arrays[f"{part}_labels"].astype(np.int64)
            parts[part] = Part(images, labels, f"digits ({part})")
    return assemble(
        "digits",
        parts["train"],
        parts["test"],
        "UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998, "
        "doi:10.24432/C50P49, CC BY 4.0), official split, 8 x 8, grey values 0 .. 16 scaled to "
        "0 .. 255.",
        classes=10,
        class_names="0123456789",
    )


# The names as published, and with the dot or dash that some tools write instead.
_IDX_NAME = re.compile(
    r"(?P<part>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13][-.]ubyte(?P<gz>\.gz)?"
)


def _read_idx_folder(folder: Path, names: set[str]) -> DataSource:
    found: dict[tuple[str, str], Path] = {}
    # Sorted, the plain file comes before its .gz and is the one kept.
    for name in sorted(names):
        match = _IDX_NAME.fullmatch(name)
        if match:
            part = "train" if match["part"] == "train" else "test"
            found.setdefault((part, match["kind"]), folder / name)
    for part in ("train", "test"):
        kinds = [kind for kind in ("images", "labels") if (part, kind) in found]
        if len(kinds) == 1 or (part == "train" and not kinds):
            raise DataError(
                f"{folder}: expected the IDX files of {part} images and labels, got "
                f"{', '.join(kinds) or 'neither'} only"
            )

    def read(part: str) -> Part:
        images, labels = found[part, "images"], found[part, "labels"]
        return Part(
            _read_idx(images, 3)[:, None], _read_idx(labels, 1).astype(np.int64), str(images)
        )

    test = read("test") if ("test", "images") in found else None
    label = folder.resolve().name
    return assemble(label, read("train"), test, f"IDX files of {label}.")


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes: magic 00 00 08 <dimensions>, sizes, data (big-endian)."""
    with reading(path, "an IDX file"):
        if path.suffix == ".gz":
            with gzip.open(path) as file:
                data = file.read()
        else:
            data = path.read_bytes()
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    if data[:4] != magic:
        raise DataError(f"{path}: expected magic {magic.hex()}, got {data[:4].hex() or 'nothing'}")
    if len(data) < header:
        raise DataError(f"{path}: truncated: expected a header of {header} bytes, got {len(data)}")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    if len(data) != header + math.prod(shape):
        raise DataError(
            f"{path}: expected {header + math.prod(shape)} bytes for {shape}, got {len(data)}"
        )
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def _arrays(path: Path) -> Mapping[str, np.ndarray]:
    """Read all arrays of an ``.npz``; pickled objects are never read."""
    with reading(path, ".npz (pickled objects are never read)"):
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise DataError(f"{path}: expected .npz, got a single array")
        with file:
            return {key: file[key] for key in file.files}


def _read_npz(path: Path) -> DataSource:
    arrays = _arrays(path)
    if "train_jpeg" in arrays:
        return _unpack_all(arrays, path)
    for train_images, train_labels, test_images, test_labels in NPZ_KEYS:
        if train_images not in arrays:
            continue
        test = None
        if test_images in arrays and test_images is not None and test_labels is not None:
            test = _npz_part(arrays, test_images, test_labels, path)
        return assemble(
            path.stem,
            _npz_part(arrays, train_images, train_labels, path),
            test,
            f"Arrays of {path.name}.",
        )
    expected = "; ".join(", ".join(filter(None, keys)) for keys in NPZ_KEYS)
    raise DataError(
        f"{path}: expected the arrays {expected}; or train_jpeg, train_offsets, train_labels; got "
        f"{', '.join(sorted(arrays)) or 'none'}"
    )


def _npz_part(arrays: Mapping[str, np.ndarray], images: str, labels: str, path: Path) -> Part:
    if labels not in arrays:
        raise DataError(f"{path}: expected the array {labels} beside {images}, got none")
    where = f"{path}: {images}"
    return Part(
        as_uint8(as_nchw(arrays[images], where), where),
        as_labels(arrays[labels], f"{path}: {labels}"),
        where,
    )


def _unpack_all(
    arrays: Mapping[str, np.ndarray],
    path: Path,
    parts: tuple[str, ...] = ("train", "test"),
    **options: Any,
) -> DataSource:
    """Decode the parts of an ``.npz`` of encoded files; ``options`` may bring another test set."""
    decode = Decoder(path)
    read: dict[str, Part] = {}
    for part in parts:
        keys = [f"{part}_{key}" for key in ("jpeg", "offsets", "labels")]
        missing = [key for key in keys if key not in arrays]
        if part == "test" and len(missing) == len(keys):
            continue
        if missing:
            raise DataError(f"{path}: expected the arrays {', '.join(keys)}, missing {missing}")
        files, offsets, labels = (arrays[key] for key in keys)
        read[part] = unpack(files, offsets, labels, decode, f"{path}: {part}")
    settings = {
        "name": path.stem,
        "test": read.get("test"),
        "description": f"Images of {path.name}, decoded from lossy files.",
    }
    return assemble(train=read["train"], **(settings | options))


def _read_cifar_jpeg(folder: Path) -> DataSource:
    """Read CIFAR-10 as JPEG, with the first 1,000 original test images if they are there."""
    path, lossless = folder / "cifar10-jpeg.npz", folder / "cifar10-lossless-test.npz"
    options: dict[str, Any] = {
        "name": "cifar10-jpeg",
        "classes": len(CIFAR_CLASSES),
        "class_names": CIFAR_CLASSES,
    }
    if not lossless.is_file():
        return _unpack_all(
            _arrays(path),
            path,
            **options,
            description="CIFAR-10 (Krizhevsky, 2009), trained and evaluated on a lossy JPEG copy; "
            "not the published benchmark.",
        )
    originals = _arrays(lossless)
    index = originals.get("index")
    if index is None:
        raise DataError(f"{lossless}: expected the array index, got {sorted(originals)}")
    test = _npz_part(originals, "images", "labels", lossless)
    if index.shape != test.labels.shape or not np.array_equal(
        index[:LOSSLESS_TEST_IMAGES], np.arange(LOSSLESS_TEST_IMAGES)
    ):
        raise DataError(
            f"{lossless}: expected the first {LOSSLESS_TEST_IMAGES} test images in their order"
        )
    first = slice(LOSSLESS_TEST_IMAGES)
    return _unpack_all(
        _arrays(path),
        path,
        ("train",),
        **options,
        test=Part(test.images[first], test.labels[first], str(lossless)),
        description="CIFAR-10 (Krizhevsky, 2009), trained on the lossy JPEG copy, evaluated on the "
        f"first {LOSSLESS_TEST_IMAGES:,} original test images; not the published benchmark.",
    )


def _numpy(value: Any) -> np.ndarray:
    """Return a tensor or array as an array; numpy has no bfloat16, so floats become float32."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        if value.is_floating_point() and value.dtype != torch.float64:
            value = value.to(torch.float32)
        return value.numpy()
    return np.asarray(value)


def _from_python(source: Any, where: str) -> Part:
    """Read a pair of arrays, an ImageSet or a map-style Dataset."""
    arrays = (torch.Tensor, np.ndarray)
    if isinstance(source, ImageSet):
        source = (source.images, source.labels)
    if (
        isinstance(source, (tuple, list))
        and len(source) == 2
        and all(isinstance(item, arrays) for item in source)
    ):
        images, labels = source
        values = _numpy(images)
        if isinstance(images, torch.Tensor) and values.ndim == 4:
            nchw = values
        else:
            nchw = as_nchw(values, where)
        return Part(as_uint8(nchw, where), as_labels(_numpy(labels), where), where)
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise DataError(
            f"{where}: expected a path, a pair (images, labels) of tensors or arrays, or a "
            f"map-style Dataset, got {type(source).__name__}"
        )
    return _from_dataset(source, where)


def _from_dataset(dataset: Any, where: str) -> Part:
    images: list[np.ndarray] = []
    labels: list[int] = []
    decode: Decoder | None = None
    # By position up to the length: a Dataset need not raise IndexError at its end.
    for i in range(len(dataset)):
        here = f"{where}: item {i}"
        item = dataset[i]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{here}: expected (image, label), got {type(item).__name__}")
        image, label = item
        if hasattr(image, "convert") and hasattr(image, "mode"):
            decode = decode or Decoder(where)
            chw = decode.array(image, here)
        else:
            values = _numpy(image)
            if isinstance(image, torch.Tensor) and values.ndim == 3:
                nchw = values[None]
            elif isinstance(image, torch.Tensor) or values.ndim == 2:
                nchw = as_nchw(values[None], here)
            elif values.ndim == 3:
                nchw = values.transpose(2, 0, 1)[None]
            else:
                raise DataError(
                    f"{here}: expected an image [C, H, W] or [H, W] (tensor), or [H, W, C] or "
                    f"[H, W] (array), got {type(image).__name__} {list(values.shape)}"
                )
            chw = as_uint8(nchw, here)[0]
        if images and chw.shape != images[0].shape:
            raise DataError(
                f"{here}: expected [C, H, W] = {list(images[0].shape)} as in item 0, got "
                f"{list(chw.shape)}"
            )
        value = _numpy(label)
        if value.size != 1 or value.dtype.kind not in "iu":
            raise DataError(f"{here}: expected an integer label, got {label!r:.40}")
        images.append(chw)
        labels.append(int(value.reshape(())))
    if not images:
        raise DataError(f"{where}: expected images, got an empty dataset")
    with reading(where, "labels of 64 bits"):
        return Part(np.stack(images), np.asarray(labels, np.int64), where)
