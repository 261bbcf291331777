"""What training and evaluation cost, counted as they run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

__all__ = ["Cost", "is_out_of_memory", "synchronise"]


@dataclass
class Cost:
    """Work done, counted: seconds by phase, batches passed forward and backward, images."""

    seconds: dict[str, float] = field(default_factory=dict)
    forward_passes: int = 0
    backward_passes: int = 0
    images_trained: int = 0
    images_evaluated: int = 0

    def add_seconds(self, phase: str, seconds: float) -> None:
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def state_dict(self) -> dict[str, Any]:
        return {**vars(self), "seconds": dict(self.seconds)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in vars(self):
            setattr(self, name, state[name])
        self.seconds = dict(self.seconds)


def synchronise(device: torch.device) -> None:
    """Wait for what was launched, before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had.

    A GPU's allocator has a class for it. The CPU's and the libraries' raise RuntimeError, so their
    words have to be read.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
