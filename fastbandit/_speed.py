"""How fast the 1-bit convolutions are on this CPU, beside float32; measured when asked."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbandit import ops

__all__ = ["SHAPES", "measure", "table"]

#: N, C = C_out, H = W, k; of the last two a filter for each channel.
SHAPES = (
    (1, 256, 14, 3, 1), (1, 128, 28, 3, 1), (1, 64, 32, 3, 1), (1, 256, 14, 1, 1),
    (1, 64, 32, 1, 1), (64, 64, 32, 3, 1), (1, 256, 14, 3, 256), (1, 64, 32, 5, 64),
)  # fmt: skip
# Least duration of a sample in seconds.
_SAMPLE = 2e-3


def _calls(n: int, c: int, size: int, k: int, groups: int) -> dict[str, Callable[[], Tensor]]:
    """The same layer in two forms: float32 in and out, and of a depthwise one bits in and out."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, size, size, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c, c // groups, k, k, generator=generator)
    packed = ops.pack_sign(weight if groups == 1 else weight.transpose(0, 1))
    scale, bias = torch.rand(2, c, generator=generator)
    settings: dict[str, Any] = {"kernel_size": k, "padding": k // 2, "groups": groups}
    if groups == 1:
        own = {**settings, "scale": scale, "bias": bias}
        last = weight.contiguous(memory_format=torch.channels_last)
        return {
            "1-bit": lambda: ops.binary_conv2d(ops.pack_sign(x), packed, c, **own),
            "float32": lambda: F.conv2d(x, last, bias, 1, k // 2),
        }
    bits, threshold = ops.pack_sign(x), ops.sign_threshold(scale, bias, k * k)
    return {
        "1-bit": lambda: ops.binary_conv2d(bits, packed, c, threshold=threshold, **settings),
        "float32": lambda: F.conv2d(x, weight, bias, 1, k // 2, 1, groups),
    }


def _sample(call: Callable[[], Tensor], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


@torch.inference_mode()
def measure(rounds: int = 15) -> list[dict[str, Any]]:
    """Times on one thread; the two forms of a layer are timed in turn.

    Args:
        rounds: samples of each, of which the median is taken.

    Returns:
        For each shape ``shape`` [N, C, H, W], ``kernel_size``, ``groups``, ``binary_us``,
        ``float32_us`` and ``ratio``, float32 / 1-bit: above 1 the 1-bit one is faster.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for n, c, size, k, groups in SHAPES:
            calls = _calls(n, c, size, k, groups)
            for call in calls.values():
                call()
            repeats = {
                name: max(1, round(_SAMPLE / max(_sample(call, 1), 1e-9)))
                for name, call in calls.items()
            }
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for _ in range(rounds):
                for name, call in calls.items():
                    samples[name].append(_sample(call, repeats[name]))
            binary, real = (statistics.median(samples[name]) for name in ("1-bit", "float32"))
            rows.append(
                {
                    "shape": [n, c, size, size], "kernel_size": k, "groups": groups,
                    "binary_us": 1e6 * binary, "float32_us": 1e6 * real, "ratio": real / binary,
                }
            )  # fmt: skip
        return rows
    finally:
        torch.set_num_threads(threads)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        "1-bit convolutions on this CPU, one thread, medians; dense: float32 in and out with",
        "packing, depthwise: bits in and out; against F.conv2d in float32, channels-last",
        f"{'N x C x H x W':>18}  {'filter':>16}  {'1-bit us':>9}  {'float32 us':>10}  {'ratio':>6}",
    ]
    for row in rows:
        kind = "dense" if row["groups"] == 1 else "depthwise"
        filters = f"{row['kernel_size']} x {row['kernel_size']} {kind}"
        lines.append(
            f"{' x '.join(map(str, row['shape'])):>18}  {filters:>16}  {row['binary_us']:9.1f}  "
            f"{row['float32_us']:10.1f}  {row['ratio']:6.2f}"
        )
    return "\n".join(lines)
