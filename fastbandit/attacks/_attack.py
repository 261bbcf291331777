"""What an attack is: settings that can be run on images, say what they are and what they cost."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastbandit.attacks._model import LARGEST_SEED, Oracle, aimed, with_autograd
from fastbandit.attacks.ball import Ball
from fastbandit.threat import ThreatModel, parse_whole


@dataclass(frozen=True)
class AttackResult:
    """What an attack found.

    adversarial: the images it ended with, shape and dtype of the originals; for an image that
        fooled the model, one that does.
    success: bool [N], whether the model's prediction there is not the label; an answer that is not
        finite counts as wrong, and an image that is not finite as no success.
    """

    adversarial: Tensor
    success: Tensor

    @classmethod
    def none(cls, images: Tensor) -> AttackResult:
        """The images themselves, none of which fools the model."""
        return cls(images.clone(), torch.zeros(len(images), dtype=torch.bool, device=images.device))


class Attack(ABC):
    """One attack. A subclass is a frozen dataclass, of which most fields are settings of a user.

    Class attributes:
        name: what ``--attacks`` calls it; ``<steps>`` stands for a number.
        aliases: other names.
        section: the group of settings that it takes its fields from: ``--<section>.*``, and
            the key in a YAML file; ``""`` for none.
        settings: the dataclass of that group; None where it is the attack itself. Attacks of one
            section share one.
        black_box: whether it asks the model for its answers alone.
    """

    name: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    section: ClassVar[str] = ""
    settings: ClassVar[type[Any] | None] = None
    black_box: ClassVar[bool] = False

    @classmethod
    def parse(cls, name: str) -> dict[str, Any] | None:
        """The fields that ``name`` gives a value to; None where it names another attack."""
        return {} if name in (cls.name, *cls.aliases) else None

    @classmethod
    def settings_class(cls) -> type[Any]:
        """The dataclass of the attack's group of settings."""
        return cls.settings or cls

    @classmethod
    def of(cls, settings: object | None, named: Mapping[str, Any]) -> Attack:
        """The attack with the fields that its name gives, and the others out of its group."""
        assert dataclasses.is_dataclass(cls)
        own = {field.name for field in dataclasses.fields(cls)}
        given = {} if settings is None else vars(settings)
        return cls(**{name: value for name, value in given.items() if name in own}, **named)

    @property
    def key(self) -> str:
        """Short stable name, from which the seed of the attack is derived."""
        return self.name

    @abstractmethod
    def title(self, norm: str) -> str:
        """The name for people."""

    @abstractmethod
    def run(
        self,
        oracle: Oracle,
        images: Tensor,
        labels: Tensor,
        ids: Tensor,
        seed: int,
        ball: Ball,
    ) -> AttackResult:
        """Attack the images, within ``with oracle``; a random number is one of (seed, id) alone."""

    @abstractmethod
    def passes(self) -> tuple[float, float]:
        """Forward and backward passes of an image that nothing fools, at most."""

    @abstractmethod
    def describe(self, ball: Ball) -> str:
        """One line: attack, ball and settings."""

    @abstractmethod
    def facts(self, ball: Ball) -> dict[str, Any]:
        """The settings as a result keeps them: plain values."""

    def budget(self) -> str | None:
        """How much the attack spends, for a line of provenance; None where its name says so."""
        return None

    @staticmethod
    def note(settings: Any) -> str | None:
        """What provenance says of the group of settings, whether or not the attack runs."""
        return None

    def check(self, images: Tensor, ball: Ball) -> None:  # noqa: B027
        """Refuse images that this attack has no way to change, with a ValueError."""


def count(number: int, what: str) -> str:
    """``1 restart``, ``2 restarts``."""
    return f"{number} {what}" + ("" if number == 1 else "s")


def from_starts(
    images: Tensor, attempts: Iterable[Callable[[Tensor], AttackResult]]
) -> AttackResult:
    """Attempts one after the other, each on the images that still stand.

    Args:
        attempts: each is given the positions of these images, int64 [n], and attacks them. An image
            keeps what the first success ended with; one that stands, what the last attempt did.
    """
    result = AttackResult.none(images)
    for attempt in attempts:
        rows = (~result.success).nonzero()[:, 0]
        if not len(rows):
            break
        again = attempt(rows)
        result.adversarial[rows] = again.adversarial
        result.success[rows] = again.success
    return result


def check_radius(norm: str, epsilon: Fraction | str | float) -> Ball:
    """The ball of that radius in [0, 1], after the checks of the threat model."""
    return ThreatModel(norm=norm, epsilon=epsilon).ball


@with_autograd
def attack_model(
    attack: Attack,
    ball: Ball,
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    *,
    seed: int,
    index: Tensor | None,
    batch_size: int | None,
    target: Tensor | int | None = None,
) -> Tensor:
    """The adversarial images of ``attack`` on ``model``, after the checks of all arguments."""
    seed = parse_whole(seed, "seed", most=LARGEST_SEED)
    images, labels, index, oracle = aimed(
        model, images, labels, index, target=target, batch_size=batch_size
    )
    attack.check(images, ball)
    if not ball.epsilon:
        return images.clone()
    with oracle:
        return attack.run(oracle, images, labels, index, seed, ball).adversarial
