"""The command of a study on a table of true accuracies; the tables are invented ones."""

from __future__ import annotations

import contextlib
import csv
import io
import re

import pytest
import torch
from _pages import charts_can_be_scrolled
from _tables import write_table

from fastbandit._files import read_sealed
from fastbandit.config import ConfigError, merge
from fastbandit.study import PRESETS, StudyConfig, main, study
from fastbandit.study.tabular.config import parse_budget
from fastbandit.study.tabular.run import COLUMNS
from fastbandit.study.tabular.table import TableError, read_table

PARAMETERS = torch.tensor([0, 0, 1, 9, 0])


def test_budgets():
    assert parse_budget("none") == ("parameters", None)
    assert parse_budget("convolutions=1:2") == ("convolutions", (1, 2))
    for text in ("convolutions=2:1", "size=1:2", "parameters=1", "parameters=a:b"):
        with pytest.raises(ConfigError, match=re.escape(f"got {text!r}")):
            parse_budget(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": ["best"]}, "tabular.policies: 'best': policy: expected one of"),
        ({"policies": ["printed,space=general7"]}, "space is for real data"),
        ({"searches": ["best"]}, "tabular.searches: 'best': expected one of"),
        ({"rhos": [0.0]}, "tabular.rhos: expected a correlation in (0, 1], got 0.0"),
        ({"cells": [33]}, "tabular.cells: expected numbers in 1..32, got 33"),
        ({"budgets": []}, "tabular.budgets: expected one or more, got none"),
        ({"parameters": [0, -1]}, "tabular.parameters: expected a number >= 0 for each operation"),
        ({"file": "x", "recommended": "ridge,rate=1"}, "tabular.recommended: expected an entry of"),
        ({"seeds": 1}, "tabular.seeds: expected 2 or more, got 1"),
        ({"short_cost": 0.0}, "tabular.short_cost: expected a share between 0 and 1, got 0"),
        ({"short_rho": 1.5}, "tabular.short_rho: expected a correlation in (0, 1], got 1.5"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        merge(StudyConfig(), {"tabular": changes}, "test")


def smoke(file, **changes):
    config = merge(StudyConfig(), PRESETS["smoke-tabular"], "smoke")
    tabular = {"file": str(file), "column": "robust", **changes}
    return merge(config, {"threads": 1, "tabular": tabular}, "test")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The preset, by the command."""
    folder = tmp_path_factory.mktemp("study")
    file = write_table(folder / "t.npz")
    given = ["--preset", "smoke-tabular", "--tabular.file", str(file), "--threads", "1"]
    given += ["--tabular.column", "robust", "--out", str(folder / "run")]
    with contextlib.redirect_stdout(io.StringIO()) as planned:
        assert main(["--dry-run", *given]) == 0
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert main(given) == 0
    return file, folder / "run", planned.getvalue(), shown.getvalue()


def test_the_command(finished):
    _, path, planned, shown = finished
    assert re.search(r"tabular rows +24\n", planned)
    assert "cells 2, budget convolutions=0:1: random" in shown
    found = read_sealed(path / "study.json")["tabular"]
    with open(path / "tabular.csv", newline="") as text:
        lines = list(csv.DictReader(text))
    assert tuple(lines[0]) == COLUMNS
    assert [line["entry"] for line in lines if line["kind"] != "baseline"] == [
        row["entry"] for one in found["tables"] for row in one["rows"]
    ]
    page = (path / "study.html").read_text()
    assert charts_can_be_scrolled(page)
    assert '<section id="tabular">' in page
    assert page.count("2 cells side by side, budget convolutions=0:1") >= 2


def test_figures_of_rows(finished, monkeypatch):
    """From what the pieces say; and what is stored is not made again."""
    file, path, *_ = finished
    found = read_sealed(path / "study.json")["tabular"]
    assert len(found["tables"]) == 4
    pieces = [read_sealed(one) for one in (path / "pieces").iterdir()]
    made = {
        (p["key"]["cells"], p["key"]["budget"], p["key"]["entry"]): p["result"]["accuracy"]
        for p in pieces
    }
    table = read_table(file, "robust")
    for one in found["tables"]:
        place = one["cells"], one["budget"]
        for row in one["rows"]:
            values, others = (
                made[(*place, row["entry"])],
                made[(*place, f"best of {row['best_of']}")],
            )
            assert row["n"] == len(values) == 8
            assert row["mean"] == pytest.approx(sum(values) / 8)
            assert row["gain"] == pytest.approx(sum(values) / 8 - one["random"]["mean"])
            assert row["against_best_of"] == pytest.approx((sum(values) - sum(others)) / 8)
            assert row["best_of"] == round(row["cost"] / 0.125)
            assert one["best"]["mean"] >= max(values) - 1e-6
        # The mean of all networks, and the largest, counted out.
        inside = table.connected(0)
        if place == (1, "convolutions=0:1"):
            inside &= (table.cells == 3).sum(1) <= 1
        if one["budget"] == "none" or one["cells"] == 1:
            mean = table.accuracy[inside].mean().item()
            assert one["random"]["mean"] == pytest.approx(mean)
            assert one["cells_within"] == int(inside.sum())
            both = torch.stack([PARAMETERS[table.cells].sum(1).double(), table.accuracy])
            known = torch.corrcoef(both[:, inside])[0, 1].item() ** 2
            assert one["size_explains"] == pytest.approx(known)
        operations = [1, 2, 3, 4] if one["budget"] == "none" else [1, 2, 4]
        assert [two["operation"] for two in one["one_operation"]] == operations
    assert one["rows"][-1]["cost"] == 6 * 0.125
    assert found["tables"][0]["rows"][1]["cost"] == 1.0

    def never(*arguments, **keywords):
        raise AssertionError("this is stored")

    (path / "summary.json").unlink()
    monkeypatch.setattr("fastbandit.study.tabular.run.search", never)
    monkeypatch.setattr("fastbandit.study.tabular.run.run_search", never)
    monkeypatch.setattr("fastbandit.study.tabular.run.best_of", never)
    assert study(smoke(file), path)[1]["tabular"] == found


def test_another_table_of_the_same_name_is_computed_anew(tmp_path):
    file = write_table(tmp_path / "t.npz")
    small = {"cells": [1], "budgets": ["none"], "policies": []}
    path, result = study(smoke(file, **small), tmp_path / "run")
    (path / "summary.json").unlink()
    write_table(file, seed=1)
    again = study(smoke(file, **small), path)[1]
    assert again["tabular"]["table"]["digest"] != result["tabular"]["table"]["digest"]
    first, second = (one["tabular"]["tables"][0]["rows"][0]["mean"] for one in (result, again))
    assert first != second


def test_tables_that_do_not_fit_the_settings(tmp_path):
    file = write_table(tmp_path / "t.npz", operations=3)
    with pytest.raises(
        TableError, match=r"expected as many operations as tabular\.parameters has, 5"
    ):
        study(smoke(file), tmp_path / "run")
    file = write_table(tmp_path / "t.npz")
    with pytest.raises(
        ConfigError, match=r"tabular\.budgets: convolutions=4:9: no network of 1 cell"
    ):
        study(smoke(file, budgets=["convolutions=4:9"]), tmp_path / "other")


def test_other_studies_say_nothing_of_tables(tmp_path):
    few = {"parts": ["policies"], "policies": ["random", "printed"], "seeds": 2, "rounds": 1}
    small = {"simulated": {**few, "world": {"rows": 2, "arms": 2}}}
    path, result = study(merge(StudyConfig(), small, "test"), tmp_path / "run")
    assert "tabular" not in result
    assert not (path / "tabular.csv").exists()
    assert "True accuracies" not in (path / "study.html").read_text()
