"""The page of the report: a search as it is alone, or several runs and how they belong together.

Every section names the file its numbers come from; all text is escaped. The page forbids scripts
and requests; the only pictures are those it carries.
"""

from __future__ import annotations

from fastbandit.report import results
from fastbandit.report.arms import abandoned, arms, survival
from fastbandit.report.cost import search_cost
from fastbandit.report.curves import curves
from fastbandit.report.drawings import search_cells
from fastbandit.report.figures import figures
from fastbandit.report.header import joint_header, name_of, search_header
from fastbandit.report.html import document
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
    made = [(name, title, make(run)) for name, title, make in _SEARCH_SECTIONS]
    sections = "\n".join(body for *_, body in made if body)
    links = [(name, title) for name, title, body in made if body]
    return document(
        f"{name_of(run)}: fastbandit search", search_header(run), links, sections, pictures=False
    )


def make_joint_page(found: Collection) -> str:
    """The page of any runs: what they measured, then each search's own sections."""
    links, parts = [], []
    for name, title, make, applies in results.SECTIONS:
        if applies(found):
            parts.append(make(found))
            links.append((name, title))
    # What the joint sections already hold is not repeated.
    own = {"networks", "tournament", "figures", "curves", "arms", "survival", "abandoned"}
    for run in found.searches:
        parts += [make(run) for name, _, make in _SEARCH_SECTIONS if name in own]
        links.append((f"{run.key}-figures", f"Search {run.key}"))
    for name, title, make, applies in results.LAST_SECTIONS:
        if applies(found):
            parts.append(make(found))
            links.append((name, title))
    models = [name_of(model.first) for model in found.models]
    title = ", ".join(dict.fromkeys(models[:3])) + (" and others" if len(models) > 3 else "")
    return document(
        f"{title}: fastbandit report",
        joint_header(found, title),
        links,
        "\n".join(parts),
        pictures=has_pictures(found),
    )
