"""Finished pieces of a study, each stored in a file of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fastbandit._files import (
    FileError,
    canonical_json,
    json_value,
    plain_file,
    read_sealed,
    write_sealed,
)

__all__ = ["Pieces"]


class Pieces:
    """Finished pieces of work in a folder, each in a file named by a hash of what it is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, kind: str, key: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(canonical_json(dict(key)).encode()).hexdigest()[:16]
        return self.folder / f"{kind}-{digest}.json"

    def done(self, kind: str, key: Mapping[str, Any]) -> bool:
        return self.path(kind, key).is_file()

    def keys(self, kind: str) -> list[dict[str, Any]]:
        """The keys of all stored pieces of a kind.

        Raises:
            FileError: a stored piece is damaged.
        """
        keys = []
        for path in sorted(self.folder.glob(f"{kind}-*.json")):
            stored = read_sealed(plain_file(path))
            key = stored.get("key") if isinstance(stored, dict) else None
            if not isinstance(key, dict):
                raise FileError(f"{path}: expected a piece of a study; delete it to go on")
            keys.append(key)
        return keys

    def get(
        self, kind: str, key: Mapping[str, Any], make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The piece, made and stored if it is not there.

        Raises:
            FileError: a stored piece is damaged or another.
        """
        path = self.path(kind, key)
        if not path.is_file():
            made = make()
            self.folder.mkdir(exist_ok=True)
            write_sealed(path, {"key": dict(key), "result": made})
            return made
        stored = read_sealed(plain_file(path))
        if not isinstance(stored, dict) or stored.get("key") != json_value(dict(key)):
            raise FileError(
                f"{path}: expected the piece of the study that its name says, got another; "
                "delete it to have it made again"
            )
        result = stored.get("result")
        if not isinstance(result, dict):
            raise FileError(f"{path}: expected a result; delete it to have it made again")
        return result
