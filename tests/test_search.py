"""The search as a whole: the schedule, exact repetition, exact resume, errors, the command."""

import json
import os
import random
import subprocess
import sys
import time
from fractions import Fraction

import numpy as np
import pytest
import torch
import yaml
from _processes import Process, run
from _tiny import TINY, few_edges, small_space, tiny

from fastbandit import data, retrain, space
from fastbandit._files import FileError, check_seal
from fastbandit.bandit import replay
from fastbandit.config import ConfigError, merge, to_plain
from fastbandit.data import load
from fastbandit.genotype import Genotype
from fastbandit.runs.cost import measure_throughput
from fastbandit.runs.environment import run_id
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.progress import Progress
from fastbandit.runs.session import Session, torch_settings
from fastbandit.runs.tensors import CheckpointError, RunError, load_tensors, save_tensors
from fastbandit.search import (
    PRESETS,
    AttackConfig,
    FinalConfig,
    SearchConfig,
    adversarial,
    dry_run,
    estimate,
    main,
    parse,
    search,
)
from fastbandit.search.adversarial import Adversarial
from fastbandit.search.loop import SearchRun
from fastbandit.search.setup import build
from fastbandit.training import DivergenceError, is_out_of_memory
from fastbandit.training.overfitting import Verdict

# The files whose bytes are a function of the configuration.
EXACT = ("genotype.json", "bandit.jsonl", "weights.safetensors")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted search of all operations, looked at by many tests."""
    with pytest.MonkeyPatch.context() as patch:
        few_edges(patch)
        return search(tiny(), tmp_path_factory.mktemp("search") / "run")


# The small space in a process of its own, before the command.
SMALL_SPACE = "from _tiny import small_space\nfrom fastbandit import search\nsmall_space()\n"


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The same in the small space, for what would run whole searches beside it."""
    with pytest.MonkeyPatch.context() as patch:
        small_space(patch)
        return search(tiny(), tmp_path_factory.mktemp("short") / "run")


def test_folder_is_complete(finished):
    path, summary = finished
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    assert names == {
        "config.yaml",
        "env.json",
        "split.json",
        "metrics.jsonl",
        "bandit.jsonl",
        "genotypes.jsonl",
        "genotype.json",
        "weights.safetensors",
        "summary.json",
        "report.html",
        "checkpoints",
    }
    assert RunFolder(path).read_json("summary.json") == summary


def test_schedule_and_log(finished):
    path, summary = finished
    log = lines(path / "bandit.jsonl")
    samples = [line for line in log if line["event"] == "sample"]
    abandoned = [line for line in log if line["event"] == "abandon"]
    assert len(samples) == 7 + (7 + 6 + 5 + 4 + 3 + 2) == summary["cost"]["epochs"]
    assert [line["sample"] for line in samples] == list(range(34))
    assert len(abandoned) == 6 * 6
    assert [line["phase"] for line in samples] == ["initial"] * 7 + ["search"] * 27
    # Pruned after K * T samples each time: T = 1.
    assert sorted({line["sample"] for line in abandoned}) == [14, 20, 25, 29, 32, 34]
    assert len(lines(path / "metrics.jsonl")) == 34
    # In the initial pass each edge tries each arm once.
    for row in range(6):
        assert sorted(line["choice"][row] for line in samples[:7]) == list(range(7))
    # Every reward is the robust validation accuracy of 24 images, as recorded.
    for line in samples:
        assert line["reward"] == line["robust_accuracy"]
        assert (line["reward"] * 24) == pytest.approx(round(line["reward"] * 24))
        assert all(0 < p <= 1 for p in line["probability"])


def test_replayed_log_gives_the_genotype(finished):
    path, summary = finished
    log = lines(path / "bandit.jsonl")
    bandit = replay(log)
    assert bandit.finished
    assert bandit.final().tolist() == log[-1]["choice"]
    genotype = Genotype.load(path / "genotype.json")
    searched = space.SearchSpace("general7-light", space.SPACES["general7-light"], 2, 2)
    assert genotype == Genotype.from_choices(
        searched,
        bandit.final(),
        mean=bandit.mean,
        options=genotype.options,
        macro=genotype.macro,
        search=genotype.search,
    )
    assert genotype.hash == summary["genotype_hash"]
    history = lines(path / "genotypes.jsonl")
    assert [line["arms_left"] for line in history] == [6, 5, 4, 3, 2, 1]
    assert Genotype.from_dict(history[-1]["genotype"]).hash == genotype.hash


def test_cost_ledger_counts_what_was_done(finished):
    _, summary = finished
    cost = summary["cost"]
    # 24 images to train in 1 batch, 24 to validate in 1, 32 to test in 2; 34 epochs; FGSM.
    # In 6 epochs the guard: FGSM and PGD-5 on the validation images.
    # At the end: statistics from 1 batch, then PGD-2 on validation and test.
    forward = 34 * 1 * 2 + 34 * 1 * 3 + 6 * (3 + 7) + 1 * 2 + (1 + 2) * 4
    backward = 34 * 1 * 2 + 34 * 1 * 1 + 6 * (1 + 5) + 1 * 1 + (1 + 2) * 2
    assert (cost["forward_passes"], cost["backward_passes"]) == (forward, backward)
    assert cost["images_trained"] == 34 * 24
    assert cost["images_evaluated"] == 34 * 24 + 6 * 2 * 24 + 24 + 32
    assert cost["seconds_total"] == pytest.approx(
        sum(cost[f"seconds_{p}"] for p in ("setup", "train", "validate", "statistics", "other"))
    )
    assert cost["peak_memory_mb"] > 50


def test_split_is_stored_and_disjoint(finished):
    path, _ = finished
    split = json.loads((path / "split.json").read_text())
    assert len(split["weights"]) == len(split["validation"]) == 24
    assert not set(split["weights"]) & set(split["validation"])
    assert len(split["test"]) == 32
    # Positions in the whole data set: the first images of each class, not simply the first 48.
    labels = load("digits").train.labels
    used = labels[split["weights"] + split["validation"]]
    assert used.bincount(minlength=10).min() >= 4
    assert max(split["weights"] + split["validation"]) < 200


def test_run_id_is_the_hash_of_the_configuration(finished):
    path, summary = finished
    stored = yaml.safe_load((path / "config.yaml").read_text())
    assert summary["run_id"] == run_id(stored)
    assert stored["device"] == "cpu"
    assert stored["reward"] == "robust"
    assert stored["deterministic"] is True


def test_files_of_the_result_hold_no_times(finished):
    path, _ = finished
    for name in ("genotype.json", "bandit.jsonl"):
        assert "second" not in (path / name).read_text()


def test_weights_are_those_of_the_supernet(finished, monkeypatch):
    path, summary = finished
    few_edges(monkeypatch)
    tensors, metadata = load_tensors(path / "weights.safetensors", "supernet")
    assert metadata["run_id"] == summary["run_id"]
    setup = build(tiny().resolve())
    setup.supernet.load_state_dict(tensors)


def test_same_seed_same_bytes_other_seed_other_bytes(short, tmp_path, monkeypatch):
    path, _ = short
    small_space(monkeypatch)
    torch.manual_seed(99)  # the process's own generator must not matter
    torch.rand(7)
    again, _ = search(tiny(), tmp_path / "again")
    for name in EXACT:
        assert (again / name).read_bytes() == (path / name).read_bytes(), name
    other, _ = search(tiny(seed=1), tmp_path / "other")
    for name in EXACT:
        assert (other / name).read_bytes() != (path / name).read_bytes(), name


def test_torch_settings_are_undone(finished):
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("before", [True, False])
def test_float32_is_float32_within_a_run(monkeypatch, before):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(cudnn, "allow_tf32", before)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with torch_settings(0, False):
        assert not cudnn.allow_tf32
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    assert cudnn.allow_tf32 == before
    with torch_settings(0, True):  # without it torch refuses matrix products on a GPU
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with torch_settings(0, True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_pace_of_batches_that_are_all_alike():
    told = measure_throughput(lambda batches: (0.5 * batches, 8 * batches), 3, recorded=False)
    assert (told.once, told.per_image) == (0.0, 0.0625)
    assert told.of(100) == 6.25


def test_pace_where_the_first_batches_are_eager_and_recorded():
    calls = []

    def run(batches):
        calls.append(batches)
        eager, record = 4.0, 7.0 if len(calls) == 1 else 0.0
        return eager + record + 0.5 * (batches - 1), 8 * batches

    told = measure_throughput(run, 3, recorded=True)
    assert calls == [3, 3, 13]
    # An epoch of 50 batches: one eager, one recording, 49 replayed.
    assert told.of(400) == pytest.approx(4.0 + 7.0 + 0.5 * 49)


def test_pace_of_a_set_without_further_batches():
    told = measure_throughput(lambda batches: (2.0, 16), 3, recorded=True)
    assert told.of(16) == pytest.approx(2.0)


def test_momenta_come_back_in_the_layout_of_their_weights(tmp_path):
    """The fused step of a GPU takes no others; a file keeps values, not strides."""
    setup = build(tiny(space="robust9", init_channels=4).resolve())
    one = SearchRun(setup, Session(setup.config))
    optimizer = setup.optimizer
    for parameter in setup.supernet.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.randn_like(parameter)
    before = {p: dict(optimizer.state[p]) for p in setup.supernet.parameters()}
    tensors, state = one.state()
    save_tensors(tmp_path / "file", tensors, "checkpoint", {})
    stored, _ = load_tensors(tmp_path / "file", "checkpoint")
    optimizer.state.clear()
    SearchRun(setup, Session(setup.config)).restore(stored, state)
    strides = set()
    for parameter in setup.supernet.parameters():
        momentum = optimizer.state[parameter]["momentum_buffer"]
        assert momentum.stride() == parameter.stride()
        assert torch.equal(momentum, before[parameter]["momentum_buffer"])
        assert not momentum.requires_grad
        strides.add(parameter.is_contiguous())
    assert strides == {True, False}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("precision", "evaluation_batch_size"), [("float32", 256), ("bfloat16", 24)]
)
def test_a_search_on_a_gpu_is_stopped_and_goes_on(
    tmp_path, monkeypatch, precision, evaluation_batch_size
):
    """Many paths, one after another, as graphs; of the large batch no evaluation is recorded."""
    config = tiny(
        device="cuda", graphs="yes", precision=precision, space="robust9", init_channels=4,
        train_limit=192, evaluation_batch_size=evaluation_batch_size,
    )  # fmt: skip
    interrupted(config, tmp_path / "run", 4, monkeypatch)
    path, summary = search(config, tmp_path / "run")
    assert summary["cost"]["epochs"] > 4
    assert replay(lines(path / "bandit.jsonl"))
    assert Genotype.load(path / "genotype.json")


def start(config_file, out):
    """The command in a process of its own, in the small space."""
    arguments = ["--config", config_file, "--out", out]
    return Process("-c", f"{SMALL_SPACE}raise SystemExit(search.main({arguments!r}))")


@pytest.mark.slow
def test_kill_at_three_random_moments(short, tmp_path):
    """kill -9, the same command again: the same bytes as the uninterrupted run."""
    path, summary = short
    file, out = tmp_path / "tiny.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(TINY))
    moments = random.Random(time.time_ns())
    for attempt in range(3):
        process = start(str(file), str(out))
        # Wait for a number of epochs of this attempt, then for a part of the next one.
        wanted = 1 + 2 * attempt + moments.randrange(2)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            log = out / "metrics.jsonl"
            if log.is_file() and log.read_bytes().count(b"\n") >= wanted:
                break
            assert process.poll() is None, process.wait()
            time.sleep(0.005)
        time.sleep(moments.random() * 0.1)
        process.kill()
        process.wait()
        assert not (out / "summary.json").exists()
    done = start(str(file), str(out)).wait()
    assert done.returncode == 0, done.stderr
    assert "goes on after epoch" in done.stderr
    assert done.stdout.splitlines()[-1] == f"run folder: {out}"
    for name in (*EXACT, "genotypes.jsonl"):
        assert (out / name).read_bytes() == (path / name).read_bytes(), name
    resumed = json.loads((out / "summary.json").read_text())
    assert resumed["cost"]["images_trained"] == summary["cost"]["images_trained"]
    for key in ("final", "test", "genotype_hash", "run_id"):
        assert resumed[key] == summary[key]


class StopError(Exception):
    pass


def interrupted(config, out, epochs, monkeypatch):
    """A search that ends with an error after so many epochs."""
    original = SearchRun.epoch

    def epoch(self):
        if self.bandit.samples == epochs:
            raise StopError
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "epoch", epoch)
        with pytest.raises(StopError):
            search(config, out)


def test_damaged_checkpoint(short, tmp_path, monkeypatch):
    path, _ = short
    small_space(monkeypatch)
    out = tmp_path / "run"
    interrupted(tiny(), out, 3, monkeypatch)
    latest = out / "checkpoints" / "latest.safetensors"
    data = bytearray(latest.read_bytes())
    data[-100] ^= 1
    latest.write_bytes(data)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    with pytest.raises(CheckpointError, match=r"checksum.*delete it to go on from"):
        search(tiny(), out)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    latest.unlink()
    search(tiny(), out)
    for name in EXACT:
        assert (out / name).read_bytes() == (path / name).read_bytes(), name


def test_foreign_checkpoint(tmp_path, monkeypatch):
    small_space(monkeypatch)
    other, out = tmp_path / "other", tmp_path / "run"
    interrupted(tiny(init_channels=4), other, 2, monkeypatch)
    interrupted(tiny(), out, 2, monkeypatch)
    name = "checkpoints/latest.safetensors"
    (out / name).write_bytes((other / name).read_bytes())
    for log in ("metrics.jsonl", "bandit.jsonl", "genotypes.jsonl"):
        if (other / log).exists():
            (out / log).write_bytes((other / log).read_bytes())
    with pytest.raises(CheckpointError, match="expected a checkpoint of the configuration in"):
        search(tiny(), out)


def test_changed_data_is_noticed(tmp_path, monkeypatch):
    small_space(monkeypatch)
    out = tmp_path / "run"
    interrupted(tiny(), out, 1, monkeypatch)
    split = json.loads((out / "split.json").read_text())
    (out / "split.json").write_text(json.dumps({**split, "digest": "0" * 16}))
    with pytest.raises(FileError, match="damaged or edited"):
        search(tiny(), out)
    (out / "split.json").unlink()
    RunFolder(out).write_json("split.json", {**check_seal(split, ""), "digest": "0" * 16})
    with pytest.raises(RunError, match=r"data changed since the run began \(digest differ\)"):
        search(tiny(), out)


class Squares(torch.utils.data.Dataset):
    """A data set of one's own: squares of three sizes."""

    def __len__(self):
        return 36

    def __getitem__(self, index):
        image = torch.zeros(1, 9, 9)
        image[:, : 3 + 2 * (index % 3), : 3 + 2 * (index % 3)] = 0.5 + index / 100
        return image, index % 3


def test_search_of_a_torch_dataset(tmp_path, monkeypatch):
    small_space(monkeypatch)
    source = data.load(Squares(), name="squares")
    config = tiny(data="squares", train_limit=None, test_limit=None, batch_size=9)
    path, summary = search(config, tmp_path / "run", source=source)
    assert summary["data"]["name"] == "squares"
    assert summary["data"]["classes"] == 3
    assert summary["test"] is None
    assert json.loads((path / "split.json").read_text())["digest"] == source.digest
    # The bright squares of another size are other data: the run does not go on with them.
    (path / "summary.json").unlink()
    with pytest.raises(RunError, match="data changed since the run began"):
        search(config, path, source=data.load(Squares(), name="squares").limit(train=30))


def test_log_changed_by_another_hand(tmp_path, monkeypatch):
    small_space(monkeypatch)
    out = tmp_path / "run"
    interrupted(tiny(), out, 1, monkeypatch)
    log = (out / "bandit.jsonl").read_text()
    digit = next(d for d in "123456" if f'"choice": [{d}' not in log)
    position = log.index('"choice": [') + len('"choice": [')
    (out / "bandit.jsonl").write_text(log[:position] + digit + log[position + 1 :])
    with pytest.raises(ValueError, match=r"bandit"):
        search(tiny(), out)
    assert not (out / "summary.json").exists()


def test_unfinished_run_is_continued_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_space(monkeypatch)
    monkeypatch.setattr(adversarial, "_STATISTICS_BATCHES", 1)
    interrupted(tiny(), None, 2, monkeypatch)
    (first,) = (tmp_path / "runs").iterdir()
    interrupted(tiny(), None, 4, monkeypatch)
    assert [first] == list((tmp_path / "runs").iterdir())
    assert len(lines(first / "metrics.jsonl")) == 4
    interrupted(tiny(seed=5), None, 1, monkeypatch)
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_finished_run_is_safe(finished):
    path, _ = finished
    before = (path / "summary.json").read_bytes()
    again, stored = search(tiny(), path)
    assert (again, stored) == (path, json.loads(json.dumps(finished[1])))
    with pytest.raises(RunError, match="another configuration"):
        search(tiny(seed=3), path)
    assert (path / "summary.json").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"bandit": {"policy": "random", "rounds": 1}},
        {"attack": {"steps": 0}},
        {"attack": {"steps": 2, "clip": "none", "bn_mode": "eval"}, "reward": "mix"},
        {"edges_per_node": "1", "space": "robust8-light"},
        {"bandit": {"scale": 100.0, "bonus": 0.1, "rounds": 1}, "reward": "clean"},
        {
            "bandit": {"policy": "ridge-thompson", "rounds": 1, "evaluations_per_epoch": 2},
            "edges_per_node": "1",
        },
    ],
    ids=["random", "clean", "pgd", "one-edge", "percent", "ridge"],
)
def test_variants_run(changes, tmp_path, monkeypatch):
    """Each variant to its end, in the small space."""
    small_space(monkeypatch)
    config = tiny(**changes)
    path, summary = search(config, tmp_path / "run")
    log = lines(path / "bandit.jsonl")
    assert summary["cost"]["epochs"] == config.make_bandit().total_samples
    samples = [line for line in log if line["event"] == "sample"]
    for line in samples:
        robust, clean = line["robust_accuracy"], line["clean_accuracy"]
        reward = {"robust": robust, "clean": clean, "mix": (robust + clean) / 2}
        assert line["reward"] == reward[summary["reward"]]
    if config.attack.steps == 0:
        assert summary["reward"] == "clean"
    if config.bandit.scale == 100.0:
        dropped = [line for line in log if line["event"] == "abandon"]
        assert max(line["mean"] for line in dropped) > 1
    genotype = Genotype.load(path / "genotype.json")
    edges = 2 if config.edges_per_node == "1" else 3
    assert all(sum(map(len, cell.nodes)) == edges for cell in genotype.cells)


def test_paths_that_are_only_evaluated(tmp_path, monkeypatch):
    small_space(monkeypatch)
    config = tiny(bandit={"evaluations_per_epoch": 2})
    path, summary = search(config, tmp_path / "run")
    log = lines(path / "bandit.jsonl")
    samples = [line for line in log if line["event"] == "sample"]
    trained = [line.get("trained", True) for line in samples]
    # None in the initial pass; then two after each trained path, before arms are abandoned.
    assert trained == [True] * 3 + [True, False, False] * 5
    assert [line["sample"] for line in samples] == list(range(18))
    assert sorted({line["sample"] for line in log if line["event"] == "abandon"}) == [12, 18]
    assert log[0]["evaluations_per_epoch"] == 2
    metrics = lines(path / "metrics.jsonl")
    assert [line["epoch"] for line in metrics] == list(range(8))
    assert [line["samples"] for line in metrics] == [1, 2, 3, 6, 9, 12, 15, 18]
    bandit = replay(log)
    assert (bandit.samples, bandit.trained) == (18, 8)
    assert bandit.count.sum(1).eq(18).all()
    # 1 batch to train, 1 to validate, statistics from 1 batch (there is no second one).
    cost = summary["cost"]
    assert (cost["epochs"], cost["paths_only_evaluated"]) == (8, 10)
    assert cost["images_trained"] == 8 * 24
    # The guard once: FGSM and PGD-5.
    assert cost["images_evaluated"] == 18 * 24 + 2 * 24 + 24 + 32
    assert cost["forward_passes"] == 8 * 2 + 18 * 3 + 10 * 2 + (3 + 7) + 1 * 2 + (1 + 2) * 4
    assert cost["seconds_total"] == pytest.approx(
        sum(cost[f"seconds_{p}"] for p in ("setup", "train", "validate", "statistics", "other"))
    )
    page = (path / "report.html").read_text()
    assert "10 more paths only evaluated" in page
    assert page.count("(search, only evaluated): clean") == 10
    # An interruption changes nothing, and no path but the trained ones changes the weights.
    out = tmp_path / "again"
    original, calls = SearchRun.evaluate_only, []

    def evaluate_only(self, number, paths):
        before = [p.clone() for p in self.supernet.parameters()]
        line = original(self, number, paths)
        assert all(map(torch.equal, before, self.supernet.parameters()))
        calls.append(number)
        if len(calls) == 3:
            raise StopError
        return line

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "evaluate_only", evaluate_only)
        with pytest.raises(StopError):
            search(config, out)
    assert calls == [3, 3, 4]
    search(config, out)
    for name in (*EXACT, "genotypes.jsonl"):
        assert (out / name).read_bytes() == (path / name).read_bytes(), name


def test_the_guard_changes_nothing_unless_it_finds_something(
    finished, short, tmp_path, monkeypatch
):
    path, _ = finished
    metrics = lines(path / "metrics.jsonl")
    checked = [line["epoch"] for line in metrics if line["overfitting"] is not None]
    assert checked == [4, 9, 14, 19, 24, 29]
    assert {line["attack_steps"] for line in metrics} == {1}
    assert all(not metrics[epoch]["overfitting"]["overfitted"] for epoch in checked)
    path, _ = short
    assert any(line["overfitting"] is not None for line in lines(path / "metrics.jsonl"))
    small_space(monkeypatch)
    off, summary = search(tiny(guard={"enabled": False}), tmp_path / "off")
    assert summary["overfitting"] == []
    assert (off / "bandit.jsonl").read_bytes() == (path / "bandit.jsonl").read_bytes()
    one, _ = load_tensors(path / "weights.safetensors", "supernet")
    two, _ = load_tensors(off / "weights.safetensors", "supernet")
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert yaml.safe_load((off / "config.yaml").read_text())["guard"]["enabled"] is False


@pytest.mark.parametrize("clip", ["image", "none"])
def test_the_attack_grows_when_the_shared_weights_overfit(clip, tmp_path, monkeypatch):
    """The third check is told to find something; the rest is real."""
    small_space(monkeypatch)
    config = tiny(guard={"every": 1}, attack={"clip": clip})
    original, evaluated = Adversarial._check, []

    def check(self, path, number):
        verdict = original(self, path, number)
        evaluated.append((number, self.threat.steps, self.reward_threat.steps))
        return Verdict(0.8, 0.1, 24, True) if number == 2 else verdict

    monkeypatch.setattr(Adversarial, "_check", check)
    notes = []

    class Notes(Progress):
        def note(self, text):
            notes.append(text)

    path, summary = search(config, tmp_path / "run", progress=Notes.silent())
    assert evaluated == [(n, 1, 1) for n in range(3)] + [(n, 2, 2) for n in range(3, 8)]
    (said,) = notes
    assert said.startswith(
        "catastrophic overfitting in epoch 3: accuracy 80.0 % under the training attack, 10.0 % "
        "under a stronger one; on with PGD-2, L-infinity, epsilon 0.2, step 0.125"
    )
    log = lines(path / "bandit.jsonl")
    (line,) = [line for line in log if line["event"] == "attack"]
    assert (line["epoch"], line["sample"], line["steps"]) == (2, 2, 2)
    assert summary["overfitting"] == [line]
    assert summary["threat"]["steps"] == 1
    assert replay(log).finished
    metrics = lines(path / "metrics.jsonl")
    assert [m["attack_steps"] for m in metrics] == [1, 1, 1] + [2] * 5
    # The path is credited with what is left under the stronger attack.
    samples = [line for line in log if line["event"] == "sample"]
    assert samples[2]["reward"] == metrics[2]["robust_accuracy"]
    # 8 trained, 8 validated and once again; as many guarded: FGSM and PGD-5, twice 24 images.
    assert summary["cost"]["images_evaluated"] == 9 * 24 + 8 * 2 * 24 + 24 + 32
    # An interruption after it changes nothing.
    interrupted(config, tmp_path / "again", 5, monkeypatch)
    search(config, tmp_path / "again")
    for name in (*EXACT, "genotypes.jsonl"):
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes(), name


def test_the_attack_of_a_search_does_not_grow_for_ever(tmp_path, monkeypatch):
    small_space(monkeypatch)
    found = Verdict(0.8, 0.1, 24, True)
    monkeypatch.setattr(Adversarial, "_check", lambda *arguments: found)
    path, summary = search(tiny(guard={"every": 1}), tmp_path / "run")
    steps = [line["attack_steps"] for line in lines(path / "metrics.jsonl")]
    assert steps == [1, 2, 4, 8, 8, 8, 8, 8]
    assert len(summary["overfitting"]) == 3


def test_divergence_is_said(tmp_path, monkeypatch):
    small_space(monkeypatch)
    with pytest.raises(DivergenceError, match=r"epoch \d+: the training loss is nan.*--learning"):
        search(tiny(learning_rate=1e30, grad_clip=None), tmp_path / "run")


def test_dry_run_measures_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_space(monkeypatch)
    result = dry_run(tiny())
    assert result["epochs"] == 8
    assert result["seconds_total"] == pytest.approx(
        result["seconds_setup"] + 8 * result["seconds_per_epoch"] + result["seconds_final"]
    )
    # Switched off.
    none = {"seconds_tuning", "seconds_network", "seconds_supernet", "seconds_alone"}
    times = {key: value for key, value in result.items() if key.startswith("seconds")}
    assert {key for key, value in times.items() if value == 0} == none
    assert result["peak_memory_mb_widest"] >= result["peak_memory_mb"] > 50
    assert list(tmp_path.iterdir()) == []


def test_dry_run_estimates_from_what_it_measured(monkeypatch):
    """The sum, with parts that are known: 3 + 2 (3 + 2) = 13 epochs."""
    small_space(monkeypatch)
    costs = iter([9.0, 1.0, 2.0, 3.0, 50.0])  # warm-up, an arm of each edge three times, widest
    seen = []

    def measure(current, choice):
        seen.append(choice)
        cost = next(costs)
        return {"train": cost, "validate": 0.5, "statistics": 0.25, "final": 4.0}

    monkeypatch.setattr(estimate, "_measure", measure)
    monkeypatch.setattr(estimate, "seconds_to_save", lambda state: 0.125)
    result = dry_run(tiny(bandit={"rounds": 2, "evaluations_per_epoch": 3}))
    assert torch.equal(seen[0], seen[1])
    assert torch.stack(seen[1:4]).sort(0).values.eq(torch.arange(3).unsqueeze(1)).all()
    assert result["epochs"] == 13
    # 2 trained, 0.5 validated, 3 more paths in 10 of 13 epochs, a checkpoint.
    assert result["seconds_per_epoch"] == pytest.approx(2 + 0.5 + 30 / 13 * 0.75 + 0.125)
    expected = result["seconds_setup"] + 13 * result["seconds_per_epoch"] + 4.0
    assert result["seconds_total"] == pytest.approx(expected)


def test_out_of_memory_suggests_a_batch_size_and_resumes(tmp_path, monkeypatch):
    """A limit on the address space, from the fourth epoch on, stands in for a full memory."""
    small_space(monkeypatch)
    settings = {**TINY, "init_channels": 24}
    file, out = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(settings))
    code = (
        SMALL_SPACE + "import resource, sys\n"
        "from fastbandit.search.loop import SearchRun\n"
        "original = SearchRun.epoch\n"
        "def epoch(self):\n"
        "    if self.bandit.trained == 3:\n"
        "        pages = int(open('/proc/self/statm').read().split()[0])\n"
        "        size = pages * resource.getpagesize() + 2**20\n"
        "        resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "    return original(self)\n"
        "SearchRun.epoch = epoch\n"
        f"sys.exit(search.main(['--config', {str(file)!r}, '--out', {str(out)!r}]))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        # The allocator gives freed memory back, so that it has to ask again.
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 1, result.stderr
    assert "search: error: out of memory in epoch 4 with batches of 24 images" in result.stderr
    assert "same command goes on from the last epoch" in result.stderr
    assert "--batch-size 12 --evaluation-batch-size 12, which needs about half" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(lines(out / "metrics.jsonl")) == 3
    search(merge(SearchConfig(), settings, "test"), out)
    whole, _ = search(merge(SearchConfig(), settings, "test"), tmp_path / "whole")
    for name in EXACT:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_errors_of_allocators(error, expected):
    assert is_out_of_memory(error) is expected


# --- the command ----------------------------------------------------------------------------


def test_precedence(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 0.2\nattack:\n  epsilon: 0.1\nbatch-size: 32\n")
    config = parse(
        [
            "--preset",
            "cifar10",
            f"--config={file}",
            "--attack.epsilon",
            "4/255",
            "--cutout_length=8",
        ]
    ).config
    assert config.name == "cifar10"  # preset
    assert config.learning_rate == 0.2  # file over preset
    assert config.batch_size == 32
    assert config.attack.epsilon == "4/255"  # flag over file
    assert config.cutout_length == 8
    assert config.flip
    assert not parse(["--preset", "cifar10", "--no-flip"]).config.flip
    assert parse(["--config", str(file)]).config.attack.epsilon == "0.1"


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset):
    config = parse(["--preset", preset]).config
    clean = preset in ("digits-binary", "mnist-binary")
    assert config.resolve().reward == ("clean" if clean else "robust")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "imagenet"], "--preset: expected one of digits, digits-full, smoke, mnist"),
        (["--attack.epsilon", "8"], "did you mean 8/255?"),
        (["--space", "robust12"], "robust12"),
        (
            ["--bandit.policy", "greedy"],
            "policy: expected one of detrended, hierarchical, printed",
        ),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--learning-rate", "nan"], "learning_rate: expected a positive number"),
        (["--train-portion", "1"], "train_portion: expected a share"),
        (["--device", "tpu"], "device: expected cpu, cuda"),
        (["--init-channels", "3"], "init_channels: expected an even number"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: cannot be read"),
        (["--resume", "/nowhere"], "/nowhere: not a run folder"),
        (["--bandit.rate", "0"], "rate"),
        (["--bandit.evaluations-per-epoch", "-1"], "evaluations_per_epoch: expected 0 or more"),
        (["--final.step-size", "x"], "step_size"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) != 0
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("search: error: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_other_libraries_are_settings(tmp_path):
    """numpy's scalars, tensors without dimensions and Fractions, in a search and a retraining."""
    config = SearchConfig(
        batch_size=np.int64(32),
        learning_rate=np.float32(0.1),
        attack=AttackConfig(epsilon=Fraction(8, 255), steps=torch.tensor(1)),
        final=FinalConfig(step_size=np.float64(0.01)),
    )
    plain = to_plain(config)
    assert (plain["batch_size"], plain["learning_rate"]) == (32, 0.1)
    assert plain["attack"]["epsilon"] == "8/255"
    assert type(plain["attack"]["steps"]) is int
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain
    attack = retrain.AttackConfig(epsilon=np.float64(0.1))
    again = to_plain(retrain.RetrainConfig(epochs=np.int32(2), attack=attack))
    assert yaml.safe_load(yaml.safe_dump(again)) == again


def test_unknown_flag(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--attack.epsilom", "1"])
    assert error.value.code == 2


def test_unknown_setting_in_a_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("attack:\n  epsilom: 0.1\n")
    with pytest.raises(ConfigError, match=r"unknown setting attack\.epsilom; did you mean"):
        parse(["--config", str(file)])
    file.write_text("batch_size: many\n")
    with pytest.raises(ConfigError, match=r"batch_size: .*integer.*got 'many'"):
        parse(["--config", str(file)])
    file.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping, got list"):
        parse(["--config", str(file)])


def test_print_config_is_a_config(capsys, tmp_path):
    assert main(["--preset", "mnist", "--seed", "3", "--print-config"]) == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    assert (
        parse(["--config", str(file)]).config
        == parse(["--preset", "mnist", "--seed", "3"]).config.resolve()
    )


def test_json_output_and_resume(short, capsys, tmp_path, monkeypatch):
    out = tmp_path / "run"
    small_space(monkeypatch)
    interrupted(tiny(), out, 6, monkeypatch)
    capsys.readouterr()
    assert main(["--resume", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["run"] == str(out)
    assert result["genotype_hash"] == short[1]["genotype_hash"]
    assert main(["--resume", str(out), "--json"]) == 0
    again = capsys.readouterr()
    assert "all is done" in again.err
    assert json.loads(again.out) == result
    assert main(["--resume", str(out), "--seed", "9"]) == 1
    assert "--resume takes its settings from the folder" in capsys.readouterr().err


def test_dry_run_command(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_space(monkeypatch)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    assert main(["--config", str(file), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for word in ("epochs", "8", "peak memory", "seconds per epoch", "whole command"):
        assert word in printed
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_full_disk_in_the_middle(tmp_path, capsys, short, monkeypatch):
    """A limit on the size of files stands in for the full disk: write() fails half-way."""
    path, _ = short
    small_space(monkeypatch)
    file, out = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(TINY))
    code = (
        SMALL_SPACE + "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from fastbandit.runs.folder import RunFolder\n"
        "saved = 0\n"
        "original = RunFolder.save_checkpoint\n"
        "def save(self, *rest):\n"
        "    global saved\n"
        "    saved += 1\n"
        "    if saved == 5:\n"
        "        resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))\n"
        "    original(self, *rest)\n"
        "RunFolder.save_checkpoint = save\n"
        f"sys.exit(search.main(['--config', {str(file)!r}, '--out', {str(out)!r}]))\n"
    )
    result = run("-c", code)
    assert result.returncode == 1
    assert "search: error: " in result.stderr
    assert "File too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(file.name for file in (out / "checkpoints").iterdir()) == [
        "latest.safetensors",
        "previous.safetensors",
    ]
    assert main(["--config", str(file), "--out", str(out)]) == 0
    for name in EXACT:
        assert (out / name).read_bytes() == (path / name).read_bytes(), name
