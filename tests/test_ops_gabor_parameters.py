"""fastbandit.ops.gabor_parameters against the operations that it stands for."""

from __future__ import annotations

import importlib
import math
import re

import pytest
import torch

from fastbandit import ops
from fastbandit.nn.gabor import Gabor
from fastbandit.ops._register import OPERATORS

module = importlib.import_module("fastbandit.ops.gabor_parameters")
OP = OPERATORS["gabor_parameters"]
BACKWARD = OPERATORS["gabor_parameters_backward"]
INTERVALS = {"pixels": (0.5, 1.0, 2.0, 4.0), "released": (0.1, 0.4, 0.001, 0.999)}


def numbers(count, dtype, device):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(count, generator=generator).to(device, dtype) for _ in range(4)]


def by_hand(theta, sigma, gamma, wavelength, kind):
    if kind == "pixels":
        sigma = 0.5 + torch.sigmoid(sigma)
        wavelength = 2.0 + 4.0 * torch.sigmoid(wavelength)
    else:
        sigma = 0.1 + 0.4 * torch.sigmoid(sigma)
        wavelength = 0.001 + 0.999 * torch.sigmoid(wavelength)
    return 2.0 * math.pi * torch.sigmoid(theta), sigma, 1.0 + 0.5 * gamma, wavelength


def pairs(kind):
    least, more, shortest, longer = INTERVALS[kind]
    return {"sigma_interval": (least, more), "wavelength_interval": (shortest, longer)}


@pytest.mark.parametrize("kind", INTERVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_on_a_cpu_the_bits_are_those_of_the_operations(dtype, kind):
    """What a search on a CPU records does not depend on who computes the parameters."""
    given = [t.requires_grad_() for t in numbers(37, dtype, "cpu")]
    found, wanted = ops.gabor_parameters(*given, **pairs(kind)), by_hand(*given, kind)
    grads = numbers(37, dtype, "cpu")
    by, expected = (torch.autograd.grad(values, given, grads) for values in (found, wanted))
    for one, other in zip((*found, *by), (*wanted, *expected), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", INTERVALS)
def test_the_layer_takes_its_intervals(kind):
    layer = Gabor(5, kind)
    given = (layer.theta, layer.sigma, layer.gamma, layer.wavelength)
    for one, other in zip(layer.filter_parameters(), (*by_hand(*given, kind), layer.psi),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", INTERVALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_op_and_its_gradients(device, dtype, kind):
    """The op itself, which Python takes on CUDA alone."""
    given = [t.requires_grad_() for t in numbers(300, dtype, device)]
    found = OP(*given, *INTERVALS[kind])
    double = [t.detach().double().requires_grad_() for t in given]
    wanted = by_hand(*double, kind)
    grads = numbers(300, dtype, device)
    by = torch.autograd.grad(found, given, grads)
    expected = torch.autograd.grad(wanted, double, [g.double() for g in grads])
    # Where s is near 1, most digits of 1 - s are lost, here as in torch.
    tolerance = 1e-12 if dtype == torch.float64 else 5e-6
    for one, other in zip((*found, *by), (*wanted, *expected), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance)


def test_a_gradient_that_nobody_gives_or_wants(device):
    theta, sigma, gamma, wavelength = numbers(5, torch.float64, device)
    sigma.requires_grad_(), gamma.requires_grad_(), theta.requires_grad_()
    _, by_sigma, by_gamma, by_wavelength = OP(theta, sigma, gamma, wavelength, *INTERVALS["pixels"])
    (by_sigma.sum() + by_wavelength.sum() + (by_gamma * 2).sum()).backward()
    assert theta.grad is None
    assert wavelength.grad is None
    s = torch.sigmoid(sigma.detach())
    torch.testing.assert_close(sigma.grad, s * (1 - s))
    torch.testing.assert_close(gamma.grad, torch.ones_like(gamma))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(device, dtype):
    given = numbers(6, dtype, device)
    grads = (given[0], None, *given[1:3])
    torch.library.opcheck(BACKWARD, (*grads, *given[:3], 1.0, 4.0))
    given = [t.requires_grad_() for t in given]
    torch.library.opcheck(OP, (*given, *INTERVALS["pixels"]))


def test_vectors_that_lie_apart(device):
    columns = torch.stack(numbers(6, torch.float32, device), dim=1)
    apart = OP(*columns.unbind(1), *INTERVALS["pixels"])
    for one, other in zip(apart, OP(*columns.t().contiguous().unbind(0), *INTERVALS["pixels"]),
                          strict=True):  # fmt: skip
        assert torch.equal(one, other)
        assert one.is_contiguous()


def test_a_compiler_sees_the_operations(device):
    torch._dynamo.reset()
    compiled = torch.compile(ops.gabor_parameters, fullgraph=True, backend="aot_eager")
    given = numbers(4, torch.float32, device)
    for one, other in zip(compiled(*given), by_hand(*given, "pixels"), strict=True):
        torch.testing.assert_close(one, other)


def test_a_kernel_of_cuda_is_taken(monkeypatch):
    """Where there is one; a CPU is told here that it is a GPU."""
    calls = []
    monkeypatch.setattr(module, "_forward", lambda *given: calls.append(given) or (1, 2, 3, 4))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.Tensor, "is_cpu", property(lambda self: False))
    given = numbers(4, torch.float32, "cpu")
    for there, taken in ((True, 1), (False, 1)):
        monkeypatch.setattr(module._convolution, "_registered", lambda op, key, there=there: there)
        ops.gabor_parameters(*given)
        assert len(calls) == taken
    assert calls[0][4:] == INTERVALS["pixels"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"theta": 1.0}, TypeError, "theta: expected a tensor"),
        ({"theta": torch.ones(4).int()}, TypeError, "theta: expected float32.*got torch.int32"),
        ({"theta": torch.ones(4, 1)}, ValueError, r"theta: expected shape \(C_out,\)"),
        ({"gamma": torch.ones(4).double()}, TypeError, "gamma: expected torch.float32 as theta"),
        ({"sigma": torch.ones(5)}, ValueError, r"sigma: expected shape \(4,\) as theta"),
        (
            {"wavelength": torch.ones(4, device="meta")},
            RuntimeError,
            "wavelength: expected device cpu as theta, got meta",
        ),
        ({"sigma_interval": 1.0}, TypeError, "sigma_interval: expected two numbers, got 1.0"),
        ({"wavelength_interval": ("a", 1)}, TypeError, "wavelength_interval: expected a number"),
    ],
)
def test_errors(change, error, message):
    given = dict.fromkeys(("theta", "sigma", "gamma", "wavelength"), torch.ones(4))
    with pytest.raises(error, match=re.compile(f"^gabor_parameters: {message}")):
        ops.gabor_parameters(**(given | change))
