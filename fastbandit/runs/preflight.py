"""What a dry run measures with: as many images as the seconds that it may take allow."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastbandit.runs.environment import peak_memory_mb

__all__ = ["Preflight", "reset_peak_memory"]

#: Seconds in which a dry run has measured what it can; its answer is due after half a minute.
SECONDS = 8.0
# What all measurements of a dry run come to, in steps with a whole batch: a few paths, each with
# training, validation and attack.
_STEPS = 80
# So many images are enough to tell the time of one.
_LEAST = 4

_PROC = Path("/proc/self")


class Preflight:
    """Chooses how much of a dry run is measured, and extrapolates the rest.

    Args:
        seconds: what measuring may take; None: :data:`SECONDS`.

    Attributes:
        per_image: seconds of a training step for each image, once :meth:`images` has run.
        extrapolated: whether memory was measured with small batches only.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.seconds = SECONDS if seconds is None else seconds
        self._ends = time.perf_counter() + self.seconds
        self.per_image = 0.0
        self.extrapolated = False

    @property
    def over(self) -> bool:
        """Whether the time is used up."""
        return time.perf_counter() > self._ends

    def images(self, batch_size: int, step: Callable[[int], None]) -> int:
        """Images of the batches that are measured: all, or fewer where these would take too long.

        Args:
            batch_size: of the run.
            step: a training step with so many images; is called with a few, and once with all
                where that may be quick.
        """
        few = min(_LEAST, batch_size)
        step(few)  # pays for what is loaded and planned once
        self._time(step, few)
        if self.seconds / _STEPS < batch_size * self.per_image < self.seconds / 2:
            # Of a small network a few images take as long as all: it is the calls that take time.
            self._time(step, batch_size)
        most = int(self.seconds / _STEPS / self.per_image)
        return min(batch_size, max(_LEAST, most))

    def _time(self, step: Callable[[int], None], images: int) -> None:
        started = time.perf_counter()
        step(images)
        self.per_image = (time.perf_counter() - started) / images

    def peak_memory_mb(
        self, device: torch.device, batch_size: int, step: Callable[[int], None]
    ) -> float:
        """Peak memory in MiB with a whole batch, on a CPU that of the process.

        Where a step with a whole batch would take more than a third of the time, two smaller ones
        are measured, and :attr:`extrapolated` says so: memory grows by the same with each image.

        Args:
            step: a training step with so many images.
        """
        if batch_size * self.per_image <= self.seconds / 3:
            step(batch_size)
            return peak_memory_mb(device)
        few = max(_LEAST, min(batch_size // 4, int(self.seconds / 12 / self.per_image)))
        peaks = []
        for images in (few, 2 * few):
            if not reset_peak_memory(device):
                step(batch_size)
                return peak_memory_mb(device)
            step(images)
            peaks.append(peak_memory_mb(device))
        self.extrapolated = True
        slope = max(peaks[1] - peaks[0], 0.0) / few
        return peaks[1] + slope * (batch_size - 2 * few)


def reset_peak_memory(device: torch.device) -> bool:
    """Begin to measure the peak of memory anew; False where that cannot be."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        (_PROC / "clear_refs").write_text("5")
    except OSError:
        return False
    return True
