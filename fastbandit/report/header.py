"""What a page of runs says first: name, state, and what its numbers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastbandit.report.html import as_text, get, header, render
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder
from fastbandit.report.search import Run, split_size
from fastbandit.threat import ThreatModel

__all__ = ["joint_header", "name_of", "search_header"]

_MOST_NOTES = 20


def name_of(run: Folder) -> str:
    name = get(run.summary, "name") or run.config.get("name")
    return str(name or run.label or run.folder.name)


def search_header(run: Run) -> str:
    name = get(run.summary, "name") or run.config.get("name") or run.folder.name
    data = get(run.summary, "data", "name") or get(run.split, "data") or run.config.get("data")
    sizes = [
        f"{as_text(size)} {part}"
        for part in ("weights", "validation", "test")
        if (size := split_size(run, part)) is not None
    ]
    digest = get(run.summary, "genotype_hash")
    # Words, the value, and more about it.
    facts = (
        ("run", get(run.summary, "run_id"), ""),
        ("started", get(run.environment, "date"), ""),
        ("data", data, ", ".join(sizes)),
        ("space", run.start.space if run.start else run.config.get("space"), ""),
        ("genotype", None if digest is None else str(digest)[:12], ""),
    )
    facts_html = render(
        "header_search",
        facts=[fact for fact in facts if fact[1] is not None],
        adversary=_training_threat(run),
        provenance=_provenance(run),
    )
    samples = f"{len(run.samples)} of {run.planned} samples so far"
    state = "" if run.finished else f"This run is not finished: {samples}"
    return header(
        name,
        [facts_html],
        status="finished" if run.finished else "unfinished",
        notes=_notes(state, "its", "it", run.notes),
        source="summary.json, config.yaml, env.json, split.json",
    )


def joint_header(found: Collection, title: str) -> str:
    unfinished = [run for run in found.runs if not run.finished]
    counted = (
        (len(found.searches), "search", "searches"),
        (len(found.retrainings), "retraining", "retrainings"),
        (len(found.evaluations), "evaluation", "evaluations"),
    )
    kinds = [f"<b>{n}</b> {one if n == 1 else many}" for n, one, many in counted if n]
    names = ", ".join(f"{run.key} ({run.label})" for run in unfinished)
    unread = list(found.notes)
    unread += [f"{run.key} ({run.label}): {note}" for run in found.runs for note in run.notes]
    return header(
        title,
        [f'<p class="meta">{" · ".join(kinds)}</p>'],
        status="unfinished" if unfinished else "finished",
        notes=_notes(f"Not finished: {names}" if unfinished else "", "their", "a run", unread),
        source="the folders listed under Runs",
    )


def _notes(state: str, whose: str, run: str, notes: Sequence[str]) -> str:
    return render("notes", state=state, whose=whose, run=run, notes=notes, most=_MOST_NOTES)


def _describe_threat(value: Mapping[str, Any]) -> str:
    """A threat model in words; the bare settings where they make no valid one."""
    known = {name: value[name] for name in ThreatModel.__dataclass_fields__ if name in value}
    if not known:
        return "not recorded"
    try:
        return ThreatModel(**known).describe()
    except (TypeError, ValueError):
        return ", ".join(f"{as_text(name)} {as_text(entry)}" for name, entry in value.items())


def _training_threat(run: Run) -> str:
    """The adversary of the training step in words."""
    found = get(run.summary, "threat")
    if isinstance(found, Mapping):
        return _describe_threat(found)
    attack = get(run.config, "attack")
    if not isinstance(attack, Mapping):
        return "not recorded"
    settings = dict(attack)
    if settings.pop("clip", None) == "none":
        settings["lower"] = settings["upper"] = None
    return _describe_threat(settings)


def _norm(run: Run) -> Any:
    return get(run.summary, "threat", "norm") or get(run.config, "attack", "norm") or "linf"


def _provenance(run: Run) -> str:
    """One line with all that a robust accuracy depends on."""
    parts = []
    for key in ("final", "test"):
        found = get(run.summary, key)
        if isinstance(found, Mapping) and found.get("n") is not None:
            parts.append(f"n = {as_text(found['n'])} ({as_text(found.get('split', key))})")
    if not parts and (size := split_size(run, "validation")) is not None:
        parts.append(f"n = {size:,} (validation)")
    if run.config.get("seed") is not None:
        parts.append(f"seed {as_text(run.config['seed'])}")
    measured = get(run.summary, "test", "attack") or get(run.summary, "final", "attack")
    attack = f"measured with {as_text(measured)}" if measured else _reward_attack(run)
    parts.append(attack)
    norm = {"linf": "L-infinity"}.get(str(_norm(run)), str(_norm(run)))
    parts.append(f"norm {norm}")
    epsilon = get(run.summary, "threat", "epsilon") or get(run.config, "attack", "epsilon")
    if epsilon is not None:
        parts.append(f"epsilon {as_text(epsilon)}")
    dtype = get(run.summary, "dtype") or run.config.get("dtype") or "float32"
    parts.append(f"dtype {as_text(dtype)}")
    bn_mode = get(run.summary, "threat", "bn_mode") or get(run.config, "attack", "bn_mode")
    if bn_mode is not None:
        parts.append(f"bn_mode {as_text(bn_mode)} in training, eval when measured")
    selection = get(run.summary, "selection")
    parts.append(
        f"selection: {as_text(selection)}"
        if selection is not None
        else "selection: the arm that is left on every edge"
    )
    return "; ".join(parts)


def _reward_attack(run: Run) -> str:
    steps = get(run.config, "attack", "steps")
    words = f", {as_text(steps)} step(s)" if steps is not None else ""
    return f"attack of the reward: the training step's{words}, batch norm in eval mode"
