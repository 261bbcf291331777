"""The guard against catastrophic overfitting: what it measures, what it concludes."""

from fractions import Fraction

import pytest
import torch
from torch import nn

from fastbandit.config import check_values
from fastbandit.data import ImageSet, Loader
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, Evaluation
from fastbandit.training.overfitting import GuardConfig, OverfittingGuard, stronger

EPSILON = 0.2


class Bent(nn.Module):
    """Right at the image and at the end of one step from it, wrong in between.

    The margin of class 0 is a parabola in the one pixel, with zeros at 0.026 and 0.974 of the way
    from the image, 0.5, to 0.5 + epsilon. One step of epsilon follows the gradient across the
    valley; smaller steps stay in it.
    """

    def __init__(self, depth: float) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.tensor(depth))

    def forward(self, x):
        way = (x.flatten(1) - 0.5) / (EPSILON / 2) - 1.0
        return torch.cat((way.square() - self.depth, torch.zeros_like(way)), dim=1)


def guard(n=64):
    images = torch.full((n, 1, 1, 1), 127, dtype=torch.uint8)
    batches = Loader(ImageSet(images, torch.zeros(n, dtype=torch.int64)), range(n), batch_size=40)
    return OverfittingGuard(batches, seed=3)


def test_a_network_that_misleads_one_step_is_caught():
    found, model, cost = guard(), Bent(0.9), Cost()
    model.train()
    threat = ThreatModel(epsilon=EPSILON, step_size=EPSILON, random_start=False, bn_mode="train")
    trained, strong = found.measure(model, threat, cost=cost)
    verdict = found.judge([trained], [strong])
    assert trained.robust_accuracy == 1.0
    assert strong.robust_accuracy < 0.1
    assert verdict.overfitted
    assert verdict.images == 64
    assert model.training
    # 2 batches each: a clean pass, the steps, a pass on the result.
    assert (cost.forward_passes, cost.backward_passes) == (2 * (2 + 1) + 2 * (2 + 5), 2 + 10)
    # The same starts at every check.
    assert found.measure(model, threat, cost=cost)[1].robust_correct == strong.robust_correct


def test_a_sound_network_is_left_alone():
    found, threat = guard(), ThreatModel(epsilon=EPSILON, step_size=EPSILON, random_start=False)
    trained, strong = found.measure(Bent(-0.1), threat, cost=Cost())
    assert (trained.robust_accuracy, strong.robust_accuracy) == (1.0, 1.0)
    assert not found.judge([trained], [strong]).overfitted


@pytest.mark.parametrize(
    ("trained", "strong", "overfitted"),
    [
        (100, 0, True),
        (56, 0, True),  # a network that overfitted on MNIST
        (35, 1, True),  # the same, an epoch earlier
        (90, 20, True),
        (90, 31, False),  # 0.34 of it is left
        (80, 55, False),  # MNIST, epoch 2
        (54, 26, False),  # MNIST, epoch 1
        (46, 18, False),  # the widest gap of sound training
        (32, 10, False),  # and its smallest share
        (29, 0, False),  # too little to tell
        (10, 10, False),
        (0, 0, False),
    ],
)
def test_verdicts(trained, strong, overfitted):
    def evaluation(correct):
        return Evaluation(100, correct, 100, 0.0)

    verdict = OverfittingGuard.judge([evaluation(trained)], [evaluation(strong)])
    assert verdict.overfitted is overfitted
    assert (verdict.trained, verdict.strong) == (trained / 100, strong / 100)
    # Of several paths: their images together.
    both = OverfittingGuard.judge(
        [evaluation(trained), evaluation(trained)], [evaluation(strong), evaluation(strong)]
    )
    assert (both.overfitted, both.images) == (overfitted, 200)


def test_the_strong_attack_is_stronger_than_that_of_training():
    found = guard()
    for steps, expected in ((1, 5), (2, 5), (4, 8), (7, 14)):
        threat = ThreatModel(epsilon="8/255", steps=steps, bn_mode="train", lower=None, upper=None)
        trained, strong = found.attacks(threat)
        assert (trained.steps, strong.steps) == (steps, expected)
        assert trained.bn_mode == strong.bn_mode == "eval"
        assert trained.step_value == threat.step_value
        assert strong.step_value == pytest.approx(2.5 * 8 / 255 / expected)
        assert (strong.lower, strong.upper) == (None, None)


def test_twice_the_steps_of_half_the_size():
    threat = ThreatModel(epsilon="8/255", bn_mode="train")
    sizes = []
    for steps in (2, 4, 8):
        threat = stronger(threat)
        assert (threat.steps, threat.bn_mode) == (steps, "train")
        sizes.append(threat.step_size)
    epsilon = Fraction(8, 255)
    assert sizes == [epsilon * 5 / 8, epsilon * 5 / 8, epsilon * 5 / 16]


@pytest.mark.parametrize(("setting", "value"), [("every", 0), ("images", 0), ("steps", 1)])
def test_senseless_settings(setting, value):
    with pytest.raises(ValueError, match=rf"guard\.{setting}: expected . or more, got {value}"):
        check_values(GuardConfig(**{setting: value}), "guard.")
