"""Ops without gradient on buffers that are filled anew, as a CUDA graph replays them.

On a CPU a replay is a call. On a GPU each op runs on a stream of its own, is recorded and replayed:
an op that launched on another stream, waited for the device or took a number from the host when it
was recorded would give other results, or none.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbandit import ops

Buffers = dict[str, Tensor]


def images(generator: torch.Generator) -> Buffers:
    shape = (6, 3, 7, 5)
    return {
        "delta": (torch.rand(shape, generator=generator) - 0.5) / 16,
        "grad": torch.randn(shape, generator=generator),
        "image": torch.rand(shape, generator=generator),
        "mean": torch.rand(3, generator=generator),
        "std": torch.rand(3, generator=generator) + 0.5,
        "seed": torch.randint(0, 2**62, (1,), generator=generator),
        "offset": torch.randint(0, 2**31, (1,), generator=generator),
        "index": torch.randint(0, 1000, (6,), generator=generator),
    }


def bandits(generator: torch.Generator) -> Buffers:
    rows, arms = 50, 9
    alive = torch.rand((rows, arms), generator=generator) > 0.3
    alive[:, 4] = True
    return {
        "mean": torch.rand((rows, arms), generator=generator, dtype=torch.float64),
        "count": torch.randint(0, 5, (rows, arms), generator=generator),
        "alive": alive,
        "choice": torch.randint(0, arms, (rows,), generator=generator),
        "reward": torch.rand(rows, generator=generator, dtype=torch.float64),
        "prune": torch.rand(rows, generator=generator) > 0.5,
        "uniform": torch.rand(rows, generator=generator, dtype=torch.float64),
    }


def maps(generator: torch.Generator) -> Buffers:
    return {
        "x": torch.randn((4, 8, 9, 9), generator=generator),
        "weight": torch.randn((8, 1, 3, 3), generator=generator),
        "parameters": torch.rand((5, 8), generator=generator) + 0.5,
    }


def pgd_step(b: Buffers) -> None:
    ops.pgd_step_(
        b["delta"], b["grad"], b["image"], step_size=0.01, epsilon=0.03, lower=0.0, upper=1.0
    )


def pgd_step_normalize(b: Buffers) -> Tensor:
    return ops.pgd_step_normalize_(
        b["delta"], b["grad"], b["image"], b["mean"], b["std"], step_size=0.01, epsilon=0.03,
        lower=0.0, upper=1.0, out_dtype=torch.bfloat16, memory_format=torch.channels_last,
    )  # fmt: skip


def random_start(b: Buffers) -> Tensor:
    return ops.random_start(
        b["image"], epsilon=0.03, seed=b["seed"], offset=b["offset"], index=b["index"],
        lower=0.0, upper=1.0,
    )  # fmt: skip


def bandit_step(b: Buffers) -> tuple[Tensor, ...]:
    names = ("mean", "count", "alive", "choice", "reward", "prune", "uniform")
    return ops.bandit_step_(*(b[name] for name in names), rate=0.7)


CASES: dict[str, tuple[Callable[[torch.Generator], Buffers], Callable[[Buffers], object]]] = {
    "pgd_step_": (images, pgd_step),
    "pgd_step_normalize_": (images, pgd_step_normalize),
    "random_start": (images, random_start),
    "bandit_step_": (bandits, bandit_step),
    "bandit_update_": (
        bandits,
        lambda b: ops.bandit_update_(b["mean"], b["count"], b["choice"], b["reward"], rate=0.7),
    ),
    "bandit_prune_": (bandits, lambda b: ops.bandit_prune_(b["alive"], b["mean"], b["count"])),
    "bandit_sample": (
        bandits,
        lambda b: ops.bandit_sample(b["mean"], b["count"], b["alive"], b["uniform"]),
    ),
    "bandit_bounds": (bandits, lambda b: ops.bandit_bounds(b["mean"], b["count"])),
    "bandit_probabilities": (
        bandits,
        lambda b: ops.bandit_probabilities(b["mean"], b["count"], b["alive"]),
    ),
    "depthwise_conv2d": (
        maps,
        lambda b: ops.depthwise_conv2d(b["x"], b["weight"], padding=2, dilation=2, relu=True),
    ),
    "gabor_filters": (maps, lambda b: ops.gabor_filters(*b["parameters"], kernel_size=5)),
    "gabor_conv2d": (maps, lambda b: ops.gabor_conv2d(b["x"], *b["parameters"], kernel_size=3)),
}


def tensors_of(result: object) -> tuple[Tensor, ...]:
    if result is None:
        return ()
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[call-overload]


def record(device: torch.device, function: Callable[[], None]) -> Callable[[], None]:
    if device.type == "cpu":
        return function
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


@pytest.mark.parametrize("name", CASES)
def test_a_replay_reads_what_the_buffers_hold_now(device, name):
    make, call = CASES[name]
    values = [make(torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    values = [{k: v.to(device) for k, v in one.items()} for one in values]
    buffers = {k: v.clone() for k, v in values[0].items()}
    results: list[Tensor] = []

    def run() -> None:
        results[:] = tensors_of(call(buffers))

    replay = record(device, run)
    for number in (0, 1, 0):
        for key, value in values[number].items():
            buffers[key].copy_(value)
        replay()
        expected = {k: v.clone() for k, v in values[number].items()}
        for got, wanted in zip(results, tensors_of(call(expected)), strict=True):
            assert torch.equal(got, wanted)
        for key, value in expected.items():
            assert torch.equal(buffers[key], value), key
