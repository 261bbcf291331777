"""A guard against catastrophic overfitting, the way in which single-step training fails.

Within an epoch or two a network can learn to mislead the one gradient step that it is trained
against: its accuracy under that step stays or even rises, and under an attack of several steps it
falls to nothing (Wong et al., "Fast is better than free", ICLR 2020; Andriushchenko and
Flammarion, "Understanding and improving fast adversarial training", NeurIPS 2020). The guard
compares the two on a fixed set of images that the weights do not train on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import nn

from fastbandit.distributed import Team
from fastbandit.threat import ThreatModel
from fastbandit.training import Batches, Cost, evaluate

__all__ = ["OverfittingGuard", "Verdict", "stronger"]

#: Accuracy under the training attack less that under the strong one which is not a matter of
#: chance or of the strong attack being the better one.
GAP = 0.2
#: The strong attack leaves less than this share of the accuracy under the training attack ...
SHARE = 0.5
#: ... and less than this share of what it left at the best check so far.
COLLAPSE = 0.5
#: Training stronger than this is not overfitting but a network that cannot do it.
MOST_STEPS = 8


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

    Attributes:
        best: highest accuracy under the strong attack at a check so far.
    """

    def __init__(self, batches: Batches, *, seed: int, steps: int = 5) -> None:
        self.batches, self.seed, self.steps = batches, seed, steps
        self.best = 0.0

    def attacks(self, threat: ThreatModel) -> tuple[ThreatModel, ThreatModel]:
        """The training attack and the strong one, both with batch norm in eval mode."""
        trained = dataclasses.replace(threat, bn_mode="eval")
        steps = max(self.steps, 2 * threat.steps)
        return trained, dataclasses.replace(trained, steps=steps, step_size=None, random_start=True)

    def judge(self, trained: float, strong: float, images: int) -> Verdict:
        """The verdict on two accuracies; remembers the best strong one."""
        overfitted = (
            trained - strong >= GAP
            and strong < SHARE * trained
            and strong < COLLAPSE * max(self.best, trained - GAP)
        )
        if not overfitted:
            self.best = max(self.best, strong)
        return Verdict(trained, strong, images, overfitted)

    def check(
        self,
        model: nn.Module,
        threat: ThreatModel,
        *,
        cost: Cost,
        modules: Iterable[nn.Module] | None = None,
        parameters: Iterable[nn.Parameter] | None = None,
        team: Team | None = None,
    ) -> Verdict:
        """Attack the network both ways. Arguments as :func:`fastbandit.training.evaluate`."""
        used = {
            "modules": list(model.modules() if modules is None else modules),
            "parameters": list(model.parameters() if parameters is None else parameters),
        }
        weak, strong = (
            evaluate(
                model,
                self.batches,
                attack,
                seed=self.seed,
                cost=cost,
                team=team,
                **used,  # type: ignore[arg-type]
            )
            for attack in self.attacks(threat)
        )
        return self.judge(weak.robust_accuracy, strong.robust_accuracy, weak.images)
