"""Small networks trained on the embedded digits, once for all tests that attack them."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbandit import space
from fastbandit.attacks import fgsm
from fastbandit.data import load, statistics
from fastbandit.genotype import Genotype
from fastbandit.models import Architecture, save_model
from fastbandit.threat import ThreatModel


def images(n: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Test images in [0, 1] and their labels."""
    test = load("digits").test
    part = slice(first, first + n)
    return test.images[part].float() / 255, test.labels[part]


def _train(network: nn.Module, epochs: int) -> nn.Module:
    """Adversarial training by FGSM at epsilon 0.15."""
    train = load("digits").train
    x, y = train.images.float() / 255, train.labels
    optimizer = torch.optim.Adam(network.parameters(), 4e-3)
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for part in order.split(128):
            point = fgsm(
                network, x[part], y[part], epsilon=0.15, random_start=True, seed=epoch, index=part
            )
            network.train()
            loss = F.cross_entropy(network(point), y[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    optimizer.zero_grad()
    return network.eval()


def plain() -> nn.Module:
    """Two convolutions, not trained."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )


def network() -> nn.Module:
    """A plain network of two convolutions, trained; the caller's own, whatever it does to it."""
    return deepcopy(_network())


@lru_cache
def _network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _train(plain(), 4)


@lru_cache
def _searched() -> tuple[Genotype, Architecture, dict[str, Tensor]]:
    found = space.get("general7-light")
    operations = list(found.operations)
    some = [operations.index(name) for name in ("skip_connect", "sep_conv_m_3x3", "max_pool_3x3")]
    genotype = Genotype.from_choices(found, [some[row % 3] for row in range(found.rows)])
    architecture = Architecture(in_channels=1, classes=10, channels=4, cells=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mean, std = statistics(load("digits").train)
        made = _train(architecture.build(genotype, mean=mean, std=std), 2)
    return genotype, architecture, made.state_dict()


def model_file(folder: Path) -> Path:
    """A trained network of a genotype as retraining writes it."""
    genotype, architecture, state = _searched()
    source = load("digits")
    path = folder / "model-best.safetensors"
    save_model(
        path,
        state,
        genotype=genotype,
        architecture=architecture,
        data={"name": source.name, "digest": source.digest, "shape": [1, 8, 8]},
        training={"threat": ThreatModel(epsilon="0.15").to_dict()},
    )
    return path
