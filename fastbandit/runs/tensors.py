"""Tensor files: safetensors with a checksum over everything that they say.

Files of version 1 have a checksum of the tensors alone; they are read as they are. No single
damaged byte makes a file of version 2 look like one of version 1.
"""

from __future__ import annotations

import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from fastbandit._files import MEGABYTE, canonical_json, parse_json, write_atomic

__all__ = ["CheckpointError", "RunError", "kind_of", "load_tensors", "save_tensors"]

# One key for everything: the order of several keys in a safetensors header is not fixed, and two
# runs of the same seed must give the same bytes.
_METADATA_KEY = "fastbandit"


class RunError(ValueError):
    """A run folder that cannot be used as asked; the message says why and what to do."""


class CheckpointError(RunError):
    """A tensor file that is damaged, or is not one of ours."""


# Version 1 has a checksum of names and bytes of the tensors alone.
_VERSION = 2
_LARGEST_HEADER = 32 * MEGABYTE  # bytes; ours have a few hundred thousand


# The names of the format, in the order in which the library puts tensors into a file.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def _bytes_of(tensors: dict[str, Tensor]) -> dict[str, memoryview]:
    """The bytes of each tensor, dense and on the CPU."""
    return {
        name: tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        for name, tensor in tensors.items()
    }


def _digest(
    tensors: dict[str, Tensor], data: dict[str, memoryview], header: dict[str, Any] | None
) -> int:
    """CRC-32 over all that a file says: safetensors itself does not notice a flipped bit."""
    crc = 0
    if header is not None:
        kinds = {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}
        crc = zlib.crc32(canonical_json([header, kinds]).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(data[name], zlib.crc32(name.encode(), crc))
    return crc


def _safetensors(
    tensors: dict[str, Tensor], data: dict[str, memoryview], metadata: dict[str, str]
) -> bytes:
    """The file that the library would write, byte for byte.

    The library takes a tenth of a millisecond for each tensor, and a supernet has thousands, which
    are saved after every epoch.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
            raise TypeError(f"{name}: expected a tensor of {dtypes}, got {tensor.dtype}")
    order = {dtype: place for place, dtype in enumerate(_NAMES)}
    header: dict[str, Any] = {"__metadata__": metadata}
    parts, end = [], 0
    for name in sorted(tensors, key=lambda name: (order[tensors[name].dtype], name)):
        begin, end = end, end + data[name].nbytes
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [begin, end],
        }
        parts.append(data[name])
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def save_tensors(
    path: Path, tensors: dict[str, Tensor], kind: str, metadata: dict[str, Any]
) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    data = _bytes_of(tensors)
    # As it will be read: keys are text, tuples are lists.
    header = json.loads(canonical_json({"kind": kind, "version": _VERSION, **metadata}))
    header["crc32"] = _digest(tensors, data, header)
    write_atomic(path, _safetensors(tensors, data, {_METADATA_KEY: canonical_json(header)}))


def _read_safetensors(path: Path, limit: int | None) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file."""
    status = os.stat(path)  # before it is opened: a pipe would keep us waiting
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: expected a file")
    if limit is not None and status.st_size > limit:
        raise CheckpointError(f"{path}: expected at most {limit:,} bytes, got {status.st_size:,}")
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(max(status.st_size - 8, 0), _LARGEST_HEADER):
            raise CheckpointError(
                f"{path}: damaged or not a safetensors file: a header of {length:,} bytes"
            )
        try:
            str(path).encode()
        except UnicodeEncodeError:
            # The library takes names of UTF-8 alone.
            data = file.read()
            text = parse_json(data[:length]).get("__metadata__", {})
            return load(length.to_bytes(8, "little") + data), text
    with safe_open(path, framework="pt") as opened:
        text = opened.metadata() or {}
        return {name: opened.get_tensor(name) for name in opened.keys()}, text  # noqa: SIM118


def load_tensors(
    path: Path, kind: str, limit: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file that :func:`save_tensors` wrote.

    Args:
        limit: bytes of a file that is read; None: any.

    Raises:
        CheckpointError: not a safetensors file, not ours, of another kind or version, too large,
            or damaged, in tensors or in metadata.
    """
    try:
        tensors, text = _read_safetensors(path, limit)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, AttributeError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged or not a safetensors file: {error}") from None
    if _METADATA_KEY not in text:
        raise CheckpointError(f"{path}: a safetensors file, but not one that fastbandit wrote")
    try:
        metadata = parse_json(text[_METADATA_KEY])
        stated = (metadata["kind"], metadata["version"])
        crc = metadata["crc32"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged: its metadata cannot be read") from None
    if stated not in ((kind, 1), (kind, _VERSION)):
        raise CheckpointError(
            f"{path}: expected a {kind} of version 1 or {_VERSION}, got {stated[0]!r:.80} of "
            f"version {stated[1]!r:.80}"
        )
    rest = {key: value for key, value in metadata.items() if key != "crc32"}
    # What a damaged byte makes of a file of version 2 has not the checksum of version 1.
    if crc != _digest(tensors, _bytes_of(tensors), None if stated[1] == 1 else rest):
        what = "tensors" if stated[1] == 1 else "tensors and metadata"
        raise CheckpointError(f"{path}: damaged: the checksum of its {what} does not match")
    return tensors, metadata


def kind_of(path: Path) -> str | None:
    """What a file of :func:`save_tensors` holds, from its header alone; None for any other."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LARGEST_HEADER:
                return None
            header = parse_json(file.read(length))
        kind = parse_json(header["__metadata__"][_METADATA_KEY])["kind"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kind if isinstance(kind, str) else None
