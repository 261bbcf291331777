"""fastbandit.nn.operations: every operation of the table, at every stride and odd sizes."""

from __future__ import annotations

import dataclasses
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from fastbandit import _native, ops
from fastbandit.nn import operations
from fastbandit.nn.binary import use_full_precision
from fastbandit.nn.denoise import Denoise
from fastbandit.nn.gabor import Gabor
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.nn.operations import CONSTRUCTORS, make
from fastbandit.nn.supernet import Supernet
from fastbandit.operations import OF_CELLS, OPERATIONS, OperationOptions

blocks = importlib.import_module("fastbandit.ops.conv_block")
reducing = importlib.import_module("fastbandit.ops.factorized_reduce")
pooling = importlib.import_module("fastbandit.ops.max_pool2d")
VARIANTS = [
    *((name, {}) for name in OPERATIONS),
    ("gab_filt_3x3", {"gabor": "released"}),
    ("max_pool_3x3", {"pool_bn": False}),
    ("bin_sep_conv_3x3", {"pre_bn": True}),
    ("bin_conv_3x3", {"pre_bn": True}),
    ("dtp_blok_3x3", {"denoise_1x1": True}),
    *(("dtp_blok_3x3", {"denoise": kind}) for kind in ("gaussian", "mean", "median")),
]
IDS = ["-".join([name, *map(str, options.values())]) for name, options in VARIANTS]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=IDS)


needs_kernels = pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")


def awake(name: str, channels: int, stride: int, affine: bool = False, **options) -> nn.Module:
    """The operation with its residual batch norm, which starts at 0, switched on."""
    torch.manual_seed(0)
    operation = make(name, channels, stride, affine, **options)
    # A sign has no derivative; that of 1-bit layers is in tests/test_binary.py.
    use_full_precision(operation, True)
    for module in operation.modules():
        if isinstance(module, BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return operation


def test_the_table_is_complete():
    assert set(CONSTRUCTORS) == set(OPERATIONS)
    assert all(name == operation.name for name, operation in OPERATIONS.items())
    used = {option for operation in OPERATIONS.values() for option in operation.options}
    assert used.isdisjoint(OF_CELLS)
    assert used | set(OF_CELLS) == {field.name for field in dataclasses.fields(OperationOptions)}


class Reading:
    """Options that note which of them are asked for."""

    def __init__(self):
        self.read = set()

    def __getattr__(self, name):
        self.read.add(name)
        return getattr(OperationOptions(), name)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_reads_the_options_of_its_row(name, stride):
    """The hash of a genotype holds those alone."""
    options = Reading()
    CONSTRUCTORS[name](4, stride, True, options)
    assert options.read == set(OPERATIONS[name].options)


def test_options():
    options = OperationOptions(gabor="released")
    assert options.changed({"denoise": "mean", "gabor": None}) == OperationOptions(
        denoise="mean", gabor="released"
    )
    assert OperationOptions.of(SimpleNamespace(gabor="released", width=3)) == options
    with pytest.raises(ValueError, match="gabor: expected one of pixels, released, got 'dense'"):
        OperationOptions(gabor="dense")
    with pytest.raises(ValueError, match="denoise_1x1: expected one of False, True, got 1"):
        OperationOptions(denoise_1x1=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'chanels'"):
        Supernet("robust8", in_channels=1, classes=2, channels=4, chanels=4)
    supernet = Supernet(
        "robust9", in_channels=1, classes=2, channels=2, options=options, denoise="mean"
    )
    kinds = {module.kind for module in supernet.modules() if isinstance(module, Gabor)}
    assert kinds == {"released"}
    kinds = {module.kind for module in supernet.modules() if isinstance(module, Denoise)}
    assert kinds == {"mean"}


@every_variant
@pytest.mark.parametrize("stride", [1, 2])
def test_shapes(name, options, stride, device):
    for channels in (1, 3, 4):
        operation = awake(name, channels, stride, **options).to(device)
        for height, width in ((8, 8), (7, 5), (6, 9), (2, 3), (1, 4), (1, 1)):
            y = operation(torch.randn(2, channels, height, width, device=device))
            assert y.shape == (2, channels, -(-height // stride), -(-width // stride))
            assert y.isfinite().all()


@every_variant
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(4, 3), (1, 1)])
def test_gradients(name, options, stride, size):
    """Against numerical ones in float64, of the input and of every parameter."""
    channels = 3
    operation = awake(name, channels, stride, affine=True, **options).double()
    names = [key for key, _ in operation.named_parameters()]
    x = torch.randn(3, channels, *size, dtype=torch.float64, requires_grad=True)
    parameters = tuple(p.detach().requires_grad_() for p in operation.parameters())

    def run(x, *values):
        return functional_call(operation, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-4)
    if size != (1, 1) and name != "zero":
        gradients = torch.autograd.grad(run(x, *parameters).square().sum(), (x, *parameters))
        for key, gradient in zip(["x", *names], gradients, strict=True):
            assert gradient.abs().max() > 0, key


@every_variant
@pytest.mark.parametrize("stride", [1, 2])
def test_channels_last_computes_the_same(name, options, stride, device):
    operation = awake(name, 4, stride, **options).to(device)
    x = torch.randn(2, 4, 5, 6, device=device)
    y = operation(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, operation(x), rtol=1e-4, atol=1e-5)
    # One map in another layout would take the kernels from all that follow.
    assert y.is_contiguous(memory_format=torch.channels_last)


def counts(c: int) -> dict[str, tuple[int, int]]:
    """Parameters with affine batch norms, at strides 1 and 2, at c channels."""
    conv = {k: k * k * c * c + 2 * c for k in (1, 3, 5, 7)}
    sep = {k: k * k * c + 2 * c + k * k * c * c + 2 * c for k in (3, 5)}
    dil = {k: k * k * c + c * c + 2 * c for k in (1, 3, 5, 7)}
    return (
        {"max_pool_3x3": (2 * c,) * 2, "avg_pool_3x3": (2 * c,) * 2}
        | {"skip_connect": (0, c * c + 2 * c)}
        | {f"conv_{k}x{k}": (n, n) for k, n in conv.items()}
        | {f"sep_conv_{k}x{k}": (n, n) for k, n in sep.items()}
        | {f"sep_conv_m_{k}x{k}": (2 * dil[k],) * 2 for k in (3, 5)}
        | {f"dil_conv_{k}x{k}": (n, n) for k, n in dil.items()}
        | {"gab_filt_3x3": (7 * c,) * 2, "dtp_blok_3x3": (2 * c,) * 2, "zero": (0, 0)}
        | {
            f"bin_{kind}_conv_{k}x{k}": (dil[k] + 2 * c,) * 2
            for kind in ("dil", "sep")
            for k in (3, 5)
        }
        | {f"bin_conv_{d}{k}x{k}": (conv[k],) * 2 for d in ("", "d2_") for k in (3, 5)}
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_parameters_and_batch_norms(name):
    def count(operation):
        return sum(p.numel() for p in operation.parameters())

    c = 6
    norms = 2 * c * sum(isinstance(m, BatchNorm2d) for m in make(name, c, 2).modules())
    for stride in (1, 2):
        with_affine, without = make(name, c, stride, True), make(name, c, stride, False)
        assert count(with_affine) == counts(c)[name][stride - 1]
        if name in ("gab_filt_3x3", "dtp_blok_3x3"):
            # Scale and shift are the block's own gate: there in the supernet too, starting at 0.
            assert count(without) == count(with_affine)
            assert not without.bn.weight.any()
            assert not without.bn.bias.any()
        elif name != "skip_connect" or stride == 2:
            assert count(without) == count(with_affine) - norms
    assert count(make("dtp_blok_3x3", c, denoise_1x1=True)) == 2 * c + c * c
    assert count(make("dtp_blok_3x3", c, denoise="gaussian")) == 2 * c + 2 * c * c


def plain_batch_norm(x):
    return F.batch_norm(x, None, None, training=True)


@pytest.mark.parametrize("stride", [1, 2])
def test_compositions(stride, tolerance):
    """Each composition of the table written out with torch's own functions."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    bn, relu = plain_batch_norm, F.relu

    def build(name):
        return make(name, 4, stride, False).double()

    expected = {
        "max_pool_3x3": lambda op: bn(F.max_pool2d(x, 3, stride, 1)),
        "avg_pool_3x3": lambda op: bn(F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)),
        "conv_5x5": lambda op: bn(
            F.conv2d(relu(x), op.conv.weight, stride=stride, padding=4, dilation=2)
        ),
        "sep_conv_3x3": lambda op: bn(
            F.conv2d(
                relu(bn(F.conv2d(relu(x), op.depthwise.weight, None, stride, 1, 1, 4))),
                op.weight,
                padding=1,
            )
        ),
        "dil_conv_3x3": lambda op: bn(
            F.conv2d(F.conv2d(relu(x), op.depthwise.weight, None, stride, 2, 2, 4), op.pointwise)
        ),
    }
    for name, formula in expected.items():
        operation = build(name)
        torch.testing.assert_close(operation(x), formula(operation), **tolerance(x.dtype))
    operation = build("sep_conv_m_5x5")
    first = F.conv2d(relu(x), operation.depthwise1.weight, None, stride, 2, 1, 4)
    y = relu(bn(F.conv2d(first, operation.pointwise1)))
    y = F.conv2d(F.conv2d(y, operation.depthwise2.weight, None, 1, 2, 1, 4), operation.pointwise2)
    torch.testing.assert_close(operation(x), bn(y), **tolerance(x.dtype))


def test_skip_is_the_input_itself_or_halves_it_by_two_shifted_grids():
    x = torch.randn(2, 4, 5, 4)
    assert make("skip_connect", 4, 1)(x) is x
    operation = make("skip_connect", 4, 2, False)
    padded = F.pad(x.relu(), (0, 1, 0, 1))
    y = torch.cat(
        [
            torch.einsum("oi,nihw->nohw", operation.weight[..., 0, 0], x.relu()[..., ::2, ::2]),
            torch.einsum(
                "oi,nihw->nohw",
                operation.weight_shifted[..., 0, 0],
                padded[..., 1::2, 1::2][..., :3, :2],
            ),
        ],
        dim=1,
    )
    torch.testing.assert_close(operation(x), plain_batch_norm(y), rtol=1e-5, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", ["avg_pool_3x3", "max_pool_3x3", "skip_connect", "sep_conv_m_3x3"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 5), (5, 6), (6, 4), (9, 9)], ids=str)
def test_routes_through_kernels_compute_the_same(name, stride, size, monkeypatch):
    """What an operation becomes where the kernels serve it, against the operation as written."""
    torch.manual_seed(0)
    operation = make(name, 5, stride, True)
    state = {key: value.clone() for key, value in operation.state_dict().items()}
    x = torch.randn(3, 5, *size).contiguous(memory_format=torch.channels_last).requires_grad_()
    grad, results = None, []
    for serves, least in ((blocks.serves, 0), (lambda *_: False, 1 << 62)):
        for module in (blocks, reducing):
            monkeypatch.setattr(module, "serves", serves)
        monkeypatch.setattr(pooling, "_LEAST_OUTPUTS", least)
        operation.load_state_dict(state)
        for training in (True, False):  # the second with the statistics of the first
            y = operation.train(training)(x)
            grad = torch.randn_like(y) if grad is None else grad
            gradients = torch.autograd.grad(y, [x, *operation.parameters()], grad)
            results.append([y, *gradients, *operation.buffers()])
            results[-1] = [tensor.detach().clone() for tensor in results[-1]]
    for ours, written in zip(results[:2], results[2:], strict=True):
        assert ours[0].is_contiguous(memory_format=torch.channels_last)
        for one, other in zip(ours, written, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("name", "stride", "function"),
    [("avg_pool_3x3", 1, "avg_pool2d"), ("skip_connect", 2, "conv2d")],
)
def test_routes_through_kernels_are_taken(name, stride, function, monkeypatch):
    monkeypatch.setattr(pooling, "_LEAST_OUTPUTS", 0)
    calls = []
    original = getattr(F, function)

    def spy(*args, **kwargs):
        calls.append(function)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, function, spy)
    operation = make(name, 4, stride)
    x = torch.randn(2, 4, 6, 6)
    operation(x.contiguous(memory_format=torch.channels_last))
    assert not calls
    operation(x)
    assert calls


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("sep_conv_3x3", "depthwise_conv2d"),
        ("sep_conv_m_5x5", "depthwise_conv2d"),
        ("dil_conv_7x7", "depthwise_conv2d"),
        ("conv_3x3", "dilated_conv2d"),
        ("gab_filt_3x3", "gabor_conv2d"),
    ],
)
def test_the_kernels_are_called_through_ops(name, op, monkeypatch):
    calls = []
    original = getattr(ops, op)

    def spy(*args, **kwargs):
        calls.append(kwargs.get("relu"))
        return original(*args, **kwargs)

    monkeypatch.setattr(ops, op, spy)
    if hasattr(blocks, op):  # a block calls it by itself where no kernel computes the whole
        monkeypatch.setattr(blocks, op, spy)
    make(name, 4, 1)(torch.randn(2, 4, 5, 5))
    assert calls == [None if op == "gabor_conv2d" else True] * (2 if "_m_" in name else 1)


def test_bfloat16_and_autocast(device):
    for name, options in VARIANTS:
        operation = awake(name, 4, 2, **options).to(device)
        x = torch.randn(2, 4, 6, 6, device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            y = operation(x)
        assert y.isfinite().all(), name
        assert (y.float() - operation(x)).abs().max() < 0.2, name


def test_errors():
    with pytest.raises(ValueError, match=r"operation: expected one of .*, got 'conv_9x9'"):
        make("conv_9x9", 4)
    with pytest.raises(ValueError, match="stride: expected 1 or 2, got 3"):
        make("conv_3x3", 4, 3)
    assert operations.make("conv_3x3", 4, gabor="released") is not None
