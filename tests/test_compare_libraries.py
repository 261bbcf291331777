"""benchmarks/compare_libraries.py: programs of several libraries, and their page."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "compare_libraries.py"


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare_libraries", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(compare, library, **more):
    plain = {
        "job": "pgd",
        "library": library,
        "version": "1.0",
        "lines": "5",
        "round": "1",
        "images": "500",
        "clean": "0.94",
        "robust": "0.6",
        "seconds": "2.0",
        "processor_seconds": "2.0",
        "threads": "1",
        "machine": "2 cores",
        "torch": "2.13",
    }
    assert set(plain) == set(compare.FIELDS)
    return {**plain, **more}


def test_the_page_shows_medians_and_bold_losses(compare):
    rows = [row(compare, "fastbandit", round=str(n), seconds=s) for n, s in enumerate("132", 1)]
    rows.append(row(compare, "foolbox", lines="4", robust="0.61", seconds="1.5"))
    page = compare.page(rows)
    assert "| fastbandit 1.0 | 5 | 94.0 % | 60.0 % | 2.00 (1.00 to 3.00) | 2.00 |" in page
    assert "| foolbox 1.0 | **4** | 94.0 % | 61.0 % | **1.50** (1.50 to 1.50) | 2.00 |" in page
    assert "of 3 interleaved rounds" in page
    assert "AutoAttack or what" not in page  # nothing was measured of it


def test_the_page_is_what_the_results_give(compare):
    if not compare.RESULTS.is_file():
        pytest.skip("no results yet")
    assert compare.PAGE.read_text(encoding="utf-8") == compare.page(compare.read())


def test_every_program_is_one_of_a_job_and_short(compare):
    names = [path.stem for path in compare.programs()]
    assert names[0] == "pgd_fastbandit"
    others = {path.stem for path in compare.PROGRAMS.glob("*.py")} - {"setting"}
    assert set(names) == others
    assert set(compare.NOTES) <= others
    assert all(4 < compare.lines_of(path) < 16 for path in compare.programs())


def test_a_program_runs_in_a_process_of_its_own(compare, tmp_path):
    pytest.importorskip("torchattacks")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--program", str(compare.PROGRAMS / "pgd_torchattacks.py")],
        env={**os.environ, "COMPARISON_WEIGHTS": str(tmp_path / "w.pt"), "COMPARISON_IMAGES": "32"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.3 < found["robust"] <= found["clean"] <= 1
    assert found["seconds"] > 0
