"""benchmarks/to_csv.py and tables.py: results as rows, and the pages that are made from them."""

from __future__ import annotations

import csv
import importlib
import io
import json
import re
import runpy
import shutil
import statistics
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def modules():
    """Both files, which import each other by name, and nothing of them left behind."""
    path = str(ROOT / "benchmarks")
    sys.path.insert(0, path)
    try:
        yield importlib.import_module("tables"), importlib.import_module("to_csv")
    finally:
        sys.path.remove(path)
        for name in ("tables", "to_csv"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def tables(modules):
    return modules[0]


@pytest.fixture(scope="module")
def to_csv(modules):
    return modules[1]


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as text:
        return list(csv.DictReader(text))


# --- The pages ------------------------------------------------------------------------------------


def test_the_pages_are_what_the_files_give(tables):
    assert tables.PAGE.read_text(encoding="utf-8") == tables.page(), "run benchmarks/tables.py"
    readme = tables.README.read_text(encoding="utf-8")
    assert tables.with_table(readme) == readme, "run benchmarks/tables.py"
    table = readme.partition(tables.BEGIN)[2].partition(tables.END)[0]
    lines = [line for line in table.splitlines() if line.startswith("|")]
    assert len(lines) <= 2 + 10
    assert "**" in table, "losses stay in"


def test_each_ratio_of_the_page_is_that_of_two_medians(tables):
    """The first ratio of every rival, computed here anew from the CSV files."""
    page, checked = tables.PAGE.read_text(encoding="utf-8"), 0
    for part in page.split("\n## ")[1:]:
        rows = rows_of(RESULTS / re.search(r"Figures: `(.+?\.csv)`", part)[1])
        median = {
            (row["run"], row["group"], row["rival"]): float(row["median"])
            for row in rows if row["median"]
        }  # fmt: skip
        for section in part.split("\n### ")[1:]:
            run = section.split("\n")[0]
            head = "|  | ours | rival / ours |\n| --- | --- | --- |\n"
            for line in section.partition(head)[2].splitlines():
                cells = line.strip("| ").split(" | ")
                if len(cells) != 3:
                    break
                ours = median[run, cells[0], "fastbandit"]
                for text in cells[2].split("; "):
                    rival, said = re.match(r"(.+?) (\*{0,2}[\d.]+\*{0,2})(?: \(|$)", text).groups()
                    ratio = median[run, cells[0], rival] / ours
                    assert float(said.strip("*")) == pytest.approx(ratio, rel=0.05, abs=0.006)
                    assert said.startswith("**") == (ratio < 1 and rival != "copy"), line
                    checked += 1
    assert checked > 150


def test_geometric_means_over_maps(tables):
    def row(group, rival, median, extra=""):
        return {"group": group, "rival": rival, "median": str(median), "extra": extra}

    rows = [
        row("forward C 16 H 32 k 3", "fastbandit", 2, "floor_us=1.6"),
        row("forward C 16 H 32 k 3", "F.conv2d channels-last", 1),
        row("forward C 16 H 32 k 3", "F.conv2d contiguous", 7),
        row("forward C 32 H 32 k 3", "fastbandit", 1, "floor_us=0.5"),
        row("forward C 32 H 32 k 3", "F.conv2d channels-last", 9),
        row("forward C 32 H 32 k 3", "F.conv2d contiguous", 8),
    ]
    found = tables.family_ratios(rows)
    assert found[("forward", "F.conv2d")] == {3: [0.5, 8.0]}
    assert found[("forward", tables.FLOOR)] == {3: [1.25, 2.0]}
    assert "| forward | F.conv2d | 2.0 (**0.50** to 8.0) |" in tables.family_table(rows)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.996, "**1.00**"), (0.52, "**0.52**"), (1.0, "1.00"), (1.28, "1.3"), (100.9, "101")],
)
def test_a_loss_is_bold(tables, ratio, said):
    assert tables.figure(ratio) == said


def test_a_range_is_over_the_runs_of_a_command(tables):
    runs = [
        [{"group": "g", "rival": rival, "median": str(median), "unit": "us", "extra": ""}
         for rival, median in (("fastbandit", 2.0), ("eager", eager))]
        for eager in (4.0, 1.0, 6.0)
    ]  # fmt: skip
    assert tables.rival_table(runs).endswith("| g | 2 us | eager 2.0 (**0.50** to 3.0) |\n")


def test_a_changed_figure_changes_the_page(tables, tmp_path):
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    assert tables.page(folder) == tables.page()
    file = folder / "cpu-epyc-zen4-2-cores.csv"
    rows = rows_of(file)
    place = next(place for place, row in enumerate(rows) if row["rival"] == "eager")
    rows[place]["median"] = str(5 * float(rows[place]["median"]))
    with file.open("w", encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    assert tables.page(folder) != tables.page()
    assert tables.readme_table(folder) != tables.readme_table()


def test_on_a_gpu_launches_are_left_out_where_all_were_timed_without(tables):
    def rows(*extras):
        return [
            {"group": "g", "rival": rival, "median": median, "extra": extra}
            for rival, median, extra in zip(
                ("fastbandit", "eager"), ("10", "11"), extras, strict=True
            )
        ]

    timed = rows("bytes=8;device_us=2", "device_us=6")
    assert tables.ratios([tables.groups(timed)], "g", "eager") == [3.0]
    partly = tables.groups(rows("device_us=2", ""))
    assert tables.ratios([partly], "g", "eager") == [1.1]


# --- What is said elsewhere -----------------------------------------------------------------------


def pages() -> str:
    return "\n".join(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("docs/*.md")))


def test_milliseconds_of_blocks_in_the_documentation():
    rows = rows_of(RESULTS / "cpu-epyc-zen4-2-cores.csv")
    median = {(row["group"], row["rival"]): row["median"] for row in rows if row["run"] == "block"}
    lines = re.findall(r"^\| (dil_conv_3x3|four maps) \| (\d+), (\d+) \| (.+) \| (.+) \|$",
                       pages(), re.MULTILINE)  # fmt: skip
    assert len(lines) == 14
    for kind, c, h, *cells in lines:
        for step, cell in zip(("training", "attack"), cells, strict=True):
            group = f"{kind}, {step}, N 64 C {c} H {h} float32"
            said = [float(value) for value in cell.split(" / ")]
            for rival, value in zip(("fastbandit", "single ops", "torch"), said, strict=True):
                assert value == pytest.approx(float(median[group, rival]) / 1e3, abs=0.0051)


def test_images_per_second_of_threads_that_wait_in_the_documentation():
    rows = rows_of(RESULTS / "cpu-epyc-zen3-2-cores.csv")
    waiting = [row for row in rows if row["run"].startswith("waiting")]
    assert len(waiting) == 6
    text = pages()
    for row in waiting:
        low, middle, high = (f"{float(row[name]):.0f}" for name in ("q1", "median", "q3"))
        assert f"| {middle} ({low} to {high}) |" in text


def test_simulated_searches_of_1_bit_networks_in_the_documentation():
    found = defaultdict(list)
    for row in rows_of(RESULTS / "child-parent" / "simulation.csv"):
        found[row["rule"]].append(float(row["survivors"]))
    assert {len(searches) for searches in found.values()} == {150}
    text = (ROOT / "docs" / "binary.md").read_text(encoding="utf-8")
    lines = re.findall(
        r"^\| ((?:printed|penalty|carry), beta .+) \| ([\d./ ]+) \|$", text, re.MULTILINE
    )
    said = {}
    for rules, values in lines:
        kind, betas, *rest = re.fullmatch(r"(\w+), beta ([\d./ ]+)(, T = 1)?", rules).groups("")
        for beta, value in zip(betas.split(" / "), values.split(" / "), strict=True):
            said[f"{kind}, beta {beta}{rest[0]}"] = float(value)
    means = {rule: statistics.mean(searches) for rule, searches in found.items()}
    assert said == pytest.approx(means, abs=0.0051)


def test_files_that_are_named_exist():
    text = pages() + (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"benchmarks/results/([\w./-]+\.\w+)", text)) - {"NAME.csv"}
    assert named
    assert all((RESULTS / name).is_file() for name in named), named


# --- Filing ---------------------------------------------------------------------------------------


def test_what_is_filed_is_whole(to_csv):
    for file in RESULTS.glob("*.csv"):
        rows = rows_of(file)
        assert tuple(rows[0]) == to_csv.COLUMNS
        keys = [tuple(row[name] for name in to_csv.KEY) for row in rows]
        assert len(set(keys)) == len(keys)
        about = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        assert about["name"]
        assert {row["run"] for row in rows} <= set(about["runs"])


def entry(rival: str, seconds: float, group: str = "op 2 x 2 [cpu]") -> dict:
    facts = {"rival": rival, "threads": 2, "torch": "2.13.0+cpu", "commit": "abc",
             "shape": [2, 2], "dtype": "torch.float32", "bytes": 32}  # fmt: skip
    stats = {"rounds": 9, "min": seconds / 2, "q1": seconds, "median": seconds, "q3": 2 * seconds}
    return {"group": group, "extra_info": facts, "stats": stats}


def benchmark(tmp_path: Path, *entries: dict) -> Path:
    cpu = {"brand_raw": "A CPU", "count": 2, "flags": ["avx2", "zzz"]}
    found = {"machine_info": {"python_version": "3.11.7", "cpu": cpu}, "benchmarks": entries,
             "datetime": "2026-11-29T01:02:03+00:00"}  # fmt: skip
    file = tmp_path / "ops.json"
    file.write_text(json.dumps(found))
    return file


def test_a_result_replaces_that_of_the_same_key(to_csv, tmp_path):
    where = ["--machine", "m", "--results", str(tmp_path / "results")]
    file = benchmark(tmp_path, entry("fastbandit", 1e-5), entry("eager", 3e-5))
    assert to_csv.main([*where, "--command", "pytest x", str(file)]) == 0
    file = benchmark(tmp_path, entry("eager", 0.123456789))
    assert to_csv.main([*where, "--note", "Again.", str(file)]) == 0
    assert to_csv.main([*where, "--run", "other", str(file)]) == 0
    rows = rows_of(tmp_path / "results" / "m.csv")
    assert [(row["run"], row["rival"], row["median"]) for row in rows] == [
        ("ops", "fastbandit", "10"), ("ops", "eager", "123457"), ("other", "eager", "123457"),
    ]  # fmt: skip
    assert rows[0] == {
        "run": "ops", "group": "op 2 x 2", "rival": "fastbandit", "shape": "2x2",
        "dtype": "float32", "device": "cpu", "threads": "2", "rounds": "9", "min": "5",
        "q1": "10", "median": "10", "q3": "20", "unit": "us", "commit": "abc",
        "torch": "2.13.0+cpu", "date": "2026-11-29", "extra": "bytes=32",
    }  # fmt: skip
    about = json.loads((tmp_path / "results" / "m.json").read_text())
    assert about["runs"] == {"ops": {"command": "pytest x", "note": "Again."}, "other": {}}
    assert about["cpu"] == "A CPU"
    assert about["instruction_sets"] == ["avx2"]


def test_what_is_measured_twice_in_one_file_is_refused(to_csv, tmp_path):
    file = benchmark(tmp_path, entry("eager", 1.0), entry("eager", 2.0))
    with pytest.raises(SystemExit, match="measured twice"):
        to_csv.add(file, "m", "ops", {}, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_results_of_our_own_programs(to_csv, tmp_path):
    results, file = tmp_path / "results", tmp_path / "x.json"
    file.write_text(json.dumps({"cpus": 2, "busy": 2, "images_per_second": {
        "passive": [1.0, 2.0, 3.0, 4.0, 5.0]}}))  # fmt: skip
    to_csv.add(file, "m", "waiting", {}, results, {"commit": "abc"})
    file.write_text(json.dumps({"space": "s", "batch": 8, "clock": "wall clock", "torch": "2",
                                "seconds": {"1": [1.0], "2": [0.5]}, "ratio": 2.0,
                                "images_per_second": {"1": 8.0, "2": 16.0}}))  # fmt: skip
    to_csv.add(file, "m", "ranks", {}, results)
    waiting, one, two = rows_of(results / "m.csv")
    assert [waiting[name] for name in ("min", "q1", "median", "q3")] == ["1", "2", "3", "4"]
    assert (waiting["unit"], waiting["commit"]) == ("images/s", "abc")
    assert (one["median"], two["median"], two["rival"]) == ("1000000", "500000", "2 ranks")
    file.write_text(json.dumps({"a": [{"b": 1.5}, {"b": [1, 2]}], "c": "text", "d": None}))
    to_csv.add(file, "m", "else", {}, results)
    assert [tuple(row.values()) for row in rows_of(results / "m" / "else.csv")] == [
        ("a.0.b", "1.5"), ("a.1.b", "[1, 2]"), ("c", "text"), ("d", "null"),
    ]  # fmt: skip


CONVOLUTION = "depthwise 1x2x3x3 input float32 kernel 3 stride 1 dilation 2"


def test_an_archive_of_the_program_for_a_gpu(to_csv, tmp_path):
    head = {"device": "GPU", "torch": "2.12", "commit": "abc", "check": False}
    lines = {
        "steps": [{"line": "x", "batch": 128, "rival": f"{rival}, bfloat16",
                   "samples": [1.0, 3.0, 2.0], "peak_bytes": 7}
                  for rival in ("fastbandit", "eager, in a graph")],
        "ceilings": [{"line": "x", "bytes": 8, "samples": [1e-6]},
                     {"line": "x", "what": "TF32", "size": 4, "samples": [1e-6]}],
        "compiled": [{"line": "pgd compiled: 3 us", "samples": [3e-6]},
                     {"line": "x", "batch": 8, "rival": "torch.compile, default",
                      "samples": [4e-6]}],
        "ops": [{"line": "x", "op": "pgd", "ours": [1e-6], "eager": [3e-6]}],
        "depthwise": [{"what": "input", "route": route, "shape": [1, 2, 3, 3], "kernel": 3,
                       "stride": 1, "dilation": 2, "dtype": "float32", "bytes": 9,
                       "samples": [2e-6]} for route in ("ours", "library")],
        "info": [{"line": "loaded"}],
    }  # fmt: skip
    file = tmp_path / "part2.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, found in lines.items():
            text = "\n".join(map(json.dumps, [head, *found])) + '\n{"line": "half'
            member = tarfile.TarInfo(f"part2/{name}.jsonl")
            member.size, member.mtime = len(text), 1_796_000_000
            archive.addfile(member, io.BytesIO(text.encode()))
    to_csv.add(file, "gpu", "part2", {"command": "gpu.py"}, tmp_path / "results")
    rows = rows_of(tmp_path / "results" / "gpu.csv")
    assert [(row["run"], row["group"], row["rival"], row["median"]) for row in rows] == [
        ("gpu-steps", "steps bfloat16 batch 128", "fastbandit", "2000000"),
        ("gpu-steps", "steps bfloat16 batch 128", "eager, in a graph", "2000000"),
        ("gpu-ceilings", "ceilings bytes 8", "torch", "1"),
        ("gpu-ceilings", "ceilings TF32 size 4", "torch", "1"),
        ("gpu-compiled", "compiled pgd compiled", "torch.compile", "3"),
        ("gpu-compiled", "compiled batch 8", "torch.compile, default", "4"),
        ("gpu-ops", "pgd", "fastbandit", "1"),
        ("gpu-ops", "pgd", "eager", "3"),
        ("gpu-depthwise", CONVOLUTION, "fastbandit", "2"),
        ("gpu-depthwise", CONVOLUTION, "library", "2"),
    ]  # fmt: skip
    assert {(row["device"], row["commit"], row["date"][:4]) for row in rows} == {
        ("cuda", "abc", "2026")
    }
    assert rows[0]["extra"] == "peak_bytes=7"


def test_the_page_has_the_figures_of_the_three_operations():
    """Of the stored rows; no network is trained for them."""
    module = runpy.run_path(str(ROOT / "benchmarks" / "three_operations.py"))
    file = RESULTS / "cpu-epyc-zen3-2-cores" / "three-operations.csv"
    with file.open(newline="", encoding="utf-8") as opened:
        rule, matched, paired, unpaired = module["figures"](csv.DictReader(opened))
    assert rule.split()[1:4] == ["82.81", "+-", "0.67"]
    assert matched.split()[1:4] == ["83.74", "+-", "0.73"]
    assert paired == "difference -0.93 [-1.50, -0.36] paired, Wilcoxon p = 0.0045"
    assert unpaired == "difference -0.93 [-1.44, -0.42] unpaired, Mann-Whitney p = 0.0024"
    text = " ".join((ROOT / "docs" / "study.md").read_text(encoding="utf-8").split())
    assert "95 % 0.36 to 1.50, Wilcoxon's signed-rank p = 0.0045" in text
    assert "0.42 to 1.44, Mann-Whitney p = 0.0024" in text
