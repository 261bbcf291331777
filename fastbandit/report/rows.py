"""What each measurement of a network is, which one stands for it, and words that name runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from markupsafe import Markup

from fastbandit.report.charts import STYLES
from fastbandit.report.evaluation import EVALUATION, Evaluation, Result, radius_of
from fastbandit.report.figures import accuracy_rows
from fastbandit.report.html import as_text, get, pairs, render
from fastbandit.report.matching import Model
from fastbandit.report.networks import trained_networks
from fastbandit.report.reading import Folder
from fastbandit.report.retraining import Retraining
from fastbandit.report.search import Run
from fastbandit.report.shares import Share, count, make_share
from fastbandit.search.networks import FOUND

__all__ = [
    "MOST_ENTRIES",
    "Row",
    "data_words",
    "leaf",
    "model_name",
    "norm_words",
    "plain",
    "results_file",
    "rows_of",
    "shorten",
    "sizes",
    "sources",
    "style_of",
    "threat_words",
    "with_results",
]

#: Rows and columns of a table of whatever a file holds.
MOST_ENTRIES = 200


@dataclass(frozen=True)
class Row:
    """One measurement of one model."""

    run: Folder
    what: str
    threat: str
    attack: str
    clean: Share | None
    robust: Share | None
    source: str
    provenance: str | None = None
    result: Result | None = None

    @property
    def suspicious(self) -> bool:
        return isinstance(self.run, Evaluation) and self.run.suspicious

    @property
    def images(self) -> Any:
        """Which images it was measured on, beside the words for them."""
        if isinstance(self.run, Evaluation):
            return self.run.data
        return get(getattr(self.run, "split", None), "digest")

    @property
    def n(self) -> str:
        return sizes(self.clean, self.robust)


def norm_words(norm: str) -> str:
    return {"linf": "L∞", "l2": "L2"}.get(norm, norm)


def threat_words(threat: Any) -> str:
    """Norm and radius of a threat model; nothing where there is none."""
    if not isinstance(threat, Mapping):
        return ""
    return f"{norm_words(str(threat.get('norm')))}, epsilon {threat.get('epsilon')}"


def data_words(run: Folder) -> str:
    parts = (get(run.summary, "data", "name"), get(run.summary, "data", "split"))
    return " ".join(str(part) for part in parts if part is not None)


def _evaluated(run: Evaluation) -> list[Row]:
    rows = []
    for result in run.results:
        names = ", ".join(attack.name for attack in result.attacks)
        rows.append(
            Row(
                run,
                f"evaluation, {data_words(run) or 'data not recorded'}",
                threat_words(result.threat),
                f"worst case over {names}" if names else "no attack",
                result.clean,
                result.worst,
                f"{run.label}: {EVALUATION}",
                result.provenance,
                result,
            )
        )
    return rows


def _retrained(run: Retraining) -> list[Row]:
    rows = []
    words = threat_words(get(run.summary, "threat"))
    for part in ("test", "best", "last"):
        clean, robust = run.measured.get(part, (None, None))
        if clean is None and robust is None:
            continue
        stated = get(run.summary, part)
        epoch = count(get(stated, "epoch"))
        what = f"{part} epoch, validation images"
        if part == "test":
            what = f"test images, checkpoint: {get(stated, 'of') or 'not recorded'}"
        if epoch is not None:
            what += f" (epoch {epoch + 1})"
        attack = str(get(stated, "attack") or get(run.summary, "best", "attack") or "")
        source = f"{run.label}: summary.json ({part})"
        rows.append(Row(run, what, words, attack, clean, robust, source))
    if not rows and run.epochs:
        line = run.epochs[-1]
        images = get(run.split, "validation")
        n = len(images) if isinstance(images, list) else images
        what = f"epoch {line.epoch + 1} so far, validation images"
        clean, robust = _share(line.clean_accuracy, n), _share(line.robust_accuracy, n)
        source = f"{run.label}: metrics.jsonl, split.json"
        rows.append(Row(run, what, words, "", clean, robust, source))
    return rows


def _share(value: Any, n: Any) -> Share | None:
    return None if value is None else make_share(value, n, where="", notes=[])


def _searched(run: Run) -> list[Row]:
    words = threat_words(get(run.summary, "threat"))
    source = f"{run.label}: summary.json"
    rows = []
    for one in trained_networks(run):
        if one.name == FOUND:
            what = f"{one.split} images, trained from scratch in {one.epochs} epochs "
            what += "after the search"
            clean, robust = _share(one.clean, one.n), _share(one.robust, one.n)
            rows.append(Row(run, what, words, one.attack, clean, robust, f"{source} (networks)"))
    shared: dict[str, dict[str, Any]] = {}
    for split, kind, value, n, attack in accuracy_rows(run):
        entry = shared.setdefault(split, {"attack": ""})
        entry[kind] = _share(value, n)
        entry["attack"] = attack or entry["attack"]
    for split, entry in shared.items():
        what = f"{split} images, weights shared in the search"
        clean, robust = entry.get("clean"), entry.get("robust")
        rows.append(Row(run, what, words, entry["attack"], clean, robust, source))
    return rows


def rows_of(model: Model) -> list[Row]:
    """Every measurement of a model, the one that counts most first."""
    rows = [row for run in model.evaluations for row in _evaluated(run)]
    trained = get(model.retraining.summary, "threat") if model.retraining is not None else None

    def rank(row: Row) -> tuple[bool, int, int]:
        assert row.result is not None
        same = (
            isinstance(trained, Mapping)
            and row.result.norm == str(trained.get("norm") or "linf")
            and row.result.radius is not None
            and row.result.radius == radius_of(trained)
        )
        return (row.suspicious, 0 if same else 1, -len(row.result.attacks))

    rows.sort(key=rank)
    if model.retraining is not None:
        rows += _retrained(model.retraining)
    for search in model.searches:
        rows += _searched(search)
    return rows


def sizes(*shares: Share | None) -> str:
    """Of how many images the shares are."""
    numbers = dict.fromkeys(f"{share.n:,}" for share in shares if share is not None and share.n)
    return ", ".join(numbers) or "not recorded"


def model_name(model: Model) -> str:
    run = model.first
    name = get(run.summary, "name") or run.config.get("name") or run.label
    file = get(run.summary, "model", "file")
    if isinstance(run, Evaluation) and isinstance(file, str):
        name = PurePosixPath(file).name
    return f"{run.key} {name}"


def style_of(position: int) -> tuple[str, bool]:
    """Colour class of the line of a run, and whether it is dashed: when colours begin again."""
    return STYLES[position % len(STYLES)], position // len(STYLES) % 2 == 1


def shorten(text: str, most: int = 20) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def sources(runs: Iterable[Folder], *files: str) -> str:
    names = ", ".join(files)
    return "; ".join(f"{run.label}: {names}" for run in runs) or "no file"


def with_results(runs: Iterable[Folder], *files: str) -> str:
    """The same, with the file of each run's results."""
    return "; ".join(f"{run.label}: {', '.join([*files, results_file(run)])}" for run in runs)


def results_file(run: Folder) -> str:
    return EVALUATION if isinstance(run, Evaluation) else "summary.json"


def leaf(value: Any) -> str:
    if not isinstance(value, list):
        return as_text(value)
    words = ", ".join(as_text(entry) for entry in value[:12])
    return words + (f" and {len(value) - 12} more" if len(value) > 12 else "")


def plain(value: Any, cell: Callable[[Any], str] = leaf) -> Markup:
    """Plain values as a table: a list of objects with a column for each name.

    What is beyond :data:`MOST_ENTRIES` rows, or as many columns, is left out and said to be.

    Args:
        cell: a value as text.
    """
    if isinstance(value, Mapping):
        every = list(dict(pairs(value)).items())
        entries = [(name, cell(entry)) for name, entry in every[:MOST_ENTRIES]]
        left = [(len(every) - MOST_ENTRIES, "entries")]
        return render("plain", kind="entries", entries=entries, left=left)
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        flat = [dict(pairs(entry)) for entry in value[:MOST_ENTRIES]]
        columns = list(dict.fromkeys(name for entry in flat for name in entry))
        names = columns[:MOST_ENTRIES]
        lines = [[cell(entry.get(name, "")) for name in names] for entry in flat]
        text = [
            i for i, name in enumerate(names) if any(isinstance(e.get(name), str) for e in flat)
        ]
        left = [(len(value) - MOST_ENTRIES, "rows"), (len(columns) - MOST_ENTRIES, "columns")]
        return render("plain", kind="rows", heads=names, lines=lines, text=text, left=left)
    return render("plain", kind="value", value=cell(value), left=[])
