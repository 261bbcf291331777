"""The section of the cells drawn: of a search, and of every genotype of a page."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from html import escape
from typing import TYPE_CHECKING

from fastbandit.report.html import empty, run_section, section, show, warning
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder, read_lines, without_folder
from fastbandit.report.rows import sources
from fastbandit.report.search import Run

if TYPE_CHECKING:
    from fastbandit.genotype import Genotype

__all__ = ["joint_cells", "search_cells"]

_FILE = "genotype.json"


def _draw(run: Folder, read: Callable[[], Genotype]) -> tuple[str, str, str]:
    """Hash and drawing of a genotype, and what is wrong with its file: one or the other."""
    try:
        genotype = read()
        return genotype.hash, f'<div class="drawing">{genotype.svg()}</div>', ""
    except (ValueError, OSError) as error:
        return "", "", without_folder(str(error), run.folder)


def _problem(text: str) -> str:
    return warning(f"The cells cannot be drawn: {escape(text)}")


def search_cells(run: Run) -> str:
    """The cells of the genotype, or of the best arms so far."""
    from fastbandit.genotype import Genotype

    source, lead = _FILE, ""
    drawing = problem = ""
    if (run.folder / _FILE).is_file():
        _, drawing, problem = _draw(run, partial(Genotype.load, run.folder / _FILE))
    else:
        source = "the last line of genotypes.jsonl"
        last = None
        for _, value in read_lines(run, "genotypes.jsonl"):
            last = value
        if last is not None:
            read = partial(Genotype.from_dict, last.get("genotype"), where=source)
            _, drawing, problem = _draw(run, read)
            lead = (
                f"<p>The best arms after {show(last.get('sample'))} samples, with "
                f"{show(last.get('arms_left'))} arms left on each edge: not the result.</p>"
            )
    if problem:
        body = _problem(problem)
    elif drawing:
        body = lead + drawing
    else:
        body = empty("No genotype yet: the first one is written after a pruning.")
    return run_section(run, "cells", "Cells", body, source)


def joint_cells(found: Collection) -> str:
    """One drawing for each genotype of the page."""
    from fastbandit.genotype import Genotype

    drawn: dict[str, tuple[str, list[Folder]]] = {}
    body = ""
    for run in [*found.searches, *found.retrainings]:
        file = run.folder / _FILE
        if not file.is_file():
            continue
        digest, drawing, problem = _draw(run, partial(Genotype.load, file))
        if problem:
            body += _problem(f"{run.label}: {problem}")
        else:
            drawn.setdefault(digest, (drawing, []))[1].append(run)
    if not drawn and not body:
        body = empty("No genotype in these folders.")
    for digest, (drawing, runs) in drawn.items():
        keys = ", ".join(run.key for run in runs)
        body += f"<h3>Genotype {digest[:12]} ({keys})</h3>{drawing}"
    drawn_runs = [run for _, runs in drawn.values() for run in runs]
    return section("cells", "Cells", body, sources(drawn_runs, _FILE))
