"""The commands one after the other, as a user gives them: from images to a page about a network."""

from __future__ import annotations

import json
import re

import pytest

from fastbandit import evaluate, report, retrain, search
from fastbandit.models import load_model

ONE_THREAD = ["--threads", "1"]


@pytest.mark.slow
def test_search_retrain_evaluate_report(tmp_path, capsys):
    found, trained, page = tmp_path / "search", tmp_path / "network", tmp_path / "page.html"
    small = ["--train-limit", "128", "--test-limit", "64", "--space", "general7-light"]
    small += ["--final.network-epochs", "1", "--final.no-reference"]
    arguments = ["--preset", "smoke", *small, "--init-channels", "2", *ONE_THREAD]
    assert search.main([*arguments, "--out", str(found)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"run folder: {found}"

    # Data, radius and genotype come from the search's folder.
    arguments = [str(found), "--preset", "smoke", "--epochs", "2", "--train-limit", "256"]
    assert retrain.main([*arguments, *ONE_THREAD, "--out", str(trained)]) == 0
    assert str(trained) in capsys.readouterr().out.splitlines()[-1]
    summary = json.loads((trained / "summary.json").read_text())
    genotype = json.loads((found / "genotype.json").read_text())
    assert summary["genotype_hash"] == genotype["hash"]

    arguments = [str(trained), "--preset", "quick", "--limit", "60", "--checks.images", "16"]
    assert evaluate.main([*arguments, *ONE_THREAD]) == 0
    folder = trained / "evaluation-linf-0.2"
    assert str(folder) in capsys.readouterr().out.splitlines()[-1]
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["model"]["genotype_hash"] == genotype["hash"]
    (at_radius,) = result["results"]
    assert at_radius["threat"]["epsilon"] == "0.2"
    assert at_radius["worst_case"]["n"] == at_radius["clean"]["n"] == 60
    assert at_radius["worst_case"]["correct"] <= at_radius["clean"]["correct"]

    assert report.main([str(found), str(trained), "--out", str(page)]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"report: {page}"
    html = page.read_text()
    worst = 100 * at_radius["worst_case"]["accuracy"]
    assert genotype["hash"][:12] in html
    assert f"{worst:.2f} %" in html
    assert not re.search(r"(src|href)=[\"'](?!data:|#)", html)

    # What was evaluated is the network of that genotype, from a file that needs no run.
    assert load_model(trained).genotype.hash == genotype["hash"]
