"""A study from its beginning to its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastbandit._files import write_atomic
from fastbandit._statistics import scipy_stats
from fastbandit.report.study import make_page
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.study.compare.run import Stage, compare
from fastbandit.study.config import StudyConfig
from fastbandit.study.outcome import Page, in_folder
from fastbandit.study.pieces import Pieces
from fastbandit.study.real import run_real
from fastbandit.study.simulated import run_simulated
from fastbandit.study.tabular.run import run_tabular, tabular_csv

__all__ = ["FILES", "study"]

#: What a study writes: pieces and searches, and no checkpoint of its own.
FILES = RunFiles(
    "study",
    files=(
        "study.json",
        "study.html",
        "tabular.csv",
        "pilot.json",
        "protocol.json",
        "opened.json",
        "compare.csv",
    ),
    folders=(),
    trees=("pieces", "searches", "training", "models"),
)


def study(
    config: StudyConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    until: Stage = "open",
    log: Callable[[str], None] = lambda text: None,
) -> tuple[Path, dict[str, Any]]:
    """Run a study to its end, or go on with one that was interrupted.

    Args:
        out: run folder; None: an unfinished study of the same configuration below ``root``, else a
            new folder there.
        force: replace what a finished or a different study left in ``out``.
        until: the last stage of a comparison.
        log: is called with a line about each finished piece.

    Returns:
        The run folder and the content of its ``study.json``; of a finished study of the same
        configuration what is stored, unless ``force`` is given.

    Raises:
        RunError: the folder holds something else.
        ConfigError: what is asked for cannot be, or SciPy is missing.
    """
    if config.compare.searches:
        return compare(config, FILES, out, root=root, force=force, until=until, log=log)
    # Before the work: the tests at its end need it.
    scipy_stats()

    def work(folder: RunFolder) -> tuple[dict[str, Any], Page]:
        pieces = Pieces(folder.path / "pieces")
        result = {
            "simulated": run_simulated(config, pieces, log),
            "real": run_real(config, folder.path, pieces, log),
        }
        # Only where it is asked for: what other studies store stays as it was.
        if config.tabular.file is not None:
            tabular = run_tabular(config.tabular, config.seed, pieces, log)
            result["tabular"] = tabular
            write_atomic(folder.path / "tabular.csv", tabular_csv(tabular))
        return result, partial(make_page, config.name, result)

    return in_folder(
        config, FILES, work, out,
        kind="study", threads=config.threads, root=root, force=force, log=log,
    )  # fmt: skip
