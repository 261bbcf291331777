"""What each measurement of a network is, which one stands for it, and pieces that name runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from fastbandit.report.charts import STYLES
from fastbandit.report.evaluation import EVALUATION, Evaluation, Result, radius_of
from fastbandit.report.figures import accuracy_rows
from fastbandit.report.html import get, pairs, percent, show, table
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
    "plain",
    "results_file",
    "robust_cell",
    "rows_of",
    "share_cell",
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


def threat_words(threat: Mapping[str, Any]) -> str:
    norm = {"linf": "L∞", "l2": "L2"}.get(str(threat.get("norm")), str(threat.get("norm")))
    return f"{norm}, epsilon {threat.get('epsilon')}"


def data_words(run: Folder) -> str:
    return " ".join(
        str(part)
        for part in (get(run.summary, "data", "name"), get(run.summary, "data", "split"))
        if part is not None
    )


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
    threat = get(run.summary, "threat")
    words = threat_words(threat) if isinstance(threat, Mapping) else ""
    for part in ("test", "best", "last"):
        clean, robust = run.measured.get(part, (None, None))
        if clean is None and robust is None:
            continue
        found = get(run.summary, part)
        epoch = count(get(found, "epoch"))
        what = {
            "test": f"test images, checkpoint: {get(found, 'of') or 'not recorded'}",
            "best": "best epoch, validation images",
            "last": "last epoch, validation images",
        }[part]
        if epoch is not None:
            what += f" (epoch {epoch + 1})"
        attack = str(get(found, "attack") or get(run.summary, "best", "attack") or "")
        rows.append(
            Row(run, what, words, attack, clean, robust, f"{run.label}: summary.json ({part})")
        )
    if not rows and run.epochs:
        line = run.epochs[-1]
        images = get(run.split, "validation")
        n = len(images) if isinstance(images, list) else images
        shares = [
            None if value is None else make_share(value, n, where="", notes=[])
            for value in (line.clean_accuracy, line.robust_accuracy)
        ]
        rows.append(
            Row(
                run,
                f"epoch {line.epoch + 1} so far, validation images",
                words,
                "",
                shares[0],
                shares[1],
                f"{run.label}: metrics.jsonl, split.json",
            )
        )
    return rows


def _searched(run: Run) -> list[Row]:
    rows: dict[str, dict[str, Any]] = {}
    for split, kind, value, n, attack in accuracy_rows(run):
        entry = rows.setdefault(split, {"attack": ""})
        entry[kind] = make_share(value, n, where="", notes=[])
        entry["attack"] = attack or entry["attack"]
    threat = get(run.summary, "threat")
    words = threat_words(threat) if isinstance(threat, Mapping) else ""
    scratch = [
        Row(
            run,
            f"{one.split} images, trained from scratch in {one.epochs} epochs after the search",
            words,
            one.attack,
            make_share(one.clean, one.n, where="", notes=[]),
            make_share(one.robust, one.n, where="", notes=[]),
            f"{run.label}: summary.json (networks)",
        )
        for one in trained_networks(run)
        if one.name == FOUND
    ]
    return scratch + [
        Row(
            run,
            f"{split} images, weights shared in the search",
            words,
            entry["attack"],
            entry.get("clean"),
            entry.get("robust"),
            f"{run.label}: summary.json",
        )
        for split, entry in rows.items()
    ]


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


def share_cell(share: Share | None) -> str:
    if share is None:
        return "none"
    if share.low is None or share.high is None:
        return percent(share.accuracy)
    limits = f"{100 * share.low:.2f} to {100 * share.high:.2f}"
    return f'{percent(share.accuracy)}<br><span class="n">{limits}</span>'


def robust_cell(row: Row) -> str:
    """The robust accuracy of a row, with a mark where the checks call it suspicious."""
    mark = '<br><span class="verdict suspicious">⚠ suspicious</span>' if row.suspicious else ""
    return share_cell(row.robust) + mark


def sizes(*shares: Share | None) -> str:
    found = dict.fromkeys(f"{share.n:,}" for share in shares if share is not None and share.n)
    return ", ".join(found) or "not recorded"


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
    if isinstance(value, list):
        shown = ", ".join(show(entry) for entry in value[:12])
        return shown + (f" and {len(value) - 12} more" if len(value) > 12 else "")
    return show(value)


def plain(value: Any, cell: Callable[[Any], str] = leaf) -> str:
    """Plain values as a table: a list of objects with a column for each name.

    What is beyond :data:`MOST_ENTRIES` rows, or as many columns, is left out and said to be.

    Args:
        cell: a value as HTML.
    """
    if isinstance(value, Mapping):
        entries = dict(pairs(value))
        rows = "".join(
            f'<tr><th>{show(name)}</th><td class="wrap">{cell(entry)}</td></tr>'
            for name, entry in islice(entries.items(), MOST_ENTRIES)
        )
        body = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
        return body + _left_out(len(entries), "entries")
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        flat = [dict(pairs(entry)) for entry in value[:MOST_ENTRIES]]
        every = list(dict.fromkeys(name for entry in flat for name in entry))
        names = every[:MOST_ENTRIES]
        lines = [[cell(entry.get(name, "")) for name in names] for entry in flat]
        text = [
            i for i, name in enumerate(names) if any(isinstance(e.get(name), str) for e in flat)
        ]
        body = table([show(name) for name in names], lines, text=text)
        return body + _left_out(len(value), "rows") + _left_out(len(every), "columns")
    return f"<p>{cell(value)}</p>"


def _left_out(count: int, what: str) -> str:
    return "" if count <= MOST_ENTRIES else f"<p>and {count - MOST_ENTRIES:,} more {what}</p>"
