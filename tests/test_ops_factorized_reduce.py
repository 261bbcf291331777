"""fastbandit.ops.factorized_reduce: torch's numbers on every route, and the same errors on each."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbandit import ops
from fastbandit.ops.factorized_reduce import as_term

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def by_definition(x, even, odd):
    h, w = x.shape[2:]
    a = F.pad(F.relu(x), (0, w % 2, 0, h % 2))
    halves = [] if even is None else [F.conv2d(a[:, :, :h, :w], even, stride=2)]
    return torch.cat([*halves, F.conv2d(a[:, :, 1:, 1:], odd, stride=2)], 1)


def weights(channels, device):
    half = channels // 2
    even = torch.randn(half, channels, 1, 1, device=device) if half else None
    return even, torch.randn(channels - half, channels, 1, 1, device=device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 6, 8, 8), (3, 5, 7, 4), (1, 1, 3, 3), (4, 16, 9, 9)])
def test_values_and_gradients_are_those_of_torch(shape, layout, device):
    torch.manual_seed(0)
    x = torch.randn(shape, device=device).contiguous(memory_format=layout).requires_grad_()
    even, odd = weights(shape[1], device)
    y, expected = ops.factorized_reduce(x, even, odd), by_definition(x, even, odd)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(expected)
    (one,), (other,) = (torch.autograd.grad(z, x, grad) for z in (y, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_normalisation_is_that_of_a_conv_block(layout, device):
    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 8, device=device).contiguous(memory_format=layout)
    even, odd = weights(6, device)
    plain = by_definition(x, even, odd)
    y = ops.factorized_reduce(x, even, odd, normalize=True)
    torch.testing.assert_close(y, F.batch_norm(plain, None, None, None, None, True), atol=1e-4,
                               rtol=1e-4)  # fmt: skip
    bias = torch.randn(6, device=device)
    y = ops.factorized_reduce(x, even, odd, bias=bias)
    torch.testing.assert_close(y, plain + bias.view(-1, 1, 1), atol=1e-5, rtol=1e-5)
    y = ops.factorized_reduce(x, even, odd, norm=torch.tanh)
    torch.testing.assert_close(y, plain.tanh(), atol=1e-5, rtol=1e-5)


def fold(weight):
    return weight, weight.new_zeros(len(weight))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fold": fold}, ValueError, "norm, fold: expected norm alone or both"),
        ({"weight": torch.ones(6)}, ValueError, "weight: expected None without normalize"),
        ({"normalize": True, "norm": torch.tanh}, ValueError, "norm, fold: expected norm alone"),
        ({"norm": torch.tanh, "bias": torch.ones(6)}, ValueError, "bias: expected None with norm"),
        ({"momentum": "x"}, TypeError, "momentum"),
        ({"stride": 2}, TypeError, "stride"),
    ],
)
def test_errors_do_not_depend_on_the_layout(layout, options, error, message):
    x = torch.randn(2, 6, 4, 4).contiguous(memory_format=layout)
    even, odd = weights(6, "cpu")
    with pytest.raises(error, match=message):
        ops.factorized_reduce(x, even, odd, **options)


def test_what_is_no_tensor_is_refused():
    even, odd = weights(6, "cpu")
    with pytest.raises(TypeError, match="factorized_reduce: x: expected a tensor"):
        ops.factorized_reduce(None, even, odd)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_conv_block_refuses_a_bias_beside_a_norm(layout):
    """Folded, the norm would have replaced it."""
    x = torch.randn(2, 6, 4, 4).contiguous(memory_format=layout)
    with pytest.raises(ValueError, match="bias: expected None with norm"):
        ops.conv_block(x, torch.randn(6, 6, 1, 1), bias=torch.ones(6), norm=torch.tanh, fold=fold)


@pytest.mark.parametrize("size", [(2, 8, 8), (1, 7, 5)])
@pytest.mark.parametrize("widths", [(16, 16), (64, 3, 5)])
def test_several_maps_and_halves_one_by_one_are_the_same_bits(widths, size, device):
    """Maps side by side as one; without gradient, where each half is computed by itself."""
    torch.manual_seed(0)
    n, height, width = size
    maps = [
        torch.randn(n, c, height, width, device=device).to(memory_format=torch.channels_last)
        for c in widths
    ]
    even, odd = weights(sum(widths), device)
    scale = torch.linspace(0.5, 2.0, sum(widths), device=device)

    def scaled(weight):
        joined = torch.cat(weight) if isinstance(weight, tuple) else weight
        return joined * scale.view(-1, 1, 1, 1), scale - 1

    how = {"fold": scaled, "norm": lambda y: y * scale.view(-1, 1, 1) + (scale - 1).view(-1, 1, 1)}
    joined = torch.cat(maps, 1)
    expected = how["norm"](by_definition(joined, even, odd))
    results = []
    for x in (joined, maps):
        for gradient in (False, True):
            with torch.set_grad_enabled(gradient):
                results.append(as_term(x, even, odd, **how))
    for y in results:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        if device.type == "cpu":
            assert torch.equal(y, results[0])
