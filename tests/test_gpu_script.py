"""benchmarks/gpu.sh and its tables: what can be checked without running a part."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from _runs import make_evaluation, make_retraining, make_run

from fastbandit.genotype import Genotype

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True)


def table(*arguments: str | Path) -> str:
    command = [sys.executable, str(BENCHMARKS / "tables.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_script_is_sound():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_benchmark_has_entries_for_the_device(device):
    # pytest fails where -k leaves nothing of a file, and a part of the script with it.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run(
        [*command, "-k", device, "benchmarks"],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
    )
    found = {line.split("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert found == {f"benchmarks/{file.name}" for file in BENCHMARKS.glob("bench_*.py")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected at least one part: build, test, sanitize, rest, kernels"),
        (["kernel"], "got 'kernel'"),
        (["build"], "--out: expected a folder for the raw files, got nothing"),
        (["build", "--out"], "--out: expected a value, got nothing"),
        (["build", "--out", "OUT", "--seconds", "x"], "--seconds: expected a whole number"),
        (["build", "--out", "OUT", "--data", "/no/such"], "expected a folder, there is none"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, arguments, message):
    done = run(*[str(tmp_path) if a == "OUT" else a for a in arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def entry(group: str, rival: str, median: float, **extra):
    return {
        "group": group,
        "stats": {"median": median},
        "extra_info": {"rival": rival, **extra},
    }


def test_table_goes_by_the_time_on_the_device_where_all_have_it(tmp_path):
    file = tmp_path / "a.json"
    entries = [
        entry("a [cuda]", "fastbandit", 9e-6, device_seconds=2e-6, goals={"copy": 0.8}),
        entry("a [cuda]", "copy", 9e-6, device_seconds=1e-6),
        entry("b [cuda]", "fastbandit", 9e-6, device_seconds=2e-6),
        entry("b [cuda]", "copy", 9e-6, device_seconds=None),
    ]
    file.write_text(json.dumps({"benchmarks": entries}))
    lines = [line.split() for line in table("kernels", file).splitlines()]
    assert lines[1] == ["a", "[cuda]", "2.0", "0.50x", "copy", "*", "below", "its", "goal",
                        "against", "copy"]  # fmt: skip
    assert lines[2] == ["b", "[cuda]", "9.0", "1.00x", "copy"]
    assert lines[4][:4] == ["*", "on", "the", "device"]


def test_a_benchmark_whose_time_is_up_writes_what_it_has(tmp_path):
    file = tmp_path / "a.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "one_bandit"]
    done = subprocess.run(
        [*command, "benchmarks/bench_bandit.py", "--benchmark-json", str(file)],
        capture_output=True,
        text=True,
        cwd=BENCHMARKS.parent,
        env={
            **os.environ,
            "FASTBANDIT_BENCH_SMOKE": "1",
            "FASTBANDIT_BENCH_SECONDS": "0",
        },
    )
    assert done.returncode == 2, done.stdout
    assert "0 seconds are over; not measured: benchmarks/bench_bandit.py::" in done.stdout


def test_table_of_kernels(tmp_path):
    file = tmp_path / "a.json"
    entries = [
        entry("op [cuda]", "fastbandit", 2e-6, goals={"eager": 3.0, "torch.compile": 1.0}),
        entry("op [cuda]", "eager", 5e-6),
        entry("op [cuda]", "torch.compile", 4e-6),
        entry("op [cpu]", "fastbandit", 1e-3),
        entry("op [cpu]", "eager", 1e-3),
    ]
    file.write_text(json.dumps({"benchmarks": entries}))
    lines = table("kernels", file).splitlines()
    assert lines[1].split() == ["op", "[cuda]", "2.0", "2.00x", "torch.compile", "below", "its",
                                "goal", "against", "eager"]  # fmt: skip
    assert lines[2].startswith("1 of 1 groups below a goal")
    assert len(lines) == 3


def test_table_of_a_pipeline(tmp_path):
    assert table("pipeline", tmp_path).splitlines() == [
        "search       not finished",
        "retrain      not finished",
        "evaluation   not finished",
    ]
    search = make_run(tmp_path / "search", space_name="general7", rounds=1)
    found = Genotype.load(search / "genotype.json")
    make_retraining(tmp_path / "retrain", found)
    value = json.loads((tmp_path / "retrain" / "summary.json").read_text())
    value["cost"]["images_per_second"] = 640.0
    (tmp_path / "retrain" / "summary.json").write_text(json.dumps(value))
    make_evaluation(tmp_path / "retrain" / "evaluation", found)
    lines = table("pipeline", tmp_path).splitlines()
    assert lines[0].split()[:3] == ["search", "119.0", "s,"]
    assert lines[1].split()[:3] == ["retrain", "88.5", "s,"]
    assert lines[2].split() == ["linf", "8/255", "clean", "91.20", "%", "[89.07,", "93.37]", "n",
                                "1000"]  # fmt: skip
    assert len(lines) == 8
