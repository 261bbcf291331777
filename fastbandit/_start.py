"""What a command does before it imports anything else.

A command's module begins with::

    if __name__ == "__main__":
        from fastbandit import _start

        _start.begin()

so none of this happens in a program that only imports the package. The OpenMP runtime reads its
environment once, when torch loads it, so how threads wait is chosen here. Child processes inherit
the choice.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fastbandit._version import __version__

__all__ = ["Waiting", "begin", "waiting"]

# Whoever sets one of these has chosen, and is left alone.
_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")

# A thread that waits sleeps at once.
_PASSIVE = {"OMP_WAIT_POLICY": "passive"}
# Others are in the way when they take more than this share of the CPUs that our threads run on.
_SHARE = 0.25

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Waiting:
    """How OpenMP's threads wait for each other in this process, and why."""

    policy: str
    """``passive``, ``as set`` by the environment or ``default``: as the runtime does"""
    reason: str

    @property
    def variables(self) -> dict[str, str]:
        """The variables of the environment that say so."""
        return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


_waiting: Waiting | None = None


def waiting() -> Waiting:
    """How threads wait here: as :func:`begin` chose, else as the process was started."""
    if _waiting is not None:
        return _waiting
    return _as_set() or Waiting("default", "only commands choose; this process is none")


def begin() -> None:
    """Open what is closed of the standard streams, and choose how threads wait.

    Changes nothing that the user has set.
    """
    global _waiting
    _open_descriptors()
    _show_life()
    _waiting = _as_set()
    if _waiting is None and "torch" in sys.modules:
        _waiting = Waiting("default", "torch was loaded before the command began")
    if _waiting is None:
        crowded = _crowded()
        if crowded:
            os.environ.update(_PASSIVE)
        # Else the runtime's own spin: a shorter one is slower here and no better once others come.
        _waiting = Waiting("passive", crowded) if crowded else Waiting("default", _IDLE)


_IDLE = "no other program is in the way"


def _show_life() -> None:
    """Say at once on a terminal that something happens: torch takes seconds to be loaded."""
    stream = sys.stderr
    quiet = {"-h", "--help", "--print-config", "--json"} & set(sys.argv)
    if stream is not None and stream.isatty() and not quiet:
        print(f"fastbandit {__version__}: loading torch", file=stream, flush=True)


def _open_descriptors() -> None:
    """Put the null device where standard input, output or error is closed.

    The next file opened would take the number otherwise, and what a library prints would be
    written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            os.set_inheritable(descriptor, True)


def _as_set() -> Waiting | None:
    variables = [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    return Waiting("as set", f"{', '.join(variables)} in the environment") if variables else None


def _crowded() -> str:
    """Why a CPU on which a thread spins is missed by somebody; empty where it is not."""
    every = os.cpu_count() or 1
    # Those that this process may use.
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else every
    threads = (_number("OMP_NUM_THREADS") or cpus) * (_number("LOCAL_WORLD_SIZE") or 1)
    quota = min(_quotas(), default=None)
    if quota is not None and quota < threads:
        return f"a control group allows {quota:.3g} CPUs to {threads} threads, and spinning counts"
    if threads > cpus:
        return f"{threads} threads share {cpus} CPUs"
    others = _others()
    if others > every - (1 - _SHARE) * threads:
        return f"other programs have a load of {others:.3g} on {every} CPUs; {threads} threads here"
    return ""


def _number(name: str) -> int | None:
    """A whole number of the environment; OMP_NUM_THREADS may be a list, whose first counts."""
    text = os.environ.get(name, "").split(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) > 0 else None


def _others() -> float:
    """CPUs that other programs keep busy.

    Only what the mean of the last minute and the present moment agree on: the mean still holds the
    command that ended just now, and the moment may hold what runs for a moment.
    """
    try:
        mean = os.getloadavg()[0]
    except (OSError, AttributeError):
        return 0.0
    try:
        running = (_PROC / "loadavg").read_text().split()[3].split("/")[0]
        return min(mean, float(int(running) - 1))  # without this process
    except (OSError, ValueError, IndexError):
        return mean


def _quotas() -> Iterator[float]:
    """CPUs that each control group above this process allows it, where one sets a limit."""
    try:
        lines = (_PROC / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        root, files = _CGROUPS, ["cpu.max"]
        if controllers:  # version 1
            root, files = _CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
            if "cpu" not in controllers.split(","):
                continue
        # In a container its own group may be the root, under whatever name.
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            try:
                quota, period = " ".join((folder / file).read_text() for file in files).split()
                if float(quota) > 0 and float(period) > 0:
                    yield float(quota) / float(period)
            except (OSError, ValueError):  # no such file, or "max": no limit
                continue
