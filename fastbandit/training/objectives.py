"""What training minimises: adversarial training by cross-entropy, "free" training, TRADES.

Each is an :class:`Objective` for :func:`~fastbandit.training.train_epoch`.
With FGSM, PGD-k or no attack at all the objective is the same and the threat model differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit.attacks import attack_mode
from fastbandit.attacks._model import check_answer
from fastbandit.attacks._pgd import leaf
from fastbandit.attacks.ball import perturbed
from fastbandit.threat import ThreatModel, parse_number, parse_whole
from fastbandit.training.kernel_loss import KernelLoss
from fastbandit.training.steps import Step

__all__ = ["Adversarial", "Free", "Objective", "Trades", "perturb_away"]

# The gradient of the divergence from an image's own prediction is zero at the image, so without a
# random start the search for a perturbation begins this far away (Zhang et al. use N(0, 0.001^2)).
_NUDGE = 0.001


class Objective:
    """What training minimises on a mini-batch; this one is that of Algorithm 8, lines 10 to 13.

    Cross-entropy at the images that the threat model's attack gives, one step of the optimiser.
    A subclass overrides :meth:`losses` and, where its number of passes differs, :meth:`passes`.
    """

    #: Forward passes of a step that move the running statistics of batch norm.
    moving_passes = 1
    #: Whether :meth:`losses` asks the step for its attack, which may then be drawn beforehand.
    attacks_by_step = True

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (loss, logits [N, classes]) once for each step of the optimiser on this batch.

        The optimiser has made its step, and ``.grad`` of what the loss depends on is filled, when
        the generator goes on after a yield.
        """
        logits = step.attacked()
        yield F.cross_entropy(logits, step.labels), logits

    @property
    def recordable(self) -> bool:
        """Whether a mini-batch can be recorded as a graph.

        It then has one step, and nothing but its attributes and the :class:`Step` bears on it. A
        subclass has to say so of itself.
        """
        return type(self) is Objective

    def passes(self, threat: ThreatModel) -> tuple[int, int]:
        """Forward and backward passes that a mini-batch takes."""
        count = (threat.steps if threat.attacks else 0) + 1
        return count, count


class Adversarial(Objective):
    """Cross-entropy at the images that the threat model's attack gives (Madry et al., ICLR 2018).

    One step from a random start is the FGSM training of Wong et al. ("Fast is better than free",
    ICLR 2020); no step is ordinary training.

    Args:
        auxiliary: weight of the auxiliary head's cross-entropy; 0: the network has none.

    Attributes:
        kernel_loss: the kernel-level loss of 1-bit networks, which is added; None: none.
    """

    #: Steps of the optimiser on each mini-batch.
    updates = 1

    def __init__(self, auxiliary: float = 0.0) -> None:
        self.auxiliary = auxiliary
        self.kernel_loss: KernelLoss | None = None

    @property
    def recordable(self) -> bool:
        return type(self) in (Adversarial, Trades) and self.kernel_loss is None

    def cross_entropy(self, step: Step, forward: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Loss of what ``forward`` returns, with the auxiliary head's and with the kernel-level
        loss; logits [N, classes].

        forward: takes the options of the network's ``forward``.
        """
        if self.kernel_loss is None:
            return self._cross_entropy(step, forward)
        with self.kernel_loss.watching():
            loss, logits = self._cross_entropy(step, forward)
            return loss + self.kernel_loss(step.labels), logits

    def _cross_entropy(self, step: Step, forward: Callable[..., Any]) -> tuple[Tensor, Tensor]:
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
        self.updates = parse_whole(replays, "Free: replays", 1)
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
        # The difference of two images would be rounded, and could leave the ball.
        delta = last[: len(images)].clone()
        threat.ball.step_(delta, torch.zeros_like(delta), images, 0.0)
        return delta

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        threat, ball = step.threat, step.threat.ball
        size = ball.epsilon if threat.step_size is None else threat.step_value
        delta = self._start(step)
        for _ in range(self.updates):
            point, own = leaf(step.images, delta)
            if not threat.epsilon:
                point, own = point.detach(), own.detach()
            yield self.cross_entropy(step, partial(step.model, own))
            if point.grad is not None:
                ball.step_(delta, point.grad, step.images, size)
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
        self.beta = parse_number(beta, "Trades: beta")
        if self.beta < 0:
            raise ValueError(f"Trades: beta: expected 0 or more, got {beta}")

    def losses(self, step: Step) -> Iterator[tuple[Tensor, Tensor]]:
        point = step.images
        if step.threat.attacks:
            point = perturbed(point, perturb_away(step))
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
    from a random start in the ball, or next to the image where the threat model has none. In the
    L2 norm start, step and clip are those of :func:`fastbandit.attacks.perturb`.

    Returns:
        delta, of the images' shape, dtype and layout.

    Raises:
        TypeError, ValueError: the model's answer is no logits [N, classes].
    """
    threat, images = step.threat, step.images
    ball = threat.ball
    near = ball if threat.random_start else replace(ball, radius=min(ball.epsilon, _NUDGE))
    delta = near.start(
        images,
        seed=step.seed,
        index=step.index,
        offset=step.offset,
        reach=threat.steps * threat.step_value,
    )
    with (
        attack_mode(step.model, threat.bn_mode, modules=step.modules, parameters=step.parameters),
        torch.enable_grad(),
    ):
        with torch.no_grad():
            # A copy: the model may change its input in place.
            target = F.softmax(check_answer(step.model(images.clone()), images), dim=1)
        for _ in range(threat.steps):
            point, own = leaf(images, delta)
            prediction = F.log_softmax(check_answer(step.model(own), images), dim=1)
            divergence = F.kl_div(prediction, target, reduction="sum")
            (gradient,) = torch.autograd.grad(divergence, point)
            ball.step_(delta, gradient, images, threat.step_value)
    return delta
