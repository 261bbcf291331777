"""Attacks that follow the gradient with a fixed step: FGSM and PGD, and the loop of MI-FGSM."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.attacks._attack import Attack, AttackResult, count, from_starts
from fastbandit.attacks._losses import find_loss
from fastbandit.attacks._model import (
    LARGEST_SEED,
    Loss,
    Oracle,
    aimed,
    attack_mode,
    check_answer,
    cross_entropy,
    normal,
    with_autograd,
)
from fastbandit.attacks.ball import Ball, of_sum_one, perturbed, point_of, wide
from fastbandit.config import Radius, at_least
from fastbandit.threat import ThreatModel, parse_whole


def _start(
    images: Tensor, threat: ThreatModel, seed: int, index: Tensor | None, offset: int | Tensor
) -> Tensor:
    """The perturbation that an attack begins with, of the images' shape, dtype and layout."""
    if not (threat.random_start and threat.attacks):
        return torch.zeros_like(images)
    return threat.ball.start(
        images,
        seed=seed,
        index=index,
        offset=offset,
        reach=threat.steps * threat.step_value,
    )


def leaf(images: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """What to differentiate by, and x + delta made of it for the model, which may overwrite it."""
    if images.dtype in (torch.bfloat16, torch.float16):
        point = perturbed(images, delta).requires_grad_(True)
        return point, point.clone()
    # The gradient by delta is that by x + delta, and the sum has memory of its own.
    point = delta.detach().requires_grad_(True)
    return point, images + point


@with_autograd
def perturb(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    index: Tensor | None = None,
    offset: int | Tensor = 0,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """The perturbation delta that ``threat`` finds; lines 10 to 12 of Algorithm 8.

    delta ~ U(-epsilon, epsilon); then ``steps`` times
    delta <- clip(delta + step * sign(grad_x loss(f(x + delta), y)), -epsilon, epsilon), and
    x + delta stays within the threat's bounds. In the L2 norm the start has a uniform direction and
    a uniform radius (:meth:`fastbandit.attacks.ball.Ball.start`), the step is along the normalised
    gradient and the clip is the projection onto the ball. The loss is cross-entropy, summed, so
    that the gradient of one image does not depend on the others' number. This is the loop of
    training: the whole batch in one call of the model, and no check of images and labels, which
    would wait for the device. In bfloat16 and float16 the model sees x + delta rounded toward x.

    Args:
        images: [N, C, H, W] in [0, 1]; labels: [N] int64.
        seed, index, offset: key of the random start, as in :func:`fastbandit.ops.random_start`.
        modules, parameters: as in :func:`attack_mode`.

    Returns:
        delta, of the images' shape, dtype and layout.

    Raises:
        TypeError, ValueError: the model's answer is no logits [N, classes].
    """
    images, labels = normal(images), normal(labels)
    ball, step = threat.ball, threat.step_value
    delta = _start(images, threat, seed, index, offset)
    if not threat.attacks:
        return delta
    with (
        attack_mode(model, threat.bn_mode, modules=modules, parameters=parameters),
        torch.enable_grad(),
    ):
        for _ in range(threat.steps):
            point, own = leaf(images, delta)
            logits = check_answer(model(own), images)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            ball.step_(delta, gradient, images, step)
    return delta


def perturb_from(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    delta: Tensor,
    point: Tensor,
    *,
    modules: Iterable[nn.Module] | None = None,
    parameters: Iterable[nn.Parameter] | None = None,
) -> Tensor:
    """:func:`perturb` of a model whose first layer normalises, from a start that is already drawn.

    The gradient with respect to the normalised input has the signs of that with respect to the
    image, which is the same divided by the (positive) std, so delta is the same; each step also
    writes the next input.

    Args:
        model: has ``normalize`` and ``forward_normalized``.
        threat: in the L-infinity norm.
        delta: the start, of the shape of ``images``; changed to the perturbation.
        point: the normalised images + delta, in the dtype that the first layer computes in.

    Returns:
        The normalised images + delta at the end, in the dtype and layout of ``point``.
    """
    mean, std = model.normalize.mean.flatten(), model.normalize.std.flatten()  # type: ignore
    # What has both layouts, as with one channel, goes on as contiguous: so would image + delta.
    layout = torch.contiguous_format if point.is_contiguous() else torch.channels_last
    with (
        attack_mode(model, threat.bn_mode, modules=modules, parameters=parameters),
        torch.enable_grad(),
    ):
        for _ in range(threat.steps):
            point.requires_grad_(True)
            logits = model.forward_normalized(point)  # type: ignore[operator]
            loss = F.cross_entropy(logits, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
            point = ops.pgd_step_normalize_(
                delta,
                gradient.to(delta.dtype),
                images,
                mean,
                std,
                step_size=threat.step_value,
                epsilon=threat.epsilon_value,
                lower=threat.lower,
                upper=threat.upper,
                out_dtype=point.dtype,
                memory_format=layout,
            )
    return point


class _Iterates:
    """Recognises an iterate that an image has been at before.

    A step depends on the iterate alone, so whatever follows a repeated one has been seen too, and
    nothing is lost by stopping there. Iterates are compared by a hash of 64 bits.
    """

    def __init__(self, delta: Tensor) -> None:
        pixels = delta[0].numel()
        generator = torch.Generator().manual_seed(0x9E3779B9)
        factors = torch.randint(-(2**62), 2**62, (pixels,), generator=generator)
        self._factors = (2 * factors + 1).to(delta.device)  # odd: no bit is lost
        self._seen: list[Tensor] = []

    def repeats(self, delta: Tensor) -> Tensor:
        """Whether each image's ``delta`` is one it had before, bool [n]; remembers it."""
        bits = delta.contiguous().view(torch.int64 if delta.element_size() == 8 else torch.int32)
        # Integer sums wrap and have no order.
        key = (bits.flatten(1).to(torch.int64) * self._factors).sum(1)
        repeated = torch.zeros_like(key, dtype=torch.bool)
        for seen in self._seen:
            repeated |= seen == key
        self._seen.append(key)
        return repeated

    def keep(self, kept: Tensor) -> None:
        self._seen = [seen[kept] for seen in self._seen]


def pgd_loop(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    index: Tensor,
    offset: int = 0,
    decay: float | None = None,
    stop_early: bool = True,
    judge: bool = True,
    loss: Loss = cross_entropy,
) -> AttackResult:
    """PGD (or MI-FGSM) on the images that still stand, within ``with oracle``.

    Args:
        threat: ball, steps and start.
        decay: MI-FGSM's mu, None for plain gradients.
        stop_early: an image is done with the first iterate that fools the model, or when its
            iterate repeats. Otherwise all take every step, and the last iterate counts.
        judge: whether to ask the model about the last iterate; else ``success`` is all False.
        loss: what is maximised.
    """
    ball, step = threat.ball, threat.step_value
    dtype, images = images.dtype, wide(images)
    delta = _start(images, threat, seed, index, offset)
    result = AttackResult.none(point_of(images, delta, dtype))
    if not len(images):
        return result
    rows = torch.arange(len(images), device=images.device)
    momentum = torch.zeros_like(images) if decay is not None else None
    # Only there is a step a function of the iterate that often comes back exactly.
    cycles = stop_early and decay is None and threat.norm == "linf" and not oracle.whole
    iterates = _Iterates(delta) if cycles else None
    x, y = images, labels
    for _ in range(threat.steps):
        point = point_of(x, delta, dtype)
        logits, _, gradient = oracle.gradient(point, loss, y)
        if stop_early:
            fooled = oracle.fooled(point, logits, y, index[rows])
            done = fooled
            if iterates is not None:
                done = fooled | iterates.repeats(delta)
            if bool(done.any()):
                result.adversarial[rows[done]] = point[done]
                result.success[rows[fooled]] = True
                kept = (~done).nonzero()[:, 0]
                if not len(kept):
                    return result
                rows, x, y, delta = rows[kept], x[kept], y[kept], delta[kept]
                gradient = gradient[kept]
                if momentum is not None:
                    momentum = momentum[kept]
                if iterates is not None:
                    iterates.keep(kept)
        if decay is not None and momentum is not None:
            gradient = momentum = decay * momentum + of_sum_one(gradient)
        ball.step_(delta, gradient, x, step)
    point = point_of(x, delta, dtype)
    result.adversarial[rows] = point
    if judge:
        result.success[rows] = oracle.fooled(point, oracle.logits(point), y, index[rows])
    return result


def restart(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int,
    index: Tensor,
    restarts: int,
    stop_early: bool = True,
    loss: Loss = cross_entropy,
) -> AttackResult:
    """:func:`pgd_loop` from several starts; an image is done with the first that fools the model.

    Of an image that none fools, the result is the last start's.
    """

    def attempt(offset: int, rows: Tensor) -> AttackResult:
        return pgd_loop(
            oracle,
            images[rows],
            labels[rows],
            threat,
            seed=seed,
            index=index[rows],
            offset=offset,
            stop_early=stop_early,
            loss=loss,
        )

    return from_starts(images, (partial(attempt, offset) for offset in range(restarts)))


class GradientAttack(Attack):
    """An attack that is :func:`pgd_loop` under a threat model of its own."""

    @abstractmethod
    def threat(self, ball: Ball) -> ThreatModel:
        """The steps in that ball."""

    def loop_options(self) -> dict[str, Any]:
        """Further arguments of :func:`pgd_loop`."""
        return {}

    def run(
        self, oracle: Oracle, images: Tensor, labels: Tensor, ids: Tensor, seed: int, ball: Ball
    ) -> AttackResult:
        threat, options = self.threat(ball), self.loop_options()
        return pgd_loop(oracle, images, labels, threat, seed=seed, index=ids, **options)


@dataclass(frozen=True)
class PGDSettings:
    """PGD-k, for each k that ``attacks`` names."""

    step_size: Radius | None = None
    """step along the gradient's sign (L2: its direction); default 2.5 epsilon / k"""
    restarts: Annotated[int, at_least(1)] = 1
    """random starts; those after the first are for images that still stand"""


@dataclass(frozen=True)
class PGDAttack(GradientAttack):
    """PGD with ``steps`` steps from a random start, from several starts if asked to."""

    name = "pgd-<steps>"
    section = "pgd"
    settings = PGDSettings

    steps: int
    step_size: str | None = None
    restarts: int = 1

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        match = re.fullmatch(r"pgd-?(\d+)", name)
        return {"steps": int(match[1])} if match and int(match[1]) else None

    @staticmethod
    def note(settings: Any) -> str | None:
        return f"PGD restarts {settings.restarts}"

    @property
    def key(self) -> str:
        return f"pgd-{self.steps}"

    def threat(self, ball: Ball) -> ThreatModel:
        return _threat(ball, step_size=self.step_size, steps=self.steps)

    def title(self, norm: str) -> str:
        return f"PGD-{self.steps}"

    def run(
        self, oracle: Oracle, images: Tensor, labels: Tensor, ids: Tensor, seed: int, ball: Ball
    ) -> AttackResult:
        if self.restarts == 1:
            return super().run(oracle, images, labels, ids, seed, ball)
        return restart(
            oracle, images, labels, self.threat(ball), seed=seed, index=ids, restarts=self.restarts
        )

    def passes(self) -> tuple[float, float]:
        return (self.steps + 1) * self.restarts, self.steps * self.restarts

    def describe(self, ball: Ball) -> str:
        text = self.threat(ball).describe().replace("FGSM", self.title(ball.norm), 1)
        return f"{text}, {count(self.restarts, 'restart')}"

    def facts(self, ball: Ball) -> dict[str, Any]:
        return {**self.threat(ball).to_dict(), "restarts": self.restarts}


@dataclass(frozen=True)
class FGSMAttack(GradientAttack):
    """One step of epsilon from the image; none of PGD's settings bear on it."""

    name = "fgsm"
    section = "pgd"
    settings = PGDSettings

    def threat(self, ball: Ball) -> ThreatModel:
        return _threat(ball, steps=1, random_start=False)

    def title(self, norm: str) -> str:
        return "FGSM" if norm == "linf" else "FGM"

    def passes(self) -> tuple[float, float]:
        return 2, 1

    def describe(self, ball: Ball) -> str:
        return self.threat(ball).describe().replace("FGSM", self.title(ball.norm), 1)

    def facts(self, ball: Ball) -> dict[str, Any]:
        return {**self.threat(ball).to_dict(), "restarts": 1}


def _threat(ball: Ball, **settings: Any) -> ThreatModel:
    return ThreatModel(
        norm=ball.norm, epsilon=ball.radius, lower=ball.lower, upper=ball.upper, **settings
    )


@with_autograd
def follow_gradient(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    threat: ThreatModel,
    *,
    seed: int,
    index: Tensor | None,
    batch_size: int | None,
    restarts: int = 1,
    stop_early: bool = False,
    decay: float | None = None,
    loss: str = "ce",
    target: Tensor | int | None = None,
) -> Tensor:
    """What the functions :func:`pgd`, :func:`fgsm` and ``mifgsm`` share."""
    restarts, maximised = parse_whole(restarts, "restarts", 1), find_loss(loss)
    seed = parse_whole(seed, "seed", most=LARGEST_SEED)
    images, labels, index, oracle = aimed(
        model, images, labels, index,
        target=target, batch_size=batch_size, bn_mode=threat.bn_mode,
    )  # fmt: skip
    if not threat.attacks:
        return images.clone()
    attack: Callable[..., AttackResult] = partial(restart, restarts=restarts)
    if restarts == 1:
        attack = partial(pgd_loop, decay=decay, judge=False)
    with oracle:
        return attack(
            oracle, images, labels, threat,
            seed=seed, index=index, stop_early=stop_early, loss=maximised,
        ).adversarial  # fmt: skip


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    step_size: Fraction | str | float | None = None,
    steps: int = 10,
    random_start: bool = True,
    norm: str = "linf",
    restarts: int = 1,
    stop_early: bool = False,
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    bn_mode: str = "eval",
    loss: str = "ce",
    target: Tensor | int | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Projected gradient descent in the L-infinity or the L2 ball (Madry et al., ICLR 2018).

    Args:
        model: returns logits [N, classes] for images in [0, 1].
        images: [N, C, H, W], floating point in [0, 1].
        labels: [N] integers; None: what the model predicts for the images.
        epsilon, step_size, steps, random_start, norm, lower, upper, bn_mode: see
            :class:`fastbandit.threat.ThreatModel`. Numbers may also be scalars of numpy and
            tensors without dimensions.
        restarts: random starts; those after the first are for images that still stand.
        stop_early: an image keeps the first iterate that fools the model, and stops where its
            iterate repeats; much faster, and never a weaker attack. Otherwise the last iterate.
        loss: what is maximised: ``"ce"``, cross-entropy; ``"dlr"``, the difference of logits ratio
            (three classes or more); ``"margin"``, the largest other logit less the label's.
        target: of a targeted attack, the class that the model shall answer, [N] integers or one for
            all; the loss of that class is minimised, and the labels are not used.
        seed, index: the random start of image i is drawn from (seed, index[i]) alone, so the same
            images get the same start in any batch; index: [N] int64, default 0..N-1.
        batch_size: images in one call of the model; None for all.

    Returns:
        The adversarial images, in the dtype of ``images``: x + delta, rounded so that no pixel is
        farther from x than delta says. In L-infinity abs(x_adv - x) is at most epsilon, both in
        float32 (float64 for float64 images); in L2 the norm is below epsilon.

        A pixel whose gradient is NaN takes no step and an infinite one that of its sign; neither
        stops the others. An answer that is not finite counts as a wrong prediction.

    Raises:
        ValueError, TypeError: images outside [0, 1]; labels that are no classes of the model; a
            model whose answer is no logits [N, classes]; settings that cannot mean anything.
    """
    threat = ThreatModel(
        norm=norm,
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        random_start=random_start,
        lower=lower,
        upper=upper,
        bn_mode=bn_mode,
    )
    return follow_gradient(
        model, images, labels, threat,
        seed=seed, index=index, restarts=restarts, stop_early=stop_early, batch_size=batch_size,
        loss=loss, target=target,
    )  # fmt: skip


def fgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    step_size: Fraction | str | float | None = None,
    random_start: bool = False,
    norm: str = "linf",
    lower: float | None = 0.0,
    upper: float | None = 1.0,
    bn_mode: str = "eval",
    loss: str = "ce",
    target: Tensor | int | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """One step along the sign of the gradient (Goodfellow et al., ICLR 2015).

    ``random_start=True`` is the variant of Wong et al. ("Fast is better than free", ICLR 2020),
    with steps of 1.25 epsilon; ``norm="l2"`` is the fast gradient method, along the gradient
    itself. Arguments, result and errors as :func:`pgd`.
    """
    threat = ThreatModel(
        norm=norm,
        epsilon=epsilon,
        step_size=step_size,
        steps=1,
        random_start=random_start,
        lower=lower,
        upper=upper,
        bn_mode=bn_mode,
    )
    return follow_gradient(
        model, images, labels, threat,
        seed=seed, index=index, batch_size=batch_size, loss=loss, target=target,
    )  # fmt: skip
