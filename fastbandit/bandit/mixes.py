"""Paths with a mix of operations of their own: a draw of shares, then an arm for each row by them.

Uniform draws give every path nearly the same number of each arm, so that what an arm is worth on
average hardly shows. Here the shares w of the arms come from a Dirichlet law with one concentration
for all, and each row draws its arm with the probabilities w.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["GAMMA_UNIFORMS", "draw", "mix_shares", "random_mix"]

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


def mix_shares(concentration: float, uniform: Tensor, alive: Tensor) -> Tensor:
    """The law of each row from one draw of shares, float64 [..., rows, arms].

    The shares are those of a Dirichlet law; on each row they are divided by the sum of those of the
    arms alive there.

    Args:
        concentration: of every arm, > 0; the smaller, the fewer arms have most of a path.
        uniform: float64 [..., arms, :data:`GAMMA_UNIFORMS`], in [0, 1).
        alive: bool [..., rows, arms].
    """
    draws = _log_gamma_draws(concentration, uniform).unsqueeze(-2)
    return torch.where(alive, draws, -torch.inf).softmax(-1)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """An arm of each row by its law, int64 [..., rows].

    Args:
        probabilities: [..., rows, arms], 0 for arms that cannot be drawn.
        uniform: [..., rows], in [0, 1).
    """
    sums = probabilities.cumsum(-1)
    # The last sum divided by itself is 1, above every uniform number.
    return (sums / sums[..., -1:] > uniform.unsqueeze(-1)).int().argmax(-1)


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

    alive = torch.ones((rows, arms), dtype=torch.bool)
    shares = mix_shares(concentration, uniform(arms, GAMMA_UNIFORMS), alive)
    return draw(shares, uniform(rows))
