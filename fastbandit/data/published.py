"""The published files of MNIST, Fashion-MNIST and CIFAR-10, fetched where that is asked for.

Nothing is fetched by itself: only ``--download`` and :func:`download` use the network. Each file is
compared with the checksum that its publisher or torchvision states before it takes its place.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fastbandit._files import write_atomic
from fastbandit._suggest import did_you_mean
from fastbandit.data.sets import DataError

__all__ = ["PUBLISHED", "Published", "cache_folder", "cached", "download", "how_to_get"]

_IDX = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
_CIFAR = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_TIMEOUT = 60  # seconds without a byte
_LARGEST = 512 << 20  # bytes of a file


@dataclass(frozen=True)
class Published:
    """A data set as it is published.

    title: its name.
    address: where its files are.
    files: MD5 of each file that is fetched.
    members: of an archive, the files that are needed; empty where files are taken as they are.
    """

    title: str
    address: str
    files: Mapping[str, str]
    members: tuple[str, ...] = ()


def _idx(*digests: str) -> dict[str, str]:
    return dict(zip(_IDX, digests, strict=True))


PUBLISHED: dict[str, Published] = {
    "mnist": Published(
        "MNIST",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        _idx(
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "fashion-mnist": Published(
        "Fashion-MNIST",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        _idx(
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "cifar10": Published(
        "CIFAR-10",
        "https://www.cs.toronto.edu/~kriz/",
        {"cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530"},
        _CIFAR,
    ),
}


def cache_folder() -> Path:
    """Where fetched data lie: ``FASTBANDIT_DATA``, or ``fastbandit`` in the user's cache."""
    own = os.environ.get("FASTBANDIT_DATA")
    if own:
        return Path(own).expanduser()
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "fastbandit"


def _names(name: str) -> tuple[str, ...]:
    published = PUBLISHED[name]
    return published.members or tuple(published.files)


def cached(name: str) -> Path | None:
    """The folder of a data set that was fetched whole; None where it was not."""
    if name not in PUBLISHED:
        return None
    folder = cache_folder() / name
    whole = all((folder / file).is_file() for file in _names(name))
    return folder if whole else None


def how_to_get(name: str) -> str:
    """For a message: where the files of a data set are, and what to type; empty for others."""
    if name not in PUBLISHED:
        return ""
    published = PUBLISHED[name]
    files = ", ".join(published.files)
    return (
        f"{published.title} is published at {published.address} ({files}): "
        f"give --data FOLDER with its files, or --download to fetch them to {cache_folder()}"
    )


def download(
    name: str, *, address: str | None = None, say: Callable[[str], None] = lambda text: None
) -> Path:
    """Fetch a published data set to the cache, if it is not there.

    Args:
        name: of :data:`PUBLISHED`.
        address: a mirror to fetch from, ending in ``/``.
        say: is told what is fetched.

    Returns:
        The folder with its files, for :func:`fastbandit.data.load`.

    Raises:
        DataError: no such data set; it cannot be fetched; or a file is not the published one.
    """
    if name not in PUBLISHED:
        raise DataError(
            f"download: expected one of {', '.join(PUBLISHED)}, got {name!r}"
            f"{did_you_mean(str(name), PUBLISHED)}"
        )
    path = cached(name)
    if path is not None:
        return path
    published, folder = PUBLISHED[name], cache_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    base = address or published.address
    for file, digest in published.files.items():
        target = folder / file
        if not (target.is_file() and _md5(target.read_bytes()) == digest):
            say(f"fetching {base}{file}")
            content = _fetch(base + file)
            if (got := _md5(content)) != digest:
                raise DataError(
                    f"{base}{file}: expected the MD5 {digest}, got {got}; nothing was kept of it"
                )
            write_atomic(target, content)
        if published.members:
            _unpack(target, folder, published.members)
            target.unlink()
    return folder


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def _fetch(address: str) -> bytes:
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as answer:
            content: bytes = answer.read(_LARGEST + 1)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise DataError(
            f"{address}: cannot be fetched: {reason}; fetch it on a machine with a network and "
            "give --data FOLDER"
        ) from None
    if len(content) > _LARGEST:
        raise DataError(f"{address}: expected at most {_LARGEST:,} bytes, got more")
    return content


def _unpack(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Take the files that are needed out of an archive, whatever folders it has them in."""
    left = set(members)
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                name = member.name.rsplit("/", 1)[-1]
                stream = opened.extractfile(member) if name in left and member.isfile() else None
                if stream is not None:
                    write_atomic(folder / name, stream.read(_LARGEST))
                    left.discard(name)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{archive}: cannot be unpacked: {error}") from None
    if left:
        raise DataError(f"{archive}: expected the files {', '.join(sorted(left))}, got none")
