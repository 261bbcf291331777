"""How robust is a model of mine? From any nn.Module to a figure with its verdict.

    python examples/evaluate_my_model.py

The model here is the nearest mean of each class of the embedded digits, which needs no training;
put your own in its place. It takes images in [0, 1] and returns logits.
"""

import torch
from torch import nn

import fastbandit
from fastbandit.data import load

digits = load("digits")
x, y = digits.train.images.flatten(1) / 255, digits.train.labels
means = torch.stack([x[y == label].mean(0) for label in range(10)])
model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
with torch.no_grad():
    model[1].weight.copy_(2 * means)
    model[1].bias.copy_(-means.square().sum(1))

images, labels = digits.test.images[:200] / 255, digits.test.labels[:200]
result = fastbandit.evaluate(model, images, labels, epsilon="0.1", preset="quick")
print(result)
print(f"of {result.n} images {int(result.standing.sum())} stand whatever was tried")
