"""The measurements of gpu.py, which runs each as a process.

Every result is appended to ``DIR/NAME.jsonl`` as soon as it is there, so that nothing of a process
whose time runs out is lost; its field ``line`` is what the table says. In a check the sizes are
tiny and the device is the CPU, where a call stands for the replay of a graph.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import bench_search_step as steps_of
import torch
from bench_depthwise import BACKWARD_INPUT, BACKWARD_WEIGHT, FORWARD
from bench_gabor import dense, two_lines
from bench_gabor import ours as gabor_of_ours
from bench_pgd import EPSILON, STEP, eager_step_, images
from bench_search_step import COMPILED, EAGER, GRAPHED, OURS, Task
from conftest import COMMIT
from gpu import FACTS, bare_name
from gpu_small import compare_small
from torch import Tensor
from torch.nn import functional as F

from fastbandit import info as package_info
from fastbandit import ops
from fastbandit._native import status
from fastbandit.training import Cost, train_epoch
from fastbandit.training.cuda_graphs import CudaRecorder, Graphs

LAST = torch.channels_last
COLD_BYTES = 256 << 20  # of all copies of a call's tensors together: no cache holds them
ROUNDS = 15
SPACE, FGSM = "robust9-light", steps_of.THREATS["FGSM"]


class Bench:
    """Device, sizes and results of one stage."""

    def __init__(self, name: str, raw: Path, check: bool) -> None:
        self.raw, self.check = raw, check
        self.device = torch.device("cpu" if check else "cuda")
        self.failures = 0
        self.cuda = not check
        self._file = (raw / f"{name}.jsonl").open("a", encoding="utf-8")
        self.note(
            device=torch.cuda.get_device_name() if self.cuda else "CPU",
            torch=str(torch.__version__),
            cuda=torch.version.cuda,
            cudnn=torch.backends.cudnn.version(),
            # Both are off for ours and for every rival: float32 means float32.
            tf32=[torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32],
            commit=COMMIT,
            prepared=json.loads(FACTS.read_text("utf-8")) if FACTS.is_file() else None,
            check=check,
        )

    def note(self, line: str | None = None, **facts: Any) -> None:
        """Append one result."""
        found = facts if line is None else {"line": line, **facts}
        self._file.write(json.dumps(found) + "\n")
        self._file.flush()
        if line is not None:
            print(line, flush=True)

    def fail(self, line: str) -> None:
        """Append what went wrong; the stage goes on, and fails at its end."""
        self.wait()
        self.failures += 1
        self.note(line)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], rounds: int = ROUNDS) -> list[float]:
        """Of each of ``rounds`` calls, launches included."""
        found = []
        if not self.cuda:
            for _ in range(2 if self.check else rounds):
                begun = time.perf_counter()
                call()
                found.append(time.perf_counter() - begun)
            return found
        events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        self.wait()
        return [one.elapsed_time(two) / 1e3 for one, two in itertools.pairwise(events)]

    def on_device(self, calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> list[float]:
        """Of one call in the mean over ``calls`` in turn, without launches: replays of a graph of
        them. Calls that cannot be recorded are timed with their launches."""
        for call in calls[:2]:  # caches, and what a library chooses once
            call()
        if not self.cuda:
            return self.seconds(calls[0])
        inner = max(8, len(calls))
        turn = list(itertools.islice(itertools.cycle(calls), inner))
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                calls[0]()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                for call in turn:
                    call()
            whole: Callable[[], Any] = graph.replay
        except RuntimeError as error:
            self.wait()
            self.note(not_recorded=str(error).splitlines()[0][:200])
            whole = lambda: [call() for call in turn]  # noqa: E731
        whole()
        return [taken / inner for taken in self.seconds(whole, rounds)]


def us(samples: Sequence[float]) -> float:
    return statistics.median(samples) * 1e6


# --- Part 1 ---------------------------------------------------------------------------------------


def info(bench: Bench) -> None:
    """What is there; fails where the kernels for the device do not load."""
    facts = package_info.build_info()
    bench.note(info=facts)
    libraries = status()
    for device in ("cpu", "cuda"):
        library = libraries[device]
        bench.note(f"{device} kernels: {library['reason'] or 'loaded'}")
    if bench.cuda:
        bench.note(
            f"{torch.cuda.get_device_name()}, torch {torch.__version__}, cuDNN "
            f"{torch.backends.cudnn.version()}"
        )
    if shutil.which("nvidia-smi"):
        query = "driver_version,clocks.max.sm,clocks.max.mem,memory.total"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True)
        bench.note(f"driver, clocks, memory: {done.stdout.strip()}")
    for tool in ("compute-sanitizer", "ncu"):
        if bench.cuda and shutil.which(tool) is None:
            bench.note(f"{tool} is not on this machine")
    if not libraries["cuda" if bench.cuda else "cpu"]["loaded"]:
        raise SystemExit("the kernels for this device do not load")


def ceilings(bench: Bench) -> None:
    """Copies, bytes read and written; square matrix products of random numbers."""
    for size in [1 << 16] if bench.check else [8 << 20, 64 << 20, 1 << 30]:
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        samples = bench.on_device([lambda s=source, t=target: t.copy_(s)])
        rate = 2 * size / statistics.median(samples)
        bench.note(f"copy of {size >> 20:5} MiB {rate / 1e9:10.0f} GB/s", bytes=2 * size,
                   samples=samples)  # fmt: skip
        del source, target
    size = 64 if bench.check else 8192
    kinds = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False)]
    if bench.cuda:
        kinds.append(("TF32", torch.float32, True))
    for name, dtype, tf32 in kinds:
        a, b = (torch.randn(size, size, device=bench.device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        try:
            samples = bench.on_device([lambda a=a, b=b: torch.mm(a, b)], 5)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False
        rate = 2 * size**3 / statistics.median(samples)
        bench.note(f"{name:8} matrix product {rate / 1e12:8.1f} TFLOP/s", what=name,
                   size=size, samples=samples)  # fmt: skip


def our_step(bench: Bench, precision: str, recorder: Any = None) -> Task:
    """A task of ours whose step is recorded: by calls on a CPU."""
    graphs = Graphs("yes", bench.device, recorder=recorder or (Calls() if bench.check else None))
    return Task(SPACE, FGSM, OURS, bench.device, precision=precision, graphs=graphs)  # type: ignore


class Calls:
    """A recorder for a CPU: a replay is a call."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return function


def replay_of(task: Task) -> Callable[[], None]:
    """One recorded step of an epoch that has been trained, without the epoch around it."""
    assert task.engine.graphs is not None
    recorded = task.engine.graphs._kept["train"][1]
    batch = (task.x, task.y, task.ids)
    return lambda: recorded(batch, rate=steps_of.RATE, offset=0)


def step_line(bench: Bench, batch: int, name: str, task: Task, ours: float | None) -> float:
    """Seconds of one step, noted beside ours."""
    rounds = 10 if batch < 512 else 5
    if task.rival == OURS:
        task.steps(3)  # the second one is recorded
        call: Callable[[], Any] = replay_of(task)
    else:
        task.step()
        call = task.step
    call()
    bench.wait()
    samples = bench.seconds(call, rounds)
    median = statistics.median(samples)
    peak = torch.cuda.max_memory_allocated() if bench.cuda else 0
    against = f"{median / ours:6.2f} x ours" if ours else ""
    bench.note(
        f"N {batch:3} {name:28} {median * 1e3:9.2f} ms {batch / median:10,.0f} images/s"
        f" {peak / 2**30:6.1f} GiB {against}",
        batch=batch, rival=name, samples=samples, peak_bytes=peak,
    )  # fmt: skip
    return median


def measure_steps(bench: Bench, batch: int, kinds: Sequence[tuple[str, str]]) -> None:
    """FGSM steps of ``batch`` images, in turn; each precision beside ours of the same."""
    steps_of.BATCH = 4 if bench.check else batch
    ours: dict[str, float] = {}
    for rival, precision in kinds:
        if bench.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        name = f"{rival}, {precision}"
        try:
            if rival == OURS:
                task = our_step(bench, precision)
            else:
                task = Task(SPACE, FGSM, rival, bench.device, precision=precision)  # type: ignore
            median = step_line(bench, steps_of.BATCH, name, task, ours.get(precision))
            if rival == OURS:
                ours[precision] = median
        except RuntimeError as error:
            bench.fail(f"N {batch} {name}: {str(error).splitlines()[0][:80]}")
        task = None  # type: ignore[assignment]
        gc.collect()


def step(bench: Bench) -> None:
    """One recorded step in both precisions."""
    measure_steps(bench, 128, [(OURS, "float32"), (OURS, "bfloat16")])


# --- Part 2 ---------------------------------------------------------------------------------------


def steps(bench: Bench) -> None:
    """FGSM steps: ours, eager in a graph made by hand, eager."""
    kinds = [(rival, precision) for rival in (OURS, GRAPHED, EAGER)
             for precision in ("float32", "bfloat16")]  # fmt: skip
    for batch in [4] if bench.check else [128, 512]:
        measure_steps(bench, batch, kinds)


def profile(bench: Bench) -> None:
    """Kernels of one recorded step, by name."""
    task = our_step(bench, "float32")
    task.steps(3)
    call = replay_of(task)
    call()
    bench.wait()
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if bench.cuda else activity.CPU]) as seen:
        call()
        bench.wait()
    rows = []
    for event in seen.key_averages():
        on_device = event.device_type != torch.autograd.DeviceType.CPU
        spent = event.self_device_time_total if bench.cuda else event.self_cpu_time_total
        if on_device == bench.cuda and spent > 0:
            rows.append((spent, event.count, event.key))
    rows.sort(reverse=True)
    total = sum(row[0] for row in rows)
    launches = sum(row[1] for row in rows)
    bench.note(f"{launches} kernels, {total / 1e3:.2f} ms of one step of {steps_of.BATCH} images")
    for spent, count, name in rows:
        bench.note(
            f"{100 * spent / total:5.1f} % {spent / 1e3:8.3f} ms {count:5} x {bare_name(name)}",
            kernel=name, calls=count, time_us=spent,
        )  # fmt: skip


class Timed:
    """Records with another recorder; keeps seconds and bytes of each recording."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._recorder = Calls() if bench.check else CudaRecorder(bench.device)
        self.found: list[tuple[float, int]] = []

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        self._bench.wait()
        reserved = torch.cuda.memory_reserved() if self._bench.cuda else 0
        begun = time.perf_counter()
        replay = self._recorder.record(function)
        self._bench.wait()
        more = (torch.cuda.memory_reserved() if self._bench.cuda else 0) - reserved
        self.found.append((time.perf_counter() - begun, more))
        return replay


def capture(bench: Bench) -> None:
    """An epoch's first batches on three paths in turn: eager, recorded, replayed."""
    recorder = Timed(bench)
    task = our_step(bench, "float32", recorder)
    generator = torch.Generator().manual_seed(0)
    for number in range(3):
        task.take_random_path(generator)
        task.batches = 4
        times = [time.perf_counter()]

        def after_step(times: list[float] = times) -> None:
            bench.wait()
            times.append(time.perf_counter())

        train_epoch(
            task.model, task, 0, task.optimizer, FGSM, seed=0, cost=Cost(), grad_clip=5.0,
            modules=task.modules, parameters=task.parameters, engine=task.engine,
            after_step=after_step,
        )  # fmt: skip
        batches = [two - one for one, two in itertools.pairwise(times)]
        recording, more = recorder.found[-1]
        peak = torch.cuda.max_memory_reserved() if bench.cuda else 0
        bench.note(
            f"path {number}: batches " + " ".join(f"{taken * 1e3:.0f}" for taken in batches)
            + f" ms, recording {recording * 1e3:.0f} ms, {more / 2**20:+.0f} MiB reserved, peak "
            f"{peak / 2**30:.1f} GiB",
            batches=batches, recording=recording, reserved=more, peak=peak,
        )  # fmt: skip


def convolution_calls(
    route: str, what: str, data: Sequence[tuple[Tensor, Tensor]], weight: Tensor, stride: int,
    dilation: int,
) -> list[Callable[[], Tensor]]:  # fmt: skip
    """A depthwise convolution of each (x, gradient) of ``data``, in one way."""
    channels, pad = weight.shape[0], dilation * (weight.shape[-1] // 2)
    settings = ([stride] * 2, [pad] * 2, [dilation] * 2)
    mask = [what == "input", what == "weight", False]

    def call(x: Tensor, grad: Tensor) -> Callable[[], Tensor]:
        if what == "forward":
            if route == "ours":
                return lambda: FORWARD(x, weight, *settings, False)
            return lambda: F.conv2d(x, weight, None, *settings, channels)
        if route == "ours":
            backward = BACKWARD_INPUT if mask[0] else BACKWARD_WEIGHT
            return lambda: backward(grad, x, weight, *settings, False)
        return lambda: torch.ops.aten.convolution_backward(
            grad, x, weight, None, *settings, False, [0, 0], channels, mask
        )[0 if mask[0] else 1]

    return [call(*pair) for pair in data]


def depthwise(bench: Bench) -> None:
    """Our depthwise kernel and the library's, channels-last: forward and both gradients."""
    n = 2 if bench.check else 256
    shapes = [(8, 8)] if bench.check else [(16, 32), (32, 16), (64, 8)]
    kinds = [(1, 1), (1, 2), (2, 2)]  # stride and dilation, as a cell has them
    bench.note("us: ours / library / library with search, of forward, grad input, grad weight")
    for (c, h), (stride, dilation), k in itertools.product(shapes, kinds, (3, 5)):
        cells = []
        for dtype in (torch.float32, torch.bfloat16):
            generator = torch.Generator(bench.device).manual_seed(0)
            out = -(-h // stride)
            moved = n * c * (h * h + out * out) * dtype.itemsize
            draw = {"generator": generator, "device": bench.device}
            data = [
                tuple(
                    torch.randn(n, c, size, size, **draw).to(dtype).contiguous(memory_format=LAST)
                    for size in (h, out)
                )
                for _ in range(1 if bench.check else 1 + COLD_BYTES // moved)
            ]
            weight = torch.randn(c, 1, k, k, **draw).to(dtype)
            times, off = [], 0.0
            for what in ("forward", "input", "weight"):
                three, wanted = [], None
                for route in ("ours", "library", "searched"):
                    torch.backends.cudnn.benchmark = route == "searched"
                    try:
                        calls = convolution_calls(route, what, data, weight, stride, dilation)
                        result = calls[0]().float()
                        wanted = result if wanted is None else wanted
                        scale = float(wanted.abs().max())
                        off = max(off, float((result - wanted).abs().max()) / scale)
                        samples = bench.on_device(calls)
                        three.append(f"{us(samples):.0f}")
                        bench.note(
                            what=what, route=route, shape=[n, c, h, h], kernel=k, stride=stride,
                            dilation=dilation, dtype=str(dtype)[6:], bytes=moved, samples=samples,
                        )  # fmt: skip
                    except RuntimeError as error:  # the library has not all of these
                        bench.wait()
                        three.append("-")
                        reason = str(error).splitlines()[0][:200]
                        bench.note(failed=reason, what=what, route=route)
                        if route == "ours":
                            bench.fail(f"ours, {what}: {reason}")
                    finally:
                        torch.backends.cudnn.benchmark = False
                times.append("/".join(three))
            # Rounding of the weight gradient, a sum over the whole batch, is the largest.
            cells.append(f"{str(dtype)[6:].replace('loat', '')} {' '.join(times)}")
            if not off <= (1e-3 if dtype == torch.float32 else 5e-2):
                bench.fail(f"ours and the library differ by {off:.1e} in the next line")
        bench.note(f"C{c} H{h} s{stride} d{dilation} k{k}  {' | '.join(cells)}")


def ops_(bench: Bench) -> None:
    """Our small ops and plain PyTorch, without launches."""
    mean, std = (torch.tensor(values, device=bench.device)
                 for values in ([0.49, 0.48, 0.45], [0.25, 0.24, 0.26]))  # fmt: skip
    bounds = {"epsilon": EPSILON, "lower": 0.0, "upper": 1.0}

    def compare(name: str, ours: Callable[[], Any], rivals: dict[str, Callable[[], Any]]) -> None:
        found = {"ours": bench.on_device([ours])}
        found |= {rival: bench.on_device([call]) for rival, call in rivals.items()}
        cells = [f"{rival} {us(samples):.1f} ({us(samples) / us(found['ours']):.2f}x)"
                 for rival, samples in found.items() if rival != "ours"]  # fmt: skip
        bench.note(f"{name}: {us(found['ours']):.1f} us; {', '.join(cells)}", op=name, **found)

    for batch, dtype in itertools.product([4] if bench.check else [256, 2048],
                                          (torch.float32, torch.bfloat16)):  # fmt: skip
        tensors = images(batch, bench.device, dtype)
        compare(
            f"pgd_step_ {batch} {str(dtype)[6:]}",
            lambda t=tensors: ops.pgd_step_(*t, step_size=STEP, **bounds),
            {"eager": lambda t=tensors: eager_step_(*t)},
        )
    batch = 4 if bench.check else 256
    last = [t.contiguous(memory_format=LAST) for t in images(batch, bench.device, torch.float32)]
    for dtype in (torch.float32, torch.bfloat16):

        def eager(dtype: torch.dtype = dtype) -> Tensor:
            eager_step_(*last)
            point = (last[2] + last[0] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
            return point.to(dtype)

        compare(
            f"pgd_step_normalize_ {batch} to {str(dtype)[6:]}",
            lambda dtype=dtype: ops.pgd_step_normalize_(
                *last, mean, std, step_size=STEP, out_dtype=dtype, memory_format=LAST, **bounds
            ),
            {"eager": eager},
        )
    compare(
        f"random_start {batch}",
        lambda: ops.random_start(last[2], seed=1, **bounds),
        {"uniform_ and clamp": lambda: (
            last[2] + torch.empty_like(last[2]).uniform_(-EPSILON, EPSILON)
        ).clamp_(0, 1).sub_(last[2])},
    )  # fmt: skip
    for c, h, k, dtype in [
        (16, 32, 3, torch.float32), (16, 32, 3, torch.bfloat16), (64, 8, 5, torch.float32),
        (64, 8, 5, torch.bfloat16),
    ]:  # fmt: skip
        c, h = (4, 8) if bench.check else (c, h)

        def both(function: Callable[..., Tensor], c: int = c, h: int = h, k: int = k,
                 dtype: torch.dtype = dtype) -> Callable[[], Any]:  # fmt: skip
            """Both passes with respect to the map and the parameters, under autocast if need be."""
            generator = torch.Generator().manual_seed(0)
            x, grad = (
                torch.randn(batch, c, h, h, generator=generator).to(
                    bench.device, dtype, memory_format=LAST
                )
                for _ in range(2)
            )
            ranges = [(0.0, 3.1), (0.5, 1.0), (0.5, 1.0), (2.0, 4.0), (-3.0, 6.0)]
            leaves = [x, *((low + width * torch.rand(c, generator=generator)).to(bench.device)
                           for low, width in ranges)]  # fmt: skip
            for leaf in leaves:
                leaf.requires_grad_()
            half = dtype == torch.bfloat16
            kind = bench.device.type

            def call() -> Any:
                with torch.autocast(kind, torch.bfloat16, enabled=half, cache_enabled=False):
                    y = function(x, leaves[1:], k)
                return torch.autograd.grad(y, leaves, grad.to(y.dtype))

            return call

        compare(
            f"gabor C{c} H{h} k{k} {str(dtype)[6:]}, both passes",
            both(gabor_of_ours),
            {"dense": both(dense), "channel sum": both(two_lines)},
        )
    compare_small(compare, bench.device, bench.check)


def eager_step(bench: Bench) -> None:
    """What Nsight Compute looks into: one step of ours, launch by launch."""
    Task(SPACE, FGSM, OURS, bench.device, graphs=Graphs("no", bench.device)).step()


def compiled(bench: Bench) -> None:
    """torch.compile: the attack's step, then the whole step of the supernet, in two modes."""
    backend = {"backend": "eager"} if bench.check else {}  # a compiler takes minutes on a CPU
    tensors = images(4 if bench.check else 256, bench.device, torch.float32)
    call = torch.compile(eager_step_, **backend)
    samples = bench.on_device([lambda: call(*tensors)])
    bench.note(f"pgd_step_ {len(tensors[0])} compiled: {us(samples):.1f} us", samples=samples)
    # In the order of what they say, since compiling takes most of the time and is cut at its end.
    wanted = [(mode, batch, precision) for precision in ("float32", "bfloat16")
              for batch in (128, 512) for mode in ("reduce-overhead", "max-autotune")]  # fmt: skip
    for mode, batch, precision in wanted[:1] if bench.check else wanted:
        steps_of.BATCH = 4 if bench.check else batch
        options, begun = backend or {"mode": mode}, time.perf_counter()
        task = Task(SPACE, FGSM, COMPILED, bench.device, precision=precision, compiler=options)  # type: ignore
        task.step()
        bench.wait()
        bench.note(f"compiled, {mode}, in {time.perf_counter() - begun:.0f} s")
        for _ in range(3):
            task.step()
        step_line(bench, steps_of.BATCH, f"{COMPILED}, {mode}, {precision}", task, None)


STAGES = {
    "info": info, "ceilings": ceilings, "step": step, "steps": steps, "profile": profile,
    "capture": capture, "depthwise": depthwise, "ops": ops_, "eager_step": eager_step,
    "compiled": compiled,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--raw", type=Path, required=True, help="folder of the results")
    parser.add_argument("--check", action="store_true", help="small, on a CPU")
    options = parser.parse_args()
    if not options.check and not torch.cuda.is_available():
        raise SystemExit("expected a CUDA device, found none")
    if not options.check and options.stage != "info" and not status()["cuda"]["loaded"]:
        # The package would quietly measure its plain-PyTorch reference.
        raise SystemExit(f"the CUDA kernels do not load: {status()['cuda']['reason']}")
    # A recording collects garbage each time, and most objects of the libraries stay.
    gc.collect()
    gc.freeze()
    bench = Bench(options.stage, options.raw, options.check)
    STAGES[options.stage](bench)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
