"""A guard against rewards that an attack through a derivative of the sign overstates.

A sign has no derivative to follow, so an attack on a 1-bit network follows a surrogate's; a single
run finds too little, and more so on some paths than on others. A search that rewards what such a
run leaves may select for that. So the reward is compared now and then with two attacks that need
no such luck: random starts through several surrogates, and queries without gradients. Where these
leave clearly less, the reward is from then on the worst case of several runs (docs/binary.md).

That attacks on such networks need more than the gradient of one surrogate: Gupta and Ajanthan,
"Improved Gradient-Based Adversarial Attacks for Quantized Networks", AAAI 2022. The criterion is
ours.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit.attacks import pgd, square
from fastbandit.nn.binary import surrogate_of
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, Evaluation
from fastbandit.training.batches import Batches

__all__ = ["GAP", "Masking", "Transfer", "attack", "evaluating", "masking", "worst_case"]

#: By how much accuracy the reward has to be beaten.
GAP = 0.05
#: Random starts through each surrogate: of the check, and of a reward that was found to be masked.
CHECK_RESTARTS, RESTARTS = 5, 3
#: Queries of the Square attack in a check.
QUERIES = 200
#: The surrogates that find most on 1-bit networks.
SURROGATES = ("poly", "tanh")

#: Images of another network, made from images, labels and ids.
Transfer = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Masking:
    """One comparison.

    rewarded: accuracy in [0, 1] under the attack of the reward; restarts, queries: under random
    starts through several surrogates, and under Square; masked: what follows from it.
    """

    rewarded: float
    restarts: float
    queries: float
    images: int

    @property
    def masked(self) -> bool:
        return self.rewarded - min(self.restarts, self.queries) > GAP

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "masked": self.masked}


@contextmanager
def evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for module in modules]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


@torch.no_grad()
def _correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images)
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


def attack(
    model: nn.Module,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    restarts: int,
    seed: int,
) -> Tensor:
    """The images of ``threat`` from several random starts; of each the first that fools."""
    return pgd(
        model, x, y, epsilon=threat.epsilon, step_size=threat.step_size, steps=threat.steps,
        random_start=threat.random_start, norm=threat.norm,
        restarts=restarts if threat.random_start else 1, stop_early=True, lower=threat.lower,
        upper=threat.upper, seed=seed, index=ids,
    )  # fmt: skip


def _add_passes(cost: Cost, batches: int, threat: ThreatModel, restarts: int) -> None:
    """Those of :func:`attack`; fewer where images fall before. A single start is not judged."""
    starts = restarts if threat.random_start else 1
    cost.forward_passes += batches * starts * (threat.steps + (starts > 1))
    cost.backward_passes += batches * starts * threat.steps


def _through(
    model: nn.Module,
    threat: ThreatModel,
    x: Tensor,
    y: Tensor,
    ids: Tensor,
    standing: Tensor,
    restarts: int,
    seed: int,
) -> Tensor:
    """Which of the images that stand withstand every surrogate's attack, from all of its starts."""
    standing = standing.clone()
    for surrogate in SURROGATES:
        left = standing.nonzero().flatten()
        if not len(left):
            break
        with surrogate_of(model, surrogate):
            moved = attack(model, threat, x[left], y[left], ids[left], restarts, seed)
        standing[left] = _correct(model, moved, y[left])
    return standing


def worst_case(
    model: nn.Module,
    batches: Batches,
    threat: ThreatModel,
    *,
    seed: int,
    cost: Cost,
    modules: Iterable[nn.Module],
    transfer: Transfer | None = None,
) -> Evaluation:
    """Accuracy under the worst case, by image, of :data:`RESTARTS` runs through each surrogate.

    Args:
        model: with 1-bit layers; logits of images in [0, 1].
        threat: the attack of a single run.
        seed: of the random starts.
        modules: those that take part, which are in evaluation mode meanwhile.
        transfer: another network's images, which have to be withstood too.
    """
    started = time.perf_counter()
    clean = robust = images = steps = 0
    with evaluating(modules):
        for x, y, ids in batches.epoch(0):
            steps += 1
            standing = _correct(model, x, y)
            clean += int(standing.sum())
            standing = _through(model, threat, x, y, ids, standing, RESTARTS, seed)
            if transfer is not None:
                standing &= _correct(model, transfer(x, y, ids), y)
            robust += int(standing.sum())
            images += len(y)
    seconds = time.perf_counter() - started
    for _ in SURROGATES:
        _add_passes(cost, steps, threat, RESTARTS)
    if transfer is not None:
        _add_passes(cost, steps, threat, 1)
    # Images are judged before the runs, after those of a surrogate, and once transferred.
    cost.forward_passes += steps * (1 + len(SURROGATES) + (transfer is not None))
    cost.images_evaluated += images
    cost.add_seconds("validate", seconds)
    return Evaluation(clean, robust, images, seconds)


def masking(
    model: nn.Module,
    batches: Batches,
    threat: ThreatModel,
    rewarded: float,
    *,
    seed: int,
    cost: Cost,
    modules: Iterable[nn.Module],
) -> Masking:
    """Compare the reward's attack with random starts and with queries, on the images of a guard.

    Args:
        rewarded: accuracy under the attack of the reward on the same images.
    """
    restarts = queries = images = steps = 0
    started = time.perf_counter()
    with evaluating(modules):
        for x, y, ids in batches.epoch(0):
            steps += 1
            clean = _correct(model, x, y)
            standing = _through(model, threat, x, y, ids, clean, CHECK_RESTARTS, seed)
            restarts += int(standing.sum())
            moved = square(
                model, x, y, epsilon=threat.epsilon, norm=threat.norm, queries=QUERIES, seed=seed,
                index=ids,
            )  # fmt: skip
            queries += int((_correct(model, moved, y) & clean).sum())
            images += len(y)
    for _ in SURROGATES:
        _add_passes(cost, steps, threat, CHECK_RESTARTS)
    cost.forward_passes += steps * (QUERIES + 2 + len(SURROGATES))
    cost.images_evaluated += images
    cost.add_seconds("guard", time.perf_counter() - started)
    return Masking(rewarded, restarts / images, queries / images, images)
