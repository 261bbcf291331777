"""The section of a search's tournament, and of the check of its reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from fastbandit.report.html import (
    as_text,
    count,
    finite,
    get,
    percent,
    section,
    share,
)
from fastbandit.report.scatter import Cloud, scatter_chart
from fastbandit.report.search import Run

__all__ = ["tournament"]

#: Words and colour of each origin; what a file calls otherwise is of no known one.
_ORIGINS = {
    "bandit": ("of the bandit", "s1"),
    "random": ("at random", "s4"),
    "model": ("of the model", "s2"),
}
_OTHER = ("of unknown origin", "s3")
# A stranger's file may hold any number.
_MOST, _MOST_RUNGS = 2000, 16


@dataclass(frozen=True)
class _Entry:
    number: int
    origin: tuple[str, str]
    parameters: int
    robust: list[float]
    clean: float
    images: int | None
    genotype: str
    latency: float | None = None

    @property
    def note(self) -> str:
        return (
            f"candidate {self.number + 1}, {self.origin[0]}: {self.parameters:,} parameters, "
            f"robust {percent(self.robust[0])}"
        )


def _entry(number: int, value: Any) -> _Entry | None:
    """A candidate as the file has it; None where it is none."""
    rungs = get(value, "rungs")
    if not isinstance(rungs, list) or not 1 <= len(rungs) <= _MOST_RUNGS:
        return None
    robust = [
        accuracy for one in rungs if (accuracy := share(get(one, "robust_accuracy"))) is not None
    ]
    clean, size = share(get(rungs[-1], "clean_accuracy")), count(get(value, "parameters"))
    if len(robust) < len(rungs) or clean is None or size is None:
        return None
    return _Entry(
        number,
        _ORIGINS.get(as_text(get(value, "origin")), _OTHER),
        size,
        robust,
        clean,
        count(get(rungs[-1], "n")),
        as_text(get(value, "genotype_hash") or "")[:12],
        finite(get(value, "latency_ms")),
    )


def _entries(run: Run) -> list[_Entry]:
    """The candidates; a note where one is none."""
    values = get(run.summary, "tournament", "candidates")
    if values is None:
        return []
    if not isinstance(values, list):
        got = type(values).__name__
        run.note(f"summary.json: tournament.candidates: expected a list, got {got}; left out")
        return []
    entries = [
        one
        for number, value in enumerate(values[:_MOST])
        if (one := _entry(number, value)) is not None
    ]
    if left := len(values) - len(entries):
        run.note(
            f"summary.json: tournament.candidates: {left:,} of {len(values):,} are left out: "
            f"expected at most {_MOST:,}, each with a number of parameters and accuracies in "
            f"[0, 1] of 1 to {_MOST_RUNGS} rungs"
        )
    return sorted(entries, key=lambda one: (-len(one.robust), -one.robust[-1], one.number))


def _chart(entries: list[_Entry]) -> Markup:
    clouds = []
    for words, style in (*_ORIGINS.values(), _OTHER):
        members = [one for one in entries if one.origin[0] == words]
        # In the order of the file.
        members.sort(key=lambda one: one.number)
        sizes, robust = [one.parameters for one in members], [one.robust[0] for one in members]
        clouds.append(Cloud(words, sizes, robust, [one.note for one in members], style))
    return scatter_chart(
        clouds,
        title="Candidates after the first rung: robust accuracy over size",
        x_label="parameters",
        y_label="robust accuracy, validation images",
    )


def tournament(run: Run) -> Markup:
    """The section; empty where networks were trained alone for nothing but the end."""
    check, stored = get(run.summary, "reward_check"), get(run.summary, "tournament")
    check, entries = check if isinstance(check, Mapping) else None, _entries(run)
    if not check and not entries:
        return Markup()
    rho, low, high = (finite(get(check, name)) for name in ("rank_correlation", "low", "high"))
    said = "not known, since one side does not vary" if rho is None else f"{rho:.2f}"
    if rho is not None and low is not None and high is not None:
        said += f" (95 %: {low:.2f} to {high:.2f})"
    listed = get(stored, "rungs")
    rungs = listed if isinstance(listed, list) else []
    held = max((len(one.robust) for one in entries), default=0)
    epochs = [get(rungs[i], "epochs") if i < len(rungs) else "?" for i in range(held)]
    winner = count(get(stored, "winner"))
    latency = any(one.latency is not None for one in entries)
    return section(
        "tournament",
        "Networks trained alone to choose",
        "summary.json, tournament.json",
        "tournament",
        of=run,
        check=check,
        rho=said,
        chart=_chart(entries),
        heads=[
            *("candidate", "from", "parameters"),
            *["ms"] * latency,
            *(f"robust, rung {i + 1} ({as_text(e)} epochs)" for i, e in enumerate(epochs)),
            *("clean, last rung", "genotype"),
        ],
        entries=entries,
        winner=winner,
        rungs=held,
        latency=latency,
        seconds=finite(get(stored, "cost", "seconds_total")),
        attack=get(stored, "attack"),
    )
