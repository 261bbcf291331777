"""Searches on two processes of one machine with Gloo: what they share, and when one goes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from _processes import run_pair
from _ranks import CONFIG, batchnorm_case, configure, first_epochs
from _tiny import small_space
from safetensors.torch import load_file

from fastbandit.bandit import replay
from fastbandit.config import ConfigError, to_plain
from fastbandit.distributed import Group, Team
from fastbandit.runs.environment import run_id
from fastbandit.search import main, parse, search

SCRIPT = str(Path(__file__).with_name("_ranks.py"))


def torchrun(*arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         SCRIPT, *arguments],
        capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """What two processes under torchrun computed; see _ranks.checks."""
    folder = tmp_path_factory.mktemp("ranks")
    done = torchrun("checks", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def in_the_small_space(monkeypatch):
    small_space(monkeypatch)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc")
def test_the_threads_of_a_group_end_with_it(checked):
    """Those left when the interpreter ends can abort the process after a finished run.

    The processes are fresh interpreters: what a first optimiser imports within the group, a server
    that has loaded torch's compiler would have imported before it.
    """
    for rank in range(2):
        within, after = json.loads((checked / f"threads{rank}.json").read_text())
        assert within
        assert after == []


def both(folder, name):
    return [load_file(folder / f"{name}{rank}.safetensors") for rank in range(2)]


@pytest.mark.parametrize(("size", "paths"), [(1, 1), (2, 1), (3, 1), (3, 2), (5, 2), (4, 4)])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 64])
def test_every_image_belongs_to_one_member(size, paths, n):
    ranks = [Group(rank, size, rank, torch.device("cpu")) for rank in range(size)]
    teams = [Team(group, paths) for group in ranks]
    for path in range(paths):
        members = [team for team in teams if team.path == path]
        assert len(members) == members[0].size
        assert [team.leads for team in members] == [True] + [False] * (len(members) - 1)
        assert sum(team.weight(n) for team in members) == pytest.approx(1)
        images = [i for team in members for i in range(n)[team.share(n)]]
        assert images == list(range(n))
        counted = [i for team in members if team.counts(n) for i in range(n)[team.part(n)]]
        assert counted == list(range(n))
        # Batch norm: two images or the whole batch.
        assert all(len(range(n)[team.part(n)]) >= min(n, 2) for team in members)


@pytest.mark.slow
def test_batch_statistics_of_all_processes(checked):
    whole, parts = batchnorm_case(), both(checked, "batchnorm")
    for name in ("y", "x_grad"):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), whole[name])
    for name in ("weight_grad", "bias_grad"):
        torch.testing.assert_close(parts[0][name] + parts[1][name], whole[name])
    for name in ("mean", "var"):
        assert torch.equal(parts[0][name], parts[1][name])
        torch.testing.assert_close(parts[0][name], whole[name])


@pytest.mark.slow
def test_gradients_are_means_over_the_paths_that_use_a_parameter(checked):
    for found in both(checked, "mean"):
        assert found["a"].eq(1.0).all()
        assert found["b"].eq(15.0).all()
        assert found["c"].eq(2.0).all()


@pytest.mark.slow
def test_data_parallel_is_one_process_up_to_rounding(checked, tmp_path, in_the_small_space):
    """Three epochs; batches that two do not divide, and one too small to be divided."""
    alone = first_epochs(configure(sync_batchnorm=True), tmp_path / "alone", 3)
    expected = alone.supernet.state_dict()
    for found in both(checked, "data"):
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-7, atol=1e-9)
    logs = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "alone", checked / "data")
    ]
    for one, two in zip(*logs, strict=True):
        for name in ("loss", "train_accuracy", "clean_accuracy", "robust_accuracy"):
            assert two[name] == pytest.approx(one[name], rel=1e-9), name


@pytest.mark.slow
def test_paths_in_parallel(checked):
    first, second = both(checked, "paths")
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    folder = checked / "paths"
    log = [json.loads(line) for line in (folder / "bandit.jsonl").read_text().splitlines()]
    bandit = replay(log)
    assert bandit.finished
    for name in ("mean", "count", "alive"):
        assert torch.equal(first[f"bandit.{name}"], getattr(bandit, name))
    # Two at a time, the rest of a round alone: 2 + 1 initial, 2 + 1 with 3 arms, 2 with 2.
    trained = [line.get("trained", True) for line in log if line["event"] == "sample"]
    two, one = [True, True, False, False], [True, False]
    assert trained == [True] * 3 + two + one + two
    assert [line["sample"] for line in log if line["event"] == "abandon"][::6] == [9, 13]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == list(range(8))
    assert [line["samples"] for line in metrics] == [2, 2, 3, 7, 7, 9, 13, 13]
    # Paths of one round are trained on their own batches, and have their own loss.
    assert len({line["loss"] for line in metrics}) == 8
    cost = json.loads((folder / "summary.json").read_text())["cost"]
    assert (cost["epochs"], cost["paths_only_evaluated"], cost["processes"]) == (8, 5, 2)
    # Counted once, whoever computed it: as one process would have it. 2 batches each.
    assert cost["images_trained"] == 8 * 24
    # The guard looks at both paths of epochs 3 and 4: FGSM and PGD-5.
    assert cost["images_evaluated"] == 13 * 24 + 2 * 2 * 24 + 24 + 33
    statistics, guard = (5 + 1) * 2 * 2, 2 * 2 * (3 + 7)
    expected = 8 * 2 * 2 + 13 * 2 * 3 + statistics + guard + 2 * 3 + 2 * 3
    assert cost["forward_passes"] == expected
    # Each edge tried each arm once at first, also two at a time.
    choices = [line["choice"] for line in log if line["event"] == "sample"][:3]
    assert all(sorted(row) == [0, 1, 2] for row in zip(*choices, strict=True))


def test_networks_of_several_processes(checked):
    """Tuning and the training from scratch are shared too, and counted once."""
    first, second = (
        json.loads((checked / f"networks{rank}.json").read_text()) for rank in range(2)
    )
    assert first == second
    rows = first["networks"]
    assert [row["name"] for row in rows] == ["reference", "found", "random-1"]
    assert first["cost"]["epochs_tuning"] == 1
    for row in rows:
        assert row["n"] == 33
        folder = checked / "networks" / row["folder"]
        split = json.loads((folder / "split.json").read_text())
        assert row["images_trained"] == len(split["weights"]) > 24
        stored = json.loads((folder / "summary.json").read_text())
        assert stored["test"]["robust_accuracy"] == row["robust_accuracy"]
        assert stored["cost"]["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["data", "paths"])
def test_a_process_that_dies_ends_the_run_and_it_resumes_alone(
    parallel, tmp_path, in_the_small_space
):
    file, out = tmp_path / "tiny.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump({**CONFIG, "parallel": parallel}))
    arguments = ["--config", str(file), "--out", str(out)]
    first, second = run_pair(
        SCRIPT, "search", *arguments, environment={**os.environ, "DIE_AT": "4"}
    )
    assert second.returncode == -9
    assert second.stderr == ""
    assert first.returncode == 1
    assert first.stdout == ""
    (said,) = [line for line in first.stderr.splitlines() if "error" in line]
    assert said.startswith("search: error: rank 0 of 2: another process of this run ended")
    assert said.endswith(
        "the same command goes on from the last checkpoint, also with another number of processes"
    )
    assert "Traceback" not in first.stderr
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert done >= 4
    assert main(arguments) == 0
    epochs = [json.loads(line)["epoch"] for line in (out / "metrics.jsonl").open()]
    assert epochs == list(range(8))
    assert json.loads((out / "summary.json").read_text())["status"] == "finished"


def test_an_error_of_all_processes_is_said_once(tmp_path):
    data, out = str(tmp_path / "nothing"), str(tmp_path / "run")
    found = run_pair(SCRIPT, "search", "--data", data, "--out", out, "--final.tournament", "0")
    assert all(done.returncode == 1 for done in found)
    said = [line for done in found for line in done.stderr.splitlines() if "error" in line]
    assert len(said) == 1
    assert "nothing" in said[0]


def test_settings(tmp_path):
    # The mode is part of what a run is, the number of processes is not.
    ids = {
        run_id(to_plain(configure(**changes).resolve()))
        for changes in ({}, {"parallel": "paths"}, {"sync_batchnorm": True})
    }
    assert len(ids) == 3
    assert parse(["--parallel", "paths"]).config.parallel == "paths"
    assert parse(["--sync-batchnorm"]).config.sync_batchnorm
    with pytest.raises(ConfigError, match="sync_batchnorm: expected no with parallel paths"):
        parse(["--config", str(write(tmp_path, {"parallel": "paths", "sync_batchnorm": True}))])
    group = Group(0, 2, 0, torch.device("cpu"))
    with pytest.raises(ConfigError, match="one GPU"):
        search(configure(device="cpu:0"), tmp_path / "run", group=group)


def write(folder, settings):
    file = folder / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file
