"""Learnable Gabor filters, and the block around them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.nn.blocks import Residual
from fastbandit.nn.cell import summand
from fastbandit.operations import GaborKind, check_option
from fastbandit.ops.gabor_parameters import computed as parameters_of

__all__ = [
    "Gabor",
    "GaborBlock",
]

# Of sigma and of the wavelength: the least value, and by how much more it may be.
_INTERVALS: dict[GaborKind, tuple[tuple[float, float], tuple[float, float]]] = {
    "pixels": ((0.5, 1.0), (2.0, 4.0)),
    "released": ((0.1, 0.4), (0.001, 0.999)),
}


class Gabor(nn.Module):
    """A bank of ``channels`` Gabor filters, the same for every input channel.

    Five learnable vectors ``t`` are mapped to the parameters of the filters (s is the logistic
    function; lengths in pixels):

    ============ ========================= ========================= ==================
    parameter    ``pixels`` (default)      ``released``              t starts as
    ============ ========================= ========================= ==================
    theta        2 pi s(t)                 2 pi s(t)                 N(0, 1)
    sigma        0.5 + s(t)                0.1 + 0.4 s(t)            N(0, 1)
    wavelength   2 + 4 s(t)                0.001 + 0.999 s(t)        U(0, 1)
    gamma        1 + t / 2                 1 + t / 2                 0
    psi          t                         t                         N(0, 0.02^2)
    ============ ========================= ========================= ==================

    ``released`` is what the authors' evaluation code does; a sigma below half a pixel leaves
    little but the centre tap, which is why ``pixels`` is the default.

    Args:
        channels: filters, and so output channels; the input may have any number.
        kind: ``pixels`` or ``released``.
        kernel_size: odd.
    """

    def __init__(self, channels: int, kind: GaborKind = "pixels", kernel_size: int = 3) -> None:
        super().__init__()
        check_option("gabor", kind)
        self.kind, self.kernel_size = kind, kernel_size
        self.theta = nn.Parameter(torch.randn(channels))
        self.sigma = nn.Parameter(torch.randn(channels))
        self.wavelength = nn.Parameter(torch.rand(channels))
        self.gamma = nn.Parameter(torch.zeros(channels))
        self.psi = nn.Parameter(0.02 * torch.randn(channels))

    def filter_parameters(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """theta, sigma, gamma, wavelength, psi of each filter, [channels] each, differentiable."""
        theta, sigma, gamma, wavelength = parameters_of(
            self.theta, self.sigma, self.gamma, self.wavelength, *_INTERVALS[self.kind]
        )
        return theta, sigma, gamma, wavelength, self.psi

    def forward(self, x: Tensor) -> Tensor:
        return ops.gabor_conv2d(
            x,
            *self.filter_parameters(),
            kernel_size=self.kernel_size,
            padding=self.kernel_size // 2,
        )


@summand
class GaborBlock(Residual):
    """x + BN(gabor(x)), computed at full size and halved at stride 2; starts as the identity."""

    def __init__(self, channels: int, stride: int = 1, kind: GaborKind = "pixels") -> None:
        super().__init__(channels, stride)
        self.gabor = Gabor(channels, kind)

    def transform(self, x: Tensor) -> Tensor:
        return self.gabor(x)
