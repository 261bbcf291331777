"""The CUDA kernels of pgd_step_, pgd_step_normalize_ and random_start, run on the CPU.

Results are compared bit for bit with the references: all of them round at the same places.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from harness import DTYPES, Call, exact, run, run_all
from torch import Tensor

# The package's attributes of these names are the public functions.
pgd = importlib.import_module("fastbandit.ops.pgd_step")
start = importlib.import_module("fastbandit.ops.random_start")

MODES = ["plain", "sanitized"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BOUNDS = [(0.0, 1.0), (None, None), (0.0, None), (None, 0.9)]
# Fewer than a pack, odd, one pack.
SIZES = [(1,), (3,), (7, 1), (2, 3, 5, 5), (16,)]


def random_image(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    image = torch.rand(shape, generator=generator)
    return (image * 255).round().to(torch.uint8) if dtype == torch.uint8 else image.to(dtype)


def layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The tensor in several memory layouts, each with a storage of exactly its extent."""
    made = {"contiguous": exact(tensor)}
    if tensor.dim() == 4:
        made["channels_last"] = exact(tensor.to(memory_format=torch.channels_last))
        wide = torch.zeros(*tensor.shape[:-1], tensor.shape[-1] * 2, dtype=tensor.dtype)
        wide[..., ::2] = tensor
        made["strided"] = wide[..., ::2]
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    shifted[1:] = tensor.reshape(-1)
    made["unaligned"] = shifted[1:].view(tensor.shape)
    return made


def optional(value: float | None) -> list[int | float]:
    return [0, 0.0] if value is None else [1, value]


def step_call(delta: Tensor, grad: Tensor, image: Tensor, lower, upper, name: str = "") -> Call:
    arguments = [delta, grad, image, DTYPES[delta.dtype], DTYPES[image.dtype], delta.dim()]
    arguments += [list(delta.shape), list(delta.stride()), list(grad.stride())]
    arguments += [list(image.stride()), 0.02, 0.05, *optional(lower), *optional(upper), None]
    return Call("pgd_step", "launch_pgd_step", arguments, name)


def test_layout_pairs_are_real():
    made = layouts(torch.rand(2, 3, 5, 5))
    assert made["channels_last"].stride() == (75, 1, 15, 3)
    assert not made["strided"].is_contiguous()
    assert made["unaligned"].data_ptr() % 16 != 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pgd_step(dtype, mode):
    generator = torch.Generator().manual_seed(0)
    calls, expected = [], []
    for shape, (lower, upper), kind in itertools.product(
        SIZES, BOUNDS, {dtype, torch.float32, torch.uint8}
    ):
        grad = torch.randn(shape, generator=generator).to(dtype)
        grad.view(-1)[0] = 0.0
        image = random_image(shape, kind, generator)
        delta = (torch.rand(shape, generator=generator) * 0.1 - 0.05).to(dtype)
        for layout, other in itertools.product(layouts(delta), repeat=2):
            if layout != other and "contiguous" not in (layout, other):
                continue
            d, g, x = layouts(delta)[layout], layouts(grad)[other], layouts(image)[layout]
            reference = delta.clone()
            pgd._step_reference(reference, grad, image, 0.02, 0.05, lower, upper)
            calls.append(step_call(d, g, x, lower, upper, f"{shape} {kind} {layout} {other}"))
            expected.append((d, reference))
    run_all(calls, mode)
    for call, (got, reference) in zip(calls, expected, strict=True):
        assert torch.equal(got, reference), call.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "unaligned"])
def test_pgd_step_goes_round_the_grid(dtype, layout):
    # 2 multiprocessors have 8192 threads of up to 8 elements; the last turn is a part of a pack.
    generator = torch.Generator().manual_seed(6)
    count = 8192 * (16 // dtype.itemsize if layout == "contiguous" else 1) + 259
    grad = torch.randn(count, generator=generator).to(dtype)
    image = random_image((count,), torch.uint8, generator)
    delta = torch.zeros(count, dtype=dtype)
    d, g, x = (layouts(t)[layout] for t in (delta, grad, image))
    pgd._step_reference(delta, grad, image, 0.02, 0.05, 0.0, 1.0)
    run(step_call(d, g, x, 0.0, 1.0))
    assert torch.equal(d, delta)


def test_pgd_step_does_not_write_around_a_view():
    whole = torch.full((10, 12), 7.0)
    delta = whole[2:7, 3:8]
    grad, image = torch.ones(5, 5), torch.rand(5, 5)
    run(step_call(delta, grad, image, None, None))
    inside = torch.zeros_like(whole, dtype=torch.bool)
    inside[2:7, 3:8] = True
    assert (whole[~inside] == 7.0).all()
    assert (delta == torch.tensor(0.05)).all()


def test_pgd_step_passes_nan_on():
    nan = float("nan")
    delta = torch.tensor([nan, 0.01, 0.01, 0.01, 0.01])
    grad = torch.tensor([1.0, nan, 1.0, 1.0, -0.0])
    image = torch.tensor([0.5, 0.5, nan, 0.5, 0.5])
    reference = delta.clone()
    pgd._step_reference(reference, grad, image, 0.02, 0.05, 0.0, 1.0)
    run(step_call(delta, grad, image, 0.0, 1.0))
    assert torch.equal(delta.nan_to_num(99.0), reference.nan_to_num(99.0))
    assert delta.isnan().tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pgd_step_normalize(dtype, mode):
    generator = torch.Generator().manual_seed(1)
    calls, expected = [], []
    shapes = [(2, 3, 4, 4), (1, 5, 3, 3), (3, 1, 2, 7), (2, 2, 1, 1)]
    shapes += [(1, 3, 53, 57)] if mode == "plain" else []
    for index, (shape, kind, out_dtype, last) in enumerate(
        itertools.product(shapes, {dtype, torch.float32, torch.uint8}, FLOATS, [False, True])
    ):
        lower, upper = BOUNDS[index % len(BOUNDS)]
        grad = torch.randn(shape, generator=generator).to(dtype)
        image = random_image(shape, kind, generator)
        delta = (torch.rand(shape, generator=generator) * 0.1 - 0.05).to(dtype)
        mean = torch.rand(shape[1], generator=generator)
        std = (torch.rand(shape[1], generator=generator) + 0.5).to(dtype)
        format_ = torch.channels_last if last else torch.contiguous_format
        reference = delta.clone()
        y = pgd._step_normalize_reference(
            reference, grad, image, mean, std, 0.02, 0.05, lower, upper, out_dtype, format_
        )
        for layout, d in layouts(delta).items():
            g, x = layouts(grad)[layout], layouts(image)[layout]
            out = exact(torch.zeros_like(y))
            arguments = [
                d,
                g,
                x,
                mean,
                std,
                out,
                *(DTYPES[t.dtype] for t in (d, x, mean, std, out)),
            ]
            arguments += [list(shape)]
            arguments += [list(t.stride()) for t in (d, g, x, out)]
            arguments += [1, 1, 0.02, 0.05, *optional(lower), *optional(upper), None]
            name = f"{shape} {kind} {out_dtype} {layout} last={last}"
            calls.append(Call("pgd_step_normalize", "launch_pgd_step_normalize", arguments, name))
            expected.append((d, reference, out, y))
    run_all(calls, mode)
    for call, (got, reference, out, y) in zip(calls, expected, strict=True):
        assert torch.equal(got, reference), call.name
        assert torch.equal(out, y), call.name


def start_call(
    image: Tensor, seed: int, offset: int, index: Tensor | None, lower, upper, on_device: bool
) -> tuple[Call, Tensor]:
    dtype = torch.float32 if image.dtype == torch.uint8 else image.dtype
    delta = exact(torch.zeros_like(image, dtype=dtype))
    words = (torch.tensor(seed), torch.tensor(offset)) if on_device else (None, None)
    arguments = [delta, image, DTYPES[dtype], DTYPES[image.dtype], image.dim(), list(image.shape)]
    arguments += [list(delta.stride()), list(image.stride()), 0 if on_device else seed]
    arguments += [0 if on_device else offset, *words, index, 1 if index is not None else 0]
    arguments += [0.05, *optional(lower), *optional(upper), None]
    name = f"{tuple(image.shape)} {image.dtype} seed={seed} on_device={on_device}"
    return Call("random_start", "launch_random_start", arguments, name), delta


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.uint8], ids=str)
def test_random_start(dtype, mode):
    generator = torch.Generator().manual_seed(2)
    calls, expected = [], []
    shapes = [(1, 3, 8, 8), (3, 3, 5, 5), (5,), (2, 4), (4, 1, 1, 1)]
    shapes += [(2, 1, 130, 70)] if mode == "plain" else []
    seeds = [(0, 0), (2**63 - 1, 2**32 - 1), (123_456_789_012, 7)]
    for index, (shape, (lower, upper), (seed, offset)) in enumerate(
        itertools.product(shapes, BOUNDS, seeds)
    ):
        image = random_image(shape, dtype, generator)
        ids = torch.randint(0, 2**62, shape[:1], generator=generator) if index % 2 else None
        reference = start._reference(image, 0.05, seed, offset, None, None, ids, lower, upper)
        for x in layouts(image).values():
            call, delta = start_call(x, seed, offset, ids, lower, upper, on_device=index % 3 == 0)
            calls.append(call)
            expected.append((delta, reference))
    run_all(calls, mode)
    for call, (got, reference) in zip(calls, expected, strict=True):
        assert torch.equal(got, reference), call.name
