"""The CUDA kernels of norm_sum, run on the CPU against the float64 references."""

from __future__ import annotations

import importlib

import pytest
import torch
from harness import DTYPES, Call, exact, run_all
from torch import Tensor

module = importlib.import_module("fastbandit.ops.norm_sum")

MODES = ["plain", "sanitized"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
TOLERANCE = {
    torch.float32: 2e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2, torch.float16: 2e-3
}  # fmt: skip
# Pixels, channels: packs and single channels, several tiles of channels, threads without a pixel,
# several parts, more than one turn of the grid.
SIZES = [(2, 4), (3, 1), (65, 3), (130, 12), (40, 132), (70, 260), (1500, 8)]
SLOTS = [  # kinds of the terms
    [0], [1], [0, 0, 0], [1, 7, 0, 3], [9, 15, 1, 0], [15]
]  # fmt: skip
MOST = 6


def tensors(
    pixels: int, channels: int, count: int, dtype: torch.dtype, shift: int, generator
) -> list[Tensor]:
    """Maps [pixels, channels] that begin ``shift`` elements after an aligned address."""
    made = []
    for index in range(count):
        values = torch.randn(pixels, channels, generator=generator) * 2 + index
        flat = torch.zeros(pixels * channels + shift, dtype=dtype)
        flat[shift:] = values.to(dtype).view(-1)
        made.append(flat[shift:].view(pixels, channels))
    return made


def as_maps(xs: list[Tensor]) -> list[Tensor]:
    return [x.double().t()[None, :, :, None] for x in xs]


def close(got: Tensor, wanted: Tensor, tolerance: float, name: str) -> None:
    scale = wanted.abs().max().clamp(min=1e-6)
    torch.testing.assert_close(
        got.double() / scale, wanted.double() / scale, rtol=0, atol=tolerance,
        msg=lambda text: f"{name}: {text}",
    )  # fmt: skip


def scratch(pixels: int, channels: int, terms: int, wide: torch.dtype) -> Tensor:
    # At most 16 parts of the two multiprocessors of the shim; the launcher's own number is checked
    # by the entry, and what it writes beyond is found by the sanitizer.
    groups = -(-terms // 4)
    parts = min(16, max(1, -(-pixels // 64)))
    numbers = channels * (3 * terms + max(2 * terms * parts, 5 * groups * parts))
    return torch.full((numbers,), float("nan"), dtype=wide)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward(dtype, mode):
    generator = torch.Generator().manual_seed(0)
    wide = module.compute_dtype(dtype)
    calls, expected = [], []
    for pixels, channels in SIZES:
        for number, kinds in enumerate(SLOTS):
            xs = tensors(pixels, channels, len(kinds), dtype, number % 2, generator)
            slots: list[Tensor | None] = []
            vectors = []
            for x, kind in zip(xs, kinds, strict=True):
                variance, mean = torch.var_mean(x.double(), 0, correction=0)
                own = [
                    torch.rand(channels, generator=generator).to(wide) if kind & 2 else None,
                    torch.rand(channels, generator=generator).to(wide) if kind & 4 else None,
                    mean.to(wide) if kind & 8 else None,
                    (variance + 1e-3).rsqrt().to(wide) if kind & 8 else None,
                ]
                slots += own
                vectors += [vector for vector in own if vector is not None]
            rows = sum(kind & 1 for kind in kinds)
            y = exact(torch.zeros_like(xs[0]))
            statistics = torch.zeros(3, max(1, rows), channels, dtype=wide)
            mean, inverse, variance = (exact(one) for one in statistics)
            partial = scratch(pixels, channels, len(kinds), wide)
            arguments = [*xs, *[None] * (4 - len(xs)), kinds]
            arguments += [*slots, *[None] * (16 - len(slots)), len(kinds), y, mean, inverse]
            arguments += [variance, partial, partial.numel(), DTYPES[dtype], pixels, channels, 1e-3]
            name = f"{pixels} x {channels} {kinds}"
            calls.append(Call("norm_sum", "enter_norm_sum", arguments, name))
            reference = module._reference(
                as_maps(xs), kinds, [vector.double() for vector in vectors], 1e-3
            )
            expected.append((y, (mean, inverse, variance), rows, reference))
    run_all(calls, mode)
    for call, (y, statistics, rows, reference) in zip(calls, expected, strict=True):
        wanted = reference[0][0, :, :, 0].t()
        close(y, wanted, TOLERANCE[dtype], call.name)
        if rows:
            for one, other in zip(statistics, reference[1:], strict=True):
                close(one, other, TOLERANCE[wide], call.name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_backward(dtype, mode):
    generator = torch.Generator().manual_seed(1)
    wide = module.compute_dtype(dtype)
    calls, expected = [], []
    for index, (pixels, channels) in enumerate(SIZES):
        for terms in (1, 4, 6):
            kinds = [3 if (t + terms) % 2 else 1 for t in range(terms)]
            xs = tensors(pixels, channels, terms, dtype, (index + terms) % 2, generator)
            (grad,) = tensors(pixels, channels, 1, dtype, 0, generator)
            weights = [
                torch.rand(channels, generator=generator).to(wide) if kind & 2 else None
                for kind in kinds
            ]
            statistics = [torch.var_mean(x.double(), 0, correction=0) for x in xs]
            mean = torch.stack([one for _, one in statistics]).to(wide)
            inverse = torch.stack([(one + 1e-3).rsqrt() for one, _ in statistics]).to(wide)
            results = [exact(torch.zeros_like(x)) for x in xs]
            by_weight, by_bias = exact(torch.zeros_like(mean)), exact(torch.zeros_like(mean[0]))
            partial = scratch(pixels, channels, terms, wide)
            nothing = [None] * (MOST - terms)
            arguments = [grad, *xs, *nothing, *weights, *nothing, terms, mean, inverse]
            arguments += [*results, *nothing, by_weight, by_bias, partial, partial.numel()]
            arguments += [DTYPES[dtype], pixels, channels]
            name = f"{pixels} x {channels}, {terms} terms"
            calls.append(Call("norm_sum", "enter_norm_sum_backward", arguments, name))
            reference = module._backward_reference(
                as_maps([grad])[0], as_maps(xs), kinds,
                [weight.double() for weight in weights if weight is not None],
                mean.double(), inverse.double(),
            )  # fmt: skip
            expected.append((grad, [*results, by_weight, by_bias], reference))
    run_all(calls, mode)
    for call, (grad, got, reference) in zip(calls, expected, strict=True):
        scale = grad.double().abs().max()
        for one, wanted in zip(got, reference, strict=True):
            if wanted.dim() == 4:
                # Where few pixels are normalised, nearly all of the gradient cancels.
                wanted = wanted[0, :, :, 0].t()
                error = (one.double() - wanted).abs().max()
                largest = wanted.abs().max()
                assert error <= 5 * TOLERANCE[dtype] * max(scale, largest), call.name
            else:
                close(one, wanted, 2 * TOLERANCE[wide], call.name)
