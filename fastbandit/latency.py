"""How long the networks of a search space take on this machine, as a table of their operations.

A search asks for the latency of thousands of paths and cannot measure each. A
:class:`LatencyTable` has the time of every operation at every place of a network (channels,
stride, size of the map); the latency of a path is that of what all networks have plus the times of
its operations. :func:`table_of` measures a table once a machine and keeps it in the user's cache;
:func:`measure_networks` measures whole networks, for the few that were chosen.

What is measured is the network as its users run it: in evaluation mode under
``torch.inference_mode``, 1-bit layers packed (:func:`fastbandit.nn.binary.pack`), batch norms
frozen (:func:`fastbandit.nn.frozen.freeze`), float32, channels-last. Each time is the median of
``rounds`` samples after a warm-up. A sample repeats a call for half a millisecond, and a round
takes a sample of everything, so that a machine that slows down slows all entries alike. One thread
of a CPU is timed by its own clock, which stands still while another program has the core; several
threads, and a GPU, are timed by the clock on the wall.

An operation is measured as a cell calls it, with the sum of its node. A 1-bit operation is packed
as in the network and finds the bits of its map made: a node is packed once for all its edges
(:mod:`fastbandit.nn.signs`), so packing is part of what all networks have. The parent of a 1-bit
network, in full precision, is nobody's to run and has no table.

What all networks have (stem, preprocessing, packing, concatenation, classifier) is the median of
what ``CHECKS`` whole networks take beyond their operations. They have random mixes of operations,
so that they differ, and tell how good the table is: the rank correlation of measured and added
times, and the median error, are kept with it.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit._files import (
    FileError,
    canonical_json,
    plain_file,
    read_sealed,
    write_sealed,
)
from fastbandit._statistics import rank_correlation
from fastbandit.bandit import random_mix
from fastbandit.data.published import cache_folder
from fastbandit.genotype import Genotype
from fastbandit.info import build_info, processor
from fastbandit.nn.binary import pack
from fastbandit.nn.cell import terms_of, total
from fastbandit.nn.frozen import freeze
from fastbandit.nn.network import Network
from fastbandit.nn.operations import make
from fastbandit.nn.signs import shared_signs
from fastbandit.operations import OperationOptions
from fastbandit.runs.session import torch_settings
from fastbandit.space import Place, SearchSpace, placements

__all__ = [
    "CHECKS",
    "Conditions",
    "LatencyTable",
    "Subject",
    "measure_networks",
    "measure_table",
    "table_of",
]

#: Whole networks that a table is compared with.
CHECKS = 12
# Concentration of their Dirichlet law.
_MIXES = 0.5
# Least duration of a sample in nanoseconds: a hundred times what it takes to read the clock.
_SAMPLE = 500_000
# Calls before the first sample; they also decide how often a sample repeats its call.
_WARM_UP = 3


@dataclass(frozen=True)
class Conditions:
    """How latency is measured.

    Args:
        batch_size: images at a time.
        threads: of torch on the CPU.
        device: ``cpu``, ``cuda``, ``cuda:1``, ...
        rounds: samples of which the median is taken.
    """

    batch_size: int = 1
    threads: int = 1
    device: str = "cpu"
    rounds: int = 31


@dataclass(frozen=True)
class Subject:
    """The networks that a table is about.

    Args:
        space: of which they are; they have its ``cells``.
        channels: C of the first cell.
        options: how operations with variants are built.
        shape: of the images, [C, H, W].
        classes: logits.
    """

    space: SearchSpace
    channels: int
    options: OperationOptions
    shape: tuple[int, ...]
    classes: int

    def describe(self, conditions: Conditions) -> str:
        """All that a table depends on beside the machine, canonical JSON."""
        space = self.space
        return canonical_json(
            {
                "operations": list(space.operations),
                "cells": [space.nodes, space.cell_types, space.inputs, space.cells],
                "channels": self.channels,
                "options": self.options.recorded(),
                "images": [*self.shape],
                "classes": self.classes,
                **asdict(conditions),
            }
        )

    def build(self, genotype: Genotype) -> Network:
        """The network of a genotype of the space, with fresh weights."""
        return Network(
            genotype,
            in_channels=self.shape[0],
            classes=self.classes,
            channels=self.channels,
            cells=self.space.cells,
        )


@dataclass(frozen=True)
class LatencyTable:
    """Times of the operations of a space, in nanoseconds.

    Attributes:
        subject: what it is about and how it was measured, :meth:`Subject.describe`.
        machine: on which machine and with which versions, canonical JSON.
        base: of what all networks have.
        networks: of whole networks the measured time and that of the table.
        times: of each operation at each place.
    """

    subject: str
    machine: str
    base: int
    networks: tuple[tuple[int, int], ...]
    times: tuple[tuple[Place, int], ...]

    def edges(self, space: SearchSpace, channels: int, size: Sequence[int]) -> Tensor:
        """The time of each operation on each edge in nanoseconds, int64 [rows, arms].

        A type of cell that is in the chain several times counts as often. The latency of a path is
        :attr:`base` and the sum over its edges.

        Args:
            channels: C of the first cell.
            size: height and width of the images.

        Raises:
            ValueError: the table lacks an operation at a place.
        """
        times = dict(self.times)
        table = torch.zeros(space.rows, space.arms, dtype=torch.int64)
        for row, arm, place in placements(space, channels, size):
            if place not in times:
                raise ValueError(
                    f"latency table: expected a time of {_words(place)}, which it does not have"
                )
            table[row, arm] += times[place]
        return table

    def check_subject(self, subject: Subject, conditions: Conditions) -> None:
        """See that the table is about these networks under these conditions.

        Raises:
            ValueError: it is not.
        """
        wanted = json.loads(subject.describe(conditions))
        own = json.loads(self.subject)
        for name in wanted:
            if own.get(name) != wanted[name]:
                raise ValueError(
                    f"latency table: expected one for {name} {_short(wanted[name])}, got one for "
                    f"{_short(own.get(name))}"
                )

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's, of measured and added times of whole networks; None: one side is constant."""
        rho, _, _ = rank_correlation(
            [measured for measured, _ in self.networks], [added for _, added in self.networks]
        )
        return None if math.isnan(rho) else rho

    @property
    def error(self) -> float | None:
        """The median over whole networks of abs(added - measured) / measured; None: no network."""
        errors = [abs(added - measured) / measured for measured, added in self.networks]
        return statistics.median(errors) if errors else None

    def facts(self) -> dict[str, Any]:
        """What a result says of its table."""
        of = json.loads(self.subject)
        return {
            **{name: of[name] for name in asdict(Conditions())},
            "machine": json.loads(self.machine),
            "base_ms": self.base / 1e6,
            "networks": len(self.networks),
            "rank_correlation": self.rank_correlation,
            "median_error": self.error,
        }

    def __str__(self) -> str:
        facts = self.facts()
        cpu, rank, error = facts["machine"].get("device", "this machine"), "", ""
        if self.rank_correlation is not None and self.error is not None:
            rank = f"rank correlation {self.rank_correlation:.2f}"
            error = f"median error {100 * self.error:.1f} %"
        checked = f"; {len(self.networks)} whole networks: {rank}, {error}" if rank else ""
        return (
            f"latency of {len(self.times)} operations at their places on {cpu}, batch "
            f"{facts['batch_size']}, threads {facts['threads']}{checked}"
        )

    # --- as text --------------------------------------------------------------------------------

    def lines(self) -> tuple[str, ...]:
        """The table as lines of text, for settings and files."""
        return (
            f"of {self.subject}",
            f"machine {self.machine}",
            f"base {self.base}",
            *(f"network {measured} {added}" for measured, added in self.networks),
            *(" ".join(map(str, (*place, time))) for place, time in self.times),
        )

    @classmethod
    def parse(cls, lines: Sequence[str]) -> LatencyTable:
        """The table that :meth:`lines` wrote.

        Raises:
            ValueError: a line is another, with its number.
        """
        subject = machine = ""
        base, networks, times = -1, [], []
        for number, line in enumerate(lines, 1):
            word, _, rest = line.partition(" ")
            try:
                if word in ("of", "machine"):
                    if not isinstance(json.loads(rest), dict):
                        raise ValueError("expected an object")
                    subject, machine = (rest, machine) if word == "of" else (subject, rest)
                    continue
                numbers = [_count(part) for part in rest.split()]
                if word == "base":
                    (base,) = numbers
                elif word == "network":
                    measured, added = numbers
                    networks.append((max(measured, 1), added))
                else:
                    *place, spent = numbers
                    times.append((Place(word, *place), spent))
            except (ValueError, TypeError):
                raise ValueError(
                    f"latency table, line {number}: expected an operation, channels, stride, "
                    f"height, width and nanoseconds, or what a table begins with; got {line!r}"
                ) from None
        if not subject or not machine or base < 0 or not times:
            raise ValueError(
                "latency table: expected the lines of, machine, base, and one for each operation"
            )
        return cls(subject, machine, base, tuple(networks), tuple(times))


def _count(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(text)
    return int(text)


def _words(place: Place) -> str:
    return (
        f"{place.operation} with {place.channels} channels and stride {place.stride} on a map of "
        f"{place.height}x{place.width}"
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- measuring ------------------------------------------------------------------------------


def _median_times(calls: Sequence[Callable[[], object]], conditions: Conditions) -> list[int]:
    """Nanoseconds of each call, the median of samples that are taken in turn."""
    device = torch.device(conditions.device)
    alone = device.type == "cpu" and conditions.threads == 1
    clock = time.thread_time_ns if alone else time.perf_counter_ns

    def sample(call: Callable[[], object], repeats: int) -> int:
        _wait(device)
        started = clock()
        for _ in range(repeats):
            call()
        _wait(device)
        return clock() - started

    repeats = []
    for call in calls:
        sample(call, _WARM_UP)
        once = min(sample(call, 1) for _ in range(_WARM_UP))
        repeats.append(max(1, math.ceil(_SAMPLE / max(once, 1))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(conditions.rounds):
        for call, count, times in zip(calls, repeats, samples, strict=True):
            times.append(sample(call, count) / count)
    return [round(statistics.median(times)) for times in samples]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _deployed(module: nn.Module, conditions: Conditions) -> nn.Module:
    """A copy of a network, or of an operation, as its users run it."""
    used = freeze(pack(module)).to(conditions.device)
    return used.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _images(shape: Sequence[int], conditions: Conditions) -> Tensor:
    """A batch of maps or images of the shape [C, H, W], values in [0, 1]."""
    batch = torch.rand(conditions.batch_size, *shape)
    return batch.to(device=conditions.device, memory_format=torch.channels_last)


@contextmanager
def _measuring(conditions: Conditions) -> Iterator[None]:
    """The settings of the process while something is measured, undone afterwards."""
    with (
        torch_settings(conditions.threads, False),
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(),
    ):
        torch.manual_seed(0)
        yield


def measure_networks(
    networks: Sequence[Network], shape: Sequence[int], conditions: Conditions | None = None
) -> list[int]:
    """The latency of whole networks as their users run them, nanoseconds of a batch.

    They are measured in turn, so that what slows the machine down slows all of them.

    Args:
        networks: on the CPU; they are copied and stay as they are.
        shape: of an image, [C, H, W].
        conditions: default: one image at a time on one thread.
    """
    conditions = conditions or Conditions()
    with _measuring(conditions):
        images = _images(shape, conditions)
        used = [_deployed(network, conditions) for network in networks]
        return _median_times([partial(network, images) for network in used], conditions)


def _measure_places(
    places: Sequence[Place], options: OperationOptions, conditions: Conditions
) -> dict[Place, int]:
    """The time of each operation at its place, the sum of its node included."""

    def call(operation: nn.Module, x: Tensor, node: Tensor) -> Tensor:
        terms = terms_of(operation, x)  # none of what is 0
        return node.add_(total(terms)) if terms else node

    calls = []
    # Within one forward pass of a network the bits of x are made once, in the warm-up.
    with _measuring(conditions), shared_signs():
        for place in places:
            module = make(place.operation, place.channels, place.stride, options=options)
            operation = _deployed(module, conditions)
            x = _images((place.channels, place.height, place.width), conditions)
            calls.append(partial(call, operation, x - 0.5, torch.zeros_like(operation(x))))
        return dict(zip(places, _median_times(calls, conditions), strict=True))


def measure_table(subject: Subject, conditions: Conditions | None = None) -> LatencyTable:
    """Measure a table: seconds for a space of small networks.

    Args:
        conditions: default: one image at a time on one thread.
    """
    conditions, space = conditions or Conditions(), subject.space
    size = subject.shape[1:]
    places = list(dict.fromkeys(place for _, _, place in placements(space, subject.channels, size)))
    times = _measure_places(places, subject.options, conditions)
    table = LatencyTable(
        subject.describe(conditions), canonical_json(machine(conditions)), 0, (),
        tuple(times.items()),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    choices = [random_mix(space.rows, space.arms, _MIXES, generator) for _ in range(CHECKS)]
    edges = table.edges(space, subject.channels, size)
    sums = [int(edges[torch.arange(space.rows), choice].sum()) for choice in choices]
    with torch.random.fork_rng(devices=[]):
        networks = [
            subject.build(Genotype.from_choices(space, choice.tolist(), options=subject.options))
            for choice in choices
        ]
    measured = measure_networks(networks, subject.shape, conditions)
    # Below 0 only where the clock is far too coarse.
    base = max(0, round(statistics.median(map(operator.sub, measured, sums))))
    added = [base + one for one in sums]
    return replace(table, base=base, networks=tuple(zip(measured, added, strict=True)))


# --- kept -----------------------------------------------------------------------------------


@cache
def machine(conditions: Conditions) -> dict[str, str]:
    """What decides how fast this machine is: processor, versions, kernels."""
    info = build_info()
    device = torch.device(conditions.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    path = info["libraries"]["cuda" if device.type == "cuda" else "cpu"].get("path")
    kernels = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12] if path else "none"
    return {
        "device": name,
        "machine": platform.machine(),
        "isa": info["cpu_isa"] or "none",
        "torch": info["torch"],
        "fastbandit": info["fastbandit"],
        "kernels": kernels,
    }


# How tables are measured; another number makes those that are kept old. 2: what is 0 takes no time.
_WAY = 2

# Of this process, so that all of a command have one table where the cache cannot be written.
_known: dict[str, LatencyTable] = {}


def table_of(subject: Subject, conditions: Conditions | None = None) -> LatencyTable:
    """The table of this machine: the one that is kept, or else a new one, which is then kept.

    It lies in ``latency/`` of the cache (:func:`fastbandit.data.published.cache_folder`), in a file
    for each subject, conditions and machine. One that cannot be read is measured again.

    Args:
        conditions: default: one image at a time on one thread.
    """
    conditions = conditions or Conditions()
    about = [subject.describe(conditions), canonical_json(machine(conditions))]
    digest = hashlib.sha256(canonical_json([*about, _WAY]).encode()).hexdigest()[:16]
    if digest in _known:
        return _known[digest]
    path = cache_folder() / "latency" / f"{digest}.json"
    try:
        table = LatencyTable.parse(read_sealed(plain_file(path))["lines"])
        if [table.subject, table.machine] != about:
            raise ValueError(f"{path}: another table")
    except (OSError, FileError, ValueError, KeyError, TypeError):
        table = measure_table(subject, conditions)
        # A cache that cannot be written is none; who uses the table keeps a copy.
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(path, {"lines": list(table.lines())})
    _known[digest] = table
    return table
