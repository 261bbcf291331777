"""What is asked about every image: attacks, transfer from another model, the reference.

A :class:`Plan` answers one yes-or-no question about each image it is given, by that image, the
plan's seed and the model alone. So images may be asked about in any order, batch and process, and
what is known can be stored as one bit for each image and plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fastbandit._suggest import did_you_mean
from fastbandit.attacks._model import Oracle, misclassified
from fastbandit.attacks._reference import FEWEST_CLASSES, ReferenceAutoAttack
from fastbandit.attacks.ball import Ball
from fastbandit.attacks.registry import ATTACKS, Attack, AttackResult, find_attack
from fastbandit.config import ConfigError

__all__ = [
    "Plan",
    "attack_plans",
    "clean_plan",
    "on_another",
    "reference_plan",
    "same_logits",
]

Run = Callable[[Oracle, Tensor, Tensor, Tensor, int], AttackResult]

# A copy with frozen batch norms may differ by rounding, relative to the largest logit of the image.
# float32 rounds to 6e-8, and the errors of a deep network add up to some tens of that. Below the
# bound no copy computes another function to speak of; above it nothing is lost but time.
_ROUNDING_OF_COPY = 1e-4


@dataclass(frozen=True)
class Plan:
    """One question about every image.

    key: short name, stable, from which its seed is derived; name: for people; describe: one line.
    run: (oracle, images, labels, ids, seed) -> which images answer yes, and with what.
    budget: how much it spends, where the name does not say so.
    """

    key: str
    name: str
    describe: str
    run: Run
    settings: dict[str, Any] = field(default_factory=dict)
    forward: float = 0.0  # passes of one image that nothing fools, at most
    backward: float = 0.0
    budget: str | None = None
    black_box: bool = False

    @classmethod
    def of(cls, attack: Attack, ball: Ball, key: str | None = None) -> Plan:
        """Which images ``attack`` fools the model with; ``key``: other than the attack's own."""

        def run(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
            return attack.run(oracle, x, y, ids, seed, ball)

        forward, backward = attack.passes()
        return cls(
            key or attack.key,
            attack.title(ball.norm),
            attack.describe(ball),
            run,
            attack.facts(ball),
            forward,
            backward,
            attack.budget(),
            attack.black_box,
        )


def attack_plans(
    names: str, ball: Ball, settings: Mapping[str, object], *, setting: str = "attacks"
) -> list[Plan]:
    """The attacks that ``names`` asks for, in this order.

    Args:
        names: one name or more, with commas between them.
        setting: what messages call them.
        settings: the attacks' settings by section.

    Raises:
        ConfigError: no name, one that is none, or twice the same.
    """
    plans = []
    for name in names.split(","):
        if not name.strip():
            raise ConfigError(
                f"{setting}: expected names with commas between them, of {', '.join(ATTACKS)}, "
                f"got {names!r}"
            )
        attack = find_attack(name, settings)
        if attack is None:
            raise ConfigError(
                f"{setting}: expected names of {', '.join(ATTACKS)}, got {name.strip()!r}"
                + did_you_mean(name, [template.replace("<steps>", "20") for template in ATTACKS])
            )
        plans.append(Plan.of(attack, ball))
    keys = [plan.key for plan in plans]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{setting}: expected each attack once, got {key} twice")
    return plans


def on_another(plan: Plan, surrogate: nn.Module, name: str) -> Plan:
    """``plan`` with its images made on ``surrogate`` and judged by the model evaluated."""

    def transfer(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        with Oracle(surrogate, batch_size=oracle.batch_size, labels=y) as other:
            result = plan.run(other, x, y, ids, seed)
        oracle.forward_passes += other.forward_passes
        oracle.backward_passes += other.backward_passes
        logits = oracle.logits(result.adversarial)
        return AttackResult(result.adversarial, oracle.fooled(result.adversarial, logits, y, ids))

    return replace(
        plan,
        key=f"transfer-{plan.key}",
        describe=f"{plan.describe}; made on {name}",
        run=transfer,
    )


def reference_plan(ball: Ball, classes: int) -> Plan:
    """The reference AutoAttack, standard version, on every image it is given.

    Raises:
        ConfigError: it is not installed, or cannot handle so few classes.
    """
    if classes < FEWEST_CLASSES:
        raise ConfigError(
            f"cross_check: expected {FEWEST_CLASSES} classes or more for the reference's DLR loss, "
            f"got {classes}"
        )
    try:
        return Plan.of(ReferenceAutoAttack.of_release(classes), ball)
    except ImportError:
        raise ConfigError(
            "cross_check: autoattack needs the package pyautoattack; install the extra eval"
        ) from None


def same_logits(copied: Tensor, exact: Tensor) -> Tensor:
    """Which images have the logits of the network up to rounding, bool [N]; both are [N, K]."""
    # A comparison written this way is also false for NaN.
    return (copied - exact).abs().amax(1) <= _ROUNDING_OF_COPY * exact.abs().amax(1)


def clean_plan(fast: nn.Module | None) -> Plan:
    """Who is classified wrongly; and whose logits the fast copy has not, as unconfirmed."""

    def wrong(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        logits = oracle.logits(x, exact=True)
        finite = logits.isfinite().all(1)
        if not bool(finite.all()):
            raise ConfigError(
                f"model: expected finite logits, got NaN or infinity for image "
                f"{int(ids[~finite][0])}"
            )
        if fast is not None:
            # In float32 whatever the attacks compute in: it is the function that is compared.
            with Oracle(fast, batch_size=oracle.batch_size) as copied:
                same = same_logits(copied.logits(x), logits)
            oracle.forward_passes += copied.forward_passes
            oracle.unconfirmed.update(ids[~same].tolist())
        return AttackResult(x, misclassified(logits, y))

    passes = 1 if fast is None else 2
    return Plan("clean", "clean", "clean (no attack)", wrong, forward=passes)
