"""What tells one model from another beside its weights: its logits at fixed images.

A network's constants, normalisation, temperature, a softmax at its end or other code decide its
logits too, and none of them is among its weights.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["ROUNDING", "Fingerprint"]

#: Two logits that differ by less than this share of the image's largest one are the same number
#: with other rounding. float32 rounds to 6e-8, and on another machine, with other threads or on a
#: GPU the errors of a deep network add up to some tens or hundreds of that, while what tells
#: models apart, a digit less of a mean or a deviation of the normalisation say, moves logits by
#: more. A hash of rounded logits could not do this: a number beside the edge of two roundings
#: would change it.
ROUNDING = 1e-4


def _differing(
    first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The largest difference of each image's logits as a share of its largest logit, [n].

    Two NaN are the same, and so are two infinities of one sign; either is infinitely far from any
    other number.
    """
    a, b = first.astype(np.float64), second.astype(np.float64)
    finite = np.isfinite(a) & np.isfinite(b)
    largest = np.where(finite, np.maximum(np.abs(a), np.abs(b)), 0).max(1, initial=0.0)
    apart = np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)).max(1, initial=0.0)
    share = np.divide(apart, largest, out=np.zeros_like(apart), where=largest > 0)
    alike = finite | (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(alike.all(1), share, np.inf)


@dataclass(frozen=True)
class Fingerprint:
    """What a model says to fixed images.

    logits: float32 [n, K].
    randomised: of how many of the images two passes differ by more than rounding.
    """

    logits: np.ndarray[Any, np.dtype[np.float32]]
    randomised: int = 0

    @classmethod
    def of(
        cls, first: np.ndarray[Any, np.dtype[np.float32]], second: np.ndarray[Any, Any]
    ) -> Fingerprint:
        """From two passes over the same images."""
        return cls(first, int((_differing(first, second) > ROUNDING).sum()))

    def distance(self, other: Fingerprint) -> float:
        """The largest difference, as a share of the largest logit of its image.

        Models are the same where it is :data:`ROUNDING` or less.
        """
        if self.logits.shape != other.logits.shape:
            return np.inf
        return float(_differing(self.logits, other.logits).max(initial=0.0))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the logits as base64 of little-endian float32."""
        images, classes = self.logits.shape
        data = np.ascontiguousarray(self.logits, "<f4").tobytes()
        return {
            "images": images,
            "classes": classes,
            "randomised": self.randomised,
            "logits": base64.b64encode(data).decode(),
        }

    @classmethod
    def read(cls, value: Any) -> Fingerprint | None:
        """From :meth:`to_dict`; None where ``value`` is not of that form."""
        if not isinstance(value, Mapping):
            return None
        numbers: list[Any] = [value.get(name) for name in ("images", "classes", "randomised")]
        if not all(type(number) is int for number in numbers) or min(numbers[:2]) < 1:
            return None
        try:
            data = base64.b64decode(value.get("logits") or "", validate=True)
            return cls(np.frombuffer(data, "<f4").reshape(numbers[:2]), numbers[2])
        except (TypeError, ValueError, OverflowError):  # binascii.Error is a ValueError
            return None
