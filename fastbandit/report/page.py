"""The page of the report: a search as it is alone, or several runs and how they belong together.

Every section names the file its numbers come from. The page forbids scripts and requests; the only
pictures are those it carries.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastbandit.report import results
from fastbandit.report.arms import abandoned, arms, survival
from fastbandit.report.cost import search_cost
from fastbandit.report.curves import curves
from fastbandit.report.drawings import search_cells
from fastbandit.report.figures import figures
from fastbandit.report.header import joint_header, name_of, search_header
from fastbandit.report.html import Section, document
from fastbandit.report.matching import Collection
from fastbandit.report.networks import networks
from fastbandit.report.robustness import has_pictures
from fastbandit.report.search import Run
from fastbandit.report.settings import search_configuration, search_environment
from fastbandit.report.tournament import tournament

__all__ = ["make_joint_page", "make_page"]

#: (anchor, title in the navigation, function) of every section, in the order of the page. A
#: function returns nothing where its section does not apply.
_SEARCH_SECTIONS = (
    ("networks", "Trained from scratch", networks),
    ("tournament", "Tournament", tournament),
    ("figures", "The search", figures),
    ("cells", "Cells", search_cells),
    ("curves", "Accuracy", curves),
    ("arms", "Arms over time", arms),
    ("survival", "Survivors", survival),
    ("abandoned", "Abandoned arms", abandoned),
    ("cost", "Cost", search_cost),
    ("config", "Configuration", search_configuration),
    ("environment", "Environment", search_environment),
)


def make_page(run: Run) -> str:
    """The page of one search."""
    # Sections first: reading for them may add notes that the header shows.
    sections = [(name, title, make(run)) for name, title, make in _SEARCH_SECTIONS]
    name = name_of(run)
    title = f"{name}: fastbandit search"
    return document("search_page", title, sections, name=name, **search_header(run))


def make_joint_page(collection: Collection) -> str:
    """The page of any runs: what they measured, then each search's own sections."""
    sections: list[Section] = []

    def add(joint: Sequence[results.JointSection]) -> None:
        for name, title, make, applies in joint:
            if applies(collection):
                sections.append((name, title, make(collection)))

    add(results.SECTIONS)
    for run in collection.searches:
        for name, _, make in _SEARCH_SECTIONS:
            # What the joint sections already hold is not repeated.
            if name not in ("cells", "cost", "config", "environment"):
                link = f"Search {run.key}" if name == "figures" else ""
                sections.append((f"{run.key}-{name}", link, make(run)))
    add(results.LAST_SECTIONS)
    models = [name_of(model.first) for model in collection.models]
    name = ", ".join(dict.fromkeys(models[:3])) + (" and others" if len(models) > 3 else "")
    header = joint_header(collection)
    header["pictures"] = has_pictures(collection)
    return document("joint_page", f"{name}: fastbandit report", sections, name=name, **header)
