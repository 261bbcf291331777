"""What every program of this folder starts with: one network, the same images, one radius.

The network is the one of README.md's example (tests/_digits.py: two convolutions, trained against
FGSM of epsilon 0.15 on the embedded digits for four epochs, seed 0). It is trained once and kept
in the file that COMPARISON_WEIGHTS names, so that every program loads the same weights.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import _digits

EPSILON = 0.15


def load() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The network in evaluation mode, images float32 [N, 1, 8, 8] in [0, 1] and labels [N]."""
    weights = Path(os.environ["COMPARISON_WEIGHTS"])
    if not weights.is_file():
        torch.save(_digits.network().state_dict(), weights)
    network = _digits.plain()
    network.load_state_dict(torch.load(weights, weights_only=True))
    return network.eval(), *_digits.images(int(os.environ.get("COMPARISON_IMAGES", "500")))
