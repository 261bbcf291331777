"""Paths with a mix of operations of their own: a draw of shares, then an arm for each row by them.

Uniform draws give every path nearly the same number of each arm, so that what an arm is worth on
average hardly shows. Here the shares w of the arms come from a Dirichlet law with one concentration
for all, and each row draws its arm with the probabilities w.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GAMMA_UNIFORMS", "mix_of", "random_mix"]

# Marsaglia and Tsang accept more than 95 % of their attempts; 16 all fail once in 10^20 times.
_ATTEMPTS = 16
#: Uniform numbers that the share of each arm takes.
GAMMA_UNIFORMS = 2 * _ATTEMPTS + 1
_SMALLEST = 2.0**-54


def _log_gamma_draws(concentration: float, uniform: Tensor) -> Tensor:
    """Logarithms of draws of Gamma(concentration, 1), [...] of uniform numbers [..., 33].

    Source: Marsaglia and Tsang, "A simple method for generating gamma variables", ACM TOMS 2000,
    for the shape concentration + 1; times u^(1 / concentration) that is a draw of the shape
    concentration. A fixed number of attempts makes it a function of the numbers given.
    """
    uniform = uniform.clamp(min=_SMALLEST)
    normal = torch.special.ndtri(uniform[..., :_ATTEMPTS])
    accept = uniform[..., _ATTEMPTS : 2 * _ATTEMPTS].log()
    d = concentration + 1.0 - 1.0 / 3.0
    v = (1.0 + normal / (9.0 * d) ** 0.5) ** 3
    log_v = v.clamp(min=1e-300).log()
    good = (v > 0) & (accept < 0.5 * normal**2 + d * (1.0 - v + log_v))
    first = good.int().argmax(-1, keepdim=True)
    return (d * log_v.exp()).log().gather(-1, first).squeeze(-1) + uniform[
        ..., -1
    ].log() / concentration


def mix_of(concentration: float, uniform: Tensor, alive: Tensor | None = None) -> Tensor:
    """Shares of the arms from a Dirichlet law, float64 [..., arms], summing to 1.

    Args:
        concentration: of every arm, > 0; the smaller, the fewer arms have most of a path. With
            infinity the shares would be equal.
        uniform: float64 [..., arms, :data:`GAMMA_UNIFORMS`], in [0, 1).
        alive: bool [..., arms]; the others have no share. Default: all.
    """
    draws = _log_gamma_draws(concentration, uniform)
    if alive is not None:
        draws = torch.where(alive, draws, -torch.inf)
    return draws.softmax(-1)


def random_mix(
    rows: int, arms: int, concentration: float, generator: torch.Generator | None = None
) -> Tensor:
    """A path with a random mix of its own, int64 [rows].

    Args:
        rows, arms: of the bandit or the space.
        concentration: of the Dirichlet law, > 0, such as 0.5.
        generator: default: torch's global one.

    Raises:
        ValueError: a concentration that is not above 0.
    """
    if not 0.0 < concentration < float("inf"):
        raise ValueError(
            f"random_mix: concentration: expected a finite number > 0, got {concentration!r}"
        )

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    shares = mix_of(concentration, uniform(arms, GAMMA_UNIFORMS))
    sums = shares.cumsum(-1)
    return (sums / sums[-1] > uniform(rows, 1)).int().argmax(-1)
