"""Files of a data set: nothing but regular files is opened, and what they unpack to is bounded."""

from __future__ import annotations

import io
import math
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from fastbandit.data.arrays import reading
from fastbandit.data.sets import DataError

# A compressed file may unpack to this many times its size, or to FREE bytes if that is more: far
# above what images of a data set reach, far below what a file made to fill the memory does.
EXPANSION = 200
FREE = 256 << 20

_NPY_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def what_is(path: Path) -> str:
    """Return what lies at ``path``, links followed, in words for a message."""
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a link to nothing" if path.is_symlink() else "nothing"
    for test, words in (
        (stat.S_ISREG, "a file"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return words
    return "a device"


def size_of(path: Path) -> int:
    """Return the bytes of a regular file; links are followed.

    To open a pipe or a device could wait for ever, so every file is looked at first.

    Raises:
        DataError: ``path`` is anything else.
    """
    kind = what_is(path)
    if kind != "a file":
        raise DataError(f"{path}: expected a regular file, got {kind}")
    return path.stat().st_size


def check_unpacked(unpacked: int, stored: int, where: object) -> None:
    """Refuse what unpacks to far more than is stored, before memory is taken for it.

    Args:
        unpacked, stored: bytes.
        where: what a message calls it.
    """
    allowed = max(FREE, EXPANSION * stored)
    if unpacked > allowed:
        raise DataError(
            f"{where}: expected to unpack to {allowed:,} bytes at most ({EXPANSION} times what is "
            f"stored, {stored:,} bytes, or {FREE:,} if that is more), got {unpacked:,}; IDX files "
            "and .npz arrays that are not compressed have no such limit"
        )


def read_bytes(stream: IO[bytes] | io.BufferedIOBase, size: int) -> np.ndarray:
    """Return the next ``size`` bytes of ``stream``, or fewer at its end, as uint8 ``[n]``."""
    content = np.empty(size, np.uint8)
    at = 0
    while at < size:
        chunk = stream.read(min(size - at, 1 << 20))
        if not chunk:
            break
        content[at : at + len(chunk)] = np.frombuffer(chunk, np.uint8)
        at += len(chunk)
    return content[:at]


class NpyFolder(Mapping[str, np.ndarray]):
    """The ``.npy`` files of a folder by their names, each read when it is asked for.

    They are not compressed, so an array takes the memory of its file.
    """

    def __init__(self, folder: Path) -> None:
        with reading(folder, "a folder"):
            self._files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix == ".npy"}

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, key: str) -> np.ndarray:
        path = self._files[key]
        size_of(path)
        with reading(path, "a .npy file of numbers"):
            array: np.ndarray = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "biufcUS":
            raise DataError(f"{path}: expected an array of numbers, got {array.dtype}")
        return array


class Npz(Mapping[str, np.ndarray]):
    """The arrays of an ``.npz`` file, each read when it is asked for.

    A pickled object is never read; an array is numbers, and no larger than :func:`check_unpacked`
    allows. Use it in a ``with`` statement.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stored = size_of(path)
        with reading(path, ".npz"):
            with path.open("rb") as file:
                if file.read(6) == b"\x93NUMPY":
                    raise DataError(f"{path}: expected .npz, got a single array")
            self._archive = zipfile.ZipFile(path)
        self._members = {
            member.filename.removesuffix(".npy"): member
            for member in self._archive.infolist()
            if member.filename.endswith(".npy")
        }

    def __enter__(self) -> Npz:
        return self

    def __exit__(self, *error: object) -> None:
        self._archive.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, key: str) -> np.ndarray:
        member = self._members[key]
        where = f"{self.path}: {key}"
        # The size of a member is what its directory claims; no more than that is ever unpacked.
        stored = min(member.compress_size, self.stored)
        check_unpacked(member.file_size, stored, where)
        with reading(where, ".npz"), self._archive.open(member) as file:
            version = npy.read_magic(file)
            if version not in _NPY_HEADERS:
                raise DataError(f"{where}: expected an array of numbers, got version {version}")
            shape, by_columns, dtype = _NPY_HEADERS[version](file)
            if dtype.hasobject:
                raise DataError(
                    f"{where}: expected an array of numbers, got pickled objects, which are never "
                    "read"
                )
            if dtype.kind not in "biufcUS":
                raise DataError(f"{where}: expected an array of numbers, got {dtype}")
            size = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or size != member.file_size - file.tell():
                raise DataError(
                    f"{where}: expected {size:,} bytes for {dtype} {list(shape)}, got "
                    f"{member.file_size - file.tell():,}"
                )
            content = read_bytes(file, size)
            file.read(1)  # at the end of a member its checksum is compared
            array = content.view(dtype).reshape(shape, order="F" if by_columns else "C")
        return array
