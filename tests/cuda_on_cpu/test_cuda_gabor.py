"""The CUDA kernels of the Gabor ops, run on the CPU against the float64 references."""

from __future__ import annotations

import ctypes
import importlib

import pytest
import torch
from harness import DTYPES, Call, exact, library, run_all
from test_cuda_depthwise_conv2d import FLOATS, TOLERANCE, assert_close, partial_floats, place
from torch import Tensor

from fastbandit.ops._convolution import convolution_backward

gabor = importlib.import_module("fastbandit.ops.gabor")

# The sanitizers' build computes the same: the plain one, which is optimised otherwise, is looked at
# in one layout.
LAYOUTS = [
    *((layout, "sanitized") for layout in ("contiguous", "channels_last", "strided", "unaligned")),
    ("unaligned", "plain"),
]
# N, C, H, W, C_out, k, stride, padding, dilation
CASES = [
    (2, 16, 8, 8, 16, 3, 1, 1, 1),
    (1, 3, 7, 9, 5, 5, 2, 2, 1),
    (3, 17, 5, 4, 33, 3, 1, 2, 2),
    (1, 1, 1, 1, 1, 3, 1, 1, 1),
    (2, 40, 4, 8, 8, 7, 1, 3, 1),
    (1, 8, 6, 11, 4, 1, (2, 1), (0, 3), 1),
]


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def parameters(count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
    uniform = [torch.rand(count, generator=generator) for _ in range(5)]
    ranges = [(0, 6.3), (0.5, 1.0), (0.5, 1.0), (2.0, 4.0), (-3.0, 6.0)]
    return [(low + width * u).to(dtype) for u, (low, width) in zip(uniform, ranges, strict=True)]


def test_filters_and_their_gradients():
    """Called in this process only: the harness passes no arrays of pointers."""
    functions = ctypes.CDLL(str(library("gabor", "plain")))
    generator = torch.Generator().manual_seed(0)
    for dtype in FLOATS:
        for count, k in ((1, 3), (5, 5), (300, 7), (4, 1)):
            values = parameters(count, dtype, generator)
            wide = [torch.stack([v, v], 1)[:, 0] for v in values]  # stride 2
            filters = torch.full((count, k, k), float("nan"), dtype=dtype)
            pointers = (ctypes.c_void_p * 5)(*(v.data_ptr() for v in wide))
            strides = (ctypes.c_int64 * 5)(*(v.stride(0) for v in wide))
            functions.launch_gabor_filters.restype = ctypes.c_char_p
            error = functions.launch_gabor_filters(
                pointers,
                strides,
                ctypes.c_int(DTYPES[dtype]),
                ctypes.c_int64(count),
                ctypes.c_int64(k),
                ctypes.c_void_p(filters.data_ptr()),
                ctypes.c_int(DTYPES[dtype]),
                None,
            )
            assert error is None
            double = [v.double() for v in values]
            assert_close(
                filters, gabor._filters_reference(*double, k), TOLERANCE[dtype], f"{dtype} {k}"
            )

            grad = torch.randn(count, k, k, generator=generator).to(dtype)
            results = [torch.full((count,), float("nan"), dtype=dtype) for _ in range(5)]
            functions.launch_gabor_filters_backward.restype = ctypes.c_char_p
            error = functions.launch_gabor_filters_backward(
                ctypes.c_void_p(grad.data_ptr()),
                ctypes.c_int(DTYPES[dtype]),
                (ctypes.c_int64 * 3)(*grad.stride()),
                pointers,
                strides,
                ctypes.c_int(DTYPES[dtype]),
                ctypes.c_int64(count),
                ctypes.c_int64(k),
                (ctypes.c_void_p * 5)(*(r.data_ptr() for r in results)),
                None,
            )
            assert error is None
            references = gabor._filters_backward_reference(grad.double(), *double, k)
            for result, reference in zip(results, references, strict=True):
                assert_close(result, reference, 4 * TOLERANCE[dtype], f"gradient {dtype} {k}")


INTERVALS = {"pixels": [0.5, 1.0, 2.0, 4.0], "released": [0.1, 0.4, 0.001, 0.999]}


@pytest.mark.parametrize("missing", [None, 0, 2])
@pytest.mark.parametrize("intervals", INTERVALS.values(), ids=INTERVALS)
def test_parameters_and_their_gradients(intervals, missing):
    """Against autograd of the reference, in float64."""
    module = importlib.import_module("fastbandit.ops.gabor_parameters")
    functions = ctypes.CDLL(str(library("gabor", "plain")))
    given = (ctypes.c_double * 4)(*intervals)
    generator = torch.Generator().manual_seed(2)
    for dtype in FLOATS:
        for count in (1, 5, 300):
            numbers = [3 * torch.randn(count, 2, generator=generator).to(dtype) for _ in range(4)]
            numbers = [pair[:, 0] for pair in numbers]  # stride 2
            double = [number.double().requires_grad_() for number in numbers]
            wanted = module._reference(*double, *intervals)
            grads = [torch.randn(count, generator=generator).to(dtype) for _ in range(4)]
            if missing is not None:
                grads[missing] = None
            slopes = torch.autograd.grad(
                wanted,
                double,
                [torch.zeros(count).double() if g is None else g.double() for g in grads],
            )

            def addresses(tensors):
                return (ctypes.c_void_p * 4)(*(t if t is None else t.data_ptr() for t in tensors))

            strides = (ctypes.c_int64 * 4)(*(number.stride(0) for number in numbers))
            ones = (ctypes.c_int64 * 4)(*[1] * 4)
            shape = ctypes.c_int(DTYPES[dtype]), ctypes.c_int64(count), given
            found = [torch.full((count,), float("nan"), dtype=dtype) for _ in range(8)]
            made = functions.launches_made()
            forward, backward = (
                functions.launch_gabor_parameters,
                functions.launch_gabor_parameters_backward,
            )
            forward.restype = backward.restype = ctypes.c_char_p
            assert forward(addresses(numbers), strides, *shape, addresses(found[:4]), None) is None
            numbers[2] = None  # gamma: nobody reads it
            of = addresses(grads), ones, addresses(numbers), strides
            assert backward(*of, *shape, addresses(found[4:]), None) is None
            assert functions.launches_made() == made + 2
            for one, other in zip(found, (*wanted, *slopes), strict=True):
                assert_close(one, other.detach(), 2 * TOLERANCE[dtype], f"{dtype} {count}")


@pytest.mark.parametrize(("layout", "mode"), LAYOUTS)
def test_convolution_and_gradients(layout, mode):
    generator = torch.Generator().manual_seed(1)
    calls: list[Call] = []
    checks: list[tuple[Tensor, Tensor, str]] = []
    for case in CASES:
        n, c, h, w, count, k, stride, padding, dilation = case
        for dtype in FLOATS:
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            settings = (pair(stride), pair(padding), pair(dilation))
            values = parameters(count, torch.float64, generator)
            bank = gabor._filters_reference(*values, k)[:, None]  # [C_out, 1, k, k]
            filters = exact(bank.to(wide))
            x = place(torch.randn(n, c, h, w, generator=generator).to(dtype), layout)
            total = x.double().sum(1, keepdim=True)
            reference = torch.nn.functional.conv2d(total, filters.double(), None, *settings)
            grad = place(torch.randn(reference.shape, generator=generator).to(dtype), layout)
            grad_total, grad_bank = convolution_backward(
                grad.double(), total, filters.double(), *settings, 1, (True, True)
            )

            sums = torch.full((n, 1, h, w), float("nan"), dtype=wide)
            y = place(torch.full(reference.shape, float("nan"), dtype=dtype), layout)
            grad_sum = torch.full((n, 1, h, w), float("nan"), dtype=dtype)
            grad_filters = torch.full(bank.shape, float("nan"), dtype=wide)
            shared = [h * w, 0, w, 1]
            numbers = [n, count, h, w, *reference.shape[2:], k, k]
            numbers += [*settings[0], *settings[1], *settings[2], 0]
            seen = sums.as_strided((n, count, h, w), shared)
            floats = partial_floats(grad, seen, numbers)
            partial = torch.full((floats,), float("nan")) if floats else None
            code, wide_code, name = DTYPES[dtype], DTYPES[wide], f"{case} {dtype} {layout}"
            calls += [
                Call(
                    "gabor",
                    "launch_channel_sum",
                    [x, code, list(x.shape), list(x.stride()), sums, None],
                    f"sum {name}",
                ),
                Call(
                    "gabor",
                    "launch_gabor_backward_input",
                    [grad, code, numbers, list(grad.stride()), filters, grad_sum, None],
                    f"backward_input {name}",
                ),
            ]
            # On a sum of its own, so that an error above does not hide one here.
            sums_in = exact(total.to(wide))
            filtered = [sums_in, wide_code, filters, wide_code, None]
            to_filters = [wide_code, numbers, list(grad.stride()), shared, None]
            calls += [
                Call(
                    "depthwise_conv2d",
                    "launch_depthwise_conv2d",
                    [*filtered, y, code, numbers, shared, None, list(y.stride()), 0, None],
                    f"forward {name}",
                ),
                Call(
                    "depthwise_conv2d",
                    "launch_depthwise_conv2d_backward_weight",
                    [grad, code, sums_in, wide_code, partial, grad_filters, *to_filters],
                    f"backward_weight {name}",
                ),
            ]
            checks += [
                (sums, total, f"sum {name}"),
                (grad_sum, grad_total, f"backward_input {name}"),
                (y, reference, f"forward {name}"),
                (grad_filters, grad_bank, f"backward_weight {name}"),
            ]
    run_all(calls, mode)
    for result, expected, name in checks:
        assert_close(result, expected, TOLERANCE[result.dtype], name)
