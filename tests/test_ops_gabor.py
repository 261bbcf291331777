"""gabor_filters, gabor_conv2d and their backward ops."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastbandit import ops

FILTERS = torch.ops.fastbandit.gabor_filters.default
FILTERS_BACKWARD = torch.ops.fastbandit.gabor_filters_backward.default
CONV = torch.ops.fastbandit.gabor_conv2d.default
CONV_BACKWARD = torch.ops.fastbandit.gabor_conv2d_backward.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALF_TYPES = [torch.bfloat16, torch.float16]
NAMES = ("theta", "sigma", "gamma", "wavelength", "psi")

# N, C, H, W, C_out, k, stride, padding, dilation
CASES = [
    (2, 16, 8, 8, 16, 3, 1, 1, 1),
    (1, 3, 9, 7, 5, 5, 2, 2, 1),
    (3, 1, 6, 11, 4, 3, (2, 1), (0, 3), (1, 2)),
    (2, 7, 5, 13, 1, 7, 1, 3, 1),
    (2, 5, 4, 4, 33, 1, 1, 0, 1),
]


def parameters(count: int, dtype: torch.dtype, device, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(count, generator=generator, dtype=torch.float64)
        return (low + (high - low) * values).to(device, dtype)

    return [uniform(-7, 7), uniform(0.5, 1.5), uniform(0.5, 2), uniform(2, 6), uniform(-3, 3)]


def make(case, dtype, device, memory_format=torch.contiguous_format, parameter_dtype=None):
    n, c, h, w, c_out, k, stride, padding, dilation = case
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64).to(device, dtype)
    x = x.contiguous(memory_format=memory_format)
    settings = {"kernel_size": k, "stride": stride, "padding": padding, "dilation": dilation}
    return x, parameters(c_out, parameter_dtype or dtype, device), settings


def formula(theta, sigma, gamma, wavelength, psi, kernel_size) -> Tensor:
    """One filter after the other, one tap after the other, in Python's floats."""
    half = kernel_size // 2
    bank = []
    for t, s, g, w, p in zip(
        *(q.tolist() for q in (theta, sigma, gamma, wavelength, psi)), strict=True
    ):
        for x in range(-half, half + 1):
            for y in range(-half, half + 1):
                across = x * math.cos(t) + y * math.sin(t)
                along = -x * math.sin(t) + y * math.cos(t)
                envelope = math.exp(-(across**2 + g**2 * along**2) / (2 * s**2))
                bank.append(envelope * math.cos(2 * math.pi * across / w + p))
    return torch.tensor(bank, dtype=torch.float64).view(len(theta), kernel_size, kernel_size)


def dense_conv(x: Tensor, bank: Tensor, settings: dict) -> Tensor:
    """The layer as the book writes it: every input channel with the same filter."""
    settings = {key: value for key, value in settings.items() if key != "kernel_size"}
    return F.conv2d(x, bank[:, None].expand(-1, x.shape[1], -1, -1), None, **settings)


# --- Values: the filters --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
def test_filter_values(device, tolerance, dtype, kernel_size):
    values = parameters(9, dtype, device)
    bank = ops.gabor_filters(*values, kernel_size)
    assert bank.shape == (9, kernel_size, kernel_size)
    assert bank.dtype == dtype
    # In float32 the angle of the cosine, up to about 10, is rounded before the cosine is taken.
    limits = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else tolerance(dtype)
    expected = formula(*(v.double().cpu() for v in values), kernel_size)
    torch.testing.assert_close(bank.double().cpu(), expected, **limits)


def test_filter_table_by_hand(device):
    # theta 0: x' is the row and y' the column. 2 sigma^2 = 1, wavelength 4, so a row of +-1 has
    # the phase +-pi / 2; gamma^2 = 3.
    one = torch.ones(1, dtype=torch.float64, device=device)
    bank = ops.gabor_filters(0 * one, one * 0.5**0.5, one * 3**0.5, 4 * one, math.pi / 2 * one, 3)
    e1, e4 = math.exp(-1), math.exp(-4)
    # cos(phase + pi / 2) is 1, 0, -1 in the rows -1, 0, 1.
    expected = torch.tensor([[[e4, e1, e4], [0, 0, 0], [-e4, -e1, -e4]]], dtype=torch.float64)
    torch.testing.assert_close(bank.cpu(), expected, rtol=0, atol=1e-12)


def test_a_quarter_turn_of_theta_turns_the_filter(device):
    values = parameters(4, torch.float64, device)
    bank = ops.gabor_filters(*values, 5)
    values[0] = values[0] + math.pi / 2
    # G(x, y) of the turned filter is G(y, -x) of the first.
    turned = bank.transpose(1, 2).flip(1)
    torch.testing.assert_close(ops.gabor_filters(*values, 5), turned)


# --- Values: the convolution ----------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(device, tolerance, case, dtype, memory_format):
    x, values, settings = make(
        case,
        dtype,
        device,
        memory_format,
        torch.float64 if dtype == torch.float64 else torch.float32,
    )
    tensors = [t.requires_grad_() for t in (x, *values)]
    y = ops.gabor_conv2d(x, *values, **settings)
    assert y.dtype == dtype
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = dense_conv(wide[0], ops.gabor_filters(*wide[1:], settings["kernel_size"]), settings)
    # The error is relative to the terms of the sums (over channels, taps and, for a parameter,
    # pixels), which cancel; and float32 filters have an error of 1e-5 of their own (above).
    limits = tolerance(dtype)

    def close(result: Tensor, wanted: Tensor) -> None:
        wanted = wanted.detach()
        # Gradients in float32 of half-precision images are summed in float32, not in halves.
        fine = result.dtype == torch.float32
        rtol, atol = (1e-5, 1e-5) if fine else (limits["rtol"], limits["atol"])
        atol *= max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(result.double(), wanted, rtol=rtol, atol=atol)

    close(y, expected)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    gradients = torch.autograd.grad(y, tensors, grad)
    expected_gradients = torch.autograd.grad(expected, wide, grad.double())
    for tensor, gradient, wanted in zip(tensors, gradients, expected_gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        assert gradient.shape == tensor.shape
        close(gradient, wanted)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_parameters_may_have_the_half_type_of_x(device, tolerance, dtype):
    x, values, settings = make(CASES[0], dtype, device)
    values = [v.requires_grad_() for v in values]
    y = ops.gabor_conv2d(x, *values, **settings)
    expected = dense_conv(x.double(), ops.gabor_filters(*(v.double() for v in values), 3), settings)
    limits = tolerance(dtype)
    limits["atol"] *= float(expected.detach().abs().max())
    torch.testing.assert_close(y.double(), expected, **limits)
    y.sum().backward()
    assert all(v.grad.dtype == dtype for v in values)


@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_channel_sum_is_accumulated_in_float32(device, dtype):
    # A running sum of ones stops growing at 2048 in float16 and at 256 in bfloat16.
    x = torch.ones(1, 4096, 1, 1, device=device).to(dtype)
    one = torch.ones(1, device=device)
    y = ops.gabor_conv2d(x, one, one, one, one, 0 * one, kernel_size=1, padding=0)
    assert y.item() == 4096


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(5), ids=NAMES)
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_filter_gradcheck(device, index, kernel_size):
    values = parameters(3, torch.float64, device)
    values[index].requires_grad_()
    assert torch.autograd.gradcheck(lambda *v: ops.gabor_filters(*v, kernel_size), values)
    # Not only right but there: GaborNet's parameters once got no gradient at all.
    bank = ops.gabor_filters(*values, kernel_size)
    (gradient,) = torch.autograd.grad(bank, values[index], torch.randn_like(bank))
    assert bool((gradient != 0).all())


@pytest.mark.parametrize("index", range(6), ids=("x", *NAMES))
@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=str)
def test_gradcheck(device, index, case):
    x, values, settings = make(case, torch.float64, device)
    tensors = [x, *values]
    tensors[index].requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: ops.gabor_conv2d(*t, **settings), tensors)


def test_gradients_of_zero_taps_are_finite(device):
    # A filter so narrow that every tap but the centre underflows.
    values = [v.requires_grad_() for v in parameters(3, torch.float32, device)]
    with torch.no_grad():
        values[1].fill_(0.02)
    ops.gabor_filters(*values, 5).sum().backward()
    assert all(bool(v.grad.isfinite().all()) for v in values)


@pytest.mark.parametrize("needed", ["x", "sigma"])
def test_only_needed_gradients_are_computed(device, needed):
    x, values, settings = make(CASES[0], torch.float32, device)
    (x if needed == "x" else values[1]).requires_grad_()
    y = ops.gabor_conv2d(x, *values, **settings)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * y.numel() * 9
    assert (x.grad is not None) == (needed == "x")
    assert [v.grad is not None for v in values] == [False, needed == "sigma", False, False, False]


@pytest.mark.parametrize("mask", [(True, False), (False, True), (False, False)])
def test_masked_results_are_empty(device, mask):
    x, values, _ = make(CASES[0], torch.float32, device)
    settings = (3, [1, 1], [1, 1], [1, 1])
    grad = torch.randn_like(CONV(x, *values, *settings))
    full = CONV_BACKWARD(grad, x, *values, *settings, [True, True])
    results = CONV_BACKWARD(grad, x, *values, *settings, list(mask))
    for result, expected, kept in zip(results, full, (mask[0], *[mask[1]] * 5), strict=True):
        torch.testing.assert_close(result, expected if kept else expected.new_empty(0))


def test_second_derivative_is_refused(device):
    x, values, settings = make(CASES[0], torch.float64, device)
    values[0].requires_grad_()
    for name, y in (
        ("gabor_conv2d", ops.gabor_conv2d(x, *values, **settings)),
        ("gabor_filters", ops.gabor_filters(*values, 3)),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: .*no second derivative"):
            torch.autograd.grad(y.sum(), values[0], create_graph=True)


# --- opcheck, compile, autocast, FLOPs -----------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype, memory_format):
    x, values, _ = make(CASES[1], dtype, device, memory_format, torch.float32)
    settings = (5, [2, 2], [2, 2], [1, 1])
    grad = torch.randn_like(CONV(x, *values, *settings))
    torch.library.opcheck(CONV_BACKWARD, (grad, x, *values, *settings, [True, False]))
    torch.library.opcheck(CONV_BACKWARD, (grad, x, *values, *settings, [False, True]))
    torch.library.opcheck(FILTERS_BACKWARD, (torch.ones(5, 3, 3, device=device), *values, 3))
    values = [v.requires_grad_() for v in values]
    torch.library.opcheck(CONV, (x.requires_grad_(dtype == torch.float32), *values, *settings))
    torch.library.opcheck(FILTERS, (*values, 3))


# What inductor makes of a graph in which our ops are calls is the same whoever serves the calls.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.one_backend)]
)
def test_compile(device, backend, monkeypatch, tmp_path):
    # A cached graph outlives a change of the fake kernel, whose text is no part of its key.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def layer(x, *values):
        y = ops.gabor_conv2d(x * 2, *values)
        return y.square().mean() + ops.gabor_filters(*values, 5).square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    values = [v.requires_grad_() for v in parameters(4, torch.float32, device)]
    # The second shape compiles again, with symbolic sizes; the third has another layout.
    shapes = [(2, 3, 8, 8), (3, 3, 9, 7), (2, 3, 9, 8)]
    for i, shape in enumerate(shapes[:1] if backend == "inductor" else shapes):
        x = torch.randn(shape, device=device)
        x = (x.to(memory_format=torch.channels_last) if i == 2 else x).requires_grad_()
        expected, result = layer(x, *values), compiled(x, *values)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        for gradient, expected_gradient in zip(
            torch.autograd.grad(result, (x, *values)),
            torch.autograd.grad(expected, (x, *values)),
            strict=True,
        ):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, x_dtype):
    x, values, settings = make(CASES[0], x_dtype, device, parameter_dtype=torch.float32)
    x.requires_grad_()
    values = [v.requires_grad_() for v in values]
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.gabor_conv2d(x, *values, **settings)
        assert ops.gabor_filters(*values, 3).dtype == torch.float32
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.gabor_conv2d(x.bfloat16(), *values, **settings))
    y.sum().backward()
    assert x.grad.dtype == x_dtype
    assert all(v.grad.dtype == torch.float32 for v in values)


def test_flops_are_those_of_one_input_channel(device):
    x, values, settings = make(CASES[1], torch.float32, device)
    with FlopCounterMode(display=False) as counter:
        y = ops.gabor_conv2d(x.requires_grad_(), *(v.requires_grad_() for v in values), **settings)
    forward = counter.get_total_flops()
    assert forward == 2 * y.numel() * 25
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


# --- Strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_follows_x(device, memory_format):
    x, values, settings = make(CASES[1], torch.float32, device, memory_format)
    x.requires_grad_()
    y = ops.gabor_conv2d(x, *values, **settings)
    assert y.is_contiguous(memory_format=memory_format)
    for grad in (torch.ones_like(y), torch.ones((), device=device).expand(y.shape)):
        (gradient,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        # The same for every channel, so it is stored once and expanded, as that of a sum.
        assert gradient.shape == x.shape
        assert gradient.stride(1) == 0


@pytest.mark.parametrize("last", [False, True])
def test_views(device, last):
    x, values, settings = make(CASES[0], torch.float32, device)
    expected = ops.gabor_conv2d(x, *values, **settings)
    n, c, h, w = x.shape
    if last:
        buffer = torch.full((n, h + 2, w + 3, c + 4), math.nan, device=device)
        view = buffer.permute(0, 3, 1, 2)[:, 1:-3, 1:-1, 2:-1]
    else:
        buffer = torch.full((n, c + 1, h + 2, 2 * w), math.nan, device=device)
        view = buffer[:, 1:, 1:-1, ::2]
    view.copy_(x)
    # Parameters may be columns of one matrix, or one value expanded.
    columns = torch.stack([*values, values[0]], dim=1)
    y = ops.gabor_conv2d(view, *columns.unbind(1)[:5], **settings)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    shared = values[1][:1].expand(values[1].shape)
    values[1] = shared.contiguous()
    torch.testing.assert_close(
        ops.gabor_conv2d(view, values[0], shared, *values[2:], **settings),
        ops.gabor_conv2d(x, *values, **settings),
    )


def test_empty_batch(device):
    values = [v.requires_grad_() for v in parameters(4, torch.float32, device)]
    x = torch.zeros(0, 3, 8, 8, device=device, requires_grad=True)
    y = ops.gabor_conv2d(x, *values)
    assert y.shape == (0, 4, 8, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(bool((v.grad == 0).all()) for v in values)


def test_meta_tensors_have_the_shape_and_layout_of_real_ones():
    x, values, settings = make(CASES[1], torch.bfloat16, "meta", torch.channels_last)
    y = ops.gabor_conv2d(x, *values, **settings)
    assert y.shape == (1, 5, 5, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ops.gabor_filters(*values, 5).shape == (5, 5, 5)


# --- Errors ---------------------------------------------------------------------------------------

PARAMETER_ERRORS = [
    ({"theta": torch.ones(4).int()}, TypeError, "theta: expected float32.*got torch.int32"),
    ({"theta": torch.ones(4, 1)}, ValueError, r"theta: expected shape \(C_out,\).*got \(4, 1\)"),
    ({"sigma": torch.ones(5)}, ValueError, r"sigma: expected shape \(4,\) as theta, got \(5,\)"),
    (
        {"psi": torch.ones(4).double()},
        TypeError,
        "psi: expected torch.float32 as theta, got torch.float64",
    ),
    (
        {"wavelength": torch.ones(4, device="meta")},
        RuntimeError,
        "wavelength: expected device cpu as theta, got meta",
    ),
    ({"kernel_size": 4}, ValueError, "kernel_size: expected an odd int from 1 to 32767, got 4"),
    ({"kernel_size": -1}, ValueError, "kernel_size: expected an odd int from 1 to 32767, got -1"),
    ({"kernel_size": 3.0}, TypeError, "kernel_size: expected an odd int, got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), PARAMETER_ERRORS)
@pytest.mark.parametrize("name", ["gabor_filters", "gabor_conv2d"])
def test_parameter_errors(name, change, error, message):
    arguments = {key: torch.ones(4) for key in NAMES} | {"kernel_size": 3} | change
    if name == "gabor_conv2d":
        arguments["x"] = torch.zeros(2, 3, 8, 8)
    with pytest.raises(error, match=f"{name}: {message}"):
        getattr(ops, name)(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 8, 8)}, ValueError, r"x: expected shape \(N, C, H, W\).*\(3, 8, 8\)"),
        ({"x": torch.zeros(2, 3, 8, 8).long()}, TypeError, "x: expected float32.*torch.int64"),
        (
            {"x": torch.zeros(2, 3, 8, 8).double()},
            TypeError,
            "theta: expected torch.float64 as x, got torch.float32",
        ),
        (
            {"x": torch.zeros(2, 3, 8, 8, device="meta")},
            RuntimeError,
            "theta: expected device meta as x, got cpu",
        ),
        ({"stride": (1, 0)}, ValueError, r"stride: expected at least 1, got \(1, 0\)"),
        ({"padding": "same"}, TypeError, "padding: expected an int or two ints, got 'same'"),
        ({"dilation": 5}, ValueError, "x: expected at least the extent of the kernel, 11 x 11"),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 8, 8)} | {key: torch.ones(4) for key in NAMES} | change
    with pytest.raises(error, match=f"gabor_conv2d: {message}"):
        ops.gabor_conv2d(**arguments)


def test_an_attack_computes_no_gradient_of_the_parameters(device, monkeypatch):
    module = importlib.import_module("fastbandit.ops.gabor")
    masks, real = [], module.below_autograd

    def record(op, *arguments):
        if op is CONV_BACKWARD:
            masks.append(tuple(arguments[-1]))
        return real(op, *arguments)

    monkeypatch.setattr(module, "below_autograd", record)
    x, values, settings = make(CASES[0], torch.float32, device)
    x.requires_grad_()
    values = [v.requires_grad_() for v in values]
    y = ops.gabor_conv2d(x, *values, **settings).sum()
    (alone,) = torch.autograd.grad(y, x, retain_graph=True)
    together = torch.autograd.grad(y, (x, *values), retain_graph=True)
    torch.autograd.grad(y, values[2])
    assert masks == [(True, False), (True, True), (True, True)]
    assert torch.equal(alone, together[0])
