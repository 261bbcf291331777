"""The ball that an attack stays in: starts, steps and projections in both norms, image by image.

The sums over an image are taken in float64 and rounded once, so that they do not depend on the
batch that the image stands in. Images in bfloat16 and float16 are attacked in float32: ``wide``
says what an image is computed in, ``point_of`` brings x + delta back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from fastbandit import ops
from fastbandit.attacks import _draws
from fastbandit.ops import _linf
from fastbandit.threat import NORM_NAMES, format_fraction

# A perturbation of this share of epsilon is within the L2 ball after each pixel is rounded to
# float32, and its norm is at most epsilon however its squares are summed in float32.
_INSIDE = 1 - 2.0**-20

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def wide(tensor: Tensor) -> Tensor:
    """float32 of bfloat16 and float16; other dtypes as they are."""
    return tensor.float() if tensor.dtype in _linf.HALF_TYPES else tensor


def point_of(images: Tensor, delta: Tensor, dtype: torch.dtype) -> Tensor:
    """The images at x + delta in ``dtype``, no pixel farther from x than ``delta`` says.

    The sum is rounded to the nearest value, and where that lies beyond the perturbation, to the
    next one toward the image. So abs(point - x), computed in the dtype of ``images``, is at most
    abs(delta).

    Args:
        images, delta: of one shape, finite, both float32 or both float64.
        dtype: that of ``images``, or bfloat16 or float16 with images that it holds exactly.
    """
    nearest = (images + delta).to(dtype)
    reached = nearest.to(images.dtype)
    beyond = (reached - images).abs() > delta.abs()
    # The encoding is sign and magnitude: one more in the bits is the next value away from zero.
    bits = nearest.view(_BITS[nearest.element_size()])
    one = beyond.to(bits.dtype)
    grows = (reached > images) == reached.signbit()
    return (bits + torch.where(grows, one, -one)).view(dtype)


def perturbed(images: Tensor, delta: Tensor) -> Tensor:
    """``images + delta`` as training uses it; bfloat16 and float16 as by :func:`point_of`.

    In float32 and float64 it is the plain sum, which half a unit in the last place may take out of
    the ball: that is what the fused step writes too.
    """
    if images.dtype not in _linf.HALF_TYPES:
        return images + delta
    return point_of(wide(images), wide(delta), images.dtype)


def per_image(value: Tensor, like: Tensor) -> Tensor:
    """``value`` [N] shaped to broadcast over the pixels of ``like``, in its dtype."""
    return value.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def l2_norm(x: Tensor) -> Tensor:
    """The 2-norm of each image, float64 [N]."""
    return x.flatten(1).double().square().sum(1).sqrt()


def _scaled(gradient: Tensor) -> Tensor:
    """The gradient over its largest finite magnitude in the image, in [-1, 1].

    NaN is 0 and an infinity counts as that largest magnitude, so one such pixel leaves the others
    their steps. The scale keeps the norms of tiny and huge gradients within the dtype.
    """
    gradient = wide(gradient)
    size = gradient.abs()
    largest = torch.where(size.isfinite(), size, 0.0).flatten(1).amax(1)
    scale = per_image(torch.where(largest > 0, largest, 1.0), gradient)
    return (gradient / scale).nan_to_num(nan=0.0, posinf=1.0, neginf=-1.0)


def of_sum_one(gradient: Tensor) -> Tensor:
    """The gradient over its 1-norm in each image; pixels that are not finite as in `_scaled`."""
    scaled = _scaled(gradient)
    length = scaled.flatten(1).double().abs().sum(1)
    return scaled * per_image(torch.where(length > 0, 1 / length, 0.0), scaled)


@dataclass(frozen=True)
class Ball:
    """The perturbations that an attack may choose: those of norm ``epsilon`` within the bounds.

    Args:
        norm: ``"linf"`` or ``"l2"``.
        radius: epsilon, exact where the threat model is.
        lower, upper: bounds of x + delta; None for none.

    Attributes:
        epsilon: the radius as the float that is computed with.
    """

    norm: str
    radius: Fraction | float
    lower: float | None = 0.0
    upper: float | None = 1.0
    epsilon: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", float(self.radius))  # the class is frozen

    def start(
        self,
        images: Tensor,
        *,
        seed: int,
        index: Tensor | None,
        offset: int | Tensor,
        reach: float = math.inf,
    ) -> Tensor:
        """A random perturbation in the ball, then brought into the bounds.

        In L-infinity it is uniform in the ball. In L2 its direction is uniform and so is its
        radius, in [0, epsilon]: a point drawn uniformly from a ball of many dimensions is all but
        on the surface and nearly at a right angle to the gradient, and the attack spends its steps
        on turning (docs/evaluate.md).

        Args:
            seed, index, offset: key of the draw, as in :func:`fastbandit.ops.random_start`.
            reach: how far the steps of the attack go together. In L2 an attack that falls short of
                the surface begins so near to it that it can arrive: the radius is at least
                epsilon - reach.
        """
        if self.norm == "linf":
            return ops.random_start(
                images,
                epsilon=self.epsilon,
                seed=seed,
                index=index,
                offset=offset,
                lower=self.lower,
                upper=self.upper,
            )
        if index is None:
            index = torch.arange(len(images), device=images.device)
        pixels = images[0].numel() if len(images) else 0
        draws = _draws.normal(seed, index, pixels, offset)
        # The radius has words of its own, behind those of the pixels.
        radius = _draws.uniform(seed, index, 1, offset + (1 << 31))[:, 0]
        length = draws.square().sum(1).sqrt()
        limit = self.epsilon * _INSIDE
        nearest = max(0.0, limit - reach)
        scale = (nearest + (limit - nearest) * radius) / length
        x = wide(images)
        delta = (draws * scale[:, None]).to(x.dtype).view(images.shape)
        return _linf.round_toward_zero(self._into_bounds(delta, x), images.dtype)

    def step_(self, delta: Tensor, gradient: Tensor, images: Tensor, size: float) -> None:
        """One step of ascent and the projection, in place; bfloat16 and float16 toward zero."""
        if self.norm == "linf":
            # A gradient that is NaN takes no step there.
            ops.pgd_step_(
                delta,
                gradient.to(delta.dtype),
                images,
                step_size=size,
                epsilon=self.epsilon,
                lower=self.lower,
                upper=self.upper,
            )
            return
        after = wide(delta) + size * self.direction(gradient)
        delta.copy_(_linf.round_toward_zero(self.project(after, wide(images)), delta.dtype))

    def direction(self, gradient: Tensor) -> Tensor:
        """The step of size 1 that the linear model of the loss asks for; zero where it is flat.

        A pixel whose gradient is NaN takes no step, an infinite one that of its sign.
        """
        if self.norm == "linf":
            return wide(gradient).sign()
        scaled = _scaled(gradient)
        length = l2_norm(scaled)
        return scaled * per_image(torch.where(length > 0, 1 / length, 0.0), scaled)

    def project(self, delta: Tensor, images: Tensor) -> Tensor:
        """``delta`` brought into the ball, then x + delta into the bounds; float32 or float64.

        Both as computed in float32 (float64): in L-infinity no pixel exceeds epsilon rounded to
        that dtype, in L2 the norm stays below it.
        """
        if self.norm == "linf":
            return self._into_bounds(delta.clamp(-self.epsilon, self.epsilon), images)
        limit = self.epsilon * _INSIDE
        length = l2_norm(delta)
        factor = torch.where(length > limit, limit / length, 1.0)
        return self._into_bounds(delta * per_image(factor, delta), images)

    def _into_bounds(self, delta: Tensor, images: Tensor) -> Tensor:
        # Towards zero in each pixel, so no norm grows; a pixel outside the bounds goes no farther.
        if self.lower is not None:
            delta = torch.maximum(delta, (self.lower - images).clamp_(max=0.0))
        if self.upper is not None:
            delta = torch.minimum(delta, (self.upper - images).clamp_(min=0.0))
        return delta

    def describe(self) -> str:
        """Norm and radius, for people."""
        return f"{NORM_NAMES[self.norm]}, epsilon {format_fraction(Fraction(self.radius))}"
