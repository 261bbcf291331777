"""What a device can do at best, and what its library does with a dilated depthwise convolution.

    python benchmarks/gpu_ceilings.py --out FILE             # on a GPU, about two minutes
    python benchmarks/gpu_ceilings.py --out FILE --check     # small, on any machine: does it run

Copies and matrix products give the ceilings that every other figure of the same run is held
against. Then the convolution, forward and both gradients, as the library runs it: contiguous,
channels-last with the search for the fastest algorithm (cudnn.benchmark) off and on, and split
into the four parity images of dilation 2, which are convolved without dilation. Where channels-
last is near the floor, a kernel of our own has nothing to win.

Cold: the tensors of each call were not used for long enough to have left the cache; warm: the
same tensors again and again. Every entry holds its raw samples.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_depthwise import join, library_backward, split
from torch import Tensor
from torch.nn import functional as F

DILATION = 2
# Bytes of all copies of a call's tensors together that no cache holds.
COLD_BYTES = 512 << 20
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


def measure(
    calls: Sequence[Callable[[], Any]], device: torch.device, rounds: int
) -> dict[str, Any]:
    """Seconds of one call: the calls in turn, ``rounds`` samples after as many calls unmeasured.

    On a GPU a sample is the mean over several calls between two events, so that the time to
    launch one is hidden behind the one before it where the device is slower than that.
    """
    turn = itertools.cycle(calls)
    for _ in range(max(3, len(calls))):
        next(turn)()
    samples = []
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        inner = max(4, len(calls))
        for _ in range(rounds):
            begin.record()
            for _ in range(inner):
                next(turn)()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) / 1e3 / inner)
    else:
        for _ in range(rounds):
            started = time.perf_counter()
            next(turn)()
            samples.append(time.perf_counter() - started)
    return {"median": statistics.median(samples), "least": min(samples), "samples": samples}


def copies(device: torch.device, rounds: int, check: bool) -> list[dict[str, Any]]:
    """Copies from a part of the cache to far beyond it; bytes read and written count."""
    found = []
    for size in [1 << 20] if check else [1 << 20, 8 << 20, 64 << 20, 1 << 30]:
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        entry = measure([lambda s=source, t=target: t.copy_(s)], device, rounds)
        rate = 2 * size / entry["median"]
        found.append({"what": "copy", "bytes": 2 * size, "per_second": rate, **entry})
    return found


def products(device: torch.device, rounds: int, check: bool) -> list[dict[str, Any]]:
    """Square matrix products on random numbers."""
    found = []
    size = 128 if check else 8192
    kinds = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False)]
    if device.type == "cuda":
        kinds += [("tf32", torch.float32, True), ("float16", torch.float16, False)]
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, tf32 in kinds:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        entry = measure([lambda a=a, b=b, o=out: torch.mm(a, b, out=o)], device, min(rounds, 10))
        rate = 2 * size**3 / entry["median"]
        found.append({"what": f"matmul {name}", "size": size, "per_second": rate, **entry})
    torch.backends.cuda.matmul.allow_tf32 = before
    return found


def make_calls(
    route: str, what: str, x: Tensor, grad: Tensor, weight: Tensor
) -> Callable[[], Tensor]:
    """One convolution in one way; its result is in the layout and size of the plain one's."""
    k, channels = weight.shape[-1], weight.shape[0]
    mask = [what == "grad input", what == "grad weight", False]
    if route == "phase split":
        if what == "forward":
            return lambda: join(
                F.conv2d(split(x, LAST), weight, padding=k // 2, groups=channels), len(x), LAST
            )
        if mask[1]:
            return lambda: library_backward(
                split(grad, LAST), split(x, LAST), weight, k // 2, 1, mask
            )[1]
        shape = split(x, LAST)  # only its size is used
        return lambda: join(
            library_backward(split(grad, LAST), shape, weight, k // 2, 1, mask)[0], len(x), LAST
        )
    pad = DILATION * (k // 2)
    if what == "forward":
        return lambda: F.conv2d(x, weight, padding=pad, dilation=DILATION, groups=channels)
    index = 0 if mask[0] else 1
    return lambda: library_backward(grad, x, weight, pad, DILATION, mask)[index]


def convolutions(
    device: torch.device, rounds: int, check: bool, bandwidth: float, seconds: float
) -> list[dict[str, Any]]:
    """Every route at every shape; an entry without a median says why it has none.

    No shape is begun after ``seconds`` seconds; the common ones and float32 come first.
    """
    begun = time.monotonic()
    images = 2 if check else 256
    maps = [(16, 8)] if check else [(16, 32), (64, 32), (128, 16), (256, 8)]
    kernels = [3] if check else [3, 5, 7]
    dtypes = [torch.float32, torch.bfloat16]
    if device.type == "cuda":
        dtypes.append(torch.float16)
    routes = ["contiguous", "channels-last", "channels-last, searched", "phase split"]
    found = []
    for dtype, k, (c, h), what in itertools.product(
        dtypes, kernels, maps, ("forward", "grad input", "grad weight")
    ):
        if time.monotonic() - begun > seconds:
            print(
                f"{seconds:.0f} s are over; missing: {str(dtype)[6:]} k {k} C {c} and what follows"
            )
            break
        moved = 2 * images * c * h * h * dtype.itemsize
        copies_needed = 1 + (2 if check else COLD_BYTES // moved)
        wanted = None
        for route in routes:
            layout = CONTIGUOUS if route == "contiguous" else LAST
            entry: dict[str, Any] = {
                "what": what, "route": route, "shape": [images, c, h, h], "kernel": k,
                "dtype": str(dtype)[6:], "bytes": moved, "floor": moved / bandwidth,
            }  # fmt: skip
            torch.backends.cudnn.benchmark = route.endswith("searched")
            try:
                generator = torch.Generator(device).manual_seed(0)
                weight = torch.randn(c, 1, k, k, generator=generator, device=device).to(dtype)
                calls = []
                for _ in range(copies_needed):
                    x, grad = (
                        torch.randn(images, c, h, h, generator=generator, device=device)
                        .to(dtype)
                        .contiguous(memory_format=layout)
                        for _ in range(2)
                    )
                    calls.append(make_calls(route, what, x, grad, weight))
                result = calls[0]().float()
                if wanted is None:
                    wanted = result
                scale = float(wanted.abs().max())
                entry["difference"] = float((result - wanted).abs().max()) / scale
                entry["cold"] = measure(calls, device, rounds)
                entry["warm"] = measure(calls[:1], device, rounds)
            except (RuntimeError, NotImplementedError) as error:
                entry["failed"] = str(error).splitlines()[0][:200]
            found.append(entry)
            del entry
    torch.backends.cudnn.benchmark = False
    return found


def show(result: dict[str, Any]) -> None:
    """The short table: ceilings, then each convolution's best route against its floor."""
    for entry in result["ceilings"]:
        size = entry.get("bytes")
        if size:
            print(f"copy of {size / 2 / 2**20:8.0f} MiB  {entry['per_second'] / 1e9:10.1f} GB/s")
        else:
            print(f"{entry['what']:20}  {entry['per_second'] / 1e12:10.2f} TFLOP/s")
    print("time in us, cold; floor: both tensors at the speed of the largest copy")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in result["convolutions"]:
        key = (entry["what"], entry["dtype"], *entry["shape"][1:3], entry["kernel"])
        groups.setdefault(key, {})[entry["route"]] = entry
    routes = ["contiguous", "channels-last", "channels-last, searched", "phase split"]
    heads = ["contiguous", "channels-last", "searched", "phase split"]
    print(f"{'':40}{'floor':>9}" + "".join(f"{head:>18}" for head in heads))
    for (what, dtype, c, h, k), entries in groups.items():
        times = [
            f"{entries[route]['cold']['median'] * 1e6:18.1f}"
            if "cold" in entries[route]
            else f"{'failed':>18}"
            for route in routes
        ]
        floor = entries[routes[0]]["floor"] * 1e6
        print(f"{what:12} {dtype:9} C {c:3} H {h:2} k {k}     {floor:9.1f}" + "".join(times))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=1e9, help="for the convolutions, at most")
    parser.add_argument("--check", action="store_true", help="small sizes on any device")
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.check:
        parser.error("expected a CUDA device, found none; --check runs small on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rounds = 2 if arguments.check else 50
    ceilings = copies(device, rounds, arguments.check)
    bandwidth = ceilings[-1]["per_second"]
    ceilings += products(device, rounds, arguments.check)
    result = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "check": arguments.check,
        "ceilings": ceilings,
        "convolutions": convolutions(device, rounds, arguments.check, bandwidth, arguments.seconds),
    }
    arguments.out.write_text(json.dumps(result) + "\n", encoding="utf-8")
    show(result)
    if arguments.check:
        print("two rounds of small sizes: these numbers mean nothing")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
