"""pack_sign, unpack_sign, binary_conv2d, sign_threshold: exact integers, whatever the kernel."""

from __future__ import annotations

import importlib
import os
import random
import weakref
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from _processes import Process
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastbandit import _native, ops
from fastbandit.ops._register import MISS

packing = importlib.import_module("fastbandit.ops.binary_pack")
module = importlib.import_module("fastbandit.ops.binary_conv2d")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
CHANNELS = [1, 2, 3, 31, 63, 64, 65, 127, 130, 200]


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).double()


def bit(words: Tensor, channel: int) -> Tensor:
    return words[..., channel // 64] >> channel % 64 & 1


# --- packing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_exact_bits_of_signs(device, dtype, layout):
    for channels in CHANNELS:
        x = torch.randn(2, channels, 3, 4, device=device).to(dtype)
        x.view(-1)[::7] = 0.0
        x = x.contiguous(memory_format=layout)
        bits = ops.pack_sign(x)
        assert bits.shape == (2, 3, 4, (channels + 63) // 64)
        assert bits.is_contiguous()
        for c in range(channels):
            assert torch.equal(bit(bits, c), (x[:, c] >= 0).long()), c
        for c in range(channels, 64 * bits.shape[3]):
            assert not bit(bits, c).any()
        for other in (dtype, torch.float32):
            back = ops.unpack_sign(bits, channels, dtype=other, memory_format=layout)
            assert back.dtype == other
            assert back.is_contiguous(memory_format=layout)
            assert torch.equal(back.double(), sign(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_signs_of_what_is_special(device, dtype):
    tiny = torch.finfo(dtype).tiny / 4  # subnormal
    values = [0.0, -0.0, torch.nan, -torch.nan, torch.inf, -torch.inf, tiny, -tiny, 1.0, -1.0]
    expected = [1, 1, -1, -1, 1, -1, 1, -1, 1, -1]
    for repeat in (1, 7):  # in a vector, and in what is left over
        x = torch.tensor(values * repeat, dtype=dtype, device=device).view(1, -1, 1, 1)
        for view in (x, x.expand(1, -1, 3, 2).contiguous(memory_format=torch.channels_last)):
            signs = ops.unpack_sign(ops.pack_sign(view), x.shape[1])
            assert signs[0, :, -1, -1].tolist() == expected * repeat


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_thresholds_of_channels(device, dtype):
    for channels in (5, 64, 70):
        x = (torch.randint(-8, 9, (2, channels, 3, 2), device=device) / 8).to(dtype)
        for kind in {dtype, torch.float32}:
            threshold = (torch.randint(-8, 9, (channels,), device=device) / 8).to(kind)
            threshold[0], threshold[1], threshold[2] = torch.nan, torch.inf, -torch.inf
            expected = x >= threshold.view(-1, 1, 1)
            for layout in (torch.contiguous_format, torch.channels_last):
                bits = ops.pack_sign(x.contiguous(memory_format=layout), threshold=threshold)
                assert torch.equal(bits, packing.words_from(expected))
    # Compared in float32, which a threshold beside bfloat16 may have: 1.001 is not rounded to 1.
    x = torch.ones(1, 3, 1, 1, dtype=dtype, device=device)
    threshold = torch.tensor([1.001, 1.0, 0.999], device=device)
    assert ops.pack_sign(x, threshold=threshold).item() == 6


def test_exact_bits_of_any_strides(device):
    x = torch.randn(3, 70, 8, 10, device=device)
    wide = torch.randn(2, 140, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    views = [
        x[:, ::2, 1::3, ::2],
        x.transpose(1, 3),
        x.transpose(2, 3)[1:],
        x[:1].expand(4, 70, 8, 10),
        x[:, 3:4].expand(3, 9, 8, 10),
        wide[:, 1:71],
        wide[:, ::2, 1:],
    ]
    for view in views:
        bits = ops.pack_sign(view)
        assert torch.equal(bits, ops.pack_sign(view.contiguous()))
        assert torch.equal(bits, packing.pack_reference(view, None))
        strided = bits.repeat_interleave(2, 2)[:, :, ::2]
        assert torch.equal(ops.unpack_sign(strided, view.shape[1]).double(), sign(view))


# --- convolution ----------------------------------------------------------------------------------


def problem(rng: random.Random) -> dict[str, Any]:
    """Sizes and settings of acceptance proof 1, drawn anew each time."""
    while True:
        depthwise = rng.random() < 0.4
        channels = rng.choice([rng.randint(1, 200), rng.choice(CHANNELS), 4 * rng.randint(1, 40)])
        k = rng.choice([(1, 1), (3, 3), (5, 5), (7, 7), (3, 5), (1, 3)])
        dilation = (rng.randint(1, 3), rng.randint(1, 3))
        padding = tuple(rng.randint(0, n * d) for n, d in zip(k, dilation, strict=True))
        size = (rng.randint(1, 12), rng.randint(1, 12))
        if all(
            s + 2 * p > d * (n - 1) for s, p, d, n in zip(size, padding, dilation, k, strict=True)
        ):
            break
    return {
        "n": rng.randint(1, 3),
        "channels": channels,
        "filters": channels if depthwise else rng.choice([rng.randint(1, 70), 32, 64, 128, 200]),
        "size": size,
        "k": k,
        "settings": {
            "stride": (rng.randint(1, 2), rng.randint(1, 2)),
            "padding": padding,
            "dilation": dilation,
            "groups": channels if depthwise else 1,
        },
        "pad": rng.choice(["zero", "zero", "plus_one"]),
    }


def tensors(case: dict[str, Any], seed: int, device: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map, filters, and both packed."""
    generator = torch.Generator().manual_seed(seed)
    n, channels, groups = case["n"], case["channels"], case["settings"]["groups"]
    x = torch.randn(n, channels, *case["size"], generator=generator).to(device)
    weight = torch.randn(case["filters"], channels // groups, *case["k"], generator=generator)
    weight = weight.to(device)
    turned = weight if groups == 1 else weight.transpose(0, 1)
    return x, weight, ops.pack_sign(x), ops.pack_sign(turned)


def usual(channels: int, depthwise: bool) -> dict[str, Any]:
    groups = channels if depthwise else 1
    return {"stride": 1, "padding": 1, "dilation": 1, "groups": groups}


def sums(x: Tensor, weight: Tensor, settings: dict[str, Any], pad: str) -> Tensor:
    """The definition, in float64."""
    x, settings = sign(x), dict(settings)
    if pad == "plus_one":
        rows, columns = settings.pop("padding")
        x = F.pad(x, (columns, columns, rows, rows), value=1.0)
    return F.conv2d(x, sign(weight), None, **settings)


def cases(count: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    rng = random.Random(seed)
    for index in range(count):
        yield index, problem(rng)


@pytest.mark.parametrize("threads", [1, 2])
def test_exact_sums_of_random_shapes(device, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for seed, case in cases(150, threads):
            x, weight, bits, weight_bits = tensors(case, seed, device)
            settings, pad = case["settings"], case["pad"]
            expected = sums(x, weight, settings, pad)
            arguments = {"kernel_size": case["k"], "pad": pad, **settings}
            y = ops.binary_conv2d(bits, weight_bits, case["channels"], **arguments)
            assert y.dtype == torch.float32
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(y.double(), expected), case
            # Bits out: any threshold, both directions.
            taps = int(expected.abs().max()) + 1
            threshold = torch.randint(-taps, taps + 1, (case["filters"],)).to(device)
            flip = torch.rand(case["filters"]).to(device) < 0.5
            threshold = threshold.to([torch.int16, torch.int32][seed % 2])
            got = ops.binary_conv2d(
                bits, weight_bits, case["channels"], threshold=(threshold, flip), **arguments
            )
            one = (expected >= threshold.view(-1, 1, 1)) != flip.view(-1, 1, 1)
            assert torch.equal(got, packing.words_from(one)), case
    finally:
        torch.set_num_threads(before)


# N, C, C_out, H, W, k, stride, padding, dilation, depthwise: large sums, tiles that are full and
# that are not, filters larger than their map, one channel.
LARGE = [
    (1, 256, 128, 9, 9, 3, 1, 1, 1, False),
    (1, 512, 64, 4, 5, 5, 1, 2, 1, False),
    (2, 64, 96, 8, 8, 3, 2, 1, 1, False),
    (1, 258, 33, 6, 6, 7, 1, 3, 1, False),
    (1, 260, 160, 3, 3, 1, 1, 0, 1, False),
    (1, 1100, 32, 3, 3, 7, 1, 6, 2, False),
    (2, 1, 3, 2, 2, 7, 1, 6, 2, False),
    (1, 256, 256, 14, 14, 3, 1, 1, 1, True),
    (2, 512, 512, 7, 9, 5, 1, 4, 2, True),
    (1, 64, 64, 33, 31, 3, 2, 1, 1, True),
    (3, 16, 16, 40, 12, 3, 1, 2, 2, True),
    (1, 320, 320, 2, 3, 5, 1, 4, 2, True),
    # Beyond the table, in parts that end within a tap; a part for each few of many taps.
    (1, 130, 70, 5, 6, 23, 1, 11, 1, False),
    (1, 1, 3, 9, 4, 257, 1, 128, 1, False),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_exact_sums_of_large_shapes(device, case):
    n, channels, filters, h, w, k, stride, padding, dilation, depthwise = case
    settings = {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}
    settings["groups"] = channels if depthwise else 1
    made = {
        "n": n, "channels": channels, "filters": filters, "size": (h, w), "k": (k, k),
        "settings": settings,
    }  # fmt: skip
    x, weight, bits, weight_bits = tensors(made, 0, device)
    for equal in (False, True):
        if equal:  # the largest sums there are: every bit agrees, or none
            x, bits = torch.ones_like(x), torch.ops.fastbandit.pack_sign(torch.ones_like(x), None)
            weight = torch.ones_like(weight)
            weight[::2] = -1
            weight_bits = ops.pack_sign(weight.transpose(0, 1) if depthwise else weight)
        y = ops.binary_conv2d(bits, weight_bits, channels, kernel_size=k, **settings)
        assert torch.equal(y.double(), sums(x, weight, settings, "zero"))


LARGE_FILTER = """
import resource
import torch
from fastbandit import ops

bits = ops.pack_sign(torch.ones(1, 1, 4, 8))
weight = torch.zeros(1, 1001, 1001, 1, dtype=torch.int64)
weight[0, 500, 500] = 1
small = weight[:, 400:601, 400:601].contiguous()
ops.binary_conv2d(bits, small, 1, kernel_size=201, padding=100)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = ops.binary_conv2d(bits, weight, 1, kernel_size=1001, padding=500)
assert y.unique().tolist() == [-30.0]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
def test_the_memory_of_a_thread_does_not_grow_with_the_filter():
    """The weights take 8 MB and as prepared eight times as much; for each of 32 pixels a copy of
    the map's words and of their mask would take 500."""
    process = Process("-c", LARGE_FILTER, environment=os.environ | {"FASTBANDIT_CPU": "baseline"})
    result = process.wait()
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 150


@pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
def test_no_op_falls_back_to_numbers(monkeypatch):
    """Where the kernels serve, the references are not called."""
    calls: list[str] = []
    for home, name in ((packing, "words_from"), (F, "conv2d"), (module, "integer_conv2d")):
        monkeypatch.setattr(home, name, lambda *_, name=name, **__: calls.append(name))
    for depthwise in (False, True):
        settings = usual(70, depthwise)
        case = {"n": 1, "channels": 70, "filters": 70, "size": (5, 6), "k": (3, 3)}
        _, _, bits, weight_bits = tensors({**case, "settings": settings}, 4, "cpu")
        scale, bias = torch.randn(2, 70)
        threshold = ops.sign_threshold(scale, bias, 9)
        arguments = (bits, weight_bits, 70)
        for k in (3, (3, 3)):  # the short way, and the long one
            ops.binary_conv2d(*arguments, kernel_size=k, scale=scale, bias=bias, **settings)
            ops.binary_conv2d(*arguments, kernel_size=k, threshold=threshold, **settings)
    assert calls == []


@pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
def test_the_short_way_says_what_the_long_one_does(monkeypatch):
    """Every number of a call arrives, those that do not fit take the long way, and whoever looks at
    ops sees the op itself."""
    x, weight = torch.randn(2, 70, 9, 9), torch.randn(70, 70, 3, 3)
    bits, weight_bits = ops.pack_sign(x), ops.pack_sign(weight)
    single = ops.pack_sign(weight[:1])
    scale, bias = torch.randn(2, 70)
    threshold = ops.sign_threshold(scale, bias, 9)
    taken: list[bool] = []

    def watched(call):
        def short(*args):
            y = call(*args)
            taken.append(y is not MISS)
            return y

        return short

    for name in ("_native_conv", "_native_conv_bits"):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    settings: list[dict[str, Any]] = [
        {"stride": 2}, {"stride": 63, "padding": 31}, {"padding": 255, "stride": 9},
        {"dilation": 3}, {"pad": "plus_one", "padding": 2}, *({"out_dtype": t} for t in DTYPES),
    ]  # fmt: skip
    for number in settings:
        for groups, filters in ((1, weight_bits), (70, single)):
            call = {"kernel_size": 3, "groups": groups, "padding": 1, **number}
            long = {**call, "kernel_size": (3, 3)}
            for more in ({"scale": scale, "bias": bias}, {"threshold": threshold}):
                if "threshold" in more and "out_dtype" in number:
                    continue
                taken.clear()
                y = ops.binary_conv2d(bits, filters, 70, **call, **more)
                assert taken == [True]
                assert torch.equal(y, ops.binary_conv2d(bits, filters, 70, **long, **more))
                assert taken == [True]
    for number in ({"stride": 64}, {"padding": 256}, {"dilation": 64, "padding": 70}):
        call = {"kernel_size": 3, "scale": scale, **number}
        y = ops.binary_conv2d(bits, weight_bits, 70, **call)
        assert torch.equal(
            y, ops.binary_conv2d(bits, weight_bits, 70, **{**call, "kernel_size": (3, 3)})
        )
    with FlopCounterMode(display=False) as counter:
        ops.binary_conv2d(bits, weight_bits, 70, kernel_size=3)
    assert counter.get_total_flops() == 2 * 2 * 49 * 70 * 70 * 9
    with pytest.raises(ValueError, match="weight_bits: expected shape"):
        ops.binary_conv2d(bits, weight_bits, 70, kernel_size=2)
    with pytest.raises(ValueError, match="groups: expected 1 or the number of channels"):
        ops.binary_conv2d(bits, weight_bits, 70, kernel_size=3, groups=2)
    number = torch.tensor(1)
    kept = weakref.ref(number)
    with pytest.raises(TypeError, match="stride"):
        ops.binary_conv2d(bits, weight_bits, 70, kernel_size=3, stride=number)
    del number
    assert kept() is None


class Seen(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.ops: list[str] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.ops.append(str(function))
        return function(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    ops: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.ops.append(str(function))
        return super().__torch_function__(function, types, args, kwargs)


def test_who_looks_at_ops_sees_them_whole():
    """Not the overload that takes its numbers as one: only a CPU kernel knows what it means."""
    bits = ops.pack_sign(torch.randn(1, 5, 4, 4))
    weight_bits = ops.pack_sign(torch.randn(3, 5, 3, 3))

    def call(bits, weight_bits):
        return ops.binary_conv2d(bits, weight_bits, 5, kernel_size=3)

    for pre_dispatch in (False, True):
        graph = make_fx(call, pre_dispatch=pre_dispatch)(bits, weight_bits).graph
        targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
        assert targets[-1] == "fastbandit.binary_conv2d.default", pre_dispatch
    traced = torch.jit.trace(call, (bits, weight_bits))
    node = traced.graph.findNode("fastbandit::binary_conv2d")
    assert len(list(node.inputs())) == 11
    with Seen() as seen:
        call(bits, weight_bits)
    assert "fastbandit.binary_conv2d.default" in seen.ops
    call(bits, weight_bits.as_subclass(Subclass))
    assert "fastbandit.binary_conv2d.default" in Subclass.ops
    for names in (seen.ops, Subclass.ops):
        assert not any(".short" in name for name in names)


@pytest.mark.parametrize("pad", ["zero", "plus_one"])
def test_wide_maps(device, pad):
    """A row of more pixels than are worked through together is cut; so are its edges."""
    for channels, filters, width, k, stride, dilation in (
        (70, 20, 65, 3, 1, 1), (16, 70, 200, 5, 1, 2), (64, 64, 131, 3, 2, 1),
        (33, 17, 129, 1, 1, 1), (128, 96, 150, 3, 1, 70), (3, 5, 90, 7, 3, 1),
    ):  # fmt: skip
        padding = dilation * (k // 2)
        x = torch.randn(2, channels, 4, width, device=device)
        weight = torch.randn(filters, channels, k, k, device=device)
        y = ops.binary_conv2d(
            ops.pack_sign(x), ops.pack_sign(weight), channels,
            kernel_size=k, stride=stride, padding=padding, dilation=dilation, pad=pad,
        )  # fmt: skip
        around = F.pad(sign(x), [padding] * 4, value=float(pad == "plus_one"))
        expected = F.conv2d(around, sign(weight), None, stride, 0, dilation)
        assert torch.equal(y.double(), expected), (channels, width, k)


def test_bits_past_the_channels_are_not_read(device):
    for depthwise in (False, True):
        for channels in (5, 66, 70):
            case = {
                "n": 1, "channels": channels, "filters": channels if depthwise else 40,
                "size": (5, 6), "k": (3, 3), "settings": usual(channels, depthwise),
            }  # fmt: skip
            _, _, bits, weight_bits = tensors(case, 1, device)
            settings = {"kernel_size": 3, **usual(channels, depthwise)}
            y = ops.binary_conv2d(bits, weight_bits, channels, **settings)
            threshold = (
                torch.zeros(case["filters"], dtype=torch.int16, device=device),
                torch.zeros(case["filters"], dtype=torch.bool, device=device),
            )
            z = ops.binary_conv2d(bits, weight_bits, channels, threshold=threshold, **settings)
            last = torch.zeros(bits.shape[3], dtype=torch.int64, device=device)
            last[-1] = -1 << channels % 64
            dirty = (bits | last, weight_bits | last)
            assert torch.equal(ops.binary_conv2d(*dirty, channels, **settings), y)
            assert torch.equal(
                ops.binary_conv2d(*dirty, channels, threshold=threshold, **settings), z
            )
            assert torch.equal(ops.unpack_sign(dirty[0], channels), ops.unpack_sign(bits, channels))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_exact_scale_and_bias_are_rounded_as_said(device, out, depthwise):
    for channels, filters in ((64, 33), (130, 128)):
        filters = channels if depthwise else filters
        settings = {
            "stride": 1,
            "padding": 1,
            "dilation": 1,
            "groups": channels if depthwise else 1,
        }
        case = {
            "n": 2, "channels": channels, "filters": filters, "size": (4, 5), "k": (3, 3),
            "settings": settings,
        }  # fmt: skip
        x, weight, bits, weight_bits = tensors(case, 2, device)
        scale, bias = torch.randn(2, filters, device=device)
        dot = sums(x, weight, settings, "zero")
        wide = torch.float64 if out == torch.float64 else torch.float32
        for s, b in ((scale, bias), (scale, None), (None, bias)):
            y = ops.binary_conv2d(
                bits,
                weight_bits,
                channels,
                kernel_size=3,
                scale=s,
                bias=b,
                out_dtype=out,
                **settings,
            )
            expected = dot.to(wide)
            if s is not None:
                expected = expected * s.to(wide).view(-1, 1, 1)
            if b is not None:
                expected = expected + b.to(wide).view(-1, 1, 1)
            assert y.dtype == out
            assert torch.equal(y, expected.to(out))


def test_table_by_hand(device):
    x = torch.tensor([[0.5, -0.0, -2.0], [-1.0, 3.0, torch.nan]], device=device).view(1, 1, 2, 3)
    weight = torch.tensor([[1.0, -1.0], [-1.0, 0.0]], device=device).view(1, 1, 2, 2)
    bits, weight_bits = ops.pack_sign(x), ops.pack_sign(weight)
    assert bits.flatten().tolist() == [1, 1, 0, 0, 1, 0]
    # + + -        + -
    # - + -   and  - +
    y = ops.binary_conv2d(bits, weight_bits, 1, kernel_size=2)
    assert y.flatten().tolist() == [1 - 1 + 1 + 1, 1 + 1 - 1 - 1]
    y = ops.binary_conv2d(bits, weight_bits, 1, kernel_size=2, padding=1, stride=(3, 2))
    assert y.flatten().tolist() == [1, -1 - 1]
    y = ops.binary_conv2d(bits, weight_bits, 1, kernel_size=2, padding=1, pad="plus_one")
    assert y[0, 0, 0].tolist() == [1 - 1 - 1 + 1, 1 - 1 - 1 + 1, 1 - 1 - 1 - 1, 1 - 1 + 1 + 1]


# --- thresholds -----------------------------------------------------------------------------------


def wanted_bits(scale: Tensor, bias: Tensor, sums: Tensor) -> Tensor:
    return scale[:, None] * sums.to(scale.dtype) + bias[:, None] >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_thresholds_are_the_sign_of_batch_norm(device, dtype):
    generator = torch.Generator().manual_seed(0)

    def numbers(count: int) -> Tensor:
        values = torch.randn(count, generator=generator, dtype=dtype)
        return values * 10 ** torch.randint(-30, 31, (count,), generator=generator).to(dtype)

    special = torch.tensor(
        [0.0, -0.0, 1e-30, -1e-30, 1e30, 1.0, -3.0, torch.inf, -torch.inf, torch.nan]
    )
    pairs = torch.cartesian_prod(special, special).to(dtype)
    for taps, count in ((9, 40_000), (25, 40_000), (576, 2_000), (33_000, 20)):
        whole = torch.randint(-taps, taps + 1, (count,), generator=generator).to(dtype)
        near = torch.rand(count, generator=generator, dtype=dtype) + 0.1
        scale = torch.cat([numbers(count), near, -near, pairs[:, 0]]).to(device)
        # Sums that end at 0, or next to it.
        bias = torch.cat([numbers(count), -near * whole, near * whole, pairs[:, 1]]).to(device)
        threshold, flip = ops.sign_threshold(scale, bias, taps)
        assert threshold.dtype == (torch.int16 if taps < 32_767 else torch.int32)
        assert flip.dtype == torch.bool
        assert int(threshold.min()) >= -taps
        assert int(threshold.max()) <= taps + 1
        every = torch.arange(-taps, taps + 1, device=device)
        got = (every >= threshold[:, None].int()) != flip[:, None]
        assert torch.equal(got, wanted_bits(scale, bias, every))


def test_a_threshold_replaces_batch_norm_and_packing(device):
    """Also beside zeros, where a sum has another parity."""
    for depthwise in (False, True):
        channels = 70
        filters = channels if depthwise else 66
        settings = {"padding": 2, "dilation": 2, "groups": channels if depthwise else 1}
        case = {
            "n": 2, "channels": channels, "filters": filters, "size": (6, 5), "k": (3, 3),
            "settings": settings,
        }  # fmt: skip
        _, _, bits, weight_bits = tensors(case, 3, device)
        scale, bias = torch.randn(2, filters, device=device)
        scale[0], scale[1], bias[2] = 0, 0, -0.0
        y = ops.binary_conv2d(
            bits, weight_bits, channels, kernel_size=3, scale=scale, bias=bias, **settings
        )
        threshold = ops.sign_threshold(scale, bias, 9 if depthwise else 9 * channels)
        z = ops.binary_conv2d(
            bits, weight_bits, channels, kernel_size=3, threshold=threshold, **settings
        )
        assert torch.equal(z, ops.pack_sign(y))


# --- no data, compilers, counts -------------------------------------------------------------------


def test_empty_batches(device):
    x = torch.empty(0, 70, 5, 6, device=device)
    bits = ops.pack_sign(x)
    assert bits.shape == (0, 5, 6, 2)
    assert ops.pack_sign(torch.empty(2, 3, 0, 4, device=device)).shape == (2, 0, 4, 1)
    assert ops.unpack_sign(bits, 70).shape == x.shape
    weight = ops.pack_sign(torch.randn(9, 70, 3, 3, device=device))
    y = ops.binary_conv2d(bits, weight, 70, kernel_size=3, padding=1)
    assert y.shape == (0, 9, 5, 6)
    deep = ops.pack_sign(torch.randn(1, 70, 3, 3, device=device))
    threshold = ops.sign_threshold(*torch.randn(2, 70, device=device), 9)
    z = ops.binary_conv2d(bits, deep, 70, kernel_size=3, groups=70, threshold=threshold)
    assert z.shape == (0, 3, 4, 2)
    assert [t.shape for t in ops.sign_threshold(x.new_empty(0), x.new_empty(0), 9)] == [(0,)] * 2


def settings_of(groups: int) -> tuple[Any, ...]:
    return (70, [1, 2], [1, 0], [2, 1], groups, False)


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


def test_opcheck():
    x = torch.randn(2, 70, 6, 5)
    named = torch.ops.fastbandit

    def check(op: Any, *arguments: Any) -> None:
        torch.library.opcheck(op.default, arguments, test_utils=QUICK)

    torch.library.opcheck(named.pack_sign.default, (x, None))
    check(named.pack_sign, x.to(memory_format=torch.channels_last), x[0, :, 0, 0])
    bits = ops.pack_sign(x)
    for layout in (torch.channels_last, torch.contiguous_format):
        check(named.unpack_sign, bits, 70, torch.bfloat16, layout)
    scale, bias = torch.randn(2, 70)
    threshold = ops.sign_threshold(scale, bias, 9)
    check(named.sign_threshold, scale, bias, 40_000)
    for groups, filters in ((1, 70), (70, 1)):
        weight = ops.pack_sign(torch.randn(filters, 70, 3, 3))
        start = (bits, weight, *settings_of(groups))
        check(named.binary_conv2d, *start, scale, bias, torch.float16)
        check(named.binary_conv2d, *start, None, None, torch.float32)
        check(named.binary_conv2d_bits, *start, *threshold)


def test_compile():
    torch._dynamo.reset()
    weight = ops.pack_sign(torch.randn(8, 6, 3, 3))
    scale, bias = torch.randn(2, 8)

    def layer(x: Tensor) -> Tensor:
        threshold = ops.sign_threshold(scale, bias, 54)
        bits = ops.binary_conv2d(
            ops.pack_sign(x), weight, 6, kernel_size=3, padding=1, threshold=threshold
        )
        return ops.unpack_sign(bits, 8) + 1

    x = torch.randn(2, 6, 5, 4)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), layer(x))
    y = layer(torch.randn(3, 6, 7, 4))
    assert y.shape == (3, 8, 7, 4)


def test_an_exported_program_has_no_op_of_this_package():
    weight = ops.pack_sign(torch.randn(8, 6, 3, 3))

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            bits = ops.pack_sign(x)
            return ops.binary_conv2d(bits, weight, 6, kernel_size=3, padding=1)

    x = torch.randn(2, 6, 5, 4)
    exported = torch.export.export(Layer(), (x,))
    assert "fastbandit" not in str(exported.graph)
    assert torch.equal(exported.module()(x), Layer()(x))


def test_autocast_changes_nothing(device):
    """bfloat16 has no integers past 256."""
    x, weight = torch.randn(1, 200, 5, 5, device=device), torch.randn(4, 200, 3, 3, device=device)
    arguments = (ops.pack_sign(x), ops.pack_sign(weight), 200)
    y = ops.binary_conv2d(*arguments, kernel_size=3)
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(ops.binary_conv2d(*arguments, kernel_size=3), y)
        reference = module.reference(
            *arguments, (1, 1), (0, 0), (1, 1), 1, False, None, None, torch.float32
        )
        assert torch.equal(reference, y)


def test_flops_are_those_of_the_convolution_it_stands_for():
    x, weight = torch.randn(2, 70, 6, 5), torch.randn(8, 70, 3, 3)
    with FlopCounterMode(display=False) as ours:
        ops.binary_conv2d(ops.pack_sign(x), ops.pack_sign(weight), 70, kernel_size=3, padding=1)
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(x, weight, padding=1)
    assert ours.get_total_flops() == theirs.get_total_flops()
    deep = torch.randn(70, 1, 3, 3)
    with FlopCounterMode(display=False) as ours:
        packed = ops.pack_sign(deep.transpose(0, 1))
        ops.binary_conv2d(ops.pack_sign(x), packed, 70, kernel_size=3, groups=70)
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(x, deep, groups=70)
    assert ours.get_total_flops() == theirs.get_total_flops()
