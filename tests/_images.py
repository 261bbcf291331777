"""Small files of images, written in the forms that data sets are published in."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from fastbandit.data import ImageSet


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, gz: bool) -> None:
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        content = idx(array)
        name = f"{part}-{kind}-ubyte" + (".gz" if gz else "")
        (folder / name).write_bytes(gzip.compress(content) if gz else content)


def write_cifar_binary(folder: Path, n: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    written = {}
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        images, labels = pixels(n, 3, 32, 32, seed=k), np.arange(n) + k
        records = np.concatenate([labels[:, None].astype(np.uint8), images.reshape(n, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
        written[name] = (images, labels)
    return written


def old_pickle(images: np.ndarray, labels: list[int]) -> bytes:
    """The form of the published files: protocol 2 as Python 2 wrote it, text as bytes."""

    def short(text: bytes) -> bytes:
        return b"U" + bytes([len(text)]) + text

    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + short(b"b") + b"\x87R"
        b"(K\x01"
        + b"".join(b"J" + size.to_bytes(4, "little") for size in images.shape)
        + b"\x86cnumpy\ndtype\n"
        + short(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + short(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + images.size.to_bytes(4, "little")
        + images.tobytes()
        + b"tb"
    )
    entries = b"".join(
        short(key) + value
        for key, value in (
            (b"batch_label", short(b"batch 1 of 5")),
            (b"labels", b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"),
            (b"data", array),
            (b"filenames", b"](" + short(b"a.png") + b"e"),
        )
    )
    return b"\x80\x02}(" + entries + b"u."


def png(array: np.ndarray, mode: str | None = None, kind: str = "png") -> bytes:
    image_module = pytest.importorskip("PIL.Image")
    image = image_module.fromarray(array)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, kind)
    return file.getvalue()


def write_folder(root: Path, shape: tuple[int, ...], per_class: int = 2) -> np.ndarray:
    """Write two classes of images; returns them in the order of their names."""
    written = []
    for k, name in enumerate(("ant", "bee")):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            image = pixels(*shape, seed=10 * k + i)
            (root / name / f"{i}.png").write_bytes(png(image))
            written.append(image)
    return np.stack(written)


def assert_images(images: ImageSet, expected: np.ndarray, labels: object) -> None:
    assert torch.equal(images.images, torch.from_numpy(np.ascontiguousarray(expected)))
    assert images.labels.tolist() == list(labels)
