"""MI-FGSM: the steps of PGD along a momentum of the gradients.

Source: Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from torch import Tensor, nn

from fastbandit.attacks._pgd import GradientAttack, follow_gradient
from fastbandit.attacks.ball import Ball
from fastbandit.config import Radius, at_least
from fastbandit.threat import ThreatModel, parse_number


@dataclass(frozen=True)
class MIFGSMAttack(GradientAttack):
    """MI-FGSM."""

    name = "mifgsm"
    aliases = ("mi-fgsm",)
    section = "mifgsm"

    steps: Annotated[int, at_least(1)] = 10
    """gradient steps"""
    step_size: Radius | None = None
    """step along the sign of the momentum; default epsilon / steps"""
    decay: Annotated[float, at_least(0)] = 1.0
    """weight of the momentum"""

    def threat(self, ball: Ball) -> ThreatModel:
        return _threat(
            norm=ball.norm,
            epsilon=ball.radius,
            step_size=self.step_size,
            steps=self.steps,
            lower=ball.lower,
            upper=ball.upper,
        )

    def title(self, norm: str) -> str:
        return "MI-FGSM" if norm == "linf" else "MI-FGM"

    def loop_options(self) -> dict[str, Any]:
        return {"decay": self.decay}

    def passes(self) -> tuple[float, float]:
        return self.steps + 1, self.steps

    def describe(self, ball: Ball) -> str:
        return (
            f"{self.title(ball.norm)}, {ball.describe()}, {self.steps} steps of "
            f"{self.threat(ball).step_value:.4g}, decay {self.decay:g}"
        )

    def facts(self, ball: Ball) -> dict[str, Any]:
        return {**self.threat(ball).to_dict(), "decay": self.decay}

    def budget(self) -> str | None:
        return f"{self.steps} steps"


def _threat(step_size: Fraction | str | float | None, steps: int, **settings: Any) -> ThreatModel:
    """The threat model of MI-FGSM, with the paper's step where none is given."""
    threat = ThreatModel(step_size=step_size, steps=steps, random_start=False, **settings)
    if step_size is None and threat.steps:
        assert isinstance(threat.epsilon, Fraction)
        return dataclasses.replace(threat, step_size=threat.epsilon / threat.steps)
    return threat


def mifgsm(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    step_size: Fraction | str | float | None = None,
    steps: int = 10,
    decay: float = 1.0,
    norm: str = "linf",
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
    """Momentum iterative FGSM (Dong et al., "Boosting Adversarial Attacks with Momentum", 2018).

    g <- decay * g + grad / ||grad||_1, then a step along g; no random start. ``step_size`` None is
    the paper's epsilon / steps. Other arguments, result and errors as :func:`pgd`.
    """
    threat = _threat(
        norm=norm,
        epsilon=epsilon,
        step_size=step_size,
        steps=steps,
        lower=lower,
        upper=upper,
        bn_mode=bn_mode,
    )
    decay = parse_number(decay, "decay")
    if decay < 0:
        raise ValueError(f"decay: expected 0 or more, got {decay}")
    return follow_gradient(
        model,
        images,
        labels,
        threat,
        seed=seed,
        index=index,
        decay=decay,
        stop_early=stop_early,
        batch_size=batch_size,
        loss=loss,
        target=target,
    )
