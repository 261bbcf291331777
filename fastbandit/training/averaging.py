"""Weight averaging: a copy of a network that follows the one in training."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """Exponential moving average of a network's weights and batch-norm statistics.

    After step t (from 0) of the optimiser::

        average <- d * average + (1 - d) * weights,   d = min(decay, (1 + t) / (10 + t))

    The smaller factor of the first steps lets the average forget the initial weights. Running
    means and variances are averaged with the same factor, so they are those of the weights that
    the average is made of.

    Args:
        network: the one in training.
        decay: in [0, 1).

    Attributes:
        network: the average, a network of its own that takes no gradient.
        steps: updates so far.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"WeightAverage: decay: expected in [0, 1), got {decay}")
        self.decay, self.steps = decay, 0
        self.source = network
        self.network = copy.deepcopy(network).requires_grad_(False)

    @staticmethod
    def _floats(network: nn.Module) -> list[Tensor]:
        tensors = [*network.parameters(), *network.buffers()]
        return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; called after each step of the optimiser."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self._floats(self.network), self._floats(self.source), 1.0 - decay)
        self.steps += 1

    @torch.no_grad()
    def restart(self) -> None:
        """Begin anew from the weights as they are now."""
        self.network.load_state_dict(self.source.state_dict())
        self.steps = 0
