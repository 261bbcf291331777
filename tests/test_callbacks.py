"""Callbacks: what they are told, when, and what the ready ones write."""

from __future__ import annotations

import csv
import json
import sys
import types
from pathlib import Path

import pytest
from _tiny import TINY, small_space

from fastbandit.callbacks import Callback, Csv, make
from fastbandit.callbacks.base import flat, numbers
from fastbandit.config import merge
from fastbandit.retrain import RetrainConfig, retrain
from fastbandit.search import SearchConfig, search
from fastbandit.search.__main__ import main

EPOCHS = 4


class Told(Callback):
    """Writes down what it is told; is stopped after an epoch."""

    def __init__(self, stop: int | None = None, error: BaseException | None = None) -> None:
        self.calls: list = []
        self.stop, self.error = stop, error or KeyboardInterrupt()

    def on_start(self, run):
        self.calls.append(("start", run.epoch))
        self.run = run

    def on_epoch(self, run, metrics):
        self.calls.append(("epoch", metrics["epoch"]))
        metrics["epoch"] = "mine"  # nobody else's
        if self.stop is not None and self.calls[-1] == ("epoch", self.stop):
            raise self.error

    def on_end(self, run, summary):
        self.calls.append(("end", summary["status"]))

    def on_error(self, run, error):
        self.calls.append(("error", type(error).__name__))


def small(epochs: int = EPOCHS) -> RetrainConfig:
    changes = {
        "device": "cpu", "init_channels": 2, "train_limit": 16, "test_limit": 8, "batch_size": 8,
        "threads": 0, "guard": {"enabled": False}, "genotype": "ABANDIT_MNIST_NORMAL_1",
        "layers": 2, "epochs": epochs,
    }  # fmt: skip
    return merge(RetrainConfig(), changes, "test")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_what_a_retraining_tells(tmp_path):
    first, second = Told(), Told()
    path, _ = retrain(small(), tmp_path / "run", callbacks=[first, second])
    assert first.calls == second.calls
    assert first.calls == [
        ("start", 0), *(("epoch", number) for number in range(EPOCHS)), ("end", "finished"),
    ]  # fmt: skip
    assert first.run.command == "retrain"
    assert first.run.path == path
    assert first.run.config["epochs"] == EPOCHS
    # Of a finished run nothing is told.
    again = Told()
    retrain(small(), path, callbacks=[again])
    assert again.calls == []


def test_a_run_that_a_callback_stops_goes_on_after_that_epoch(tmp_path):
    told, table = Told(stop=1), Csv()
    with pytest.raises(KeyboardInterrupt):
        retrain(small(), tmp_path / "run", callbacks=[table, told])
    assert told.calls[-2:] == [("epoch", 1), ("error", "KeyboardInterrupt")]
    told = Told()
    path, _ = retrain(small(), tmp_path / "run", callbacks=[Csv(), told])
    assert told.calls == [("start", 2), ("epoch", 2), ("epoch", 3), ("end", "finished")]
    whole, _ = retrain(small(), tmp_path / "whole", callbacks=[Csv()])
    rows, wanted = (
        [{k: v for k, v in row.items() if "seconds" not in k} for row in read(one)]
        for one in (path, whole)
    )
    for row in (*rows, *wanted):
        for name in ("images_per_second", "peak_memory_mb"):
            row.pop(name)
    assert rows == wanted


def read(path: Path) -> list[dict[str, str]]:
    with (path / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_hear_of_an_error_whatever_one_of_them_does(tmp_path):
    class Fails(Told):
        def on_error(self, run, error):
            super().on_error(run, error)
            raise RuntimeError("no")

    first, second = Fails(stop=0, error=ZeroDivisionError()), Told()
    with pytest.raises(ZeroDivisionError):
        retrain(small(), tmp_path / "run", callbacks=[first, second])
    assert first.calls[-1] == second.calls[-1] == ("error", "ZeroDivisionError")


def test_a_search_tells_of_all_its_phases(tmp_path, monkeypatch):
    small_space(monkeypatch)
    told = Told()
    config = merge(SearchConfig(), TINY, "tiny")
    path, _ = search(config, tmp_path / "run", callbacks=[told, Csv()])
    stored = lines(path)
    assert [call for call in told.calls if call[0] == "epoch"] == [
        ("epoch", line["epoch"]) for line in stored
    ]
    assert told.calls[-1] == ("end", "finished")
    rows = read(path)
    assert [row["epoch"] for row in rows] == [str(line["epoch"] + 1) for line in stored]
    assert [row["phase"] for row in rows] == [line["phase"] for line in stored]
    assert [row["reward"] for row in rows] == [str(line.get("reward", "")) for line in stored]


def test_a_table_of_a_version_that_counted_from_0_goes_on_from_1(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        retrain(small(), tmp_path / "run", callbacks=[Csv(), Told(stop=1)])
    file = tmp_path / "run" / "metrics.csv"
    head, first, second = file.read_text().splitlines()
    assert (first.split(",")[0], second.split(",")[0]) == ("1", "2")
    before = [f"{number},{row.partition(',')[2]}" for number, row in enumerate((first, second))]
    file.write_text("\n".join([head, *before, ""]))
    path, _ = retrain(small(), tmp_path / "run", callbacks=[Csv()])
    assert [row["epoch"] for row in read(path)] == ["1", "2", "3", "4"]
    assert [row["loss"] for row in read(path)] == [str(line["loss"]) for line in lines(path)]


def test_a_table_that_is_none(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        retrain(small(), tmp_path / "run", callbacks=[Told(stop=1)])
    (tmp_path / "run" / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"metrics\.csv: expected a table of epochs"):
        retrain(small(), tmp_path / "run", callbacks=[Csv()])
    (tmp_path / "run" / "metrics.csv").write_text("epoch\nfirst\n")
    with pytest.raises(ValueError, match="expected a number of an epoch, got 'first'"):
        retrain(small(), tmp_path / "run", callbacks=[Csv()])


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from fastbandit.callbacks import TensorBoard

    with pytest.raises(KeyboardInterrupt):
        retrain(small(), tmp_path / "run", callbacks=[TensorBoard(), Told(stop=1)])
    path, _ = retrain(small(), tmp_path / "run", callbacks=[TensorBoard()])
    found = EventAccumulator(str(path / "tensorboard"))
    found.Reload()
    for name in ("loss", "clean_accuracy", "robust_accuracy"):
        assert [one.step for one in found.Scalars(name)] == [1, 2, 3, 4]
        wanted = pytest.approx([line[name] for line in lines(path)], rel=1e-6)  # float32 there
        assert [one.value for one in found.Scalars(name)] == wanted
    assert "config/text_summary" in found.Tags()["tensors"]


def test_mlflow(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from fastbandit.callbacks import MLflow

    place = (tmp_path / "mlruns").as_uri()
    with pytest.raises(KeyboardInterrupt):
        retrain(small(), tmp_path / "run", callbacks=[MLflow("mine", place), Told(stop=1)])
    one = MLflow("mine", place)
    client = one._client
    number = client.get_experiment_by_name("mine").experiment_id
    (run,) = client.search_runs([number])
    assert run.info.status == "KILLED"
    path, _ = retrain(small(), tmp_path / "run", callbacks=[one])
    (run,) = client.search_runs([number])
    assert run.info.status == "FINISHED"
    assert run.data.params["epochs"] == str(EPOCHS)
    history = client.get_metric_history(run.info.run_id, "robust_accuracy")
    assert [one.step for one in history] == [1, 2, 3, 4]
    assert [one.value for one in history] == [line["robust_accuracy"] for line in lines(path)]
    assert {one.path for one in client.list_artifacts(run.info.run_id)} == {
        "genotype.json", "summary.json",
    }  # fmt: skip


def test_optuna_prunes(tmp_path):
    optuna = pytest.importorskip("optuna")
    from fastbandit.callbacks import OptunaPruning

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=1.1, n_warmup_steps=1)
    )

    def objective(trial):
        told = [OptunaPruning(trial, "clean_accuracy")]
        return retrain(small(), tmp_path / str(trial.number), callbacks=told)[1]["best"]

    study.optimize(objective, n_trials=1)
    (trial,) = study.trials
    assert trial.state == optuna.trial.TrialState.PRUNED
    assert list(trial.intermediate_values) == [0, 1]
    assert len(lines(tmp_path / "0")) == 2

    def wrong(trial):
        retrain(small(1), tmp_path / "wrong", callbacks=[OptunaPruning(trial, "robust")])

    with pytest.raises(ValueError, match=r"expected a field of .*robust_accuracy.*got 'robust'"):
        study.optimize(wrong, n_trials=1)


def test_wandb_is_told_by_its_own_names(tmp_path, monkeypatch):
    """Against a stand-in of wandb's calls; wandb itself was not tried."""
    seen: list = []
    run = types.SimpleNamespace(
        log=lambda values, step: seen.append((step, values["loss"])),
        finish=lambda exit_code=0: seen.append(("finish", exit_code)),
    )

    def init(**settings):
        seen.append(("init", settings["id"], settings["project"], settings["resume"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    from fastbandit.callbacks import WandB

    with pytest.raises(KeyboardInterrupt):
        retrain(small(2), tmp_path / "run", callbacks=[WandB(project="p"), Told(stop=0)])
    path, summary = retrain(small(2), tmp_path / "run", callbacks=[WandB(project="p")])
    loss = [line["loss"] for line in lines(path)]
    begun = ("init", f"run-{summary['run_id'][:12]}", "p", "allow")
    assert seen == [begun, (1, loss[0]), ("finish", 1), begun, (2, loss[1]), ("finish", 0)]


def test_names_on_the_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "my_callbacks.py").write_text(
        "from fastbandit.callbacks import Callback\n"
        "class Mine(Callback):\n"
        "    def on_end(self, run, summary):\n"
        "        (run.path / 'mine.txt').write_text(summary['status'])\n"
        "number = 3\n"
    )
    small_space(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(make(["csv"])[0], Csv)
    assert type(make(["my_callbacks:Mine"])[0]).__name__ == "Mine"
    for name, message in (
        ("cvs", "expected csv, tensorboard, mlflow, wandb or MODULE:NAME, got 'cvs'; did you mean"),
        ("my_callbacks:number", "number: expected a fastbandit.callbacks.Callback, got int"),
        ("my_callbacks:Other", "has no attribute 'Other'"),
        ("no_such_module:Mine", "No module named 'no_such_module'"),
        ("builtins:dict", "expected a fastbandit.callbacks.Callback, got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            make([name])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="pip install wandb"):
        make(["wandb"])
    arguments = ["--config", "tiny.json", "--out", "run", "--callbacks", "csv", "my_callbacks:Mine"]
    (tmp_path / "tiny.json").write_text(json.dumps(TINY))
    assert main(arguments) == 0
    assert (tmp_path / "run" / "mine.txt").read_text() == "finished"
    assert len(read(tmp_path / "run")) == len(lines(tmp_path / "run"))
    assert main([*arguments[:4], "--callbacks", "nobody"]) == 1
    assert "search: error: --callbacks: expected csv, tensorboard" in capsys.readouterr().err


def test_flat_and_numbers():
    metrics = {
        "epoch": 3,
        "loss": 1.5,
        "best": True,
        "text": "a",
        "none": None,
        "a": {"b": {"c": 1}},
    }
    assert flat(metrics)["a.b.c"] == 1
    assert numbers(metrics) == {"loss": 1.5, "best": 1.0, "a.b.c": 1.0}


def test_the_page_works_as_it_stands(tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    page = Path(__file__).parents[1] / "docs" / "callbacks.md"
    first, second = (part.split("```")[0] for part in page.read_text().split("```python\n")[1:])
    names: dict = {}
    exec(compile(first, str(page), "exec"), names)
    with pytest.raises(KeyboardInterrupt):
        retrain(small(), tmp_path / "run", callbacks=[names["Patience"](0)])
    assert len(lines(tmp_path / "run")) == 1
    # The example in full trains three networks of the preset.
    monkeypatch.chdir(tmp_path)
    original = RetrainConfig.preset
    monkeypatch.setattr(
        RetrainConfig,
        "preset",
        classmethod(
            lambda cls, name, **changes: merge(
                small(), {"learning_rate": changes["learning_rate"]}, original(name, **changes).name
            )
        ),
    )
    exec(compile(second, str(page), "exec"), names)
    assert len(names["study"].trials) == 3
    assert (tmp_path / "runs" / "trial-0" / "summary.json").is_file()
