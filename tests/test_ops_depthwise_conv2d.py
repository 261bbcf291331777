"""depthwise_conv2d and its two backward ops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastbandit import ops

OP = torch.ops.fastbandit.depthwise_conv2d.default
OP_INPUT = torch.ops.fastbandit.depthwise_conv2d_backward_input.default
OP_WEIGHT = torch.ops.fastbandit.depthwise_conv2d_backward_weight.default
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

# N, C, H, W, k, stride, padding, dilation, relu
CASES = [
    (2, 16, 8, 8, 3, 1, 2, 2, True),
    (1, 5, 9, 7, 5, 2, 4, 2, True),
    (3, 1, 6, 11, 3, 2, 1, 1, False),
    (2, 3, 13, 5, 7, 1, 3, 1, True),
    (2, 4, 5, 5, 1, 1, 0, 1, False),
    (1, 2, 6, 9, 3, (1, 2), (0, 3), (2, 1), True),
    (1, 9, 1, 1, 3, 1, 1, 1, True),
    (2, 33, 17, 3, 2, 3, 1, 1, False),  # the kernel's last columns fall on the padding
]


def make(case, dtype, device, memory_format=torch.contiguous_format):
    n, c, h, w, k, stride, padding, dilation, relu = case
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, c, h, w, generator=generator, dtype=torch.float64)
    weight = torch.randn(c, 1, k, k, generator=generator, dtype=torch.float64)
    x = x.to(device, dtype).contiguous(memory_format=memory_format)
    settings = {"stride": stride, "padding": padding, "dilation": dilation, "relu": relu}
    return x, weight.to(device, dtype), settings


def dense_matrix_conv(x: Tensor, weight: Tensor, settings: dict) -> Tensor:
    """The definition: each output is a dot product of a window, gathered by F.unfold."""
    n, c, _, _ = x.shape
    k = weight.shape[-1]
    settings = dict(settings)
    x = F.relu(x) if settings.pop("relu") else x
    shape = torch.empty(1, *x.shape[1:], device="meta")
    out = F.conv2d(shape, torch.empty(1, c, k, k, device="meta"), None, **settings).shape[2:]
    windows = F.unfold(x, k, **settings).view(n, c, k * k, -1)
    return (windows * weight.view(1, c, k * k, 1)).sum(2).view(n, c, *out)


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients(device, tolerance, case, dtype, memory_format):
    x, weight, settings = make(case, dtype, device, memory_format)
    x.requires_grad_()
    weight.requires_grad_()
    y = ops.depthwise_conv2d(x, weight, **settings)
    assert y.dtype == dtype
    # In float64 from the same (rounded) inputs: what an exact sum would give.
    wide_x, wide_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    expected = dense_matrix_conv(wide_x, wide_weight, settings)
    torch.testing.assert_close(y.double(), expected, **tolerance(dtype))
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    gradients = torch.autograd.grad(y, (x, weight), grad)
    expected_gradients = torch.autograd.grad(expected, (wide_x, wide_weight), grad.double())
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        # A weight gradient sums over every pixel of the batch: the error is relative to the
        # magnitude of the terms, not to a result in which they may cancel.
        limits = tolerance(dtype)
        limits["atol"] *= max(1.0, float(expected_gradient.abs().max()))
        torch.testing.assert_close(gradient.double(), expected_gradient, **limits)


def test_table_by_hand(device):
    x = torch.tensor([[1.0, -2.0, 3.0], [0.0, 4.0, -1.0], [2.0, 0.5, 1.0]], device=device)
    weight = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], device=device)
    x, weight = x[None, None], weight[None, None]
    y = ops.depthwise_conv2d(x, weight)
    # 1 - 4 - 0 + 2, -2 + 6 - 4 - 0.5, 0 + 8 - 2 + 0.25, 4 - 2 - 0.5 + 0.5
    assert y[0, 0].tolist() == [[-1.0, -0.5], [6.25, 2.0]]
    y = ops.depthwise_conv2d(x, weight, relu=True)
    assert y[0, 0].tolist() == [[3.0, 2.0], [6.25, 4.0]]
    y = ops.depthwise_conv2d(x, weight, dilation=2)
    assert y[0, 0].tolist() == [[1.0 + 6.0 - 2.0 + 0.5]]


def test_relu_passes_no_gradient_at_zero_and_below(device):
    x = torch.tensor([[[[-1.0, 0.0, -0.0, 2.0]]]], device=device, requires_grad=True)
    weight = torch.full((1, 1, 1, 1), 3.0, device=device)
    ops.depthwise_conv2d(x, weight, relu=True).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.0, 0.0, 3.0]


@pytest.mark.parametrize("relu", [False, True])
def test_nan_is_seen(device, relu):
    x = torch.zeros(1, 1, 3, 3, device=device)
    x[0, 0, 1, 1] = math.nan
    y = ops.depthwise_conv2d(x, torch.ones(1, 1, 3, 3, device=device), padding=1, relu=relu)
    assert bool(y.isnan().all())


# --- Gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [CASES[1], CASES[5]], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_gradcheck(device, case, memory_format):
    x, weight, settings = make(case, torch.float64, device, memory_format)
    assert torch.autograd.gradcheck(
        lambda x, weight: ops.depthwise_conv2d(x, weight, **settings),
        (x.requires_grad_(), weight.requires_grad_()),
    )


@pytest.mark.parametrize("needed", ["x", "weight"])
def test_only_needed_gradients_are_computed(device, needed):
    x, weight, settings = make(CASES[0], torch.float32, device)
    (x if needed == "x" else weight).requires_grad_()
    loss = ops.depthwise_conv2d(x, weight, **settings).sum()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    called = {str(op).split(".")[-1] for op in counter.get_flop_counts()["Global"]}
    assert called == {f"depthwise_conv2d_backward_{'input' if needed == 'x' else 'weight'}"}
    assert (x.grad is not None) == (needed == "x")


def test_second_derivative_is_refused(device):
    x, weight, settings = make(CASES[0], torch.float64, device)
    y = ops.depthwise_conv2d(x.requires_grad_(), weight, **settings)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d: .*no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d_backward_input: x: .*no gradient"):
        OP_INPUT(y.detach(), x, weight, [1, 1], [2, 2], [2, 2], True)


# --- opcheck, compile, autocast, FLOPs -----------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype, memory_format):
    x, weight, _ = make(CASES[1], dtype, device, memory_format)
    settings = ([2, 2], [4, 4], [2, 2], True)
    grad = torch.randn_like(OP(x, weight, *settings))
    torch.library.opcheck(OP_INPUT, (grad, x, weight, *settings))
    torch.library.opcheck(OP_WEIGHT, (grad, x, weight, *settings))
    # bfloat16 gradients are compared by opcheck at a tolerance of float32.
    if dtype == torch.float32:
        torch.library.opcheck(OP, (x.requires_grad_(), weight.requires_grad_(), *settings))


# What inductor makes of a graph in which our ops are calls is the same whoever serves the calls.
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.one_backend)]
)
def test_compile(device, tolerance, backend):
    def block(x, weight):
        y = ops.depthwise_conv2d(x * 2, weight, padding=2, dilation=2, relu=True)
        return y.square().sum()

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    # The second shape compiles again, with symbolic sizes; the third has another layout.
    shapes = [(2, 4, 8, 8), (3, 4, 9, 7), (2, 4, 9, 8)]
    for i, shape in enumerate(shapes[:1] if backend == "inductor" else shapes):
        x = torch.randn(shape, device=device)
        x = (x.to(memory_format=torch.channels_last) if i == 2 else x).requires_grad_()
        weight = torch.randn(4, 1, 3, 3, device=device, requires_grad=True)
        expected, result = block(x, weight), compiled(x, weight)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
        for gradient, expected_gradient in zip(
            torch.autograd.grad(result, (x, weight)),
            torch.autograd.grad(expected, (x, weight)),
            strict=True,
        ):
            torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_autocast(device, x_dtype):
    x, weight, settings = make(CASES[0], torch.float32, device)
    x = x.to(x_dtype).requires_grad_()
    weight.requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.depthwise_conv2d(x, weight, **settings)
    assert y.dtype == torch.bfloat16
    expected = ops.depthwise_conv2d(x.bfloat16(), weight.bfloat16(), **settings)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == x_dtype
    assert weight.grad.dtype == torch.float32
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.depthwise_conv2d(x.double(), weight.double(), **settings)
    assert y.dtype == torch.float64


def test_flops_are_those_of_torch_for_the_same_convolution(device):
    x, weight, settings = make(CASES[1], torch.float32, device)
    settings = {**settings, "relu": False}
    counts = []
    for convolve in (
        lambda x, w: ops.depthwise_conv2d(x, w, **settings),
        lambda x, w: F.conv2d(x, w, None, settings["stride"], 4, 2, groups=5),
    ):
        with FlopCounterMode(display=False) as counter:
            convolve(x, weight)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv2d(
            x.requires_grad_(), weight.requires_grad_(), **settings
        ).sum().backward()
    assert counter.get_total_flops() == 3 * counts[0]


# --- Strides --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layout_follows_x(device, case, memory_format):
    x, weight, settings = make(case, torch.float32, device, memory_format)
    x.requires_grad_()
    y = ops.depthwise_conv2d(x, weight, **settings)
    assert y.is_contiguous(memory_format=memory_format)
    # Whatever the layout in which the gradient comes.
    for grad in (torch.ones_like(y), torch.ones((), device=device).expand(y.shape)):
        (gradient,) = torch.autograd.grad(y, x, grad, retain_graph=True)
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("last", [False, True])
def test_views(device, last):
    x, weight, settings = make(CASES[0], torch.float32, device)
    expected = ops.depthwise_conv2d(x, weight, **settings)
    n, c, h, w = x.shape
    if last:
        buffer = torch.full((n, h + 2, w + 3, c + 4), math.nan, device=device)
        view = buffer.permute(0, 3, 1, 2)[:, 1:-3, 1:-1, 2:-1]
    else:
        buffer = torch.full((n, c + 1, h + 2, 2 * w), math.nan, device=device)
        view = buffer[:, 1:, 1:-1, ::2]
    view.copy_(x)
    turned = weight.transpose(2, 3).contiguous().transpose(2, 3)
    y = ops.depthwise_conv2d(view.requires_grad_(), turned, **settings)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    grad = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, view, grad)
    (expected_gradient,) = torch.autograd.grad(
        ops.depthwise_conv2d(x.requires_grad_(), weight, **settings), x, grad
    )
    torch.testing.assert_close(gradient, expected_gradient)


def test_inputs_are_not_written(device):
    x, weight, settings = make(CASES[0], torch.float32, device)
    copies = x.clone(), weight.clone()
    x.requires_grad_()
    ops.depthwise_conv2d(x, weight.requires_grad_(), **settings).sum().backward()
    assert torch.equal(x, copies[0])
    assert torch.equal(weight, copies[1])


def test_empty_batch(device):
    x = torch.zeros(0, 3, 8, 8, device=device, requires_grad=True)
    weight = torch.ones(3, 1, 3, 3, device=device, requires_grad=True)
    y = ops.depthwise_conv2d(x, weight, stride=2, relu=True)
    assert y.shape == (0, 3, 3, 3)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert bool((weight.grad == 0).all())


def test_meta_tensors_have_the_shape_and_layout_of_real_ones():
    x, weight, settings = make(CASES[1], torch.bfloat16, "meta", torch.channels_last)
    y = ops.depthwise_conv2d(x.requires_grad_(), weight, **settings)
    assert y.shape == (1, 5, 5, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert x.grad.shape == x.shape


# --- Errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x: expected shape \(N, C, H, W\).*\(2, 3, 8\)"),
        ({"x": torch.zeros(2, 3, 8, 8).int()}, TypeError, "x: expected float32.*got torch.int32"),
        (
            {"weight": torch.zeros(4, 1, 3, 3)},
            ValueError,
            r"weight: expected shape \(3, 1, k, k\).*got \(4, 1, 3, 3\)",
        ),
        ({"weight": torch.zeros(3, 3, 3, 3)}, ValueError, r"got \(3, 3, 3, 3\)"),
        ({"weight": torch.zeros(3, 1, 3, 5)}, ValueError, r"got \(3, 1, 3, 5\)"),
        ({"weight": torch.zeros(3, 1, 0, 0)}, ValueError, r"got \(3, 1, 0, 0\)"),
        (
            {"weight": torch.zeros(3, 1, 3, 3).half()},
            TypeError,
            "weight: expected torch.float32 as x, got torch.float16",
        ),
        (
            {"weight": torch.zeros(3, 1, 3, 3, device="meta")},
            RuntimeError,
            "weight: expected device cpu as x, got meta",
        ),
        ({"stride": 0}, ValueError, "stride: expected at least 1, got 0"),
        ({"padding": (0, -1)}, ValueError, r"padding: expected at least 0, got \(0, -1\)"),
        ({"dilation": 1.5}, TypeError, "dilation: expected an int or two ints, got 1.5"),
        ({"dilation": (1, 2, 3)}, TypeError, "dilation: expected an int or two ints"),
        ({"stride": ("1", 2)}, TypeError, "stride: expected an int or two ints"),
        (
            {"dilation": 4},
            ValueError,
            r"x: expected at least the extent of the kernel, 9 x 9 with dilation \(4, 4\), "
            r"got 8 x 8 with padding \(0, 0\)",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 8, 8), "weight": torch.zeros(3, 1, 3, 3), **change}
    with pytest.raises(error, match=f"depthwise_conv2d: .*{message}"):
        ops.depthwise_conv2d(**arguments)


def test_a_backward_computes_only_what_it_is_asked_for(device):
    """An attack asks for the gradient of the input, while the weights still require one."""
    x = torch.randn(2, 4, 8, 8, device=device, requires_grad=True)
    weight = torch.randn(4, 1, 3, 3, device=device, requires_grad=True)

    def ops_run(step):
        with torch.profiler.profile(acc_events=True) as profile:
            step(ops.depthwise_conv2d(x, weight, padding=1).sum())
        return {event.key.partition("backward_")[2] for event in profile.key_averages()} - {""}

    both = {"input", "weight"}
    names = both & ops_run(lambda loss: torch.autograd.grad(loss, x))
    assert names == {"input"}
    assert both & ops_run(lambda loss: torch.autograd.grad(loss, weight)) >= {"weight"}
    assert both & ops_run(lambda loss: torch.autograd.grad(loss, (x, weight))) == both
    assert both & ops_run(lambda loss: loss.backward()) == both
    assert x.grad is not None
    assert weight.grad is not None


@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
def test_a_stride_on_cuda_is_the_librarys(monkeypatch, stride):
    """Decided by the op, for all its callers; here a tensor only says that it lies there."""
    called = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.append(func._opname)
            return func(*args, **(kwargs or {}))

    x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 1, 3, 3, requires_grad=True)
    wanted = F.conv2d(x.relu(), weight, None, stride, 1, 1, 8)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    with Names():
        y = ops.depthwise_conv2d(x, weight, stride=stride, padding=1, relu=True)
        torch.autograd.grad(y.sum(), (x, weight))
    ours = stride == 1
    assert ("depthwise_conv2d" in called) == ours
    assert ("depthwise_conv2d_backward_weight" in called) == ours
    assert ("convolution" in called) == ("convolution_backward" in called) == (not ours)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
