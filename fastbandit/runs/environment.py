"""What identifies a run and what its result depends on: seeds, ids, versions, memory."""

from __future__ import annotations

import datetime
import hashlib
import platform
import sys
from collections.abc import Mapping
from typing import Any

import torch

from fastbandit._files import canonical_json
from fastbandit._version import __version__

__all__ = ["config_digest", "derive_seed", "environment", "peak_memory_mb", "run_id"]


def config_digest(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json(dict(config)).encode()).hexdigest()


def run_id(config: dict[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the resolved configuration."""
    return config_digest(config)[:12]


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed in [0, 2^63) of its own for each purpose, from the run's one seed."""
    text = canonical_json([seed, *purpose])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory in MiB: of torch's allocator on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # not a POSIX system
        return 0.0  # unknown
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def utc_now() -> str:
    """The time, to the second, as files have it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside the configuration: versions, processor, threads, backends."""
    from fastbandit import _native

    return {
        "date": utc_now(),
        "fastbandit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "platform": platform.platform(terse=True),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "kernels": _native.status(),
    }
