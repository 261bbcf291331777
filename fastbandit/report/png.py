"""Pictures as PNG data URIs, written with zlib alone."""

from __future__ import annotations

import base64
import struct
import zlib
from typing import Any

import numpy as np

__all__ = ["data_uri", "encode"]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _chunk(kind: bytes, data: bytes) -> bytes:
    crc = zlib.crc32(data, zlib.crc32(kind))
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def encode(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """A PNG file: 8 bits a channel, not interlaced, no filter.

    Args:
        pixels: uint8, [H, W] for grey or [H, W, 3] for red, green and blue.

    Raises:
        ValueError: another shape or type, or no pixel.

    Source: PNG specification (RFC 2083), sections 3, 4.1 and 6.
    """
    grey = pixels.ndim == 2
    if pixels.dtype != np.uint8 or not (grey or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise ValueError(
            "png.encode: pixels: expected uint8 of shape [H, W] or [H, W, 3], "
            f"got {pixels.dtype} of shape {list(pixels.shape)}"
        )
    height, width = pixels.shape[:2]
    if height == 0 or width == 0:
        raise ValueError(f"png.encode: pixels: expected at least one, got {height} x {width}")
    rows = np.ascontiguousarray(pixels).reshape(height, -1)
    # Every row begins with the number of its filter, 0: none.
    filtered = np.concatenate([np.zeros((height, 1), dtype=np.uint8), rows], axis=1)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if grey else 2, 0, 0, 0)
    return (
        _SIGNATURE
        + _chunk(b"IHDR", header)
        + _chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9))
        + _chunk(b"IEND", b"")
    )


def data_uri(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> str:
    """The picture as an address that asks for nothing; see :func:`encode`."""
    return "data:image/png;base64," + base64.b64encode(encode(pixels)).decode("ascii")
