"""Wrong arguments of the ops on packed signs: one error that says what, and nothing is computed."""

from __future__ import annotations

import pytest
import torch

from fastbandit import _native, ops


def test_errors():
    x, weight = torch.randn(2, 70, 6, 5), torch.randn(8, 70, 3, 3)
    bits, packed = ops.pack_sign(x), ops.pack_sign(weight)
    vector, short = torch.randn(8), torch.randn(7)
    threshold = ops.sign_threshold(vector, vector, 630)

    def conv(bits=bits, packed=packed, channels=70, k=3, **settings):
        return lambda: ops.binary_conv2d(bits, packed, channels, kernel_size=k, **settings)

    for error, message, call in [
        (TypeError, "pack_sign: x: expected a tensor", lambda: ops.pack_sign([1.0])),
        (TypeError, "pack_sign: x: expected float32, float64", lambda: ops.pack_sign(bits)),
        (ValueError, r"pack_sign: x: expected shape \(N, C", lambda: ops.pack_sign(x[0])),
        (ValueError, r"pack_sign: threshold: expected shape \(70,\)",
         lambda: ops.pack_sign(x, threshold=short)),
        (TypeError, "pack_sign: threshold: expected torch.float32, got torch.float64",
         lambda: ops.pack_sign(x, threshold=torch.zeros(70).double())),
        (RuntimeError, "pack_sign: x: expected a tensor without gradient",
         lambda: ops.pack_sign(x.clone().requires_grad_())),
        (RuntimeError, "pack_sign: threshold: expected device cpu as x, got meta",
         lambda: ops.pack_sign(x, threshold=torch.zeros(70, device="meta"))),
        (TypeError, "unpack_sign: bits: expected torch.int64", lambda: ops.unpack_sign(x, 70)),
        (ValueError, "unpack_sign: bits: expected shape .*, 3", lambda: ops.unpack_sign(bits, 129)),
        (TypeError, "unpack_sign: channels: expected an int", lambda: ops.unpack_sign(bits, 70.0)),
        (ValueError, "unpack_sign: channels: expected 1 to", lambda: ops.unpack_sign(bits, 0)),
        (TypeError, "unpack_sign: out_dtype: expected",
         lambda: ops.unpack_sign(bits, 70, dtype=torch.int8)),
        (ValueError, "unpack_sign: memory_format: expected",
         lambda: ops.unpack_sign(bits, 70, memory_format=torch.preserve_format)),
        (ValueError, "binary_conv2d: bits: expected shape", conv(channels=60)),
        (TypeError, "binary_conv2d: weight_bits: expected torch.int64", conv(packed=weight)),
        (ValueError, r"binary_conv2d: weight_bits: expected shape \(C_out, 5, 5, 2\)", conv(k=5)),
        (ValueError, r"binary_conv2d: weight_bits: expected shape \(1, 3, 3, 2\)", conv(groups=70)),
        (ValueError, "binary_conv2d: groups: expected 1 or the number of channels, 70",
         conv(groups=2)),
        (ValueError, "binary_conv2d: pad: expected 'zero' or 'plus_one'", conv(pad="same")),
        (ValueError, "binary_conv2d: stride: expected at least 1", conv(stride=0)),
        (TypeError, "binary_conv2d: padding: expected an int or two", conv(padding="same")),
        (ValueError, "binary_conv2d: x: expected at least the extent", conv(dilation=3)),
        (ValueError, "binary_conv2d: bits: expected at least one row", conv(bits=bits[:, :0])),
        (TypeError, "binary_conv2d: scale: expected torch.float32, got torch.float64",
         conv(scale=vector.double())),
        (ValueError, r"binary_conv2d: bias: expected shape \(8,\)", conv(bias=short)),
        (RuntimeError, "binary_conv2d: scale: expected a tensor without gradient",
         conv(scale=vector.clone().requires_grad_())),
        (TypeError, "binary_conv2d: out_dtype", conv(out_dtype=torch.int32)),
        (ValueError, "binary_conv2d: threshold: expected no scale",
         conv(scale=vector, threshold=threshold)),
        (TypeError, "binary_conv2d: threshold: expected two tensors", conv(threshold=vector)),
        (TypeError, "binary_conv2d: threshold: expected torch.int16 or",
         conv(threshold=(vector, threshold[1]))),
        (ValueError, "binary_conv2d: flip: expected shape",
         conv(threshold=(threshold[0], threshold[1][:3]))),
        (TypeError, "sign_threshold: scale: expected float32 or",
         lambda: ops.sign_threshold(bits, bits, 9)),
        (TypeError, "sign_threshold: bias: expected torch.float32 as scale",
         lambda: ops.sign_threshold(vector, vector.double(), 9)),
        (ValueError, "sign_threshold: bias: expected shape",
         lambda: ops.sign_threshold(vector, short, 9)),
        (ValueError, "sign_threshold: taps: expected 1 to",
         lambda: ops.sign_threshold(vector, vector, 0)),
        (TypeError, "sign_threshold: taps: expected an int",
         lambda: ops.sign_threshold(vector, vector, 9.0)),
    ]:  # fmt: skip
        with pytest.raises(error, match=message):
            call()
    huge = torch.zeros(1, 1, 1, 1 << 18, dtype=torch.int64)
    with pytest.raises(ValueError, match="binary_conv2d: expected a sum of at most 16777216"):
        conv(huge.view(1, 1, 1, -1), huge.expand(1, 2, 1, -1), 1 << 24, k=(2, 1), padding=1)()


@pytest.mark.skipif("cpu" not in _native.served, reason="needs the CPU kernels")
def test_errors_of_the_kernels():
    """Of those who call torch.ops: a message that names the op, and nothing is read."""
    named = torch.ops.fastbandit
    x, bits = torch.randn(2, 70, 6, 5), ops.pack_sign(torch.randn(2, 70, 6, 5))
    weight, vector = ops.pack_sign(torch.randn(8, 70, 3, 3)), torch.randn(8)
    rest = ([1, 1], [0, 0], [1, 1])
    plain = (None, None, torch.float32)
    start = (bits, weight, 70, *rest, 1, False)
    threshold = ops.sign_threshold(vector, vector, 9)
    for message, call in [
        ("pack_sign: x: expected float32", lambda: named.pack_sign(bits, None)),
        ("pack_sign: x: expected .N, C, H, W. with", lambda: named.pack_sign(x[:, :0], None)),
        ("pack_sign: threshold: expected one for each",
         lambda: named.pack_sign(x, torch.zeros(8))),
        ("unpack_sign: bits: expected .N, H, W, 1.",
         lambda: named.unpack_sign(bits, 64, torch.float32, torch.channels_last)),
        ("binary_conv2d: weight_bits: expected .C_out, kh, kw, 2.",
         lambda: named.binary_conv2d(bits, weight[..., :1], 70, *rest, 1, False, *plain)),
        ("binary_conv2d: weight_bits: expected .1, kh, kw, 2.",
         lambda: named.binary_conv2d(bits, weight, 70, *rest, 70, False, *plain)),
        ("binary_conv2d: groups: expected 1 or 70",
         lambda: named.binary_conv2d(bits, weight, 70, *rest, 2, False, *plain)),
        ("binary_conv2d: scale: expected .8.",
         lambda: named.binary_conv2d(*start, vector[1:], None, x.dtype)),
        ("binary_conv2d: bias: expected float32, got float64",
         lambda: named.binary_conv2d(*start, None, vector.double(), x.dtype)),
        ("binary_conv2d: out_dtype", lambda: named.binary_conv2d(*start, None, None, torch.int32)),
        ("binary_conv2d_bits: threshold: expected int16 or int32, got float32",
         lambda: named.binary_conv2d_bits(*start, vector, threshold[1])),
        ("binary_conv2d_bits: flip: expected .8.",
         lambda: named.binary_conv2d_bits(*start, threshold[0], threshold[1][:3])),
    ]:  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            call()
