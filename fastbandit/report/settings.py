"""The sections of what runs were asked for, and of where they ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from fastbandit.report.html import as_text, get, section
from fastbandit.report.matching import Collection
from fastbandit.report.reading import Folder
from fastbandit.report.rows import leaf, plain, sources, with_results
from fastbandit.report.search import Run

__all__ = [
    "joint_configuration",
    "joint_environment",
    "search_configuration",
    "search_environment",
    "study_configuration",
]


def search_configuration(run: Run) -> Markup:
    return section("config", "Configuration", "config.yaml", "text", of=run, text=run.config_text)


def study_configuration(text: str) -> Markup:
    files = [("config.yaml", text)]
    return section("config", "Configuration", "", "texts", files=files)


def joint_configuration(collection: Collection) -> Markup:
    files = [(f"{run.key}: {run.label}", run.config_text or "not there") for run in collection.runs]
    source = sources(collection.runs, "config.yaml")
    return section("config", "Configuration", source, "texts", files=files)


def _environment(run: Folder, cell: Callable[[Any], str]) -> Markup | None:
    entries = dict(run.environment or {})
    versions = get(run.summary, "versions")
    if isinstance(versions, Mapping):
        entries["versions"] = versions
    return plain(entries, cell) if entries else None


def search_environment(run: Run) -> Markup:
    runs = [("", _environment(run, as_text))]
    source = "env.json, summary.json"
    return section("environment", "Environment", source, "environment", of=run, runs=runs)


def joint_environment(collection: Collection) -> Markup:
    runs = [(f"{run.key}: {run.label}", _environment(run, leaf)) for run in collection.runs]
    source = with_results(collection.runs, "env.json")
    return section("environment", "Environment", source, "environment", runs=runs)
