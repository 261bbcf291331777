"""The Square attack: random search over squares of pixels, by the model's answers alone.

Source: Andriushchenko, Croce, Flammarion and Hein, "Square Attack: a query-efficient black-box
adversarial attack via random search", ECCV 2020, Algorithms 1 to 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from fastbandit.attacks import _draws
from fastbandit.attacks._attack import (
    Attack,
    AttackResult,
    attack_model,
    check_radius,
    count,
    from_starts,
)
from fastbandit.attacks._model import Oracle, margin
from fastbandit.attacks.ball import Ball, point_of, wide
from fastbandit.config import Range, at_least
from fastbandit.threat import parse_number, parse_whole

# The share of pixels that change is halved at these queries of 10,000.
_HALVED_AT = (10, 50, 200, 1000, 2000, 4000, 6000, 8000)
_MOST_QUERIES = 1 << 20  # of one start: a start's number and a query's share 32 bits
#: The range of that number as a setting.
QUERIES = Range(f"1 to {_MOST_QUERIES}", least=1, most=_MOST_QUERIES)


def _share(query: int, queries: int, first: float) -> float:
    """Share of pixels in the square of a query (the paper's schedule, scaled to its number)."""
    scaled = query * 10_000 // queries
    return first / 2 ** sum(scaled > at for at in _HALVED_AT)


class _Window:
    """A square of its own for each image: where it lies, as masks and as coordinates in it."""

    def __init__(self, top: Tensor, left: Tensor, side: int, height: int, width: int) -> None:
        rows = torch.arange(height, device=top.device)[None, :, None] - top[:, None, None]
        columns = torch.arange(width, device=top.device)[None, None, :] - left[:, None, None]
        inside = (rows >= 0) & (rows < side) & (columns >= 0) & (columns < side)
        self.mask = inside[:, None]  # [n, 1, H, W]
        self._rows, self._columns = rows.clamp(0, side - 1), columns.clamp(0, side - 1)

    def spread(self, pattern: Tensor) -> Tensor:
        """A pattern [n, side, side] laid into the images' windows, zero elsewhere, [n, 1, H, W]."""
        n = len(pattern)
        image = torch.arange(n, device=pattern.device)[:, None, None]
        return pattern[image, self._rows, self._columns][:, None] * self.mask


def _rectangles(height: int, width: int) -> Tensor:
    """Concentric rectangles whose weight falls as 1 / k^2: half of a bump of Algorithm 3."""
    bump = torch.zeros(height, width, dtype=torch.float64)
    centre = (height // 2, width // 2)
    for ring in range(max(height, width) // 2 + 1):
        top, left = max(centre[0] - ring, 0), max(centre[1] - ring, 0)
        bottom, right = min(centre[0] + ring + 1, height), min(centre[1] + ring + 1, width)
        bump[top:bottom, left:right] += 1 / (ring + 1) ** 2
    return bump


def _bump(side: int) -> Tensor:
    """The update of Algorithm 3, of norm 1: a positive and a negative half, [side, side]."""
    upper = side // 2
    bump = torch.cat([_rectangles(upper, side), -_rectangles(side - upper, side)])
    return bump / bump.norm()


def _squared(value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of squares over an image, or over its pixels in ``mask``, float64 [n]."""
    squares = value.double().square()
    return (squares if mask is None else squares * mask).flatten(1).sum(1)


@dataclass(frozen=True)
class SquareAttack(Attack):
    """The Square attack; the defaults are the standard AutoAttack's."""

    name = "square"
    section = "square"
    black_box = True

    queries: Annotated[int, QUERIES] = 5000
    """forward passes for each image"""
    restarts: Annotated[int, at_least(1)] = 1
    """random starts"""
    share: Annotated[float, Range("a number in (0, 1]", above=0, most=1)] = 0.8
    """of the pixels, in the first square"""

    def title(self, norm: str) -> str:
        return "Square"

    def check(self, images: Tensor, ball: Ball) -> None:
        if images.dim() != 4:
            raise ValueError(f"images: expected shape [N, C, H, W], got {list(images.shape)}")
        if ball.norm == "l2" and min(images.shape[2:]) < 3:
            raise ValueError(f"images: expected at least 3 x 3 pixels, got {list(images.shape)}")

    def run(
        self, oracle: Oracle, images: Tensor, labels: Tensor, ids: Tensor, seed: int, ball: Ball
    ) -> AttackResult:
        def attempt(number: int, rows: Tensor) -> AttackResult:
            offset = number * _MOST_QUERIES
            return self._search(oracle, images[rows], labels[rows], ids[rows], seed, ball, offset)

        return from_starts(images, (partial(attempt, number) for number in range(self.restarts)))

    def _side(self, query: int, norm: str, height: int, width: int) -> int:
        """Side of the square of a query, in pixels; odd in L2 as far as the image is that large."""
        part = _share(query, self.queries, self.share)
        side = max(round(math.sqrt(part * height * width)), 1 if norm == "linf" else 3)
        if norm == "l2" and side % 2 == 0:
            side += 1
        return min(side, height, width)

    def _search(
        self,
        oracle: Oracle,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        seed: int,
        ball: Ball,
        offset: int,
    ) -> AttackResult:
        """The search from one start."""
        result = AttackResult.none(images)
        dtype, linf = images.dtype, ball.norm == "linf"
        x, y, rows = wide(images), labels, torch.arange(len(images), device=images.device)
        channels, height, width = x.shape[1:]
        begin, propose = (_stripes, _square_linf) if linf else (_bumps, _square_l2)
        delta = ball.project(begin(x, ids, ball.epsilon, seed, offset), x)
        best = candidate = point_of(x, delta, dtype)
        lowest = torch.full((len(x),), math.inf, dtype=x.dtype, device=x.device)
        for query in range(self.queries):
            if query:
                side = self._side(query, ball.norm, height, width)
                draws = _draws.words(seed, ids, 5 + channels, offset + query)
                candidate = propose(x, best, ball, side, draws)
            logits = oracle.logits(candidate)
            value = oracle.value(margin, logits, y).to(x.dtype)
            # An answer that is not finite has no margin.
            better = (value < lowest) & value.isfinite()
            fooled = oracle.fooled(candidate, logits, y, ids)
            lowest = torch.where(better, value, lowest)
            best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
            if bool(fooled.any()):
                result.adversarial[rows[fooled]] = candidate[fooled]
                result.success[rows[fooled]] = True
                kept = (~fooled).nonzero()[:, 0]
                if not len(kept):
                    return result
                rows, x, y, ids = rows[kept], x[kept], y[kept], ids[kept]
                best, lowest = best[kept], lowest[kept]
        result.adversarial[rows] = best
        return result

    def passes(self) -> tuple[float, float]:
        return self.queries * self.restarts, 0

    def describe(self, ball: Ball) -> str:
        return (
            f"Square, {ball.describe()}, {self.queries} queries, {count(self.restarts, 'restart')}"
        )

    def facts(self, ball: Ball) -> dict[str, Any]:
        kept = {"queries": self.queries, "restarts": self.restarts, "share": self.share}
        return {"norm": ball.norm, **kept}

    def budget(self) -> str | None:
        return f"{self.queries} queries"


def _stripes(x: Tensor, ids: Tensor, epsilon: float, seed: int, offset: int) -> Tensor:
    """The start in L-infinity: vertical stripes of a random sign in each channel."""
    n, channels, _, width = x.shape
    signs = _draws.sign(_draws.words(seed, ids, channels * width, offset))
    return (epsilon * signs.to(x.dtype)).view(n, channels, 1, width).expand_as(x)


def _square_linf(x: Tensor, best: Tensor, ball: Ball, side: int, draws: Tensor) -> Tensor:
    """A square of pixels set to x - epsilon or x + epsilon, a sign for each channel."""
    height, width = x.shape[2:]
    top = _draws.below(draws[:, 0], height - side + 1)
    left = _draws.below(draws[:, 1], width - side + 1)
    window = _Window(top, left, side, height, width)
    signs = _draws.sign(draws[:, 5:]).to(x.dtype)[:, :, None, None]
    delta = ball.project((ball.epsilon * signs).expand_as(x), x)
    return torch.where(window.mask, point_of(x, delta, best.dtype), best)


def _bumps(x: Tensor, ids: Tensor, epsilon: float, seed: int, offset: int) -> Tensor:
    """The start in L2: a grid of bumps with random signs, scaled to the ball's surface."""
    n, channels, height, width = x.shape
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    signs = _draws.sign(_draws.words(seed, ids, channels * down * across, offset))
    bump = _bump(side).to(x.device) if side > 1 else torch.ones(1, 1, device=x.device)
    tiles = signs.double().view(n, channels, down, 1, across, 1) * bump.double().view(
        1, 1, 1, side, 1, side
    )
    delta = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    delta[:, :, : down * side, : across * side] = tiles.reshape(
        n, channels, down * side, across * side
    )
    return (epsilon * delta / _squared(delta).sqrt().view(-1, 1, 1, 1)).to(x.dtype)


def _square_l2(x: Tensor, best: Tensor, ball: Ball, side: int, draws: Tensor) -> Tensor:
    """A bump in one window, paid for with the mass of another (Algorithm 3)."""
    channels, height, width = x.shape[1:]
    delta = (wide(best) - x).double()
    place = [
        _draws.below(draws[:, k], size - side + 1)
        for k, size in enumerate((height, width, height, width))
    ]
    first = _Window(place[0], place[1], side, height, width)
    second = _Window(place[2], place[3], side, height, width)
    either = first.mask | second.mask
    # What the ball has left, and what the two windows give up, shared between the channels.
    left = (ball.epsilon**2 - _squared(delta)).clamp_min(0.0) / channels
    budget = (left + _squared(delta, either)).sqrt().view(-1, 1, 1, 1)
    bump = _bump(side).to(x.device)
    turned = (draws[:, 4] >> 31).bool()[:, None, None]
    pattern = first.spread(torch.where(turned, bump.T, bump))
    signs = _draws.sign(draws[:, 5:]).double()[:, :, None, None]

    def of_norm_one(value: Tensor) -> Tensor:
        """Each channel in the window divided by its norm."""
        length = value.square().sum((2, 3), keepdim=True).sqrt()
        return torch.where(length > 0, value / length, 0.0)

    update = of_norm_one(of_norm_one(delta * first.mask) + signs * pattern)
    kept = torch.where(either, 0.0, delta)
    changed = torch.where(first.mask, update * budget, kept)
    length = _squared(changed).sqrt().view(-1, 1, 1, 1)
    changed = ball.epsilon * torch.where(length > 0, changed / length, 0.0)
    return point_of(x, ball.project(changed.to(x.dtype), x), best.dtype)


def square(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    epsilon: Fraction | str | float = "8/255",
    norm: str = "linf",
    queries: int = 5000,
    restarts: int = 1,
    share: float = 0.8,
    target: Tensor | int | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """The Square attack in the L-infinity or the L2 ball; it asks the model, never its gradient.

    Args:
        images: [N, C, H, W], at least 3 x 3 in L2.
        queries: forward passes for each image, 5,000 in the standard AutoAttack.
        share: of the pixels, in the first square; the paper's p, 0.8 in AutoAttack.

    Other arguments as of :func:`fastbandit.attacks.apgd_ce`.

    Returns:
        For an image that fell, what fooled the model; else the query of smallest margin.
    """
    ball = check_radius(norm, epsilon)
    queries = parse_whole(queries, "queries", 1, _MOST_QUERIES)
    restarts = parse_whole(restarts, "restarts", 1)
    share = parse_number(share, "share")
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    attack = SquareAttack(queries, restarts, share)
    return attack_model(
        attack, ball, model, images, labels,
        seed=seed, index=index, batch_size=batch_size, target=target,
    )  # fmt: skip
