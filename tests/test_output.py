"""What commands print where standard output is closed, full, without a reader, or ASCII."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys

import pytest
import yaml

from fastbandit.command import guard
from fastbandit.runs.progress import Progress

COMMANDS = ("info", "search", "retrain", "evaluate", "report", "study", "export")
SOME = [("info", "--json"), ("search", "--print-config"), ("study", "--dry-run"), ("report", "-h")]


def run(*arguments: str) -> int | str | None:
    """The status of a command in this process."""
    try:
        return importlib.import_module(f"fastbandit.{arguments[0]}").main(list(arguments[1:]))
    except SystemExit as end:
        return end.code


@pytest.fixture
def without_reader(monkeypatch):
    """Makes standard output (or error) a pipe that nobody reads."""
    streams = []

    def make(name: str) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        streams.append(open(writing, "w", encoding="utf-8"))  # noqa: SIM115
        monkeypatch.setattr(sys, name, streams[-1])

    yield make
    for stream in streams:
        stream.close()  # fails where something is still to be written


@pytest.mark.parametrize(
    "arguments", [*SOME[:-1], *((name, "-h") for name in COMMANDS)], ids=" ".join
)
def test_a_reader_that_goes_away_is_no_failure(without_reader, capfd, arguments):
    without_reader("stdout")
    assert run(*arguments) == 0
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("arguments", SOME, ids=" ".join)
def test_an_output_that_was_closed_is_no_failure(monkeypatch, capsys, arguments):
    monkeypatch.setattr(sys, "stdout", None)
    assert run(*arguments) == 0
    assert sys.stdout is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("arguments", SOME, ids=" ".join)
def test_a_full_disk_is_named(monkeypatch, capsys, arguments):
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    assert run(*arguments) == 1
    full.close()
    assert capsys.readouterr().err.strip() == (
        f"{arguments[0]}: error: standard output: No space left on device"
    )


@pytest.mark.parametrize("arguments", SOME, ids=" ".join)
def test_ascii_is_enough(monkeypatch, arguments):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert run(*arguments) == 0
    assert raw.getvalue().decode("ascii").strip()
    assert stream.errors == "strict"  # as it was


def test_what_ascii_lacks_is_escaped(tmp_path, monkeypatch):
    """Names of files, in text, YAML and JSON; the latter two say the same."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert run("search", "--print-config", "--data", "bücher") == 0
    assert yaml.safe_load(raw.getvalue())["data"] == "bücher"
    raw.truncate(raw.seek(0))
    from _runs import make_run

    folder = make_run(tmp_path / "lœuf-\udcff", space_name="general7", rounds=1)
    assert run("report", str(folder)) == 0
    assert b"l\\u0153uf-\\udcff" in raw.getvalue()
    raw.truncate(raw.seek(0))
    assert run("report", str(folder), "--json") == 0
    assert json.loads(raw.getvalue())["report"] == str(folder / "report.html")


def test_work_goes_on_without_a_reader(without_reader, tmp_path):
    """Progress is shown on standard error, the result on standard output: the files are whole."""
    without_reader("stdout")
    without_reader("stderr")
    few = ["--simulated.parts", "policies", "--simulated.policies", "printed", "random"]
    few += ["--simulated.seeds", "2", "--simulated.rounds", "1"]
    assert run("study", *few, "--out", str(tmp_path / "study")) == 0
    assert (tmp_path / "study" / "summary.json").is_file()


def test_live_progress_goes_on_without_a_reader(without_reader):
    without_reader("stderr")

    def work() -> int:
        progress = Progress()
        assert progress.console is not None
        for _ in range(3):
            progress.note("half way")
        progress.console._force_terminal = True
        with progress.console.status("at it"):
            pass
        return 0

    assert guard("work", work) == 0


def test_errors_do_not_go_to_standard_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert run("search", "--epochs", "x") == 2
    assert run("report", "no such folder") == 1
    assert run("search", "--preset", "none") == 1
    assert capsys.readouterr().out == ""


def test_an_error_elsewhere_is_still_told(capsys):
    def broken() -> int:
        raise BrokenPipeError(32, "Broken pipe")  # of a socket, say

    assert guard("work", broken) == 1
    assert "Broken pipe" in capsys.readouterr().err


def shell(line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", line, "sh", sys.executable], capture_output=True, text=True, timeout=300
    )


def test_the_process_ends_quietly_too():
    """The interpreter writes what is left when it ends, which is not to fail either."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "fastbandit.info"],
        stdout=writing, stderr=subprocess.PIPE, text=True, timeout=300,
    )  # fmt: skip
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    done = shell('"$1" -m fastbandit.info >&- 2>&-')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_files_do_not_take_the_place_of_closed_streams():
    """What torch prints would go into them."""
    code = """
import os, subprocess, sys
from fastbandit import _start
_start.begin()
assert open(os.devnull).fileno() > 2
assert os.write(1, b"said") == os.write(2, b"said") == 4
sys.exit(subprocess.call(["sh", "-c", "echo said && echo said >&2"]))  # children have them too
"""
    assert shell(f"\"$1\" -c '{code}' >&- 2>&-").returncode == 0
