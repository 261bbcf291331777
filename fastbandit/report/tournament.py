"""The section of a search's tournament, and of the check of its reward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from fastbandit.report.html import (
    duration,
    finite,
    get,
    interval,
    percent,
    run_section,
    show,
    table,
)
from fastbandit.report.scatter import Cloud, scatter_chart
from fastbandit.report.search import Run

__all__ = ["tournament"]

_ORIGINS = {"bandit": "of the bandit", "random": "at random", "model": "of the model"}
_STYLES = {"bandit": "s1", "random": "s4", "model": "s2"}
# A stranger's file may hold any number.
_MOST = 2000


@dataclass(frozen=True)
class _Entry:
    number: int
    origin: str
    parameters: int
    robust: list[float]
    clean: list[float]
    images: int | None
    genotype: str


def _entry(number: int, value: Any) -> _Entry | None:
    """A candidate as the file has it; None where it is none."""
    rungs = get(value, "rungs") if isinstance(value, Mapping) else None
    if not isinstance(rungs, list) or not rungs:
        return None
    robust = [finite(get(one, "robust_accuracy")) for one in rungs if isinstance(one, Mapping)]
    clean = [finite(get(one, "clean_accuracy")) for one in rungs if isinstance(one, Mapping)]
    size = finite(get(value, "parameters"))
    if len(robust) < len(rungs) or None in robust or None in clean or size is None:
        return None
    images = finite(get(rungs[-1], "n"))
    return _Entry(
        number,
        str(get(value, "origin")),
        int(size),
        [one for one in robust if one is not None],
        [one for one in clean if one is not None],
        None if images is None else int(images),
        str(get(value, "genotype_hash") or ""),
    )


def tournament(run: Run) -> str:
    """The section; empty where networks were trained alone for nothing but the end."""
    body = _check(get(run.summary, "reward_check")) + _held(get(run.summary, "tournament"))
    if not body:
        return ""
    title = "Networks trained alone to choose"
    return run_section(run, "tournament", title, body, "summary.json, tournament.json")


def _check(found: Any) -> str:
    """Whether the shared weights rank networks as their trainings alone do."""
    if not isinstance(found, Mapping):
        return ""
    rho, low, high = (finite(found.get(name)) for name in ("rank_correlation", "low", "high"))
    said = "not known, since one side does not vary" if rho is None else f"{rho:.2f}"
    if rho is not None and low is not None and high is not None:
        said += f" (95 %: {low:.2f} to {high:.2f})"
    way = "shared weights" if found.get("trusted") else "networks trained alone"
    return (
        f"<p>Check of the reward: {show(found.get('networks'))} networks were trained alone for "
        f"{show(found.get('epochs'))} epochs. Rank correlation of their accuracy with that of "
        "their "
        f"paths under shared weights: {escape(said)}; threshold {show(found.get('threshold'))}. "
        f"Paths were credited with the accuracy of <b>{way}</b>.</p>"
    )


def _held(found: Any) -> str:
    values = get(found, "candidates") if isinstance(found, Mapping) else None
    if not isinstance(values, list):
        return ""
    entries = [
        one
        for number, value in enumerate(values[:_MOST])
        if (one := _entry(number, value)) is not None
    ]
    if not entries:
        return ""
    winner = get(found, "winner")
    rungs = get(found, "rungs")
    epochs = [get(one, "epochs") for one in rungs] if isinstance(rungs, list) else []
    clouds = []
    for origin, words in _ORIGINS.items():
        members = [one for one in entries if one.origin == origin]
        if members:
            clouds.append(
                Cloud(
                    words,
                    [one.parameters for one in members],
                    [one.robust[0] for one in members],
                    [
                        f"candidate {one.number + 1}, {words}: {one.parameters:,} parameters, "
                        f"robust {percent(one.robust[0])}"
                        for one in members
                    ],
                    _STYLES[origin],
                )
            )
    chart = scatter_chart(
        clouds,
        title="Candidates after the first rung: robust accuracy over size",
        x_label="parameters",
        y_label="robust accuracy, validation images",
    )
    heads = ["candidate", "from", "parameters"]
    heads += [f"robust, rung {i + 1} ({show(e)} epochs)" for i, e in enumerate(epochs)]
    heads += ["clean, last rung", "genotype"]
    lines = []
    order = sorted(entries, key=lambda one: (-len(one.robust), -one.robust[-1], one.number))
    for one in order:
        name = f"{one.number + 1}"
        if one.number == winner:
            name = f"<b>{name}, the winner</b>"
        cells = [percent(value) for value in one.robust]
        cells[-1] += f'<br><span class="n">{interval(one.robust[-1], one.images)}</span>'
        cells += [""] * (len(epochs) - len(cells))
        words = _ORIGINS.get(one.origin, one.origin)
        lines.append(
            [
                name,
                escape(words),
                show(one.parameters),
                *cells,
                percent(one.clean[-1]),
                escape(one.genotype[:12]),
            ]
        )
    seconds = finite(get(found, "cost", "seconds_total"))
    cost = "" if seconds is None else f" All trainings together took {duration(seconds)}."
    attack = get(found, "attack")
    return (
        "<p>Candidates are trained from scratch, each rung with a schedule of its own; the best of "
        "a rung are trained again for longer. They are judged on validation images, so the figures "
        f"of the winner are those of the best of many, and too good.{cost}</p>"
        f"{chart}{table(heads, lines, text=(0, 1, len(heads) - 1))}"
        + (f'<p class="meta">robust: {escape(str(attack))}</p>' if attack else "")
    )
