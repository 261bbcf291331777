"""Our attacks beside torchattacks, foolbox and the reference AutoAttack on the same network."""

import pytest
import torch
from _digits import images, network

from fastbandit import ops
from fastbandit._intervals import wilson
from fastbandit.attacks import APGD, APGDT, FGSM, MIFGSM, PGD, PGDL2, Square

N, EPSILON, L2 = 150, 0.2, 1.0


@pytest.fixture(scope="module")
def case():
    return network(), *images(N)


def standing(model, x, y) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


def not_weaker(model, y, ours, theirs):
    """Of ours no more stand than the upper end of the interval of theirs."""
    found, reference = standing(model, ours, y), standing(model, theirs, y)
    assert found / len(y) <= wilson(reference, len(y))[1], (found, reference)


@pytest.mark.parametrize("start", [False, True])
def test_pgd_is_torchattacks_image_by_image(case, start, monkeypatch):
    theirs = pytest.importorskip("torchattacks")
    model, x, y = case
    if start:
        delta = ops.random_start(x, epsilon=EPSILON, seed=4)
        # Without bounds: torchattacks clips the image itself. Ours starts from the same pixels.
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.copy_(delta))
        clipped = (x + delta).clamp(0, 1) - x
        monkeypatch.setattr(
            "fastbandit.attacks.ball.ops.random_start", lambda *a, **k: clipped.clone()
        )
    ours = PGD(model, EPSILON, 0.02, 20, random_start=start)(x, y)
    reference = theirs.PGD(model, EPSILON, 0.02, 20, random_start=start)(x, y)
    # They hold x' and clip, ours holds delta: apart by rounding, and by a step where a gradient
    # is zero to rounding.
    apart = (ours - reference).abs().flatten(1).amax(1) > 1e-5
    assert apart.sum() <= 2
    with torch.no_grad():
        assert ((model(ours).argmax(1) == y) != (model(reference).argmax(1) == y)).sum() <= 1


def test_one_step_and_momentum_are_torchattacks(case):
    theirs = pytest.importorskip("torchattacks")
    model, x, y = case
    for ours, reference in (
        (FGSM(model, EPSILON), theirs.FGSM(model, EPSILON)),
        (MIFGSM(model, EPSILON, 0.04, 6), theirs.MIFGSM(model, EPSILON, 0.04, 6)),
        (
            PGDL2(model, L2, 0.2, 8, random_start=False),
            theirs.PGDL2(model, L2, 0.2, 8, random_start=False),
        ),
    ):
        apart = (ours(x, y) - reference(x, y)).abs().flatten(1).amax(1) > 1e-4
        assert apart.sum() <= 2, type(ours).__name__


def test_not_weaker_than_torchattacks(case):
    theirs = pytest.importorskip("torchattacks")
    model, x, y = case
    pairs = (
        (PGD(model, EPSILON, 0.02, 20), theirs.PGD(model, EPSILON, 0.02, 20)),
        (PGDL2(model, L2, 0.2, 20), theirs.PGDL2(model, L2, 0.2, 20)),
        (APGD(model, eps=EPSILON, steps=25), theirs.APGD(model, eps=EPSILON, steps=25)),
        (APGDT(model, eps=EPSILON, steps=10), theirs.APGDT(model, eps=EPSILON, steps=10)),
        (
            Square(model, eps=EPSILON, n_queries=200),
            theirs.Square(model, eps=EPSILON, n_queries=200),
        ),
    )
    for ours, reference in pairs:
        not_weaker(model, y, ours(x, y), reference(x, y))


def test_not_weaker_than_foolbox(case):
    foolbox = pytest.importorskip("foolbox")
    model, x, y = case
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    for ours, reference, epsilon in (
        (
            PGD(model, EPSILON, 0.02, 20),
            foolbox.attacks.LinfPGD(abs_stepsize=0.02, steps=20),
            EPSILON,
        ),
        (PGDL2(model, L2, 0.2, 20), foolbox.attacks.L2PGD(abs_stepsize=0.2, steps=20), L2),
        (FGSM(model, EPSILON), foolbox.attacks.LinfFastGradientAttack(random_start=False), EPSILON),
    ):
        not_weaker(model, y, ours(x, y), reference(wrapped, x, y, epsilons=epsilon)[1])


@pytest.mark.parametrize("step", [0.025, 0.05, 0.125])
def test_l2_pgd_is_not_weaker_however_long_its_steps(step):
    """With short steps it matters most where an attack starts."""
    theirs, foolbox = pytest.importorskip("torchattacks"), pytest.importorskip("foolbox")
    model, (x, y) = network(), images(400)
    ours = PGDL2(model, L2, step, 20)(x, y)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        not_weaker(model, y, ours, theirs.PGDL2(model, L2, step, 20)(x, y))
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
        attack = foolbox.attacks.L2PGD(abs_stepsize=step, steps=20)
        not_weaker(model, y, ours, attack(wrapped, x, y, epsilons=L2)[1])


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_not_weaker_than_the_reference_autoattack(case, norm):
    theirs = pytest.importorskip("pyautoattack")
    model, x, y = case
    epsilon = EPSILON if norm == "Linf" else L2
    for name, ours in (
        ("apgd-ce", APGD(model, norm, epsilon, steps=25)),
        ("apgd-t", APGDT(model, norm, epsilon, steps=10)),
        ("square", Square(model, norm, epsilon, n_queries=200)),
    ):
        reference = theirs.AutoAttack(
            model, norm=norm, eps=epsilon, version="custom", attacks=[name], seed=0
        )
        reference.apgd.n_restarts, reference.apgd.n_iter = 1, 25
        reference.apgd_targeted.n_iter = 10
        reference.square.n_queries = 200
        with torch.random.fork_rng():
            adversarial, _ = reference.run_standard_evaluation(x, y, batch_size=N)
        not_weaker(model, y, ours(x, y), adversarial)
