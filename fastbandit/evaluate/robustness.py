"""The result of one evaluation as an object: figures, table, verdict."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbandit._identity import ROUNDING, Fingerprint
from fastbandit.evaluate.sanity import NO_SAMPLE
from fastbandit.threat import NORM_NAMES

__all__ = ["CUSTOM", "Robustness", "RobustnessWarning"]

#: The name of images that a program passes.
CUSTOM = "custom"


class RobustnessWarning(UserWarning):
    """A robust accuracy that is not to be trusted."""


@dataclass(frozen=True, repr=False, eq=False)
class Robustness:
    """How robust a model is, on n images at one radius; prints as a table.

    Attributes:
        result: everything, as it stands in ``evaluation.json`` (docs/formats.md).
        images: what became of each image, tensors [n] on the CPU: ``id``; ``label``;
            ``clean_correct``, bool; ``broken_by``, the position in ``attack_names`` of the attack
            that broke it or -1.
        attack_names: the attacks in their order.
        folder: where the result was written; None: nowhere.
    """

    result: dict[str, Any]
    images: dict[str, Tensor]
    attack_names: list[str]
    folder: Path | None = None

    @property
    def _main(self) -> dict[str, Any]:
        main: dict[str, Any] = self.result["results"][0]
        return main

    @property
    def n(self) -> int:
        """Images."""
        return int(self.result["data"]["n"])

    @property
    def clean(self) -> float:
        """Accuracy without an attack, in [0, 1]."""
        return float(self._main["clean"]["accuracy"])

    @property
    def robust(self) -> float:
        """Share of the images that are classified correctly and that no attack fools, in [0, 1]."""
        return float(self._main["worst_case"]["accuracy"])

    @property
    def clean_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of :attr:`clean`."""
        low, high = self._main["clean"]["interval"]
        return float(low), float(high)

    @property
    def robust_interval(self) -> tuple[float, float]:
        """95 % Wilson interval of :attr:`robust`."""
        low, high = self._main["worst_case"]["interval"]
        return float(low), float(high)

    @property
    def standing(self) -> Tensor:
        """Which images are classified correctly whatever was tried, bool [n]."""
        return self.images["clean_correct"] & (self.images["broken_by"] < 0)

    @property
    def epsilon(self) -> str:
        """The radius as text, such as ``8/255``."""
        return str(self._main["threat"]["epsilon"])

    @property
    def norm(self) -> str:
        """``linf`` or ``l2``."""
        return str(self._main["threat"]["norm"])

    @property
    def attacks(self) -> list[dict[str, Any]]:
        """A row for each attack: ``name``, ``attacked``, ``fooled``, ``accuracy``, ``interval``,
        ``seconds``, ...; the accuracy is what this attack and those before it leave."""
        rows: list[dict[str, Any]] = self._main["attacks"]
        return rows

    @property
    def sweep(self) -> list[tuple[str, float]]:
        """(radius, robust accuracy) at every radius that was asked for, ascending."""
        rows = sorted(self.result["results"], key=lambda row: row["threat"]["epsilon_value"])
        return [(row["threat"]["epsilon"], row["worst_case"]["accuracy"]) for row in rows]

    @property
    def checks(self) -> list[dict[str, str]]:
        """The checks for gradient masking: ``name``, ``verdict``, ``detail``."""
        rows: list[dict[str, str]] = self.result["suspicion"]["checks"]
        return rows

    @property
    def cross_check(self) -> dict[str, Any] | None:
        """The comparison with the reference AutoAttack; None where there was none."""
        return self.result["cross_check"]

    @property
    def reasons(self) -> list[str]:
        """Why the figures are not to be trusted; empty where nothing speaks against them."""
        reasons = [
            f"{check['name']}: {check['detail']}"
            for check in self.checks
            if check["verdict"] == "suspicious"
        ]
        check = self.cross_check
        if check is not None and check["verdict"].startswith("weaker"):
            reasons.append(f"the attacks are {check['verdict']} (AutoAttack)")
        return reasons

    @property
    def verdict(self) -> str:
        """``ok`` or ``suspicious``. A check that finds nothing proves nothing."""
        return "suspicious" if self.reasons else "ok"

    @property
    def provenance(self) -> str:
        """The line that belongs beside the robust accuracy: n, seed, attacks, norm, epsilon, ..."""
        return str(self._main["provenance"])

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of the model's weights and class, or of its file."""
        return str(self.result["model"]["digest"])

    def same_model(self, other: Robustness) -> bool:
        """Whether ``other`` is of the same model, on the same images.

        Both have the same weights and the same logits at 32 fixed images, up to rounding; see
        docs/evaluate.md. Results of two models are never to be merged.
        """
        fingerprint, other_fingerprint = (
            Fingerprint.read(one.result["model"].get("fingerprint")) for one in (self, other)
        )
        return (
            self.digest == other.digest
            and self.result["data"]["digest"] == other.result["data"]["digest"]
            and fingerprint is not None
            and other_fingerprint is not None
            and fingerprint.distance(other_fingerprint) <= ROUNDING
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return self.result

    # How it is shown.

    def _rows(self) -> list[tuple[str, str, str, str]]:
        """What; accuracy; interval; remark."""
        rows = [("clean", *_figures(self._main["clean"]), "")]
        # Unless each attack met every image, its figure is what it and those before it leave.
        after = "" if self._main["attacked_images"] == "all" else "after "
        for attack in self.attacks:
            note = f"{attack['fooled']} of {attack['attacked']} fall, {attack['seconds']:.1f} s"
            rows.append((after + attack["name"], *_figures(attack), note))
        remark = (
            "the worst case of all, image by image" if self.attacks else "no attack at radius 0"
        )
        rows.append(("robust", *_figures(self._main["worst_case"]), remark))
        return rows

    def _notes(self) -> list[str]:
        check = self.cross_check
        notes = []
        if check is not None:
            notes.append(
                f"reference AutoAttack on {check['n']} images: both fool "
                f"{check['fooled_by_both']}, ours alone "
                f"{check['fooled_by_ours_alone']}, the reference alone "
                f"{check['fooled_by_reference_alone']}"
            )
        if left_out := self.result.get("cross_check_left_out"):  # not in files of older versions
            notes.append(f"reference AutoAttack left out: {left_out}")
        notes.append(
            f"verdict: {self.verdict}" + (f" ({self._passed()})" if self.verdict == "ok" else "")
        )
        notes += [f"  {reason}" for reason in self.reasons]
        model, cost = self.result["model"], self.result["cost"]
        notes.append(
            f"model {self.digest[:8]}, {model['parameters']:,} parameters; "
            f"{cost['seconds_total']:.1f} s on {cost['device']}"
        )
        return notes

    def _passed(self) -> str:
        """How many checks found nothing, and how many were not made for want of images."""
        passed = sum(check["verdict"] == "ok" for check in self.checks)
        left = sum(check["detail"] == NO_SAMPLE for check in self.checks)
        said = f"{passed} check{'' if passed == 1 else 's'} passed"
        return said if not left else f"{said}, {left} not made: {NO_SAMPLE}"

    def _title(self) -> str:
        data = self.result["data"]
        whose = "" if data["name"] == CUSTOM else f" ({data['split']} images of {data['name']})"
        return (
            f"robustness: {NORM_NAMES[self.norm]}, epsilon {self.epsilon}, n = {self.n:,} images"
            f"{whose}"
        )

    def __repr__(self) -> str:
        rows = self._rows()
        width = max(len(row[0]) for row in rows)
        lines = [self._title()]
        for name, accuracy, interval, note in rows:
            lines.append(f"  {name:<{width}}  {accuracy:>8}  {interval:<16}  {note}".rstrip())
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        """A table for a notebook; colours are the notebook's own."""
        body = "".join(
            "<tr>"
            + f"<th style='text-align:left'>{html.escape(name)}</th>"
            + "".join(
                f"<td style='text-align:{side}'>{html.escape(text)}</td>"
                for side, text in (("right", accuracy), ("left", interval), ("left", note))
            )
            + "</tr>"
            for name, accuracy, interval, note in self._rows()
        )
        notes = "<br>".join(html.escape(note) for note in self._notes())
        return (
            f"<div><b>{html.escape(self._title())}</b><table><thead><tr><th></th>"
            "<th>accuracy</th><th>95 % interval</th><th></th></tr></thead>"
            f"<tbody>{body}</tbody></table><p>{notes}</p></div>"
        )


def _figures(share: dict[str, Any]) -> tuple[str, str]:
    low, high = share["interval"]
    return f"{100 * share['accuracy']:.2f} %", f"[{100 * low:.2f}, {100 * high:.2f}]"
