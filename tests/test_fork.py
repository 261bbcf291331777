"""``--fork``: a run goes on from the last epoch of another one, with other settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from _tiny import small_space, tiny
from test_callbacks import Told
from test_callbacks import lines as metrics
from test_callbacks import small as retraining

from fastbandit._files import read_sealed
from fastbandit.bandit import replay
from fastbandit.config import merge
from fastbandit.retrain import __main__ as retrain_command
from fastbandit.retrain import retrain
from fastbandit.runs.folder import RunFolder
from fastbandit.search import __main__ as search_command
from fastbandit.search import search


def files(path: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A retraining that was stopped after its second epoch."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        retrain(retraining(), tmp_path / "a", callbacks=[Told(stop=1)])
    return tmp_path / "a"


def test_a_retraining_goes_on_with_other_settings(begun, capsys):
    before = files(begun)
    flags = ["--fork", "a", "--batch-size", "4", "--epochs", "5", "--out", "b"]
    assert retrain_command.main(flags) == 0
    assert files(begun) == before
    there = begun.parent / "b"
    assert [line["epoch"] for line in metrics(there)] == [0, 1, 2, 3, 4]
    assert metrics(there)[:2] == metrics(begun)
    config = RunFolder.read_config(there)
    assert (config["batch_size"], config["epochs"], config["train_limit"]) == (4, 5, 16)
    origin = read_sealed(there / "env.json")["forked_from"]
    assert (origin["folder"], origin["epochs"]) == ("a", 2)
    # Once more the same command: all is done.
    capsys.readouterr()
    assert retrain_command.main(flags) == 0
    assert "all is done" in capsys.readouterr().err


def test_it_does_not_matter_when_the_other_settings_are_those_of_then(begun):
    """The state is whole: with the batch size back, the rest is as it would have been."""
    assert retrain_command.main(["--fork", "a", "--name", "other", "--out", "b"]) == 0
    assert retrain_command.main(["--resume", "a"]) == 0
    parent = begun.parent
    names = ("loss", "clean_accuracy", "robust_accuracy", "learning_rate")
    first, second = (
        [[line[name] for name in names] for line in metrics(parent / one)] for one in ("a", "b")
    )
    assert first == second
    origin = read_sealed(parent / "b" / "env.json")["forked_from"]
    assert origin["run_id"] == read_sealed(parent / "a" / "summary.json")["run_id"]


def test_a_genotype_that_is_gone_is_that_of_the_run(begun, monkeypatch):
    parent = begun.parent
    (parent / "mine.json").write_bytes((begun / "genotype.json").read_bytes())
    config = merge(retraining(), {"genotype": "mine.json"}, "test")
    with pytest.raises(KeyboardInterrupt):
        retrain(config, "c", callbacks=[Told(stop=0)])
    (parent / "mine.json").unlink()
    assert retrain_command.main(["--fork", "c", "--batch-size", "4", "--out", "d"]) == 0
    assert len(metrics(parent / "d")) == 4


def test_an_interrupted_fork_is_found_again(begun, monkeypatch):
    class Stopped(Exception):  # noqa: N818
        pass

    def stopped(*arguments, **keywords):
        raise Stopped

    flags = ["--fork", "a", "--weight-decay", "0.1"]
    monkeypatch.setattr(retrain_command, "retrain", stopped)
    for _ in range(2):
        with pytest.raises(Stopped):
            retrain_command.main(flags)
    (made,) = (begun.parent / "runs").iterdir()
    assert len(metrics(made)) == 2
    monkeypatch.undo()
    monkeypatch.chdir(begun.parent)
    assert retrain_command.main(flags) == 0
    assert [path.name for path in (begun.parent / "runs").iterdir()] == [made.name]
    assert len(metrics(made)) == 4


def test_nothing_is_left_where_it_fails(begun, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunFolder, "save_checkpoint", full)
    assert retrain_command.main(["--fork", "a", "--batch-size", "4", "--out", "b"]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in begun.parent.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "expected other settings than those of this run, got the same; --resume a goes on"),
        (["--train-limit", "24"], "train_limit: expected 16 as there, since a run's state belongs"),
        (["--attack.epsilon", "0.1"], "attack.epsilon: expected '0.2' as there"),
        (["--selection.steps", "3"], "selection.steps: expected 10 as there"),
        (["--batch-size", "4", "--preset", "smoke"], "as flags of their own, got --preset"),
        (["--batch-size", "4", "--resume", "a"], "as flags of their own, got --resume"),
        (["--batch-size", "4", "--out", "c"], "c: expected a new folder for --fork"),
    ],
)
def test_what_cannot_be(begun, capsys, flags, message):
    (begun.parent / "c").mkdir()
    before = files(begun)
    assert retrain_command.main(["--fork", "a", "--out", "b", *flags]) == 1
    assert message in capsys.readouterr().err
    assert files(begun) == before
    assert not (begun.parent / "b").exists()


def test_a_run_of_another_command(begun, capsys):
    assert search_command.main(["--fork", "a", "--batch-size", "4"]) == 1
    error = capsys.readouterr().err
    assert "unknown" in error or "expected a run of search" in error


def test_a_search_goes_on_with_other_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_space(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        search(tiny(), "a", callbacks=[Told(stop=3)])
    flags = ["--fork", "a", "--learning-rate", "0.05", "--batch-size", "12", "--out", "b"]
    assert search_command.main(flags) == 0
    there = tmp_path / "b"
    assert metrics(there)[:4] == metrics(tmp_path / "a")
    assert len(metrics(there)) == json.loads((there / "summary.json").read_text())["cost"]["epochs"]
    replay(map(json.loads, (there / "bandit.jsonl").read_text().splitlines()))
    # The bandit's rewards belong to its settings.
    assert search_command.main(["--fork", "a", "--bandit.rounds", "2", "--out", "c"]) == 1
