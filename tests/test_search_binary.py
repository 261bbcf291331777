"""Searches of spaces of 1-bit networks: child and parent, both algorithms, resume, report."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from _tiny import tiny

from fastbandit import latency
from fastbandit import space as spaces
from fastbandit.bandit import replay
from fastbandit.childparent import ChildParent, score
from fastbandit.childparent import replay as replay_child_parent
from fastbandit.config import ConfigError, merge
from fastbandit.genotype import Genotype
from fastbandit.latency import LatencyTable
from fastbandit.models import load_model
from fastbandit.nn.binary import latents
from fastbandit.nn.network import Network
from fastbandit.operations import OperationOptions
from fastbandit.retrain import retrain
from fastbandit.search import SearchConfig, search
from fastbandit.search.child_parent import ChildParentTrial
from fastbandit.search.networks import retrain_config
from fastbandit.search.sizes import Images, Sizes

EXACT = ("genotype.json", "bandit.jsonl", "weights.safetensors")


def settings(**changes):
    """Three operations, T = 1, three cells: 3 + 2 = 5 paths of one batch each."""
    base = {
        "space": "binary7",
        "layers": 3,
        "algorithm": "cp-nas",
        "attack": {"steps": 0},
        "bandit": {"rounds": 3},
        "cp": {"rounds": 1},
    }
    return merge(tiny(**base), changes, "test")


@pytest.fixture(scope="module", autouse=True)
def small_space():
    names = ("skip_connect", "max_pool_3x3", "bin_sep_conv_3x3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(spaces.SPACES, "binary7", names)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return search(settings(), tmp_path_factory.mktemp("search") / "run")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_is_that_of_algorithm_9(finished):
    path, summary = finished
    log = lines(path / "bandit.jsonl")
    assert log[0]["algorithm"] == "cp-nas"
    assert (log[0]["rounds"], log[0]["beta"], log[0]["gap"]) == (1, 0.5, "reward")
    samples = [line for line in log if line["event"] == "sample"]
    assert len(samples) == 5 == summary["cost"]["epochs"]
    for line in samples:
        z = score(line["child_accuracy"], line["parent_accuracy"])
        assert line["reward"] == pytest.approx(z)
        assert line["child_accuracy"] == line["clean_accuracy"]
    # In a repetition every edge goes through its arms.
    for row in range(28):
        assert sorted(line["choice"][row] for line in samples[:3]) == [0, 1, 2]
        assert len({line["choice"][row] for line in samples[3:]}) == 2
    bandit = replay_child_parent(log)
    genotype = Genotype.load(path / "genotype.json")
    operations = spaces.SPACES["binary7"]
    chosen = [operations[arm] for arm in bandit.final().tolist()]
    assert [op for cell in genotype.cells for _, _, op in cell.edges] == chosen
    assert (genotype.inputs, genotype.macro.layers) == (2, 3)
    assert genotype.options.preprocess == "binary"
    assert genotype.search.model_dump()["policy"] == "cp-nas"


def test_parent_and_child_see_the_same_batches(finished):
    """Both are in the metrics and in the summary, and both have learnt something else."""
    path, summary = finished
    metrics = lines(path / "metrics.jsonl")
    assert len(metrics) == 5
    for line in metrics:
        assert {"loss", "parent_loss", "child_accuracy", "parent_accuracy"} <= set(line)
        assert line["loss"] != line["parent_loss"]
    assert set(summary["parent"]) == {"final", "test"}
    assert summary["parent"]["test"]["n"] == summary["test"]["n"] == 32
    assert summary["child_parent"] == {
        "algorithm": "cp-nas", "parent": True, "beta": 0.5, "gap": "reward", "weights": "separate",
    }  # fmt: skip
    # A step of training and the evaluation after it, for each of the two.
    assert summary["cost"]["images_trained"] == 2 * 5 * 24


def test_the_report_shows_scores_and_cells(finished):
    page = (finished[0] / "report.html").read_text()
    assert "normal cell" in page
    assert "reduction cell" in page
    assert "smallest mean score of the round" in page
    assert "cannot be drawn" not in page
    assert "left out" not in page


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["separate", "latent"])
def test_an_interrupted_search_goes_on_to_the_same_bytes(weights, tmp_path, monkeypatch):
    names = ("max_pool_3x3", "bin_sep_conv_3x3")
    monkeypatch.setitem(spaces.SPACES, "binary7", names)
    config = settings(cp={"weights": weights}, final={"tune_epochs": 1})
    whole, _ = search(config, tmp_path / "whole")
    real = ChildParentTrial.train

    for stop in (1, 2):  # the second path, and the epoch after the last pruning

        def stopping(self, path, number, rate, samples, stop=stop):
            if number == stop:
                raise KeyboardInterrupt
            return real(self, path, number, rate, samples)

        monkeypatch.setattr(ChildParentTrial, "train", stopping)
        with pytest.raises(KeyboardInterrupt):
            search(config, tmp_path / "run")
    monkeypatch.setattr(ChildParentTrial, "train", real)
    path, summary = search(config, tmp_path / "run")
    for name in EXACT:
        assert (path / name).read_bytes() == (whole / name).read_bytes(), name
    other = json.loads((whole / "summary.json").read_text())
    assert summary["parent"] == other["parent"]
    assert summary["final"] == other["final"]


@pytest.mark.slow
def test_a_bandit_is_credited_with_z(tmp_path, monkeypatch):
    """Any policy may drive such a space; without a parent z is the child's accuracy."""
    changes = {"algorithm": "anti-bandit", "bandit": {"rounds": 1}, "attack": {"steps": 1}}
    changes["guard"] = {"enabled": False}
    names = ("max_pool_3x3", "bin_sep_conv_3x3")
    monkeypatch.setitem(spaces.SPACES, "binary7", names)
    path, summary = search(settings(**changes, cp={"rounds": 3, "beta": 0.25}), tmp_path / "run")
    log, metrics = lines(path / "bandit.jsonl"), lines(path / "metrics.jsonl")
    assert replay(log).samples == 2 + 2
    samples = [line for line in log if line["event"] == "sample"]
    for line, row in zip(samples, metrics, strict=True):
        assert "child_accuracy" not in line
        child, parent = row["child_accuracy"], row["parent_accuracy"]
        assert line["reward"] == pytest.approx(score(child, parent, beta=0.25))
        assert child == row["robust_accuracy"]
    assert summary["reward"] == "robust"


@pytest.mark.slow
def test_the_network_found_is_trained_with_latents_within_one(tmp_path, monkeypatch):
    monkeypatch.setitem(spaces.SPACES, "binary7", ("max_pool_3x3", "bin_sep_conv_3x3"))
    config = settings(cp={"parent": False}, final={"network_epochs": 1, "random_networks": 0,
                                                   "reference": False})  # fmt: skip
    path, summary = search(config, tmp_path / "run")
    assert "parent" not in summary
    (row,) = summary["networks"]
    genotype = Genotype.load(path / "genotype.json")
    model = load_model(path / "networks" / "found")
    assert sum(p.numel() for p in model.network.parameters()) == row["parameters"]
    assert len(model.network.cells) == 3
    assert model.genotype.hash == genotype.hash
    weights = list(latents(model.network))
    assert weights
    assert max(weight.abs().max() for weight in weights) <= 1
    # With a rate that throws weights about, the bound is what keeps them.
    fast = merge(retrain_config(config, "fast"), {"learning_rate": 50.0, "grad_clip": None}, "test")
    retrain(fast, tmp_path / "fast", genotype=genotype)
    model = load_model(tmp_path / "fast")
    largest = max(weight.abs().max() for weight in latents(model.network))
    assert largest == 1
    assert model.network.stem.weight.abs().max() > 1


def test_sizes_are_those_of_the_networks():
    """Of a space with types of cell that are several times in the chain, and ``zero`` first."""
    searched = spaces.get("binary8", cells=5)
    options = OperationOptions(preprocess="binary")
    sizes = Sizes(searched, 4, options, Images((1, 8, 8), 10))
    choice = torch.randint(8, (28,), generator=torch.Generator().manual_seed(0)).tolist()
    genotype = Genotype.from_choices(searched, choice, options=options)
    network = Network(genotype, in_channels=1, classes=10, channels=4, cells=5)
    assert sizes.of(genotype).parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": "general7-light", "cp": {"rounds": 3}}, "cp-nas with general7-light"),
        (
            {"space": "general7-light", "algorithm": "anti-bandit", "cp": {"rounds": 2}},
            "cp.rounds: expected 3 in a space without 1-bit operations",
        ),
        (
            {
                "space": "general7-light",
                "algorithm": "anti-bandit",
                "cp": {"rounds": 3},
                "binary": {"alpha": "layer"},
            },
            "binary.alpha: expected 'filter' in a space without",
        ),
        ({"bandit": {"rounds": 2}}, "bandit: expected the defaults with algorithm cp-nas"),
        ({"parameters": "1k:2k"}, "parameters: expected none with algorithm cp-nas"),
        ({"cp": {"parent": False, "beta": 0.9}}, "cp.beta, cp.gap: expected their defaults"),
        ({"algorithm": "anti-bandit"}, "cp.rounds: expected 3 with algorithm anti-bandit"),
        (
            {"algorithm": "anti-bandit", "cp": {"rounds": 3, "gap": "penalty"}},
            r"expected a score in \[0, 1\], as policy printed asks for",
        ),
        ({"rewards": "alone"}, "rewards: expected shared in a space of 1-bit operations"),
        ({"layers": 2}, "expected 3 or more in the chain"),
        ({"cp": {"rounds": 0}}, "cp.rounds: expected 1 or more"),
    ],
)
def test_settings_that_exclude_each_other(changes, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        settings(**changes)


def test_defaults_of_other_searches_are_as_they_were():
    options = OperationOptions.of(SearchConfig())
    assert options == OperationOptions()
    assert OperationOptions.of(settings()).preprocess == "binary"
    assert OperationOptions.of(settings(binary={"preprocess": "full", "ste": "tanh"})) == (
        OperationOptions(ste="tanh")
    )


# -- Latency in the score -------------------------------------------------------------------------


def test_the_score_loses_what_the_packed_network_takes(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTBANDIT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "_known", {})
    config = settings(cp={"rounds": 1, "latency_weight": 0.25})
    path, summary = search(config, tmp_path / "run")
    assert summary["child_parent"]["latency_weight"] == 0.25
    kept = merge(SearchConfig(), yaml.safe_load((path / "config.yaml").read_text()), "run")
    table = LatencyTable.parse(kept.timing.table)
    searched = kept.search_space()
    shape = [int(side) for side in json.loads(table.subject)["images"]]
    edges = table.edges(searched, kept.init_channels, shape[1:])
    mean = table.base + edges.double().mean(1).sum().item()
    samples = [line for line in lines(path / "bandit.jsonl") if line["event"] == "sample"]
    assert len(samples) == 5
    for line in samples:
        taken = table.base + sum(edges[row, arm].item() for row, arm in enumerate(line["choice"]))
        assert line["penalty"] == pytest.approx(0.25 * taken / mean)
        z = score(line["child_accuracy"], line["parent_accuracy"])
        assert line["reward"] == pytest.approx(z - line["penalty"])
    assert len({line["penalty"] for line in samples}) > 1
    # The log explains itself, and not with another penalty.
    log = lines(path / "bandit.jsonl")
    assert replay_child_parent(log).samples == 5
    log[1]["penalty"] += 0.5
    with pytest.raises(ValueError, match="reward"):
        replay_child_parent(log)
    # Another run of these settings draws and credits the same, whatever this machine does by then.
    again, _ = search(kept, tmp_path / "again")
    assert (again / "bandit.jsonl").read_bytes() == (path / "bandit.jsonl").read_bytes()


def test_latency_in_the_score_is_for_cp_nas():
    with pytest.raises(ConfigError, match=r"cp.latency_weight: expected 0 with anti-bandit"):
        settings(algorithm="anti-bandit", cp={"rounds": 1, "latency_weight": 0.1})
    with pytest.raises(ConfigError, match=r"cp.latency_weight"):
        settings(cp={"rounds": 1, "latency_weight": -0.1})


def test_a_penalty_is_taken_off_the_score():
    bandit = ChildParent(1, 2, rounds=1, beta=0.5)
    first = bandit.sample()
    assert bandit.credit(first, 0.5, 0.7, 0.25) == pytest.approx(0.35)
    assert bandit.mean[0, first[0]].item() == pytest.approx(0.35)
    second = bandit.sample()
    for penalty in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="credit: penalty: expected a finite number >= 0"):
            bandit.credit(second, 0.5, 0.5, penalty)
    assert bandit.credit(second, 0.34, 0.34) == pytest.approx(0.34)
    # Without the penalty the other one would have gone.
    assert bandit.prune().tolist() == second.tolist()
