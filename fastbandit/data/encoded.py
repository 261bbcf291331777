"""Images stored as PNG, JPEG and the like: folders, parquet, and files packed end to end.

Pillow and pyarrow are optional (``pip install 'fastbandit[data]'``) and imported when needed.
"""

from __future__ import annotations

import importlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastbandit.data.arrays import Part, as_labels, assemble, reading
from fastbandit.data.sets import DataError, DataSource

SUFFIXES = frozenset(
    [".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"]
)
# Named to Pillow, which otherwise tries all it knows by content; some of those start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
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


class Decoder:
    """Decodes images that are all grey or all RGB and of one size, as the first one is."""

    def __init__(self, purpose: object) -> None:
        self._pillow = require("PIL.Image", "Pillow", purpose)
        self._first: tuple[str, tuple[int, int], str] | None = None  # mode, size, where

    def __call__(self, source: bytes | Path, where: str) -> np.ndarray:
        """Return uint8 ``[C, H, W]``."""
        with reading(where, "an image"):
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with self._pillow.open(file, formats=FORMATS) as image:
                return self.array(image, where)

    def array(self, image: Any, where: str) -> np.ndarray:
        """Return an open Pillow image as uint8 ``[C, H, W]``."""
        if image.mode in ("1", "L", "LA"):
            mode = "L"
        elif image.mode in ("RGB", "RGBA", "P", "PA", "CMYK", "YCbCr"):
            mode = "RGB"
        else:
            raise DataError(f"{where}: expected 8 bits for each channel, got mode {image.mode}")
        # Before the pixels are decoded, so that a wrong size costs no memory.
        if self._first is None:
            self._first = (mode, image.size, where)
        expected_mode, expected_size, first = self._first
        if image.size != expected_size:
            raise DataError(
                f"{where}: expected {expected_size[0]} x {expected_size[1]} pixels as in {first}, "
                f"got {image.size[0]} x {image.size[1]}"
            )
        if mode != expected_mode:
            words = {"L": "grey", "RGB": "RGB"}
            raise DataError(
                f"{where}: expected a {words[expected_mode]} image as {first} is, got "
                f"{words[mode]} ({image.mode})"
            )
        if image.mode in ("LA", "RGBA", "PA") or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A").getextrema()
            if alpha != (255, 255):
                raise DataError(f"{where}: expected an opaque image, got transparent pixels")
        pixels = np.asarray(image.convert(mode), np.uint8)
        return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _class_folders(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )


def is_image_folder(folder: Path) -> bool:
    """Whether ``folder`` has ``train/<class>/`` or ``<class>/`` with an image in it."""
    root = folder / "train" if (folder / "train").is_dir() else folder
    return any(_images_in(path) for path in _class_folders(root))


def read_image_folder(folder: Path) -> DataSource:
    """Read ``train/<class>/*`` with ``test/<class>/*`` if there, or ``<class>/*``.

    Classes are numbered in the order of their names; files without the suffix of an image are
    left out.
    """
    decode = Decoder(folder)
    has_train = (folder / "train").is_dir()
    root = folder / "train" if has_train else folder
    if not has_train and (folder / "test").is_dir():
        raise DataError(f"{folder}: expected the folder 'train' beside 'test', got none")
    names = [path.name for path in _class_folders(root)]

    def part(where: Path) -> Part:
        images, labels = [], []
        for path in _class_folders(where):
            if path.name not in names:
                raise DataError(f"{path}: expected a class of {root}, got '{path.name}'")
            files = _images_in(path)
            if not files:
                raise DataError(f"{path}: expected images ({' '.join(sorted(SUFFIXES))}), got none")
            images += [decode(file, str(file)) for file in files]
            labels += [names.index(path.name)] * len(files)
        if not images:
            raise DataError(f"{where}: expected a folder for each class, got none")
        return Part(np.stack(images), np.asarray(labels, np.int64), str(where))

    train = part(root)
    test = part(folder / "test") if has_train and (folder / "test").is_dir() else None
    return assemble(
        folder.resolve().name,
        train,
        test,
        f"Image folder {folder.resolve().name}.",
        classes=len(names),
        class_names=names,
    )


def parquet_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return ``train*.parquet`` and ``test*.parquet`` of ``folder`` or of its folder ``data``."""
    for place in (folder, folder / "data"):
        train = sorted(place.glob("train*.parquet"))
        if train:
            return train, sorted(place.glob("test*.parquet"))
    return [], []


def read_parquet(name: str, train: Sequence[Path], test: Sequence[Path]) -> DataSource:
    """Read parquet files with the columns ``image`` (or ``img``) and ``label``.

    An image is the bytes of an encoded image, or a struct with these in its field ``bytes``;
    a label is an integer.
    """
    parquet = require("pyarrow.parquet", "pyarrow", train[0])
    decode = Decoder(train[0])

    def rows(path: Path) -> Iterator[tuple[Any, Any]]:
        with reading(path, "parquet"), parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            image = next((c for c in IMAGE_COLUMNS if c in columns), None)
            if image is None or LABEL_COLUMN not in columns:
                raise DataError(
                    f"{path}: expected the columns '{IMAGE_COLUMNS[0]}' (or '{IMAGE_COLUMNS[1]}') "
                    f"and '{LABEL_COLUMN}', got {columns}"
                )
            for batch in file.iter_batches(batch_size=1024, columns=[image, LABEL_COLUMN]):
                yield from zip(
                    batch.column(image).to_pylist(),
                    batch.column(LABEL_COLUMN).to_pylist(),
                    strict=True,
                )

    def part(paths: Sequence[Path]) -> Part:
        images, labels = [], []
        for path in paths:
            for i, (image, label) in enumerate(rows(path)):
                if isinstance(image, dict):
                    image = image.get("bytes")
                if not isinstance(image, bytes):
                    raise DataError(
                        f"{path}: row {i}: expected the bytes of an image, got "
                        f"{type(image).__name__}"
                    )
                if isinstance(label, bool) or not isinstance(label, int):
                    raise DataError(f"{path}: row {i}: expected an integer label, got {label!r}")
                images.append(decode(image, f"{path}: row {i}"))
                labels.append(label)
        where = ", ".join(map(str, paths))
        if not images:
            raise DataError(f"{where}: expected images, got no row")
        with reading(where, "parquet"):
            return Part(np.stack(images), np.asarray(labels, np.int64), where)

    return assemble(name, part(train), part(test) if test else None, f"Parquet files of {name}.")


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
