"""fastbandit.ops.avg_pool2d: torch's numbers on every route, by hand, errors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastbandit import ops


def by_definition(x, stride):
    return F.avg_pool2d(x, 3, stride, 1, count_include_pad=False)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (32, 16, 16, 16), (1, 1, 1, 1), (0, 3, 4, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_torch(shape, stride, layout, device):
    x = torch.randn(shape, device=device).contiguous(memory_format=layout).requires_grad_()
    y, expected = ops.avg_pool2d(x, stride), by_definition(x, stride)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(expected)
    (one,), (other,) = (torch.autograd.grad(z, x, grad) for z in (y, expected))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_padding_is_not_counted():
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0]])[None, None]
    assert ops.avg_pool2d(x).tolist() == [[[[3.0, 3.0], [3.0, 3.0]]]]
    assert ops.avg_pool2d(x, 2).tolist() == [[[[3.0]]]]


def test_errors():
    with pytest.raises(TypeError, match="avg_pool2d: x"):
        ops.avg_pool2d([1.0])
    with pytest.raises(ValueError, match="avg_pool2d: stride: expected 1 or 2, got 3"):
        ops.avg_pool2d(torch.zeros(1, 1, 3, 3), 3)
