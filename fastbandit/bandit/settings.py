"""The settings of the bandits: one definition for commands, bandits, simulations and logs.

A policy with a parameter of its own has it here, as a field with a default and a line of
:meth:`BanditSettings.check`; the policy reads ``bandit.settings``. The command line, the entries of
a study, checkpoints and logs take it from this class.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any

from typing_extensions import Doc

from fastbandit.bandit.policies import POLICIES
from fastbandit.config import BELONGS, LATER

__all__ = ["ALWAYS_RECORDED", "BanditSettings", "is_integer", "is_number"]

# In every checkpoint and every log. A setting that came later is there where it is not at its
# default, so that what was written before it came can still be read.
ALWAYS_RECORDED = ("policy", "rate", "rounds", "bonus", "scale")


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _list_policies() -> str:
    return ", ".join(
        f"{name} ({policy.description})" if policy.description else name
        for name, policy in POLICIES.items()
    )


# Not written in the annotation: Sphinx cannot parse an f-string there, and leaves out all fields.
_POLICY = Doc(f"how arms are sampled and abandoned: {_list_policies()}; see docs/study.md")


@dataclass(frozen=True)
class BanditSettings:
    """The bandit on every edge (Eqs. 4.9 to 4.13)."""

    policy: Annotated[
        str,
        _POLICY,
    ] = "printed"
    rate: float = 0.7
    """lambda, the weight of the new accuracy in an arm's running performance"""
    rounds: int = 3
    """T: an arm is abandoned on every edge after K * T samples, K the arms left"""
    bonus: float = 1.0
    """factor on the confidence radius sqrt(2 ln N / n); 1 as printed"""
    scale: float = 1.0
    """factor on the accuracies that are credited, which are in [0, 1]; 100 makes them percent"""
    evaluations_per_epoch: int = 0
    """R: for each path trained in the search phase, so many more are drawn, evaluated with the
    shared weights and credited; they do not count in K * T. 0 as printed"""
    mixes: Annotated[float, LATER] = 0.0
    """concentration of a Dirichlet law, such as 0.5: a path that is only evaluated, and for
    policies that need no sample of every arm a path of the initial pass, has a mix of operations of
    its own. 0: none, as printed"""

    def check(self, where: str = "") -> None:
        """Check every setting; whatever uses the settings calls this.

        Args:
            where: what comes before the name of a setting in a message, such as ``bandit.``.

        Raises:
            ValueError: a setting out of its range.
        """
        rate, rounds, bonus, scale = self.rate, self.rounds, self.bonus, self.scale
        extra, mixes = self.evaluations_per_epoch, self.mixes
        for name, good, expected in (
            ("policy", self.policy in POLICIES, f"one of {', '.join(sorted(POLICIES))}"),
            ("rate", is_number(rate) and 0.0 < rate <= 1.0, "a number in (0, 1]"),
            ("rounds", is_integer(rounds) and rounds >= 1, "an integer >= 1"),
            ("bonus", is_number(bonus) and 0.0 <= bonus < math.inf, "a finite number >= 0"),
            ("scale", is_number(scale) and 0.0 < scale < math.inf, "a finite number > 0"),
            ("evaluations_per_epoch", is_integer(extra) and extra >= 0, "0 or more"),
            ("mixes", is_number(mixes) and 0.0 <= mixes < math.inf, "a finite number >= 0"),
        ):
            if not good:
                value = getattr(self, name)
                raise ValueError(f"{where}{name}: expected {expected}, got {value!r}")

    def as_floats(self) -> BanditSettings:
        """The same settings, with whole numbers as floats where a setting is a float."""
        changes: dict[str, Any] = {
            field.name: float(getattr(self, field.name))
            for field in dataclasses.fields(self)
            if isinstance(field.default, float)
        }
        return dataclasses.replace(self, **changes)

    def recorded(self) -> dict[str, Any]:
        """The settings as checkpoints and logs hold them."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
            or field.name in ALWAYS_RECORDED
        }


# What a preset says of the mixes is said of its policy.
BELONGS[BanditSettings] = (("mixes", "policy"),)
