"""How far a log counts: its length and the digest of what it holds."""

from __future__ import annotations

import hashlib
from pathlib import Path

from fastbandit._files import MEGABYTE, naming

__all__ = ["Log"]


class Log:
    """How long a log is and the digest of what it holds, as far as it counts."""

    def __init__(self) -> None:
        self.length = 0
        self.sha256 = hashlib.sha256()

    def add(self, data: bytes) -> None:
        self.length += len(data)
        self.sha256.update(data)

    def read(self, file: Path, length: int | None = None) -> None:
        """Add the first ``length`` bytes of the file, or all of it."""
        with naming(file), open(file, "rb") as stream:
            while length is None or self.length < length:
                most = MEGABYTE if length is None else min(MEGABYTE, length - self.length)
                part = stream.read(most)
                if not part:
                    return
                self.add(part)
