"""``python -m fastbandit.report RUN...``: what runs did, as one HTML file that needs no network.

The page is built from the files of the run folders alone, finished or not. Of a search it shows
accuracies with their intervals, the cells drawn, every edge's arms over time, every abandoned arm
with the reason, cost, configuration and environment. Retraining runs and evaluations add
robustness curves, training curves, adversarial examples as images and the suspicion checks; runs
are matched by the hash of their genotype.
"""

# How long this package and the commands are, and why: docs/decisions.md#size-of-the-upper-half

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastbandit._intervals import wilson
    from fastbandit.report.command import main, write_report
    from fastbandit.report.reading import ReportError

__all__ = ["ReportError", "main", "wilson", "write_report"]


def __getattr__(name: str) -> Any:
    # Not imported above: a command chooses how threads wait before it imports anything.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fastbandit._intervals import wilson
    from fastbandit.report.command import main, write_report
    from fastbandit.report.reading import ReportError

    globals().update(ReportError=ReportError, main=main, wilson=wilson, write_report=write_report)
    return globals()[name]
