"""What follows the last pruning: tuning, and networks trained from scratch to compare with."""

from __future__ import annotations

import json

import pytest
import torch
from _tiny import TINY, small_space
from _tiny import tiny as smallest
from safetensors.torch import load_file

from fastbandit import retrain as retraining
from fastbandit import space
from fastbandit.bandit import replay
from fastbandit.config import ConfigError, merge
from fastbandit.data import load
from fastbandit.genotype import Genotype
from fastbandit.models import load_model
from fastbandit.nn.network import Network
from fastbandit.operations import OperationOptions
from fastbandit.report import write_report
from fastbandit.retrain import loop as retrain_loop
from fastbandit.runs.progress import Progress
from fastbandit.search import SearchConfig, adversarial, dry_run, main, networks, parse, search
from fastbandit.search import __main__ as module
from fastbandit.search.adversarial import Adversarial
from fastbandit.search.sizes import edge_parameters, edges_of
from fastbandit.study import StudyConfig
from fastbandit.study.config import PRESETS as STUDIES
from fastbandit.training.overfitting import Verdict

# With networks trained from scratch, and tuning before them.
FINAL = {**TINY["final"], "tune_epochs": 2, "network_epochs": 2}
NAMES = ["reference", "found", "random-1"]


def tiny(**changes) -> SearchConfig:
    return merge(smallest(final=FINAL), changes, "test")


@pytest.fixture(autouse=True)
def in_the_small_space(monkeypatch):
    small_space(monkeypatch)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        small_space(patch)
        return search(tiny(), tmp_path_factory.mktemp("networks") / "run")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def parameters(genotype):
    network = Network(genotype, in_channels=1, classes=10, channels=2, cells=len(genotype.cells))
    return sum(p.numel() for p in network.parameters())


# --- tuning ---------------------------------------------------------------------------------


def test_the_found_path_is_trained_after_the_last_pruning(tmp_path, monkeypatch):
    original, trained = Adversarial.train, []

    def train(self, path, number, *rest):
        trained.append((number, {id(p) for p in path.parameters}, self))
        return original(self, path, number, *rest)

    monkeypatch.setattr(Adversarial, "train", train)
    path, summary = search(tiny(final={"network_epochs": 0}), tmp_path / "run")
    assert [number for number, *_ in trained] == list(range(10))
    supernet = trained[-1][2].supernet
    choice = json.loads((path / "bandit.jsonl").read_text().splitlines()[-1])["choice"]
    supernet.set_path(torch.tensor(choice))
    found = {id(p) for p in supernet.path_parameters()}
    assert trained[8][1] == trained[9][1] == found
    metrics = lines(path / "metrics.jsonl")
    assert [line["phase"] for line in metrics[7:]] == ["search", "tuning", "tuning"]
    assert [line["epoch"] for line in metrics] == list(range(10))
    # From the rate at the beginning of the search down a half cosine to 0.
    assert [line["learning_rate"] for line in metrics[8:]] == pytest.approx([0.025, 0.0125])
    assert (summary["cost"]["epochs"], summary["cost"]["epochs_tuning"]) == (8, 2)
    # The bandit knows nothing of it.
    assert replay(lines(path / "bandit.jsonl")).samples == 8
    assert summary["networks"] == []


def test_without_tuning_it_is_the_printed_algorithm(tmp_path):
    """The bandit's log and the genotype are the same; the weights are not."""
    off = {"tune_epochs": 0, "network_epochs": 0}
    with_tuning, _ = search(tiny(final={"network_epochs": 0}), tmp_path / "with")
    without, _ = search(tiny(final=off), tmp_path / "without")
    same = [(p / "bandit.jsonl").read_bytes() for p in (with_tuning, without)]
    assert same[0] == same[1]
    assert len(lines(without / "metrics.jsonl")) == 8
    one, two = (load_file(p / "weights.safetensors") for p in (with_tuning, without))
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_overfitting_while_tuning(tmp_path, monkeypatch):
    original = Adversarial._check

    def check(self, path, number):
        found = original(self, path, number)
        return Verdict(0.8, 0.1, 24, True) if number == 8 else found

    monkeypatch.setattr(Adversarial, "_check", check)
    path, summary = search(tiny(final={"network_epochs": 0}), tmp_path / "run")
    assert [line["attack_steps"] for line in lines(path / "metrics.jsonl")] == [1] * 9 + [2]
    assert [line["epoch"] for line in summary["overfitting"]] == [8]
    assert replay(lines(path / "bandit.jsonl")).finished


# --- networks from scratch ------------------------------------------------------------------


def test_the_summary_compares_networks_trained_alike(finished):
    path, summary = finished
    rows = {row["name"]: row for row in summary["networks"]}
    assert list(rows) == NAMES
    assert rows["found"]["genotype_hash"] == summary["genotype_hash"]
    assert len({row["genotype_hash"] for row in rows.values()}) == 3
    for name, row in rows.items():
        stored = json.loads((path / "networks" / name / "summary.json").read_text())
        assert stored["test"]["clean_accuracy"] == row["clean_accuracy"]
        assert stored["test"]["robust_accuracy"] == row["robust_accuracy"]
        assert (row["epochs"], row["n"], row["split"]) == (2, 32, "test")
        model = load_model(path / row["folder"])
        assert model.genotype.hash == row["genotype_hash"]
        assert sum(p.numel() for p in model.network.parameters()) == row["parameters"]
    assert {row["attack"] for row in rows.values()} == {summary["test"]["attack"]}
    counts = torch.bincount(load("digits").test.limit(32).labels)
    assert summary["chance"] == counts.max().item() / 32
    # The search's own ledger does not hold their cost.
    cost = summary["cost"]
    assert cost["images_trained"] == (8 + 2) * 24
    phases = [v for k, v in cost.items() if k.startswith("seconds_") and k != "seconds_total"]
    assert cost["seconds_total"] == pytest.approx(sum(phases))


def test_the_random_network_has_the_size_of_the_found_one(finished):
    path, summary = finished
    found = Genotype.load(path / "genotype.json")
    for number in (1, 2):
        other = networks.same_size(found, tiny(), number)
        assert other.hash != found.hash
        assert parameters(other) == pytest.approx(parameters(found), rel=0.02)
    one, two = (networks.same_size(found, tiny(), number).hash for number in (1, 2))
    assert one != two
    (row,) = [row for row in summary["networks"] if row["name"] == "random-1"]
    assert row["genotype_hash"] == one


@pytest.mark.parametrize("edges", ["all", "1"])
def test_sizes_are_those_of_the_networks(edges):
    """Differences, since stem, preprocessing and classifier are the same for all."""
    config = tiny(edges_per_node=edges, space="robust9")
    searched = space.get(config.space)
    table = edge_parameters(searched, config.init_channels, OperationOptions.of(config))
    first, *others = (networks.random_genotype(config, "test", i) for i in range(4))
    sizes = [edges_of(one, searched, table) for one in (first, *others)]
    assert len(set(sizes)) > 1
    for other, size in zip(others, sizes[1:], strict=True):
        assert size - sizes[0] == parameters(other) - parameters(first)


def test_a_random_network_is_drawn_uniformly():
    config = tiny(space="robust9-light")
    drawn = [networks.random_genotype(config, "test", i) for i in range(20)]
    text = "".join(json.dumps(one.to_dict()) for one in drawn)
    names = space.get("robust9-light").operations
    # 1200 edges, 133 for each operation; the standard deviation is 11.
    assert all(85 < text.count(f'"{name}"') < 185 for name in names)
    assert drawn[3] == networks.random_genotype(config, "test", 3)


def test_settings_of_the_training_from_scratch():
    def made(**changes):
        return networks.retrain_config(tiny(**changes), "found")

    config = made()
    assert (config.epochs, config.init_channels, config.layers) == (2, 2, 2)
    assert (config.method, config.attack.epsilon, config.final.steps) == ("fgsm", "0.2", 2)
    assert (config.train_limit, config.test_limit, config.batch_size) == (48, 32, 24)
    assert made(attack={"steps": 3}).method == "pgd"
    assert made(attack={"steps": 3}).training_threat().steps == 3
    clean = made(attack={"steps": 0})
    assert (clean.method, clean.training_threat().steps) == ("clean", 0)
    assert made(attack={"epsilon": "0"}).method == "clean"
    assert made(flip=True, crop_padding=2).flip
    # The learning rate of a supernet is not that of a network.
    assert config.learning_rate == retraining.RetrainConfig().learning_rate


class StopError(Exception):
    pass


def stopped(config, out, after, monkeypatch):
    """A search that ends with an error when ``after`` epochs of any kind are trained."""
    count = 0

    def counting(original):
        def train_epoch(*arguments, **options):
            nonlocal count
            if count == after:
                raise StopError
            count += 1
            return original(*arguments, **options)

        return train_epoch

    with monkeypatch.context() as patch:
        for where in (adversarial, retrain_loop):
            patch.setattr(where, "train_epoch", counting(where.train_epoch))
        with pytest.raises(StopError):
            search(config, out)


# 2 epochs of the reference, 8 of the search, 2 of tuning, 2 of each of the other networks.
@pytest.mark.parametrize("after", [1, 2, 11, 15])
def test_an_interruption_at_any_stage_changes_nothing(after, finished, tmp_path, monkeypatch):
    path, expected = finished
    out = tmp_path / "run"
    stopped(tiny(), out, after, monkeypatch)
    _, summary = search(tiny(), out)
    names = ["genotype.json", "bandit.jsonl", "weights.safetensors"]
    names += [f"networks/{name}/model-best.safetensors" for name in NAMES]
    for name in names:
        assert (out / name).read_bytes() == (path / name).read_bytes(), name
    for row, other in zip(summary["networks"], expected["networks"], strict=True):
        for key in ("name", "genotype_hash", "clean_accuracy", "robust_accuracy", "images_trained"):
            assert row[key] == other[key]
    assert summary["final"] == expected["final"]


def test_what_another_configuration_left_is_replaced(finished, tmp_path):
    out = tmp_path / "run"
    search(tiny(seed=1), out)
    stray = out / "networks" / "random-2"
    (out / "networks" / "random-1").rename(stray)
    _, summary = search(tiny(), out, force=True)
    assert not stray.exists()
    assert [row["robust_accuracy"] for row in summary["networks"]] == [
        row["robust_accuracy"] for row in finished[1]["networks"]
    ]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"network_epochs": 0}, []),
        ({"reference": False, "random_networks": 2}, ["found", "random-1", "random-2"]),
        ({"random_networks": 0}, ["reference", "found"]),
    ],
)
def test_which_networks_are_trained(settings, names, tmp_path):
    config = tiny(final={**settings, "tune_epochs": 0})
    if settings.get("network_epochs") is None:
        config = merge(config, {"final": {"network_epochs": 1}}, "test")
    path, summary = search(config, tmp_path / "run")
    assert [row["name"] for row in summary["networks"]] == names
    folder = path / "networks"
    assert sorted(names) == (sorted(p.name for p in folder.iterdir()) if names else [])


def test_the_dry_run_foretells_them():
    few = dry_run(tiny(final={"network_epochs": 0, "tune_epochs": 0}))
    assert (few["networks"], few["seconds_tuning"], few["seconds_network"]) == (0, 0, 0)
    all_of_it = dry_run(tiny(final={"random_networks": 2}))
    assert all_of_it["networks"] == 4
    assert min(all_of_it["seconds_network"], all_of_it["seconds_tuning"]) > 0
    parts = ("setup", "tuning", "final")
    assert all_of_it["seconds_total"] == pytest.approx(
        sum(all_of_it[f"seconds_{part}"] for part in parts)
        + 8 * all_of_it["seconds_per_epoch"]
        + 4 * all_of_it["seconds_network"]
    )


# --- what is said ---------------------------------------------------------------------------


def test_the_command_says_what_the_networks_reach(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(module.PRESETS, "smoke", {**TINY, "final": FINAL})
    assert main(["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    printed, shown = capsys.readouterr()
    rows = json.loads((tmp_path / "run" / "summary.json").read_text())["networks"]
    by_name = {row["name"]: row for row in rows}
    text = printed.splitlines()
    assert text[0].startswith("search finished: 8 epochs")
    assert text[1].startswith("trained from scratch, 2 epochs each")
    labels = [("found", "found network"), ("random-1", "random network, same size")]
    labels.append(("reference", "random network, any size"))
    for line, (name, label) in zip(text[2:5], labels, strict=True):
        row = by_name[name]
        robust = f"{100 * row['robust_accuracy']:.2f} %"
        assert line.split() == [
            *label.split(),
            f"{row['parameters']:,}",
            f"{100 * row['clean_accuracy']:.2f}",
            "%",
            *robust.split(),
        ]
    assert text[5].split()[:2] == ["chance", "(the"]
    assert "shared weights, which do not judge an architecture" in printed
    assert text[-1] == f"run folder: {tmp_path / 'run'}"
    # The first result is there before the search begins.
    first = shown.index("random network, any size, trained from scratch")
    assert first < shown.index("search begins")


def test_json_holds_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(module.PRESETS, "smoke", {**TINY, "final": FINAL})
    assert main(["--preset", "smoke", "--out", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["networks"]] == NAMES
    assert 0 < found["chance"] < 1


def test_the_report_begins_with_them(finished, tmp_path):
    path, summary = finished
    page = write_report(path, tmp_path / "page.html").read_text()
    first = page.index('<section id="networks">')
    assert first < page.index('<section id="figures">')
    for row in summary["networks"]:
        assert f"{100 * row['robust_accuracy']:.2f} %" in page[first:]
    assert "always the most frequent class" in page


def test_the_report_of_a_search_in_progress_has_the_first_network(tmp_path, monkeypatch):
    stopped(tiny(), tmp_path / "run", 5, monkeypatch)
    page = write_report(tmp_path / "run", tmp_path / "page.html").read_text()
    assert "random network, any size" in page
    assert "found network" not in page
    assert "the search is not finished" in page


def test_the_default_is_the_preset_of_minutes():
    assert parse([]).config == parse(["--preset", "digits"]).config
    assert parse([]).config.bandit.rounds == 1
    assert parse(["--preset", "digits-full"]).config.bandit.rounds == 3
    assert parse(["--bandit.rounds", "2"]).config.bandit.rounds == 2


def test_the_default_is_what_was_shown_to_beat_chance():
    shown = STUDIES["compare-digits"]
    config = parse([]).config
    assert f"{config.bandit.policy},mixes={config.bandit.mixes}" == shown["compare"]["policy"]
    for name in ("layers", "train_limit", "parameters"):
        assert getattr(config, name) == shown["search"][name]
    for name in ("tournament", "train_portion", "step_size"):
        assert getattr(config.final, name) == shown["search"]["final"][name]
    assert config.attack.epsilon == shown["search"]["attack"]["epsilon"]
    assert config.bandit.rounds == shown["search"]["bandit"]["rounds"]
    for arguments in (["--data", "/my/images"], ["--preset", "mnist"], ["--preset", "cifar10"]):
        other = parse(arguments).config
        assert (other.bandit.policy, other.bandit.mixes) == ("hierarchical", 0.5)
        assert other.final.tournament == 16
    assert SearchConfig().bandit.policy == "printed"
    assert not SearchConfig().final.tournament


def test_what_belongs_to_a_policy_or_a_space_falls_away_with_it(tmp_path):
    assert parse(["--bandit.policy", "printed"]).config.bandit.mixes == 0.0
    assert parse(["--bandit.policy=hierarchical"]).config.bandit.mixes == 0.5
    printed = SearchConfig.preset("digits", bandit={"policy": "printed"})
    assert printed.bandit.mixes == 0.0
    assert printed.parameters == "17k:23k"
    file = tmp_path / "c.yaml"
    file.write_text("init_channels: 4\n")
    assert parse(["--preset", "digits", "--config", str(file)]).config.parameters is None
    assert parse(["--layers", "2"]).config.parameters == "17k:23k"
    for flags in (["--layers", "3"], ["--space", "general7-light"], ["--macs", ":1M"]):
        assert parse(flags).config.parameters is None
    assert parse(["--layers", "3", "--parameters", "30k:40k"]).config.parameters == "30k:40k"


def test_own_images_are_all_used():
    assert parse(["--seed", "1"]).config.train_limit == 2400
    assert parse(["--data", "/my/images"]).config.train_limit is None
    assert parse(["--data=/my/images"]).config.bandit.rounds == 3


def test_a_file_is_not_mixed_with_the_default_preset(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("seed: 3\n")
    assert parse(["--config", str(file)]).config == merge(SearchConfig(), {"seed": 3}, "test")


@pytest.mark.parametrize("name", ["tune_epochs", "network_epochs", "random_networks"])
def test_numbers_below_zero_are_refused(name):
    with pytest.raises(ConfigError, match=rf"final\.{name}: expected 0 or more, got -1"):
        tiny(final={name: -1})


def test_a_study_trains_its_networks_itself():
    assert StudyConfig().search.final.network_epochs == 0
    with pytest.raises(ConfigError, match=r"search\.final\.network_epochs: .*real\.epochs"):
        merge(StudyConfig(), {"search": {"final": {"network_epochs": 1}}}, "test")


def test_progress_shows_no_result_when_silent(capsys):
    Progress.silent().line("nothing")
    assert capsys.readouterr() == ("", "")
