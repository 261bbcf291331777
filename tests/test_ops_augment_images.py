"""augment_images: the batch that single indexing, padding, mirroring and painting would give."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import ops

OP = torch.ops.fastbandit.augment_images.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def some_images(count: int = 7, channels: int = 3, height: int = 6, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, generator=generator).to(torch.uint8)


def some_draws(images: Tensor, padding: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    _, _, height, width = images.shape
    limits = (2 * padding + 1, 2 * padding + 1, 2, height, width)
    columns = [torch.randint(0, n, (len(images),), generator=generator) for n in limits]
    return torch.stack(columns, 1)


def expected_image(
    image: Tensor, draw: list[int], padding: int, flip: bool, length: int, fill: Tensor | None
) -> Tensor:
    """One image, by the words of the docstring; float64."""
    _, height, width = image.shape
    padded = F.pad(image, [padding] * 4).double() / 255
    result = torch.zeros(image.shape, dtype=torch.float64)
    for h in range(height):
        for w in range(width):
            column = width - 1 - w if flip and draw[2] else w
            top, left = (draw[0], draw[1]) if padding else (0, 0)
            result[:, h, w] = padded[:, h + top, column + left]
            if length:
                down, across = h - draw[3] + length // 2, w - draw[4] + length // 2
                if 0 <= down < length and 0 <= across < length:
                    result[:, h, w] = 0 if fill is None else fill.double()
    return result


# --- Values ---------------------------------------------------------------------------------------


def test_table_by_hand(device):
    images = torch.tensor([[[[0, 51], [102, 255]]]], dtype=torch.uint8, device=device)
    ids = torch.tensor([0], device=device)

    def batch(draw: list[int], **options) -> list:
        draws = torch.tensor([draw], device=device)
        return ops.augment_images(images, ids, draws=draws, **options)[0, 0].tolist()

    third, two_fifths = (float(torch.tensor(v) / 255) for v in (51.0, 102.0))
    nothing = [9, 9, 1, 9, 9]
    assert batch(nothing) == [[0.0, third], [two_fifths, 1.0]]
    assert batch(nothing, flip=True) == [[third, 0.0], [1.0, two_fifths]]
    assert batch([2, 0, 0, 0, 0], crop_padding=1) == [[0.0, two_fifths], [0.0, 0.0]]
    assert batch([1, 1, 0, 1, 0], crop_padding=1, cutout_length=1) == [[0.0, third], [0.0, 1.0]]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("padding", "flip", "length", "filled"),
    [(0, False, 0, False), (2, False, 0, False), (0, True, 0, False), (7, True, 3, True),
     (1, True, 4, False)],
)  # fmt: skip
def test_values(device, dtype, layout, padding, flip, length, filled):
    images = some_images()
    draws = some_draws(images, padding)
    fill = torch.tensor([0.25, 0.5, 1.0]) if filled else None
    ids = torch.tensor([6, 0, 3, 3])
    got = ops.augment_images(
        images.to(device),
        ids.to(device),
        draws=draws.to(device),
        crop_padding=padding,
        flip=flip,
        cutout_length=length,
        cutout_fill=None if fill is None else fill.to(device),
        out_dtype=dtype,
        memory_format=layout,
    )
    assert got.shape == (4, 3, 6, 5)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=layout)
    for row, index in zip(got.cpu(), ids.tolist(), strict=True):
        exact = expected_image(images[index], draws[index].tolist(), padding, flip, length, fill)
        # Rounded in float32 first, as every op of the package.
        wide = exact if dtype == torch.float64 else exact.float()
        assert torch.equal(row, wide.to(dtype))


def test_strides_and_the_reference_agree(device):
    images = some_images(5, 2, 4, 7).to(device)
    wide = torch.zeros(5, 2, 8, 9, dtype=torch.uint8, device=device)
    wide[:, :, ::2, 1:8] = images
    draws = some_draws(images.cpu(), 2).to(device)
    spread = torch.zeros(5, 10, dtype=torch.int64, device=device)
    spread[:, ::2] = draws
    ids = torch.tensor([4, 9, 1, 9, 0, 9], device=device)[::2]
    fill = torch.tensor([0.5, 9.0, 0.125, 9.0], device=device)[::2]
    options = {"crop_padding": 2, "flip": True, "cutout_length": 2}
    expected = ops.augment_images(
        images, ids.contiguous(), draws=draws, cutout_fill=fill.contiguous(), **options
    )
    got = ops.augment_images(
        wide[:, :, ::2, 1:8], ids, draws=spread[:, ::2], cutout_fill=fill, **options
    )
    assert torch.equal(got, expected)
    last = images.to(memory_format=torch.channels_last)
    got = ops.augment_images(last, ids, draws=draws, cutout_fill=fill, **options)
    assert torch.equal(got, expected)
    from fastbandit.ops.augment_images import _reference

    arguments = (images, ids, draws, fill, 2, True, 2, torch.float32, torch.contiguous_format)
    assert torch.equal(_reference(*arguments), expected)


@pytest.mark.parametrize("count", [0, 1, 200])
def test_batch_sizes(device, count):
    images = some_images(3, 1, 9, 8).to(device)
    ids = torch.arange(count, device=device) % 3
    got = ops.augment_images(images, ids)
    assert torch.equal(got, images[ids].float() / torch.tensor(255.0, device=device))


# --- opcheck, compile -----------------------------------------------------------------------------


def test_opcheck(device):
    images = some_images().to(device)
    draws = some_draws(images.cpu(), 1).to(device)
    ids = torch.tensor([2, 1], device=device)
    fill = torch.rand(3, device=device)
    for draw, colour, layout in ((None, None, LAYOUTS[0]), (draws, fill, LAYOUTS[1])):
        on = draw is not None
        torch.library.opcheck(
            OP, (images, ids, draw, colour, int(on), on, 2 * on, torch.bfloat16, layout)
        )


@pytest.mark.parametrize("backend", ["aot_eager"])
def test_compile(device, backend):
    images = some_images().to(device)

    def batch(images, ids, draws):
        return ops.augment_images(images, ids, draws=draws, crop_padding=1, flip=True) * 2

    torch._dynamo.reset()
    compiled = torch.compile(batch, fullgraph=True, backend=backend)
    draws = some_draws(images.cpu(), 1).to(device)
    for size in (2, 3):
        ids = torch.arange(size, device=device)
        assert torch.equal(compiled(images, ids, draws), batch(images, ids, draws))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 1, 2, 2)}, TypeError, "images: expected torch.uint8, got"),
        ({"images": torch.zeros(2, 2, dtype=torch.uint8)}, ValueError, "images: expected shape"),
        ({"ids": torch.tensor([0.0])}, TypeError, "ids: expected torch.int64, got torch.float32"),
        ({"ids": torch.tensor(0)}, ValueError, r"ids: expected shape \(N,\), got \(\)"),
        ({"flip": True}, ValueError, "draws: expected a tensor with crop, flip or cutout"),
        ({"draws": torch.zeros(2, 4).long()}, ValueError, r"draws: expected shape \(2, 5\)"),
        ({"draws": torch.zeros(2, 5)}, TypeError, "draws: expected torch.int64"),
        ({"cutout_fill": torch.zeros(2)}, ValueError, r"cutout_fill: expected shape \(1,\)"),
        ({"cutout_fill": torch.zeros(1).long()}, TypeError, "cutout_fill: expected torch.float32"),
        ({"crop_padding": -1, "draws": torch.zeros(2, 5).long()}, ValueError, "crop_padding: "),
        ({"out_dtype": torch.int64}, TypeError, "out_dtype: expected float32"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: expected"),
        ({"ids": torch.tensor([0], device="meta")}, RuntimeError, "ids: expected device cpu"),
    ],
)
def test_errors(change, error, message):
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    arguments = {"images": images, "ids": torch.tensor([0]), **change}
    with pytest.raises(error, match=f"augment_images: {message}"):
        ops.augment_images(arguments.pop("images"), arguments.pop("ids"), **arguments)


@pytest.mark.parametrize("bad", [-1, 2])
def test_an_id_outside_the_set_is_refused_on_a_cpu(bad):
    images = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=f"ids: expected 0 to 1, got {bad}"):
        ops.augment_images(images, torch.tensor([0, bad]))
