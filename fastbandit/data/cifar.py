"""CIFAR-10 as its authors publish it: binary files, and Python files read without trust.

Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastbandit.data.arrays import Part, assemble, reading
from fastbandit.data.files import size_of
from fastbandit.data.sets import DataError, DataSource

CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
SHAPE = (3, 32, 32)
PIXELS = math.prod(SHAPE)
# Of a published file, 10,000 images and, in the Python files, their names.
LARGEST = 64 << 20  # bytes


def read_cifar(folder: Path, suffix: str) -> DataSource:
    """Read ``data_batch_1`` .. ``data_batch_5`` and ``test_batch``; all six must be there.

    Args:
        folder: the unpacked folder.
        suffix: ``.bin`` for the binary files, empty for the Python files.
    """
    batches = [folder / f"data_batch_{i}{suffix}" for i in range(1, 6)]
    batches.append(folder / f"test_batch{suffix}")
    missing = [path.name for path in batches if not os.path.lexists(path)]
    if missing:
        raise DataError(f"{folder}: CIFAR-10 is not complete, missing {', '.join(missing)}")
    read = _read_binary if suffix else _read_python
    parts = [read(path) for path in batches]
    train = Part(
        np.concatenate([part.images for part in parts[:-1]]),
        np.concatenate([part.labels for part in parts[:-1]]),
        str(folder / f"data_batch_*{suffix}"),
    )
    return assemble(
        "cifar10",
        train,
        parts[-1],
        f"CIFAR-10 (Krizhevsky, 2009), {'binary' if suffix else 'Python'} files.",
        classes=len(CLASSES),
        class_names=CLASSES,
    )


def _read_bytes(path: Path) -> bytes:
    size = size_of(path)
    if size > LARGEST:
        raise DataError(f"{path}: expected {LARGEST:,} bytes at most, got {size:,}")
    return path.read_bytes()


def _part(images: np.ndarray, labels: np.ndarray, path: Path) -> Part:
    wrong = np.flatnonzero((labels < 0) | (labels >= len(CLASSES)))
    if wrong.size:
        raise DataError(
            f"{path}: label {wrong[0]}: expected 0 .. {len(CLASSES) - 1}, got {labels[wrong[0]]}"
        )
    return Part(images.reshape(-1, *SHAPE), labels.astype(np.int64), str(path))


def _read_binary(path: Path) -> Part:
    """Records of 3,073 bytes: the label, then red, green and blue row by row."""
    with reading(path, "a CIFAR-10 binary file"):
        data = _read_bytes(path)
    if not data or len(data) % (PIXELS + 1):
        raise DataError(
            f"{path}: truncated: expected records of {PIXELS + 1} bytes, got {len(data)} bytes"
        )
    records = np.frombuffer(data, np.uint8).reshape(-1, PIXELS + 1)
    return _part(records[:, 1:], records[:, 0], path)


class _Dtype:
    """Stands in for numpy.dtype: remembers what it was told, does nothing."""

    def __init__(self, *args: Any) -> None:
        self.code = args[0] if args else None
        self.byte_order: Any = "|"

    def __setstate__(self, state: Any) -> None:
        self.byte_order = state[1]


class _Array:
    """Stands in for numpy.ndarray: remembers shape, type and bytes."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray:
        """Return the array, if it is a plain one of bytes or little-endian integers."""
        _, shape, dtype, fortran, data = self.state
        code = dtype.code.decode() if isinstance(dtype.code, bytes) else dtype.code
        order = dtype.byte_order
        order = order.decode() if isinstance(order, bytes) else order
        if code not in ("u1", "i4", "i8") or order not in ("|", "<"):
            raise DataError(f"expected an array of bytes or integers, got type {order}{code}")
        if fortran:
            raise DataError("expected an array stored row by row, got one stored by columns")
        return np.frombuffer(data, np.dtype(code).newbyteorder("<")).reshape(shape)


def _reconstruct(*_: Any) -> _Array:
    """Stands in for numpy's function of this name; the shape and the bytes come later."""
    return _Array()


# No name in a file ever reaches numpy, let alone anything else: a file can only build stand-ins.
_STAND_INS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
}

# What arrays, dicts, lists, bytes, text and integers are written with, protocols 0 to 4.
# fmt: off
_OPCODES = frozenset([
    "PROTO", "FRAME", "STOP", "MARK", "POP", "NONE", "NEWTRUE", "NEWFALSE",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2",
    "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS",
    "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
])
# fmt: on


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise DataError(
                f"refused to load {module}.{name}: a CIFAR-10 file holds arrays, dicts, lists, "
                "bytes and numbers"
            ) from None


def restricted_loads(data: bytes) -> Any:
    """Unpickle arrays, dicts, lists, tuples, bytes, text and integers, and nothing else.

    The opcodes are looked at before anything is executed; arrays come out as stand-ins with a
    method ``array()``.

    Raises:
        DataError: anything else is in the file. A damaged file may raise other exceptions.
    """
    for opcode, argument, position in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise DataError(f"refused pickle opcode {opcode.name} at byte {position}")
        # The memo is an array: a huge index would make the reader allocate and fill it.
        if opcode.name in ("PUT", "LONG_BINPUT") and not 0 <= (argument or 0) <= len(data):
            raise DataError(f"refused pickle memo index {argument} at byte {position}")
    return _Unpickler(io.BytesIO(data), encoding="bytes").load()


def _read_python(path: Path) -> Part:
    """A dict with ``data`` uint8 [n, 3072] and ``labels``, a list of n integers."""
    with reading(path, "a CIFAR-10 Python file"):
        content = _read_bytes(path)
        try:
            batch = restricted_loads(content)
            if not isinstance(batch, dict):
                raise DataError(f"expected a dict, got {type(batch).__name__}")
            named = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
            for key in ("data", "labels"):
                if key not in named:
                    texts = sorted(k for k in named if isinstance(k, str))
                    raise DataError(f"expected the key '{key}', got {texts}")
            if not isinstance(named["data"], _Array):
                raise DataError(f"data: expected an array, got {type(named['data']).__name__}")
            data = named["data"].array()
            labels = named["labels"]
            labels = labels.array() if isinstance(labels, _Array) else labels
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        if data.dtype != np.uint8 or data.shape != (len(labels), PIXELS):
            raise DataError(
                f"{path}: data: expected uint8 [{len(labels)}, {PIXELS}], as many rows as labels, "
                f"got {data.dtype} {list(data.shape)}"
            )
        for i, label in enumerate(labels):
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
                # The type only: lists that hold each other many times would take forever to print.
                raise DataError(
                    f"{path}: label {i}: expected an integer, got {type(label).__name__}"
                )
        if len(labels) == 0:
            raise DataError(f"{path}: expected images, got none")
        return _part(data, np.asarray(labels, np.int64), path)
