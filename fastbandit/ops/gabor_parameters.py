"""The parameters of Gabor filters from numbers that an optimiser may make anything of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastbandit.ops import _convolution
from fastbandit.ops._linf import check_number
from fastbandit.ops._register import (
    below_autograd,
    define,
    differentiated_by_torch,
    refuse_second_derivative,
)
from fastbandit.ops.gabor import check_vectors

__all__ = ["gabor_parameters"]

Four = tuple[Tensor, Tensor, Tensor, Tensor]
Interval = tuple[float, float]

_NAMES = ("theta", "sigma", "gamma", "wavelength")


# --- References -----------------------------------------------------------------------------------


def _between(least: float, more: float, t: Tensor) -> Tensor:
    s = torch.sigmoid(t)
    return least + (s if more == 1.0 else more * s)


def _reference(
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    least_sigma: float,
    more_sigma: float,
    least_wavelength: float,
    more_wavelength: float,
) -> Four:
    return (
        2.0 * math.pi * torch.sigmoid(theta),
        _between(least_sigma, more_sigma, sigma),
        1.0 + 0.5 * gamma,
        _between(least_wavelength, more_wavelength, wavelength),
    )


def _backward_reference(
    by_theta: Tensor | None,
    by_sigma: Tensor | None,
    by_gamma: Tensor | None,
    by_wavelength: Tensor | None,
    theta: Tensor,
    sigma: Tensor,
    wavelength: Tensor,
    more_sigma: float,
    more_wavelength: float,
) -> Four:
    def logistic(grad: Tensor | None, t: Tensor, factor: float) -> Tensor:
        if grad is None:
            return torch.zeros_like(t, memory_format=torch.contiguous_format)
        s = torch.sigmoid(t)
        return ((grad * factor) * (1.0 - s) * s).contiguous()

    half = torch.zeros_like(theta) if by_gamma is None else by_gamma * 0.5
    return (
        logistic(by_theta, theta, 2.0 * math.pi),
        logistic(by_sigma, sigma, more_sigma),
        half.contiguous(),
        logistic(by_wavelength, wavelength, more_wavelength),
    )


# --- Fake kernels ---------------------------------------------------------------------------------


def _fake(theta: Tensor, *_: Any) -> Four:
    a, b, c, d = (theta.new_empty(theta.shape) for _ in range(4))
    return a, b, c, d


def _backward_fake(
    by_theta: Tensor | None,
    by_sigma: Tensor | None,
    by_gamma: Tensor | None,
    by_wavelength: Tensor | None,
    theta: Tensor,
    *_: Any,
) -> Four:
    return _fake(theta)


# --- The ops --------------------------------------------------------------------------------------


class _GaborParameters(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        sigma: Tensor,
        gamma: Tensor,
        wavelength: Tensor,
        least_sigma: float,
        more_sigma: float,
        least_wavelength: float,
        more_wavelength: float,
    ) -> Four:
        ctx.save_for_backward(theta, sigma, wavelength)
        ctx.factors = more_sigma, more_wavelength
        ctx.set_materialize_grads(False)
        parameters: Four = below_autograd(
            _forward,
            *(theta, sigma, gamma, wavelength),
            *(least_sigma, more_sigma, least_wavelength, more_wavelength),
        )
        return parameters

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        for grad in grads:
            if grad is not None:
                refuse_second_derivative("gabor_parameters", grad)
        results = below_autograd(_backward, *grads, *ctx.saved_tensors, *ctx.factors)
        return (
            *(
                one if want and grad is not None else None
                for one, want, grad in zip(results, ctx.needs_input_grad[:4], grads, strict=True)
            ),
            *[None] * 4,
        )


_forward = define(
    "gabor_parameters",
    "(Tensor theta, Tensor sigma, Tensor gamma, Tensor wavelength, float least_sigma, "
    "float more_sigma, float least_wavelength, float more_wavelength) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    autograd=_GaborParameters,
)
_backward = define(
    "gabor_parameters_backward",
    "(Tensor? by_theta, Tensor? by_sigma, Tensor? by_gamma, Tensor? by_wavelength, Tensor theta, "
    "Tensor sigma, Tensor wavelength, float more_sigma, float more_wavelength) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _backward_reference,
    _backward_fake,
)


# --- Public function ------------------------------------------------------------------------------


def gabor_parameters(
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    *,
    sigma_interval: Interval = (0.5, 1.0),
    wavelength_interval: Interval = (2.0, 4.0),
) -> Four:
    """What :func:`gabor_filters` is given, from any real numbers; differentiable once.

    With the logistic function s, an interval being its least value and how long it is:

        theta       2 pi s(t)
        sigma       least + length s(t)
        gamma       1 + t / 2
        wavelength  least + length s(t)

    On CUDA one kernel, and one for the gradients, in place of nine operations and their nine. On a
    CPU, where the call of an op costs more than those, torch's operations compute it.

    Args:
        theta, sigma, gamma, wavelength: [C_out] each; float32, float64, bfloat16 or float16, all
            alike.
        sigma_interval, wavelength_interval: (least, length).

    Returns:
        theta, sigma, gamma and wavelength, like the arguments.

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: shapes differ.
        RuntimeError: devices differ, or on CUDA a second derivative is asked for.
    """
    op = "gabor_parameters"
    given = (theta, sigma, gamma, wavelength)
    check_vectors(op, _NAMES, given)
    for name, interval in (
        ("sigma_interval", sigma_interval),
        ("wavelength_interval", wavelength_interval),
    ):
        if not isinstance(interval, tuple) or len(interval) != 2:
            raise TypeError(f"{op}: {name}: expected two numbers, got {interval!r}")
        for number in interval:
            check_number(op, name, number)
    return computed(*given, sigma_interval, wavelength_interval)


def computed(
    theta: Tensor,
    sigma: Tensor,
    gamma: Tensor,
    wavelength: Tensor,
    sigma_interval: Interval,
    wavelength_interval: Interval,
) -> Four:
    """:func:`gabor_parameters` of arguments that are known to be right, as those of layers are."""
    arguments = (theta, sigma, gamma, wavelength, *sigma_interval, *wavelength_interval)
    if (
        theta.is_cuda
        and not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and _convolution.registered("gabor_parameters", theta)
        and not differentiated_by_torch()
    ):
        parameters: Four = _forward(*arguments)
        return parameters
    return _reference(*arguments)
