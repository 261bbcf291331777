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
from safetensors.torch import load, save
from torch import Tensor

from fastbandit._files import MEGABYTE, canonical_json, parse_json, write_atomic

__all__ = ["CheckpointError", "RunError", "load_tensors", "save_tensors"]

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


def _digest(tensors: dict[str, Tensor], header: dict[str, Any] | None) -> int:
    """CRC-32 over all that a file says: safetensors itself does not notice a flipped bit."""
    crc = 0
    if header is not None:
        kinds = {name: [str(t.dtype), list(t.shape)] for name, t in tensors.items()}
        crc = zlib.crc32(canonical_json([header, kinds]).encode())
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc)
    return crc


def save_tensors(
    path: Path, tensors: dict[str, Tensor], kind: str, metadata: dict[str, Any]
) -> None:
    """Write a safetensors file atomically; the same tensors and metadata give the same bytes."""
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # As it will be read: keys are text, tuples are lists.
    header = json.loads(canonical_json({"kind": kind, "version": _VERSION, **metadata}))
    header["crc32"] = _digest(cpu, header)
    write_atomic(path, save(cpu, metadata={_METADATA_KEY: canonical_json(header)}))


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
    with safe_open(path, framework="pt") as found:
        text = found.metadata() or {}
        return {name: found.get_tensor(name) for name in found.keys()}, text  # noqa: SIM118


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
        found = (metadata["kind"], metadata["version"])
        crc = metadata["crc32"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged: its metadata cannot be read") from None
    if found not in ((kind, 1), (kind, _VERSION)):
        raise CheckpointError(
            f"{path}: expected a {kind} of version 1 or {_VERSION}, got {found[0]!r:.80} of "
            f"version {found[1]!r:.80}"
        )
    rest = {key: value for key, value in metadata.items() if key != "crc32"}
    # What a damaged byte makes of a file of version 2 has not the checksum of version 1.
    if crc != _digest(tensors, None if found[1] == 1 else rest):
        what = "tensors" if found[1] == 1 else "tensors and metadata"
        raise CheckpointError(f"{path}: damaged: the checksum of its {what} does not match")
    return tensors, metadata
