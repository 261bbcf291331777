"""Readers: from files and Python objects to a :class:`DataSource`."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import importlib.resources
import math
import operator
import os
import re
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbandit._suggest import did_you_mean
from fastbandit.data.arrays import (
    HELD_OUT,
    Part,
    as_nchw,
    as_uint8,
    assemble,
    choose_test,
    numbered,
    reading,
)
from fastbandit.data.cifar import CLASSES as CIFAR_CLASSES
from fastbandit.data.cifar import read_cifar
from fastbandit.data.encoded import (
    Decoder,
    is_image_folder,
    parquet_files,
    read_image_folder,
    read_parquet,
    read_parquet_folder,
    unpack,
)
from fastbandit.data.files import NpyFolder, Npz, check_unpacked, read_bytes, size_of, what_is
from fastbandit.data.fitting import AS_IS, Fit, fitted
from fastbandit.data.objects import from_python
from fastbandit.data.published import PUBLISHED, cached, how_to_get
from fastbandit.data.sets import DataError, DataSource, digest_of

EMBEDDED = "digits"

# Images and labels by part; the second may be absent. "{}" stands for train, test and the like.
NPZ_KEYS: tuple[tuple[str, str], ...] = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))
# Images and labels of one part alone.
ALONE: tuple[tuple[str, str], ...] = (("images", "labels"), ("x", "y"))

LOOKED_FOR = """\
  IDX files             train-images-idx3-ubyte, train-labels-idx1-ubyte (t10k-... for testing),
                        each plain or .gz, also with emnist-letters- and the like before it
  CIFAR-10              data_batch_1.bin ... data_batch_5.bin, test_batch.bin (binary), or
                        data_batch_1 ... data_batch_5, test_batch (Python)
  parquet               train*.parquet (test*.parquet), here or in data/
  .npy files            train_images.npy, train_labels.npy (test_...), or x.npy, y.npy
  CIFAR-10 JPEG copy    cifar10-jpeg.npz (cifar10-lossless-test.npz)
  image folder          train/<class>/*.png (test/<class>/*.png), or <class>/*.png
  the folders that torchvision makes: MNIST/raw, cifar-10-batches-py and the like\
"""

# Where torchvision and the publishers' archives put their files.
BELOW = (
    "raw",
    *(f"{name}/raw" for name in ("MNIST", "FashionMNIST", "KMNIST", "EMNIST")),
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
)

# The reports name how many original test images were used; the rest of the copy is lossy.
LOSSLESS_TEST_IMAGES = 1000


def load(
    source: Any,
    test: Any = None,
    *,
    name: str | None = None,
    classes: int | None = None,
    image_size: int | None = None,
    image_color: str | None = None,
) -> DataSource:
    """Read a data set.

    A text or path is one of:

    - ``digits``: the embedded data set (a folder of that name is ``./digits``);
    - ``mnist``, ``fashion-mnist``, ``cifar10``, where :func:`fastbandit.data.download` fetched them
      (a file or folder of that name goes first);
    - a folder of IDX files, as MNIST and Fashion-MNIST are published, plain or ``.gz``; where
      it holds several sets (EMNIST), the file of the training images of one;
    - a folder with CIFAR-10's binary files, or with its Python files (read by an unpickler that
      builds nothing but arrays, dicts, lists, bytes, text and integers);
    - the folder above these as torchvision makes it (``MNIST/raw``, ``FashionMNIST/raw``,
      ``KMNIST/raw``, ``EMNIST/raw``, ``cifar-10-batches-py``), if there is one of them;
    - an ``.npz`` file with ``train_images``, ``train_labels`` (and ``test_images``,
      ``test_labels``), or ``x_train``, ``y_train`` (``x_test``, ``y_test``), or ``images``,
      ``labels``, or ``x``, ``y``; images ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]`` with
      1 or 3 channels; or with ``train_jpeg``, ``train_offsets``, ``train_labels`` (and the same
      for ``test``), encoded files end to end (needs Pillow);
    - a folder with ``train/<class>/*`` (and ``test/<class>/*``) or ``<class>/*``, images of one
      size and either all grey or all RGB (needs Pillow);
    - a folder with the arrays of such an ``.npz`` as ``.npy`` files of these names;
    - a ``.parquet`` file, or a folder with ``train*.parquet`` (and ``test*.parquet``), columns
      ``image`` and ``label`` (needs Pillow and pyarrow);
    - a folder with ``cifar10-jpeg.npz``; with ``cifar10-lossless-test.npz`` beside it, the test
      images are the first 1,000 originals.

    A part ``val``, ``valid`` or ``validation`` is the test set where there is no part ``test``;
    where there is, it is not read, with a warning.

    Labels are integers from 0, or text: classes are then numbered in the order of the alphabet.

    From Python, also a pair (images, labels) of tensors (``[N, H, W]`` or ``[N, C, H, W]``), of
    arrays (layouts as for ``.npz``) or of lists, a dict or DataFrame of columns (``image`` or
    ``x``, ``label`` or ``y``), an :class:`ImageSet`, a DataLoader, or a map-style torch Dataset of
    (image, label) or of dicts with these: tensors ``[C, H, W]`` or ``[H, W]``, arrays ``[H, W]``,
    ``[H, W, C]`` or ``[C, H, W]`` with 1 or 3 channels, or Pillow images; those of a list and of a
    column too. A dataset is read once, so it must not
    augment.

    The layout of an array follows from where its 1 or 3 channels are; an array that may be either
    is refused. A tensor is always ``[N, C, H, W]``, with any number of channels; one that has 1 or
    3 channels only if they are last is refused.

    Images are integers 0 .. 255, float in [0, 1] or bool (black and white); floats are stored as
    round(255 x), with a warning where that moves pixels. Encoded images have 8 bits for each
    channel or fewer, no transparent pixel and one frame; their EXIF orientation is applied.

    Links are followed; pipes and devices are refused. A compressed file may unpack to 200 times its
    size, or to 256 MiB if that is more; see :mod:`fastbandit.data.files`.

    Args:
        source: see above.
        test: test images. Of a path another path, whose training images they are, in place of what
            the first one brings; else of the kinds that Python may pass.
        name: name of the data set; by default that of the file or folder.
        classes: number of classes; by default the largest training label plus one.
        image_size: bring all images to so many pixels in both directions: resized, antialiased, so
            that the shorter side fits, then cut to the middle. Needs Pillow.
        image_color: ``"rgb"`` or ``"grey"``: make all images so. Needs Pillow.

    Raises:
        DataError: nothing usable there; the message names file and position, expected and got.
    """
    fit = Fit(image_size, image_color)
    if isinstance(source, (str, os.PathLike)):
        if classes is not None:
            raise DataError("load: expected classes with Python objects only, got a path")
        if os.fspath(source) == EMBEDDED:
            data = _digits()
        elif not os.fspath(source):
            raise DataError(f"load: expected {EMBEDDED} or a path, got an empty text")
        else:
            try:
                data = _load_path(Path(source).expanduser(), fit)
            except OSError as error:
                raise DataError(f"{source}: cannot be read: {error}") from error
        if test is not None:
            data = _with_test(data, test, image_size, image_color)
        data = fitted(data, fit)
        return data if name is None else dataclasses.replace(data, name=name)
    if isinstance(test, (str, os.PathLike)):
        raise DataError(
            f"test data: expected a Python object as the training data, got {type(test).__name__}"
        )
    if classes is not None:
        if isinstance(classes, bool) or not hasattr(classes, "__index__") or classes < 2:
            raise DataError(f"load: classes: expected an integer of at least 2, got {classes!r}")
        classes = operator.index(classes)
    train = from_python(source, "training data", fit=fit)
    data = assemble(
        name or "custom",
        train,
        None if test is None else from_python(test, "test data", train.names, fit),
        "Passed from Python; float images are rounded to 1/255.",
        classes=classes if classes is not None or not train.names else len(train.names),
        class_names=train.names,
    )
    return fitted(data, fit)


def load_data(config: Any, source: DataSource | None = None) -> DataSource:
    """The images that the settings of a command name, ``data``, or ``source``, brought to what they
    ask for, ``image_size`` and ``image_color``."""
    if source is not None:
        return fitted(source, Fit(config.image_size, config.image_color))
    return load(config.data, image_size=config.image_size, image_color=config.image_color)


def _with_test(
    data: DataSource, test: Any, image_size: int | None, image_color: str | None
) -> DataSource:
    """``data`` with the training images of another path to test on."""
    if not isinstance(test, (str, os.PathLike)):
        raise DataError(
            f"load: test: expected a path as the training data, got {type(test).__name__}"
        )
    other = load(test, image_size=image_size, image_color=image_color)
    if other.class_names != data.class_names or other.classes > data.classes:
        raise DataError(
            f"{test}: expected the classes of {data.name} ({_classes(data)}), got {_classes(other)}"
        )
    if other.train.shape != data.train.shape:
        raise DataError(
            f"{test}: expected images [C, H, W] = {list(data.train.shape)} as in {data.name}, got "
            f"{list(other.train.shape)}; image_size and image_color make them alike"
        )
    return dataclasses.replace(
        data,
        test=other.train,
        description=f"{data.description} The test images are those of {other.name}.",
        digest=digest_of(data.train, other.train),
    )


def _classes(data: DataSource) -> str:
    names = ", ".join(data.class_names[:5]) + ", ..." * (len(data.class_names) > 5)
    return f"{data.classes}: {names}" if names else str(data.classes)


def _load_path(path: Path, fit: Fit) -> DataSource:
    what = what_is(path)
    if what == "a file":
        if path.suffix.lower() == ".npz":
            return _read_npz(path, fit)
        if path.suffix.lower() == ".parquet":
            return read_parquet(path.stem, [path], [], fit=fit)
        match = _IDX_NAME.fullmatch(path.name)
        if match and (match["part"], match["kind"]) == ("train", "images"):
            return _read_idx_folder(path.parent, match["set"])
        raise DataError(
            f"{path}: expected a .npz or .parquet file, the IDX file of training images, or a "
            f"folder; for CIFAR-10 and .npy files name the folder that holds them"
        )
    if what != "a folder":
        if what == "nothing" and (fetched := cached(str(path))) is not None:
            return dataclasses.replace(_load_path(fetched, fit), name=str(path))
        if what.endswith("nothing"):
            what = "no such file or folder"
        hint = how_to_get(str(path)) or f"expected {EMBEDDED} (embedded) or a path"
        raise DataError(f"{path}: {what}; {hint}{did_you_mean(str(path), (EMBEDDED, *PUBLISHED))}")
    readers = _readers(path, fit)
    if not readers:
        below = {name: _readers(path / name, fit) for name in BELOW if (path / name).is_dir()}
        readers = {f"{name}: {kind}": r for name in below for kind, r in below[name].items()}
    if not readers and is_image_folder(path):
        return read_image_folder(path, fit)
    if not readers:
        raise DataError(f"{path}: found no data set; looked for\n{LOOKED_FOR}")
    if len(readers) > 1:
        raise DataError(
            f"{path}: expected one data set, got {', '.join(readers)}; name its folder, or of IDX "
            "files that of the training images"
        )
    (read,) = readers.values()
    return read()


def _readers(folder: Path, fit: Fit) -> dict[str, Callable[[], DataSource]]:
    """Return what reads the data sets of files in ``folder``, by what they are."""
    with reading(folder, "a folder"):
        names = {entry.name for entry in folder.iterdir()}
    readers: dict[str, Callable[[], DataSource]] = {}
    for match in filter(None, map(_IDX_NAME.fullmatch, sorted(names))):
        words = f"IDX files {match['set'] or ''}".rstrip(" -")
        readers[words] = functools.partial(_read_idx_folder, folder, match["set"])
    for suffix in (".bin", ""):
        if any(re.fullmatch(rf"data_batch_\d+{re.escape(suffix)}", name) for name in names):
            readers["CIFAR-10"] = functools.partial(read_cifar, folder, suffix)
            break
    if parts := parquet_files(folder):
        readers["parquet"] = functools.partial(read_parquet_folder, folder, parts, fit)
    if {"train_images.npy", "x_train.npy", "images.npy", "x.npy"} & names:
        readers[".npy files"] = functools.partial(_read_npy_folder, folder)
    if "cifar10-jpeg.npz" in names:
        readers["cifar10-jpeg.npz"] = functools.partial(_read_cifar_jpeg, folder)
    return readers


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
    r"(?P<set>emnist-(byclass|bymerge|balanced|letters|digits|mnist)-)?"
    r"(?P<part>train|t10k|test)-(?P<kind>images|labels)[-.]idx[13][-.]ubyte(?P<gz>\.gz)?"
)

# EMNIST (Cohen et al., 2017): its lower-case letters that look like their capitals are merged.
_MERGED = string.digits + string.ascii_uppercase + "abdefghnqrt"
_EMNIST_CLASSES = {
    "emnist-byclass-": string.digits + string.ascii_uppercase + string.ascii_lowercase,
    "emnist-bymerge-": _MERGED,
    "emnist-balanced-": _MERGED,
    "emnist-letters-": string.ascii_lowercase,
    "emnist-digits-": string.digits,
    "emnist-mnist-": string.digits,
}


def _read_idx_folder(folder: Path, prefix: str | None) -> DataSource:
    """Read the IDX files of ``folder`` whose names begin with ``prefix``.

    EMNIST's images are stored column by column and its letters count from 1: here they stand
    upright, as MNIST's, and labels count from 0.
    """
    files: dict[tuple[str, str], Path] = {}
    # Sorted, the plain file comes before its .gz and is the one kept.
    for path in sorted(folder.iterdir()):
        match = _IDX_NAME.fullmatch(path.name)
        if match and match["set"] == prefix:
            part = "train" if match["part"] == "train" else "test"
            first = files.setdefault((part, match["kind"]), path)
            if path.name.removesuffix(".gz") != first.name.removesuffix(".gz"):
                raise DataError(
                    f"{folder}: expected one IDX file of {part} {match['kind']}, got {first.name} "
                    f"and {path.name}"
                )
    for part in ("train", "test"):
        kinds = [kind for kind in ("images", "labels") if (part, kind) in files]
        if len(kinds) == 1 or (part == "train" and not kinds):
            raise DataError(
                f"{folder}: expected the IDX files of {part} images and labels, got "
                f"{', '.join(kinds) or 'neither'} only"
            )

    lowest = int(prefix == "emnist-letters-")

    def read(part: str) -> Part:
        images = _read_idx(files[part, "images"], 3)
        labels = _read_idx(files[part, "labels"], 1).astype(np.int64)
        if lowest and not labels.all():
            raise DataError(f"{files[part, 'labels']}: expected labels 1 .. 26, got 0")
        if prefix is not None:
            images = images.transpose(0, 2, 1)
        return Part(images[:, None], labels - lowest, str(files[part, "images"]))

    train = read("train")
    test = read("test") if ("test", "images") in files else None
    if prefix is None:
        place = folder.resolve()
        label = place.parent.name if place.name == "raw" else place.name
        return assemble(label, train, test, f"IDX files of {label}.")
    description = "EMNIST (Cohen et al., 2017), IDX files, images turned upright"
    if lowest:
        description += ", labels 1 .. 26 read as 0 .. 25"
    names = _EMNIST_CLASSES[prefix]
    return assemble(
        prefix.rstrip("-"), train, test, f"{description}.", classes=len(names), class_names=names
    )


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes: magic 00 00 08 <dimensions>, sizes, data (big-endian)."""
    stored = size_of(path)
    packed = path.suffix == ".gz"
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 8, dimensions])
    with (
        reading(path, "an IDX file"),
        gzip.open(path) if packed else path.open("rb") as file,
    ):
        head = file.read(header)
        if head[:4] != magic:
            raise DataError(
                f"{path}: expected magic {magic.hex()}, got {head[:4].hex() or 'nothing'}"
            )
        if len(head) < header:
            raise DataError(
                f"{path}: truncated: expected a header of {header} bytes, got {len(head)}"
            )
        shape = [int.from_bytes(head[i : i + 4], "big") for i in range(4, header, 4)]
        size = math.prod(shape)
        # What the header claims is checked before memory is taken for it.
        if packed:
            check_unpacked(size, stored, path)
        elif stored != header + size:
            raise DataError(f"{path}: expected {header + size} bytes for {shape}, got {stored}")
        data = read_bytes(file, size)
        more = " and more" if file.read(1) else ""
        if more or len(data) < size:
            raise DataError(
                f"{path}: expected {header + size} bytes for {shape}, got "
                f"{header + len(data)}{more}"
            )
    return data.reshape(shape)


def _read_npz(path: Path, fit: Fit) -> DataSource:
    with Npz(path) as arrays:
        if "train_jpeg" in arrays:
            return _unpack_all(arrays, path, fit=fit)
        return _read_arrays(arrays, path, path.stem)


def _read_npy_folder(folder: Path) -> DataSource:
    return _read_arrays(NpyFolder(folder), folder, folder.resolve().name)


def _read_arrays(arrays: Mapping[str, np.ndarray], path: Path, name: str) -> DataSource:
    """The arrays of an ``.npz`` file, or of a folder of ``.npy`` files."""
    sets = [keys for keys in NPZ_KEYS if keys[0].format("train") in arrays]
    alone = [keys for keys in ALONE if keys[0] in arrays]
    parts: list[str] = []
    if not sets and len(alone) == 1:
        sets = alone
    elif len(sets) == 1:
        (keys,) = sets
        parts = [p for p in HELD_OUT if any(key.format(p) in arrays for key in keys)]
    else:
        expected = "; ".join(
            ", ".join(key.format(part) for part in ("train", "test") for key in keys)
            for keys in NPZ_KEYS
        )
        raise DataError(
            f"{path}: expected the arrays {expected}; images, labels; x, y; or train_jpeg, "
            f"train_offsets, train_labels; got {', '.join(sorted(arrays)) or 'none'}"
        )
    images, labels = sets[0]
    train = _npz_part(arrays, images.format("train"), labels.format("train"), path)
    chosen, note = choose_test(parts, path)
    test = None
    if chosen is not None:
        keys = (images.format(chosen), labels.format(chosen))
        test = _npz_part(arrays, *keys, path, train.names)
    return assemble(
        name,
        train,
        test,
        f"Arrays of {path.resolve().name}.{note}",
        classes=len(train.names) or None,
        class_names=train.names,
    )


def _npz_part(
    arrays: Mapping[str, np.ndarray],
    images: str,
    labels: str,
    path: Path,
    names: Sequence[str] = (),
) -> Part:
    for one, other in ((images, labels), (labels, images)):
        if one not in arrays:
            raise DataError(f"{path}: expected the array {one} beside {other}, got none")
    where = f"{path}: {images}"
    numbers, classes = numbered(arrays[labels], f"{path}: {labels}", names)
    pixels, moved = as_uint8(as_nchw(arrays[images], where), where)
    return Part(pixels, numbers, where, classes, moved)


def _unpack_all(
    arrays: Npz,
    path: Path,
    parts: tuple[str, ...] = ("train", "test"),
    fit: Fit = AS_IS,
    **options: Any,
) -> DataSource:
    """Decode the parts of an ``.npz`` of encoded files; ``options`` may bring another test set."""
    decode = Decoder(path, fit)
    decode.stored = arrays.stored
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
    if not os.path.lexists(lossless):
        with Npz(path) as arrays:
            return _unpack_all(
                arrays,
                path,
                **options,
                description="CIFAR-10 (Krizhevsky, 2009), trained and evaluated on a lossy JPEG "
                "copy; not the published benchmark.",
            )
    with Npz(lossless) as originals:
        if "index" not in originals:
            raise DataError(f"{lossless}: expected the array index, got {sorted(originals)}")
        index = originals["index"]
        test = _npz_part(originals, "images", "labels", lossless)
    if index.shape != test.labels.shape or not np.array_equal(
        index[:LOSSLESS_TEST_IMAGES], np.arange(LOSSLESS_TEST_IMAGES)
    ):
        raise DataError(
            f"{lossless}: expected the first {LOSSLESS_TEST_IMAGES} test images in their order"
        )
    first = slice(LOSSLESS_TEST_IMAGES)
    with Npz(path) as arrays:
        return _unpack_all(
            arrays,
            path,
            ("train",),
            **options,
            test=Part(test.images[first], test.labels[first], str(lossless)),
            description="CIFAR-10 (Krizhevsky, 2009), trained on the lossy JPEG copy, evaluated on "
            f"the first {LOSSLESS_TEST_IMAGES:,} original test images; not the published "
            "benchmark.",
        )
