"""Checks of the kind that catch gradient masking, on a sample of images."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from torch import Tensor

from fastbandit._intervals import sign_test
from fastbandit.attacks._apgd import APGDCEAttack
from fastbandit.attacks._model import Oracle, cross_entropy
from fastbandit.attacks._pgd import pgd_loop
from fastbandit.attacks._square import SquareAttack
from fastbandit.attacks.ball import Ball
from fastbandit.attacks.registry import AttackResult
from fastbandit.evaluate.plans import Plan
from fastbandit.threat import ThreatModel

# Below this chance of a fair coin to fall so, an attack that should be the stronger one is called
# weaker.
_LEVEL = 0.01
# Of the images: accuracy that may be left when every image is in reach, and gradients that may be
# exactly zero.
_LEFT, _FLAT = 0.05, 0.05
# Two passes of one batch may differ by rounding, relative to the largest logit.
_ROUNDING = 1e-3
# Of the images: those that stand though the copy that is attacked was fooled. By so much the worst
# case may be too high. Rounding alone leaves few, most of them in bfloat16; of a small number of
# images one or two are chance.
_UNCONFIRMED, _BY_CHANCE = 0.02, 2


def few_steps(steps: int) -> int:
    """Steps of the attack between one step and the longest."""
    return max(steps // 5, 2)


def sanity_plans(ball: Ball, pixels: int, *, steps: int, queries: int) -> list[Plan]:
    """The questions that the checks rest on, asked of a sample of images."""
    whole = Fraction(1) if ball.norm == "linf" else Fraction(int(pixels**0.5) + 1)

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
        on_simplex = (logits >= 0).all(1) & ((logits.sum(1) - 1).abs() < 1e-3)
        return AttackResult(x, on_simplex)

    def random(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        first, second = (oracle.logits(x, exact=True) for _ in range(2))
        # Written so that NaN in one of the passes counts as apart.
        apart = ~((first - second).abs().amax(1) <= _ROUNDING * first.abs().amax(1))
        return AttackResult(x, apart | (first.argmax(1) != second.argmax(1)))

    return [
        gradient("zero", Fraction(0), 2, last=False),
        gradient("whole", whole, steps, last=False),
        gradient("pgd-1", ball.radius, 1, last=True),
        gradient("pgd-few", ball.radius, few_steps(steps), last=True),
        gradient("pgd-many", ball.radius, steps, last=True),
        Plan.of(APGDCEAttack(steps), ball, key="apgd"),
        Plan.of(SquareAttack(queries), ball, key="square"),
        Plan("flat", "flat", "", flat, forward=1, backward=1),
        Plan("probabilities", "probabilities", "", probabilities, forward=1),
        Plan("random", "random", "", random, forward=2),
    ]


@dataclass(frozen=True)
class Evidence:
    """What the checks judge by.

    answers: which of the ``n`` images of the sample (all classified correctly) answered yes, bool
        [n], by the key of the plan. norm, steps, queries: as of :func:`sanity_plans`.
    transfer: of images attacked both ways: fooled by transfer alone, by white-box attacks alone,
        number; None where there was no transfer.
    unconfirmed: of the images classified correctly, those that stand though the copy of the network
        that was attacked called one of their points adversarial, and their number; None where the
        network itself was attacked.
    fallen: of the sample, those that the attacks of the evaluation fool, bool [n].
    fixed: of the fixed images that the model is known by: those whose logits differ between two
        passes, number.
    """

    answers: dict[str, Tensor]
    n: int
    norm: str
    steps: int
    queries: int
    transfer: tuple[int, int, int] | None
    unconfirmed: tuple[int, int] | None
    fallen: Tensor
    fixed: tuple[int, int]

    def count(self, key: str) -> int:
        return int(self.answers[key].sum()) if self.n else 0


#: Whether something is wrong, None where the check does not apply; and what was found.
Finding = tuple[bool | None, str]


def _exceeds_by_more_than_chance(more: int, less: int) -> bool:
    return more > less and sign_test(more, less) < _LEVEL


def predictions_change_at_epsilon_0(evidence: Evidence) -> Finding:
    changed = evidence.count("zero")
    return changed > 0, f"{changed} of {evidence.n} predictions change at epsilon 0"


def images_stand_with_everything_in_reach(evidence: Evidence) -> Finding:
    n, left = evidence.n, evidence.n - evidence.count("whole")
    reach = "epsilon 1" if evidence.norm == "linf" else "a ball that holds every image"
    return left > _LEFT * n, (
        f"PGD-{evidence.steps} at {reach} leaves {left} of {n} images standing; at most "
        f"{_LEFT:.0%} are expected to be"
    )


def more_steps_are_weaker(evidence: Evidence) -> Finding:
    n, answers = evidence.n, evidence.answers
    chain = [("pgd-1", 1), ("pgd-few", few_steps(evidence.steps)), ("pgd-many", evidence.steps)]
    details, weaker = [], False
    for (a, less), (b, more) in itertools.pairwise(chain):
        lost = int((answers[a] & ~answers[b]).sum())
        won = int((answers[b] & ~answers[a]).sum())
        weaker |= _exceeds_by_more_than_chance(lost, won)
        details.append(
            f"{less} to {more} steps: {n - evidence.count(a)} to {n - evidence.count(b)} of {n} "
            f"stand ({won} more fall, {lost} stand up again)"
        )
    return weaker, "; ".join(details)


def black_box_beats_white_box(evidence: Evidence) -> Finding:
    answers = evidence.answers
    white, black = answers["pgd-few"] | answers["pgd-many"] | answers["apgd"], answers["square"]
    alone, other = int((black & ~white).sum()), int((white & ~black).sum())
    return _exceeds_by_more_than_chance(alone, other), (
        f"Square with {evidence.queries} queries alone fools {alone} of {evidence.n}, gradients "
        f"alone {other}, both {int((white & black).sum())}"
    )


def transfer_beats_white_box(evidence: Evidence) -> Finding:
    if evidence.transfer is None:
        return None, "no --transfer-from"
    moved, own, total = evidence.transfer
    return _exceeds_by_more_than_chance(moved, own), (
        f"of {total} images transfer alone fools {moved}, the white-box attacks alone {own}"
    )


def gradients_are_zero(evidence: Evidence) -> Finding:
    flat, n = evidence.count("flat"), evidence.n
    return flat > _FLAT * n, (
        f"the gradient of the cross-entropy is exactly zero at {flat} of {n} images"
    )


def outputs_are_probabilities(evidence: Evidence) -> Finding:
    sums, n = evidence.count("probabilities"), evidence.n
    return sums == n, (
        f"{sums} of {n} outputs are non-negative and sum to 1; a softmax before the loss hides "
        "gradients"
    )


def passes_differ(evidence: Evidence) -> Finding:
    random, (fixed, probes) = evidence.count("random"), evidence.fixed
    differ = random + fixed > 0
    return differ, (
        f"two passes differ for {random} of {evidence.n} images and {fixed} of {probes} fixed ones"
        + ("; attacks on the mean over many passes would be needed" if differ else "")
    )


def successes_are_not_confirmed(evidence: Evidence) -> Finding:
    if evidence.unconfirmed is None:
        return None, "the attacks asked the network itself"
    denied, total = evidence.unconfirmed
    return denied > max(_UNCONFIRMED * total, _BY_CHANCE), (
        f"{denied} of {total} images stand though the faster copy that is attacked was "
        "fooled; the network denied it"
    )


def other_derivatives_beat_the_attacks(evidence: Evidence) -> Finding:
    by_surrogates, fallen = evidence.answers["surrogates"], evidence.fallen
    alone, other = int((by_surrogates & ~fallen).sum()), int((fallen & ~by_surrogates).sum())
    return _exceeds_by_more_than_chance(alone, other), (
        f"PGD-{evidence.steps} through three derivatives of the sign alone fools {alone} of "
        f"{evidence.n}, the attacks of this evaluation alone {other}"
    )


@dataclass(frozen=True)
class Check:
    """name: of what a sound evaluation shows. finding: looks for the opposite."""

    name: str
    finding: Callable[[Evidence], Finding]
    needs_sample: bool = True


CHECKS = (
    Check("epsilon 0 is clean", predictions_change_at_epsilon_0),
    Check("everything in reach", images_stand_with_everything_in_reach),
    Check("more steps never help", more_steps_are_weaker),
    Check("black-box not above white-box", black_box_beats_white_box),
    Check("transfer not above white-box", transfer_beats_white_box),
    Check("gradients not zero", gradients_are_zero),
    Check("logits, not probabilities", outputs_are_probabilities),
    Check("not randomised", passes_differ, needs_sample=False),
    Check("successes confirmed", successes_are_not_confirmed, needs_sample=False),
)

#: Of networks that compute with signs only.
OF_SIGNS = Check("other derivatives of the sign not above", other_derivatives_beat_the_attacks)

_VERDICTS = {True: "suspicious", False: "ok", None: "skipped"}
NO_SAMPLE = "no image was classified correctly, or --checks.images is 0"


def judge(evidence: Evidence) -> dict[str, Any]:
    """The verdict of each check, and of all."""
    checks = []
    for check in (*CHECKS, OF_SIGNS) if "surrogates" in evidence.answers else CHECKS:
        skipped = check.needs_sample and not evidence.n
        suspicious, detail = (None, NO_SAMPLE) if skipped else check.finding(evidence)
        checks.append({"name": check.name, "verdict": _VERDICTS[suspicious], "detail": detail})
    bad = any(check["verdict"] == "suspicious" for check in checks)
    return {"verdict": "suspicious" if bad else "ok", "checks": checks}
