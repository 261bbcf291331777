"""Finds and loads the native kernel libraries, once.

The ops are declared in :mod:`fastbandit.ops` with a plain-PyTorch reference for every device; a
native library only adds faster implementations. So a missing library is normal and quiet, one
that is present but does not load warns once with the original error, and both are told by
:func:`status`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

BACKENDS = ("auto", "reference")
DEVICES = ("cpu", "cuda")

served: set[str] = set()
"""Device types whose kernels are loaded; every op has a kernel in each library."""

_PACKAGE = Path(__file__).resolve().parent
_status: dict[str, Any] | None = None


def load() -> None:
    """Load the kernel libraries that lie in the package's directory; later calls do nothing.

    ``FASTBANDIT_BACKEND=reference`` loads none of them; ``auto`` (the default) all that fit.

    Raises:
        ValueError: ``FASTBANDIT_BACKEND`` is neither ``auto`` nor ``reference``.
    """
    global _status
    if _status is not None:
        return
    backend = os.environ.get("FASTBANDIT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise ValueError(
            f"FASTBANDIT_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}"
        )
    libraries = {device: _load_library(device, backend, _PACKAGE) for device in DEVICES}
    _status = {"backend": backend, **libraries}


def status() -> dict[str, Any]:
    """What was loaded, and for each library that was not, why.

    Returns:
        ``{"backend": "auto" | "reference", "cpu": library, "cuda": library}`` where a library is
        ``{"loaded": bool, "path": str | None, "reason": str | None}``; ``reason`` is None exactly
        when the library is loaded.
    """
    load()
    assert _status is not None
    return {
        key: dict(value) if isinstance(value, dict) else value for key, value in _status.items()
    }


def _load_library(device: str, backend: str, directory: Path) -> dict[str, Any]:
    """Load ``_kernels_<device>*.so`` of ``directory``: one library's part of :func:`status`."""

    def result(path: Path | None, reason: str | None) -> dict[str, Any]:
        return {
            "loaded": reason is None,
            "path": None if path is None else str(path),
            "reason": reason,
        }

    # The suffix varies with the build tool (.so, .abi3.so). After an upgrade of one of them an
    # old file may lie beside the new one, and two libraries cannot register the same kernel.
    libraries = sorted(
        directory.glob(f"_kernels_{device}*.so"), key=lambda path: path.stat().st_mtime_ns
    )
    path = libraries[-1] if libraries else None
    if backend == "reference":
        return result(path, "FASTBANDIT_BACKEND=reference")
    if path is None:
        return result(None, f"no _kernels_{device}*.so in {directory}: it was not built")
    if device == "cuda" and torch.version.cuda is None:
        # The library needs torch's current CUDA stream, a symbol of torch's CUDA libraries.
        return result(path, f"torch {torch.__version__} is built without CUDA")
    try:
        torch.ops.load_library(path)
    except Exception as error:  # whatever the loader or a static initialiser throws
        # torch raises its own error from the dynamic loader's, which names the missing symbol.
        original = error.__cause__ or error
        reason = f"{type(original).__name__}: {original}"
        warnings.warn(
            f"fastbandit: {path.name} is present but does not load, so the plain-PyTorch "
            f"reference is used instead on {device}: {reason}",
            RuntimeWarning,
            stacklevel=2,
        )
        return result(path, reason)
    served.add(device)
    return result(path, None)
