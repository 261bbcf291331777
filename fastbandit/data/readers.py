"""Readers: from files and Python objects to a :class:`DataSource`."""

from __future__ import annotations

import importlib.resources
import os

import numpy as np
import torch

from fastbandit.data.sets import DataError, DataSource, ImageSet, digest_of


def load(source: str | os.PathLike[str]) -> DataSource:
    """Read a data set."""
    if os.fspath(source) == "digits":
        return _digits()
    raise DataError(f"{source}: not a known data set")


def _digits() -> DataSource:
    """Read the embedded digits (Alpaydin and Kaynak, 1998), the official split."""
    path = importlib.resources.files("fastbandit") / "_data" / "digits.npz"
    parts = {}
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        for part in ("train", "test"):
            # The file keeps the values 0 .. 16 of the original; this is round(255 v / 16).
            values = arrays[f"{part}_images"].astype(np.int64)
            images = ((255 * values + 8) // 16).astype(np.uint8)[:, None]
            labels = arrays[f"{part}_labels"].astype(np.int64)
            parts[part] = ImageSet(torch.from_numpy(images), torch.from_numpy(labels))
    return DataSource(
        name="digits",
        train=parts["train"],
        test=parts["test"],
        classes=10,
        description="UCI Optical Recognition of Handwritten Digits (Alpaydin and Kaynak, 1998, "
        "doi:10.24432/C50P49, CC BY 4.0), official split, 8 x 8, grey values 0 .. 16 scaled to "
        "0 .. 255.",
        digest=digest_of(parts["train"], parts["test"]),
        class_names=tuple("0123456789"),
    )
