"""APGD: projected gradient ascent with momentum that sets its own step size.

Source: Croce and Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks", ICML 2020, Algorithm 1 and section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fastbandit.attacks import _draws
from fastbandit.attacks._attack import (
    Attack,
    AttackResult,
    attack_model,
    check_radius,
    count,
    from_starts,
)
from fastbandit.attacks._losses import dlr_targeted, find_loss
from fastbandit.attacks._model import Loss, Oracle
from fastbandit.attacks.ball import Ball, per_image, point_of, wide
from fastbandit.config import at_least
from fastbandit.threat import parse_whole

# The constants of the paper: momentum, least share of steps that must improve, the first length
# of a period, by how much periods shrink and to what.
_MOMENTUM, _RHO = 0.75, 0.75
_FIRST, _SHRINK, _LEAST = 0.22, 0.03, 0.06


def ascend(
    oracle: Oracle,
    images: Tensor,
    labels: Tensor,
    ball: Ball,
    loss: Loss,
    columns: tuple[Tensor, ...],
    *,
    steps: int,
    seed: int,
    index: Tensor,
    offset: int = 0,
) -> AttackResult:
    """One run of APGD, within ``with oracle``; an image is done when it fools the model.

    Args:
        loss: maximised, of (logits, *columns); ``columns``: [N] each. Where it is not finite the
            iterate counts as worse than any other.
    """
    result = AttackResult.none(images)
    dtype, images = images.dtype, wide(images)
    if not len(images):
        return result
    if ball.norm == "linf":
        delta = ball.start(images, seed=seed, index=index, offset=offset)
    else:
        draws = _draws.normal(seed, index, images[0].numel(), offset).to(images.dtype)
        delta = ball.project(ball.epsilon * ball.direction(draws.view(images.shape)), images)

    # Everything that belongs to one image shrinks together as images fall.
    s: dict[str, Tensor] = {
        "row": torch.arange(len(images), device=images.device),
        "x": images,
        "y": labels,
        "id": index,
        "delta": delta,
        "previous": delta,
        **{f"column{i}": column for i, column in enumerate(columns)},
    }

    def query(*, gradient: bool) -> bool:
        """Query the model at the iterate; drop who is done. False where nobody is left."""
        point = point_of(s["x"], s["delta"], dtype)
        columns_now = (s[f"column{i}"] for i in range(len(columns)))
        if gradient:
            logits, value, s["gradient"] = oracle.gradient(point, loss, *columns_now)
        else:
            logits = oracle.logits(point)
            value = oracle.value(loss, logits, *columns_now)
        s["loss"] = torch.where(value.isfinite(), value, -torch.inf)
        fooled = oracle.fooled(point, logits, s["y"], s["id"])
        if bool(fooled.any()):
            rows = s["row"][fooled]
            result.adversarial[rows] = point[fooled]
            result.success[rows] = True
            kept = (~fooled).nonzero()[:, 0]
            for name in s:
                s[name] = s[name][kept]
        return len(s["row"]) > 0

    if not query(gradient=True):
        return result
    s["best"], s["best_loss"], s["best_gradient"] = s["delta"], s["loss"], s["gradient"]
    s["last_loss"] = s["checked_loss"] = s["loss"]
    s["step"] = torch.full_like(s["loss"], 2 * ball.epsilon)
    s["increases"] = torch.zeros_like(s["row"])
    s["halved"] = torch.ones_like(s["row"], dtype=torch.bool)
    period, least = max(int(_FIRST * steps), 1), max(int(_LEAST * steps), 1)
    shrink = max(int(_SHRINK * steps), 1)
    since = 0
    for number in range(steps):
        x, delta = s["x"], s["delta"]
        move = per_image(s["step"], delta) * ball.direction(s["gradient"])
        target = ball.project(delta + move, x)
        weight = _MOMENTUM if number else 1.0
        following = delta + weight * (target - delta) + (1 - weight) * (delta - s["previous"])
        s["previous"], s["delta"] = delta, ball.project(following, x)
        if not query(gradient=number + 1 < steps):
            return result
        s["increases"] = s["increases"] + (s["loss"] > s["last_loss"])
        s["last_loss"] = s["loss"]
        better = s["loss"] > s["best_loss"]
        each = better.view(-1, *[1] * (images.dim() - 1))
        s["best_loss"] = torch.where(better, s["loss"], s["best_loss"])
        s["best"] = torch.where(each, s["delta"], s["best"])
        s["best_gradient"] = torch.where(each, s["gradient"], s["best_gradient"])
        since += 1
        if since < period or number + 1 == steps:
            continue
        # A checkpoint: too few steps improved, or the same step size has gained nothing.
        idle = ~s["halved"] & (s["checked_loss"] >= s["best_loss"])
        halve = (s["increases"] < _RHO * period) | idle
        each = halve.view(-1, *[1] * (images.dim() - 1))
        s["step"] = torch.where(halve, s["step"] / 2, s["step"])
        s["delta"] = torch.where(each, s["best"], s["delta"])
        s["gradient"] = torch.where(each, s["best_gradient"], s["gradient"])
        s["last_loss"] = torch.where(halve, s["best_loss"], s["last_loss"])
        s["halved"], s["checked_loss"] = halve, s["best_loss"]
        s["increases"] = torch.zeros_like(s["row"])
        period, since = max(period - shrink, least), 0
    result.adversarial[s["row"]] = point_of(s["x"], s["best"], dtype)
    return result


@dataclass(frozen=True)
class APGDSettings:
    """APGD-CE and APGD-T; the defaults are the standard AutoAttack's."""

    steps: Annotated[int, at_least(1)] = 100
    """gradient steps"""
    restarts: Annotated[int, at_least(1)] = 1
    """random starts"""
    targets: Annotated[int, at_least(1)] = 9
    """classes that APGD-T aims at; all others where there are fewer"""


@dataclass(frozen=True)
class APGDCEAttack(Attack):
    """APGD with an untargeted loss: the cross-entropy, or ``loss="dlr"`` or ``"margin"``."""

    name = "apgd-ce"
    section = "apgd"
    settings = APGDSettings

    steps: int = 100
    restarts: int = 1
    loss: str = "ce"

    def title(self, norm: str) -> str:
        return "APGD-CE"

    def run(
        self, oracle: Oracle, images: Tensor, labels: Tensor, ids: Tensor, seed: int, ball: Ball
    ) -> AttackResult:
        loss = find_loss(self.loss)

        def attempt(offset: int, rows: Tensor) -> AttackResult:
            y = labels[rows]
            return ascend(
                oracle, images[rows], y, ball, loss, (y,),
                steps=self.steps, seed=seed, index=ids[rows], offset=offset,
            )  # fmt: skip

        return from_starts(images, (partial(attempt, number) for number in range(self.restarts)))

    def passes(self) -> tuple[float, float]:
        return (self.steps + 1) * self.restarts, self.steps * self.restarts

    def describe(self, ball: Ball) -> str:
        return f"APGD-CE, {ball.describe()}, {self.steps} steps, {count(self.restarts, 'restart')}"

    def facts(self, ball: Ball) -> dict[str, Any]:
        return {"norm": ball.norm, "steps": self.steps, "restarts": self.restarts}

    def budget(self) -> str | None:
        return f"{self.steps} steps"


@dataclass(frozen=True)
class APGDTAttack(Attack):
    """APGD on the targeted DLR loss towards the most likely other classes, one after the other."""

    name = "apgd-t"
    section = "apgd"
    settings = APGDSettings

    steps: int = 100
    restarts: int = 1
    targets: int = 9

    def title(self, norm: str) -> str:
        return "APGD-T"

    def run(
        self, oracle: Oracle, images: Tensor, labels: Tensor, ids: Tensor, seed: int, ball: Ball
    ) -> AttackResult:
        if not len(images):
            return AttackResult.none(images)
        clean = oracle.logits(images)
        wrong = clean.scatter(1, labels[:, None], -torch.inf)
        others = wrong.argsort(stable=True, dim=1, descending=True)

        def attempt(start: int, rank: int, rows: Tensor) -> AttackResult:
            y = labels[rows]
            return ascend(
                oracle, images[rows], y, ball, dlr_targeted, (y, others[rows, rank]),
                steps=self.steps, seed=seed, index=ids[rows], offset=start * self.targets + rank,
            )  # fmt: skip

        def attempts() -> Iterator[partial[AttackResult]]:
            for start in range(self.restarts):
                for rank in range(min(self.targets, clean.shape[1] - 1)):
                    yield partial(attempt, start, rank)

        return from_starts(images, attempts())

    def passes(self) -> tuple[float, float]:
        forward = (self.steps + 1) * self.restarts * self.targets + 1
        return forward, self.steps * self.restarts * self.targets

    def describe(self, ball: Ball) -> str:
        return (
            f"APGD-T (DLR), {ball.describe()}, {self.steps} steps, {self.targets} targets, "
            f"{count(self.restarts, 'restart')}"
        )

    def facts(self, ball: Ball) -> dict[str, Any]:
        kept = {"steps": self.steps, "restarts": self.restarts, "targets": self.targets}
        return {"norm": ball.norm, **kept}

    def budget(self) -> str | None:
        return f"{self.steps} steps"


def apgd_ce(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: str = "ce",
    target: Tensor | int | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """APGD (Croce and Hein, ICML 2020) on the cross-entropy; parameter-free but for its length.

    Args:
        steps: 100 in the standard evaluation.
        loss: ``"ce"``; ``"dlr"``, the difference of logits ratio (three classes or more);
            ``"margin"``, the largest other logit less the label's.

    Other arguments as of :func:`fastbandit.attacks.pgd`.

    Returns:
        For an image that fell, the first iterate that fooled the model; else that of largest loss.

    Raises:
        ValueError, TypeError: as :func:`fastbandit.attacks.pgd`; ValueError also for ``"dlr"`` with
            two classes.
    """
    ball = check_radius(norm, epsilon)
    steps, restarts = parse_whole(steps, "steps", 1), parse_whole(restarts, "restarts", 1)
    find_loss(loss)
    attack = APGDCEAttack(steps, restarts, loss)
    return attack_model(
        attack, ball, model, images, labels,
        seed=seed, index=index, batch_size=batch_size, target=target,
    )  # fmt: skip


def apgd_t(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """Targeted APGD on the DLR loss (Croce and Hein, ICML 2020), as in the standard AutoAttack.

    Args:
        targets: most likely other classes to try; all of them where there are fewer.

    Other arguments as of :func:`apgd_ce`; the targets are its own, so there is no ``target``.
    """
    ball = check_radius(norm, epsilon)
    steps, restarts = parse_whole(steps, "steps", 1), parse_whole(restarts, "restarts", 1)
    attack = APGDTAttack(steps, restarts, parse_whole(targets, "targets", 1))
    return attack_model(
        attack, ball, model, images, labels, seed=seed, index=index, batch_size=batch_size
    )
