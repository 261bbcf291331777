"""The section of the cells drawn."""

from __future__ import annotations

from html import escape

from fastbandit.report.html import run_section, show
from fastbandit.report.reading import read_lines, without_folder
from fastbandit.report.search import Run

__all__ = ["search_cells"]


def search_cells(run: Run) -> str:
    """The cells of the genotype, or of the best arms so far."""
    from fastbandit.genotype import Genotype

    source, lead = "genotype.json", ""
    svg = None
    try:
        if (run.folder / "genotype.json").is_file():
            svg = Genotype.load(run.folder / "genotype.json").svg()
        else:
            source = "the last line of genotypes.jsonl"
            last = None
            for _, value in read_lines(run, "genotypes.jsonl"):
                last = value
            if last is not None:
                svg = Genotype.from_dict(last.get("genotype"), where=source).svg()
                lead = (
                    f"<p>The best arms after {show(last.get('sample'))} samples, with "
                    f"{show(last.get('arms_left'))} arms left on each edge: not the result.</p>"
                )
    except (ValueError, OSError) as error:
        message = without_folder(str(error), run.folder)
        body = f'<div class="warning">The cells cannot be drawn: {escape(message)}</div>'
        return run_section(run, "cells", "Cells", body, source)
    if svg is None:
        body = '<p class="empty">No genotype yet: the first one is written after a pruning.</p>'
    else:
        body = f'{lead}<div class="drawing">{svg}</div>'
    return run_section(run, "cells", "Cells", body, source)
