"""What a page of runs says first: name, state, and what its numbers depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastbandit.report.html import as_text, get
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder
from fastbandit.report.search import Run, split_size
from fastbandit.threat import ThreatModel

__all__ = ["joint_header", "name_of", "search_header"]

_MOST_NOTES = 20


def name_of(run: Folder) -> str:
    name = get(run.summary, "name") or run.config.get("name")
    return str(name or run.label or run.folder.name)


def search_header(run: Run) -> dict[str, Any]:
    """What the template ``search_page`` shows above the sections."""
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
    samples = f"{len(run.samples)} of {run.planned} samples so far"
    return {
        **_state([] if run.finished else [run], f"This run is not finished: {samples}"),
        "facts": [fact for fact in facts if fact[1] is not None],
        "adversary": _training_threat(run),
        "provenance": _provenance(run),
        "whose": "its",
        "run": "it",
        "notes": run.notes,
        "source": "summary.json, config.yaml, env.json, split.json",
    }


def joint_header(collection: Collection) -> dict[str, Any]:
    """What the template ``joint_page`` shows above the sections."""
    unfinished = [run for run in collection.runs if not run.finished]
    counted = (
        (len(collection.searches), "search", "searches"),
        (len(collection.retrainings), "retraining", "retrainings"),
        (len(collection.evaluations), "evaluation", "evaluations"),
    )
    names = ", ".join(f"{run.key} ({run.label})" for run in unfinished)
    notes = [f"{run.key} ({run.label}): {note}" for run in collection.runs for note in run.notes]
    return {
        **_state(unfinished, f"Not finished: {names}"),
        "kinds": [(str(n), one if n == 1 else many) for n, one, many in counted if n],
        "whose": "their",
        "run": "a run",
        "notes": notes,
        "source": "the folders listed under Runs",
    }


def _state(unfinished: Sequence[Folder], words: str) -> dict[str, Any]:
    return {
        "status": "unfinished" if unfinished else "finished",
        "state": words if unfinished else "",
        "most_notes": _MOST_NOTES,
    }


def _describe_threat(value: Mapping[str, Any]) -> str:
    """A threat model in words; the bare settings where they make no valid one."""
    settings = {name: value[name] for name in ThreatModel.__dataclass_fields__ if name in value}
    if not settings:
        return "not recorded"
    try:
        return ThreatModel(**settings).describe()
    except (TypeError, ValueError):
        return ", ".join(f"{as_text(name)} {as_text(entry)}" for name, entry in value.items())


def _training_threat(run: Run) -> str:
    """The adversary of the training step in words."""
    threat = get(run.summary, "threat")
    if isinstance(threat, Mapping):
        return _describe_threat(threat)
    attack = get(run.config, "attack")
    if not isinstance(attack, Mapping):
        return "not recorded"
    settings = dict(attack)
    if settings.pop("clip", None) == "none":
        settings["lower"] = settings["upper"] = None
    return _describe_threat(settings)


def _provenance(run: Run) -> str:
    """One line with all that a robust accuracy depends on."""

    def threat(name: str) -> Any:
        return get(run.summary, "threat", name) or get(run.config, "attack", name)

    parts = []
    for key in ("final", "test"):
        part = get(run.summary, key)
        if isinstance(part, Mapping) and part.get("n") is not None:
            parts.append(f"n = {as_text(part['n'])} ({as_text(part.get('split', key))})")
    if not parts and (size := split_size(run, "validation")) is not None:
        parts.append(f"n = {size:,} (validation)")
    if run.config.get("seed") is not None:
        parts.append(f"seed {as_text(run.config['seed'])}")
    measured = get(run.summary, "test", "attack") or get(run.summary, "final", "attack")
    parts.append(f"measured with {as_text(measured)}" if measured else _reward_attack(run))
    norm = str(threat("norm") or "linf")
    parts.append(f"norm {'L-infinity' if norm == 'linf' else norm}")
    if (epsilon := threat("epsilon")) is not None:
        parts.append(f"epsilon {as_text(epsilon)}")
    dtype = get(run.summary, "dtype") or run.config.get("dtype") or "float32"
    parts.append(f"dtype {as_text(dtype)}")
    if (bn_mode := threat("bn_mode")) is not None:
        parts.append(f"bn_mode {as_text(bn_mode)} in training, eval when measured")
    selection = get(run.summary, "selection")
    words = "the arm that is left on every edge" if selection is None else as_text(selection)
    return "; ".join([*parts, f"selection: {words}"])


def _reward_attack(run: Run) -> str:
    steps = get(run.config, "attack", "steps")
    words = f", {as_text(steps)} step(s)" if steps is not None else ""
    return f"attack of the reward: the training step's{words}, batch norm in eval mode"
