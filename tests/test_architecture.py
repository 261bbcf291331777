"""docs/architecture.md: its drawing is that of the imports, and its names are there."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

from fastbandit import ops

ROOT = Path(__file__).parents[1]
DRAWN = runpy.run_path(str(ROOT / "docs" / "architecture.py"))


def test_packages_import_downwards_only():
    assert DRAWN["cycle"](DRAWN["imports"]()) == []


def test_a_cycle_is_found():
    assert DRAWN["cycle"]({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert DRAWN["cycle"]({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_imports_by_hand():
    found = DRAWN["imports"]()
    assert found["space"] == {"operations"}
    assert "_native" in found["ops"]
    assert "search" in found["report"]
    # Within a function, or for a type checker alone: neither is loaded with the package.
    assert "report" not in found["search"]
    assert not {"distributed", "runs"} & found["command"]


def test_floors_and_arrows():
    graph = {"a": set(), "b": {"a"}, "c": {"a", "b"}}
    assert DRAWN["floors"](graph) == [["a"], ["b"], ["c"]]
    assert DRAWN["reduced"](graph) == {"a": set(), "b": {"a"}, "c": {"b"}}


def test_the_drawing_is_current():
    found = DRAWN["DRAWING"].read_text(encoding="utf-8")
    assert found == DRAWN["draw"](), "run python docs/architecture.py"


def test_the_page_names_files_that_are_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(fastbandit/[^`]+|docs/[^`]+)`", page))
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
    classes = [
        node
        for path in (ROOT / "fastbandit").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    ]
    # A method may be one that the class inherits.
    defined = {part.name for node in classes for part in node.body if hasattr(part, "name")}
    names = {node.name for node in classes}
    methods = re.findall(r"`([A-Z]\w+)\.([a-z]\w*)`", page)
    assert len(methods) > 5
    assert [pair for pair in methods if pair[0] not in names or pair[1] not in defined] == []
    called = re.findall(r"`ops\.(\w+)`", page)
    assert len(called) > 3
    assert [name for name in called if not hasattr(ops, name)] == []


def test_comments_point_to_decisions_that_are_there():
    sections = re.findall(r"^## (.+)$", (ROOT / "docs" / "decisions.md").read_text(), re.MULTILINE)
    named = set()
    for folder in ("fastbandit", "csrc"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                named |= set(re.findall(r"docs/decisions\.md#([\w-]+)", path.read_text()))
    assert named == set(sections)


def test_the_index_lists_every_page():
    page = (ROOT / "docs" / "index.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)\)", page)) == pages
