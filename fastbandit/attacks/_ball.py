"""Steps and projections in the L-infinity and the L2 ball, image by image.

The sums over an image are taken in float64 and rounded once, so that they do not depend on the
batch that the image stands in.
"""

from __future__ import annotations

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
) -> Tensor:
    """A perturbation drawn uniformly from the ball, then brought into the bounds."""
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
    scale = epsilon * radius ** (1 / max(pixels, 1)) / length
    delta = (draws * scale[:, None]).to(images.dtype).view(images.shape)
    return _into_bounds(delta, images, lower, upper)
