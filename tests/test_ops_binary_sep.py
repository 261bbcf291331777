"""binary_sep_conv2d: the bits of the two ops that it stands for, whatever the kernel."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastbandit import _native, ops
from fastbandit.ops._register import MISS
from fastbandit.ops.binary_sep import separable

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def arguments(rng: random.Random, device: torch.device) -> tuple[Any, ...]:
    """Those of the op for a random problem that fits."""
    channels = rng.choice([1, 3, 16, 63, 64, 65, 128, 200])
    filters, k = rng.choice([1, 7, 32, 64, 96]), rng.choice([1, 3, 5])
    stride, dilation = rng.choice([1, 2]), rng.choice([1, 2])
    padding = rng.randint(0, k // 2 * dilation)
    least = dilation * (k - 1) + 1 - 2 * padding
    size = [rng.randint(max(1, least), max(1, least) + 8) for _ in range(2)]
    generator = torch.Generator().manual_seed(rng.randint(0, 1 << 30))

    def signs(*shape: int) -> Tensor:
        return ops.pack_sign(torch.randn(shape, generator=generator)).to(device)

    out_dtype = rng.choice(DTYPES)
    wide = torch.float64 if out_dtype == torch.float64 else torch.float32
    scale, bias = torch.randn(2, filters, generator=generator, dtype=wide).to(device)
    threshold = torch.randint(-k * k, k * k + 1, (channels,), generator=generator)
    flip = torch.rand(channels, generator=generator) < 0.5
    return (
        signs(rng.randint(1, 3), channels, *size), signs(1, channels, k, k),
        threshold.to(rng.choice([torch.int16, torch.int32])).to(device), flip.to(device),
        signs(filters, channels, 1, 1), rng.choice([scale, None]), rng.choice([bias, None]),
        channels, stride, padding, dilation, rng.random() < 0.3, out_dtype,
    )  # fmt: skip


def by_two(
    bits: Tensor, depthwise: Tensor, threshold: Tensor, flip: Tensor, pointwise: Tensor,
    scale: Tensor | None, bias: Tensor | None, channels: int, stride: int, padding: int,
    dilation: int, plus_one: bool, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    between = ops.binary_conv2d(
        bits, depthwise, channels, kernel_size=depthwise.shape[1], stride=stride, padding=padding,
        dilation=dilation, groups=channels, threshold=(threshold, flip),
        pad="plus_one" if plus_one else "zero",
    )  # fmt: skip
    return ops.binary_conv2d(
        between, pointwise, channels, kernel_size=1, scale=scale, bias=bias, out_dtype=out_dtype
    )


@pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
def test_the_short_way_is_taken(monkeypatch):
    module = importlib.import_module("fastbandit.ops.binary_sep")
    short, taken = module._native, []

    def watched(*args: Any) -> Any:
        y = short(*args)
        taken.append(y is not MISS)
        return y

    monkeypatch.setattr(module, "_native", watched)
    rng = random.Random(3)
    for count in range(20):
        case = arguments(rng, torch.device("cpu"))
        assert torch.equal(separable(*case), by_two(*case))
        assert taken == [True] * (count + 1)


@pytest.mark.parametrize("threads", [1, 2])
def test_exact_results_of_random_shapes(device, threads):
    before, rng = torch.get_num_threads(), random.Random(threads)
    torch.set_num_threads(threads)
    try:
        for _ in range(120):
            given = arguments(rng, device)
            y, expected = separable(*given), by_two(*given)
            assert y.dtype == given[-1]
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(y, expected), given[7:]
    finally:
        torch.set_num_threads(before)


def test_views_and_empty_batches(device):
    rng = random.Random(5)
    for _ in range(20):
        given = arguments(rng, device)
        expected = separable(*given)
        doubled = [one.repeat_interleave(2, 0)[::2] for one in given[2:4]]
        # In the layout that a module's channels-last gives to anything of four sides.
        words = [
            one.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for one in (given[1], given[4])
        ]
        bits = given[0].repeat_interleave(2, 2)[:, :, ::2]
        viewed = (bits, words[0], *doubled, words[1], *given[5:])
        assert torch.equal(separable(*viewed), expected)
        empty = separable(given[0][:0], *given[1:])
        assert empty.shape == (0, *expected.shape[1:])


def test_opcheck_and_compile(device):
    rng = random.Random(7)
    for _ in range(4):
        given = arguments(rng, device)
        torch.library.opcheck(torch.ops.fastbandit.binary_sep_conv2d.default, given)
    compiled = torch.compile(lambda bits: separable(bits, *given[1:]), backend="aot_eager")
    assert torch.equal(compiled(given[0]), separable(*given))


def test_products_are_counted(device):
    given = arguments(random.Random(9), device)
    with FlopCounterMode(display=False) as counter:
        y = separable(*given)
    taps = given[1].shape[1] * given[1].shape[2]
    n, filters, height, width = y.shape
    expected = 2 * n * height * width * given[7] * (taps + filters)
    assert counter.get_total_flops() == expected


@pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
def test_errors_of_the_kernel():
    given = list(arguments(random.Random(11), torch.device("cpu")))
    op = torch.ops.fastbandit.binary_sep_conv2d
    for index, value, message in (
        (0, given[0][..., :0], "bits: expected"),
        (1, given[1].int(), "weight_bits: expected int64"),
        (1, given[1].expand(2, -1, -1, -1), r"(weight|depthwise)_bits: expected .1, "),
        (2, given[2].float(), "threshold: expected int16 or int32"),
        (3, given[3][:0], "flip: expected"),
        (4, given[4][:, :0], "pointwise_bits: expected .C_out, 1, 1, "),
        (4, given[4].int(), "pointwise_bits: expected int64"),
        (8, 0, "stride: expected"),
        (12, torch.int32, "out_dtype: expected"),
    ):
        wrong = [*given[:index], value, *given[index + 1 :]]
        with pytest.raises(RuntimeError, match=f"binary_sep_conv2d: {message}"):
            op(*wrong)


@pytest.mark.parametrize("filters", [2, 100])
def test_one_channel_has_one_filter(filters):
    """Which a dense convolution of one channel need not: nothing may be read or written for it."""
    one = torch.zeros(1, dtype=torch.int16), torch.zeros(1, dtype=torch.bool)
    bits, weight = torch.zeros(1, 8, 8, 1).long(), torch.zeros(filters, 3, 3, 1).long()
    with pytest.raises(RuntimeError, match=r"binary_sep_conv2d: depthwise_bits: expected .1, "):
        torch.ops.fastbandit.binary_sep_conv2d(
            bits, weight, *one, torch.zeros(4, 1, 1, 1).long(), None, None, 1, 1, 1, 1, False,
            torch.float32,
        )  # fmt: skip
