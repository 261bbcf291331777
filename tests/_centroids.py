"""A classifier of the embedded digits that needs no training, as code that users name."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastbandit.data import load


class Centroids(nn.Module):
    """The nearest mean of a class: logits 2 x m - m m, times a factor."""

    def __init__(self, factor: float = 1.0, classes: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(64, classes)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * self.linear(x.flatten(1))


def empty() -> nn.Module:
    """Without its weights."""
    return Centroids()


def fitted() -> nn.Module:
    train = load("digits").train
    x = train.images.flatten(1).float() / 255
    means = torch.stack([x[train.labels == label].mean(0) for label in range(10)])
    model = Centroids()
    with torch.no_grad():
        model.linear.weight.copy_(2 * means)
        model.linear.bias.copy_(-means.square().sum(1))
    return model


def needs(size: int) -> nn.Module:
    return Centroids(size)


def no_model() -> str:
    return "weights"


def misfit() -> nn.Module:
    """For other images."""
    return nn.Linear(3, 10)


ready, held = fitted(), Centroids()
number = 3
