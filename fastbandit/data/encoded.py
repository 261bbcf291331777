"""Images stored as PNG, JPEG and the like: folders, parquet, and files packed end to end.

Pillow and pyarrow are optional (``pip install 'fastbandit[data]'``) and imported when needed.
"""

from __future__ import annotations

import importlib
import io
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbandit.data.arrays import (
    HELD_OUT,
    Part,
    as_labels,
    assemble,
    choose_test,
    numbered,
    reading,
)
from fastbandit.data.files import check_unpacked, size_of
from fastbandit.data.fitting import AS_IS, Fit
from fastbandit.data.sets import DataError, DataSource

# fmt: off
SUFFIXES = frozenset([
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".pbm", ".pgm", ".ppm",
    ".pnm", ".tif", ".tiff", ".webp",
])
# fmt: on
# Named to Pillow, which otherwise tries all it knows by content; some of those start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
# An image takes memory and time however small it is; it counts as this many bytes more.
OVERHEAD = 1024
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"


def require(module: str, package: str, purpose: object) -> Any:
    """Import an optional module, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(
            f"{purpose}: reading this needs {package}: pip install 'fastbandit[data]'"
        ) from error


def _is_deep(image: Any) -> bool:
    """Whether the file of an image has more than 8 bits for a channel.

    Pillow reads colours of 16 bits as 8 and says nothing; what it was told to unpack tells.
    """
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) > 8  # BitsPerSample
    if image.format not in ("PNG", "PPM") or not image.tile:
        return False
    codec, _, _, arguments = image.tile[0]
    if image.format == "PNG":
        return ";16" in str(arguments)
    # "raw" takes the name of a mode; the others the largest value, or the mode and that value.
    return codec != "raw" and isinstance(arguments, tuple) and arguments[-1] > 255


def _refuse_more(image: Any, where: str) -> None:
    """Refuse a file of which Pillow would pass over a part in silence."""
    if _is_deep(image):
        raise DataError(f"{where}: expected 8 bits for each channel, got 16")
    if getattr(image, "is_animated", False):
        raise DataError(f"{where}: expected one image, got a file of {image.n_frames} frames")


class Decoder:
    """Decodes images that are all grey or all RGB and of one size, as the first one is.

    ``stored`` is the size in bytes of the files they come from, so far; the caller counts a file
    that holds many images. What the images unpack to is bounded by it.
    """

    def __init__(self, purpose: object, fit: Fit = AS_IS) -> None:
        self._fit = fit
        self._pillow = require("PIL.Image", "Pillow", purpose)
        self._turn = require("PIL.ImageOps", "Pillow", purpose).exif_transpose
        self._first: tuple[str, tuple[int, int], str] | None = None  # mode, size, where
        self._unpacked = 0  # bytes
        self.stored = 0

    def __call__(self, source: bytes | Path, where: str) -> np.ndarray:
        """Return an encoded image as uint8 ``[C, H, W]``, turned as its orientation says."""
        if isinstance(source, Path):
            self.stored += size_of(source)
        with reading(where, "an image"):
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with self._pillow.open(file, formats=FORMATS) as image:
                _refuse_more(image, where)
                mode = self._mode(image, where)
                # Before the pixels are decoded, so that a false size costs no memory.
                self._unpacked += OVERHEAD + (1 if mode == "L" else 3) * math.prod(image.size)
                check_unpacked(self._unpacked, self.stored, where)
                self._turn(image, in_place=True)
                return self._array(image, mode, where)

    def array(self, image: Any, where: str) -> np.ndarray:
        """Return an open Pillow image, passed from Python, as uint8 ``[C, H, W]``."""
        with reading(where, "an image"):
            _refuse_more(image, where)
            # Whoever made the image may have turned it already, so it is not turned here.
            orientation = image.getexif().get(0x0112, 1)
            if orientation in range(2, 9):
                raise DataError(
                    f"{where}: expected an upright image, got one with EXIF orientation "
                    f"{orientation}; apply PIL.ImageOps.exif_transpose"
                )
            return self._array(image, self._mode(image, where), where)

    def _mode(self, image: Any, where: str) -> str:
        """Return the mode in which an image is read, that of the first one."""
        if image.mode in ("1", "L", "LA"):
            mode = "L"
        elif image.mode in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"):
            mode = "RGB"
        else:
            raise DataError(
                f"{where}: expected a grey or RGB image of 8 bits for each channel, got mode "
                f"{image.mode}"
            )
        if self._fit.mode is None and self._first is not None and mode != self._first[0]:
            words = {"L": "grey", "RGB": "RGB"}
            raise DataError(
                f"{where}: expected a {words[self._first[0]]} image as {self._first[2]} is, got "
                f"{words[mode]} ({image.mode}); --image-color rgb (or grey; image_color= from "
                "Python) makes all alike"
            )
        return mode

    def _array(self, image: Any, mode: str, where: str) -> np.ndarray:
        if self._first is None:
            self._first = (mode, image.size, where)
        _, size, first = self._first
        if image.size != size and self._fit.size is None:
            raise DataError(
                f"{where}: expected {size[0]} x {size[1]} pixels as in {first}, got "
                f"{image.size[0]} x {image.size[1]}; --image-size N "
                "(image_size= from Python) brings all to N x N"
            )
        if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A").getextrema()
            if alpha != (255, 255):
                raise DataError(f"{where}: expected an opaque image, got transparent pixels")
        mode = self._fit.mode or mode
        pixels = np.asarray(self._fit.resize(image.convert(mode)), np.uint8)
        return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _visible(folder: Path) -> list[Path]:
    """Return what is in ``folder`` in the order of names, but for what systems put there."""
    system = ("__macosx", "thumbs.db", "desktop.ini")
    return sorted(
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and path.name.lower() not in system
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.is_dir()


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()] if folder.is_dir() else []


def is_image_folder(folder: Path) -> bool:
    """Whether ``folder`` has ``train/<class>/`` or ``<class>/`` with an image in it."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    return any(_is_image(path) for place in _class_folders(root) for path in _visible(place))


def read_image_folder(folder: Path, fit: Fit = AS_IS) -> DataSource:
    """Read ``train/<class>/*`` with ``test/<class>/*`` if there, or ``<class>/*``.

    Classes are numbered in the order of their names. See :func:`choose_test` for ``val``. Other
    files are left out, and a warning and the description say how many.
    """
    decode = Decoder(folder, fit)
    has_train = (folder / "train").is_dir()
    root = folder / "train" if has_train else folder
    if not has_train and (folder / "test").is_dir():
        raise DataError(f"{folder}: expected the folder 'train' beside 'test', got none")
    held_out = [name for name in HELD_OUT if has_train and (folder / name).is_dir()]
    names = [path.name for path in _class_folders(root)]
    left_out: list[Path] = []

    def part(where: Path) -> Part:
        images, labels = [], []
        classes = _class_folders(where)
        left_out.extend(path for path in _visible(where) if not path.is_dir())
        for path in classes:
            if path.name not in names:
                raise DataError(f"{path}: expected a class of {root}, got '{path.name}'")
            entries = _visible(path)
            if deeper := [inner for inner in entries if inner.is_dir()]:
                raise DataError(
                    f"{path}: expected the images of a class in one folder, got the folder "
                    f"'{deeper[0].name}'"
                )
            files = [file for file in entries if _is_image(file)]
            if not files:
                raise DataError(f"{path}: expected images ({' '.join(sorted(SUFFIXES))}), got none")
            left_out.extend(file for file in entries if not _is_image(file))
            images += [decode(file, str(file)) for file in files]
            labels += [names.index(path.name)] * len(files)
        if not images:
            raise DataError(f"{where}: expected a folder for each class, got none")
        if missing := set(names) - {path.name for path in classes}:
            raise DataError(
                f"{where}: expected a folder for each class of {root}, got none for "
                f"'{min(missing)}'"
            )
        return Part(np.stack(images), np.asarray(labels, np.int64), str(where))

    train = part(root)
    chosen, note = choose_test(held_out, folder)
    test = part(folder / chosen) if chosen is not None else None
    if left_out:
        count = f"{len(left_out):,} file{'s' * (len(left_out) > 1)}"
        note += f" Left out {count} not read as an image of a class."
        warnings.warn(
            f"{folder}: left out {count} not read as an image of a class, {left_out[0]} for one",
            stacklevel=3,
        )
    return assemble(
        folder.resolve().name,
        train,
        test,
        f"Image folder {folder.resolve().name}.{note}{fit.describe()}",
        classes=len(names),
        class_names=names,
    )


# train-00000-of-00003.parquet; older files have a hash at the end.
_SHARD = re.compile(r"-(\d+)-of-(\d+)(-[0-9a-f]+)?$")


def parquet_files(folder: Path) -> dict[str, list[Path]]:
    """Return ``<part>*.parquet`` of ``folder`` or of its folder ``data``, by part.

    Parts are ``train``, those of :data:`HELD_OUT`, and an empty text for all other files; nothing
    is returned where no name begins with ``train``.
    """
    parts = ("train", *sorted(HELD_OUT, key=len, reverse=True))
    for place in (folder, folder / "data"):
        by_part: dict[str, list[Path]] = {}
        for path in _visible(place) if place.is_dir() else []:
            if path.suffix.lower() == ".parquet":
                name = path.name.lower()
                part = next((part for part in parts if name.startswith(part)), "")
                by_part.setdefault(part, []).append(path)
        if "train" in by_part:
            return by_part
    return {}


def read_parquet_folder(
    folder: Path, parts: Mapping[str, Sequence[Path]], fit: Fit = AS_IS
) -> DataSource:
    """Read the parts that :func:`parquet_files` found."""
    chosen, note = choose_test(list(parts), folder)
    train, test = parts["train"], parts[chosen] if chosen is not None else []
    for paths in (train, test):
        _check_shards(paths)
    others = parts.get("", ())
    if others:
        note += f" Not read: {', '.join(path.name for path in others[:5])}"
        note += f" and {len(others) - 5} more." if len(others) > 5 else "."
        warnings.warn(
            f"{folder}: expected parquet files train* and test*, left out {len(others)} other"
            f"{'s' * (len(others) > 1)}, {others[0].name} for one",
            stacklevel=3,
        )
    return read_parquet(folder.resolve().name, train, test, note, fit)


def _check_shards(paths: Sequence[Path]) -> None:
    """Refuse files ``*-00000-of-00003.parquet`` unless they are all of one set, once each."""
    matches = [_SHARD.search(path.stem) for path in paths]
    shards = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    if shards and sorted(shards) != [(i, len(paths)) for i in range(len(paths))]:
        raise DataError(
            f"{paths[0].parent}: expected each of {shards[0][1]} parquet files of one set, got "
            f"{len(paths)}: {', '.join(path.name for path in paths[:9])}"
        )


def read_parquet(
    name: str, train: Sequence[Path], test: Sequence[Path], note: str = "", fit: Fit = AS_IS
) -> DataSource:
    """Read parquet files with the columns ``image`` (or ``img``) and ``label``.

    An image is the bytes of an encoded image, or a struct with these in its field ``bytes``;
    a label is an integer, or in all rows a text: then classes are numbered in the order of the
    alphabet. ``note`` is added to the description.
    """
    parquet = require("pyarrow.parquet", "pyarrow", train[0])
    decode = Decoder(train[0], fit)

    def rows(path: Path) -> Iterator[tuple[Any, Any]]:
        stored = size_of(path)
        decode.stored += stored
        with reading(path, "parquet"), parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            images = [c for c in IMAGE_COLUMNS if c in columns]
            if len(images) != 1 or LABEL_COLUMN not in columns:
                raise DataError(
                    f"{path}: expected the columns '{IMAGE_COLUMNS[0]}' (or '{IMAGE_COLUMNS[1]}') "
                    f"and '{LABEL_COLUMN}', got {columns}"
                )
            groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
            unpacked = sum(group.total_byte_size for group in groups)
            check_unpacked(max(unpacked, OVERHEAD * file.metadata.num_rows), stored, path)
            # Few rows at a time: a dictionary may give each of them the same large value.
            for batch in file.iter_batches(batch_size=16, columns=[images[0], LABEL_COLUMN]):
                for image, label in zip(
                    batch.column(images[0]), batch.column(LABEL_COLUMN), strict=True
                ):
                    yield image.as_py(), label.as_py()

    def part(paths: Sequence[Path], names: Sequence[str] = ()) -> Part:
        images: list[np.ndarray] = []
        labels: list[Any] = []
        for path in paths:
            for i, (image, label) in enumerate(rows(path)):
                if isinstance(image, dict):
                    image = image.get("bytes")
                if not isinstance(image, bytes):
                    raise DataError(
                        f"{path}: row {i}: expected the bytes of an image, got "
                        f"{type(image).__name__}"
                    )
                kind = str if labels and isinstance(labels[0], str) else int
                kind = str if not labels and isinstance(label, str) else kind
                if isinstance(label, bool) or not isinstance(label, kind):
                    expected = "an integer label" if kind is int else "a text label"
                    raise DataError(f"{path}: row {i}: expected {expected}, got {repr(label)[:40]}")
                images.append(decode(image, f"{path}: row {i}"))
                labels.append(label)
        where = ", ".join(map(str, paths))
        if not images:
            raise DataError(f"{where}: expected images, got no row")
        with reading(where, "parquet"):
            numbers, classes = numbered(np.asarray(labels), where, names)
            return Part(np.stack(images), numbers, where, classes)

    first = part(train)
    return assemble(
        name,
        first,
        part(test, first.names) if test else None,
        f"Parquet files of {name}.{note}{fit.describe()}",
        classes=len(first.names) or None,
        class_names=first.names,
    )


def unpack(
    files: np.ndarray, offsets: np.ndarray, labels: np.ndarray, decode: Decoder, where: str
) -> Part:
    """Decode files packed end to end: file i is ``files[offsets[i]:offsets[i + 1]]``."""
    if files.dtype != np.uint8 or files.ndim != 1:
        raise DataError(f"{where}: expected bytes [B], got {files.dtype} {list(files.shape)}")
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(
            f"{where}: expected integer offsets [N + 1], N >= 1, got {offsets.dtype} "
            f"{list(offsets.shape)}"
        )
    bounds = offsets.tolist()
    if (
        bounds[0] != 0
        or bounds[-1] != len(files)
        or any(a >= b for a, b in itertools.pairwise(bounds))
    ):
        raise DataError(f"{where}: expected offsets that rise from 0 to {len(files)}")
    labels = as_labels(labels, where)
    if len(labels) != len(bounds) - 1:
        raise DataError(
            f"{where}: expected as many labels as images, got {len(bounds) - 1} images and "
            f"{len(labels)} labels"
        )
    content = files.tobytes()
    images = np.stack(
        [
            decode(content[a:b], f"{where}: image {i}")
            for i, (a, b) in enumerate(itertools.pairwise(bounds))
        ]
    )
    return Part(images, labels, where)
