"""The batched bandit: one step, and drawing alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbandit import ops

RATE = 0.7


def eager_probabilities(mean: Tensor, count: Tensor, alive: Tensor) -> tuple[Tensor, Tensor]:
    n = count.double()
    width = (2 * n.sum(-1, keepdim=True).log() / n).sqrt()
    return torch.softmax((width - mean).masked_fill(~alive, -math.inf), -1), width


def eager_step(
    mean: Tensor,
    count: Tensor,
    alive: Tensor,
    choice: Tensor,
    reward: Tensor,
    prune: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, Tensor]:
    """The step in the fewest plain operations: every arm tried, an arm alive in each row."""
    arm = choice.unsqueeze(-1)
    mean.scatter_(-1, arm, torch.lerp(mean.gather(-1, arm), reward.unsqueeze(-1), RATE))
    count.scatter_add_(-1, arm, torch.ones_like(arm))
    law, width = eager_probabilities(mean, count, alive)
    worst = (mean + width).masked_fill(~alive, math.inf).argmin(-1, keepdim=True)
    keep = ~(prune & (alive.sum(-1) > 1)).unsqueeze(-1)
    alive.scatter_(-1, worst, alive.gather(-1, worst) & keep)
    law = law * alive
    law = law / law.sum(-1, keepdim=True)
    drawn = (law.cumsum(-1) <= uniform.unsqueeze(-1)).sum(-1).clamp_(max=mean.shape[-1] - 1)
    return drawn, law.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)


def bandits(shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """mean, count, alive, choice, reward, prune, uniform."""
    generator = torch.Generator().manual_seed(0)
    rows = shape[:-1]
    alive = torch.rand(shape, generator=generator) > 0.2
    alive[..., 0] = True
    tensors = (
        torch.rand(shape, generator=generator, dtype=torch.float64),
        torch.randint(1, 9, shape, generator=generator),
        alive,
        torch.randint(0, shape[-1], rows, generator=generator),
        torch.rand(rows, generator=generator, dtype=torch.float64),
        torch.zeros(rows, dtype=torch.bool),
        torch.rand(rows, generator=generator, dtype=torch.float64),
    )
    return tuple(tensor.to(device) for tensor in tensors)


@pytest.mark.parametrize("rival", ["fastbandit", "eager", "torch.compile"])
@pytest.mark.parametrize("shape", [(60, 9), (4096, 60, 9)], ids=["60x9", "4096x60x9"])
def test_bandit_step(measure: Callable[..., None], device, shape, rival):
    state = bandits(shape, device)
    if rival == "fastbandit":
        call: Callable[[], Any] = lambda: ops.bandit_step_(*state, rate=RATE)  # noqa: E731
    else:
        step = torch.compile(eager_step) if rival == "torch.compile" else eager_step
        call = lambda: step(*state)  # noqa: E731
    small = len(shape) == 2
    measure(
        call,
        rival=rival,
        group=f"bandit_step_ {' x '.join(map(str, shape))} float64",
        device=device,
        goals={"eager": 10.0} if small else {"eager": 8.0, "torch.compile": 1.5},
        shape=list(shape),
        dtype="float64",
    )


@pytest.mark.parametrize("rival", ["fastbandit", "torch.multinomial", "exponential race"])
@pytest.mark.parametrize("shape", [(60, 9), (61440, 9)], ids=["60x9", "61440x9"])
def test_bandit_sample(measure, device, shape, rival):
    mean, count, alive, _, _, _, uniform = bandits(shape, device)

    def race() -> Tensor:  # argmax of p / Exp(1): drawing without multinomial's overhead
        law, _ = eager_probabilities(mean, count, alive)
        return (law / torch.empty_like(law).exponential_()).argmax(-1)

    calls: dict[str, Callable[[], Any]] = {
        "fastbandit": lambda: ops.bandit_sample(mean, count, alive, uniform),
        "torch.multinomial": lambda: torch.multinomial(
            eager_probabilities(mean, count, alive)[0], 1
        ),
        "exponential race": race,
    }
    measure(
        calls[rival],
        rival=rival,
        group=f"bandit_sample {' x '.join(map(str, shape))} float64",
        device=device,
        shape=list(shape),
        dtype="float64",
    )


@pytest.mark.parametrize("rival", ["fastbandit", "mabwiser"])
def test_one_bandit(measure, rival):
    """Credit and choose, one bandit of 9 arms: mabwiser's UCB1 against one row."""
    device = torch.device("cpu")
    if rival == "mabwiser":
        wiser = pytest.importorskip("mabwiser.mab")
        bandit = wiser.MAB(list(range(9)), wiser.LearningPolicy.UCB1(alpha=1.0))
        bandit.fit(list(range(9)), [0.5] * 9)

        def call() -> None:
            bandit.partial_fit([3], [0.5])
            bandit.predict()
    else:
        state = bandits((1, 9), device)

        def call() -> None:
            ops.bandit_step_(*state, rate=RATE)

    measure(
        call,
        rival=rival,
        group="one bandit of 9 arms: credit and choose",
        device=device,
        shape=[1, 9],
        dtype="float64",
    )
