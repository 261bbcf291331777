"""What an evaluation asks of a model: its attacks, its suspicion checks, their verdicts.

A :class:`Plan` answers one yes-or-no question about each image it is given, by that image, the
plan's seed and the model alone. So images may be asked about in any order, batch and process, and
what is known can be stored as one bit for each image and plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from fastbandit._cli import ConfigError
from fastbandit._intervals import sign_test
from fastbandit.attacks._apgd import APGDCEAttack
from fastbandit.attacks._model import (
    Oracle,
    cross_entropy,
)
from fastbandit.attacks._pgd import pgd_loop
from fastbandit.attacks._reference import ReferenceAutoAttack
from fastbandit.attacks._square import SquareAttack
from fastbandit.attacks.ball import Ball
from fastbandit.attacks.registry import ATTACKS, Attack, AttackResult, find_attack
from fastbandit.threat import ThreatModel

__all__ = ["Plan", "attack_plans", "check_plans", "verdicts"]

Run = Callable[[Oracle, Tensor, Tensor, Tensor, int], AttackResult]


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
        names: one name or more, with commas between them. setting: what messages call them.
        settings: the attacks' settings by section.

    Raises:
        ConfigError: no name, one that is none, or twice the same.
    """
    found = []
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
            )
        found.append(Plan.of(attack, ball))
    keys = [plan.key for plan in found]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{setting}: expected each attack once, got {key} twice")
    return found


def on_another(plan: Plan, surrogate: nn.Module, name: str) -> Plan:
    """``plan`` with its images made on ``surrogate`` and judged by the model evaluated."""

    def transfer(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        with Oracle(surrogate, batch_size=oracle.batch_size, labels=y) as other:
            found = plan.run(other, x, y, ids, seed)
        oracle.forward_passes += other.forward_passes
        oracle.backward_passes += other.backward_passes
        logits = oracle.logits(found.adversarial)
        return AttackResult(found.adversarial, oracle.fooled(found.adversarial, logits, y, ids))

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
    try:
        attack = ReferenceAutoAttack.of_release(classes)
    except ImportError:
        raise ConfigError(
            "cross_check: autoattack needs the package pyautoattack; install the extra eval"
        ) from None
    if classes < 4:
        raise ConfigError(
            f"cross_check: expected 4 classes or more for the reference's DLR loss, got {classes}"
        )
    return Plan.of(attack, ball)


# --- suspicion ------------------------------------------------------------------------------

# Below this chance of a fair coin to fall so, an attack that should be the stronger one is called
# weaker.
_LEVEL = 0.01
# Of the images: accuracy that may be left when every image is in reach, and gradients that may be
# exactly zero.
_LEFT, _FLAT = 0.05, 0.05
# Two passes of one batch may differ by rounding, relative to the largest logit.
_ROUNDING = 1e-3
# A copy with frozen batch norms may differ by rounding, relative to the largest logit of the image.
# float32 rounds to 6e-8, and the errors of a deep network add up to some tens of that. Below the
# bound no copy computes another function to speak of; above it nothing is lost but time.
_ROUNDING_OF_COPY = 1e-4
# Of the images: those that stand though the copy that is attacked was fooled. By so much the worst
# case may be too high. Rounding alone leaves few, most of them in bfloat16; of a small number of
# images one or two are chance.
_UNCONFIRMED, _BY_CHANCE = 0.02, 2


def check_plans(ball: Ball, pixels: int, *, steps: int, queries: int) -> list[Plan]:
    """The questions that the suspicion checks rest on, asked of a sample of images."""
    whole = Fraction(1) if ball.norm == "linf" else Fraction(int(pixels**0.5) + 1)
    few = max(steps // 5, 2)

    def gradient(key: str, radius: Fraction | float, count: int, *, last: bool) -> Plan:
        threat = ThreatModel(norm=ball.norm, epsilon=radius, steps=count, random_start=True)

        def run(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
            return pgd_loop(oracle, x, y, threat, seed=seed, index=ids, stop_early=not last)

        return Plan(key, key, threat.describe(), run, forward=count + 1, backward=count)

    def flat(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        _, _, slope = oracle.gradient(x, cross_entropy, y)
        # NaN shows no direction either.
        return AttackResult(x, slope.nan_to_num(nan=0.0).flatten(1).abs().amax(1) == 0)

    def probabilities(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        logits = oracle.logits(x, exact=True)
        found = (logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)
        return AttackResult(x, found)

    def random(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        first, second = (oracle.logits(x, exact=True) for _ in range(2))
        # Written so that NaN in one of the passes counts as apart.
        apart = ~((first - second).abs().amax(1) <= _ROUNDING * first.abs().amax(1))
        return AttackResult(x, apart | (first.argmax(1) != second.argmax(1)))

    return [
        gradient("zero", Fraction(0), 2, last=False),
        gradient("whole", whole, steps, last=False),
        gradient("pgd-1", ball.radius, 1, last=True),
        gradient("pgd-few", ball.radius, few, last=True),
        gradient("pgd-many", ball.radius, steps, last=True),
        Plan.of(APGDCEAttack(steps), ball, key="apgd"),
        Plan.of(SquareAttack(queries), ball, key="square"),
        Plan("flat", "flat", "", flat, forward=1, backward=1),
        Plan("probabilities", "probabilities", "", probabilities, forward=1),
        Plan("random", "random", "", random, forward=2),
    ]


def same_logits(copied: Tensor, exact: Tensor) -> Tensor:
    """Which images have the logits of the network up to rounding, bool [N]; both are [N, K]."""
    # A comparison written this way is also false for NaN.
    return (copied - exact).abs().amax(1) <= _ROUNDING_OF_COPY * exact.abs().amax(1)


def verdicts(
    found: dict[str, Tensor],
    n: int,
    *,
    norm: str,
    steps: int,
    queries: int,
    transfer: tuple[int, int, int] | None,
    unconfirmed: tuple[int, int] | None,
    fixed: tuple[int, int],
) -> dict[str, Any]:
    """The verdict of each check, and of all.

    Args:
        found: which of the ``n`` images (all classified correctly) answered yes, bool [n], by the
            key of the plan.
        transfer: of images attacked both ways: fooled by transfer alone, by white-box attacks
            alone, number; None where there was no transfer.
        unconfirmed: of the images classified correctly, those that stand though the copy of the
            network that was attacked called one of their points adversarial, and their number;
            None where the network itself was attacked.
        fixed: of the fixed images that the model is known by: those whose logits differ between two
            passes, number.
    """
    checks: list[dict[str, str]] = []

    def say(name: str, suspicious: bool, detail: str) -> None:
        checks.append(
            {"name": name, "verdict": "suspicious" if suspicious else "ok", "detail": detail}
        )

    def skip(name: str, detail: str) -> None:
        checks.append({"name": name, "verdict": "skipped", "detail": detail})

    def count(key: str) -> int:
        return int(found[key].sum())

    names = (
        "epsilon 0 is clean", "everything in reach", "more steps never help",
        "black-box not above white-box", "transfer not above white-box", "gradients not zero",
        "logits, not probabilities", "not randomised",
    )  # fmt: skip

    def confirm() -> dict[str, Any]:
        """The check that needs no sample, and the verdict of all."""
        name = "successes confirmed"
        if unconfirmed is None:
            skip(name, "the attacks asked the network itself")
        else:
            denied, total = unconfirmed
            say(
                name,
                denied > max(_UNCONFIRMED * total, _BY_CHANCE),
                f"{denied} of {total} images stand though the faster copy that is attacked was "
                "fooled; the network denied it",
            )
        bad = any(check["verdict"] == "suspicious" for check in checks)
        return {"verdict": "suspicious" if bad else "ok", "checks": checks}

    def say_random(random: int) -> None:
        differ = random + fixed[0] > 0
        say(
            names[7],
            differ,
            f"two passes differ for {random} of {n} images and {fixed[0]} of {fixed[1]} fixed ones"
            + ("; attacks on the mean over many passes would be needed" if differ else ""),
        )

    if not n:
        for name in names[:7]:
            skip(name, "no image was classified correctly, or --checks.images is 0")
        say_random(0)
        return confirm()
    few = max(steps // 5, 2)
    changed = count("zero")
    say(names[0], changed > 0, f"{changed} of {n} predictions change at epsilon 0")
    left = n - count("whole")
    reach = "epsilon 1" if norm == "linf" else "a ball that holds every image"
    say(
        names[1],
        left > _LEFT * n,
        f"PGD-{steps} at {reach} leaves {left} of {n} images standing; at most "
        f"{_LEFT:.0%} are expected to be",
    )
    chain = [("pgd-1", 1), ("pgd-few", few), ("pgd-many", steps)]
    details, weaker = [], False
    for (a, less), (b, more) in itertools.pairwise(chain):
        lost = int((found[a] & ~found[b]).sum())
        won = int((found[b] & ~found[a]).sum())
        weaker |= lost > won and sign_test(lost, won) < _LEVEL
        details.append(
            f"{less} to {more} steps: {n - count(a)} to {n - count(b)} of {n} stand "
            f"({won} more fall, {lost} stand up again)"
        )
    say(names[2], weaker, "; ".join(details))
    white = found["pgd-few"] | found["pgd-many"] | found["apgd"]
    alone, other = int((found["square"] & ~white).sum()), int((white & ~found["square"]).sum())
    say(
        names[3],
        alone > other and sign_test(alone, other) < _LEVEL,
        f"Square with {queries} queries alone fools {alone} of {n}, gradients alone {other}, "
        f"both {int((white & found['square']).sum())}",
    )
    if transfer is None:
        skip(names[4], "no --transfer-from")
    else:
        moved, own, total = transfer
        say(
            names[4],
            moved > own and sign_test(moved, own) < _LEVEL,
            f"of {total} images transfer alone fools {moved}, the white-box attacks alone {own}",
        )
    flat = count("flat")
    say(
        names[5],
        flat > _FLAT * n,
        f"the gradient of the cross-entropy is exactly zero at {flat} of {n} images",
    )
    sums = count("probabilities")
    say(
        names[6],
        sums == n,
        f"{sums} of {n} outputs are non-negative and sum to 1; a softmax before the loss hides "
        "gradients",
    )
    say_random(count("random"))
    return confirm()
