"""pgd_step_ and pgd_step_normalize_."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbandit import ops

OP = torch.ops.fastbandit.pgd_step_.default
OP_NORMALIZE = torch.ops.fastbandit.pgd_step_normalize_.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF_TYPES = [torch.bfloat16, torch.float16]


def float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def truncate(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The value of ``dtype`` nearest to zero on the way to ``value``, by search among all."""
    encodings = torch.arange(0x8000, dtype=torch.int16).view(dtype)
    finite = encodings[encodings.isfinite()].double()  # sorted: sign and magnitude
    place = torch.searchsorted(finite, value.abs().double(), right=True) - 1
    return (finite[place] * value.double().sign()).to(dtype)


def expected_step(delta, grad, image, step_size, epsilon, lower, upper):
    """The contract, each operation in float64 and rounded to the dtype of the computation.

    Rounding a float64 sum of two float32 numbers to float32 is the correctly rounded sum.
    """
    wide = torch.float64 if delta.dtype == torch.float64 else torch.float32

    def rounded(value: Tensor) -> Tensor:
        return value.to(wide).double()

    def constant(value: float) -> Tensor:
        return rounded(torch.tensor(value, dtype=torch.float64))

    epsilon_ = constant(epsilon)
    x = image.to(wide).double() if image.dtype != torch.uint8 else rounded(image.double() / 255)
    stepped = rounded(delta.double() + constant(step_size) * grad.double().sign())
    low = -epsilon_ if lower is None else torch.maximum(-epsilon_, rounded(constant(lower) - x))
    high = epsilon_ if upper is None else torch.minimum(epsilon_, rounded(constant(upper) - x))
    result = torch.minimum(torch.maximum(stepped, low), high)
    return truncate(result, delta.dtype) if delta.dtype in HALF_TYPES else result.to(delta.dtype)


def make(shape, dtype, image_dtype=None, *, seed=0, scale=0.05):
    generator = torch.Generator().manual_seed(seed)
    delta = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grad[torch.rand(shape, generator=generator) < 0.1] = 0.0
    image = torch.rand(shape, generator=generator, dtype=torch.float64)
    image_dtype = image_dtype or dtype
    image = (image * 255).round().to(torch.uint8) if image_dtype == torch.uint8 else image
    return delta, grad, image.to(image_dtype)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_dtype", [None, torch.float32, torch.uint8])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (None, None), (0.1, None), (None, 0.7)])
def test_values(device, dtype, image_dtype, bounds):
    delta, grad, image = make((3, 3, 7, 5), dtype, image_dtype)
    expected = expected_step(delta, grad, image, 0.02, 8 / 255, *bounds)
    result = delta.to(device, copy=True)
    returned = ops.pgd_step_(
        result,
        grad.to(device),
        image.to(device),
        step_size=0.02,
        epsilon=8 / 255,
        lower=bounds[0],
        upper=bounds[1],
    )
    assert returned is None
    assert torch.equal(result.cpu(), expected)


@pytest.mark.parametrize("shape", [(), (1,), (17,), (2, 1031), (1, 1, 1, 1, 3)])
def test_any_shape(device, shape):
    delta, grad, image = make(shape, torch.float32)
    expected = expected_step(delta, grad, image, -0.01, 0.03, 0.0, 1.0)
    result = delta.to(device, copy=True)
    ops.pgd_step_(
        result,
        grad.to(device),
        image.to(device),
        step_size=-0.01,
        epsilon=0.03,
        lower=0.0,
        upper=1.0,
    )
    assert torch.equal(result.cpu(), expected)


def test_table_by_hand(device):
    # epsilon 1/4, step 1/8, image 1/2 unless said: numbers that binary fractions hold exactly.
    rows = [
        # delta, grad, image, expected
        (0.0, 3.0, 0.5, 0.125),
        (0.0, -0.001, 0.5, -0.125),
        (0.0625, 0.0, 0.5, 0.0625),
        (0.25, 1.0, 0.5, 0.25),  # epsilon binds
        (-0.25, -1.0, 0.5, -0.25),
        (0.0, 1.0, 0.9375, 0.0625),  # the upper bound binds
        (0.0, -1.0, 0.03125, -0.03125),  # the lower bound binds
        (math.inf, 1.0, 0.5, 0.25),
        (0.125, math.inf, 0.5, 0.25),
        (0.125, math.nan, 0.5, 0.125),  # sign(NaN) is 0 in torch
        (math.nan, 1.0, 0.5, math.nan),
        (0.125, 1.0, math.nan, math.nan),
    ]
    delta, grad, image, expected = torch.tensor(rows, device=device).unbind(1)
    delta = delta.clone()
    ops.pgd_step_(delta, grad, image, step_size=0.125, epsilon=0.25, lower=0.0, upper=1.0)
    torch.testing.assert_close(delta, expected, rtol=0, atol=0, equal_nan=True)


def test_without_bounds_the_image_is_not_read(device):
    delta = torch.zeros(4, device=device)
    image = torch.full_like(delta, math.nan)
    ops.pgd_step_(delta, torch.ones_like(delta), image, step_size=0.5, epsilon=0.25)
    assert delta.tolist() == [0.25] * 4


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_rounding_is_toward_zero_and_never_to_infinity(device, dtype):
    largest = torch.finfo(dtype).max
    delta = torch.tensor([0.0, 0.0, largest, -largest, math.nan], dtype=dtype, device=device)
    grad = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=dtype, device=device)
    image = torch.zeros_like(delta)
    step = largest / 64
    ops.pgd_step_(delta, grad, image, step_size=step * 1.001, epsilon=3.4e38)
    inner = truncate(torch.tensor(float32(step * 1.001)), dtype).item()
    assert delta[:4].tolist() == [inner, -inner, largest, -largest]
    assert math.isnan(delta[4])


pixels = st.floats(0, 1, width=32)
perturbations = st.floats(-1, 1, width=32) | st.floats(width=32, allow_nan=False)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rows=st.lists(st.tuples(perturbations, st.floats(width=32), pixels), min_size=1, max_size=20),
    step_size=st.floats(-2, 2),
    epsilon=st.floats(0, 2),
    dtype=st.sampled_from(DTYPES),
    image_is=st.sampled_from(["as delta", torch.float32, torch.uint8]),
)
def test_never_outside_epsilon_or_the_bounds(rows, step_size, epsilon, dtype, image_is):
    delta, grad, image = torch.tensor(rows, dtype=torch.float64).unbind(1)
    delta, grad = delta.to(dtype), grad.to(dtype)
    image = (image * 255).to(torch.uint8) if image_is == torch.uint8 else image.to(dtype)
    image = image.float() if image_is == torch.float32 else image
    ops.pgd_step_(delta, grad, image, step_size=step_size, epsilon=epsilon, lower=0.0, upper=1.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    limit = epsilon if dtype == torch.float64 else float32(epsilon)
    assert float(delta.double().abs().max()) <= limit
    x = image.to(wide) / 255 if image.dtype == torch.uint8 else image.to(wide)
    attacked = x + delta.to(wide)
    assert float(attacked.min()) >= 0.0
    assert float(attacked.max()) <= 1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("image_dtype", [None, torch.uint8])
@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16, torch.float32])
def test_normalize_values(device, tolerance, dtype, image_dtype, out_dtype):
    delta, grad, image = make((2, 3, 5, 4), dtype, image_dtype)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])
    arguments = {"step_size": 0.02, "epsilon": 8 / 255, "lower": 0.0, "upper": 1.0}
    result = delta.to(device, copy=True)
    y = ops.pgd_step_normalize_(
        result,
        grad.to(device),
        image.to(device),
        mean.to(device),
        std.to(device),
        out_dtype=out_dtype,
        **arguments,
    )
    assert torch.equal(result.cpu(), expected_step(delta, grad, image, *arguments.values()))
    x = image.double() / 255 if image_dtype == torch.uint8 else image.double()
    statistics = mean.double().view(3, 1, 1), std.double().view(3, 1, 1)
    expected = (x + result.cpu().double() - statistics[0]) / statistics[1]
    assert y.dtype == (out_dtype or dtype)
    torch.testing.assert_close(y.cpu(), expected.to(y.dtype), **tolerance(y.dtype))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("given_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_layout(device, memory_format, given_format):
    tensors = [
        t.to(device).contiguous(memory_format=given_format)
        for t in make((2, 3, 5, 4), torch.float32)
    ]
    plain = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
    mean, std = torch.rand(3, device=device), torch.rand(3, device=device) + 0.5
    numbers = {"step_size": 0.02, "epsilon": 0.1}
    y = ops.pgd_step_normalize_(*tensors, mean, std, memory_format=memory_format, **numbers)
    assert y.is_contiguous(memory_format=memory_format)
    assert torch.equal(y, ops.pgd_step_normalize_(*plain, mean, std, **numbers))
    assert tensors[0].is_contiguous(memory_format=given_format)
    assert torch.equal(tensors[0], plain[0])


# --- opcheck, compile, autocast ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (None, None)])
def test_opcheck(device, dtype, bounds):
    tensors = [t.to(device) for t in make((2, 3, 4, 4), dtype)]
    torch.library.opcheck(OP, (*tensors, 0.1, 0.2, *bounds))
    statistics = (torch.rand(3, device=device), torch.rand(3, device=device))
    torch.library.opcheck(
        OP_NORMALIZE,
        (*tensors, *statistics, 0.1, 0.2, *bounds, torch.bfloat16, torch.channels_last),
    )


# What inductor makes of a graph in which our ops are calls is the same whoever serves the calls.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.one_backend)]
)
def test_compile(device, backend):
    def attack(delta, grad, image, mean, std):
        numbers = {"step_size": 0.02, "epsilon": 0.03, "lower": 0.0, "upper": 1.0}
        ops.pgd_step_(delta, grad, image, **numbers)
        return ops.pgd_step_normalize_(delta, -grad, image, mean, std, **numbers) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attack, fullgraph=True, backend=backend)
    statistics = torch.rand(3, device=device), torch.rand(3, device=device) + 0.5
    shapes = [(2, 3, 4, 4), (3, 3, 5, 4)]  # the second compiles again, with symbolic sizes
    for shape in shapes[:1] if backend == "inductor" else shapes:
        tensors = [t.to(device) for t in make(shape, torch.float32)]
        delta = tensors[0].clone()
        y = compiled(*tensors, *statistics)
        expected = attack(delta, *tensors[1:], *statistics)
        assert torch.equal(tensors[0], delta)
        torch.testing.assert_close(y, expected)


def test_compile_with_changing_numbers(device):
    # After the first change torch.compile keeps Python numbers symbolic; the checks must bear it.
    def step(delta, grad, image, step_size, epsilon):
        ops.pgd_step_(delta, grad, image, step_size=step_size, epsilon=epsilon, lower=0.0)
        return delta + 0

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    values = [t.to(device) for t in make((2, 3, 4, 4), torch.float32)]
    for step_size, epsilon in [(0.01, 0.02), (0.02, 0.03), (0.03, 0.1)]:
        result = compiled(values[0].clone(), *values[1:], step_size, epsilon)
        assert torch.equal(result, step(values[0].clone(), *values[1:], step_size, epsilon))
    with pytest.raises(Exception, match="epsilon: expected a finite number >= 0"):
        compiled(values[0].clone(), *values[1:], 0.01, -1.0)


def test_autocast_changes_nothing(device):
    delta, grad, image = (t.to(device) for t in make((2, 3, 4, 4), torch.float32))
    expected = delta.clone()
    ops.pgd_step_(expected, grad, image, step_size=0.02, epsilon=0.03)
    with torch.autocast(device.type, torch.bfloat16):
        ops.pgd_step_(delta, grad, image, step_size=0.02, epsilon=0.03)
    assert torch.equal(delta, expected)


def test_inference_mode(device):
    with torch.inference_mode():
        delta = torch.zeros(3, device=device)
        ops.pgd_step_(delta, delta + 1, delta + 0.5, step_size=0.5, epsilon=0.25)
    assert delta.tolist() == [0.25] * 3


# --- Strides --------------------------------------------------------------------------------------


def view_of(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """A strided view that holds ``values``, and the buffer around it, filled with a sentinel."""
    n, c, h, w = values.shape
    if kind == "inside":
        buffer = torch.full((n + 2, c + 1, h + 3, w + 5), 77, dtype=values.dtype)
        view = buffer[1:-1, 1:, 2:-1, 3:-2]
    elif kind == "channels_last":
        buffer = torch.full((n, h, w + 1, c + 2), 77, dtype=values.dtype)
        view = buffer.permute(0, 3, 1, 2)[:, 1:-1, :, 1:]
    elif kind == "every_other":
        buffer = torch.full((n, c, h, 2 * w), 77, dtype=values.dtype)
        view = buffer[..., ::2]
    else:
        buffer = torch.full((w, h, c, n + 1), 77, dtype=values.dtype)
        view = buffer.permute(3, 2, 1, 0)[1:]
    view.copy_(values)
    return view, buffer


VIEWS = ["inside", "channels_last", "every_other", "reversed"]


@pytest.mark.parametrize("kind", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_written_and_nothing_around_them(device, kind, dtype):
    values = make((2, 3, 5, 4), dtype)
    expected = expected_step(*values, 0.02, 0.03, 0.0, 1.0)
    _, buffer = view_of(values[0], kind)
    buffer = buffer.to(device)
    # The same view again, of the buffer on the device.
    delta, _ = view_of(values[0], kind)
    delta = buffer.as_strided(delta.shape, delta.stride(), delta.storage_offset())
    other = VIEWS[(VIEWS.index(kind) + 1) % 4]
    grad, image = view_of(values[1], other)[0].to(device), view_of(values[2], kind)[0].to(device)
    untouched = buffer == 77
    ops.pgd_step_(delta, grad, image, step_size=0.02, epsilon=0.03, lower=0.0, upper=1.0)
    assert torch.equal(delta.cpu(), expected)
    assert int((buffer == 77).sum()) == buffer.numel() - delta.numel()
    assert torch.equal(untouched, buffer == 77)


def test_expanded_inputs_are_read_and_an_expanded_delta_is_refused(device):
    delta = torch.zeros(2, 3, device=device)
    grad = torch.tensor([1.0, -1.0, 0.0], device=device).expand(2, 3)
    image = torch.zeros(1, device=device).expand(2, 3)
    ops.pgd_step_(delta, grad, image, step_size=0.5, epsilon=1.0, lower=0.0, upper=1.0)
    assert delta.tolist() == [[0.5, 0.0, 0.0]] * 2
    with pytest.raises(RuntimeError, match="memory"):
        ops.pgd_step_(image.clone()[:1].expand(2, 3), grad, image, step_size=0.5, epsilon=1.0)


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 3, 0, 4)])
def test_empty(device, shape):
    delta = torch.empty(shape, device=device)
    ops.pgd_step_(delta, delta, delta, step_size=0.1, epsilon=0.1, lower=0.0, upper=1.0)
    if len(shape) == 4:
        statistics = torch.ones(3, device=device)
        y = ops.pgd_step_normalize_(
            delta, delta, delta, statistics, statistics, step_size=0.1, epsilon=0.1
        )
        assert y.shape == shape


# --- Errors ---------------------------------------------------------------------------------------

ERRORS = [
    (
        {"grad": torch.zeros(2, 3, 8, 7)},
        ValueError,
        r"pgd_step_: grad: expected shape \(2, 3, 8, 8\) as delta, got \(2, 3, 8, 7\)",
    ),
    (
        {"image": torch.zeros(3, 8, 8)},
        ValueError,
        r"pgd_step_: image: expected shape \(2, 3, 8, 8\) as delta, got \(3, 8, 8\)",
    ),
    (
        {"delta": torch.zeros(2, 3, 8, 8, dtype=torch.int32)},
        TypeError,
        "delta: expected float32, float64, bfloat16 or float16, got torch.int32",
    ),
    (
        {"grad": torch.zeros(2, 3, 8, 8).bfloat16()},
        TypeError,
        "grad: expected torch.float32 as delta, got torch.bfloat16",
    ),
    (
        {"image": torch.zeros(2, 3, 8, 8, dtype=torch.int8)},
        TypeError,
        "image: expected torch.float32 as delta, torch.float32 or torch.uint8, got torch.int8",
    ),
    ({"grad": torch.zeros(2, 3, 8, 8, device="meta")}, RuntimeError, "grad: expected device cpu"),
    ({"epsilon": math.nan}, ValueError, "epsilon: expected a finite number >= 0, got nan"),
    ({"epsilon": -0.1}, ValueError, "epsilon: expected a finite number >= 0, got -0.1"),
    ({"epsilon": math.inf}, ValueError, "epsilon: expected a finite number >= 0, got inf"),
    ({"step_size": math.nan}, ValueError, "step_size: expected a finite number, got nan"),
    ({"lower": math.nan}, ValueError, "lower: expected a finite number or None, got nan"),
    ({"upper": math.inf}, ValueError, "upper: expected a finite number or None, got inf"),
    ({"lower": 1.0, "upper": 0.0}, ValueError, "lower: expected at most upper = 0.0, got 1.0"),
]


@pytest.mark.parametrize(("change", "error", "message"), ERRORS)
@pytest.mark.parametrize("name", ["pgd_step_", "pgd_step_normalize_"])
def test_errors(name, change, error, message):
    arguments = {key: torch.zeros(2, 3, 8, 8) for key in ("delta", "grad", "image")}
    arguments |= {"step_size": 0.1, "epsilon": 0.1, **change}
    if name == "pgd_step_normalize_":
        arguments |= {"mean": torch.zeros(3), "std": torch.ones(3)}
    before = arguments["delta"].clone()
    with pytest.raises(error, match=message.replace("pgd_step_:", f"{name}:")):
        getattr(ops, name)(**arguments)
    assert torch.equal(arguments["delta"], before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mean": torch.zeros(4)}, ValueError, r"mean: expected shape \(3,\).*got \(4,\)"),
        ({"std": torch.zeros(3, 1)}, ValueError, r"std: expected shape \(3,\).*got \(3, 1\)"),
        ({"std": torch.ones(3).long()}, TypeError, "std: expected torch.float32"),
        ({"mean": torch.zeros(3, device="meta")}, RuntimeError, "mean: expected device cpu"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype: expected float32, .* got torch.int32"),
        ({"memory_format": torch.preserve_format}, ValueError, "memory_format: expected"),
    ],
)
def test_normalize_errors(change, error, message):
    tensors = [torch.zeros(2, 3, 8, 8) for _ in range(3)]
    arguments = {"mean": torch.zeros(3), "std": torch.ones(3), **change}
    with pytest.raises(error, match=f"pgd_step_normalize_: {message}"):
        ops.pgd_step_normalize_(*tensors, step_size=0.1, epsilon=0.1, **arguments)


def test_normalize_needs_images():
    tensors = [torch.zeros(3, 8) for _ in range(3)]
    with pytest.raises(ValueError, match=r"delta: expected shape \(N, C, H, W\), got \(3, 8\)"):
        ops.pgd_step_normalize_(*tensors, torch.zeros(8), torch.ones(8), step_size=0.1, epsilon=0.1)


@pytest.mark.parametrize("which", ["delta", "grad", "image"])
def test_a_gradient_is_refused(device, which):
    arguments = {key: torch.zeros(2, 2, device=device) for key in ("delta", "grad", "image")}
    arguments[which].requires_grad_()
    with pytest.raises(RuntimeError, match=f"pgd_step_: {which}: .*this op has no gradient"):
        ops.pgd_step_(**arguments, step_size=0.1, epsilon=0.1)
    with torch.no_grad():
        ops.pgd_step_(**arguments, step_size=0.1, epsilon=0.1)
