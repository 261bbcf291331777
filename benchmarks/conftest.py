"""What the benchmarks share: devices, the way a rival is timed, and the table of ratios.

    pytest benchmarks                                    # every table
    pytest benchmarks/bench_pgd.py --benchmark-json FILE # for to_csv.py, which keeps results
    FASTBANDIT_BENCH_SMOKE=1 pytest benchmarks           # one shape, two rounds: do they still run

Rivals of one group run one after another in one process on the same inputs. The table at the end
divides each rival's median by ours: above 1, ours is faster. With FASTBANDIT_BENCH_INTERLEAVED=1
the rivals of a group take turns, a few calls each, so that a machine that changes its speed within
seconds does so for all of them.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbandit.info import processor

# float32 means float32, for ours and for the rivals, as in a run: TF32 rounds to 10 bits.
torch.backends.cudnn.allow_tf32 = False
torch.backends.cuda.matmul.allow_tf32 = False

SAMPLES = 40  # of each entry that a JSON file keeps; its statistics are over all of them
SMOKE = os.environ.get("FASTBANDIT_BENCH_SMOKE") == "1"
INTERLEAVED = os.environ.get("FASTBANDIT_BENCH_INTERLEAVED") == "1" and not SMOKE
OURS = "fastbandit"
# Settings of glibc's allocator that decide whether fresh buffers page-fault, kept with each entry.
ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.Module | None:
    named = parent.session.isinitpath(file_path)  # pytest itself collects what it is given
    if file_path.suffix == ".py" and file_path.name.startswith("bench_") and not named:
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In a smoke run each rival of each task once: the first shape, dtype and kernel size."""
    if not SMOKE:
        return
    first: dict[tuple[str, str], Any] = {}
    kept, dropped = [], []
    for item in items:
        parameters = getattr(item, "callspec", None)
        shape = {
            name: value
            for name, value in (parameters.params.items() if parameters else ())
            if name not in ("rival", "what", "device")
        }
        task = item.nodeid.split("[")[0]
        same = [first.setdefault((task, name), value) == value for name, value in shape.items()]
        (kept if all(same) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]
) -> None:
    for entry in output_json["benchmarks"]:
        entry["stats"]["data"] = entry["stats"].get("data", [])[:SAMPLES]


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


COMMIT = _commit()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def device_seconds(function: Callable[[], Any], device: torch.device) -> float | None:
    """Seconds of one call on the GPU, without its launch: the median of replays of a CUDA graph of
    several calls. None for a call that cannot be recorded, one that waits for the device say."""
    calls, replays = 20, 30
    try:
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        graph.replay()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize(device)
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))
    return times[replays // 2] / 1e3 / calls


class _Turn:
    """A rival that takes turns with those of its group, and its record in the benchmark's file."""

    calls = 4  # timed in a turn, after one that is not: that finds the caches of another rival

    def __init__(self, function: Callable[[], Any], record: Any, inference: bool) -> None:
        self.function, self.record, self.inference = function, record, inference
        self.times: list[float] = []

    def take(self) -> None:
        with torch.inference_mode(self.inference):
            self.function()
            for _ in range(self.calls):
                start = time.perf_counter()
                self.function()
                self.times.append(time.perf_counter() - start)

    def close(self) -> None:
        for name in [name for name in vars(self.record) if name != "data"]:
            delattr(self.record, name)  # statistics that were computed already
        self.record.data[:] = self.times


_turns: dict[str, list[_Turn]] = {}


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_sessionfinish() -> Iterator[None]:
    """Before the benchmark's own hook, which is such a wrapper too and writes the file."""
    for group in _turns.values():
        once = sum(min(turn.record.data) for turn in group) * (_Turn.calls + 1)
        for index in range(min(100, max(5, round(3.0 / once)))):
            start = index % len(group)
            for turn in group[start:] + group[:start]:
                turn.take()
        for turn in group:
            turn.close()
    yield


@pytest.fixture
def measure(benchmark: Any) -> Callable[..., None]:
    """``measure(function, rival=, group=, device=, goals=, moved=, **facts)`` times one rival.

    ``goals``, given with our own entry: least ratio to each named rival. ``moved``: bytes that
    the call has to move, for GB/s. ``rounds``: for a call of seconds, how often it is timed; the
    caller has warmed it up. On a GPU a shorter call is also timed without its launch, and the table
    and the goals go by that where all of a group have it.
    """

    def run(
        function: Callable[[], Any],
        *,
        rival: str,
        group: str,
        device: torch.device,
        goals: dict[str, float] | None = None,
        moved: int | None = None,
        rounds: int | None = None,
        **facts: Any,
    ) -> None:
        cuda = device.type == "cuda"

        def timed() -> None:
            function()
            if cuda:
                torch.cuda.synchronize(device)

        benchmark.group = f"{group} [{device.type}]"
        benchmark.extra_info.update(
            rival=rival,
            device=device_name(device),
            threads=torch.get_num_threads(),
            torch=str(torch.__version__),
            cuda=torch.version.cuda,
            tf32=torch.backends.cudnn.allow_tf32,
            malloc={name: value for name, value in os.environ.items() if name in ALLOCATOR},
            commit=COMMIT,
            goals=goals or {},
            bytes=moved,
            **facts,
        )
        for _ in range(0 if rounds else 3):  # compilation, caches, the clock
            timed()
        if cuda and not rounds:
            benchmark.extra_info["device_seconds"] = device_seconds(function, device)
        if rounds and not SMOKE:
            benchmark.pedantic(timed, rounds=rounds, iterations=1)
        elif SMOKE:
            benchmark.pedantic(timed, rounds=2, iterations=1)
        elif INTERLEAVED:
            benchmark.pedantic(timed, rounds=1, iterations=1)
            turn = _Turn(timed, benchmark.stats.stats, torch.is_inference_mode_enabled())
            _turns.setdefault(benchmark.group, []).append(turn)
        else:
            benchmark._min_rounds = 15
            benchmark(timed)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    if session is None:
        return
    groups: dict[str, dict[str, Any]] = {}
    for entry in session.benchmarks:
        if entry and "rival" in entry.extra_info:
            groups.setdefault(entry.group, {})[entry.extra_info["rival"]] = entry
    write = terminalreporter.write_line
    if groups:
        terminalreporter.section("medians, and rival / fastbandit")
    for group, entries in groups.items():
        write(group)
        ours = entries.get(OURS)
        goals = ours.extra_info["goals"] if ours else {}
        on_device = {r: e.extra_info.get("device_seconds") for r, e in entries.items()}
        launched = not all(on_device.values())
        if not launched:
            write("  without launches:")
        for rival, entry in entries.items():
            median = entry.stats.median if launched else on_device[rival]
            text = f"  {rival:28} {median * 1e6:12.1f} us"
            moved = entry.extra_info["bytes"]
            text += f" {moved / median / 1e9:8.1f} GB/s" if moved else " " * 14
            if ours and rival != OURS:
                ratio = median / (ours.stats.median if launched else on_device[OURS])
                text += f" {ratio:8.2f}x"
                if rival in goals:
                    verdict = "ok" if ratio >= goals[rival] else "MISS"
                    text += f"  goal {goals[rival]:.2f}x {verdict}"
            floor_us = entry.extra_info.get("floor_us")
            if floor_us:
                text += f"  {median * 1e6 / floor_us:.2f} of the floor"
            write(text)
    if SMOKE and groups:
        write("two rounds each: these numbers mean nothing")
