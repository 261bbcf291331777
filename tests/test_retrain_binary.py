"""Retraining of 1-bit networks: two steps, the kernel-level loss."""

from __future__ import annotations

import json

import pytest
import torch
from test_binary import everywhere, random_genotype, trained
from test_retrain import interrupted, lines
from torch.nn import functional as F

from fastbandit import ops
from fastbandit.config import ConfigError, merge
from fastbandit.genotype import Genotype
from fastbandit.models import load_model
from fastbandit.nn.binary import (
    BinaryConv2d,
    BinaryDepthwiseConv2d,
    latents,
    pack,
    use_real_weights,
)
from fastbandit.nn.blocks import Signed
from fastbandit.nn.network import Network
from fastbandit.operations import OperationOptions
from fastbandit.retrain import RetrainConfig, retrain
from fastbandit.retrain.binary import BinaryConfig
from fastbandit.retrain.loop import Retraining
from fastbandit.training.kernel_loss import KernelLoss, center_loss, kernel_loss

TINY = {
    "genotype": "found.json", "name": "tiny", "init_channels": 2, "layers": 2, "epochs": 4,
    "train_limit": 64, "train_portion": 0.75, "test_limit": 32, "batch_size": 24,
    "evaluation_batch_size": 32, "threads": 1, "device": "cpu", "ema_decay": 0.5,
    "method": "clean", "learning_rate": 0.3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random_genotype("binary7").save(tmp_path / "found.json")
    return tmp_path


def tiny(**changes) -> RetrainConfig:
    return merge(merge(RetrainConfig(), TINY, "tiny"), changes, "test")


# -- Real weights ---------------------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["zero", "plus_one"])
@pytest.mark.parametrize("kind", ["dense", "depthwise"])
def test_real_weights_on_the_signs_of_the_map(kind, pad):
    options = OperationOptions(pad=pad, ste="tanh")
    layer = (
        BinaryConv2d(4, 3, 3, 2, 2, options=options)
        if kind == "dense"
        else BinaryDepthwiseConv2d(4, 3, 2, 2, options)
    )
    layer.real_weights = True
    x = torch.randn(2, 4, 7, 6, requires_grad=True)
    padded = F.pad(ops.sign_ste(x, ste="tanh"), [2] * 4, value=0.0 if pad == "zero" else 1.0)
    expected = F.conv2d(padded, layer.weight, None, 2, 0, 2, layer.groups)
    y = layer(x)
    torch.testing.assert_close(y, expected)
    gradient = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, layer.weight), gradient)
    torch.testing.assert_close(found, torch.autograd.grad(expected, (x, layer.weight), gradient))


def test_every_layer_follows_and_a_network_with_real_weights_is_not_packed():
    for genotype in (everywhere("bin_sep_conv_3x3"), Genotype.published("BNAS_XNOR_1")):
        torch.manual_seed(0)
        network = Network(genotype, in_channels=1, classes=4, channels=4, cells=2)
        trained(network)
        x = torch.rand(3, 1, 8, 8)
        binary = network(x)
        with torch.no_grad():
            for weight in latents(network):  # other magnitudes, the same signs
                weight.mul_(torch.rand_like(weight) + 0.5)
            network.eval()
        use_real_weights(network, True)
        real = network(x)
        assert not torch.allclose(real, binary)
        layers = [m for m in network.modules() if isinstance(m, BinaryConv2d | Signed)]
        assert all(layer.real_weights for layer in layers)
        with pytest.raises(
            RuntimeError, match=r"pack: expected the child, got a network with real"
        ):
            pack(network)
        use_real_weights(network, False)
        pack(network)


# -- Two steps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "first", "expected"), [(2, 0.5, 1), (5, 0.5, 2), (4, 0.01, 1), (4, 0.99, 3)]
)
def test_epochs_of_the_first_step(epochs, first, expected):
    config = tiny(epochs=epochs, binary={"steps": 2, "first": first})
    assert config.binary.epochs_of_first(epochs) == expected
    # Each step begins and ends as a whole training does.
    whole = tiny(epochs=epochs)
    assert config.rate_at(0) == config.rate_at(expected) == whole.rate_at(0)
    assert config.rate_at(expected - 1e-9) == pytest.approx(0, abs=1e-6)
    assert config.rate_at(epochs) == whole.rate_at(epochs)
    assert BinaryConfig().epochs_of_first(epochs) == 0


def test_the_second_step_begins_with_the_weights_of_the_first(folder, monkeypatch):
    seen = []
    original = Retraining.train

    def train(self, *rest):
        layers = [m for m in self.network.modules() if isinstance(m, BinaryConv2d)]
        averaged = [m for m in self.average.network.modules() if isinstance(m, BinaryConv2d)]
        momentum = sum(
            state["momentum_buffer"].abs().sum().item()
            for state in self.setup.optimizer.state.values()
        )
        weights = [w.detach().clone() for w in latents(self.network)]
        same = all(map(torch.equal, weights, latents(self.average.network)))
        seen.append(
            (
                {m.real_weights for m in layers + averaged},
                momentum > 0,
                self.average.steps,
                same,
                weights,
            )
        )
        found = original(self, *rest)
        seen[-1] += ([w.detach().clone() for w in latents(self.network)],)
        return found

    monkeypatch.setattr(Retraining, "train", train)
    path, summary = retrain(tiny(binary={"steps": 2}), folder / "run")
    assert [s[0] for s in seen] == [{True}, {True}, {False}, {False}]
    # Momentum and average begin anew, the weights do not.
    assert [s[1] for s in seen] == [False, True, False, True]
    assert [s[2] for s in seen] == [0, 2, 0, 2]
    assert seen[2][3]
    assert not seen[3][3]
    assert all(map(torch.equal, seen[1][-1], seen[2][4]))
    assert [line["binary_step"] for line in lines(path / "metrics.jsonl")] == [1, 1, 2, 2]
    # The network that is kept is 1-bit.
    assert [line["best"] for line in lines(path / "metrics.jsonl")][:3] == [False, False, True]
    assert summary["best"]["epoch"] >= 2
    model = load_model(path)
    x = torch.rand(5, 1, 8, 8)
    assert torch.equal(pack(model.network)(x), model.network(x))


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_a_run_of_two_steps_resumes_exactly(epochs, folder, monkeypatch):
    config = tiny(binary={"steps": 2, "kernel_weight": 1e-2, "center_weight": 1e-2})
    whole, _ = retrain(config, folder / "whole")
    interrupted(config, folder / "run", epochs, monkeypatch)
    again, _ = retrain(config, folder / "run")
    for name in ("model-best.safetensors", "model-last.safetensors", "config.yaml"):
        assert (whole / name).read_bytes() == (again / name).read_bytes()


def test_settings_that_say_nothing_are_refused(folder):
    with pytest.raises(ConfigError, match=r"binary.steps: expected 1 with 1 epoch, got 2"):
        tiny(epochs=1, binary={"steps": 2})
    with pytest.raises(ConfigError, match=r"binary.first: expected its default with binary.steps"):
        tiny(binary={"first": 0.3})
    with pytest.raises(ConfigError, match=r"binary.kernel_weight: expected its default for a net"):
        retrain(tiny(genotype="ABANDIT_MNIST_NORMAL_1", binary={"kernel_weight": 1.0}), "run")
    assert not (folder / "run").exists()
    # What is at its default is in no file, so the runs of before are the same runs.
    path, _ = retrain(tiny(epochs=1), folder / "plain")
    assert "binary" not in (path / "config.yaml").read_text()
    assert "binary_step" not in json.loads((path / "metrics.jsonl").read_text().splitlines()[0])


# -- The kernel-level loss ------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["filter", "layer", "none"])
def test_the_first_term_pulls_magnitudes_to_alpha(alpha):
    torch.manual_seed(1)
    layer = BinaryConv2d(5, 3, 3, options=OperationOptions(alpha=alpha)).double()
    weight = layer.weight
    size = {
        "filter": weight.abs().mean((1, 2, 3), keepdim=True),
        "layer": weight.abs().mean(),
        "none": torch.ones(()),
    }[alpha].detach()
    signs = torch.where(weight >= 0, 1.0, -1.0)
    loss = kernel_loss(layer)
    expected = (weight - size * signs).square().sum() / 45
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(gradient, 2 / 45 * (weight.abs() - size) * signs)
    if alpha == "filter":  # alpha as a function of the weights has the same gradient
        own = (weight.abs() - weight.abs().mean((1, 2, 3), keepdim=True)).square().sum() / 45
        torch.testing.assert_close(torch.autograd.grad(own, weight)[0], gradient)


def test_1_bit_weights_on_real_maps_have_a_scale_for_the_layer():
    network = Network(
        Genotype.published("BNAS_XNOR_1"), in_channels=1, classes=4, channels=3, cells=1
    )
    expected = sum(
        (w.abs() - w.abs().mean()).square().flatten(1).mean(1).sum() for w in latents(network)
    )
    torch.testing.assert_close(kernel_loss(network), expected)
    assert kernel_loss(torch.nn.Linear(2, 2)) == 0


def test_the_second_term_by_hand():
    features = torch.tensor([[1.0, 0.0], [3.0, 4.0], [7.0, 7.0]], requires_grad=True)
    labels = torch.tensor([2, 2, 0])
    # The mean of class 2 is (2, 2): squared distances 5, 5; of class 0 itself.
    loss = center_loss(features, labels)
    assert loss.item() == pytest.approx(10 / 3 / 2)
    (gradient,) = torch.autograd.grad(loss, features)
    torch.testing.assert_close(gradient, torch.tensor([[-1.0, -2], [1, 2], [0, 0]]) / 3)


def test_the_loss_is_added_with_its_weights(folder):
    torch.manual_seed(0)
    network = Network(random_genotype("binary7"), in_channels=1, classes=3, channels=2, cells=1)
    labels, x = torch.tensor([0, 1, 1, 2]), torch.rand(4, 1, 8, 8)
    features = []
    handle = network.classifier.register_forward_pre_hook(lambda _, i: features.append(i[0]))
    loss = KernelLoss(network, 0.25, 0.5)
    with loss.watching():
        network(torch.rand(4, 1, 8, 8))  # a pass of the attack; the last one counts
        network(x)
        found = loss(labels)
    expected = 0.25 * kernel_loss(network) + 0.5 * center_loss(features[-1], labels)
    torch.testing.assert_close(found, expected)
    handle.remove()
    assert not network.classifier._forward_pre_hooks
    for term in ({"kernel_weight": 0.5}, {"center_weight": 0.5}):
        plain, _ = retrain(tiny(epochs=1, method="fgsm"), folder / "plain")
        more, _ = retrain(tiny(epochs=1, method="fgsm", binary=term), folder / next(iter(term)))
        first, second = (lines(p / "metrics.jsonl")[0]["loss"] for p in (plain, more))
        assert second > first + 1e-3
