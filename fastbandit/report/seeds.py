"""Runs that differ in their seed alone: every one of them, their mean and standard deviation."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from fastbandit.report.html import as_text, get, percent, section, share
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder
from fastbandit.report.rows import with_results
from fastbandit.search.networks import FOUND

__all__ = ["groups", "seeds"]

_MOST_ROWS = 200


def groups(collection: Collection) -> list[list[Folder]]:
    """Finished searches, and finished retrainings, of one configuration and several seeds."""
    alike: dict[str, list[Folder]] = {}
    for kind, runs in (("search", collection.searches), ("retraining", collection.retrainings)):
        for run in runs:
            if not run.finished or _accuracies(run) is None:
                continue
            # Where a genotype was found decides nothing; its hash stays.
            left_out = ("seed", "name", "genotype")
            rest = {key: value for key, value in run.config.items() if key not in left_out}
            key = json.dumps([kind, rest], sort_keys=True, default=str)
            alike.setdefault(key, []).append(run)
    return [
        runs for runs in alike.values() if len({str(run.config.get("seed")) for run in runs}) > 1
    ]


def _accuracies(run: Folder) -> tuple[float, float, str] | None:
    """Clean and robust accuracy of the network of a run, and on which images."""
    stated: Any = get(run.summary, "test")
    words = "test images"
    rows = get(run.summary, "networks")
    if isinstance(rows, list):
        # Of a search the network trained from scratch, not its path with shared weights.
        trained = [row for row in rows if isinstance(row, Mapping) and row.get("name") == FOUND]
        if not trained:
            return None
        stated = trained[0]
        words = f"{as_text(stated.get('split'))} images, trained from scratch"
    if not isinstance(stated, Mapping):
        return None
    clean, robust = share(stated.get("clean_accuracy")), share(stated.get("robust_accuracy"))
    return None if clean is None or robust is None else (clean, robust, words)


def seeds(collection: Collection) -> Markup:
    """The section of the page."""
    parts, every = [], groups(collection)
    for runs in every:
        shown, rows = runs[:_MOST_ROWS], []
        figures = [one for run in runs if (one := _accuracies(run)) is not None]
        for run, one in zip(shown, figures, strict=False):
            rows.append(
                (run.key, run.label, run.config.get("seed"), percent(one[0]), percent(one[1]))
            )
        means = [
            f"{100 * statistics.fmean(values):.2f} ± {100 * statistics.stdev(values):.2f} %"
            for values in ([one[0] for one in figures], [one[1] for one in figures])
        ]
        kind = "searches" if runs[0] in collection.searches else "retrainings"
        parts.append(
            {
                "title": f"{len(runs)} {kind} that differ in their seed",
                "rows": rows,
                "means": means,
                "images": figures[0][2],
                "left": len(runs) - len(shown),
            }
        )
    files = with_results([run for runs in every for run in runs], "config.yaml")
    return section("seeds", "Seeds", files, "seeds", groups=parts)
