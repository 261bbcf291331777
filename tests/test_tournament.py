"""Networks trained alone: the tournament, rewards of such networks, the check of a supernet."""

from __future__ import annotations

import dataclasses
import json
import math
import os

import pytest
import torch
from _tiny import TINY
from _tiny import tiny as smallest

from fastbandit import space
from fastbandit._statistics import rank_correlation
from fastbandit.bandit import replay
from fastbandit.config import ConfigError, merge
from fastbandit.data import load
from fastbandit.genotype import Genotype
from fastbandit.report import write_report
from fastbandit.runs.processes import Call, Workers, run_calls
from fastbandit.runs.tensors import RunError
from fastbandit.search import SearchConfig, dry_run, main, search, tournament
from fastbandit.search import __main__ as search_main
from fastbandit.search.adversarial import Adversarial
from fastbandit.search.prepared import Prepared
from fastbandit.search.tournament import genotype_of, judge
from fastbandit.training import paths as training_paths
from fastbandit.training.overfitting import Verdict

# Of four candidates of one epoch the better half is trained for two.
HELD = {
    "tournament": 4,
    "rungs": [1, 2],
    "keep": 0.5,
    "from_bandit": 0.5,
    "from_model": 0.25,
}


def tiny(**changes) -> SearchConfig:
    return merge(smallest(final={**TINY["final"], **HELD}), changes, "test")


def small(name, **shape):
    """Three operations on six edges."""
    return space.SearchSpace(name, space.SPACES[name][2:5], nodes=2, cell_types=2)


@pytest.fixture(autouse=True)
def small_space(monkeypatch):
    monkeypatch.setattr(space, "get", small)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the tournament -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(space, "get", small)
        return search(tiny(), tmp_path_factory.mktemp("tournament") / "run")


def test_the_winner_of_the_tournament_is_the_network_found(held):
    path, summary = held
    found = summary["tournament"]
    assert json.loads((path / "tournament.json").read_text())["winner"] == found["winner"]
    entries = found["candidates"]
    assert [one["origin"] for one in entries] == ["bandit", "bandit", "random", "model"]
    assert len({tuple(one["choice"]) for one in entries}) == 4
    assert entries[0]["choice"] == replay(lines(path / "bandit.jsonl")).final().tolist()
    # The two best of the first rung, and no others, are trained again.
    first = [one["rungs"][0]["reward"] for one in entries]
    again = [number for number, one in enumerate(entries) if len(one["rungs"]) == 2]
    assert again == sorted(sorted(range(4), key=lambda i: (-first[i], i))[:2])
    last = [one["rungs"][-1]["reward"] for one in entries]
    assert last[found["winner"]] == max(last[number] for number in again)
    assert [one["epochs"] for one in entries[again[0]]["rungs"]] == [1, 2]
    winner = entries[found["winner"]]
    genotype = Genotype.load(path / "genotype.json")
    assert genotype.hash == summary["genotype_hash"] == winner["genotype_hash"]
    assert found["rungs"] == [{"epochs": 1, "networks": 4}, {"epochs": 2, "networks": 2}]
    trainings = [rung for one in entries for rung in one["rungs"]]
    assert found["cost"]["images_trained"] == sum(one["images_trained"] for one in trainings) > 0
    # Their runs are gone, their figures stay; the page shows them.
    assert not (path / "networks" / "tournament").exists()
    page = write_report(path).read_text()
    assert f"{winner['number'] + 1}, the winner" in page


def test_the_result_does_not_depend_on_the_number_of_processes(tmp_path, held):
    _, one = held
    _, two = search(tiny(), tmp_path / "two", processes=2)

    def figures(summary):
        return [
            [one["choice"], [(r["clean_accuracy"], r["robust_accuracy"]) for r in one["rungs"]]]
            for one in summary["tournament"]["candidates"]
        ]

    assert figures(one) == figures(two)
    assert two["tournament"]["cost"]["processes"] == 2


def test_an_interrupted_tournament_goes_on(tmp_path, monkeypatch, held):
    _, whole = held
    trained, original = [], tournament.retrain

    def stop(settings, folder, **options):
        trained.append(folder.parts[-2:])
        if len(trained) == 3:
            raise KeyboardInterrupt
        return original(settings, folder, **options)

    monkeypatch.setattr(tournament, "retrain", stop)
    with pytest.raises(KeyboardInterrupt):
        search(tiny(), tmp_path / "run")
    _, summary = search(tiny(), tmp_path / "run")
    # The two that were done are not trained again.
    assert trained[3:] == [
        ("rung-1", "002"),
        ("rung-1", "003"),
        *[one for one in trained if one[0] == "rung-2"],
    ]

    def figures(found):
        return [
            [(r["epochs"], r["robust_accuracy"]) for r in one["rungs"]]
            for one in found["tournament"]["candidates"]
        ]

    assert figures(summary) == figures(whole)
    assert summary["genotype_hash"] == whole["genotype_hash"]


def test_a_finished_tournament_is_not_held_again(tmp_path, monkeypatch):
    """Killed while the found network was trained."""
    config = tiny(final={"network_epochs": 1, "reference": False})
    monkeypatch.setattr("fastbandit.search.networks.Networks.train_found", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        search(config, tmp_path / "run")
    monkeypatch.undo()
    monkeypatch.setattr(tournament, "hold", lambda *_, **__: pytest.fail("held again"))
    monkeypatch.setattr(space, "get", small)
    _, summary = search(config, tmp_path / "run")
    winner = summary["tournament"]["candidates"][summary["tournament"]["winner"]]
    assert summary["networks"][0]["genotype_hash"] == winner["genotype_hash"]


def test_no_test_image_chooses(tmp_path):
    config = tiny()
    genotype = genotype_of(config, [0] * 6)
    settings = tournament.alone_settings(config, 1)
    with pytest.raises(ValueError, match="expected no test images, got some"):
        judge(genotype, settings, tmp_path / "run", load("digits"))


def test_all_candidates_of_a_rung_meet_the_same(tmp_path, monkeypatch):
    """The same images in the same order, the same seed; another rung has another seed."""
    seen, original = [], tournament.retrain

    def record(settings, folder, **options):
        seen.append((settings, options["source"]))
        return original(settings, folder, **options)

    monkeypatch.setattr(tournament, "retrain", record)
    search(tiny(), tmp_path / "run")
    assert all(source.test is None for _, source in seen)
    settings = [one for one, _ in seen]
    assert len(set(settings[:4])) == len(set(settings[4:])) == 1
    assert settings[0].seed != settings[4].seed
    assert (settings[0].epochs, settings[4].epochs) == (1, 2)
    assert settings[0].threads == 1
    assert settings[0].train_portion == 0.75


def test_a_model_of_the_first_rung_proposes_what_it_expects_most_of(tmp_path, monkeypatch):
    """Accuracy is made up here: the share of the first operation."""
    config = tiny(final={"tournament": 16, "from_model": 0.25, "rungs": [1]})

    def make_up(genotype, settings, folder, source):
        names = [edge.op for cell in genotype.cells for node in cell.nodes for edge in node]
        share = names.count("skip_connect") / len(names)
        return {
            "epochs": settings.epochs,
            "parameters": 1,
            "macs": 1,
            "clean_accuracy": share,
            "robust_accuracy": share,
            **dict.fromkeys(
                (
                    "seconds_total",
                    "images_trained",
                    "images_evaluated",
                    "forward_passes",
                    "backward_passes",
                ),
                1,
            ),
        }

    monkeypatch.setattr(tournament, "judge", make_up)
    _, summary = search(config, tmp_path / "run")
    entries = summary["tournament"]["candidates"]
    assert [one["origin"] for one in entries].count("model") == 4
    by_model = [one["rungs"][0]["reward"] for one in entries if one["origin"] == "model"]
    at_random = [one["rungs"][0]["reward"] for one in entries if one["origin"] == "random"]
    assert min(by_model) > sorted(at_random)[-3]
    assert sum(by_model) / 4 > sum(at_random) / len(at_random) + 0.2


def test_candidates_are_within_the_budget(tmp_path):
    config = tiny(parameters="900:1100")
    _, summary = search(config, tmp_path / "run")
    sizes = [one["parameters"] for one in summary["tournament"]["candidates"]]
    assert all(900 <= size <= 1100 for size in sizes), sizes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"final": {"rungs": []}},
            "final.rungs: expected 1 epoch or more for one rung or more, got none",
        ),
        (
            {"final": {"from_bandit": 0.6, "from_model": 0.6}},
            "final.from_bandit, final.from_model: expected shares with a sum of 1 at most, got "
            "0.6 and 0.6",
        ),
        (
            {"edges_per_node": "1"},
            "final.tournament: expected edges_per_node all, since networks trained alone to choose "
            "keep all their edges; got 1",
        ),
        ({"rewards": "alone", "supernet": {"epochs": 1}}, "supernet.epochs: expected 0 with"),
        ({"supernet": {"check": 3}}, "supernet.check: expected 0, or 4 networks or more"),
        ({"supernet": {"threshold": 0.1}}, "supernet.warmup, supernet.check, supernet.threshold"),
        ({"alone": {"epochs": 9}}, "alone.epochs, alone.paths: expected their defaults where no"),
        (
            {"rewards": "alone", "bandit": {"evaluations_per_epoch": 1}},
            "bandit.evaluations_per_epoch: expected 0 with rewards alone or with supernet.epochs",
        ),
        (
            {"rewards": "alone", "edges_per_node": "2", "final": {"tournament": 0}},
            "rewards: expected edges_per_node all, since networks trained alone to choose keep all",
        ),
        (
            {"supernet": {"epochs": 1}, "edges_per_node": "2", "final": {"tournament": 0}},
            "supernet.check: expected edges_per_node all",
        ),
        (
            {"attack": {"steps": 0}, "reward": "robust"},
            "final.tournament: expected reward clean where networks are trained without an attack",
        ),
        ({"supernet": {"epochs": 1}, "graphs": "yes"}, "graphs: expected auto or no with supernet"),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        tiny(**changes)


def test_the_command_says_who_won(tmp_path, capsys, monkeypatch):
    arguments = ["--out", str(tmp_path / "run"), "--processes", "1"]
    for name, value in (
        ("space", "general7-light"),
        ("init-channels", "2"),
        ("train-limit", "48"),
        ("test-limit", "32"),
        ("batch-size", "24"),
        ("bandit.rounds", "1"),
        ("final.steps", "2"),
        ("final.step-size", "0.1"),
        ("final.tune-epochs", "0"),
        ("final.network-epochs", "0"),
        ("final.tournament", "4"),
    ):
        arguments += [f"--{name}", value]
    arguments += ["--final.rungs", "1", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "tournament: 4 candidates (1 of the bandit, 2 at random, 1 of the model)" in out
    assert "trained alone 4 for 1 epochs, 1 for 2 epochs" in out
    assert "  winner: candidate " in out
    assert main([*arguments, "--force", "--processes", "0"]) != 0
    assert "processes: expected 1 or more, got 0" in capsys.readouterr().err


def test_the_dry_run_counts_the_trainings():
    found = dry_run(tiny(final={"tournament": 8}))
    # 8 of the first rung, half of them of the second.
    assert found["trainings_alone"] == 12
    assert found["seconds_alone"] > 0
    assert found["seconds_total"] > found["seconds_alone"]


# --- rewards of networks alone --------------------------------------------------------------


def test_rewards_of_networks_alone(tmp_path):
    config = tiny(rewards="alone", alone={"epochs": 1, "paths": 2}, final={"tournament": 0})
    path, summary = search(config, tmp_path / "run")
    assert summary["rewards"] == "alone"
    samples = [line for line in lines(path / "bandit.jsonl") if line["event"] == "sample"]
    assert len(samples) == 8
    # Each reward is what the network has that is trained alone with these settings.
    settings = tournament.alone_settings(config.resolve(), 1, "alone", "path")
    source = dataclasses.replace(load("digits"), test=None)
    for number in (0, 5):
        genotype = genotype_of(config, samples[number]["choice"])
        found = judge(genotype, settings, tmp_path / str(number), source)
        assert samples[number]["reward"] == found["robust_accuracy"]
    assert summary["final"]["split"] == "validation"
    assert summary["test"] is None
    assert summary["cost"]["images_trained"] > 8 * 30
    assert not (path / "networks" / "tournament").exists()
    assert "alone" in write_report(path).read_text()


def test_networks_alone_are_not_trained_again_after_a_kill(tmp_path, monkeypatch):
    """Killed within the tournament: neither the candidates nor the last path's network."""
    config = tiny(rewards="alone", alone={"epochs": 1, "paths": 2})
    trained, original = [], tournament.retrain

    def stop(settings, folder, **options):
        trained.append("/".join(folder.parts[-3:]))
        if trained[-1] == "tournament/rung-1/002" and trained.count(trained[-1]) == 1:
            raise KeyboardInterrupt
        return original(settings, folder, **options)

    monkeypatch.setattr(tournament, "retrain", stop)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "run")
    count = len(trained)
    path, _ = search(config, tmp_path / "run")
    assert trained[count] == "tournament/rung-1/002"
    assert not {"alone/found/000", "tournament/rung-1/000"} & set(trained[count:])
    assert not (path / "networks" / "alone").exists()
    # A supernet that nothing trained is not kept.
    assert not (path / "weights.safetensors").exists()


def test_the_bandit_has_a_candidate_whatever_the_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(tournament, "hold", lambda *_, **__: pytest.fail("not asked for"))
    config = tiny(final={"from_model": 1.0, "from_bandit": 0.0})
    bandit = config.make_bandit()
    while not bandit.finished:
        bandit.credit(bandit.sample(), 0.5)
        while bandit.due:
            bandit.prune()
    found, propose = tournament.candidates_of(config, load("digits"), bandit)
    assert (len(found), propose) == (1, 3)


def test_the_images_keep_their_size(tmp_path):
    config = tiny(image_size=16, image_color="rgb")
    settings = tournament.alone_settings(config, 1)
    assert (settings.image_size, settings.image_color) == (16, "rgb")


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", 7), ("cuda", 3), ("cuda:1", 1), ("auto", 3)]
)
def test_as_many_processes_as_there_are_devices(device, expected, monkeypatch):
    command = search_main.SearchCommand()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(search_main, "cores", lambda: 7)
    request = command.parse(["--device", device])
    assert command._processes(request) == expected


def test_settings_of_a_trial_that_another_one_replaces(tmp_path):
    class Own(Adversarial):
        pass

    config = tiny(rewards="alone", final={"tournament": 0})
    with pytest.raises(ConfigError, match="expected shared and 0 with a trial of one's own"):
        search(config, tmp_path / "run", trial=Own)


def test_a_trial_of_ones_own_is_prepared(tmp_path):
    seen = []

    class Own(Adversarial):
        def prepare(self, done):
            seen.append(done)
            return {"phase": "own"} if len(seen) < 3 else None

    search(tiny(final={"tournament": 0}), tmp_path / "run", trial=Own)
    assert seen == [0, 0, 0]


def test_rewards_alone_resume(tmp_path, monkeypatch):
    config = tiny(rewards="alone", alone={"epochs": 1, "paths": 2}, final={"tournament": 0})
    search(config, tmp_path / "whole")
    calls, original = [], Prepared.train

    def stop(self, path, number, *rest):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, path, number, *rest)

    monkeypatch.setattr(Prepared, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        search(config, tmp_path / "run")
    search(config, tmp_path / "run")
    one, two = ((tmp_path / name / "bandit.jsonl").read_bytes() for name in ("whole", "run"))
    assert one == two


# --- the supernet first ---------------------------------------------------------------------


def first(**changes) -> SearchConfig:
    settings = {
        "supernet": {"epochs": 3, "check": 4, "warmup": 0.5},
        "alone": {"epochs": 1, "paths": 2},
        "final": {"tournament": 0},
    }
    return tiny(**merge_all(settings, changes))


def merge_all(one, two):
    return {
        name: merge_all(one.get(name, {}), two[name])
        if isinstance(two.get(name), dict)
        else two.get(name, one.get(name))
        for name in {**one, **two}
    }


def test_every_operation_is_trained_as_often_as_any_other(tmp_path, monkeypatch):
    seen, original = [], training_paths.Supernet.set_path

    def record(self, choice):
        seen.append([int(arm) for arm in choice])
        return original(self, choice)

    with monkeypatch.context() as patch:
        patch.setattr(training_paths.Supernet, "set_path", record)
        # One batch an epoch.
        unchecked = first(supernet={"check": 0}, alone={"epochs": 3, "paths": 4})
        search(unchecked, tmp_path / "run")
    for row in range(6):
        assert sorted(path[row] for path in seen[:3]) == [0, 1, 2]
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["phase"] for line in metrics[:4]] == ["supernet"] * 3 + ["initial"]
    assert [line["epoch"] for line in metrics] == list(range(len(metrics)))
    assert metrics[0]["learning_rate"] == pytest.approx(0.025 / 1.5)
    assert metrics[1]["learning_rate"] == pytest.approx(0.025)


@pytest.mark.parametrize("threshold", [-1.0, 1.0])
def test_a_reward_that_does_not_rank_networks_is_not_used(tmp_path, threshold, monkeypatch, capsys):
    """With a threshold of -1 any reward is used, with 1 only one that ranks all alike."""
    path, summary = search(first(supernet={"threshold": threshold}), tmp_path / "run")
    checked = summary["reward_check"]
    assert checked["trusted"] == (threshold < 0)
    assert len(checked["rewards"]) == len(checked["alone"]) == 4
    expected = rank_correlation(checked["rewards"], checked["alone"])[0]
    assert checked["rank_correlation"] == (None if math.isnan(expected) else expected)
    assert summary["rewards"] == ("supernet" if threshold < 0 else "alone")
    page = write_report(path).read_text()
    assert ("<b>shared weights</b>" in page) == (threshold < 0)
    # Without training only the statistics of the batch norms change.
    trained = [line for line in lines(path / "metrics.jsonl") if line["phase"] == "search"]
    assert all(("seconds_train" in line) == (threshold > 0) for line in trained)


def test_tuning_trains_after_a_supernet_first(tmp_path, monkeypatch):
    tuned, original = [], Adversarial.train

    def record(self, path, number, *rest):
        tuned.append(number)
        return original(self, path, number, *rest)

    monkeypatch.setattr(Adversarial, "train", record)
    config = first(supernet={"threshold": -1.0}, final={"tune_epochs": 2})
    path, _ = search(config, tmp_path / "run")
    assert tuned == [8, 9]
    assert [line["phase"] for line in lines(path / "metrics.jsonl")[-2:]] == ["tuning"] * 2


def test_the_guard_watches_the_supernet(tmp_path, monkeypatch):
    def overfitted(self, path, number):
        return Verdict(0.8, 0.1, 24, True) if self.threat.steps == 1 else None

    monkeypatch.setattr(Adversarial, "_check", overfitted)
    config = first(supernet={"threshold": -1.0}, guard={"every": 2})
    path, summary = search(config, tmp_path / "run")
    metrics = lines(path / "metrics.jsonl")
    assert [line["attack_steps"] for line in metrics[:3]] == [1, 1, 2]
    assert len(summary["overfitting"]) == 1
    events = [line["event"] for line in lines(path / "bandit.jsonl")]
    assert events[:2] == ["start", "attack"]
    assert replay(lines(path / "bandit.jsonl")).finished


def test_a_supernet_first_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    whole, _ = search(first(), tmp_path / "whole")
    calls, original = [], Prepared.prepare

    def stop(self, done):
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, done)

    monkeypatch.setattr(Prepared, "prepare", stop)
    with pytest.raises(KeyboardInterrupt):
        search(first(), tmp_path / "run")
    run, _ = search(first(), tmp_path / "run")
    assert calls == [0, 1, 2, 2, 3, 3]
    for name in ("bandit.jsonl", "weights.safetensors", "genotype.json"):
        assert (whole / name).read_bytes() == (run / name).read_bytes()


def test_rank_correlation():
    rho, low, high = rank_correlation([1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 1.0, 4.0, 3.0, 5.0])
    assert rho == pytest.approx(0.8)  # 1 - 6 * 4 / (5 * 24)
    # z = 1.0986, half width 1.96 * sqrt(1.06 / 2)
    assert low == pytest.approx(math.tanh(1.0986123 - 1.426875), abs=1e-5)
    assert high == pytest.approx(math.tanh(1.0986123 + 1.426875), abs=1e-5)
    assert rank_correlation([1.0, 1.0, 2.0], [3.0, 3.0, 9.0])[0] == pytest.approx(1.0)
    assert math.isnan(rank_correlation([1.0, 1.0], [0.0, 1.0])[0])


# --- processes ------------------------------------------------------------------------------


def _double(value):
    if value < 0:
        raise ValueError(f"got {value}")
    return {"twice": 2 * value, "process": os.getpid(), "threads": torch.get_num_threads()}


def _total(shared, value):
    return {"total": int(shared.sum()) + value}


def _die(value):
    os._exit(3)


def _calls(function, *values):
    return [Call(f"job {value}", function, (value,)) for value in values]


def test_calls_on_several_processes():
    found = {}
    with Workers(2) as workers:
        workers.run(_calls(_double, 1, 2), found.__setitem__)
        first = {one["process"] for one in found.values()}
        workers.run(_calls(_double, 1, 2, 3, 4), found.__setitem__)
        # They are started once, and get once what calls share.
        assert {one["process"] for one in found.values()} <= first
        kept, same = {}, torch.arange(3)
        for other in (same, same, torch.arange(4)):
            calls = [Call("job", _total, (one,), shared=other) for one in (1, 2, 3)]
            workers.run(calls, kept.__setitem__)
            assert {k: v["total"] for k, v in kept.items()} == {
                k: int(other.sum()) + k + 1 for k in range(3)
            }
        workers.run(_calls(_double, 1, 2), found.__setitem__)
        with pytest.raises(RunError, match="job -1: got -1"):
            workers.run(_calls(_double, 1, -1), found.__setitem__)
        with pytest.raises(RunError, match="process ended with status 3; the same command goes on"):
            workers.run(_calls(_die, 1, 2), found.__setitem__)
    assert {k: v["twice"] for k, v in found.items()} == {0: 2, 1: 4, 2: 6, 3: 8}
    assert os.getpid() not in {one["process"] for one in found.values()}
    assert {one["threads"] for one in found.values()} == {1}
    run_calls(_calls(_double, 5), 1, found.__setitem__)
    assert found[0]["process"] == os.getpid()
