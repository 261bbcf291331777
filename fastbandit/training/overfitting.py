"""A guard against catastrophic overfitting, the way in which single-step training fails.

Within an epoch or two a network can learn to mislead the one gradient step that it is trained
against: its accuracy under that step stays or even rises, and under an attack of several steps it
falls to nothing (Wong et al., "Fast is better than free", ICLR 2020; Andriushchenko and
Flammarion, "Understanding and improving fast adversarial training", NeurIPS 2020). The guard
compares the two on a fixed set of images that the weights do not train on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any

from torch import nn

from fastbandit.config import at_least
from fastbandit.distributed import Team
from fastbandit.threat import ThreatModel
from fastbandit.training.batches import Batches
from fastbandit.training.cost import Cost
from fastbandit.training.epoch import Evaluation, evaluate
from fastbandit.training.steps import Engine

__all__ = ["GAP", "MOST_STEPS", "SHARE", "GuardConfig", "OverfittingGuard", "Verdict", "stronger"]

#: Overfitting needs at least this much accuracy under the training attack that is not there under
#: the strong one, and that the strong one leaves less than this share. The strong attack is simply
#: the better one too: sound training on the digits and on MNIST had gaps up to 0.29, and shares
#: down to 0.2 where accuracy was low and to 0.39 where the gap was wide. A plain convolutional
#: network that overfitted on MNIST (FGSM without a random start) went from 0.56 and 0.23 to 0.35
#: and 0.01, then 0.56 and 0.00. With 128 images the standard error of the gap is 0.04 or less.
GAP, SHARE = 0.3, 1 / 3
#: The training attack does not grow beyond this: what does not help against eight steps is no
#: catastrophic overfitting.
MOST_STEPS = 8


@dataclass(frozen=True)
class GuardConfig:
    """The guard against catastrophic overfitting; see :class:`OverfittingGuard`."""

    enabled: bool = True
    """watch for catastrophic overfitting, and act"""
    every: Annotated[int, at_least(1)] = 2
    """epochs between two checks"""
    images: Annotated[int, at_least(1)] = 128
    """validation images that are attacked at a check, at most"""
    steps: Annotated[int, at_least(2)] = 5
    """gradient steps of the strong attack; twice those of the training attack if that is more"""


@dataclass(frozen=True)
class Verdict:
    """One comparison.

    trained, strong: accuracy in [0, 1] under the training attack and under the strong attack;
    images: how many; overfitted: what follows from it.
    """

    trained: float
    strong: float
    images: int
    overfitted: bool

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def stronger(threat: ThreatModel) -> ThreatModel:
    """The next stronger training attack: twice the steps, each of half the size.

    Two steps of 5/8 epsilon reach as far as the one step of 5/4 epsilon that they replace, but
    see the gradient again on the way, which a network that overfits to one step has bent; four
    are of the same size, from eight on the size is 5/2 epsilon / steps (Madry et al.).
    """
    assert isinstance(threat.epsilon, Fraction)
    steps = 2 * max(threat.steps, 1)
    size = threat.epsilon * min(Fraction(5, 8), Fraction(5, 2) / steps)
    return dataclasses.replace(threat, steps=steps, step_size=size)


class OverfittingGuard:
    """Compares the training attack with a stronger one, and says when training has gone wrong.

    Args:
        batches: the images; the weights must not be trained on them.
        seed: of the random starts, the same at every check.
        steps: of the strong attack, at least; it has twice those of the training attack if that
            is more.
    """

    def __init__(self, batches: Batches, *, seed: int, steps: int = 5) -> None:
        self.batches, self.seed, self.steps = batches, seed, steps

    def attacks(self, threat: ThreatModel) -> tuple[ThreatModel, ThreatModel]:
        """The training attack and the strong one, both with batch norm in eval mode."""
        trained = dataclasses.replace(threat, bn_mode="eval")
        steps = max(self.steps, 2 * threat.steps)
        return trained, dataclasses.replace(trained, steps=steps, step_size=None, random_start=True)

    def measure(
        self,
        model: nn.Module,
        threat: ThreatModel,
        *,
        cost: Cost,
        modules: Iterable[nn.Module] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        team: Team | None = None,
        engine: Engine | None = None,
    ) -> tuple[Evaluation, Evaluation]:
        """Attack the network both ways. Arguments as :func:`fastbandit.training.evaluate`."""
        used = list(model.modules() if modules is None else modules)
        learned = list(model.parameters() if parameters is None else parameters)
        trained, strong = (
            evaluate(
                model,
                self.batches,
                attack,
                seed=self.seed,
                cost=cost,
                modules=used,
                parameters=learned,
                team=team,
                engine=engine or Engine(),
            )
            for attack in self.attacks(threat)
        )
        return trained, strong

    @staticmethod
    def judge(trained: Sequence[Evaluation], strong: Sequence[Evaluation]) -> Verdict:
        """What the evaluations say together: of one network, or of several paths of a supernet."""
        images = sum(evaluation.images for evaluation in trained)
        weak = sum(evaluation.robust_correct for evaluation in trained) / images
        left = sum(evaluation.robust_correct for evaluation in strong) / images
        return Verdict(weak, left, images, weak - left >= GAP and left < SHARE * weak)
