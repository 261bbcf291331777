"""Steps and projections in the L-infinity and the L2 ball, image by image.

The sums over an image are taken in float64 and rounded once, so that they do not depend on the
batch that the image stands in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.attacks import _draws


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """``value`` [N] shaped to broadcast over the pixels of ``like``, in its dtype."""
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def l2_norm(x: Tensor) -> Tensor:
    """The 2-norm of each image, float64 [N]."""
    return x.flatten(1).double().square().sum(1).sqrt()


def direction(gradient: Tensor, norm: str) -> Tensor:
    """The step of size 1 that the linear model of the loss asks for; zero where it is flat."""
    if norm == "linf":
        return gradient.sign()
    length = l2_norm(gradient)
    return gradient * per_image(torch.where(length > 0, 1 / length, 0.0), gradient)


def _into_bounds(delta: Tensor, images: Tensor, lower: float | None, upper: float | None) -> Tensor:
    # Towards zero in each pixel, so no norm grows.
    if lower is not None:
        delta = torch.maximum(delta, lower - images)
    if upper is not None:
        delta = torch.minimum(delta, upper - images)
    return delta


def project(
    delta: Tensor,
    images: Tensor,
    norm: str,
    epsilon: float,
    lower: float | None = 0.0,
    upper: float | None = 1.0,
) -> Tensor:
    """``delta`` brought into the ball, then x + delta into the bounds."""
    if norm == "linf":
        return _into_bounds(delta.clamp(-epsilon, epsilon), images, lower, upper)
    length = l2_norm(delta)
    factor = torch.where(length > epsilon, epsilon / length, 1.0)
    return _into_bounds(delta * per_image(factor, delta), images, lower, upper)


def step_(
    delta: Tensor,
    gradient: Tensor,
    images: Tensor,
    *,
    norm: str,
    step_size: float,
    epsilon: float,
    lower: float | None,
    upper: float | None,
) -> None:
    """One step of ascent and the projection, in place."""
    if norm == "linf":
        ops.pgd_step_(
            delta,
            gradient,
            images,
            step_size=step_size,
            epsilon=epsilon,
            lower=lower,
            upper=upper,
        )
        return
    moved = delta + step_size * direction(gradient, norm)
    delta.copy_(project(moved, images, norm, epsilon, lower, upper))


def start(
    images: Tensor,
    *,
    norm: str,
    epsilon: float,
    lower: float | None,
    upper: float | None,
    seed: int,
    index: Tensor | None,
    offset: int | Tensor,
    reach: float = math.inf,
) -> Tensor:
    """A random perturbation in the ball, then brought into the bounds.

    In L-infinity it is uniform in the ball. In L2 its direction is uniform and so is its radius,
    in [0, epsilon]. A point drawn uniformly from a ball of 64 dimensions or more is all but on the
    surface and nearly at a right angle to the gradient, and the attack spends its steps on turning.
    PGD-20 of 400 digits at epsilon 1 left 14 % to 45 % standing from there, on five networks, where
    its steps together are as long as epsilon, and 6 % to 34 % from the uniform radius; where they
    are 2.5 epsilon long, 2 % to 20 % and 1 % to 18 %.

    Args:
        reach: how far the steps of the attack go together. In L2 an attack that falls short of the
            surface begins so near to it that it can arrive: the radius is at least epsilon - reach.
    """
    if norm == "linf":
        return ops.random_start(
            images,
            epsilon=epsilon,
            seed=seed,
            index=index,
            offset=offset,
            lower=lower,
            upper=upper,
        )
    if index is None:
        index = torch.arange(len(images), device=images.device)
    pixels = images[0].numel() if len(images) else 0
    draws = _draws.normal(seed, index, pixels, offset)
    # The radius has words of its own, behind those of the pixels.
    radius = _draws.uniform(seed, index, 1, offset + (1 << 31))[:, 0]
    length = draws.square().sum(1).sqrt()
    nearest = max(0.0, epsilon - reach)
    scale = (nearest + (epsilon - nearest) * radius) / length
    delta = (draws * scale[:, None]).to(images.dtype).view(images.shape)
    return _into_bounds(delta, images, lower, upper)
