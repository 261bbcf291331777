"""The settings of a comparison: found networks against networks of chance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from fastbandit._statistics import smallest_p
from fastbandit.config import POSITIVE, SHARE, ConfigError, Range, at_least

__all__ = ["ARMS", "SEARCH", "CompareConfig", "PilotConfig", "check_claim", "fewest", "image_range"]

#: The arm of the searches, which every comparison has.
SEARCH = "search"
#: Arms that a search may be compared with, in the order of the tables.
ARMS = ("matched", "best", "largest", "one-operation")


def image_range(text: str, where: str) -> tuple[int, int] | None:
    """``FIRST:END`` as numbers, the end not included; None for an empty text.

    Raises:
        ConfigError: it is none, or has no image.
    """
    if not text:
        return None
    first, colon, end = (part.strip() for part in text.partition(":"))
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise ConfigError(f"{where}: expected FIRST:END such as 900:1797, got {text!r}")
    return int(first), int(end)


@dataclass(frozen=True)
class PilotConfig:
    """Random networks whose spread says how many an arm needs."""

    networks: Annotated[int, Range("0, or 3 or more", least=0)] = 12
    """random networks, trained before anything is frozen; 0: no pilot"""
    repeats: Annotated[int, at_least(2)] = 2
    """how often each is trained, from another seed each time"""
    images: str = ""
    """test images that the pilot may look at, FIRST:END, none of those of compare.test; empty: the
    validation images of each training"""
    attacks: str = "pgd-20"
    """attacks on those test images, with commas"""
    differences: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0, 3.0, 5.0)
    """differences of robust accuracy, in points, for which the number of networks is computed"""
    simulations: Annotated[int, at_least(100)] = 2000
    """simulated comparisons for each number of networks that is tried"""


@dataclass(frozen=True)
class CompareConfig:
    """Found networks against networks of chance, by a protocol that is frozen before."""

    searches: Annotated[int, at_least(0)] = 0
    """n, independent searches and networks of each arm they are tested against; 0: no comparison"""
    policy: str = "printed"
    """what searches: a policy, or POLICY,SETTING=VALUE,... as in --real.policies"""
    arms: tuple[str, ...] = ARMS
    """what it is compared with: matched (random networks of the size of a found one), best (of as
    many random networks as a search's cost buys, by a tournament with its rungs), largest (within
    the search's budget), one-operation"""
    epochs: Annotated[int, at_least(1)] = 8
    """epochs in which each compared network is trained from scratch"""
    train_limit: Annotated[int | None, at_least(4)] = None
    """training images of the compared networks (a stratified choice); None: all"""
    repeats: Annotated[int, at_least(1)] = 2
    """how often each compared network is trained, from another seed each time; the mean counts"""
    mixes: bool = True
    """the random networks of the arm best have random mixes of the operations, as those of a final
    tournament, and so differ more; no: every operation is equally likely on every edge"""
    tolerance: Annotated[float, SHARE] = 0.03
    """how far the parameters of a matched network may be from those of the found one, as a share"""
    draws: Annotated[int, at_least(1)] = 20_000
    """random networks that are drawn to find one of that size"""
    nearest: bool = False
    """take the nearest in size where none is within the tolerance; else that is an error"""
    test: str = ""
    """test images that are opened once, at the end, as FIRST:END; empty: all"""
    attacks: str = "pgd-20,apgd-ce"
    """attacks on those test images, with commas; an image counts as robust if it stands all"""
    apgd_steps: Annotated[int, at_least(1)] = 100
    """gradient steps of APGD"""
    alpha: Annotated[float, SHARE] = 0.01
    """level of the claim, for p adjusted by Holm's procedure"""
    power: Annotated[float, SHARE] = 0.9
    """probability to find a difference, for which the pilot computes n"""
    margin: Annotated[float, POSITIVE] = 1.0
    """points of robust accuracy by which found networks may be worse than those of the arm best
    and still count as not inferior"""
    claim: bool = True
    """register the tests for a claim; without it few networks will do, and nothing is claimed"""
    processes: Annotated[int, at_least(1)] = 1
    """networks trained at a time, each in a process with one thread; decides no result"""
    pilot: PilotConfig = field(default_factory=PilotConfig)

    def __post_init__(self) -> None:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        if unknown or len(set(self.arms)) < len(self.arms):
            got = unknown[0] if unknown else ", ".join(self.arms)
            raise ConfigError(
                f"compare.arms: expected some of {', '.join(ARMS)}, each once; got {got!r}"
            )
        if self.pilot.networks in (1, 2):
            raise ConfigError(
                "compare.pilot.networks: expected 0, or 3 or more for a standard deviation, got "
                f"{self.pilot.networks}"
            )
        if any(not difference > 0 for difference in self.pilot.differences):
            raise ConfigError(
                "compare.pilot.differences: expected positive numbers, got "
                f"{', '.join(map(str, self.pilot.differences))}"
            )
        tested = image_range(self.test, "compare.test")
        pilot = image_range(self.pilot.images, "compare.pilot.images")
        if pilot is not None and (
            tested is None or (pilot[0] < tested[1] and tested[0] < pilot[1])
        ):
            raise ConfigError(
                "compare.pilot.images: expected none of the test images of compare.test, which "
                f"nobody looks at before the end; got {self.pilot.images} and "
                f"{self.test or 'all'}"
            )

    @property
    def tested(self) -> tuple[str, ...]:
        """The arms that the searches are tested against."""
        return tuple(arm for arm in ("matched", "best") if arm in self.arms)

    @property
    def first_level(self) -> float:
        """What the first step of Holm's procedure asks of the smallest p."""
        return self.alpha / max(1, len(self.tested))


def fewest(alpha: float, tests: int) -> int:
    """The smallest n for which n against n can give an adjusted p below ``alpha``; at least 5.

    Holm's procedure multiplies the smallest of ``tests`` values by their number.
    """
    n = 5
    while tests * smallest_p(n, n) >= alpha:
        n += 1
    return n


def check_claim(compare: CompareConfig) -> None:
    """Refuse a claim that arithmetic excludes.

    Raises:
        ConfigError: nothing is tested, or so few networks that no adjusted p can be below alpha.
    """
    n, tests = compare.searches, len(compare.tested)
    if not compare.claim:
        return
    if not tests:
        raise ConfigError(
            "compare.arms: expected matched or best, which a claim is tested against; "
            "--compare.no-claim compares without one"
        )
    least = fewest(compare.alpha, tests)
    if n < least:
        lowest = min(1.0, tests * smallest_p(n, n))
        raise ConfigError(
            f"compare.searches: expected {least} or more for a claim at {compare.alpha:g}: "
            f"{tests} rank tests of {n} networks against {n} give no adjusted p below "
            f"{lowest:.2g}; got {n}. --compare.no-claim compares without one"
        )
