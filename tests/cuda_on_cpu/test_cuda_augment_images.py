"""The CUDA kernel of augment_images, run on the CPU: the reference's bits."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from harness import DTYPES, Call, exact, run_all

augment = importlib.import_module("fastbandit.ops.augment_images")

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# padding, flip, cutout, filled
CHANGES = [(0, False, 0, False), (2, True, 3, True), (5, False, 2, False)]


def augment_call(images, ids, draws, fill, change, dtype, layout):
    padding, flip, length, _ = change
    shape = (len(ids), *images.shape[1:])
    out = exact(torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout))
    arguments = [out, images, DTYPES[dtype], len(images), list(shape), list(images.stride())]
    arguments += [int(layout == torch.channels_last), ids, ids.stride(0), draws]
    arguments += [0, 0] if draws is None else list(draws.stride())
    arguments += [fill, 0 if fill is None else fill.stride(0), padding, int(flip), length, None]
    name = f"{tuple(shape)} {change} {dtype} {layout}"
    return Call("augment_images", "launch_augment_images", arguments, name), out


@pytest.mark.parametrize("mode", ["plain", "sanitized"])
def test_augment_images(mode):
    generator = torch.Generator().manual_seed(0)
    calls, expected = [], []
    shapes = [(4, 3, 5, 6), (3, 1, 4, 4), (2, 2, 1, 1)]
    shapes += [(2, 3, 70, 70)] if mode == "plain" else []  # more than the grid has threads
    for shape, change, dtype, layout in itertools.product(
        shapes, CHANGES, FLOATS, (torch.contiguous_format, torch.channels_last)
    ):
        padding, flip, length, filled = change
        images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
        limits = (2 * padding + 1, 2 * padding + 1, 2, shape[2], shape[3])
        drawn = [torch.randint(0, n, (shape[0],), generator=generator) for n in limits]
        draws = torch.stack(drawn, 1) if padding or flip or length else None
        fill = torch.rand(shape[1], generator=generator) if filled else None
        ids = torch.tensor([1, 0, 1])
        reference = augment._reference(
            images, ids, draws, fill, padding, flip, length, dtype, layout
        )
        call, out = augment_call(
            exact(images), ids, None if draws is None else exact(draws), fill, change, dtype, layout
        )
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
