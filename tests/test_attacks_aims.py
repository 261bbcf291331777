"""Attacks towards a class, without labels, with other losses; and the standard AutoAttack."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from _centroids import Centroids, fitted
from _digits import images
from torch import nn

from fastbandit import attacks
from fastbandit.attacks import APGD, APGDT, FGSM, MIFGSM, PGD, AutoAttack, Ensemble, Square
from fastbandit.attacks._losses import LOSSES, dlr, other_less_own
from fastbandit.attacks._model import Oracle, cross_entropy
from fastbandit.attacks._reference import ReferenceAutoAttack
from fastbandit.attacks.ball import Ball

EPSILON = 0.25
TARGETED = {
    "fgsm": lambda m, x, y, **more: attacks.fgsm(m, x, y, epsilon=EPSILON, **more),
    "mifgsm": lambda m, x, y, **more: attacks.mifgsm(m, x, y, epsilon=EPSILON, **more),
    "pgd": lambda m, x, y, **more: attacks.pgd(m, x, y, epsilon=EPSILON, steps=8, **more),
    "pgd early": lambda m, x, y, **more: attacks.pgd(
        m, x, y, epsilon=EPSILON, steps=8, stop_early=True, restarts=2, **more
    ),
    "pgd l2": lambda m, x, y, **more: attacks.pgd(m, x, y, epsilon=1.5, norm="l2", **more),
    "apgd": lambda m, x, y, **more: attacks.apgd_ce(m, x, y, epsilon=EPSILON, steps=10, **more),
    "square": lambda m, x, y, **more: attacks.square(m, x, y, epsilon=EPSILON, queries=200, **more),
}
LOSS_TAKERS = [name for name in TARGETED if name != "square"]


@pytest.mark.parametrize("name", TARGETED)
def test_a_targeted_attack_reaches_the_class_and_an_untargeted_one_does_not(name):
    model, (x, y) = fitted(), images(60)
    target = (y + 3) % 10
    there = [
        (model(TARGETED[name](model, x, y, **aim)).argmax(1) == target).float().mean().item()
        for aim in ({}, {"target": target})
    ]
    assert there[1] > there[0] + 0.1
    # One class for all; the labels are needed for nothing.
    sevens = TARGETED[name](model, x, None, target=7)
    assert (model(sevens).argmax(1) == 7).sum() > (model(x).argmax(1) == 7).sum() + 2
    for same in (
        torch.tensor([7] * 60),
        torch.tensor([7] * 60, dtype=torch.uint8),
        torch.tensor(7, dtype=torch.int32),
        np.int16(7),
        np.array(7),
    ):
        assert torch.equal(sevens, TARGETED[name](model, x, None, target=same))
    # Labels of any integer type, as of images that are evaluated.
    assert torch.equal(TARGETED[name](model, x, y), TARGETED[name](model, x, y.to(torch.uint8)))


def test_a_targeted_step_is_the_step_down_the_target_s_loss():
    model, (x, y) = fitted(), images(20)
    target = (y + 1) % 10
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(cross_entropy(model(point), target).sum(), point)
    expected = (x - EPSILON * slope.sign()).clamp(0, 1)
    torch.testing.assert_close(attacks.fgsm(model, x, y, epsilon=EPSILON, target=target), expected)


@pytest.mark.parametrize("name", LOSS_TAKERS)
def test_without_labels_the_model_s_answers_are_taken(name):
    model, (x, _) = fitted(), images(30)
    predicted = model(x).argmax(1)
    assert torch.equal(TARGETED[name](model, x, None), TARGETED[name](model, x, predicted))
    for form in (FGSM(model, EPSILON), PGD(model, EPSILON, steps=3), APGDT(model, steps=2)):
        assert torch.equal(form(x), form(x, predicted))
    assert torch.equal(
        attacks.ensemble(model, x, epsilon=EPSILON, steps=2, queries=3),
        attacks.ensemble(model, x, predicted, epsilon=EPSILON, steps=2, queries=3),
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_follows_the_loss_that_is_asked_for(loss):
    model, (x, y) = fitted(), images(20)
    point = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(LOSSES[loss](model(point), y).sum(), point)
    expected = (x + EPSILON * slope.sign()).clamp(0, 1)
    found = attacks.fgsm(model, x, y, epsilon=EPSILON, loss=loss)
    torch.testing.assert_close(found, expected)
    assert torch.equal(FGSM(model, EPSILON, loss=loss)(x, y), found)
    assert torch.equal(
        MIFGSM(model, EPSILON, loss=loss)(x, y),
        attacks.mifgsm(model, x, y, epsilon=EPSILON, step_size=2 / 255, loss=loss),
    )


def test_losses_by_hand():
    logits = torch.tensor([[3.0, 1.0, 0.0, -1.0], [0.0, 2.0, 5.0, 1.0]])
    labels = torch.tensor([0, 1])
    assert other_less_own(logits, labels).tolist() == [-2.0, 3.0]
    torch.testing.assert_close(dlr(logits, labels), torch.tensor([-2 / 3, 3 / 4]))


def test_saturated_logits_need_a_loss_without_their_scale():
    """The softmax of logits in the thousands has no gradient in float32; a margin has."""
    model, (x, y) = Centroids(1e4), images(40)
    model.load_state_dict(fitted().state_dict())
    left = {
        loss: (model(PGD(model, EPSILON, 0.1, 5, loss=loss)(x, y)).argmax(1) == y).sum().item()
        for loss in LOSSES
    }
    assert left["margin"] < left["ce"] - 5
    assert left["dlr"] < left["ce"] - 5


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x, y: attacks.pgd(m, x, y, loss="cw"), ValueError, "ce or dlr or margin"),
        (lambda m, x, y: attacks.pgd(m, x, y, loss="margn"), ValueError, "did you mean margin"),
        (lambda m, x, y: attacks.pgd(m, x, y, target=y), ValueError, "other classes than"),
        (lambda m, x, y: attacks.pgd(m, x, target=10), ValueError, "expected classes below"),
        (lambda m, x, y: attacks.pgd(m, x, target=-1), ValueError, "target: expected classes, 0"),
        (lambda m, x, y: attacks.pgd(m, x, target=y[:2]), ValueError, "target: expected integers"),
        (lambda m, x, y: attacks.pgd(m, x, target="7"), TypeError, "target: expected a class"),
        (lambda m, x, y: attacks.pgd(m, x, target=y[0] + 0.5), TypeError, "got torch.float32"),
        (lambda m, x, y: attacks.pgd(m, x, target=np.True_), TypeError, "got a numpy.bool"),
        (lambda m, x, y: attacks.pgd(m, x, target=2**64), ValueError, "target: expected a class"),
        (lambda m, x, y: APGDT(m)(x, y, target=7), ValueError, "APGDT aims at classes of"),
        (lambda m, x, y: Ensemble(m)(x, y, target=7), ValueError, "Ensemble aims at classes"),
        (lambda m, x, y: AutoAttack(m)(x, y, index=y), ValueError, "index: expected None"),
        (lambda m, x, y: AutoAttack(m)(x.double(), y), TypeError, "float32 for the reference"),
        (lambda m, x, y: attacks.fgsm(nn.Sequential(m, nn.Linear(10, 2)), x, y % 2, loss="dlr"),
         ValueError, "three classes or more"),
    ],
)  # fmt: skip
def test_aims_that_cannot_be(call, error, message):
    pytest.importorskip("pyautoattack")
    x, y = images(4)
    with pytest.raises(error, match=message):
        call(fitted(), x, y)


def test_radius_zero_and_square_of_the_class_form():
    model, (x, y) = fitted(), images(4)
    assert torch.equal(attacks.pgd(model, x, epsilon=0, target=7), x)
    assert torch.equal(
        Square(model, eps=EPSILON, n_queries=20)(x, target=(y + 1) % 10),
        attacks.square(model, x, epsilon=EPSILON, queries=20, target=(y + 1) % 10),
    )
    assert torch.equal(
        APGD(model, eps=EPSILON, steps=4, loss="margin")(x, y),
        attacks.apgd_ce(model, x, y, epsilon=EPSILON, steps=4, loss="margin"),
    )


def test_the_reference_built_by_hand():
    """In an evaluation it is one question about each image."""
    pytest.importorskip("pyautoattack")
    ball = Ball("linf", Fraction(1, 10))
    standard = ReferenceAutoAttack(10, "0.2")
    assert standard.describe(ball).startswith("AutoAttack standard (APGD-CE, ")
    assert standard.passes() == (100 + 900 + 1800 + 5000, 100 + 900 + 900)
    few = ReferenceAutoAttack(10, "0.2", targets=3)
    assert few.describe(ball).startswith("AutoAttack standard with 3 targets (APGD-CE, ")
    assert few.facts(ball)["targets"] == 3
    assert few.passes() == (100 + 300 + 600 + 5000, 100 + 300 + 300)
    assert ReferenceAutoAttack(5, "0.2").describe(ball).startswith("AutoAttack standard (APGD-CE")
    with pytest.raises(ValueError, match="classes: expected a whole number >= 4"):
        ReferenceAutoAttack(3, "0.2")
    model, (x, y) = fitted(), images(4)
    wrong = ReferenceAutoAttack(7, "0.2")
    with Oracle(model) as oracle, pytest.raises(ValueError, match="classes: expected 10, the mod"):
        wrong.run(oracle, x, y, torch.arange(4), 0, ball)


def test_autoattack_is_the_reference_image_by_image(monkeypatch):
    """All four parts; the name belongs to no ensemble without FAB-T."""
    theirs = pytest.importorskip("pyautoattack")
    original = theirs.AutoAttack._set_version
    ran = []

    def short(self, version="standard"):
        original(self, version)
        ran.append(list(self.attacks_to_run))
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 4
        self.square.n_queries = 8

    monkeypatch.setattr(theirs.AutoAttack, "_set_version", short)
    model, (x, y) = fitted().train(), images(48)
    generator = torch.get_rng_state()
    found = AutoAttack(model, eps=0.1, seed=5)(x, y, batch_size=20)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)
    reference = theirs.AutoAttack(model.eval(), norm="Linf", eps=0.1, seed=5)
    expected, _ = reference.run_standard_evaluation(x, y, batch_size=20)
    assert torch.equal(found, expected)
    assert not torch.equal(found, x)
    assert ran[0] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    three = Centroids(classes=3)
    with pytest.raises(ValueError, match="expected 4 classes or more for the reference's DLR"):
        AutoAttack(three)(x, y % 3)
    # Every setting takes effect or is refused.
    assert not torch.equal(AutoAttack(model, eps=0.1, seed=6)(x, y, batch_size=20), found)
    assert not torch.equal(AutoAttack(model, eps=0.1, seed=5, n_classes=3)(x, y), found)
    moved = AutoAttack(model, "L2", eps=0.3)(x, y) - x
    assert 0.29 < moved.flatten(1).norm(dim=1).max() < 0.3001
    for settings, message in (
        ({"norm": "L1"}, "norm: expected"),
        ({"n_classes": 1}, "targets: expected a whole number >= 1"),
        ({"seed": -1}, "seed: expected a whole number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            AutoAttack(model, eps=0.1, **settings)(x, y)
    monkeypatch.setattr("fastbandit.attacks._reference.has_reference", lambda: False)
    with pytest.raises(ImportError, match=r"\(extra eval\); Ensemble is APGD-CE"):
        AutoAttack(model)(x, y)
