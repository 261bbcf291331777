"""A run that is stopped at any moment: the same command then ends with the same results.

Every change of a file is an event of Python's audit hooks. A run is stopped at each of them in
turn, before it takes place and with half of what was to be written, and nothing changes any more
until the same command is given again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from _tiny import small_space

from fastbandit.config import merge
from fastbandit.evaluate import EvaluateConfig, evaluate_model
from fastbandit.evaluate.run import FILES as EVALUATION
from fastbandit.genotype import Genotype
from fastbandit.models import Architecture, save_model
from fastbandit.retrain import RetrainConfig, retrain
from fastbandit.retrain.loop import Retraining
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.session import Session
from fastbandit.runs.tensors import save_tensors
from fastbandit.search import SearchConfig, search
from fastbandit.search.loop import SearchRun
from fastbandit.study import StudyConfig, study
from fastbandit.study.pieces import Pieces
from fastbandit.study.run import FILES as STUDY


class Killed(BaseException):
    """As if the process were gone."""


class Recorder:
    """Counts the changes of files below a folder, and stops at one of them and all that follow."""

    def __init__(self) -> None:
        self.root = ""
        self.stop_at: int | None = None
        self.events: list[str] = []
        self.busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or self.busy or event not in self._CHANGES:
            return
        path = arguments[0]
        if event == "open":
            flags = arguments[2]
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                return
        below_open_folder = event in ("os.remove", "os.rmdir") and arguments[1] not in (-1, None)
        if not below_open_folder:
            if not isinstance(path, (str, os.PathLike)):
                return
            if not os.fspath(path).startswith(self.root):
                return
        self.events.append(f"{event} {path}")
        if self.stop_at is None or len(self.events) <= self.stop_at:
            return
        if event == "open" and len(self.events) == self.stop_at + 1:
            self.busy = True
            with open(path, "ab") as stream:
                stream.write(b'{"half')
            self.busy = False
        raise Killed(self.events[-1])

    _CHANGES = frozenset({
        "open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
        "os.symlink",
    })  # fmt: skip


RECORDER = Recorder()
sys.addaudithook(RECORDER)  # cannot be taken away; without a root it does nothing


@contextlib.contextmanager
def recorded(root: Path, stop_at: int | None = None) -> Iterator[list[str]]:
    RECORDER.root, RECORDER.stop_at, RECORDER.events = str(root), stop_at, []
    try:
        yield RECORDER.events
    finally:
        RECORDER.root = ""


def results(folder: Path) -> dict[str, str]:
    """Every file that is not hidden, by digest."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not file.name.startswith(".")
        # Written again where a run goes on from the checkpoint before.
        and file.name not in ("previous.safetensors", "next.safetensors")
    }


def stop_at_each(
    tmp_path: Path, prepare: Callable[[Path], None], job: Callable[[Path], Any], *, step: int = 1
) -> None:
    """Stop ``job`` at each event; the same job then has to end as it does undisturbed."""
    whole, before = tmp_path / "whole", tmp_path / "before"
    tmp_path.mkdir(exist_ok=True)
    prepare(before)

    def prepared(folder: Path) -> Path:
        if before.exists():
            shutil.copytree(before, folder)
        return folder

    prepared(whole)
    with recorded(whole) as events:
        job(whole)
    expected, count = results(whole), len(events)
    assert count > 5
    for number in range(0, count, step):
        folder = prepared(tmp_path / f"stopped-{number}")
        with recorded(folder, number) as events, pytest.raises(Killed):
            job(folder)
        try:
            job(folder)
        except Exception as error:
            raise AssertionError(f"stopped at event {number}, {events[number]}") from error
        assert results(folder) == expected, f"stopped at event {number}, {events[number]}"
        hidden = {file.name for file in folder.rglob(".*")}
        assert hidden <= {".lock"}, f"stopped at event {number}, {events[number]}"


# --- a small job in each kind of folder --------------------------------------------------------


def small_job(files: RunFiles, seed: int, *, force: bool = False) -> Callable[[Path], Any]:
    """What every command does with its folder, in the order of the search."""

    def job(path: Path) -> None:
        with RunFolder.open(path, {"seed": seed}, force=force, files=files) as folder:
            session = Session({})
            session.folder = folder
            if folder.finished and not force:
                assert session.finished() is not None
                return
            done = 0

            def restore(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
                nonlocal done
                done = state["epoch"]
                assert tensors["w"].tolist() == [seed, done]

            def save() -> None:
                folder.save_checkpoint({"w": torch.tensor([seed, done])}, {"epoch": done})

            resumed = folder.load_checkpoint(restore)
            session._check_same("split.json", {"weights": [1, 2, 3]})
            if resumed:
                folder.read_json("env.json")
            else:
                folder.write_json("env.json", {"date": "today"})
                folder.append("bandit.jsonl", {"event": "start"})
                save()
            while done < 3:
                folder.append("metrics.jsonl", {"epoch": done, "loss": seed / (done + 1)})
                folder.append("bandit.jsonl", {"event": "sample", "sample": done})
                done += 1
                save()
            assert [line["epoch"] for line in folder.lines("metrics.jsonl")] == [0, 1, 2]
            save_tensors(path / "weights.safetensors", {"w": torch.ones(2)}, "supernet", {})
            folder.write_json(files.result, {"status": "finished", "seed": seed})

    return job


def small_study(seed: int, *, force: bool = False) -> Callable[[Path], Any]:
    """What a study does with its folder."""

    def job(path: Path) -> None:
        with RunFolder.open(path, {"seed": seed}, force=force, files=STUDY) as folder:
            if not (path / "env.json").is_file():
                folder.write_json("env.json", {"date": "today"})
            pieces = Pieces(path / "pieces")
            made = [pieces.get("piece", {"n": n}, lambda n=n: {"is": seed + n}) for n in range(2)]
            (path / "searches").mkdir(exist_ok=True)
            small_job(RunFiles(), seed)(path / "searches" / "first")
            folder.write_json("study.json", {"pieces": made})
            folder.write_json("summary.json", {"status": "finished"})

    return job


def nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize("files", [RunFiles(), EVALUATION], ids=["run", "evaluation"])
def test_a_run_stopped_anywhere_goes_on(tmp_path, files):
    stop_at_each(tmp_path, nothing, small_job(files, 1))


@pytest.mark.parametrize("files", [RunFiles(), EVALUATION], ids=["run", "evaluation"])
@pytest.mark.parametrize("seed", [1, 2])
def test_force_stopped_anywhere_starts_anew(tmp_path, files, seed):
    """Over a finished run of the same and of another configuration."""

    def again(path: Path) -> None:
        job = small_job(files, 1, force=True)
        job(path)

    stop_at_each(tmp_path, small_job(files, seed), again)


def test_a_study_stopped_anywhere_goes_on(tmp_path):
    stop_at_each(tmp_path / "fresh", nothing, small_study(1))
    stop_at_each(tmp_path / "same", small_study(1), small_study(1, force=True), step=3)
    stop_at_each(tmp_path / "other", small_study(2), small_study(1, force=True), step=3)


def test_what_force_began_is_ended_without_it(tmp_path):
    small_job(RunFiles(), 2)(tmp_path / "whole")
    with recorded(tmp_path / "whole") as events:
        small_job(RunFiles(), 1, force=True)(tmp_path / "whole")
    # The removal ends with that of its mark.
    marks = [n for n, event in enumerate(events) if ".clearing" in event]
    assert len(marks) == 3  # written beside its place, renamed, removed
    for number in range(marks[1] + 1, marks[2] + 1, 3):
        path = tmp_path / f"{number}"
        small_job(RunFiles(), 2)(path)
        with recorded(path, number), pytest.raises(Killed):
            small_job(RunFiles(), 1, force=True)(path)
        small_job(RunFiles(), 1)(path)
        assert results(path) == results(tmp_path / "whole")


# --- the commands -------------------------------------------------------------------------------


class BegunError(Exception):
    """The command is through with its folder and begins its first epoch."""


def until_it_begins(run: Callable[[Path], Any]) -> Callable[[Path], None]:
    def job(path: Path) -> None:
        with pytest.raises(BegunError):
            run(path)

    return job


def begin(*arguments: Any) -> None:
    raise BegunError


def fixed_environment(device: torch.device) -> dict[str, Any]:
    return {
        "date": "today", "fastbandit": "", "python": "", "torch": "", "cuda": None, "threads": 1,
        "cpu": "", "device": "cpu", "device_name": "CPU",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch):
    """Nothing in a file that a clock decides; and nothing waits for the disk."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    for module in ("runs.session", "study.outcome", "evaluate.run", "evaluate.result"):
        monkeypatch.setattr(f"fastbandit.{module}.environment", fixed_environment)
    monkeypatch.setattr("time.perf_counter", lambda: 0.0)


SMALL = {
    "device": "cpu", "init_channels": 2, "train_limit": 16, "test_limit": 8, "batch_size": 8,
    "threads": 0, "guard": {"enabled": False},
}  # fmt: skip


def begin_search(force: bool = False, **changes: Any) -> Callable[[Path], None]:
    config = merge(merge(SearchConfig(), SMALL, "small"), changes, "test")
    return until_it_begins(lambda path: search(config, path, force=force))


def begin_retrain(force: bool = False, **changes: Any) -> Callable[[Path], None]:
    config = merge(merge(RetrainConfig(), SMALL, "small"), changes, "test")
    return until_it_begins(lambda path: retrain(config, path, force=force))


SEARCH = {
    "space": "general7-light", "bandit": {"rounds": 1},
    "final": {"tune_epochs": 0, "network_epochs": 0},
}  # fmt: skip
RETRAIN = {"genotype": "ABANDIT_MNIST_NORMAL_1", "layers": 2, "epochs": 1}


@pytest.mark.parametrize("force", [False, True])
def test_search_stopped_before_it_begins(tmp_path, monkeypatch, force):
    small_space(monkeypatch)
    monkeypatch.setattr(SearchRun, "epoch", begin)
    before = begin_search(**SEARCH, seed=1) if force else nothing
    stop_at_each(tmp_path, before, begin_search(force, **SEARCH), step=5)


@pytest.mark.parametrize("force", [False, True])
def test_retrain_stopped_before_it_begins(tmp_path, monkeypatch, force):
    monkeypatch.setattr(Retraining, "run_epoch", begin)
    before = begin_retrain(**RETRAIN, seed=1) if force else nothing
    stop_at_each(tmp_path, before, begin_retrain(force, **RETRAIN), step=2)


@pytest.mark.parametrize("force", [False, True])
def test_evaluate_stopped_anywhere(tmp_path, monkeypatch, force):
    monkeypatch.setattr("fastbandit.evaluate.result.peak_memory_mb", lambda device: 0.0)
    genotype = Genotype.published("ABANDIT_MNIST_NORMAL_1")
    architecture = Architecture(in_channels=1, classes=10, channels=2, cells=2)
    torch.manual_seed(0)
    tensors = architecture.build(genotype).state_dict()
    model = tmp_path / "model.safetensors"
    facts = {"genotype": genotype, "architecture": architecture, "data": {}, "training": {}}
    save_model(model, tensors, **facts)
    small = {"limit": 4, "attacks": "fgsm", "epsilon": "0.1", "checks": {"images": 0}}

    def job(seed: int, force: bool) -> Callable[[Path], Any]:
        config = merge(EvaluateConfig(), {**small, "seed": seed}, "test")
        return lambda path: evaluate_model(model, config, path, force=force)

    stop_at_each(tmp_path, job(1, False) if force else nothing, job(0, force), step=3)


@pytest.mark.parametrize("force", [False, True])
def test_study_stopped_anywhere(tmp_path, monkeypatch, force):
    monkeypatch.setattr("time.process_time", lambda: 0.0)
    small = {
        "seeds": 2, "rounds": 1, "world": {"rows": 2, "arms": 2}, "policies": ["random", "printed"],
        "rates": [0.2], "arms": [2], "evaluations": [0], "bonuses": [0.1],
    }  # fmt: skip

    def job(seed: int, force: bool) -> Callable[[Path], Any]:
        config = merge(StudyConfig(), {"simulated": small, "seed": seed}, "test")
        return lambda path: study(config, path, force=force)

    stop_at_each(tmp_path, job(1, False) if force else nothing, job(0, force), step=5)


def test_the_folder_that_older_versions_leave_is_taken(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    small_job(RunFiles(), 1)(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "finished"
