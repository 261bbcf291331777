"""A study from its beginning to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastbandit._files import write_atomic
from fastbandit._statistics import scipy_stats
from fastbandit.report.study import make_page
from fastbandit.runs.folder import RunFiles
from fastbandit.runs.session import Session, torch_settings
from fastbandit.study.compare.run import Stage, compare
from fastbandit.study.config import StudyConfig
from fastbandit.study.outcome import begin, end, stored
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
    session = Session(config)
    search = config.search.resolve()
    with (
        torch_settings(config.threads, False),
        session.open(FILES, out, root=root, name=config.name, force=force, progress=None),
    ):
        folder, path = session.folder, session.path
        assert folder is not None
        if (finished := stored(session, "study", log)) is not None:
            return path, finished
        begin(folder, search.device)
        started = time.perf_counter()
        pieces = Pieces(path / "pieces")
        result = {
            "simulated": run_simulated(config, pieces, log),
            "real": run_real(config, path, pieces, log),
        }
        # Only where it is asked for: what other studies store stays as it was.
        if config.tabular.file is not None:
            tabular = run_tabular(config.tabular, config.seed, pieces, log)
            result["tabular"] = tabular
            write_atomic(path / "tabular.csv", tabular_csv(tabular))
        end(session, result, partial(make_page, config.name, result), started)
    return path, result
