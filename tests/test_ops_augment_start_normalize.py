"""augment_start_normalize: the bits of its three parts, one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.ops.augment_start_normalize import _reference

OP = torch.ops.fastbandit.augment_start_normalize.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


class Case:
    """Bytes, ids out of order and twice, draws and statistics."""

    def __init__(self, device: torch.device, shape: tuple[int, ...], count: int = 5) -> None:
        generator = torch.Generator().manual_seed(sum(shape))
        total, channels, height, width = shape
        self.images = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(device)
        limits = (5, 5, 2, height, width)
        columns = [torch.randint(0, n, (total,), generator=generator) for n in limits]
        self.draws = torch.stack(columns, 1).to(device)
        self.ids = torch.randint(0, total, (count,), generator=generator).to(device)
        self.mean = torch.rand(channels, generator=generator).to(device)
        self.std = (torch.rand(channels, generator=generator) + 0.1).to(device)
        self.fill = torch.rand(channels, generator=generator).to(device)
        self.changes = {
            "draws": self.draws, "crop_padding": 2, "flip": True, "cutout_length": 2,
            "cutout_fill": self.fill,
        }  # fmt: skip

    def whole(self, **options) -> tuple[Tensor, Tensor, Tensor]:
        return ops.augment_start_normalize(self.images, self.ids, self.mean, self.std, **options)


def by_parts(case: Case, start: dict, changes: dict, out_dtype, layout) -> tuple[Tensor, ...]:
    image = ops.augment_images(case.images, case.ids, memory_format=layout, **changes)
    delta = ops.random_start(image, index=case.ids, **start)
    mean, std = case.mean.view(-1, 1, 1), case.std.view(-1, 1, 1)
    return image, delta, ((image + delta - mean) / std).to(out_dtype)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    # Fewer elements than a counter has numbers, several chunks of words, several blocks of
    # results, and more channels than a block has elements.
    [(3, 1, 1, 3), (7, 3, 6, 5), (4, 3, 40, 33), (2, 1, 50, 50), (2, 1100, 2, 2)],
    ids=str,
)
def test_values(device, shape, dtype, layout):
    case = Case(device, shape)
    start = {"epsilon": 8 / 255, "seed": 2**40 + 3, "offset": 7, "lower": 0.0, "upper": 1.0}
    for changes in ({}, case.changes):
        got = case.whole(**start, **changes, out_dtype=dtype, memory_format=layout)
        expected = by_parts(case, start, changes, dtype, layout)
        for mine, other in zip(got, expected, strict=True):
            assert mine.dtype == other.dtype
            assert torch.equal(mine, other)
            assert mine.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("bounds", [(None, None), (0.0, None), (None, 1.0), (0.25, 0.5)])
def test_bounds(device, bounds):
    case = Case(device, (4, 2, 5, 5))
    start = {"epsilon": 0.3, "seed": 1, "lower": bounds[0], "upper": bounds[1]}
    got = case.whole(**start)
    expected = by_parts(case, start, {}, torch.float32, LAYOUTS[0])
    assert all(map(torch.equal, got, expected))


def test_table_by_hand(device):
    # Without a ball there is nothing but (value / 255 - mean) / std.
    images = torch.tensor([[[[0, 255]]], [[[51, 102]]]], dtype=torch.uint8, device=device)
    half = torch.tensor([0.5], device=device)
    image, delta, normalized = ops.augment_start_normalize(
        images, torch.tensor([1, 0], device=device), half, half, epsilon=0.0, seed=0
    )
    torch.testing.assert_close(image.view(2, 2).cpu(), torch.tensor([[0.2, 0.4], [0.0, 1.0]]))
    assert (delta == 0).all()
    torch.testing.assert_close(
        normalized.view(2, 2).cpu(), torch.tensor([[-0.6, -0.2], [-1.0, 1.0]])
    )


def test_numbers_in_tensors(device):
    case = Case(device, (3, 1, 4, 4))
    numbers = {"seed": 11, "offset": 5}
    tensors = {name: torch.tensor([value], device=device) for name, value in numbers.items()}
    plain, given = (case.whole(epsilon=0.1, **which) for which in (numbers, tensors))
    assert all(map(torch.equal, plain, given))
    tensors["offset"].fill_(6)
    assert not torch.equal(case.whole(epsilon=0.1, **tensors)[1], plain[1])


def test_strides_and_the_reference_agree(device):
    case = Case(device, (5, 2, 4, 7))
    wide = torch.zeros(5, 2, 8, 9, dtype=torch.uint8, device=device)
    wide[:, :, ::2, 1:8] = case.images
    every_second = torch.stack([case.ids, case.ids * 0 - 9], 1).flatten()[::2]
    pairs = torch.stack([case.mean, case.std], 1)
    options = {"epsilon": 0.1, "seed": 3, "lower": 0.0, "upper": 1.0, **case.changes}
    expected = case.whole(**options)
    got = ops.augment_start_normalize(
        wide[:, :, ::2, 1:8], every_second, pairs[:, 0], pairs[:, 1], **options
    )
    assert all(map(torch.equal, got, expected))
    reference = _reference(
        case.images, case.ids, case.draws, case.fill, 2, True, 2, 0.1, 3, 0, None, None, 0.0, 1.0,
        case.mean, case.std, torch.float32, LAYOUTS[0],
    )  # fmt: skip
    assert all(map(torch.equal, reference, expected))


@pytest.mark.parametrize("count", [0, 1, 300])
def test_an_image_is_the_same_in_any_batch(device, count):
    case = Case(device, (4, 3, 9, 8), count)
    got = case.whole(epsilon=0.1, seed=2)
    for which, tensor in enumerate(got):
        assert tensor.shape == (count, 3, 9, 8)
        for row, index in list(enumerate(case.ids.tolist()))[::97]:
            alone = ops.augment_start_normalize(
                case.images, case.ids[row : row + 1], case.mean, case.std, epsilon=0.1, seed=2
            )
            assert torch.equal(alone[which][0], tensor[row]), index


# --- opcheck, compile -----------------------------------------------------------------------------


def test_opcheck(device):
    case = Case(device, (7, 3, 6, 5))
    seed = torch.tensor([4], device=device)
    for drawn, layout in ((False, LAYOUTS[0]), (True, LAYOUTS[1])):
        changes = (case.draws, case.fill, 2, True, 2) if drawn else (None, None, 0, False, 0)
        numbers = (0.1, 0, 1, seed, None, 0.0, 1.0) if drawn else (0.1, 5, 1, None, None, None, 1.0)
        last = (case.mean, case.std, torch.bfloat16, layout)
        torch.library.opcheck(OP, (case.images, case.ids, *changes, *numbers, *last))


def test_compile(device):
    case = Case(device, (7, 3, 6, 5))

    def batch(ids: Tensor) -> Tensor:
        image, delta, normalized = ops.augment_start_normalize(
            case.images, ids, case.mean, case.std, epsilon=0.1, seed=3, **case.changes
        )
        return image + delta + normalized * 2

    torch._dynamo.reset()
    compiled = torch.compile(batch, fullgraph=True, backend="aot_eager")
    for size in (2, 3):
        assert torch.equal(compiled(case.ids[:size]), batch(case.ids[:size]))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.zeros(2, 1, 2, 2)}, TypeError, "images: expected torch.uint8, got"),
        ({"ids": torch.tensor([0.0])}, TypeError, "ids: expected torch.int64, got torch.float32"),
        ({"ids": torch.tensor([2])}, RuntimeError, "ids: expected 0 to 1, got 2"),
        ({"mean": torch.zeros(2)}, ValueError, r"mean: expected shape \(1,\), one value for each"),
        ({"std": torch.ones(1).double()}, TypeError, "std: expected torch.float32, got"),
        ({"std": torch.ones(1, device="meta")}, RuntimeError, "std: expected device cpu as images"),
        ({"flip": True}, ValueError, "draws: expected a tensor with crop, flip or cutout"),
        ({"epsilon": -0.1}, ValueError, "epsilon: expected a finite number >= 0, got -0.1"),
        ({"epsilon": float("nan")}, ValueError, "epsilon: expected a finite number >= 0, got nan"),
        ({"lower": 1.0, "upper": 0.0}, ValueError, "lower: expected at most upper = 0.0, got 1.0"),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^63\), got -1"),
        ({"offset": 2**32}, ValueError, r"offset: expected an int in \[0, 2\^32\)"),
        ({"seed": 0.5}, TypeError, "seed: expected an int or a torch.int64 tensor, got float"),
        ({"offset": torch.zeros(2).long()}, ValueError, "offset: expected a tensor of one element"),
        (
            {"seed": torch.zeros(1, device="meta").long()},
            RuntimeError,
            "seed: expected device cpu as images",
        ),
        ({"out_dtype": torch.int64}, TypeError, "out_dtype: expected float32"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: expected"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "images": torch.zeros(2, 1, 2, 2, dtype=torch.uint8), "ids": torch.tensor([0]),
        "mean": torch.zeros(1), "std": torch.ones(1), "epsilon": 0.1, "seed": 0,
    } | change  # fmt: skip
    places = [arguments.pop(name) for name in ("images", "ids", "mean", "std")]
    with pytest.raises(error, match=f"augment_start_normalize: {message}"):
        ops.augment_start_normalize(*places, **arguments)


def test_a_gradient_is_refused(device):
    case = Case(device, (2, 1, 3, 3))
    case.mean.requires_grad_()
    with pytest.raises(RuntimeError, match="augment_start_normalize: mean: expected a tensor with"):
        case.whole(epsilon=0.1, seed=0)
