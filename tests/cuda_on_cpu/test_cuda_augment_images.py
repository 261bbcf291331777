"""The CUDA kernels that make batches out of bytes, run on the CPU: the references' bits."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from harness import DTYPES, Call, exact, run_all

augment = importlib.import_module("fastbandit.ops.augment_images")
whole = importlib.import_module("fastbandit.ops.augment_start_normalize")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS = (torch.contiguous_format, torch.channels_last)
# padding, flip, cutout, filled
CHANGES = [(0, False, 0, False), (2, True, 3, True), (5, False, 2, False)]


def batch_arguments(images, ids, draws, fill, change):
    """What stands for an AugmentBatch, see augment_batch_of.h."""
    padding, flip, length, _ = change
    numbers = [len(ids), *images.shape, *images.stride(), ids.stride(0)]
    numbers += [0, 0] if draws is None else list(draws.stride())
    numbers += [0 if fill is None else fill.stride(0), padding, int(flip), length]
    return [images, ids, draws, fill, numbers]


def result(images, ids, dtype, layout):
    shape = (len(ids), *images.shape[1:])
    return exact(torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout))


def augment_call(images, ids, draws, fill, change, dtype, layout):
    out = result(images, ids, dtype, layout)
    arguments = [out, DTYPES[dtype], int(layout == torch.channels_last)]
    arguments += batch_arguments(images, ids, draws, fill, change)
    name = f"{tuple(out.shape)} {change} {dtype} {layout}"
    return Call("augment_images", "augment_images_on_cpu", arguments, name), out


def some_batch(shape, change, generator):
    """images, draws and fill."""
    padding, flip, length, filled = change
    images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
    limits = (2 * padding + 1, 2 * padding + 1, 2, shape[2], shape[3])
    drawn = [torch.randint(0, n, (shape[0],), generator=generator) for n in limits]
    draws = exact(torch.stack(drawn, 1)) if padding or flip or length else None
    fill = torch.rand(shape[1], generator=generator) if filled else None
    return exact(images), draws, fill


@pytest.mark.parametrize("mode", ["plain", "sanitized"])
def test_augment_images(mode):
    generator = torch.Generator().manual_seed(0)
    calls, expected = [], []
    shapes = [(4, 3, 5, 6), (3, 1, 4, 4), (2, 2, 1, 1)]
    shapes += [(2, 3, 70, 70)] if mode == "plain" else []  # more than the grid has threads
    for shape, change, dtype, layout in itertools.product(shapes, CHANGES, FLOATS, LAYOUTS):
        padding, flip, length, _ = change
        images, draws, fill = some_batch(shape, change, generator)
        ids = torch.tensor([1, 0, 1])
        reference = augment._reference(
            images, ids, draws, fill, padding, flip, length, dtype, layout
        )
        call, out = augment_call(images, ids, draws, fill, change, dtype, layout)
        calls.append(call)
        expected.append((out, reference))
    run_all(calls, mode)
    for call, (got, reference) in zip(calls, expected, strict=True):
        assert torch.equal(got, reference), call.name


def test_an_id_outside_the_set_gives_nan():
    images = torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    ids = torch.tensor([1, 2, -1])
    call, out = augment_call(
        images, ids, None, None, CHANGES[0], torch.float32, torch.contiguous_format
    )
    run_all([call], "plain")
    assert (out[0] == 1).all()
    assert out[1:].isnan().all()


def whole_call(images, ids, draws, fill, change, numbers, statistics, bounds, dtype, layout):
    """numbers: seed and offset, both ints or both tensors; bounds: epsilon, lower, upper."""
    results = [result(images, ids, kind, layout) for kind in (torch.float32,) * 2 + (dtype,)]
    arguments = [*results, DTYPES[dtype], int(layout == torch.channels_last)]
    arguments += batch_arguments(images, ids, draws, fill, change)
    on_device = isinstance(numbers[0], torch.Tensor)
    arguments += [0, 0, *numbers] if on_device else [*numbers, None, None]
    for statistic in statistics:
        arguments += [statistic, statistic.stride(0)]
    epsilon, *limits = bounds
    arguments.append(float(epsilon))
    for bound in limits:
        arguments += [int(bound is not None), float(bound or 0)]
    name = f"{tuple(results[0].shape)} {change} {dtype} {layout} {bounds}"
    return Call(
        "augment_start_normalize", "augment_start_normalize_on_cpu", arguments, name
    ), results


@pytest.mark.parametrize("mode", ["plain", "sanitized"])
def test_augment_start_normalize(mode):
    generator = torch.Generator().manual_seed(0)
    calls, expected = [], []
    shapes = [(4, 3, 5, 6), (3, 1, 4, 4), (2, 2, 1, 1), (2, 3, 1, 3)]
    shapes += [(2, 3, 70, 70)] if mode == "plain" else []
    products = itertools.product(shapes, CHANGES, FLOATS, LAYOUTS)
    for turn, (shape, change, dtype, layout) in enumerate(products):
        padding, flip, length, _ = change
        images, draws, fill = some_batch(shape, change, generator)
        ids = torch.tensor([1, 0, 1])
        numbers = (2**40 + turn, 2**31 + turn)
        epsilon, lower, upper = [(0.1, 0.0, 1.0), (0.3, None, None), (8 / 255, 0.0, None)][turn % 3]
        wide = torch.rand(2 * shape[1], generator=generator) + 0.1
        statistics = (exact(wide[::2]), exact(wide[1::2])) if turn % 2 else (wide[::2], wide[1::2])
        given = tuple(torch.tensor([v]) for v in numbers) if turn % 4 < 2 else numbers
        reference = whole._reference(
            images, ids, draws, fill, padding, flip, length, epsilon, *numbers, None, None,
            lower, upper, *statistics, dtype, layout,
        )  # fmt: skip
        call, results = whole_call(
            images, ids, draws, fill, change, given, statistics, (epsilon, lower, upper), dtype,
            layout,
        )  # fmt: skip
        calls.append(call)
        expected.append((results, reference))
    run_all(calls, mode)
    for call, (got, reference) in zip(calls, expected, strict=True):
        for name, mine, other in zip(("image", "delta", "out"), got, reference, strict=True):
            assert torch.equal(mine, other), f"{name} of {call.name}"


def test_an_id_outside_the_set_gives_nan_in_all_three():
    images = torch.full((2, 1, 2, 2), 255, dtype=torch.uint8)
    ids = torch.tensor([1, 2, -1])
    statistics = (torch.tensor([0.5]), torch.tensor([0.25]))
    call, results = whole_call(
        images, ids, None, None, CHANGES[0], (3, 4), statistics, (0.1, 0.0, 1.0), torch.float32,
        torch.contiguous_format,
    )  # fmt: skip
    run_all([call], "plain")
    for tensor in results:
        assert tensor[0].isfinite().all()
        assert tensor[1:].isnan().all()
