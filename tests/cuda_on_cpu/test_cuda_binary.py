"""The CUDA kernels of packed signs, run on the CPU: the same bits as the references."""

from __future__ import annotations

import importlib
from itertools import product

import pytest
import torch
from harness import DTYPES, Call, exact, run_all
from test_cuda_depthwise_conv2d import FLOATS, place
from torch import Tensor

binary_conv2d = importlib.import_module("fastbandit.ops.binary_conv2d")
binary_pack = importlib.import_module("fastbandit.ops.binary_pack")
sign_ste = importlib.import_module("fastbandit.ops.sign_ste")

AUTO, COUNT, MMA = 0, 1, 2  # csrc/cuda/binary.h

# N, C, H, W, C_out, kernel, stride, padding, dilation
DENSE = [
    (2, 3, 5, 4, 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 64, 4, 5, 40, (3, 3), (2, 1), (1, 1), (1, 1)),
    (1, 65, 3, 3, 33, (1, 1), (1, 1), (0, 0), (1, 1)),
    (1, 100, 4, 4, 66, (3, 2), (1, 2), (4, 3), (2, 3)),
    (3, 32, 2, 2, 8, (5, 5), (1, 1), (2, 2), (1, 1)),  # the filter is larger than the map
]
DEPTHWISE = [
    (2, 3, 5, 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 64, 4, 5, (5, 5), (2, 1), (4, 4), (2, 2)),
    (2, 97, 3, 3, (3, 3), (2, 2), (2, 1), (2, 1)),
    (1, 5, 2, 3, (8, 8), (1, 1), (7, 6), (1, 1)),  # more than 63 taps
]


def garbage_past(bits: Tensor, channels: int) -> Tensor:
    """The same words with other bits past the last channel, which nobody may read."""
    if channels % 64 == 0:
        return exact(bits)
    words = bits.clone()
    words[..., -1] |= -1 << channels % 64
    return exact(words)


@pytest.mark.parametrize("mode", ["sanitized", "plain"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_packing_and_back(layout, mode):
    generator = torch.Generator().manual_seed(2)
    calls, checks = [], []
    for (n, c, h, w), dtype, with_threshold in product(
        [(2, 3, 4, 5), (1, 64, 3, 2), (2, 97, 1, 3), (1, 1, 1, 1)], FLOATS, (False, True)
    ):
        x = torch.randn(n, c, h, w, generator=generator).to(dtype)
        x.view(-1)[:1] = -0.0
        x.view(-1)[-1:] = float("nan")
        x = place(x, layout)
        threshold = torch.randn(c, 2, generator=generator)[:, 0] if with_threshold else None
        expected = binary_pack.pack_reference(x, threshold)
        bits = exact(torch.full_like(expected, -1))
        stride = 0 if threshold is None else threshold.stride(0)
        calls.append(
            Call("binary", "launch_pack_sign", [
                x, DTYPES[dtype], list(x.shape), list(x.stride()), threshold, DTYPES[torch.float32],
                stride, bits, None,
            ], f"pack {x.shape} {dtype} {layout}")
        )  # fmt: skip
        checks.append((bits, expected))
        y = place(torch.full((n, c, h, w), float("nan"), dtype=dtype), layout)
        source = garbage_past(expected, c)
        calls.append(
            Call("binary", "launch_unpack_sign", [
                source, y, DTYPES[dtype], list(y.shape), list(y.stride()), None,
            ], f"unpack {x.shape} {dtype} {layout}")
        )  # fmt: skip
        checks.append(
            (y, binary_pack.unpack_reference(expected, c, dtype, torch.contiguous_format))
        )
    run_all(calls, mode)
    for call, (result, expected) in zip(calls, checks, strict=True):
        assert torch.equal(result, expected), call.name


def convolutions(cases, depthwise, kernels, generator):
    """Calls for every case, padding, result and kernel, and what each has to give."""
    for case, plus_one in product(cases, (0, 1)):
        if depthwise:
            (n, c, h, w, kernel, *settings), filters, groups = case, case[1], case[1]
            weight = torch.randn(c, 1, *kernel, generator=generator).transpose(0, 1)
        else:
            n, c, h, w, filters, kernel, *settings = case
            weight, groups = torch.randn(filters, c, *kernel, generator=generator), 1
        bits = binary_pack.pack_reference(torch.randn(n, c, h, w, generator=generator), None)
        weight_bits = binary_pack.pack_reference(weight, None)
        taps = kernel[0] * kernel[1] * (1 if depthwise else c)
        arguments = (bits, weight_bits, c, *settings, groups, bool(plus_one))
        dot = binary_conv2d._dot(*arguments)
        out = list(dot.shape[2:])
        stride, padding, dilation = settings
        shape = [n, h, w, *out, c, filters, *kernel, *stride, *padding, *dilation, plus_one]
        shape.append(int(depthwise))
        inputs = [garbage_past(bits, c), garbage_past(weight_bits, c), shape]
        for kind in kernels:
            name = f"{case} plus_one {plus_one} kernel {kind}"
            for dtype, constants in product(FLOATS, (False, True)):
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                scale, bias = (
                    torch.randn(filters, 2, generator=generator, dtype=wide)[:, 0]
                    if constants
                    else None
                    for _ in range(2)
                )
                expected = binary_conv2d.reference(*arguments, scale, bias, dtype)
                y = torch.full((n, *out, filters), float("nan"), dtype=dtype)
                step = 2 if constants else 0
                call = Call("binary", "launch_sign_conv2d", [
                    *inputs, scale, DTYPES[wide], step, bias, DTYPES[wide], step, y, DTYPES[dtype],
                    kind, None,
                ], f"{name} {dtype} {constants}")  # fmt: skip
                yield call, y, expected.permute(0, 2, 3, 1)
            for of in (torch.int16, torch.int32):
                threshold = torch.randint(-taps, taps + 2, (filters, 2), generator=generator).to(of)
                flip = torch.randint(2, (filters,), generator=generator).bool()
                expected = binary_conv2d.bits_reference(*arguments, threshold[:, 0], flip)
                y = torch.full_like(expected, -1)
                call = Call("binary", "launch_sign_conv2d_bits", [
                    *inputs, threshold, of.itemsize, 2, flip.to(torch.uint8), 1, y, kind, None,
                ], f"{name} bits {of}")  # fmt: skip
                yield call, y, expected


@pytest.mark.parametrize("mode", ["sanitized", "plain"])
@pytest.mark.parametrize("kernel", [COUNT, MMA, AUTO])
def test_dense(kernel, mode):
    generator = torch.Generator().manual_seed(3)
    found = list(convolutions(DENSE, False, (kernel,), generator))
    if mode == "sanitized":  # a fiber switch takes long there: what reads other memory stays
        found = [one for one in found if not one[0].name.endswith("False")]
    check(found, mode)


@pytest.mark.parametrize("mode", ["sanitized", "plain"])
def test_depthwise(mode):
    generator = torch.Generator().manual_seed(3)
    check(list(convolutions(DEPTHWISE, True, (AUTO,), generator)), mode)


def check(found, mode):
    run_all([call for call, _, _ in found], mode)
    for call, result, expected in found:
        assert torch.equal(result, expected), call.name


@pytest.mark.parametrize("mode", ["sanitized", "plain"])
def test_matrix_product_of_bits_is_laid_out_as_in_the_manual(mode):
    """The rows and columns of "Matrix Fragments for mma.m16n8k256" in the PTX ISA, bit by bit."""
    generator = torch.Generator().manual_seed(4)
    registers = [torch.randint(-(2**31), 2**31, (32, n), generator=generator) for n in (4, 2)]
    before = torch.randint(-1000, 1000, (32, 4), generator=generator)
    left = torch.zeros(16, 256, dtype=torch.int64)
    right = torch.zeros(256, 8, dtype=torch.int64)
    for lane in range(32):
        group, place = lane >> 2, lane % 4
        for i in range(128):
            row = group if i < 32 or 64 <= i < 96 else group + 8
            column = place * 32 + (i & 0x1F) + (0 if i < 64 else 128)
            left[row, column] = registers[0][lane, i // 32] >> i % 32 & 1
        for i in range(64):
            row = place * 32 + (i & 0x1F) + (0 if i < 32 else 128)
            right[row, group] = registers[1][lane, i // 32] >> i % 32 & 1
    product_of = left @ right
    expected = before.clone()
    for lane, i in product(range(32), range(4)):
        row = (lane >> 2) + (0 if i < 2 else 8)
        expected[lane, i] += product_of[row, lane % 4 * 2 + (i & 1)]
    sums = exact(before.int())
    operands = [exact(register.int()) for register in registers]
    run_all([Call("binary", "launch_mma_bits", [*operands, sums, None], "mma")], mode)
    assert torch.equal(sums.long(), expected)
