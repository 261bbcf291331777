"""The objectives of retraining: their losses and perturbations by hand, and weight averaging."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbandit import ops
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, Objective, Step, train_epoch
from fastbandit.training.averaging import WeightAverage
from fastbandit.training.objectives import Adversarial, Free, Trades, perturb_away


class Linear(nn.Module):
    """Logits w x of images of two pixels, with a second head of twice the logits."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, -2.0], [-1.0, 0.5], [0.25, 1.0]]))

    def forward(self, x, with_auxiliary=False):
        logits = x.flatten(1) @ self.weight.T
        return (logits, 2 * logits) if with_auxiliary else logits


def make_step(model, threat, n=3, offset=0, images=None):
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 1, 2, generator=generator) if images is None else images
    return Step(
        model, x, torch.tensor([0, 1, 2] * n)[:n], torch.arange(n), threat, 7, offset,
        list(model.modules()), list(model.parameters()),
    )  # fmt: skip


def test_cross_entropy_at_the_attacked_images_is_algorithm_8():
    model, threat = Linear(), ThreatModel(epsilon="0.1")
    step = make_step(model, threat)
    ((mine, logits),) = Adversarial().losses(step)
    ((printed, _),) = Objective().losses(step)
    assert torch.equal(mine, printed)
    point = step.images + step.perturb()
    assert torch.equal(logits, model(point))
    assert mine.item() == pytest.approx(F.cross_entropy(model(point), step.labels).item())


def test_clean():
    model = Linear()
    step = make_step(model, ThreatModel(steps=0))
    ((loss, logits),) = Adversarial().losses(step)
    assert torch.equal(logits, model(step.images))
    assert loss.item() == pytest.approx(F.cross_entropy(logits, step.labels).item())
    assert Adversarial().passes(step.threat) == (1, 1)


@pytest.mark.parametrize("objective", [Adversarial, lambda a: Trades(0.0, a)])
def test_the_auxiliary_head_is_added_with_its_weight(objective):
    model = Linear()
    step = make_step(model, ThreatModel(steps=0))
    ((loss, _),) = objective(0.4).losses(step)
    logits = model(step.images)
    expected = F.cross_entropy(logits, step.labels) + 0.4 * F.cross_entropy(2 * logits, step.labels)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_trades_against_the_formula():
    model, threat = Linear(), ThreatModel(epsilon="0.2", steps=3)
    step = make_step(model, threat)
    ((loss, moved),) = Trades(6.0).losses(step)
    delta = perturb_away(step)
    p = torch.softmax(model(step.images), 1)
    q = torch.softmax(model(step.images + delta), 1)
    divergence = sum(float(p[i, k] * (p[i, k] / q[i, k]).log()) for i in range(3) for k in range(3))
    natural = sum(-float(p[i, step.labels[i]].log()) for i in range(3))
    assert loss.item() == pytest.approx((natural + 6.0 * divergence) / 3, rel=1e-5)
    assert torch.equal(moved, model(step.images + delta))
    assert divergence > 1e-3
    # Both predictions learn, as in the authors' code.
    (gradient,) = torch.autograd.grad(loss, model.parameters())
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("random_start", [True, False])
def test_the_attack_of_trades_climbs_the_divergence(random_start):
    """One step on a linear model: the sign of the gradient of KL, written out."""
    model = Linear()
    threat = ThreatModel(epsilon="0.2", steps=1, step_size="0.05", random_start=random_start)
    step = make_step(model, threat)
    found = perturb_away(step)
    start = ops.random_start(
        step.images, epsilon=0.2 if random_start else 0.001, seed=7, index=step.index, offset=0,
        lower=0.0, upper=1.0,
    )  # fmt: skip
    p = torch.softmax(model(step.images), 1)
    q = torch.softmax(model(step.images + start), 1)
    # d KL(p || q) / d logits of q = q - p.
    gradient = (q - p) @ model.weight
    moved = (start + 0.05 * gradient.sign().view_as(start)).clamp(-0.2, 0.2)
    expected = (step.images + moved).clamp(0, 1) - step.images
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-6)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    more = perturb_away(make_step(model, ThreatModel(epsilon="0.2", steps=8)))
    assert more.abs().max() <= torch.tensor(0.2)


def test_trades_counts_its_passes():
    assert Trades(6.0).passes(ThreatModel(epsilon="0.1", steps=10)) == (13, 12)


def drive(objective, step):
    """What train_epoch does with the generator: backward between two yields."""
    points = []
    for loss, _ in objective.losses(step):
        loss.backward()
        points.append(float(loss))
    return points


def test_free_moves_the_perturbation_by_the_gradient_of_its_own_step():
    model, threat = Linear(), ThreatModel(epsilon="0.1")
    images = torch.tensor([[0.5, 0.5], [0.05, 0.95], [0.4, 0.6]]).view(3, 1, 1, 2)
    step = make_step(model, threat, images=images)
    objective = Free(3)
    losses = drive(objective, step)

    def at(delta):
        point = (images + delta).requires_grad_()
        loss = F.cross_entropy(model(point), step.labels)
        return float(loss), torch.autograd.grad(loss, point)[0]

    delta = torch.zeros_like(images)
    for replay in range(3):
        loss, gradient = at(delta)
        assert losses[replay] == pytest.approx(loss, rel=1e-6)
        # The step is epsilon, not 1.25 epsilon.
        delta = (images + (delta + 0.1 * gradient.sign()).clamp(-0.1, 0.1)).clamp(0, 1) - images
    torch.testing.assert_close(objective._delta, delta, rtol=0, atol=1e-6)
    # From the other side of the ball one step of epsilon leads back to the image.
    _, gradient = at(torch.zeros_like(images))
    objective = Free(1)
    objective._epoch, objective._delta = step.offset, -0.01 * gradient.sign()
    drive(objective, step)
    moved = (0.09 * gradient.sign()).clamp(-0.1, 0.1)
    torch.testing.assert_close(objective._delta[0], moved[0], rtol=0, atol=1e-6)
    # The next batch goes on from it, a smaller one with a part; a new epoch begins at zero.
    other = make_step(model, threat, n=2)
    objective._delta, kept = objective._delta.clone(), objective._delta.clone()
    expected = F.cross_entropy(model((other.images + kept[:2]).clamp(0, 1)), other.labels).item()
    assert drive(objective, other)[0] == pytest.approx(expected, rel=1e-6)
    later = make_step(model, threat, n=4, offset=1)
    expected = F.cross_entropy(model(later.images), later.labels).item()
    assert drive(objective, later)[0] == pytest.approx(expected, rel=1e-6)


class Batches:
    def __init__(self, *sizes):
        self.sizes = sizes

    def epoch(self, number):
        for n in self.sizes:
            step = make_step(Linear(), ThreatModel(), n=n)
            yield step.images, step.labels, step.index


def test_free_makes_a_step_of_the_optimiser_at_each_replay():
    model, rates, updates, cost = Linear(), [], [], Cost()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def rate(number):
        rates.append(number)
        return 0.1

    train_epoch(
        model, Batches(3, 3, 2), 0, optimizer, ThreatModel(epsilon="0.1"), seed=0, cost=cost,
        objective=Free(4), learning_rate=rate, after_step=lambda: updates.append(1),
    )  # fmt: skip
    assert rates == list(range(12))
    assert len(updates) == 12
    assert (cost.forward_passes, cost.backward_passes) == (12, 12)
    assert cost.images_trained == 8


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Free(0), "replays: expected a whole number >= 1"),
        (lambda: Trades(-1.0), "beta: expected 0"),
    ],
)
def test_senseless_objectives(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_average_by_hand():
    network = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1, affine=False))
    with torch.no_grad():
        network[0].weight.fill_(1.0)
    average = WeightAverage(network, 0.15)
    value, mean = 1.0, 0.0
    for t, new in enumerate([3.0, -1.0, 5.0]):
        with torch.no_grad():
            network[0].weight.fill_(new)
            network[1].running_mean.fill_(10 * new)
        average.update()
        # 1/10, then 2/11 and 3/12, but at most the decay.
        decay = min(0.15, (1 + t) / (10 + t))
        value, mean = decay * value + (1 - decay) * new, decay * mean + (1 - decay) * 10 * new
        assert average.network[0].weight.item() == pytest.approx(value, rel=1e-6)
        assert average.network[1].running_mean.item() == pytest.approx(mean, rel=1e-6)
    assert network[0].weight.item() == 5.0
    assert not any(p.requires_grad for p in average.network.parameters())
    with pytest.raises(ValueError, match=r"decay: expected in \[0, 1\), got 1"):
        WeightAverage(network, 1.0)
