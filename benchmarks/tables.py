"""The tables of speed, from the files under benchmarks/results.

python benchmarks/tables.py           # writes docs/benchmarks.md and the table of README.md
python benchmarks/tables.py --check   # says whether they are what the files give
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from to_csv import RESULTS, Row, read_csv

from fastbandit._statistics import mean_interval

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = ROOT / "docs" / "benchmarks.md", ROOT / "README.md"
BEGIN, END = "<!-- made by benchmarks/tables.py -->", "<!-- end -->"
OURS = "fastbandit"
BOUNDS = {"copy"}  # what no kernel can beat is no rival, so it is no loss
FAMILY = re.compile(r"(?P<what>.+?) C (?P<c>\d+) H (?P<h>\d+) k (?P<k>\d+)$")
LAYOUTS = (" channels-last", " contiguous")
FLOOR = "the least time that memory and arithmetic of a Zen 4 allow"
HEAD = """\
# How fast

This page is made by `benchmarks/tables.py` from the files in `benchmarks/results/`: change those,
not the page. {gpu}Code may have changed since the commit of a run.

Each figure is a ratio of medians, rival / ours: above 1 ours is faster, and **what is below 1 is a
loss**. Rivals of one group run in turn in one process, on the same inputs. `copy` moves the same
bytes as the op: a bound, not a rival. A range in brackets is over all runs of the same command.
Quartiles and minima are in the CSV files. A commit is "dirty" if its text was being changed.
"""
README_HEAD = """\
Ratios of medians, rival / ours, on three machines of two cores with 2 threads, float32, torch 2.13.0 CPU
build: above 1 ours is faster, **losses are bold**, ranges are over all runs of the same command
([docs/benchmarks.md](docs/benchmarks.md): every table; [docs/kernels.md](docs/kernels.md): what bounds them).
"""
README_FOOT = """\
An earlier run of the whole attack on the Zen 3 was a loss, **0.94** (only the ratio is kept). On contiguous
tensors our depthwise convolution mostly takes longer: use channels-last. `bandit_step_` was measured when a
call took 0.8 us less; for one bandit its ratios are about a tenth lower today.
"""


Groups = dict[str, dict[str, Row]]
"""Group -> rival -> row."""


@dataclass(frozen=True)
class Machine:
    key: str
    facts: dict[str, Any]
    rows: list[Row]

    def runs(self) -> dict[str, list[Row]]:
        """Rows by run, without rivals that the facts leave out."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            about = self.facts["runs"].get(row["run"], {})
            if row["rival"] not in about.get("left_out", {}):
                found.setdefault(row["run"], []).append(row)
        return found

    def series(self) -> dict[str, list[list[Row]]]:
        """Runs of the same command, by the name of the first."""
        found: dict[str, list[list[Row]]] = {}
        for name, rows in self.runs().items():
            found.setdefault(re.sub(r"-repeat-\d+$", "", name), []).append(rows)
        return found


def machines(results: Path = RESULTS) -> list[Machine]:
    return [
        Machine(file.stem, json.loads(file.read_text(encoding="utf-8")), read_timings(file))
        for file in sorted(results.glob("*.json"))
    ]


def read_timings(facts: Path) -> list[Row]:
    file = facts.with_suffix(".csv")
    return read_csv(file) if file.exists() else []


# --- Figures --------------------------------------------------------------------------------------


def median(row: Row) -> float:
    return float(row["median"])


def groups(rows: Iterable[Row]) -> Groups:
    found: Groups = {}
    for row in rows:
        found.setdefault(row["group"], {})[row["rival"]] = row
    for entries in found.values():
        # On a GPU without launches, where every rival was measured so.
        launched = {
            name: re.search(r"device_us=([^;]+)", row["extra"]) for name, row in entries.items()
        }
        if all(launched.values()):
            entries.update(
                {
                    name: {**entries[name], "median": time[1]}
                    for name, time in launched.items()
                    if time
                }
            )
    return found


def ratios(runs: Iterable[Groups], group: str, rival: str) -> list[float]:
    """Rival / ours of each run that has both."""
    found = []
    for run in runs:
        entries = run.get(group, {})
        if rival in entries and OURS in entries:
            found.append(median(entries[rival]) / median(entries[OURS]))
    return found


def figure(ratio: float, bound: bool = False) -> str:
    """A ratio; a loss is bold."""
    text = f"{ratio:.2f}" if ratio < 1.195 else f"{ratio:.1f}" if ratio < 99.5 else f"{ratio:.0f}"
    return f"**{text}**" if ratio < 1 and not bound else text


def ranged(values: Sequence[float], bound: bool = False) -> str:
    """The ratio of the first run, and in brackets the range of all."""
    text = figure(values[0], bound)
    low, high = (figure(end, bound) for end in (min(values), max(values)))
    return text if low == high else f"{text} ({low} to {high})"


def spread(values: Sequence[float], bound: bool = False) -> str:
    """Geometric mean, and in brackets the worst and the best."""
    mean = math.exp(statistics.fmean(map(math.log, values)))
    return f"{figure(mean, bound)} ({figure(min(values), bound)} to {figure(max(values), bound)})"


def duration(row: Row) -> str:
    value = median(row)
    if row["unit"] != "us":
        return f"{value:.0f} {row['unit']}"
    for limit, unit in ((1e3, "us"), (1e6, "ms"), (math.inf, "s")):
        if value < limit:
            return f"{value * 1e3 / limit if unit != 's' else value / 1e6:.3g} {unit}"
    raise AssertionError


def family_ratios(rows: Iterable[Row]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """(what, rival) -> k -> ratios over maps; of a rival's layouts the faster one."""
    found: dict[tuple[str, str], dict[int, list[float]]] = {}
    for group, entries in groups(rows).items():
        match = FAMILY.match(group)
        if match is None or OURS not in entries:
            continue
        ours, best = median(entries[OURS]), {}
        for rival, row in entries.items():
            base = rival
            if not rival.startswith(OURS):
                for layout in LAYOUTS:
                    base = base.removesuffix(layout)
            best[base] = min(best.get(base, math.inf), median(row))
        floor = re.search(r"floor_us=([^;]+)", entries[OURS]["extra"])
        values = {rival: best[rival] / ours for rival in best if rival != OURS}
        if floor:
            values[FLOOR] = ours / float(floor[1])
        for rival, value in values.items():
            found.setdefault((match["what"], rival), {}).setdefault(int(match["k"]), []).append(
                value
            )
    return found


# --- Tables ---------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def family_table(rows: Sequence[Row]) -> str:
    found = family_ratios(rows)
    sizes = sorted({k for by_size in found.values() for k in by_size})
    lines = []
    for (what, rival), by_size in found.items():
        bound = rival == FLOOR
        every = [value for values in by_size.values() for value in values]
        cells = [spread(by_size[k], bound) if k in by_size else "" for k in sizes]
        name = f"ours / {FLOOR}" if bound else rival
        lines.append([what, name, spread(every, bound), *cells])
    text = "Geometric mean over maps (worst to best"
    text += f"; of {FLOOR} least to most)" if any(FLOOR in key for key in found) else ")"
    text += "; of a rival's two layouts the faster one.\n\n"
    return text + table(["", "rival", "all k", *(f"k = {k}" for k in sizes)], lines)


def rival_table(runs: Sequence[Sequence[Row]]) -> str:
    lines = []
    found = [groups(rows) for rows in runs]
    first_of_all = {group: run[group] for run in found[::-1] for group in run}
    for group, entries in first_of_all.items():
        if OURS not in entries or FAMILY.match(group):
            continue
        rivals = [
            f"{rival} {ranged(ratios(found, group, rival), rival in BOUNDS)}"
            for rival in entries
            if rival != OURS
        ]
        lines.append([group, duration(entries[OURS]), "; ".join(rivals)])
    return table(["", "ours", "rival / ours"], lines)


def setting_table(rows: Sequence[Row]) -> str:
    """Settings of ours against each other; faster than the first is above 1."""
    lines = []
    for group, entries in groups(rows).items():
        first = next(iter(entries.values()))
        for name, row in entries.items():
            faster = median(first) / median(row)
            faster = faster if row["unit"] == "us" else 1 / faster
            factor = 1e-6 if row["unit"] == "us" else 1
            unit = "s" if row["unit"] == "us" else row["unit"]
            low, high = (f"{float(row[end]) * factor:.3g}" for end in ("q1", "q3"))
            lines.append([group, name, f"{median(row) * factor:.3g} {unit}", f"{low} to {high}",
                          row["rounds"], f"{faster:.2f}"])  # fmt: skip
    head = ["", "", "median", "quartiles", "rounds", "speed / the first's"]
    return table(head, lines)


def search_table(rows: Sequence[Row]) -> str:
    """The default search with and without kernels."""
    by = {name: [row for row in rows if row["backend"] == name] for name in ("native", "reference")}
    seconds = {
        name: statistics.median(float(row["processor_seconds"]) for row in found)
        for name, found in by.items()
    }
    lines = []
    for name, found in by.items():
        accuracies = [
            f"{100 * statistics.fmean(float(row[f'test_{kind}_accuracy']) for row in found):.1f} %"
            for kind in ("clean", "robust")
        ]
        lines.append([name, str(len(found)), f"{seconds[name]:.0f} s",
                      figure(seconds[name] / seconds["native"]), *accuracies])  # fmt: skip
    text = table(["kernels", "searches", "processor time, median", "native is faster by",
                  "clean, shared weights", "robust, shared weights"], lines)  # fmt: skip
    if len(by["native"]) < 2:
        return text
    differences = []
    for kind in ("clean", "robust"):
        name = f"test_{kind}_accuracy"
        other = {row["seed"]: float(row[name]) for row in by["reference"]}
        less = [100 * (float(row[name]) - other[row["seed"]]) for row in by["native"]]
        mean, low, high = mean_interval(less)
        shown = "no difference is shown" if low <= 0 <= high else "a difference is shown"
        differences.append(
            f"{kind} {mean:.1f} points (95 % interval {low:.1f} to {high:.1f}; {shown})"
        )
    return (
        f"{text}\nThe two round differently, so they take other paths. Native less reference, seed "
        f"by seed: {', '.join(differences)}.\n"
    )


# --- The page -------------------------------------------------------------------------------------


def joined(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(value for value in values if value))


def provenance(runs: Sequence[Sequence[Row]], about: dict[str, Any]) -> str:
    rows = [row for run in runs for row in run]
    facts = [
        f"commit {joined(row['commit'] for row in rows) or about.get('commit') or 'not kept'}",
        joined(row["date"] for row in rows) or about.get("date", ""),
        f"torch {joined(row['torch'] for row in rows)}" if rows else "",
        f"threads {joined(row['threads'] for row in rows)}" if rows else "",
        f"{len(runs)} runs" if len(runs) > 1 else "",
    ]
    text = "; ".join(fact for fact in facts if fact) + ".\n"
    notes = [about.get("note", "")] + [
        f"Left out: {rival}; {why}." for rival, why in about.get("left_out", {}).items()
    ]
    text += "".join(f"{note}\n" for note in notes if note)
    command = about.get("command")
    return text + (f"\n```\n{command}\n```\n" if command else "")


def section(machine: Machine, results: Path) -> Iterator[str]:
    facts = machine.facts
    yield f"## {facts['name']}\n"
    sets = " ".join(facts.get("instruction_sets", ()))
    python = f"Python {facts['python']}" if "python" in facts else None
    versions = [facts.get("system"), python, facts.get("compiler_of_python"), sets]
    yield f"{facts['note']} {', '.join(filter(None, versions))}. Figures: `{machine.key}.csv`.\n"
    for name, runs in machine.series().items():
        yield f"### {name}\n"
        yield provenance(runs, facts["runs"].get(name, {}))
        if not any(row["rival"] == OURS for row in runs[0]):
            yield setting_table(runs[0])
            continue
        if any(FAMILY.match(row["group"]) for row in runs[0]):
            yield family_table(runs[0])
        if any(not FAMILY.match(row["group"]) for row in runs[0]):
            yield rival_table(runs)
    for file in sorted((results / machine.key).glob("*.csv")):
        yield f"### {file.stem}\n"
        yield provenance([], facts["runs"].get(file.stem, {}))
        rows = read_csv(file)
        yield (
            search_table(rows)
            if "backend" in rows[0]
            else f"Figures: `{machine.key}/{file.name}`.\n"
        )


def page(results: Path = RESULTS) -> str:
    known = machines(results)
    measured = any(row["device"] == "cuda" for machine in known for row in machine.rows)
    parts = [HEAD.format(gpu="" if measured else "Nothing here was measured on a GPU. ")]
    for machine in known:
        parts += section(machine, results)
    return "\n".join(parts)


# --- README ---------------------------------------------------------------------------------------

Cell = Callable[[dict[str, list[list[Row]]]], str]


def between(values: Sequence[float]) -> str:
    low, high = figure(min(values)), figure(max(values))
    return low if low == high else f"{low} to {high}"


def against(run: str, group: str, *rivals: str) -> Cell:
    """Least to greatest ratio over all runs, for each rival."""

    def cell(series: dict[str, list[list[Row]]]) -> str:
        runs = [groups(rows) for rows in series.get(run, [])]
        found = [ratios(runs, group, rival) for rival in rivals]
        cells = [between(values) if values else "-" for values in found]
        return " / ".join(cells) if any(found) else "-"

    return cell


def over_maps(whats: Sequence[str], rival: str, sizes: Sequence[int]) -> Cell:
    """Geometric mean and worst over maps, in each run that has them."""

    def cell(series: dict[str, list[list[Row]]]) -> str:
        cells = []
        for name, runs in series.items():
            if not re.fullmatch(r"conv(-forward)?", name):
                continue
            found = family_ratios(runs[0])
            values = [
                value
                for what in whats
                for k, ratios in found.get((what, rival), {}).items()
                if k in sizes
                for value in ratios
            ]
            if values:
                mean = math.exp(statistics.fmean(map(math.log, values)))
                cells.append(f"{figure(mean)} (worst {figure(min(values))})")
        return ", again ".join(cells) or "-"

    return cell


PGD = "pgd_step_ {} x 3 x 32 x 32 float32"
START = "random_start {} x 3 x 32 x 32 float32"
BANDIT = "bandit_step_ {} float64"
ATTACK = "PGD-10 on a small net, {} x 1 x 8 x 8"
STEP = "FGSM step of {}, 128 x 3 x 32 x 32, C = 16"
EAGER = ("eager", "torch.compile")
README_ROWS: list[tuple[str, str, Cell]] = [
    ("`pgd_step_`, 256 x 3 x 32 x 32", "eager / torch.compile",
     against("ops", PGD.format(256), *EAGER)),
    ("the same, 2048 images", "eager / torch.compile", against("ops", PGD.format(2048), *EAGER)),
    ("`random_start`, 2048 images", "`torch.rand` and scaling",
     against("ops", START.format(2048), "torch.rand and scaling")),
    ("`bandit_step_`, 60 x 9 (float64)", "eager / torch.compile",
     against("ops", BANDIT.format("60 x 9"), *EAGER)),
    ("a whole PGD-10 attack on a small network, 50 images", "torchattacks",
     against("ops", ATTACK.format(50), "torchattacks")),
    ("depthwise convolution, dilation 2, forward, k = 3 and 5", "F.conv2d, its faster layout",
     over_maps(["forward float32"], "F.conv2d", (3, 5))),
    ("the same, forward and backward", "F.conv2d, its faster layout",
     over_maps(["forward and backward float32"], "F.conv2d", (3, 5))),
    ("Gabor convolution, forward and backward", "channel sum, then F.conv2d",
     over_maps(["gabor forward and backward"], "two lines", (3, 5))),
    ("FGSM step of `robust9-light`, 128 x 3 x 32 x 32, C = 16",
     "the authors' code / eager / torch.compile",
     against("search_step", STEP.format("robust9-light"), "authors' style", *EAGER)),
    ("the same of `robust9`", "the authors' code / eager / torch.compile",
     against("search_step", STEP.format("robust9"), "authors' style", *EAGER)),
]  # fmt: skip
SHORT = {
    "cpu-epyc-zen4-2-cores": "AMD EPYC, Zen 4",
    "cpu-xeon-emerald-rapids-2-cores": "Intel Xeon, Emerald Rapids",
    "cpu-epyc-zen3-2-cores": "AMD EPYC, Zen 3 (no AVX-512)",
}


def readme_table(results: Path = RESULTS) -> str:
    series = {machine.key: machine.series() for machine in machines(results)}
    lines = [
        [what, rival, *(cell(series[key]) for key in SHORT)] for what, rival, cell in README_ROWS
    ]
    return "\n".join([README_HEAD, table(["", "rival", *SHORT.values()], lines), README_FOOT])


def with_table(text: str, results: Path = RESULTS) -> str:
    """README.md with the table between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"tables: README.md lacks the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{readme_table(results)}\n{END}{after}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if old")
    options = parser.parse_args(arguments)
    readme = README.read_text(encoding="utf-8")
    wanted = {PAGE: page(), README: with_table(readme)}
    old = [
        file for file, text in wanted.items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    ]  # fmt: skip
    for file in old:
        print(f"{file.relative_to(ROOT)} {'is old' if options.check else 'written'}")
        if not options.check:
            file.write_text(wanted[file], encoding="utf-8")
    return 1 if old and options.check else 0


if __name__ == "__main__":
    raise SystemExit(main())
