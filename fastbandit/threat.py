"""The threat model: what the adversary may do, in one object.

Training, search, attack and report share it, so a network is never trained for one adversary and
reported against another.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbandit.attacks.ball import Ball

__all__ = [
    "ThreatModel",
    "format_fraction",
    "parse_fraction",
    "parse_number",
    "parse_whole",
    "plain_number",
]

NORMS = ("linf", "l2")
NORM_NAMES = {"linf": "L-infinity", "l2": "L2"}
BN_MODES = ("eval", "train")


# Text beyond these is no radius, and its exact value could take a gigabyte.
_LONGEST, _LARGEST_EXPONENT = 400, 400
# float32 holds it, with room for a few times as much.
_LARGEST = 10**30


def plain_number(value: object) -> int | float | Fraction | None:
    """A number as Python's own: scalars of numpy and tensors without dimensions too; else None.

    A number of less than double precision becomes the double of its shortest decimal text, so
    ``numpy.float32(0.1)`` is 0.1.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, Fraction)):
        return value
    if isinstance(value, float):
        return float(value)
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return None
    number = value.item()
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    if isinstance(number, int) or not math.isfinite(number):
        return number
    for digits in range(1, 10):
        short = float(f"{number:.{digits}g}")
        if hasattr(value, "new_tensor"):
            same = value.new_tensor(short, device="cpu").item() == number
        else:
            same = value.dtype.type(short).item() == number  # type: ignore[attr-defined]
        if same:
            return short
    return number


def parse_fraction(value: object, name: str) -> Fraction:
    """``value`` as an exact fraction: ``"8/255"``, ``"0.3"``, ``0.3``, ``Fraction(8, 255)``.

    A float is read by its shortest decimal text, so 0.3 is exactly 3/10 and not the nearest
    binary number. Scalars of numpy and tensors without dimensions are numbers too.

    Raises:
        TypeError: ``value`` is neither text nor a number.
        ValueError: the text is no number, or the number is not finite or beyond the range of a
            float.
    """
    if isinstance(value, str):
        text = value.replace(" ", "")
        exponent = re.search(r"e([+-]?[0-9_]+)$", text, re.IGNORECASE)
        if len(text) > _LONGEST or (
            exponent is not None and abs(int(exponent[1])) > _LARGEST_EXPONENT
        ):
            raise ValueError(
                f"{name}: expected a number such as 8/255 or 0.3, "
                f"got {value if len(value) <= 40 else value[:40] + '...'!r}"
            )
        try:
            fraction = Fraction(text)
            float(fraction)
            return fraction
        except (ValueError, ZeroDivisionError, OverflowError):
            raise ValueError(
                f"{name}: expected a number such as 8/255 or 0.3, got {value!r}"
            ) from None
    number = plain_number(value)
    if number is None:
        raise TypeError(
            f"{name}: expected a number or text such as '8/255', got {type(value).__name__}"
        )
    if isinstance(number, float):
        if not math.isfinite(number):
            raise ValueError(f"{name}: expected a finite number, got {number}")
        return Fraction(repr(number))
    return Fraction(number)


def parse_number(value: object, name: str) -> float:
    """``value`` as a float: a number of any kind that :func:`parse_fraction` takes, but no text.

    Raises:
        TypeError: no number.
        ValueError: not finite.
    """
    number = plain_number(value)
    if number is None:
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        converted = float(number)
    except OverflowError:
        converted = math.inf
    if not math.isfinite(converted):
        raise ValueError(f"{name}: expected a finite number, got {converted}")
    return converted


def parse_whole(value: object, name: str, least: int = 0, most: int | None = None) -> int:
    """``value`` as an int: an int, an integer scalar of numpy, a tensor of one, a whole Fraction.

    Raises:
        ValueError: none of these, less than ``least``, or more than ``most``.
    """
    number = plain_number(value)
    if isinstance(number, Fraction) and number.denominator == 1:
        number = number.numerator
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name}: expected a whole number >= {least}, got {value!r}")
    if most is not None and number > most:
        raise ValueError(f"{name}: expected a whole number <= {most}, got {value!r}")
    return int(number)


def format_fraction(value: Fraction) -> str:
    """Text that :func:`parse_fraction` reads back exactly: a decimal where one exists."""
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest != 1 or abs(value) > 1 << 1000:  # beyond the doubles
        return f"{value.numerator}/{value.denominator}"
    text = repr(float(value))
    return text if Fraction(text) == value else f"{value.numerator}/{value.denominator}"


@dataclass(frozen=True)
class ThreatModel:
    """An adversary that moves an image by at most ``epsilon`` in some norm.

    Args:
        norm: ``"linf"``, every pixel by at most epsilon, or ``"l2"``, the root of the sum of the
            squares over all pixels and channels.
        epsilon: radius in units of the image range [0, 1]; text such as ``"8/255"`` stays exact.
        lower, upper: bounds that x + delta respects; both None is Algorithm 8 as printed.
        step_size: step along the gradient's sign, in L2 along the gradient's direction. None:
            ``1.25 * epsilon`` for one step from a random start (Wong et al., "Fast is better than
            free", ICLR 2020), ``epsilon`` for one step without, ``2.5 * epsilon / steps`` for more
            (Madry et al., ICLR 2018).
        steps: gradient steps; 1 is FGSM, k is PGD-k, 0 is no attack at all (clean).
        random_start: start at a random point of the ball instead of at the image: uniform in
            L-infinity; in L2 of uniform direction and uniform radius, in [0, epsilon] or, where the
            steps are too short for that, in [epsilon - steps * step, epsilon].
        bn_mode: batch norm in ``"eval"`` or ``"train"`` mode while the attack runs. In train mode
            the batch's statistics are used and the running ones are left alone.

    Numbers may also be scalars of numpy and tensors without dimensions; the object keeps plain
    ones.

    Raises:
        ValueError: a value that cannot mean anything; the message says which and what is expected.
        TypeError: a value that is no number.
    """

    norm: str = "linf"
    epsilon: Fraction | str | float = "8/255"
    lower: float | None = 0.0
    upper: float | None = 1.0
    step_size: Fraction | str | float | None = None
    steps: int = 1
    random_start: bool = True
    bn_mode: str = "eval"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {self.norm!r}")
        epsilon = parse_fraction(self.epsilon, "epsilon")
        if epsilon > 1 and self.norm == "linf":
            hint = f"; did you mean {epsilon}/255?" if epsilon.denominator == 1 else ""
            raise ValueError(
                f"epsilon: expected a value in [0, 1], since images are in [0, 1], "
                f"got {format_fraction(epsilon)}{hint}"
            )
        if not 0 <= epsilon <= _LARGEST:
            expected = "a value in [0, 1]" if self.norm == "linf" else f"0 to {_LARGEST:.0e}"
            raise ValueError(f"epsilon: expected {expected}, got {format_fraction(epsilon)}")
        object.__setattr__(self, "epsilon", epsilon)
        if self.step_size is not None:
            step = parse_fraction(self.step_size, "step_size")
            if not 0 <= step <= (2 if self.norm == "linf" else _LARGEST):
                hint = f"; did you mean {step}/255?" if step.denominator == 1 else ""
                expected = "a value in [0, 2]" if self.norm == "linf" else f"0 to {_LARGEST:.0e}"
                raise ValueError(
                    f"step_size: expected {expected}, in units of the image range, "
                    f"got {format_fraction(step)}{hint}"
                )
            object.__setattr__(self, "step_size", step)
        object.__setattr__(self, "steps", parse_whole(self.steps, "steps"))
        if not isinstance(self.random_start, bool):
            raise ValueError(f"random_start: expected true or false, got {self.random_start!r}")
        if self.bn_mode not in BN_MODES:
            raise ValueError(
                f"bn_mode: expected one of {', '.join(BN_MODES)}, got {self.bn_mode!r}"
            )
        for name in ("lower", "upper"):
            bound = getattr(self, name)
            if bound is None:
                continue
            number = plain_number(bound)
            if number is None or not 0 <= number <= 1:  # NaN fails too
                raise ValueError(f"{name}: expected None or a value in [0, 1], got {bound!r}")
            object.__setattr__(self, name, float(number))
        if self.lower is not None and self.upper is not None and self.lower >= self.upper:
            raise ValueError(f"lower: expected less than upper ({self.upper}), got {self.lower}")

    @property
    def epsilon_value(self) -> float:
        """The radius as a float."""
        return float(self.epsilon)

    @property
    def step_value(self) -> float:
        """The step size as a float, after the rule for ``step_size=None``."""
        if self.step_size is not None:
            return float(self.step_size)
        assert isinstance(self.epsilon, Fraction)
        if self.steps > 1:
            return float(self.epsilon * Fraction(5, 2) / self.steps)
        return float(self.epsilon * Fraction(5, 4)) if self.random_start else float(self.epsilon)

    @property
    def ball(self) -> Ball:
        """The perturbations that the adversary may choose."""
        from fastbandit.attacks.ball import Ball  # this file needs no torch

        assert isinstance(self.epsilon, Fraction)
        return Ball(self.norm, self.epsilon, self.lower, self.upper)

    @property
    def attacks(self) -> bool:
        """False where the adversary has nothing to do: no step, or a radius of zero."""
        return self.steps > 0 and self.epsilon != 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file: exact text, and the floats that were used beside it."""
        assert isinstance(self.epsilon, Fraction)
        plain = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["epsilon"] = format_fraction(self.epsilon)
        plain["epsilon_value"] = self.epsilon_value
        if isinstance(self.step_size, Fraction):
            plain["step_size"] = format_fraction(self.step_size)
        plain["step_value"] = self.step_value
        return plain

    def describe(self) -> str:
        """One line: attack, norm, radius, step, start, bounds and batch-norm mode."""
        if not self.attacks:
            return "clean (no attack)"
        assert isinstance(self.epsilon, Fraction)
        name = f"PGD-{self.steps}" if self.steps > 1 else "FGSM"
        start = "random start" if self.random_start else "no random start"
        step = (
            format_fraction(self.step_size)
            if isinstance(self.step_size, Fraction)
            else f"{self.step_value:.4g}"
        )
        if self.lower is None and self.upper is None:
            bounds = "image bounds not enforced"
        else:
            low = "-inf" if self.lower is None else f"{self.lower:g}"
            high = "inf" if self.upper is None else f"{self.upper:g}"
            bounds = f"x + delta in [{low}, {high}]"
        return (
            f"{name}, {NORM_NAMES[self.norm]}, epsilon {format_fraction(self.epsilon)}, "
            f"step {step}, {start}, {bounds}, batch norm in {self.bn_mode} mode"
        )
