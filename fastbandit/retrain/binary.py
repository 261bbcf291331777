"""Retraining of 1-bit networks: its settings, and training in two steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from torch import nn

from fastbandit.config import ConfigError, Range, at_least
from fastbandit.nn.binary import latents, use_real_weights
from fastbandit.training.kernel_loss import KernelLoss

if TYPE_CHECKING:
    from fastbandit.retrain.config import RetrainConfig

__all__ = ["BinaryConfig", "check_has_bits", "kernel_loss_of", "step_of", "use_step"]


@dataclass(frozen=True)
class BinaryConfig:
    """How 1-bit layers are trained; for networks that have them."""

    steps: Literal[1, 2] = 1
    """1: 1-bit from the first epoch; 2: first 1-bit maps with real weights, then both, each with
    the whole schedule of the learning rate (Liu et al., "ReActNet", ECCV 2020)"""
    first: Annotated[float, Range("a share between 0 and 1", above=0, below=1)] = 0.5
    """share of the epochs that the first of two steps takes"""
    kernel_weight: Annotated[float, at_least(0)] = 0.0
    """weight of what 1-bit weights lose: the mean squared difference of each filter and its scaled
    signs (the kernel-level loss of CP-NAS)"""
    center_weight: Annotated[float, at_least(0)] = 0.0
    """weight of the distance of features to the mean of their class, its second term"""

    def epochs_of_first(self, epochs: int) -> int:
        """Epochs of the step with real weights."""
        if self.steps == 1:
            return 0
        return min(max(1, round(self.first * epochs)), epochs - 1)


def check_has_bits(config: RetrainConfig, network: nn.Module) -> None:
    """Refuse settings of 1-bit layers for a network without.

    Raises:
        ConfigError: the message names the setting.
    """
    if config.binary == BinaryConfig() or next(latents(network), None) is not None:
        return
    names = ("steps", "first", "kernel_weight", "center_weight")
    changed = [n for n in names if getattr(config.binary, n) != getattr(BinaryConfig(), n)]
    raise ConfigError(
        f"binary.{changed[0]}: expected its default for a network without 1-bit weights, got "
        f"{getattr(config.binary, changed[0])}"
    )


def kernel_loss_of(config: RetrainConfig, network: nn.Module) -> KernelLoss | None:
    """The kernel-level loss that the settings ask for; None for none."""
    binary = config.binary
    if not (binary.kernel_weight or binary.center_weight):
        return None
    return KernelLoss(network, binary.kernel_weight, binary.center_weight)


def step_of(config: RetrainConfig, epoch: int) -> int:
    """1 where that epoch trains with real weights, else 2."""
    return 1 if epoch < config.binary.epochs_of_first(config.epochs) else 2


def use_step(config: RetrainConfig, epoch: int, *networks: nn.Module) -> None:
    """Let networks compute as the step of that epoch does."""
    if config.binary.steps == 2:
        for network in networks:
            use_real_weights(network, step_of(config, epoch) == 1)
