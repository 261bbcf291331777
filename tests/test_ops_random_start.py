"""random_start: the same bits everywhere, uniform, inside the ball and the bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastbandit import ops

OP = torch.ops.fastbandit.random_start.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF_TYPES = [torch.bfloat16, torch.float16]
MASK = 0xFFFFFFFF


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def expected_uniform(seed: int, offset: int, index: int, element: int) -> float:
    """The number of one element before epsilon, in Python's unbounded integers."""
    c0, c1, c2, c3 = element // 4, offset, index & MASK, index >> 32
    k0, k1 = seed & MASK, seed >> 32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    bits = (c0, c1, c2, c3)[element % 4]
    return (2 * (bits >> 8) + 1 - 2**24) / 2**24


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, (1 << 63) - 1, 0x123456789ABCDEF])
@pytest.mark.parametrize("offset", [0, MASK])
def test_values(device, seed, offset):
    ids = [0, 5, (1 << 32) + 5, (1 << 63) - 1]
    image = torch.zeros(4, 3, 3, 2, device=device)
    index = torch.tensor(ids, device=device)
    delta = ops.random_start(image, epsilon=0.1, seed=seed, offset=offset, index=index)
    assert delta.shape == image.shape
    assert delta.dtype == torch.float32
    for row, identity in zip(delta.cpu().flatten(1), ids, strict=True):
        expected = [
            float32(expected_uniform(seed, offset, identity, element) * float32(0.1))
            for element in range(18)
        ]
        assert row.tolist() == expected


def test_table_by_hand(device):
    # Counter and key zero: the first published known answer, 6627e8d5 e169c58d bc57ac4c 9b00dbd8,
    # whose upper 24 bits are those below.
    upper = [0x6627E8, 0xE169C5, 0xBC57AC, 0x9B00DB]
    delta = ops.random_start(torch.zeros(1, 4, device=device), epsilon=1.0, seed=0)
    assert delta.tolist() == [[(2 * bits + 1 - 2**24) / 2**24 for bits in upper]]


def test_bounds_clip_after_the_draw(device):
    image = torch.rand(2, 3, 8, 8, device=device)
    free = ops.random_start(image, epsilon=0.3, seed=1)
    bound = ops.random_start(image, epsilon=0.3, seed=1, lower=0.0, upper=1.0)
    expected = torch.minimum(torch.maximum(free, -image), 1 - image)
    assert torch.equal(bound, expected)
    assert not torch.equal(bound, free)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_half_types_are_the_float32_start_rounded_toward_zero(device, dtype):
    image = torch.zeros(2, 3, 8, 8, device=device)
    exact = ops.random_start(image, epsilon=8 / 255, seed=3)
    half = ops.random_start(image.to(dtype), epsilon=8 / 255, seed=3)
    assert half.dtype == dtype
    assert bool((half.float().abs() <= exact.abs()).all())
    one_up = (half.view(torch.int16) + 1).view(dtype).float().abs()
    assert bool((one_up > exact.abs()).all())
    assert bool((half.float().sign() * exact.sign() >= 0).all())


def test_float64_is_the_same_draw_with_epsilon_in_float64(device):
    image = torch.zeros(2, 3, 4, 4, dtype=torch.float64, device=device)
    unit = ops.random_start(image.float(), epsilon=1.0, seed=3)
    delta = ops.random_start(image, epsilon=0.1, seed=3)
    assert delta.dtype == torch.float64
    assert torch.equal(delta, unit.double() * 0.1)


def test_uint8_images_give_float32(device):
    image = torch.tensor([[0, 255, 128, 1]], dtype=torch.uint8, device=device)
    delta = ops.random_start(image, epsilon=0.5, seed=2, lower=0.0, upper=1.0)
    assert delta.dtype == torch.float32
    as_float = image.cpu().double().div(255).float().to(device)
    assert torch.equal(delta, ops.random_start(as_float, epsilon=0.5, seed=2, lower=0.0, upper=1.0))


def test_an_image_has_its_start_in_any_batch(device):
    image = torch.rand(6, 3, 5, 3, device=device)
    arguments = {"epsilon": 0.1, "seed": 9, "offset": 4, "lower": 0.0, "upper": 1.0}
    whole = ops.random_start(image, **arguments)
    order = torch.tensor([4, 0, 3], device=device)
    part = ops.random_start(image[order], index=order, **arguments)
    assert torch.equal(part, whole[order])
    assert torch.equal(ops.random_start(image[:2], **arguments), whole[:2])


def test_seed_offset_and_image_change_the_draw(device):
    image = torch.zeros(2, 64, device=device)
    draws = [
        ops.random_start(image, epsilon=1.0, seed=seed, offset=offset)
        for seed, offset in [(0, 0), (1, 0), (1 << 32, 0), (0, 1)]
    ]
    rows = torch.cat(draws)
    assert len({tuple(row) for row in rows.tolist()}) == 8


def test_seed_and_offset_in_tensors(device):
    image = torch.rand(2, 3, 4, 4, device=device)
    expected = ops.random_start(image, epsilon=0.1, seed=(1 << 62) + 5, offset=77)
    seed = torch.tensor((1 << 62) + 5, device=device)
    offset = torch.tensor([77], device=device)
    assert torch.equal(ops.random_start(image, epsilon=0.1, seed=seed, offset=offset), expected)
    assert torch.equal(ops.random_start(image, epsilon=0.1, seed=seed, offset=77), expected)


def test_global_generators_are_not_touched(device):
    before = torch.get_rng_state()
    ops.random_start(torch.zeros(2, 8, device=device), epsilon=0.1, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_distribution():
    # 2^18 draws in 64 equal bins: the 0.1 % points of chi-square with 63 degrees of freedom are
    # 34 and 104 (both tails: too even a count is as suspicious as too uneven a one).
    delta = ops.random_start(torch.zeros(64, 4096), epsilon=1.0, seed=12345)
    counts = torch.histc(delta, bins=64, min=-1.0, max=1.0)
    expected = delta.numel() / 64
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert 34 < chi_square < 104
    assert bool((delta != 0).all())
    # Neither neighbours of one image nor the same element of two images go together: 5 sigma.
    limit = 5 / math.sqrt(delta.numel()) / 3
    assert abs(float((delta[:, 1:] * delta[:, :-1]).mean())) < limit
    assert abs(float((delta[1:] * delta[:-1]).mean())) < limit


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30),
    epsilon=st.floats(0, 2),
    seed=st.integers(0, (1 << 63) - 1),
    dtype=st.sampled_from([*DTYPES, torch.uint8]),
)
def test_never_outside_epsilon_or_the_bounds(rows, epsilon, seed, dtype):
    image = torch.tensor([rows], dtype=torch.float64)
    image = (image * 255).to(torch.uint8) if dtype == torch.uint8 else image.to(dtype)
    delta = ops.random_start(image, epsilon=epsilon, seed=seed, lower=0.0, upper=1.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = epsilon if dtype == torch.float64 else float32(epsilon)
    assert float(delta.double().abs().max()) <= limit
    x = image.to(wide) / 255 if dtype == torch.uint8 else image.to(wide)
    attacked = x + delta.to(wide)
    assert float(attacked.min()) >= 0.0
    assert float(attacked.max()) <= 1.0


# --- opcheck, compile, autocast ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_opcheck(device, dtype):
    image = torch.zeros(2, 3, 4, 4, device=device).to(dtype)
    word = torch.tensor(5, device=device)
    index = torch.tensor([3, 9], device=device)
    torch.library.opcheck(OP, (image, 0.1, 5, 0, None, None, None, None, None))
    torch.library.opcheck(
        OP,
        (
            image.to(memory_format=torch.channels_last),
            0.1,
            0,
            0,
            word,
            word,
            index,
            0.0,
            1.0,
        ),
    )


# What inductor makes of a graph in which our ops are calls is the same whoever serves the calls.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.one_backend)]
)
def test_compile(device, backend):
    def start(image, seed, index):
        return ops.random_start(
            image, epsilon=0.1, seed=seed, index=index, lower=0.0, upper=1.0
        ).clone()

    torch._dynamo.reset()
    compiled = torch.compile(start, fullgraph=True, backend=backend)
    shapes = [(2, 3, 4, 4), (3, 3, 5, 4)]  # the second compiles again, with symbolic sizes
    for shape in shapes[:1] if backend == "inductor" else shapes:
        image = torch.rand(shape, device=device)
        index = torch.arange(shape[0], device=device) + 7
        for seed in (torch.tensor(3, device=device), torch.tensor(4, device=device)):
            assert torch.equal(compiled(image, seed, index), start(image, seed, index))


def test_autocast_changes_nothing(device):
    image = torch.rand(2, 3, 4, 4, device=device)
    expected = ops.random_start(image, epsilon=0.1, seed=1)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.random_start(image, epsilon=0.1, seed=1), expected)


# --- Strides --------------------------------------------------------------------------------------


def test_layout_is_kept_and_does_not_change_the_numbers(device):
    image = torch.rand(2, 3, 5, 4, device=device)
    arguments = {"epsilon": 0.5, "seed": 1, "lower": 0.0, "upper": 1.0}
    expected = ops.random_start(image, **arguments)
    assert expected.is_contiguous()
    last = ops.random_start(image.to(memory_format=torch.channels_last), **arguments)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, expected)
    turned = image.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    result = ops.random_start(turned, **arguments)
    assert result.stride() == turned.stride()
    assert torch.equal(result, expected)
    padded = torch.zeros(2, 3, 7, 9, device=device)
    padded[:, :, 1:6, 3:7] = image
    assert torch.equal(ops.random_start(padded[:, :, 1:6, 3:7], **arguments), expected)
    spread = image[:1].expand(3, -1, -1, -1)
    assert torch.equal(
        ops.random_start(spread, **arguments), ops.random_start(spread.contiguous(), **arguments)
    )
    every_other = torch.tensor([0, 9, 1, 9], device=device)[::2]
    assert torch.equal(ops.random_start(image, index=every_other, **arguments), expected)


@pytest.mark.parametrize(("pixel", "epsilon", "upper"), [(0.5, 0.0, 1.0), (math.inf, 0.1, 1e39)])
def test_layout_does_not_change_the_bits_of_special_numbers(device, pixel, epsilon, upper):
    # The sign of a zero, and NaN from a bound that float32 does not hold, which equality hides.
    image = torch.full((2, 3, 4, 5), pixel, device=device)
    wide = torch.full((2, 3, 4, 10), pixel, device=device)[..., ::2]
    bits = [
        ops.random_start(x, epsilon=epsilon, seed=0, lower=0.0, upper=upper)
        .contiguous()
        .view(torch.int32)
        for x in (image, wide)
    ]
    assert torch.equal(*bits)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0, 4), (3,)])
def test_empty_and_flat(device, shape):
    delta = ops.random_start(torch.zeros(shape, device=device), epsilon=0.1, seed=0)
    assert delta.shape == shape
    # A batch of scalars: each image has one element.
    for i in range(delta.numel()):
        assert delta[i].item() == float32(expected_uniform(0, 0, i, 0) * float32(0.1))


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": torch.zeros(2, 4).long()}, TypeError, "image: expected .*got torch.int64"),
        ({"image": torch.zeros(())}, ValueError, r"image: expected shape \(N, ...\), got \(\)"),
        ({"epsilon": math.nan}, ValueError, "epsilon: expected a finite number >= 0, got nan"),
        ({"epsilon": -1.0}, ValueError, "epsilon: expected a finite number >= 0, got -1.0"),
        ({"seed": -1}, ValueError, r"seed: expected an int in \[0, 2\^63\), got -1"),
        ({"seed": 1 << 63}, ValueError, r"seed: expected an int in \[0, 2\^63\)"),
        ({"seed": 1.5}, TypeError, "seed: expected an int or a torch.int64 tensor, got float"),
        ({"seed": True}, TypeError, "seed: expected an int or a torch.int64 tensor, got bool"),
        ({"seed": torch.tensor(1.0)}, TypeError, "seed: expected an int or .*got torch.float32"),
        ({"seed": torch.tensor([1, 2])}, ValueError, r"seed: .*one element, got shape \(2,\)"),
        ({"seed": torch.tensor(1, device="meta")}, RuntimeError, "seed: expected device cpu"),
        ({"offset": 1 << 32}, ValueError, r"offset: expected an int in \[0, 2\^32\)"),
        ({"index": torch.arange(3)}, ValueError, r"index: expected shape \(2,\).*got \(3,\)"),
        ({"index": torch.zeros(2)}, TypeError, "index: expected torch.int64, got torch.float32"),
        ({"lower": 2.0, "upper": 1.0}, ValueError, "lower: expected at most upper = 1.0, got 2.0"),
        ({"upper": math.nan}, ValueError, "upper: expected a finite number or None, got nan"),
    ],
)
def test_errors(change, error, message):
    arguments = {"image": torch.zeros(2, 4), "epsilon": 0.1, "seed": 0, **change}
    with pytest.raises(error, match=f"random_start: {message}"):
        ops.random_start(**arguments)


def test_a_gradient_is_refused(device):
    image = torch.zeros(2, 4, device=device, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"random_start: image: .*this op has no gradient"):
        ops.random_start(image, epsilon=0.1, seed=0)
    with torch.no_grad():
        assert not ops.random_start(image, epsilon=0.1, seed=0).requires_grad
