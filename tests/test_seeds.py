"""``--seeds``: several runs of one command, and the section of the report about them."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest
import torch
from _tiny import TINY, small_space
from test_callbacks import small

from fastbandit.command_training import TrainingOptions
from fastbandit.config import ConfigError, merge, to_plain
from fastbandit.report import write_report
from fastbandit.retrain import __main__ as retrain_command
from fastbandit.retrain import retrain
from fastbandit.runs import processes
from fastbandit.search import __main__ as search_command


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The folder of a retraining with three seeds."""
    folder = tmp_path_factory.mktemp("seeds")
    (folder / "small.json").write_text(json.dumps(to_plain(small(2))))
    assert retrain_command.main(flags(folder, "--seeds", "0-1,5")) == 0
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    return ["--config", str(folder / "small.json"), "--out", str(folder / "runs"), *more]


def test_every_seed_has_a_run_and_all_a_mean(three, capsys):
    assert retrain_command.main(flags(three, "--seeds", "0-1,5", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["seed"] for one in found["seeds"]] == [0, 1, 5]
    robust = []
    for one in found["seeds"]:
        path = three / "runs" / f"seed-{one['seed']}"
        assert one["run"] == str(path)
        stored = json.loads((path / "summary.json").read_text())
        robust.append(stored["test"]["robust_accuracy"])
        assert one["test"] == stored["test"]
    assert found["mean"]["robust"] == pytest.approx(statistics.fmean(robust))
    assert found["sd"]["robust"] == pytest.approx(statistics.stdev(robust))
    # Again: all is done, and one more seed runs; as text.
    assert retrain_command.main(flags(three, "--seeds", "0,1,5")) == 0
    out, err = capsys.readouterr()
    assert err.count("all is done") == 3
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows[:5]] == ["seed", "0", "1", "5", "mean"]
    assert float(rows[4][3]) == pytest.approx(100 * statistics.fmean(robust), abs=0.006)
    assert float(rows[5][3]) == pytest.approx(100 * statistics.stdev(robust), abs=0.006)


def test_the_report_has_them_all(three, tmp_path):
    folders = sorted((three / "runs").iterdir())
    page = write_report(folders, out=tmp_path / "page.html").read_text()
    section = page.partition('id="seeds"')[2].partition("</section>")[0]
    assert "3 retrainings that differ in their seed" in section
    robust = [
        json.loads((one / "summary.json").read_text())["test"]["robust_accuracy"] for one in folders
    ]
    for value in robust:
        assert f"{100 * value:.2f} %" in section
    mean, sd = 100 * statistics.fmean(robust), 100 * statistics.stdev(robust)
    assert f"{mean:.2f} ± {sd:.2f} %" in section
    # Of one seed, or of two networks, there is no such section.
    page = write_report(folders[:1], out=tmp_path / "one.html").read_text()
    assert 'id="seeds"' not in page
    config = merge(small(2), {"seed": 9, "genotype": "ABANDIT_CIFAR_1"}, "other")
    other, _ = retrain(config, tmp_path / "other")
    page = write_report([folders[0], other], out=tmp_path / "two.html").read_text()
    assert 'id="seeds"' not in page


def test_a_search_counts_the_network_trained_from_scratch(tmp_path, monkeypatch, capsys):
    small_space(monkeypatch)
    monkeypatch.chdir(tmp_path)
    config = {**TINY, "final": {**TINY["final"], "network_epochs": 1, "random_networks": 0}}
    config["final"]["reference"] = False
    Path("tiny.json").write_text(json.dumps(config))
    assert search_command.main(["--config", "tiny.json", "--seeds", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (network,) = found["seeds"][0]["networks"]
    assert found["mean"]["clean"] == network["clean_accuracy"]
    assert found["sd"] == {"clean": None, "robust": None}


def test_one_on_each_gpu(three, monkeypatch, capsys):
    """With GPUs that are none: the calls go to as many processes, and come back in any order."""
    seen = []

    def run_calls(calls, number, done):
        seen.append(number)
        for position in reversed(range(len(calls))):
            done(position, calls[position].make())

    monkeypatch.setattr("fastbandit.command_training.run_calls", run_calls)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    command = retrain_command._COMMAND
    monkeypatch.setattr(
        type(command), "resolved", lambda self, request: type("C", (), {"device": "cuda"})
    )
    assert retrain_command.main(flags(three, "--seeds", "0-1", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert seen == [2]
    assert [one["seed"] for one in found["seeds"]] == [0, 1]
    assert processes.run_calls is not run_calls
    assert retrain_command.main(flags(three, "--seeds", "0-1", "--callbacks", "csv")) == 1
    assert "--callbacks: expected none with --seeds on 2 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "3-1", "1,1", "0-4,2", "-1", "0-1000000000", "1.5"]
)
def test_what_are_no_seeds(text):
    wanted = re.escape(f"such as 0-4 or 0,2,5-7, got {text!r}")
    with pytest.raises(ConfigError, match=wanted):
        TrainingOptions(seeds=text).seed_list()


@pytest.mark.parametrize("more", [("--seed", "3"), ("--resume", "x"), ("--fork", "x")])
def test_what_does_not_go_together(three, capsys, more):
    status = retrain_command.main([*flags(three, "--seeds", "0-1"), *more])
    assert status == 1
    assert "error" in capsys.readouterr().err
