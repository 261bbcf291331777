"""Numbers that attacks must not trip over: not finite, rounded, of other libraries, of no model."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

from fastbandit import attacks
from fastbandit.attacks import perturb
from fastbandit.attacks._apgd import APGDCEAttack, APGDTAttack
from fastbandit.attacks._model import Oracle
from fastbandit.attacks._pgd import pgd_loop
from fastbandit.attacks._square import SquareAttack
from fastbandit.attacks.ball import Ball, perturbed, point_of
from fastbandit.evaluate.plans import reference_plan
from fastbandit.threat import ThreatModel, parse_fraction
from fastbandit.training import Cost, Step, evaluate
from fastbandit.training.objectives import Adversarial, Free, Trades, perturb_away

CLASSES = 4
ATTACKS = {
    "fgsm": lambda m, x, y, **k: attacks.fgsm(m, x, y, **k),
    "fgsm start": lambda m, x, y, **k: attacks.fgsm(m, x, y, random_start=True, **k),
    "mifgsm": lambda m, x, y, **k: attacks.mifgsm(m, x, y, steps=5, **k),
    "pgd": lambda m, x, y, **k: attacks.pgd(m, x, y, steps=8, **k),
    "pgd restarts": lambda m, x, y, **k: attacks.pgd(
        m, x, y, steps=4, restarts=2, stop_early=True, **k
    ),
    "apgd_ce": lambda m, x, y, **k: attacks.apgd_ce(m, x, y, steps=12, **k),
    "apgd dlr": lambda m, x, y, **k: attacks.apgd_ce(m, x, y, steps=12, loss="dlr", **k),
    "apgd_t": lambda m, x, y, **k: attacks.apgd_t(m, x, y, steps=8, **k),
    "square": lambda m, x, y, **k: attacks.square(m, x, y, queries=30, **k),
    "ensemble": lambda m, x, y, **k: attacks.ensemble(m, x, y, steps=4, queries=6, **k),
}
GRADIENT_ATTACKS = [name for name in ATTACKS if name != "square"]


class Linear(nn.Module):
    """Logits that are linear in the image, computed in float32 (float64 for float64)."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        self.weight = nn.Parameter(torch.randn(classes, 36, generator=generator))

    def forward(self, x):
        flat = x.flatten(1)
        flat = flat.double() if x.dtype == torch.float64 else flat.float()
        return flat @ self.weight.to(flat.dtype).T


class Then(nn.Module):
    """``before`` the images, the linear model, ``after`` the logits: functions."""

    def __init__(self, before=lambda x: x, after=lambda z: z, classes=CLASSES) -> None:
        super().__init__()
        self.inner = Linear(classes)
        self.before, self.after = before, after

    def forward(self, x):
        return self.after(self.inner(self.before(x)))


def batch(model=None, n=8, dtype=torch.float32):
    """Images far from the bounds, and what the model says of them."""
    generator = torch.Generator().manual_seed(1)
    x = (0.35 + 0.3 * torch.rand(n, 1, 6, 6, generator=generator)).to(dtype)
    with torch.no_grad():
        return x, (model or Linear())(x.clone()).argmax(1)


def wrong(model, x, y):
    with torch.no_grad():
        return model(x.clone()).argmax(1) != y


# --- numbers that are not finite ----------------------------------------------------------------


class _Spoilt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, change):
        ctx.change = change
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return ctx.change(gradient.clone()), None


def spoilt(change):
    """A model whose gradient by the image goes through ``change``."""
    return Then(before=lambda x: _Spoilt.apply(x, change))


def one_pixel(value):
    def change(gradient):
        gradient[:, 0, 0, 0] = value
        return gradient

    return change


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_one_bad_pixel_does_not_stop_an_attack_on_the_others(name, value, norm):
    model = spoilt(one_pixel(value))
    x, y = batch()
    epsilon = 0.15 if norm == "linf" else 0.6
    # That suffices by far without that pixel.
    found = ATTACKS[name](model, x, y, epsilon=epsilon, norm=norm)
    assert found.isfinite().all()
    assert wrong(model, found, y).all()
    delta = (found - x).flatten(1)
    assert (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max() <= epsilon


@pytest.mark.parametrize("factor", [1e-42, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("name", GRADIENT_ATTACKS)
def test_the_size_of_the_gradient_is_no_matter_in_l2(name, factor):
    """1 / 1e-42 is no float32, and neither is the square of 1e38."""
    model = spoilt(lambda gradient: gradient * factor)
    x, y = batch()
    found = ATTACKS[name](model, x, y, epsilon=0.6, norm="l2")
    assert found.isfinite().all()
    assert wrong(model, found, y).all()


def test_the_root_of_a_black_pixel():
    """Its gradient is infinite, or NaN where the weight is zero too."""
    model = Then(before=torch.sqrt)
    x = batch()[0]
    x[:, :, ::2] = 0.0
    y = batch(model)[1]
    with torch.no_grad():
        y = model(x).argmax(1)
        model.inner.weight[:, 0] = 0.0
    for name in GRADIENT_ATTACKS:
        found = ATTACKS[name](model, x, y, epsilon=0.6, norm="l2")
        assert found.isfinite().all(), name
        assert (found - x).flatten(1).norm(dim=1).min() > 0.01, name


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_training_attacks_step_round_a_bad_pixel(norm):
    x, y = batch()
    threat = ThreatModel(norm=norm, epsilon="0.2", steps=3)
    for value in (torch.nan, torch.inf):
        model = spoilt(one_pixel(value))
        step = Step(
            model, x, y, torch.arange(8), threat, 0, 0,
            list(model.modules()), list(model.parameters()),
        )  # fmt: skip
        for delta in (perturb(model, x, y, threat), perturb_away(step)):
            assert delta.isfinite().all()
            size = delta.flatten(1)[:, 1:].abs().amax(1)
            assert size.min() > 0.02
        objective = Free(2)
        for loss, _ in objective.losses(step):
            loss.backward()
        assert objective._delta.isfinite().all()
        assert objective._delta[:, 0, 1:].count_nonzero() > 0


def broken_off_the_images(x, value):
    """A model that is right at these images, and whose answer elsewhere is not finite."""

    class Broken(Linear):
        def forward(self, point):
            logits = super().forward(point)
            away = (point[:, None] - x[None]).abs().flatten(2).amax(2).amin(1) > 1e-4
            return torch.where(away[:, None], logits * 0 + value, logits)

    return Broken()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_answer_that_is_not_finite_is_a_success(value):
    """An argmax over it is class 0, so images of class 0 would be called robust."""
    x, _ = batch()
    model = broken_off_the_images(x, value)
    with torch.no_grad():
        model.weight[0] = 9.0
    y = torch.zeros(8, dtype=torch.int64)
    assert not wrong(model, x, y).any()
    kept = torch.arange(8), 0, Ball("linf", 0.1)
    threat = ThreatModel(epsilon="0.1", steps=2)
    with Oracle(model) as oracle:
        found = [
            pgd_loop(oracle, x, y, threat, seed=0, index=torch.arange(8), stop_early=early)
            for early in (False, True)
        ]
        for attack in (APGDCEAttack(steps=3), APGDTAttack(steps=3, targets=2), SquareAttack(3)):
            found.append(attack.run(oracle, x, y, *kept))
    for attacked in found:
        assert attacked.success.all()
        assert attacked.adversarial.isfinite().all()
    point = found[0].adversarial.clone()
    together = attacks.ensemble(model, point, y, epsilon=0.1, steps=2, queries=2)
    assert torch.equal(together, point)  # the model has them wrong already
    cost = Cost()
    result = evaluate(model, Ready(x, y), ThreatModel(epsilon="0.1"), seed=0, cost=cost)
    assert (result.clean_correct, result.robust_correct) == (8, 0)


def test_an_image_that_is_not_finite_is_no_success():
    x, y = batch(n=4)
    point = x.clone()
    point[0, 0, 2, 2], point[1, 0, 2, 2] = torch.nan, torch.inf
    with Oracle(Linear()) as oracle:
        logits = oracle.logits(point)
        found = oracle.fooled(point, logits, (y + 1) % CLASSES, torch.arange(4))
    assert found.tolist() == [False, False, True, True]


def test_an_image_of_the_reference_that_is_not_finite_is_no_success(monkeypatch):
    class Reference:
        def __init__(self, *_, **__):
            self.apgd_targeted = self.fab = self

        def run_standard_evaluation(self, x, y, batch_size):
            found = 1 - x
            found[::2] = torch.nan
            return found, y

    monkeypatch.setattr(pytest.importorskip("pyautoattack"), "AutoAttack", Reference)
    x, y = batch()
    plan = reference_plan(Ball("linf", Fraction(1, 10)), CLASSES)
    for answer in (1.0, torch.nan):
        model = Then(after=lambda z, answer=answer: z * answer)
        with Oracle(model) as oracle:
            found = plan.run(oracle, x, (y + 1) % CLASSES, torch.arange(8), 0)
        assert not found.success[::2].any()
        if answer != answer:
            assert found.success[1::2].all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_infinite_loss_that_the_exact_model_denies_is_not_the_best(norm):
    """A fast copy whose first answer overflows: later iterates still count as better."""

    class Overflows(Linear):
        calls = 0

        def forward(self, x):
            self.calls += 1
            logits = super().forward(x)
            return (
                logits + torch.where(logits < logits.amax(1, keepdim=True), torch.inf, 0.0)
                if (self.calls == 1)
                else logits
            )

    x, y = batch()
    for attack in (APGDCEAttack(steps=6), APGDCEAttack(steps=6, loss="dlr"), SquareAttack(30)):
        with Oracle(Overflows(), exact=Linear()) as oracle:
            found = attack.run(oracle, x, y, torch.arange(8), 0, Ball(norm, 0.01))
        assert not found.success.any()

        def margins(point):
            with torch.no_grad():
                return attacks._model.margin(Linear()(point), y)

        # Downhill from the images, wherever the first query was.
        assert (margins(found.adversarial) < margins(x)).float().mean() > 0.6


# --- rounding -----------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_point_is_the_nearest_that_is_no_farther(device, dtype):
    generator = torch.Generator().manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.rand(20_000, generator=generator).sub_(0.3)
    x[:2000] *= 1e-4
    x[:10] = 0.0
    x = x.to(dtype).to(wide)
    delta = torch.randn(20_000, generator=generator, dtype=wide) * 0.1
    delta[::7] *= 1e-5
    delta[::11] = 8 / 255
    found = point_of(x.to(device), delta.to(device), dtype).cpu()
    assert found.dtype == dtype
    apart = (found.to(wide) - x).abs()
    assert (apart <= delta.abs()).all()
    # The next value away from the image is not nearer to x + delta within the ball.
    farther = torch.nextafter(found, torch.where(delta > 0, torch.inf, -torch.inf).to(dtype))
    exact = x.double() + delta.double()
    better = (farther.double() - exact).abs() < (found.double() - exact).abs()
    assert ((farther.to(wide) - x).abs()[better] > delta.abs()[better]).all()
    assert torch.equal(point_of(x, torch.zeros_like(x), dtype), x.to(dtype))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_returns_is_in_the_ball(name, dtype, norm):
    x, y = batch(dtype=dtype)
    x[:, :, :2] = x[:, :, :2] * 0.1
    x[:, :, 4:] = 1 - x[:, :, 4:] * 0.01
    with torch.no_grad():
        y = Linear()(x).argmax(1)
    epsilon = "8/255" if norm == "linf" else "0.3"
    found = ATTACKS[name](Linear(), x, y, epsilon=epsilon, norm=norm)
    assert found.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    radius = torch.tensor(float(Fraction(epsilon)), dtype=wide)
    delta = (found.to(wide) - x.to(wide)).flatten(1)
    assert (delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)).max() <= radius
    assert found.min() >= 0
    assert found.max() <= 1
    # Rounding toward the image does not keep it from moving.
    moved = delta.abs().amax() if norm == "linf" else delta.norm(dim=1).max()
    assert moved > 0.8 * radius


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_training_perturbations_are_in_the_ball(dtype, norm):
    x, y = batch(dtype=dtype)
    threat = ThreatModel(norm=norm, epsilon="8/255", steps=2)
    model = Linear()
    step = Step(
        model, x, y, torch.arange(8), threat, 0, 0,
        list(model.modules()), list(model.parameters()),
    )  # fmt: skip
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    radius = torch.tensor(8 / 255, dtype=wide)

    def inside(delta):
        flat = delta.to(wide).flatten(1)
        size = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
        return size.max() <= radius

    for delta in (perturb(model, x, y, threat), perturb_away(step)):
        assert delta.dtype == dtype
        assert inside(delta)
        if dtype in (torch.bfloat16, torch.float16):
            assert inside(perturbed(x, delta).to(wide) - x.to(wide))
    objective = Free(3)
    for loss, _ in objective.losses(step):
        loss.backward()
    assert inside(objective._delta)
    other, _ = batch(n=6, dtype=dtype)
    assert inside(objective._start(Step(**{**vars(step), "images": other.flip(0)})))


def test_bounds_inside_the_range_do_not_push_a_pixel_out_of_the_l2_ball():
    x, y = batch()
    x[:, :, :3] = 0.0
    found = attacks.pgd(Linear(), x, y, epsilon=0.1, norm="l2", lower=0.3, upper=0.6)
    assert (found - x).flatten(1).norm(dim=1).max() <= 0.1


# --- the model's answer and the labels ----------------------------------------------------------


class Ready:
    """Batches that lie ready."""

    def __init__(self, x, y):
        self.tensors = x, y, torch.arange(len(x))

    def epoch(self, number):
        yield self.tensors


ANSWERS = [
    (lambda z: z[:, :1], ValueError, r"two classes or more, got shape \[16, 1\]"),
    (lambda z: z[:, 0], ValueError, r"got shape \[16\]"),
    (lambda z: z[:3], ValueError, r"got shape \[3, 4\]"),
    (lambda z: z[:, :, None], ValueError, r"got shape \[16, 4, 1\]"),
    (lambda z: (z, z), TypeError, "got a tuple"),
    (lambda z: {"logits": z}, TypeError, "got a dict"),
    (lambda z: None, TypeError, "got None"),
    (lambda z: z.detach().numpy(), TypeError, "got a numpy.ndarray"),
    (lambda z: z.argmax(1), TypeError, "got torch.int64"),
    (lambda z: z.to("meta"), ValueError, "on cpu as the images, got meta"),
]


@pytest.mark.parametrize(("after", "error", "message"), ANSWERS)
def test_an_answer_that_is_no_logits_is_refused(after, error, message):
    x, y = batch(n=16)
    model = Then(after=after)
    for name in ATTACKS:
        with pytest.raises(error, match=f"model: expected logits.*{message}"):
            ATTACKS[name](model, x, y, epsilon=0.1)
    with pytest.raises(error, match=f"model: expected logits.*{message}"):
        perturb(model, x, y, ThreatModel(epsilon="0.1"))
    for epsilon in ("0", "0.1"):
        with pytest.raises(error, match=f"model: expected logits.*{message}"):
            evaluate(model, Ready(x, y), ThreatModel(epsilon=epsilon), seed=0, cost=Cost())


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (lambda y: y * 0 - 100, ValueError, "labels: expected classes, 0 or more, got -100"),
        (lambda y: y * 0 + 4, ValueError, "labels: expected classes below 4.*got 4"),
        (lambda y: y.double(), ValueError, r"labels: expected integers.*got torch.float64"),
        (lambda y: y > 1, ValueError, r"labels: expected integers.*got torch.bool"),
        (lambda y: y[:, None], ValueError, r"labels: expected integers of shape \[8\]"),
        (lambda y: y.numpy(), TypeError, "labels: expected an integer tensor.*got a numpy.ndarray"),
        (lambda y: y.tolist(), TypeError, "labels: expected an integer tensor.*got a list"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, error, message):
    x, y = batch()
    for name in ATTACKS:
        with pytest.raises(error, match=message):
            ATTACKS[name](Linear(), x, labels(y), epsilon=0.1)


@pytest.mark.parametrize("name", ATTACKS)
def test_what_is_no_image_and_no_model_is_refused(name):
    x, y = batch()
    attack = ATTACKS[name]
    with pytest.raises(TypeError, match=r"images: expected a floating.*got a numpy.ndarray"):
        attack(Linear(), x.numpy(), y, epsilon=0.1)
    with pytest.raises(TypeError, match=r"images: expected a floating.*got None"):
        attack(Linear(), None, y, epsilon=0.1)
    with pytest.raises(TypeError, match=r"index: expected an int64 tensor.*got a list"):
        attack(Linear(), x, y, epsilon=0.1, index=list(range(8)))
    for model, got in ((None, "None"), (lambda z: z, "a function")):
        with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, got {got}"):
            attack(model, x, y, epsilon=0.1)


def test_two_classes_have_no_logits_ratio_but_a_targeted_loss():
    model = Linear(2)
    x, y = batch(model)
    with pytest.raises(ValueError, match="dlr: expected a model of three classes or more, got 2"):
        attacks.apgd_ce(model, x, y, epsilon=0.1, loss="dlr", steps=2)
    assert wrong(model, attacks.apgd_t(model, x, y, epsilon=0.3, steps=10), y).any()


class InPlace(Linear):
    """The linear model, written as if its input were its own."""

    def forward(self, x):
        return super().forward(x.sub_(0.25).mul_(2.0).add_(0.5).div_(2.0))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_a_model_that_changes_its_input_is_attacked_as_any(name, norm):
    plain = Then(before=lambda x: x.clone().sub_(0.25).mul_(2.0).add_(0.5).div_(2.0))
    x, y = batch(n=16)  # a full block: no copy is made to fill it up
    kept = x.clone()
    epsilon = 0.05 if norm == "linf" else 0.3
    expected = ATTACKS[name](plain, x, y, epsilon=epsilon, norm=norm)
    found = ATTACKS[name](InPlace(), x, y, epsilon=epsilon, norm=norm)
    assert torch.equal(x, kept)
    assert torch.equal(found, expected)


def test_training_attacks_of_a_model_that_changes_its_input():
    plain = Then(before=lambda x: x.clone().sub_(0.25).mul_(2.0).add_(0.5).div_(2.0))
    x, y = batch(n=16)
    threat = ThreatModel(epsilon="0.05", steps=3)
    found = []
    for model in (plain, InPlace()):
        step = Step(
            model, x.clone(), y, torch.arange(16), threat, 0, 0,
            list(model.modules()), list(model.parameters()),
        )  # fmt: skip
        counts = evaluate(model, Ready(x.clone(), y), threat, seed=0, cost=Cost())
        losses = []
        for loss, _ in Free(2).losses(step):
            loss.backward()
            losses.append(loss.item())
        found.append(
            (perturb(model, x, y, threat), perturb_away(step), counts.robust_correct, losses)
        )
        assert torch.equal(step.images, x)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2:] == found[1][2:]


# --- numbers of other libraries -----------------------------------------------------------------

TENTHS = [
    0.1, "0.1", "1/10", Fraction(1, 10), np.float64(0.1), np.float32(0.1), np.array(0.1),
    torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.1).bfloat16(),
    np.float16(0.1),
]  # fmt: skip
SIXES = [6, np.int64(6), np.int32(6), np.uint8(6), np.array(6), torch.tensor(6), Fraction(6)]


@pytest.mark.parametrize("value", TENTHS, ids=lambda v: f"{type(v).__name__}-{v!r}")
def test_a_radius_of_any_kind(value):
    assert parse_fraction(value, "epsilon") == Fraction(1, 10)
    threat = ThreatModel(epsilon=value, step_size=value, lower=np.float32(0), upper=torch.ones(()))
    assert threat == ThreatModel(epsilon="1/10", step_size="1/10")
    assert type(threat.lower) is float


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_take_a_radius_of_any_kind(name):
    x, y = batch()
    expected = ATTACKS[name](Linear(), x, y, epsilon="0.1")
    for value in (Fraction(1, 10), np.float64(0.1), np.float32(0.1), torch.tensor(0.1)):
        assert torch.equal(ATTACKS[name](Linear(), x, y, epsilon=value), expected)
        if name in ("fgsm", "pgd", "mifgsm"):
            ATTACKS[name](Linear(), x, y, epsilon=value, step_size=value)


@pytest.mark.parametrize("value", SIXES, ids=lambda v: type(v).__name__)
def test_a_number_of_steps_of_any_kind(value):
    assert type(ThreatModel(steps=value).steps) is int
    x, y = batch()

    def all_of(k):
        return [
            attacks.pgd(Linear(), x, y, steps=k, restarts=k, seed=k, batch_size=k),
            attacks.mifgsm(Linear(), x, y, steps=k, decay=np.float32(0.5)),
            attacks.apgd_ce(Linear(), x, y, steps=k, seed=k),
            attacks.apgd_t(Linear(), x, y, steps=k, targets=k),
            attacks.square(Linear(), x, y, queries=k, share=np.float64(0.8), seed=k),
            attacks.PGD(Linear(), np.float64(0.1), np.float32(0.02), k)(x, y),
            attacks.APGDT(Linear(), eps=torch.tensor(0.1), steps=k, n_classes=k)(x, y),
        ]

    for found, expected in zip(all_of(value), all_of(6), strict=True):
        assert torch.equal(found, expected)
    assert Free(value).updates == 6
    assert type(Trades(np.float64(6)).beta) is float


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (True, TypeError), (np.bool_(True), TypeError), (torch.tensor([0.1]), TypeError),
        (np.array([0.1]), TypeError), (None, TypeError), (0.1j, TypeError),
        (torch.tensor(torch.nan), ValueError), (np.float32("inf"), ValueError),
        ("1e99999999", ValueError), ("1e400", ValueError), ("9" * 5000, ValueError),
        (10**40, ValueError),
    ],
    ids=lambda v: str(v)[:20],
)  # fmt: skip
def test_what_is_no_radius(value, error):
    with pytest.raises(error, match=r"^epsilon: expected"):
        ThreatModel(norm="l2", epsilon=value)


@pytest.mark.parametrize(
    "value", [True, np.bool_(True), 6.0, np.float64(6), Fraction(1, 2), torch.tensor([6]), "6", -1]
)
def test_what_is_no_number_of_steps(value):
    with pytest.raises(ValueError, match=r"^steps: expected a whole number"):
        ThreatModel(steps=value)


def test_seeds_end_where_the_generator_does():
    x, y = batch()
    for name in ("pgd", "apgd_ce", "apgd_t", "square"):
        with pytest.raises(ValueError, match="seed: expected a whole number <="):
            ATTACKS[name](Linear(), x, y, seed=2**63)


# --- inference mode -----------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_inside_inference_mode_and_no_grad(name, norm):
    x, y = batch()
    model = Linear()
    expected = ATTACKS[name](model, x, y, epsilon=0.1, norm=norm)
    with torch.no_grad():
        assert torch.equal(ATTACKS[name](model, x, y, epsilon=0.1, norm=norm), expected)
    with torch.inference_mode():
        made, labels, ids = x.clone(), y.clone(), torch.arange(8)
        found = ATTACKS[name](model, made, labels, epsilon=0.1, norm=norm, index=ids)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(found, expected)
    assert all(p.requires_grad for p in model.parameters())


def test_training_inside_inference_mode():
    x, y = batch()
    model, threat = Linear(), ThreatModel(epsilon="0.1", steps=2)
    expected = perturb(model, x, y, threat)
    counts = evaluate(model, Ready(x, y), threat, seed=0, cost=Cost())
    with torch.inference_mode():
        made, labels = x.clone(), y.clone()
        assert torch.equal(perturb(model, made, labels, threat), expected)
        again = evaluate(model, Ready(made, labels), threat, seed=0, cost=Cost())
    assert (again.clean_correct, again.robust_correct) == (
        counts.clean_correct,
        counts.robust_correct,
    )
    assert Adversarial().passes(threat) == (3, 3)


@pytest.mark.parametrize("name", ATTACKS)
def test_weights_made_in_inference_mode_are_named(name):
    x, y = batch()
    with torch.inference_mode():
        model = Linear()
        buffered = nn.Sequential(nn.BatchNorm2d(1), Linear())
    buffered[1] = Linear()
    for made, culprit in ((model, "weight"), (buffered, "0.weight")):
        with pytest.raises(ValueError, match=f"model: {culprit}: expected weights that autograd"):
            ATTACKS[name](made, x, y, epsilon=0.1)
        assert made.training
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        ATTACKS[name](model, x, y, epsilon=0.1)
    with pytest.raises(ValueError, match="expected weights that autograd can use"):
        perturb(model, x, y, ThreatModel(epsilon="0.1"))
    outside = copy.deepcopy(model)
    assert ATTACKS[name](outside, x, y, epsilon=0.1).isfinite().all()


@pytest.mark.parametrize("name", ATTACKS)
def test_inside_autocast(name):
    """The model answers in bfloat16; images, losses and comparisons stay in float32."""
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):
        found = ATTACKS[name](Linear(), x, y, epsilon=0.1)
    assert found.dtype == torch.float32
    assert (found - x).abs().max() <= torch.tensor(0.1)
    assert wrong(Linear(), found, y).any()
