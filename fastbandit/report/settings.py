"""The sections of what runs were asked for, and of where they ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from fastbandit.report.html import empty, folded, get, run_section, section, show
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder
from fastbandit.report.rows import leaf, plain, sources, with_results
from fastbandit.report.search import Run

__all__ = [
    "configuration",
    "joint_configuration",
    "joint_environment",
    "search_configuration",
    "search_environment",
]


def configuration(text: str, missing: str = "") -> str:
    """The text of a configuration as it lies in its file; ``missing`` where there is none."""
    return f"<pre>{escape(text) or missing}</pre>"


def search_configuration(run: Run) -> str:
    body = configuration(run.config_text)
    return run_section(run, "config", "Configuration", body, "config.yaml")


def joint_configuration(found: Collection) -> str:
    body = "".join(_folded(run, configuration(run.config_text, "not there")) for run in found.runs)
    return section("config", "Configuration", body, sources(found.runs, "config.yaml"))


def _environment(run: Folder, cell: Callable[[Any], str]) -> str:
    entries = dict(run.environment or {})
    versions = get(run.summary, "versions")
    if isinstance(versions, Mapping):
        entries["versions"] = versions
    return plain(entries, cell) if entries else empty("Not recorded.")


def search_environment(run: Run) -> str:
    body = _environment(run, show)
    return run_section(run, "environment", "Environment", body, "env.json, summary.json")


def joint_environment(found: Collection) -> str:
    body = "".join(_folded(run, _environment(run, leaf)) for run in found.runs)
    return section("environment", "Environment", body, with_results(found.runs, "env.json"))


def _folded(run: Folder, body: str) -> str:
    return folded(f"{show(run.key)}: {show(run.label)}", body)
