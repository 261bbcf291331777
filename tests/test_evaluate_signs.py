"""Evaluation of 1-bit networks: several derivatives of the sign, the parent, bits, the check."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbandit.attacks._model import Oracle
from fastbandit.config import ConfigError, merge
from fastbandit.data import load
from fastbandit.evaluate import EvaluateConfig, evaluate_model, signs
from fastbandit.evaluate.sanity import OF_SIGNS
from fastbandit.nn.binary import BinaryConv2d, BinaryConvBN, use_surrogate
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.threat import ThreatModel

BASE = {
    "limit": 100, "epsilon": "0.1", "threads": 1, "batch_size": 64,
    "checks": {"images": 100, "steps": 20, "queries": 200},
}  # fmt: skip


class Small(nn.Module):
    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1)
        self.bn = BatchNorm2d(channels)
        self.body = nn.Sequential(
            BinaryConvBN(channels, channels, 3),
            BinaryConvBN(channels, channels, 3, stride=2),
            BinaryConvBN(channels, channels, 3),
        )
        self.classifier = nn.Linear(channels, 10)

    def forward(self, x):
        return self.classifier(self.body(self.bn(self.stem(x))).mean((2, 3)))


@pytest.fixture(scope="module")
def trained():
    """Clean, a few epochs of the digits."""
    source = load("digits")
    images, labels = source.train.images.float() / 255, source.train.labels
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Small()
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(6):
            for batch in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval()


def evaluated(model, path, **changes):
    config = merge(merge(EvaluateConfig(), BASE, "base"), changes, "test")
    _, result = evaluate_model(model, config, path, source=load("digits"))
    checks = {c["name"]: c for c in result["suspicion"]["checks"]}
    return result, checks


@pytest.mark.slow
def test_one_run_through_one_derivative_is_suspicious_and_the_preset_is_not(trained, tmp_path):
    use_surrogate(trained, "identity")
    one, checks = evaluated(trained, tmp_path / "one", attacks="pgd-20")
    assert checks[OF_SIGNS.name]["verdict"] == "suspicious", checks
    assert checks["black-box not above white-box"]["verdict"] == "suspicious", checks
    assert one["suspicion"]["verdict"] == "suspicious"
    use_surrogate(trained, "poly")
    preset = EvaluateConfig.presets["binary"]
    assert set(preset["surrogates"].split(",")) == {"poly", "tanh", "parent"}
    assert preset["attacks"] == "pgd-50,apgd-ce,square"
    shorter = {
        "attacks": "pgd-20,apgd-ce,square", "pgd": {"restarts": 2}, "apgd": {"steps": 20},
        "square": {"queries": 200},
    }  # fmt: skip
    many, checks = evaluated(trained, tmp_path / "many", **{**preset, **shorter})
    assert checks[OF_SIGNS.name]["verdict"] == "ok", checks
    assert [entry["name"] for entry in many["results"][0]["attacks"]] == [
        "PGD-20 (poly)", "PGD-20 (tanh)", "PGD-20 (parent)",
        "APGD-CE (poly)", "APGD-CE (tanh)", "APGD-CE (parent)", "Square",
    ]  # fmt: skip
    left = [found["results"][0]["worst_case"]["accuracy"] for found in (one, many)]
    assert left[1] < left[0] - 0.2
    assert all(layer.ste == "poly" for layer in trained.modules() if hasattr(layer, "ste"))


def test_a_derivative_is_that_of_the_plan_alone(trained):
    model = Small().eval()
    seen = []

    def run(oracle, x, y, ids, seed):
        seen.append({layer.ste for layer in oracle.model.modules() if hasattr(layer, "ste")})
        raise RuntimeError("stopped")

    config = merge(EvaluateConfig(), {"attacks": "pgd-5,square"}, "test")
    plans = config.plans(ThreatModel(epsilon="0.1"))
    images = torch.rand(20, 1, 8, 8)
    plans[0] = dataclasses.replace(plans[0], run=run)
    found = signs.of_signs(plans, ["tanh", "clip"], model, images)
    for plan in found[:2]:
        with Oracle(model) as oracle, pytest.raises(RuntimeError, match="stopped"):
            plan.run(oracle, images, torch.zeros(20).long(), torch.arange(20), 0)
    assert seen == [{"tanh"}, {"clip"}]
    assert {layer.ste for layer in model.modules() if hasattr(layer, "ste")} == {"poly"}


def test_black_box_attacks_ask_the_packed_network(trained, monkeypatch):
    """The same images as of the network itself, which is asked for confirmation only."""
    config = merge(EvaluateConfig(), {"attacks": "square", "square": {"queries": 30}}, "test")
    plain = config.plans(ThreatModel(epsilon="0.1"))
    images = torch.rand(20, 1, 8, 8)
    labels = trained(images).argmax(1)
    arguments = (images, labels, torch.arange(20), 0)
    with Oracle(trained) as oracle:
        expected = plain[0].run(oracle, *arguments)
    (bits,) = signs.of_signs(plain, ["poly"], trained, images)

    asked, real = [], BinaryConv2d.binary

    def counted(layer, x, *more):
        asked.append(len(x))
        return real(layer, x, *more)

    monkeypatch.setattr(BinaryConv2d, "binary", counted)
    with Oracle(trained) as oracle:
        found = bits.run(oracle, *arguments)
        assert 3 * oracle.forward_passes > 2 * sum(asked)
    assert asked
    assert torch.equal(found.adversarial, expected.adversarial)
    assert torch.equal(found.success, expected.success)


def test_the_parent_computes_with_real_weights(trained):
    images = load("digits").test.images[:256].float() / 255
    state = {name: value.clone() for name, value in trained.state_dict().items()}
    parent = signs.parent_of(trained, images)
    assert not signs.has_signs(parent)
    assert signs.has_signs(trained)
    # The statistics are those of the images, as the parent sees them.
    maps = parent.stem(images)
    torch.testing.assert_close(parent.bn.running_mean, maps.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    first = F.conv2d(F.relu(parent.bn(maps)), parent.body[0].conv.weight, None, 1, 1)
    torch.testing.assert_close(parent.body[0](parent.bn(maps)), parent.body[0].bn(first))
    assert all(torch.equal(value, state[name]) for name, value in trained.state_dict().items())


def test_errors(tmp_path):
    real = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ConfigError, match="surrogates: expected a network with 1-bit layers"):
        evaluated(real, tmp_path / "out", surrogates="poly")
    for names in ("poly,relu", "poly,poly", "poly,"):
        with pytest.raises(ConfigError, match="surrogates: expected names of poly, clip, tanh"):
            merge(EvaluateConfig(), {"surrogates": names}, "test").check()
    # Without one a network of real weights has the checks it had.
    assert OF_SIGNS.name not in evaluated(real, tmp_path / "real", attacks="fgsm")[1]
