"""What gradient attacks maximise: a loss of each image, from logits [n, K] and labels [n]."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbandit._suggest import did_you_mean
from fastbandit.attacks._model import Loss, cross_entropy, margin


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, Eq. (5) of the paper, [n]; it knows no scale and no shift.

    -(z_y - max_{i != y} z_i) / (z_1st - z_3rd), for at least three classes.

    Raises:
        ValueError: fewer classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(
            f"loss: dlr: expected a model of three classes or more, got {logits.shape[1]}; "
            "ce is for any number"
        )
    order = logits.sort(dim=1, descending=True).values
    own = labels[:, None]
    other = logits.scatter(1, own, -torch.inf).amax(1)
    return -(logits.gather(1, own)[:, 0] - other) / (order[:, 0] - order[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """The targeted difference of logits ratio, Eq. (6) of the paper, [n].

    -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2). With three classes the divisor is z_1st - z_3rd;
    with two there is nothing to divide by.
    """
    own = logits.gather(1, labels[:, None])[:, 0]
    target = logits.gather(1, targets[:, None])[:, 0]
    classes = logits.shape[1]
    if classes == 2:
        return target - own
    order = logits.sort(dim=1, descending=True).values
    low = order[:, 2] if classes == 3 else 0.5 * (order[:, 2] + order[:, 3])
    return (target - own) / (order[:, 0] - low + 1e-12)


def other_less_own(logits: Tensor, labels: Tensor) -> Tensor:
    """The largest other logit less the label's, [n]: positive where the model is fooled.

    The loss of Carlini and Wagner ("Towards evaluating the robustness of neural networks", 2017),
    f_6 without its bound.
    """
    return -margin(logits, labels)


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "dlr": dlr, "margin": other_less_own}


def find_loss(name: str) -> Loss:
    """The loss of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or name not in LOSSES:
        hint = did_you_mean(name, LOSSES) if isinstance(name, str) else ""
        raise ValueError(f"loss: expected {' or '.join(LOSSES)}, got {name!r}{hint}")
    return LOSSES[name]
