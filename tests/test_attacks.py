import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastbandit import ops
from fastbandit.attacks import attack_mode, check_images, fgsm, perturb, pgd
from fastbandit.threat import ThreatModel


class Linear(nn.Module):
    """Logits that are linear in the image, so the best attack is known in closed form."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(pixels, 2)

    def forward(self, x):
        return self.layer(x.flatten(1))


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8 * 16, 4),
    )


@pytest.fixture
def batch(device):
    torch.manual_seed(0)
    return torch.rand(6, 3, 8, 8, device=device), torch.randint(4, (6,), device=device)


def test_linear_model_is_attacked_optimally(device):
    torch.manual_seed(1)
    model = Linear(48).to(device)
    # Far enough from the bounds that they do not matter.
    images = 0.4 + 0.2 * torch.rand(16, 3, 4, 4, device=device)
    labels = torch.randint(2, (16,), device=device)
    epsilon = 0.05
    weight = model.layer.weight.detach()
    direction = (weight[1] - weight[0]) * torch.where(labels == 0, 1.0, -1.0)[:, None]
    best = (images.flatten(1) + epsilon * direction.sign()).view_as(images)
    for adversarial in (
        fgsm(model, images, labels, epsilon=epsilon),
        pgd(model, images, labels, epsilon=epsilon, steps=10, random_start=True),
    ):
        torch.testing.assert_close(adversarial, best, rtol=0, atol=1e-6)


def test_pgd_follows_the_textbook_loop(device, batch):
    """The same iterates as the loop written out in plain PyTorch, from the same start."""
    images, labels = batch
    torch.manual_seed(2)
    model = small_network().to(device).eval()
    epsilon, step = 0.1, 0.03
    delta = ops.random_start(images, epsilon=epsilon, seed=5, lower=0.0, upper=1.0)
    for _ in range(4):
        point = (images + delta).requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), labels), point)
        delta = (delta + step * gradient.sign()).clamp(-epsilon, epsilon)
        delta = torch.maximum(torch.minimum(delta, 1 - images), -images)
    found = pgd(model, images, labels, epsilon=epsilon, step_size=step, steps=4, seed=5)
    torch.testing.assert_close(found, images + delta, rtol=0, atol=1e-6)


def test_pgd_hurts_more_than_noise(device, batch):
    images, labels = batch
    torch.manual_seed(3)
    model = small_network().to(device).eval()

    def loss(points):
        with torch.no_grad():
            return F.cross_entropy(model(points), labels)

    noisy = [
        loss(images + ops.random_start(images, epsilon=0.1, seed=s, lower=0.0, upper=1.0))
        for s in range(20)
    ]
    assert loss(pgd(model, images, labels, epsilon=0.1, steps=20, seed=1)) > max(noisy)


@pytest.mark.parametrize("bn_mode", ["eval", "train"])
@pytest.mark.parametrize("training", [False, True])
def test_model_comes_back_as_it_was(device, batch, bn_mode, training):
    images, labels = batch
    model = small_network().to(device).train(training)
    model[1].eval()  # a mixed state has to come back too
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    pgd(model, images, labels, epsilon=0.1, steps=2, bn_mode=bn_mode)
    assert [module.training for module in model.modules()] == modes
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 9
    assert all(m.track_running_stats for m in model if isinstance(m, nn.BatchNorm2d))


def test_model_comes_back_after_an_error(device, batch):
    model = small_network().to(device).train()
    with pytest.raises(KeyError), attack_mode(model, "eval"):
        raise KeyError
    assert model.training
    assert model[0].weight.requires_grad


def test_bn_mode_decides_the_statistics(device, batch):
    """In eval mode the running statistics matter, in train mode only the batch's do."""
    images, labels = batch
    torch.manual_seed(4)
    model = small_network()
    model[7] = nn.Identity()  # dropout would hide the difference
    model.to(device)
    results = {}
    for shift in (0.0, 3.0):
        with torch.no_grad():
            model[1].running_mean.fill_(shift)
            model[4].running_mean.fill_(shift)
        for bn_mode in ("eval", "train"):
            results[bn_mode, shift] = pgd(
                model, images, labels, epsilon=0.1, steps=3, bn_mode=bn_mode
            )
    assert torch.equal(results["train", 0.0], results["train", 3.0])
    assert not torch.equal(results["eval", 0.0], results["eval", 3.0])


def test_no_weight_gradient_is_computed(device, batch):
    """The weights do not take part in the attack's graph at all."""
    images, labels = batch

    seen = []

    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x):
            seen.append(self.weight.requires_grad)
            return (self.weight * x).flatten(1)[:, :4]

    pgd(Watch().to(device), images, labels, epsilon=0.1, steps=2)
    assert seen == [False, False]


def test_start_depends_on_the_image_id_alone(device, batch):
    images, labels = batch
    model = small_network().to(device).eval()
    ids = torch.tensor([7, 3, 11, 0, 2, 5], device=device)
    threat = ThreatModel(epsilon="0.1", steps=1)
    whole = perturb(model, images, labels, threat, seed=9, index=ids)
    halves = [
        perturb(model, images[part], labels[part], threat, seed=9, index=ids[part])
        for part in (slice(0, 2), slice(2, 6))
    ]
    # The convolution may sum in another order for another batch size; a sign flip of a gradient
    # that is nearly zero would show as 2 epsilon in a few pixels.
    different = (whole - torch.cat(halves)).abs() > 1e-6
    assert different.float().mean() < 0.01


def test_bounds(device, batch):
    images, labels = batch
    model = small_network().to(device)
    attacked = pgd(model, images, labels, epsilon=0.4, steps=3)
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    free = pgd(model, images, labels, epsilon=0.4, steps=3, lower=None, upper=None)
    assert free.max() > 1
    assert (free - images).abs().max() <= 0.4 + 1e-6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x * 2, ValueError, r"images: expected values in \[0, 1\].*inside the model"),
        (lambda x: x - 0.5, ValueError, r"expected values in \[0, 1\]"),
        (lambda x: x.mul(float("nan")), ValueError, r"expected values in \[0, 1\], got \[nan"),
        (lambda x: (x * 255).byte(), TypeError, "expected a floating-point tensor"),
        (lambda x: x[0, 0, 0], ValueError, r"expected shape \[N, C, H, W\]"),
    ],
)
def test_inputs_out_of_range_are_refused(device, batch, change, error, message):
    images, labels = batch
    with pytest.raises(error, match=message):
        pgd(small_network().to(device), change(images), labels, epsilon=0.1)


def test_labels_are_checked(device, batch):
    images, labels = batch
    with pytest.raises(ValueError, match=r"labels: expected integers of shape \[6\]"):
        fgsm(small_network().to(device), images, labels[:5], epsilon=0.1)
    with pytest.raises(ValueError, match="labels: expected integers"):
        fgsm(small_network().to(device), images, labels.float(), epsilon=0.1)


def test_no_steps_is_no_attack(device, batch):
    images, labels = batch
    model = small_network().to(device)
    delta = perturb(model, images, labels, ThreatModel(steps=0))
    assert delta.count_nonzero() == 0
    check_images(images[:0])
