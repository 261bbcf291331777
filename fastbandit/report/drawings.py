"""The section of the cells drawn: of a search, and of every genotype of a page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from markupsafe import Markup

from fastbandit.report.html import empty, section
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder, read_lines, without_folder
from fastbandit.report.rows import sources
from fastbandit.report.search import Run

if TYPE_CHECKING:
    from fastbandit.genotype import Genotype

__all__ = ["joint_cells", "search_cells"]

_FILE = "genotype.json"


@dataclass
class _Drawing:
    """The cells of a genotype, or what is wrong with its file; and the runs that have it."""

    svg: str = ""
    problem: str = ""
    digest: str = ""
    runs: list[Folder] = field(default_factory=list)


def _draw(run: Folder, read: Callable[[], Genotype]) -> _Drawing:
    try:
        genotype = read()
        return _Drawing(genotype.svg(), digest=genotype.hash, runs=[run])
    except (ValueError, OSError) as error:
        return _Drawing(problem=without_folder(str(error), run.folder))


def search_cells(run: Run) -> Markup:
    """The cells of the genotype, or of the best arms so far."""
    from fastbandit.genotype import Genotype

    source, best = _FILE, None
    drawing = None
    if (run.folder / _FILE).is_file():
        drawing = _draw(run, partial(Genotype.load, run.folder / _FILE))
    else:
        source = "the last line of genotypes.jsonl"
        for _, line in read_lines(run, "genotypes.jsonl"):
            best = line
        if best is not None:
            read = partial(Genotype.from_dict, best.get("genotype"), where=source)
            drawing = _draw(run, read)
    if drawing is None:
        words = "No genotype yet: the first one is written after a pruning."
        return empty("cells", "Cells", source, words, of=run)
    return section("cells", "Cells", source, "cells", of=run, drawings=[drawing], best=best)


def joint_cells(collection: Collection) -> Markup:
    """One drawing for each genotype of the page."""
    from fastbandit.genotype import Genotype

    problems, drawings = [], dict[str, _Drawing]()
    for run in [*collection.searches, *collection.retrainings]:
        file = run.folder / _FILE
        if not file.is_file():
            continue
        drawing = _draw(run, partial(Genotype.load, file))
        if drawing.problem:
            drawing.problem = f"{run.label}: {drawing.problem}"
            problems.append(drawing)
        elif drawing.digest in drawings:
            drawings[drawing.digest].runs.append(run)
        else:
            drawings[drawing.digest] = drawing
    every = [*problems, *drawings.values()]
    files = sources([run for drawing in every for run in drawing.runs], _FILE)
    if not every:
        return empty("cells", "Cells", files, "No genotype in these folders.")
    return section("cells", "Cells", files, "cells", drawings=every, best=None)
