"""The sections of a run's configuration and of where it ran."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from fastbandit.report.html import get, pairs, run_section, show
from fastbandit.report.search import Run

__all__ = ["search_configuration", "search_environment"]


def search_environment(run: Run) -> str:
    found = dict(run.environment or {})
    versions = get(run.summary, "versions")
    if isinstance(versions, Mapping):
        found["versions"] = versions
    if not found:
        body = '<p class="empty">Not recorded.</p>'
    else:
        rows = "".join(
            f'<tr><th>{show(name)}</th><td class="wrap">{show(value)}</td></tr>'
            for name, value in pairs(found)
        )
        body = f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'
    return run_section(run, "environment", "Environment", body, "env.json, summary.json")


def search_configuration(run: Run) -> str:
    return run_section(
        run, "config", "Configuration", f"<pre>{escape(run.config_text)}</pre>", "config.yaml"
    )
