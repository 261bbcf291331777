"""Draws docs/architecture.svg: the packages of fastbandit in floors, by what they import.

    python docs/architecture.py

A box imports boxes of lower floors only. An arrow that other arrows imply is left out, and so are
private modules and imports within functions. Needs the standard library alone.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DRAWING = ROOT / "docs" / "architecture.svg"

# Modules that are drawn as a part of another box.
PARTS = {
    "darts_text": "genotype",
    "averaging": "training",
    "objectives": "training",
    "overfitting": "training",
    "_graphs": "training",
    "_inputs": "training",
}
WIDTH, BOX, HEIGHT, GAP, STEP = 960, 138, 30, 16, 74

Graph = dict[str, set[str]]


def _modules() -> dict[str, Path]:
    """The file of each module of the package."""
    found = {}
    for path in sorted((ROOT / "fastbandit").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(node: ast.AST, modules: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that are loaded when the code of ``node`` is."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _imported(ast.Module([other], []), modules)
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).startswith("__name__"):
            continue  # a module that is run is not imported
        if isinstance(child, ast.Import):
            yield from (one.name for one in child.names if one.name.startswith("fastbandit."))
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("fastbandit"):
            for one in child.names:
                whole = f"{child.module}.{one.name}"
                yield whole if whole in modules else str(child.module)
        yield from _imported(child, modules)


def _box(module: str) -> str:
    """The package or the module of the first floor down that ``module`` belongs to."""
    name = f"{module}.".split(".")[1]
    return PARTS.get(name, name)


@cache
def imports() -> Graph:
    """Which packages, private modules included, each one loads when it is imported."""
    modules = _modules()
    graph: Graph = {_box(module): set() for module in modules}
    for module, path in modules.items():
        for other in _imported(ast.parse(path.read_text(encoding="utf-8")), modules):
            graph[_box(module)].add(_box(other))
    for name, others in graph.items():
        others.discard(name)
    # The package itself, which any import of a module loads.
    del graph[""]
    return {name: others - {""} for name, others in graph.items()}


def cycle(graph: Graph) -> list[str]:
    """Names that import each other in a circle; empty where there is none."""
    done: set[str] = set()

    def search(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := search(other, [*above, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := search(name, []))), [])


def drawn(graph: Graph) -> Graph:
    """The public names, each with what it imports itself or through private modules."""

    def public(name: str) -> set[str]:
        direct = graph[name]
        private = {other for other in direct if other.startswith("_")}
        return (direct - private).union(*(public(other) for other in private))

    return {name: public(name) - {name} for name in graph if not name.startswith("_")}


def floors(graph: Graph) -> list[list[str]]:
    """The names by the longest way down from them, the lowest floor first."""

    @cache
    def floor(name: str) -> int:
        return 1 + max((floor(other) for other in graph[name]), default=-1)

    found: list[list[str]] = [[] for _ in range(1 + max(map(floor, graph)))]
    for name in sorted(graph):
        found[floor(name)].append(name)
    return found


def reduced(graph: Graph) -> Graph:
    """Without the arrows that others imply."""

    @cache
    def below(name: str) -> frozenset[str]:
        return frozenset(graph[name]).union(*(below(other) for other in graph[name]))

    return {
        name: {other for other in others if not any(other in below(one) for one in others)}
        for name, others in graph.items()
    }


def draw() -> str:
    """The drawing."""
    graph = drawn(imports())
    levels, arrows = floors(graph), reduced(graph)
    height = len(levels) * STEP + 8
    place: dict[str, tuple[float, float]] = {}
    for level, names in enumerate(levels):
        # Boxes stand over what they import, as far as there is room.
        wished = {
            name: sum(place[other][0] for other in arrows[name]) / len(arrows[name])
            if arrows[name]
            else WIDTH / 2
            for name in names
        }
        row = sorted(names, key=lambda name: (wished[name], name))
        middle = sum(wished.values()) / len(row)
        reach = (len(row) - 1) * (BOX + GAP)
        first = min(max(middle - reach / 2, BOX / 2 + 8), WIDTH - reach - BOX / 2 - 8)
        for position, name in enumerate(row):
            place[name] = (first + position * (BOX + GAP), height - level * STEP - HEIGHT - 8)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="14">',
        "<title>The packages of fastbandit; a box imports what is below it</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for name in sorted(arrows):
        for other in sorted(arrows[name]):
            (x, y), (to, under) = place[name], place[other]
            y += HEIGHT
            bend = (under - y) / 2
            parts.append(
                f'<path d="M{x:.0f} {y:.0f}C{x:.0f} {y + bend:.0f} {to:.0f} {under - bend:.0f} '
                f'{to:.0f} {under:.0f}" fill="none" stroke="#8a94a0"/>'
            )
    packages = {path.parent.name for path in (ROOT / "fastbandit").glob("*/__init__.py")}
    for name, (x, y) in sorted(place.items()):
        fill = "#dbe9f6" if name in packages else "#f2f2f2"
        parts.append(
            f'<rect x="{x - BOX / 2:.0f}" y="{y:.0f}" width="{BOX}" height="{HEIGHT}" rx="5" '
            f'fill="{fill}" stroke="#5b6470"/>'
            f'<text x="{x:.0f}" y="{y + 20:.0f}" text-anchor="middle">{escape(name)}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    DRAWING.write_text(draw(), encoding="utf-8")
