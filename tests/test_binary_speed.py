"""The tables of speed of 1-bit convolutions: of this CPU, and of filed runs."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from fastbandit import _speed, info, ops

ROOT = Path(__file__).parents[1]


@pytest.fixture
def binary_table():
    path = str(ROOT / "benchmarks")
    sys.path.insert(0, path)
    try:
        yield importlib.import_module("binary_table")
    finally:
        sys.path.remove(path)
        for name in ("binary_table", "tables", "to_csv"):
            sys.modules.pop(name, None)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(_speed, "SHAPES", ((1, 3, 4, 3, 1), (2, 5, 4, 3, 5)))
    monkeypatch.setattr(_speed, "_SAMPLE", 1e-6)


def test_the_command_measures_only_when_asked(few, monkeypatch, capsys):
    assert info.main(["--binary", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ops"]["binary_conv2d"]["cpu"] in ("native", "reference")
    first, second = found["binary"]
    assert (first["shape"], first["kernel_size"], first["groups"]) == ([1, 3, 4, 4], 3, 1)
    assert second["groups"] == 5
    for row in found["binary"]:
        assert row["ratio"] == pytest.approx(row["float32_us"] / row["binary_us"])
        assert row["binary_us"] > 0
    assert info.main(["--binary"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "1 x 3 x 4 x 4       3 x 3 dense" in lines[-2]
    assert "2 x 5 x 4 x 4   3 x 3 depthwise" in lines[-1]
    monkeypatch.setattr(_speed, "measure", lambda: pytest.fail("measured"))
    assert info.main([]) == 0
    assert info.main(["--json"]) == 0
    assert "binary" not in json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))


def test_both_forms_of_a_layer_compute_what_is_said():
    for n, c, size, k, groups in ((2, 3, 5, 3, 1), (1, 70, 4, 3, 70)):
        calls = _speed._calls(n, c, size, k, groups)
        assert calls["float32"]().shape == (n, c, size, size)
        if groups == 1:
            assert calls["1-bit"]().shape == (n, c, size, size)
        else:
            assert ops.unpack_sign(calls["1-bit"](), c).shape == (n, c, size, size)


def test_the_settings_of_torch_stay(few):
    threads = torch.get_num_threads()
    _speed.measure(rounds=1)
    assert torch.get_num_threads() == threads


def filed(folder, binary_table, times, kept=()):
    """Files as to_csv.py leaves them; ``kept`` are times of a run kept to AVX2."""
    to_csv = sys.modules["to_csv"]
    rows = [
        {
            **dict.fromkeys(to_csv.COLUMNS, ""),
            "run": run, "group": group, "rival": rival, "device": "cpu", "unit": "us",
            "median": str(time), "commit": "abc", "torch": "2.13",
        }
        for run, of_run in (("binary", times), ("binary-avx2", kept))
        for group, rival, time in of_run
    ]  # fmt: skip
    (folder / "one.csv").write_text(to_csv.csv_text(rows, to_csv.COLUMNS))
    runs = {name: {"command": "x"} for name in ("binary", "binary-avx2")}
    facts = {"name": "A machine", "runs": runs}
    (folder / "one.json").write_text(json.dumps(facts))


def test_the_page_is_made_from_filed_runs(binary_table, tmp_path):
    page = f"before\n{binary_table.BEGIN}\nold\n{binary_table.END}\nafter"
    assert "No run is filed yet" in binary_table.text_of(page, tmp_path)
    shape = "signs, 3 x 3, 1 x 96 x 14 x 14"
    filed(
        tmp_path, binary_table,
        [(shape, "fastbandit", 2.0), (shape, "F.conv2d", 31.0), (shape, "int8", 1.0),
         ("packing signs, 1", "fastbandit", 1.0), ("packing signs, 1", "copy", 1.0)],
        [(shape, "fastbandit", 4.0), (shape, "F.conv2d", 10.0)],
    )  # fmt: skip
    text = binary_table.text_of(page, tmp_path)
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    assert "old" not in text
    # A loss is bold; 96 channels take two words, so 24 times less.
    assert f"| {shape} | 2 us | 15.5 |  | **0.50** |  |  |  | 24x |" in text
    assert "A machine, torch 2.13, commit abc:" in text
    kept = text.partition("A machine kept to AVX2, rivals too, torch 2.13, commit abc:")[2]
    assert f"| {shape} | 4 us | 2.5 |" in kept
    assert "packing" not in text.partition("commit abc")[2]
    assert binary_table.text_of(text, tmp_path) == text
    with pytest.raises(SystemExit, match="lacks the marks"):
        binary_table.text_of("no marks", tmp_path)


def test_the_page_is_what_the_files_give(binary_table):
    assert binary_table.main(["--check"]) == 0
