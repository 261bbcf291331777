"""What retraining minimises: adversarial training by cross-entropy, "free" training, TRADES.

Each is an :class:`~fastbandit.training.Objective` for :func:`~fastbandit.training.train_epoch`.
With FGSM, PGD-k or no attack at all the objective is the same and the threat model differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit import ops
from fastbandit.attacks import attack_mode
from fastbandit.threat import ThreatModel
from fastbandit.training import Objective, Step

__all__ = ["Adversarial", "Free", "Trades", "perturb_away"]

# The gradient of the divergence from an image's own prediction is zero at the image, so without a
# random start the search for a perturbation begins this far away (Zhang et al. use N(0, 0.001^2)).
_NUDGE = 0.001


class Adversarial(Objective):
    """Cross-entropy at the images that the threat model's attack gives (Madry et al., ICLR 2018).

    One step from a random start is the FGSM training of Wong et al. ("Fast is better than free",
    ICLR 2020); no step is ordinary training.

    Args:
        auxiliary: weight of the auxiliary head's cross-entropy; 0: the network has none.
    """

    #: Steps of the optimiser on each mini-batch.
    updates = 1

    def __init__(self, auxiliary: float = 0.0) -> None:
        self.auxiliary = auxiliary

    @property
    def recordable(self) -> bool:
        return type(self) in (Adversarial, Trades)

    def cross_entropy(self, step: Step, forward: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Loss of what ``forward`` returns, with the auxiliary head's; logits [N, classes].

        forward: takes the options of the network's ``forward``.
        """
        if not self.auxiliary:
            logits = forward()
            return F.cross_entropy(logits, step.labels), logits
        logits, second = forward(with_auxiliary=True)
        loss = F.cross_entropy(logits, step.labels)
        return loss + self.auxiliary * F.cross_entropy(second, step.labels), logits

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        yield self.cross_entropy(step, step.attacked)


class Free(Adversarial):
    """Every mini-batch ``replays`` times, the perturbation moved by each backward pass for free.

    Shafahi et al., "Adversarial Training for Free!", NeurIPS 2019, Algorithm 1: with the gradient
    of the loss at x + delta the optimiser makes its step, and
    delta <- clip(delta + step * sign(grad_x), -epsilon, epsilon). The perturbation goes on to the
    next mini-batch; it is zero when an epoch begins (in the paper: when training begins), so that
    an epoch depends on its number and the weights alone. The step is epsilon unless the threat
    model names one, and x + delta stays within its bounds.

    Args:
        replays: m, steps of the optimiser on each mini-batch.
    """

    attacks_by_step = False

    def __init__(self, replays: int, auxiliary: float = 0.0) -> None:
        super().__init__(auxiliary)
        if replays < 1:
            raise ValueError(f"Free: replays: expected 1 or more, got {replays}")
        self.updates = replays
        self._epoch: int | Tensor | None = None
        self._delta: Tensor | None = None

    def _start(self, step: Step) -> Tensor:
        """The perturbation that the last mini-batch left, fitted to these images."""
        images, threat = step.images, step.threat
        last = self._delta
        self._epoch, fresh = step.offset, step.offset != self._epoch
        if fresh or last is None or last.shape[1:] != images.shape[1:]:
            return torch.zeros_like(images)
        if len(last) < len(images):
            last = F.pad(last, [0, 0] * 3 + [0, len(images) - len(last)])
        point = images + last[: len(images)]
        if threat.lower is not None or threat.upper is not None:
            point = point.clamp(threat.lower, threat.upper)
        return point - images

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        threat = step.threat
        epsilon = threat.epsilon_value
        delta = self._start(step)
        for _ in range(self.updates):
            point = (step.images + delta).requires_grad_(threat.epsilon != 0)
            yield self.cross_entropy(step, partial(step.model, point))
            if point.grad is not None:
                ops.pgd_step_(
                    delta,
                    point.grad,
                    step.images,
                    step_size=epsilon if threat.step_size is None else threat.step_value,
                    epsilon=epsilon,
                    lower=threat.lower,
                    upper=threat.upper,
                )
        self._delta = delta

    def passes(self, threat: ThreatModel) -> tuple[int, int]:
        return self.updates, self.updates


class Trades(Adversarial):
    """TRADES: accuracy on the images, and the same prediction all over their neighbourhood.

    Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy", ICML 2019,
    Eq. 5 as in the authors' code::

        cross_entropy(f(x), y) + beta * KL(softmax f(x) || softmax f(x + delta)) / N

    with the delta of :func:`perturb_away`.

    Args:
        beta: 1 / lambda of the paper, which uses 1 and 6.
    """

    moving_passes = 2  # the images and the attacked ones
    attacks_by_step = False

    def __init__(self, beta: float, auxiliary: float = 0.0) -> None:
        super().__init__(auxiliary)
        if not beta >= 0:
            raise ValueError(f"Trades: beta: expected 0 or more, got {beta}")
        self.beta = beta

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        point = step.images
        if step.threat.attacks:
            point = point + perturb_away(step)
        natural, logits = self.cross_entropy(step, partial(step.model, step.images))
        moved = step.model(point)
        divergence = F.kl_div(
            F.log_softmax(moved, dim=1), F.softmax(logits, dim=1), reduction="batchmean"
        )
        yield natural + self.beta * divergence, moved

    def passes(self, threat: ThreatModel) -> tuple[int, int]:
        steps = threat.steps if threat.attacks else 0
        return steps + (3 if steps else 2), steps + 2


def perturb_away(step: Step) -> Tensor:
    """The perturbation whose prediction differs most from that of the image itself.

    ``threat.steps`` times
    delta <- clip(delta + step * sign(grad_x KL(softmax f(x) || softmax f(x + delta))), +-epsilon),
    from a random start in the ball, or next to the image where the threat model has none.

    Returns:
        delta, of the images' shape, dtype and layout.
    """
    threat, images = step.threat, step.images
    epsilon = threat.epsilon_value
    delta = ops.random_start(
        images,
        epsilon=epsilon if threat.random_start else min(epsilon, _NUDGE),
        seed=step.seed,
        index=step.index,
        offset=step.offset,
        lower=threat.lower,
        upper=threat.upper,
    )
    with (
        attack_mode(step.model, threat.bn_mode, modules=step.modules, parameters=step.parameters),
        torch.enable_grad(),
    ):
        with torch.no_grad():
            target = F.softmax(step.model(images), dim=1)
        for _ in range(threat.steps):
            point = (images + delta).requires_grad_(True)
            prediction = F.log_softmax(step.model(point), dim=1)
            divergence = F.kl_div(prediction, target, reduction="sum")
            (gradient,) = torch.autograd.grad(divergence, point)
            ops.pgd_step_(
                delta,
                gradient,
                images,
                step_size=threat.step_value,
                epsilon=epsilon,
                lower=threat.lower,
                upper=threat.upper,
            )
    return delta
