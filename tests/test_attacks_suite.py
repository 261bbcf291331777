"""The attacks against closed forms, and what they promise whatever the model."""

import math
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from _digits import images, network
from torch import nn

from fastbandit import attacks
from fastbandit.attacks import APGD, APGDT, FGSM, MIFGSM, PGD, PGDL2, AutoAttack, Ensemble, Square
from fastbandit.attacks._draws import below, normal, uniform, words
from fastbandit.attacks._model import Oracle
from fastbandit.attacks._pgd import PGDSettings, _start, pgd_loop
from fastbandit.attacks.ball import Ball
from fastbandit.attacks.registry import ATTACKS, SECTIONS, find_attack
from fastbandit.threat import ThreatModel

EPSILON = 0.2


def accuracy(model, x, y):
    with torch.no_grad():
        return (model(x).argmax(1) == y).float().mean().item()


def linear(classes: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear model and images so far from the bounds that these do not matter."""
    torch.manual_seed(classes)
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, classes))
    x = 0.35 + 0.3 * torch.rand(400, 1, 6, 6)
    return model, x, model(x).argmax(1)


def distance(model, x, y, norm):
    """Radius at which the best attack changes the prediction: margin over the dual norm."""
    weight, logits = model[1].weight.detach(), model(x).detach()
    own = weight[y]
    radii = []
    for other in range(len(weight)):
        length = (own - weight[other]).norm(p=1 if norm == "linf" else 2, dim=1)
        gap = logits.gather(1, y[:, None])[:, 0] - logits[:, other]
        radii.append(torch.where(y == other, torch.inf, gap / length))
    return torch.stack(radii).amin(0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["fgsm", "mifgsm", "pgd", "apgd_ce", "apgd_t", "square"])
def test_two_classes_fall_where_the_closed_form_says(norm, name):
    model, x, y = linear(2)
    radius = distance(model, x, y, norm)
    # Random search gets close to the optimum, not onto it.
    square, reach = name == "square", 0.7 if name == "square" else 0.99
    epsilon = float(radius.median()) * (2 if square else 1)
    # In L2 the part of the start across the gradient shrinks by a factor at each step.
    pgd = {"steps": 30, "step_size": epsilon / 4}
    more = {"pgd": pgd, "square": {"queries": 600}}.get(name, {})
    adversarial = getattr(attacks, name)(model, x, y, epsilon=epsilon, norm=norm, **more)
    delta = (adversarial - x).flatten(1)
    length = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert length.max() <= epsilon * (1 + 1e-5)
    fell = model(adversarial).argmax(1) != y
    assert not fell[radius > epsilon * 1.001].any()
    within = fell[radius < epsilon * reach]
    assert within.float().mean() > 0.7 if square else within.all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_attack_finds_the_nearest_class(norm):
    model, x, y = linear(5)
    radius = distance(model, x, y, norm)
    epsilon = float(radius.median())
    fell = model(attacks.apgd_t(model, x, y, epsilon=epsilon, norm=norm, steps=50)).argmax(1) != y
    assert fell[radius < epsilon * 0.98].all()
    assert not fell[radius > epsilon * 1.001].any()


FORMS = {
    "fgsm": lambda m: FGSM(m, EPSILON),
    "mifgsm": lambda m: MIFGSM(m, EPSILON, EPSILON / 5, 5),
    "pgd": lambda m: PGD(m, EPSILON, EPSILON / 4, 8),
    "pgd early": lambda m: PGD(m, EPSILON, EPSILON / 4, 8, stop_early=True),
    "pgd restarts": lambda m: PGD(m, EPSILON, EPSILON / 4, 5, restarts=2),
    "pgdl2": lambda m: PGDL2(m, 1.0, 0.2, 8),
    "apgd": lambda m: APGD(m, eps=EPSILON, steps=12),
    "apgd dlr": lambda m: APGD(m, eps=EPSILON, steps=12, loss="dlr"),
    "apgd l2": lambda m: APGD(m, "L2", eps=1.0, steps=12),
    "apgdt": lambda m: APGDT(m, eps=EPSILON, steps=6),
    "square": lambda m: Square(m, eps=EPSILON, n_queries=40),
    "square l2": lambda m: Square(m, "L2", eps=1.0, n_queries=40),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_images_at_any_batch_size_and_order(name):
    model = network()
    x, y = images(50)
    attack = FORMS[name](model)
    ids = torch.arange(100, 150)
    whole = attack(x, y, index=ids)
    assert torch.equal(attack(x, y, index=ids, batch_size=16), whole)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(attack(x[order], y[order], index=ids[order]), whole[order])
    parts = [attack(x[p], y[p], index=ids[p]) for p in (slice(0, 3), slice(3, 50))]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("name", FORMS)
def test_in_the_ball_and_the_model_untouched(name):
    model = network()
    x, y = images(40)
    model.train()
    model[0].eval()
    modes = [m.training for m in model.modules()]
    adversarial = FORMS[name](model)(x, y)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    model.eval()
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    delta = (adversarial - x).flatten(1)
    if "l2" in name:
        assert delta.norm(dim=1).max() <= 1.0 + 1e-5
    else:
        assert delta.abs().max() <= EPSILON + 1e-6
    # It does something: far below the accuracy on clean images.
    assert accuracy(model, adversarial, y) < accuracy(model, x, y) - 0.1


@pytest.mark.parametrize("name", FORMS)
def test_inputs_out_of_range_are_refused(name):
    x, y = images(4)
    attack = FORMS[name](network())
    with pytest.raises(ValueError, match="normalisation belongs inside the model"):
        attack((x - 0.5) / 0.5, y)
    with pytest.raises(ValueError, match=r"labels: expected integers of shape \[4\]"):
        attack(x, y[:3])
    with pytest.raises(ValueError, match=r"index: expected int64 of shape \[4\]"):
        attack(x, y, index=torch.arange(3))


def test_batch_norm_statistics_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    model.train()
    x, y = images(20)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for attack in (APGD(model, steps=3), APGDT(model, steps=2), Square(model, n_queries=3)):
        attack(x, y)
    assert model[1].training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_apgd_runs_as_many_steps_as_the_standard_asks():
    """The AutoAttack of torchattacks runs 10 steps; ours 100, and more steps are no weaker."""
    assert APGD(network()).settings["steps"] == 100
    assert Ensemble(network()).settings["targets"] == 9
    assert AutoAttack(network()).settings["targets"] == 9
    x, y = images(200)
    few, many = (
        accuracy(network(), APGD(network(), eps=EPSILON, steps=k)(x, y), y) for k in (10, 100)
    )
    assert many <= few


class Bowl(nn.Module):
    """The loss of label 0 is largest at one point inside the ball, and never fools."""

    def __init__(self, centre):
        super().__init__()
        self.centre = centre

    def forward(self, x):
        near = -10 * (x - self.centre).square().flatten(1).sum(1)
        return torch.stack([torch.full_like(near, 3.0), near], 1)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_apgd_halves_its_step_until_it_hits_an_inner_maximum(norm):
    """It begins with steps of twice the radius; without the schedule it never comes near."""
    torch.manual_seed(0)
    centre = 0.5 + 0.1 * (torch.rand(1, 1, 3, 3) - 0.5)
    x, y = torch.full((20, 1, 3, 3), 0.5), torch.zeros(20, dtype=torch.int64)
    found = attacks.apgd_ce(Bowl(centre), x, y, epsilon=0.2, norm=norm, steps=100)
    assert (found - centre).abs().amax() < 0.01


def test_stopping_early_is_no_weaker_and_asks_less():
    model = network()
    x, y = images(150)
    whole, early = (PGD(model, EPSILON, 0.02, 20, stop_early=stop)(x, y) for stop in (False, True))
    fell_whole, fell_early = ((model(a).argmax(1) != y) for a in (whole, early))
    assert (fell_early | ~fell_whole).all()
    # An image that neither fools ends at the same iterate, repeated or not, up to its cycle.
    assert fell_early.sum() >= fell_whole.sum()
    counts = []
    for stop in (False, True):
        with Oracle(model) as oracle:
            pgd_loop(
                oracle, x, y, ThreatModel(epsilon=EPSILON, steps=20),
                seed=0, index=torch.arange(150), stop_early=stop,
            )  # fmt: skip
        counts.append(oracle.forward_passes)
    assert counts[0] == 150 * 21
    assert counts[1] < 0.8 * counts[0]


def test_an_iterate_that_repeats_ends_the_attack():
    """On a linear model the corner is reached and never left."""
    model, x, y = linear(2)
    with Oracle(model) as oracle:
        threat = ThreatModel(epsilon=1e-4, steps=100, step_size=1e-4)
        found = pgd_loop(oracle, x, y, threat, seed=0, index=torch.arange(len(x)))
    assert oracle.forward_passes < 8 * len(x)
    assert not found.success[distance(model, x, y, "linf") > 1.01e-4].any()


def test_restarts_help_and_attack_only_who_stands():
    model = network()
    x, y = images(150)
    once, thrice = (
        model(PGD(model, EPSILON, 0.02, 10, restarts=r, stop_early=True)(x, y)).argmax(1) != y
        for r in (1, 3)
    )
    assert (thrice | ~once).all()


def test_ensemble_is_the_worst_case_of_its_attacks():
    model = network()
    x, y = images(60)
    together = attacks.ensemble(model, x, y, epsilon=EPSILON, steps=10, queries=50)
    fell = model(together).argmax(1) != y
    for alone in (APGD(model, eps=EPSILON, steps=10), APGDT(model, eps=EPSILON, steps=10)):
        assert (fell | (model(alone(x, y)).argmax(1) == y)).all()
    assert "FAB-T, which is not included" in Ensemble.__doc__


def test_radius_zero_changes_nothing():
    x, y = images(5)
    for name in ("fgsm", "mifgsm", "pgd", "apgd_ce", "apgd_t", "square"):
        assert torch.equal(getattr(attacks, name)(network(), x, y, epsilon=0), x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x, y: attacks.apgd_ce(m, x, y, steps=0), "steps: expected a whole number >= 1"),
        (lambda m, x, y: attacks.apgd_ce(m, x, y, loss="mse"), "loss: expected ce or dlr"),
        (lambda m, x, y: attacks.apgd_t(m, x, y, targets=0), "targets: expected a whole number"),
        (lambda m, x, y: attacks.square(m, x, y, share=0), r"share: expected a number in \(0, 1\]"),
        (
            lambda m, x, y: attacks.pgd(m, x, y, restarts=0),
            "restarts: expected a whole number >= 1",
        ),
        (
            lambda m, x, y: attacks.pgd(m, x, y, batch_size=0),
            "batch_size: expected a whole number >= 1",
        ),
        (lambda m, x, y: attacks.mifgsm(m, x, y, decay=-1), "decay: expected 0 or more"),
        (lambda m, x, y: attacks.pgd(m, x, y, epsilon=8), r"did you mean 8/255\?"),
        (lambda m, x, y: attacks.pgd(m, x, y, norm="l1"), "norm: expected one of linf, l2"),
    ],
)
def test_settings_that_cannot_mean_anything(call, message):
    x, y = images(2)
    with pytest.raises(ValueError, match=message):
        call(network(), x, y)


def test_draws_are_uniform_and_normal():
    ids = torch.arange(2000)
    u = uniform(3, ids, 7, 0)
    assert u.shape == (2000, 7)
    assert abs(u.mean() - 0.5) < 0.01
    z = normal(3, ids, 9, 1).flatten()
    assert abs(z.mean()) < 0.03
    assert abs(z.std() - 1) < 0.03
    counts = torch.bincount(below(words(3, ids, 8, 2), 5).flatten(), minlength=5).double()
    assert ((counts - 3200) ** 2 / 3200).sum() < 18.5  # chi-square, 4 degrees, 0.1 %


@pytest.mark.parametrize(("reach", "nearest"), [(math.inf, 0.0), (0.4, 0.0), (0.1, 0.3), (0, 0.4)])
def test_l2_start_has_a_uniform_radius(reach, nearest):
    """Also in many dimensions, where a uniform point of the ball is all but on its surface."""
    x = torch.full((4000, 1, 8, 8), 0.5)
    ids = torch.arange(7, 4007)

    def start(part: slice) -> torch.Tensor:
        return Ball("l2", 0.4).start(x[part], seed=0, index=ids[part], offset=0, reach=reach)

    delta = start(slice(None))
    radius = delta.flatten(1).norm(dim=1)
    assert radius.min() >= nearest - 1e-6
    assert radius.max() <= 0.4 + 1e-6
    middle = torch.linspace(nearest, 0.4, 4001)[:-1] + (0.4 - nearest) / 8000
    # Kolmogorov and Smirnov: beyond 0.031 once in a thousand times.
    assert (radius.sort().values - middle).abs().max() <= 0.031 * (0.4 - nearest) + 1e-6
    assert delta.mean(0).abs().max() < 0.004
    parts = torch.cat([start(part) for part in (slice(0, 1), slice(1, 1000), slice(1000, 4000))])
    assert torch.equal(parts, delta)


def test_the_start_knows_how_far_the_steps_go():
    x = torch.full((50, 1, 8, 8), 0.5)
    for steps, nearest in ((2, 0.3), (20, 0.0)):
        threat = ThreatModel(norm="l2", epsilon=0.4, steps=steps, step_size=0.05)
        delta = _start(x, threat, 0, None, 0)
        radius = delta.flatten(1).norm(dim=1)
        assert nearest - 1e-6 <= radius.min() < nearest + 0.05


def test_bfloat16_success_counts_only_in_float32():
    """A model that is easily fooled in bfloat16 and never in float32."""

    class Fragile(nn.Module):
        def forward(self, x):
            low = torch.is_autocast_enabled(x.device.type)
            flat = x.flatten(1)
            right = flat.mean(1, keepdim=True) * 0 + (-5.0 if low else 5.0)
            return torch.cat([right, 0 * flat[:, :1]], 1)

    x, y = images(20)
    y = torch.zeros_like(y)
    with Oracle(Fragile(), precision=torch.bfloat16) as oracle:
        threat = ThreatModel(epsilon=0.1, steps=3)
        found = pgd_loop(oracle, x, y, threat, seed=0, index=torch.arange(7, 27))
    assert not found.success.any()
    assert oracle.unconfirmed == set(range(7, 27))


# --- the registry -------------------------------------------------------------------------------


def test_docs_list_the_attacks_of_the_registry():
    text = (Path(__file__).parents[1] / "docs" / "evaluate.md").read_text()
    table = text.split("| name | attack |\n| --- | --- |\n")[1].split("\n\n")[0]
    listed = [
        name for row in table.splitlines() for name in re.findall("`([^`]+)`", row.split("|")[1])
    ]
    assert listed == [name.replace("<steps>", "K") for name in ATTACKS]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("fgsm", "fgsm"), (" MI-FGSM", "mifgsm"), ("pgd7", "pgd-7"), ("PGD-007", "pgd-7"),
        ("apgd-ce", "apgd-ce"), ("apgd-t ", "apgd-t"), ("square", "square"),
        ("pgd-0", None), ("pgd-", None), ("apgd", None), ("", None),
    ],
)  # fmt: skip
def test_an_attack_is_found_by_its_name(name, key):
    found = find_attack(name, {section: kind() for section, kind in SECTIONS.items()})
    assert (found and found.key) == key


def test_an_attack_takes_its_settings_and_no_other():
    settings = {
        "pgd": PGDSettings("1/30", restarts=3),
        "apgd": SECTIONS["apgd"](steps=7, restarts=2, targets=4),
    }
    ball = Ball("linf", Fraction(1, 10))

    def facts(name: str) -> dict:
        return find_attack(name, settings).facts(ball)

    assert (facts("pgd-5")["step_size"], facts("pgd-5")["restarts"]) == ("1/30", 3)
    assert (facts("fgsm")["step_size"], facts("fgsm")["restarts"]) == (None, 1)
    assert facts("apgd-ce") == {"norm": "linf", "steps": 7, "restarts": 2}
    assert facts("apgd-t") == {"norm": "linf", "steps": 7, "restarts": 2, "targets": 4}
    assert find_attack("apgd-t", settings).passes() == (8 * 2 * 4 + 1, 7 * 2 * 4)
