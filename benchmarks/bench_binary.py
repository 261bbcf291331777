"""Convolutions of signs: whole ops from float32 maps and back, and bits to bits.

``fastbandit`` packs the signs, convolves with zero padding, scales and adds a bias. Its rivals are
what the same layer costs in float32 (``F.conv2d``, channels-last; for a filter for each channel
also ``ops.depthwise_conv2d``), in bfloat16 where the CPU multiplies it, in int8 (oneDNN's, from
numbers that are quantised already), and OpenVINO's binary convolution, where ``openvino`` is
installed. In the groups "bits to bits" ours reads packed signs and writes those of the next layer.
A separable block and whole networks are timed beside their parents in float32 with the kernels of
this package.

``python benchmarks/binary_table.py --machine NAME`` runs this file on one thread, files the
result and makes the table of docs/binary.md.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import OURS
from torch import Tensor
from torch.nn import functional as F

from fastbandit import _native, info, ops
from fastbandit import space as spaces
from fastbandit.genotype import Genotype
from fastbandit.nn.binary import BinarySepConv, pack, use_full_precision
from fastbandit.nn.frozen import freeze
from fastbandit.nn.network import Network
from fastbandit.ops.binary_conv2d import one_number

DENSE = [  # N, C = C_out, H = W, k
    (1, 256, 14, 3), (1, 128, 28, 3), (1, 512, 8, 3), (1, 64, 32, 3), (1, 256, 14, 1),
    (1, 64, 32, 1), (64, 64, 32, 3), (64, 128, 16, 3), (64, 256, 8, 3), (64, 16, 32, 1),
]  # fmt: skip
DEPTHWISE = [  # N, C, H = W, k
    (1, 256, 14, 3), (1, 256, 32, 3), (1, 512, 8, 3), (1, 64, 32, 5), (64, 16, 32, 3),
    (64, 64, 8, 5), (64, 256, 14, 3),
]  # fmt: skip


# Least ratios of the project, by filter size and channels (3 x 3 from 128 channels on), where bits
# are looked up and where they are counted in vectors.
BY_COUNT = info.build_info()["cpu_isa"] == "avx512vpopcntdq"
GOALS = (
    {
        (3, 128): {"F.conv2d": 14.0, "bf16": 7.0, "int8": 2.5, "OpenVINO": 1.2},
        (3, 64): {"F.conv2d": 8.0},
        (1, 256): {"F.conv2d": 8.0},
        (1, 64): {"F.conv2d": 4.0},
    }
    if BY_COUNT
    else {
        (3, 128): {"F.conv2d": 8.0, "int8": 4.0, "OpenVINO": 1.6},
        (3, 64): {"F.conv2d": 7.0},
        (1, 256): {"F.conv2d": 6.5},
        (1, 64): {"F.conv2d": 3.3},
    }
)
DEPTHWISE_GOAL = 12.0 if BY_COUNT else 10.0
BLOCK_GOALS = {64: 4.0, 256: 7.0} if BY_COUNT else {64: 3.5, 256: 6.0}  # one image
NETWORK_GOALS = {1: 3.5, 16: 3.0} if BY_COUNT else {1: 3.0, 16: 2.5}  # by images


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def int8_conv(x: Tensor, weight: Tensor, padding: int) -> Callable[[], Tensor]:
    """oneDNN's convolution of quantised numbers, where torch has it."""
    if "onednn" not in torch.backends.quantized.supported_engines:
        pytest.skip("torch has no oneDNN for int8")
    torch.backends.quantized.engine = "onednn"
    quantized = torch.quantize_per_tensor(x, 0.05, 128, torch.quint8)
    filters = torch.quantize_per_tensor(weight, 0.05, 0, torch.qint8)
    packed = torch.ops.quantized.conv2d_prepack(
        filters, None, [1, 1], [padding, padding], [1, 1], 1
    )
    return lambda: torch.ops.quantized.conv2d(quantized, packed, 0.5, 128)


def openvino_conv(x: Tensor, weight: Tensor, padding: int) -> Callable[[], Tensor]:
    """OpenVINO's binary convolution on one thread, with its comparison of the map and its layouts
    of input and output (contiguous)."""
    openvino = pytest.importorskip("openvino")
    from openvino import opset1

    def constant(value: float) -> object:
        return opset1.constant(np.full((1, 1, 1, 1), value, np.float32))

    given = opset1.parameter(list(x.shape), np.float32)
    # Two levels, 0 and 1, are bits; others would be numbers that are converted to bits later.
    bits = opset1.fake_quantize(given, constant(0), constant(0), constant(0), constant(1), 2)
    words = np.packbits((weight >= 0).numpy().reshape(-1), bitorder="little")
    shape = openvino.Shape(list(weight.shape))
    filters = openvino.op.Constant(openvino.Tensor(words, shape, openvino.Type.u1))
    pads = [padding, padding]
    y = opset1.binary_convolution(
        bits, filters, [1, 1], pads, pads, [1, 1], "xnor-popcount", 0.0, "explicit"
    )
    model = openvino.Model([opset1.result(y)], [given], "binary")
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    image = x.contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(image, shared_memory=True))

    def call() -> Tensor:
        call.kept = words, image  # type: ignore[attr-defined]  # it refers to their memory
        request.infer()
        return torch.from_numpy(request.get_output_tensor().data)

    return call


def multiplies_bfloat16() -> bool:
    """Whether this process may use instructions of the CPU for it; without, it is emulated."""
    limited = "ONEDNN_MAX_CPU_ISA" in os.environ
    return not limited and torch.cpu._is_avx512_bf16_supported()


@pytest.mark.parametrize("rival", [OURS, "F.conv2d", "bf16", "int8", "OpenVINO"])
@pytest.mark.parametrize(("n", "c", "h", "k"), DENSE)
def test_dense(measure: Callable[..., None], device, n, c, h, k, rival):
    torch.manual_seed(0)
    layout = {"memory_format": torch.channels_last}
    x, weight = torch.randn(n, c, h, h).to(device, **layout), torch.randn(c, c, k, k).to(device)
    scale, bias = torch.rand(2, c, device=device)
    packed, padding = ops.pack_sign(weight), k // 2

    def ours() -> Tensor:
        settings = {"kernel_size": k, "padding": padding, "scale": scale, "bias": bias}
        return ops.binary_conv2d(ops.pack_sign(x), packed, c, **settings)

    if rival == OURS:
        sums = F.conv2d(sign(x), sign(weight), None, 1, padding).round()
        expected = scale.view(-1, 1, 1) * sums + bias.view(-1, 1, 1)
        assert torch.equal(ours(), expected)
        call: Callable[[], Tensor] = ours
    elif rival == "OpenVINO":
        if device.type != "cpu":
            pytest.skip("measured on the CPU")
        call = openvino_conv(x, weight, padding)
        # Its sign of 0 is -1, which does not occur here.
        assert torch.equal(call(), F.conv2d(sign(x), sign(weight), None, 1, padding).round())
    elif rival == "int8":
        if device.type != "cpu":
            pytest.skip("int8 convolutions of torch run on the CPU")
        call = int8_conv(x, weight, padding)
    elif rival == "bf16":
        if device.type == "cpu" and not multiplies_bfloat16():
            pytest.skip("the CPU has no instructions for bfloat16")
        half = [one.bfloat16() for one in (x, weight.to(**layout), bias)]
        call = lambda: F.conv2d(*half, 1, padding)  # noqa: E731
    else:
        weight = weight.to(**layout)
        call = lambda: F.conv2d(x, weight, bias, 1, padding)  # noqa: E731
    with torch.inference_mode():
        measure(
            call,
            rival=rival,
            goals=GOALS.get((k, min(c, 128) if k == 3 else c)) if rival == OURS else None,
            group=f"signs, {k} x {k}, {n} x {c} x {h} x {h}",
            device=device,
            shape=[n, c, h, h],
            dtype="float32",
        )


@pytest.mark.parametrize("rival", [OURS, "depthwise_conv2d", "F.conv2d"])
@pytest.mark.parametrize(("n", "c", "h", "k"), DEPTHWISE)
def test_depthwise_bits_to_bits(measure: Callable[..., None], device, n, c, h, k, rival):
    torch.manual_seed(0)
    x = torch.randn(n, c, h, h).to(device, memory_format=torch.channels_last)
    weight, padding = torch.randn(c, 1, k, k, device=device), k // 2
    scale, bias = torch.rand(c, device=device) - 0.5, torch.randn(c, device=device)
    bits, packed = ops.pack_sign(x), ops.pack_sign(weight.transpose(0, 1))
    threshold = ops.sign_threshold(scale, bias, k * k)
    settings = {"kernel_size": k, "padding": padding, "groups": c}
    if rival == OURS:
        sums = F.conv2d(sign(x), sign(weight), None, 1, padding, 1, c).round()
        expected = scale.view(-1, 1, 1) * sums + bias.view(-1, 1, 1) >= 0
        got = ops.binary_conv2d(bits, packed, c, threshold=threshold, **settings)
        assert torch.equal(ops.unpack_sign(got, c) > 0, expected)
    call = {
        OURS: lambda: ops.binary_conv2d(bits, packed, c, threshold=threshold, **settings),
        "depthwise_conv2d": lambda: ops.depthwise_conv2d(x, weight, padding=padding),
        "F.conv2d": lambda: F.conv2d(x, weight, None, 1, padding, 1, c),
    }[rival]
    with torch.inference_mode():
        measure(
            call,
            rival=rival,
            goals={"depthwise_conv2d": DEPTHWISE_GOAL} if rival == OURS and k == 3 else None,
            group=f"signs of single channels, bits to bits, {k} x {k}, {n} x {c} x {h} x {h}",
            device=device,
            shape=[n, c, h, h],
            dtype="float32",
        )


@pytest.mark.parametrize("rival", [OURS, "op of eleven arguments", "its overload short"])
def test_call(measure: Callable[..., None], device, rival):
    """What a call from Python takes: a map of four pixels (docs/decisions.md#short-overload)."""
    if rival != OURS and (device.type != "cpu" or "cpu" not in _native.served):
        pytest.skip("the overload is one of the CPU kernels")
    c, op = 64, torch.ops.fastbandit.binary_conv2d
    bits, weight_bits = (
        ops.pack_sign(torch.randn(shape, device=device)) for shape in ((1, c, 2, 2), (c, c, 1, 1))
    )
    scale, bias = torch.rand(2, c, device=device)
    one, zero = [1, 1], [0, 0]
    number = one_number(c, 1, 1, 0, 1, 1, "zero", torch.float32)
    call = {
        OURS: lambda: ops.binary_conv2d(
            bits, weight_bits, c, kernel_size=1, scale=scale, bias=bias
        ),
        "op of eleven arguments": lambda: op.default(
            bits, weight_bits, c, one, zero, one, 1, False, scale, bias, torch.float32
        ),
        "its overload short": lambda: op.short(bits, weight_bits, number, scale, bias),
    }[rival]
    with torch.inference_mode():
        measure(
            call,
            rival=rival,
            group="a call of binary_conv2d, 1 x 64 x 2 x 2",
            device=device,
            shape=[1, c, 2, 2],
            dtype="float32",
        )


@pytest.mark.parametrize("rival", [OURS, "copy"])
@pytest.mark.parametrize(("n", "c", "h"), [(1, 64, 32), (64, 64, 32), (64, 16, 32)])
def test_pack_sign(measure: Callable[..., None], device, n, c, h, rival):
    x = torch.randn(n, c, h, h).to(device, memory_format=torch.channels_last)
    to = torch.empty_like(x)
    measure(
        {OURS: lambda: ops.pack_sign(x), "copy": lambda: to.copy_(x)}[rival],
        rival=rival,
        group=f"packing signs, {n} x {c} x {h} x {h}",
        device=device,
        shape=[n, c, h, h],
        dtype="float32",
    )


def deployed(module: torch.nn.Module, parent: bool) -> torch.nn.Module:
    """For evaluation: packed, or the parent with its batch norms folded."""
    module = copy.deepcopy(module).eval().requires_grad_(False)
    use_full_precision(module, parent)
    used = freeze(module) if parent else freeze(pack(module))
    return used.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("rival", [OURS, "parent"])
@pytest.mark.parametrize(("n", "c", "h"), [(1, 64, 32), (1, 256, 14), (64, 64, 32), (64, 16, 32)])
def test_separable_block(measure: Callable[..., None], device, n, c, h, rival):
    torch.manual_seed(0)
    block, x = BinarySepConv(3, c), torch.randn(n, c, h, h)
    x = x.to(device, memory_format=torch.channels_last)
    used = deployed(block, rival != OURS).to(device)
    if rival == OURS:
        assert torch.equal(used(x), block.to(device).eval()(x))
    with torch.inference_mode():
        measure(
            lambda: used(x),
            rival=rival,
            goals={"parent": BLOCK_GOALS[c]} if rival == OURS and n == 1 else None,
            group=f"1-bit separable block, 3 x 3, {n} x {c} x {h} x {h}",
            device=device,
            shape=[n, c, h, h],
            dtype="float32",
        )


@pytest.mark.parametrize("rival", [OURS, "parent"])
@pytest.mark.parametrize(("n", "c", "h"), [(1, 64, 32), (16, 64, 32), (1, 16, 28), (64, 16, 28)])
def test_network(measure: Callable[..., None], device, n, c, h, rival):
    """A random network of binary8, six cells, as a search may find it."""
    torch.manual_seed(0)
    searched = spaces.get("binary8")
    generator = torch.Generator().manual_seed(3)
    choice = torch.randint(searched.arms, (searched.rows,), generator=generator).tolist()
    genotype = Genotype.from_choices(searched, choice, options={"preprocess": "binary"})
    network = Network(genotype, in_channels=3, classes=10, channels=c, cells=6)
    x = torch.rand(n, 3, h, h).to(device, memory_format=torch.channels_last)
    used = deployed(network, rival != OURS).to(device)
    with torch.inference_mode():
        measure(
            lambda: used(x),
            rival=rival,
            goals={"parent": NETWORK_GOALS[n]} if rival == OURS and c >= 64 else None,
            group=f"1-bit network of binary8, V = 6, C = {c}, {n} x 3 x {h} x {h}",
            device=device,
            shape=[n, 3, h, h],
            dtype="float32",
        )
