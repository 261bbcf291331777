"""The study: simulated searches against the bandit, statistics, pieces, the command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import yaml
from _pages import charts_can_be_scrolled

from fastbandit import space
from fastbandit._files import FileError, check_seal, read_sealed, seal
from fastbandit._statistics import (
    mann_whitney,
    mean_interval,
    standard_error,
    student_t,
    wilcoxon,
)
from fastbandit.bandit import POLICIES, AntiBandit, Bandits, BanditSettings
from fastbandit.bandit.simulation import World, simulate
from fastbandit.config import ConfigError, merge, to_plain
from fastbandit.data import load
from fastbandit.genotype import Genotype
from fastbandit.report.charts import Points, whisker_chart
from fastbandit.runs.tensors import RunError
from fastbandit.search.networks import random_genotype
from fastbandit.study import PRESETS, StudyConfig, main, study
from fastbandit.study import real as module
from fastbandit.study.config import PARTS, parse_entry
from fastbandit.study.tables import format_tables

# --- simulated searches -------------------------------------------------------------------------

SMALL = World(rows=6, arms=4, effect=0.01, noise=0.01)
SEEDS = torch.tensor([3, 2**40 + 1, 77, 2**62])


def one_by_one(world, settings, seed):
    """The same search with an AntiBandit and plain loops; the surviving arms, and the bandit."""
    seeds = torch.tensor([seed])
    effects = world.effects(seeds)[0]
    bandit = AntiBandit(
        world.rows,
        world.arms,
        policy=settings.policy,
        rate=settings.rate,
        rounds=settings.rounds,
        bonus=settings.bonus,
        scale=settings.scale,
        seed=seed,
    )
    total, extra = bandit.total_samples, settings.evaluations_per_epoch
    noises = world.noises(seeds, total + extra * (total - world.arms))[0]
    while not bandit.finished:
        initial = bandit.phase == "initial"
        level = world.level(bandit.trained + 1, total)
        for trained in [True] + [False] * (0 if initial else extra):
            choice = bandit.sample(trained=trained)
            noise = noises[bandit.samples]
            bandit.credit(
                choice, world.accuracy(effects, choice, level, noise).item(), trained=trained
            )
        while bandit.due:
            bandit.prune()
    return bandit, effects


@pytest.mark.parametrize(
    "settings",
    [
        *(BanditSettings(policy=name, rounds=2) for name in sorted(POLICIES)),
        BanditSettings(rounds=2, rate=0.2, bonus=0.1),
        BanditSettings(policy="ridge", rounds=1, evaluations_per_epoch=2),
        BanditSettings(policy="thompson", rounds=1, bonus=0.3, evaluations_per_epoch=1),
    ],
    ids=lambda s: f"{s.policy}-{s.rate:g}-{s.bonus:g}-{s.evaluations_per_epoch}",
)
def test_simulation_agrees_with_the_bandit_one_by_one(settings):
    found = simulate(SMALL, settings, SEEDS, chunk=3)
    for i, seed in enumerate(SEEDS.tolist()):
        bandit, effects = one_by_one(SMALL, settings, seed)
        assert bandit.final().tolist() == found.final[i].tolist()
        kept = effects.gather(1, bandit.final().unsqueeze(1)).squeeze(1)
        assert found.advantage[i].item() == pytest.approx(
            (kept - effects.mean(1)).mean().item(), abs=1e-12
        )
        best = (bandit.final() == effects.argmax(1)).double().mean().item()
        assert found.best_kept[i].item() == best
        assert (found.trained, found.trained + found.evaluated) == (bandit.trained, bandit.samples)


def test_simulation_keeps_the_same_history_as_the_bandit(monkeypatch):
    """Not the result alone: every choice, to the sample."""
    settings = BanditSettings(policy="ridge-thompson", rounds=1, evaluations_per_epoch=1)
    states = []
    original = Bandits.credit

    def credit(self, choice, reward, *, trained=True):
        original(self, choice, reward, trained=trained)
        if not states or states[-1] is not self:
            states.append(self)

    with monkeypatch.context() as patch:
        patch.setattr(Bandits, "credit", credit)
        simulate(SMALL, settings, torch.tensor([5, 6]))
    (state,) = states
    for i, seed in enumerate((5, 6)):
        bandit, _ = one_by_one(SMALL, settings, seed)
        assert torch.equal(bandit.history.choice, state.history.choice[i])
        assert torch.equal(bandit.history.reward, state.history.reward[i])
        assert torch.equal(bandit.history.trained, state.history.trained)


def test_the_seed_alone_decides_a_simulated_search():
    seeds = torch.arange(7)
    whole = simulate(SMALL, BanditSettings(policy="detrended"), seeds)
    parts = simulate(SMALL, BanditSettings(policy="detrended"), seeds, chunk=2)
    assert torch.equal(whole.final, parts.final)
    later = simulate(SMALL, BanditSettings(policy="detrended"), seeds[4:])
    assert torch.equal(whole.advantage[4:], later.advantage)


# What spec.md says of the rule, at 60 edges and 9 arms; (advantage, best arm kept).
@pytest.mark.parametrize(
    ("settings", "advantage", "kept"),
    [
        ({}, 0.26, 0.17),
        ({"bonus": 0.1}, 0.47, None),
        ({"bonus": 0.0}, 0.47, None),
        ({"bonus": 0.1, "rate": 0.2}, 0.57, None),
        ({"policy": "random"}, 0.0, 1 / 9),
        ({"policy": "detrended"}, 0.80, None),
        ({"policy": "ridge"}, 0.89, None),
    ],
    ids=str,
)
def test_the_simulated_table(settings, advantage, kept):
    searches = 40
    found = simulate(World(), BanditSettings(**settings), torch.arange(searches) + 1000)
    values = (found.advantage / 0.01).tolist()
    # The published figures are those of another simulation, rounded: four standard errors of ours
    # and 0.03.
    assert abs(mean_interval(values)[0] - advantage) < 4 * standard_error(values) + 0.03
    if kept is not None:
        share = found.best_kept.tolist()
        assert abs(mean_interval(share)[0] - kept) < 4 * standard_error(share)


def test_world_by_hand():
    world = World(rows=2, arms=3, start=0.2, rise=0.4, trend="linear")
    assert world.level(0, 10) == pytest.approx(0.2)
    assert world.level(5, 10) == pytest.approx(0.4)
    for trend in ("saturating", "linear", "late"):
        rising = World(start=0.2, rise=0.4, trend=trend)
        levels = [rising.level(t, 8) for t in range(9)]
        assert (levels[0], levels[8]) == pytest.approx((0.2, 0.6))
        assert levels == sorted(levels)
    assert (
        World(trend="saturating").level(1, 2)
        > World().start + 0.15
        > World(trend="late").level(1, 2)
    )
    effects = torch.tensor([[0.1, 0.2, 0.3], [0.0, -0.1, 0.4]], dtype=torch.float64)
    got = world.accuracy(effects, torch.tensor([2, 1]), 0.5, torch.tensor(0.05))
    assert got.item() == pytest.approx(0.5 + 0.3 - 0.1 + 0.05)


def test_effects_and_noise_are_normal_and_differ():
    world = World(rows=50, arms=10, effect=2.0, noise=3.0)
    seeds = torch.arange(20)
    effects, noise = world.effects(seeds).flatten(), world.noises(seeds, 500).flatten()
    for values, deviation in ((effects, 2.0), (noise, 3.0)):
        assert values.numel() == 10_000
        assert values.mean().abs().item() < 4 * deviation / 100
        assert values.std().item() == pytest.approx(deviation, rel=0.04)
        assert (values.abs() < deviation).double().mean().item() == pytest.approx(0.683, abs=0.02)
    correlation = torch.corrcoef(torch.stack([effects, noise]))[0, 1].item()
    assert abs(correlation) < 0.04
    assert not torch.equal(world.effects(seeds)[0], world.effects(seeds)[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: World(rows=0), "world.rows: expected 1 or more, got 0"),
        (lambda: World(noise=-1.0), "world.noise: expected a number >= 0, got -1.0"),
        (lambda: World(trend="up"), "world.trend: expected saturating, linear or late, got 'up'"),
        (lambda: World(start=0.8, rise=0.3), "world.start, world.rise: expected accuracies"),
        (
            lambda: simulate(SMALL, BanditSettings(policy="best"), SEEDS),
            "policy: expected one of detrended, hierarchical, printed",
        ),
        (
            lambda: simulate(SMALL, BanditSettings(rate=0.0), SEEDS),
            "rate: expected a number in (0, 1], got 0.0",
        ),
        (
            lambda: simulate(SMALL, BanditSettings(rounds=0), SEEDS),
            "rounds: expected an integer >= 1, got 0",
        ),
        (
            lambda: simulate(SMALL, BanditSettings(bonus=math.inf), SEEDS),
            "bonus: expected a finite number >= 0, got inf",
        ),
        (
            lambda: simulate(SMALL, BanditSettings(evaluations_per_epoch=-1), SEEDS),
            "evaluations_per_epoch: expected 0 or",
        ),
        (
            lambda: simulate(World(), BanditSettings(), torch.tensor([1.0])),
            "simulate: seeds: expected int64 [bandits], at least one, >= 0; got float32 [1]",
        ),
    ],
)
def test_wrong_simulations(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


# --- statistics ---------------------------------------------------------------------------------


def test_student_quantiles_from_the_tables():
    for freedom, value in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (99, 1.984)):
        assert student_t(0.975, freedom) == pytest.approx(value, abs=5e-4)
    assert student_t(0.5, 3) == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match=r"expected 0\.5 <= share < 1 and freedom >= 1, got 0\.4"):
        student_t(0.4, 3)


def test_mean_interval_by_hand():
    # Mean 3, standard deviation 2, standard error 1; t = 3.182 with 3 degrees of freedom.
    values = [3 - math.sqrt(3), 3 + math.sqrt(3), 3 - math.sqrt(3), 3 + math.sqrt(3)]
    assert standard_error(values) == pytest.approx(1.0)
    assert mean_interval(values) == pytest.approx((3.0, 3 - 3.18245, 3 + 3.18245), abs=1e-5)
    mean, low, high = mean_interval([0.5])
    assert mean == 0.5
    assert math.isnan(low)
    assert math.isnan(high)
    with pytest.raises(ValueError, match="mean_interval: values: expected at least one, got none"):
        mean_interval([])


def test_rank_tests_by_hand():
    # All three pairs the same way: 2 of 8 sign patterns are as extreme.
    assert wilcoxon([1, 2, 3.5], [0, 0, 0]) == pytest.approx(0.25)
    # Signed ranks 1, -2, 3: sums of positive ranks 4 of 0..6, P(W >= 4) = 3/8, twice.
    assert wilcoxon([1, -2, 3], [0, 0, 0]) == pytest.approx(0.75)
    assert wilcoxon([1, 2], [1, 2]) == 1.0
    # {4, 5} against {1, 2, 3}: 1 of 10 subsets, and its mirror.
    assert mann_whitney([4, 5], [1, 2, 3]) == pytest.approx(0.2)
    assert mann_whitney([1, 2, 3], [4, 5]) == pytest.approx(0.2)
    # Ranks of 1, 2, 2, 3: 1, 2.5, 2.5, 4. The two above are 2.5 and 4; of 6 subsets, 2 sum to 6.5.
    assert mann_whitney([2, 3], [1, 2]) == pytest.approx(4 / 6)
    assert mann_whitney([1] * 30, [1] * 30) == 1.0
    with pytest.raises(ValueError, match="expected values in both groups, got 0 and 1"):
        mann_whitney([], [1])
    with pytest.raises(ValueError, match="as many values on both sides, got 1 and 2"):
        wilcoxon([1], [1, 2])


@pytest.mark.parametrize(("n", "m"), [(3, 5), (12, 9), (30, 25)])
@pytest.mark.parametrize("ties", [False, True])
def test_rank_tests_against_scipy(n, m, ties):
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(n)
    first = torch.randn(n, generator=generator).tolist()
    second = (torch.randn(n, generator=generator) + 0.6).tolist()
    other = (torch.randn(m, generator=generator) + 0.6).tolist()
    if ties:
        first, second, other = ([round(2 * x) for x in xs] for xs in (first, second, other))
    if n <= 12 or not ties:  # SciPy's own choice is not exact for more pairs with ties
        assert wilcoxon(first, second) == pytest.approx(stats.wilcoxon(first, second).pvalue)
    if not ties or n * m > 400:
        method = "exact" if n * m <= 400 else "asymptotic"
        expected = stats.mannwhitneyu(first, other, method=method).pvalue
        assert mann_whitney(first, other) == pytest.approx(expected)


def test_large_samples_take_the_normal_approximation():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(120, generator=generator).mul(3).round().tolist()
    second = (torch.randn(120, generator=generator) + 0.2).mul(3).round().tolist()
    expected = stats.wilcoxon(first, second, method="asymptotic").pvalue
    assert wilcoxon(first, second) == pytest.approx(expected)


# --- entries and settings -----------------------------------------------------------------------


def test_entries():
    assert parse_entry("printed", BanditSettings(), "x") == (BanditSettings(), None)
    settings, searched = parse_entry(
        "ridge, bonus=0.5,evaluations-per-epoch=4,rate=0.2,space=general7",
        BanditSettings(rounds=2, scale=100.0),
        "x",
    )
    assert settings == BanditSettings("ridge", 0.2, 2, 0.5, 100.0, 4)
    assert searched == "general7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("best", "here: 'best': policy: expected one of detrended, hierarchical, printed"),
        ("printed,speed=3", "here: 'printed,speed=3': expected SETTING=VALUE with one of rate"),
        ("printed,rate", "expected SETTING=VALUE"),
        ("printed,rate=high", "rate: expected a number, got 'high'"),
        ("printed,rate=2", "'printed,rate=2': rate: expected a number in (0, 1], got 2.0"),
        ("ridge,evaluations-per-epoch=1.5", "evaluations_per_epoch: expected a number, got '1.5'"),
    ],
)
def test_wrong_entries(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_entry(text, BanditSettings(), "here")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed: expected a whole number"),
        ({"threads": -1}, "threads: expected 0 or more, got -1"),
        ({"simulated": {"parts": ["speed"]}}, "simulated.parts: expected some of policies, rate"),
        ({"simulated": {"parts": []}}, "nothing to do: expected --data or one of simulated.parts"),
        ({"simulated": {"seeds": 1}}, "simulated.seeds: expected 2 or more"),
        ({"simulated": {"world": {"effect": 0.0}}}, "simulated.world.effect: expected a positive"),
        ({"simulated": {"policies": ["best"]}}, "simulated policies: 'best': policy: expected"),
        ({"simulated": {"rates": [0.0]}}, "simulated rate: rate: expected a number in (0, 1]"),
        ({"simulated": {"arms": [0]}}, "simulated space: world.arms: expected 1 or more, got 0"),
        (
            {"simulated": {"policies": ["ridge,space=general7"]}},
            "simulated policies: 'ridge,space=general7': space is for real data",
        ),
        ({"real": {"train_limit": 2}}, "real.train_limit: expected None or 4 or more, got 2"),
        ({"real": {"seeds": 0}}, "real.seeds: expected 1 or more, got 0"),
        ({"real": {"policies": ["printed,space=flat"]}}, "flat"),
        ({"search": {"seed": 3}}, "search.seed: the study sets it, give --seed; got 3"),
        ({"search": {"bandit": {"policy": "ridge"}}}, "search.bandit.policy: the entries of real"),
    ],
)
def test_wrong_configurations(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        merge(StudyConfig(), changes, "test")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound(name):
    merge(StudyConfig(), PRESETS[name], name)


def test_searches_of_an_entry():
    config = merge(
        StudyConfig(),
        {"data": "digits", "seed": 7, "threads": 1, "search": {"bandit": {"bonus": 0.5}}},
        "test",
    )
    used = config.search_of("ridge,rate=0.3,space=general7-light", 2)
    assert (used.seed, used.threads, used.data, used.space) == (9, 1, "digits", "general7-light")
    assert (used.bandit.policy, used.bandit.rate, used.bandit.bonus) == ("ridge", 0.3, 0.5)


# --- the study as a whole -----------------------------------------------------------------------

TINY = {
    "simulated": {
        "seeds": 7,
        "rounds": 1,
        "world": {"rows": 4, "arms": 3},
        "policies": ["random", "printed", "ridge"],
        "rates": [0.2, 0.7],
        "arms": [3, 4],
        "evaluations": [0, 1],
        "bonuses": [0.1, 1.0],
    }
}


def tiny(**changes):
    return merge(merge(StudyConfig(), TINY, "tiny"), changes, "test")


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if not k.endswith("seconds")}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return study(tiny(), tmp_path_factory.mktemp("study") / "run")


def test_folder_is_complete(finished):
    path, result = finished
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    assert names == {
        "config.yaml",
        "env.json",
        "pieces",
        "study.json",
        "study.html",
        "summary.json",
    }
    stored = read_sealed(path / "study.json")
    assert stored.pop("environment") == read_sealed(path / "env.json")
    assert stored == result
    assert yaml.safe_load((path / "config.yaml").read_text()) == json.loads(
        json.dumps(to_plain(tiny()))
    )


def test_rows_hold_the_figures(finished):
    _, result = finished
    rows = result["simulated"]["rows"]
    counts = {part: sum(row["part"] == part for row in rows) for part in PARTS}
    assert counts == {"policies": 3, "rate": 4, "space": 8, "evaluations": 6, "bonus": 6}
    ridge = next(row for row in rows if row["entry"] == "ridge" and row["part"] == "policies")
    seeds = torch.tensor(result["simulated"]["seeds"])
    world = World(rows=4, arms=3)
    found = simulate(world, BanditSettings(policy="ridge", rounds=1), seeds)
    assert ridge["advantage"] == (found.advantage / 0.01).tolist()
    assert ridge["mean"] == pytest.approx(sum(ridge["advantage"]) / 7)
    printed = next(row for row in rows if row["entry"] == "printed" and row["part"] == "policies")
    assert (printed["against"], printed["p"]) == (None, None)
    assert ridge["against"] == "printed"
    assert ridge["p"] == wilcoxon(ridge["advantage"], printed["advantage"])
    assert ridge["possible_mean"] >= ridge["mean"]
    for row in rows:
        if row["part"] == "rate":
            assert row["against"] == (None if row["x"] == "0.7" else "0.7")
        if row["part"] == "space":
            assert row["arms"] == int(row["x"])


def test_interrupted_study_goes_on(finished, tmp_path):
    """Killed after the fifth piece; what was done is not done again, and the result is the same."""
    said = []

    def stop(text):
        said.append(text)
        if len(said) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(tiny(), tmp_path / "run", log=stop)
    pieces = sorted((tmp_path / "run" / "pieces").iterdir())
    assert 0 < len(pieces) <= 5
    before = {piece: piece.read_bytes() for piece in pieces}
    said.clear()
    _, result = study(tiny(), tmp_path / "run", log=lambda text: said.append(text))
    assert all(piece.read_bytes() == content for piece, content in before.items())
    assert sum("(stored)" in text for text in said[:5]) == 5
    assert without_seconds(result) == without_seconds(finished[1])


def test_finished_study_is_kept_unless_forced(finished, tmp_path):
    path, result = study(tiny(), tmp_path / "run")
    before = (path / "study.json").read_bytes()
    said = []
    again, stored = study(tiny(), path, log=said.append)
    assert (again, stored) == (path, json.loads(json.dumps(result)))
    assert "all is done" in said[0]
    with pytest.raises(RunError, match="another configuration"):
        study(tiny(seed=1), path)
    assert (path / "study.json").read_bytes() == before
    pieces = {piece.name for piece in (path / "pieces").iterdir()}
    study(tiny(seed=1), path, force=True)
    assert not pieces & {piece.name for piece in (path / "pieces").iterdir()}


def test_damaged_piece_is_named(tmp_path):
    path, _ = study(tiny(), tmp_path / "run")
    (path / "summary.json").unlink()
    piece = next(iter((path / "pieces").iterdir()))
    text = piece.read_text()
    piece.write_text(text[:-20])
    with pytest.raises(FileError, match=re.escape(f"{piece}: not valid JSON")):
        study(tiny(), path)
    piece.write_text(text.replace('"seeds": 7', '"seeds": 4'))
    with pytest.raises(FileError, match=re.escape(f"{piece}: damaged or edited")):
        study(tiny(), path)
    other = check_seal(json.loads(text), piece)
    other["key"]["seeds"] = 4
    piece.write_text(json.dumps(seal(other)))
    with pytest.raises(FileError, match=re.escape(f"{piece}: expected the piece of the study")):
        study(tiny(), path)
    piece.write_text(text)
    study(tiny(), path)


# --- real data ----------------------------------------------------------------------------------

REAL = {
    "data": "digits",
    "threads": 1,
    "simulated": {"parts": []},
    "real": {
        "policies": ["printed", "ridge"],
        "seeds": 2,
        "random": 3,
        "epochs": 1,
        "train_limit": 48,
    },
    "search": {
        "space": "general7-light",
        "init_channels": 2,
        "train_limit": 48,
        "test_limit": 32,
        "batch_size": 24,
        "bandit": {"rounds": 1},
        "final": {"steps": 2, "step_size": "0.1"},
    },
}


@pytest.fixture
def few_operations(monkeypatch):
    spaces = space.SPACES
    monkeypatch.setitem(spaces, "general7-light", spaces["general7-light"][:3])


def test_searches_and_networks_of_a_study(few_operations, tmp_path, monkeypatch):
    """Two small searches and their networks for real; then again, from what is stored."""
    config = merge(StudyConfig(), REAL, "test")
    config = merge(config, {"real": {"seeds": 1, "random": 1}}, "test")
    said = []
    path, result = study(config, tmp_path / "run", log=said.append)
    groups = result["real"]["groups"]
    assert [group["name"] for group in groups] == ["printed", "ridge", "random networks"]
    assert {folder.name for folder in (path / "searches").iterdir()} == {
        "printed-seed0",
        "ridge-seed0",
    }
    for group in groups[:2]:
        folder = path / group["searches"][0]["folder"]
        assert Genotype.load(folder / "genotype.json").hash == group["networks"][0]["genotype"]
        assert group["searches"][0]["trained"] == 3 + 3 + 2
    log = (path / "searches" / "ridge-seed0" / "bandit.jsonl").read_text().splitlines()
    assert json.loads(log[0])["policy"] == "ridge"
    assert result["real"]["n"] == 32
    for group in groups:
        (trained,) = group["networks"][0]["trained"]
        assert trained["n"] == 32
        assert 0 <= trained["robust_accuracy"] <= trained["clean_accuracy"] <= 1

    def never(*arguments, **keywords):
        raise AssertionError("this is stored")

    (path / "summary.json").unlink()
    monkeypatch.setattr("fastbandit.search.run._search", never)
    monkeypatch.setattr(module, "train_from_scratch", never)
    assert without_seconds(study(config, path)[1]) == without_seconds(result)


def test_training_from_scratch_repeats_and_depends_on_its_seed(few_operations, tmp_path):
    config = merge(StudyConfig(), REAL, "test").search_of("printed", 0)
    genotype = random_genotype(config, "random network", 0)
    first, again, other = (
        without_seconds(
            module.train_from_scratch(
                genotype,
                module.training_settings(config, 2, seed),
                tmp_path / f"run-{number}",
                load(config.data),
            )
        )
        for number, seed in enumerate((1, 1, 2))
    )
    assert first == again
    assert first["parameters"] == other["parameters"]
    assert first != other


def test_random_networks_are_uniform_and_fixed_by_the_seed(few_operations):
    config = merge(StudyConfig(), REAL, "test").search_of("printed", 0)
    drawn = [random_genotype(config, "random network", i) for i in range(12)]
    assert len({genotype.hash for genotype in drawn}) == 12
    assert drawn[3].hash == random_genotype(config, "random network", 3).hash
    text = json.dumps([genotype.to_dict()["cells"] for genotype in drawn])
    counts = [text.count(f'"{name}"') for name in space.get("general7-light").operations]
    assert sum(counts) == 12 * 60
    assert all(abs(count - 240) < 60 for count in counts)  # 4.7 standard deviations


def test_figures_of_groups(monkeypatch, tmp_path):
    """Means, intervals and tests, with accuracies made up."""
    values = iter([0.5, 0.6, 0.7, 0.8, 0.1, 0.2, 0.3])

    def made_up(genotype, settings, folder, source):
        robust = next(values)
        return {
            "genotype": genotype.hash,
            "parameters": 10,
            "clean_accuracy": robust + 0.1,
            "robust_accuracy": robust,
            "n": 32,
            "attack": "none",
            "seconds": 1.0,
        }

    def searched(config, path, source):
        return random_genotype(config, "random network", 100 + config.seed), {"seconds": 60.0}

    monkeypatch.setattr(module, "train_from_scratch", made_up)
    monkeypatch.setattr(module, "_search", searched)
    # Both entries find the same networks; each has its own training all the same.
    config = merge(StudyConfig(), REAL, "test")
    config = merge(config, {"real": {"policies": ["printed", "ridge,space=robust8-light"]}}, "test")
    _, result = study(config, tmp_path / "run")
    printed, ridge, drawn = result["real"]["groups"]
    assert printed["robust_accuracy"]["values"] == [0.5, 0.6]
    assert ridge["robust_accuracy"]["values"] == [0.7, 0.8]
    assert drawn["robust_accuracy"]["mean"] == pytest.approx(0.2)
    _, low, high = mean_interval([0.1, 0.2, 0.3])
    assert (drawn["robust_accuracy"]["low"], drawn["robust_accuracy"]["high"]) == (low, high)
    assert ridge["robust_accuracy"]["p"] == {
        "printed": mann_whitney([0.7, 0.8], [0.5, 0.6]),
        "random networks": mann_whitney([0.7, 0.8], [0.1, 0.2, 0.3]),
    }
    assert ridge["clean_accuracy"]["mean"] == pytest.approx(0.85)
    assert ridge["search_seconds"] == 60.0
    text = format_tables(result)
    assert re.search(
        r"ridge,space=robust8-light +2 +85\.00 .* 75\.00 .* 10 +1\.0  0\.2, 0\.33", text
    )


def test_every_repeat_trains_from_a_seed_of_its_own(monkeypatch, tmp_path):
    calls = []

    def made_up(genotype, settings, folder, source):
        calls.append((genotype.hash, settings.seed))
        return {
            "genotype": genotype.hash,
            "parameters": 10,
            "clean_accuracy": 0.9,
            "robust_accuracy": 0.1 * len(calls),
            "n": 32,
            "attack": "none",
            "seconds": 1.0,
        }

    # Every search finds the same network: what is stored of one must not serve another.
    base = merge(StudyConfig(), REAL, "test").search
    always = random_genotype(base, "random network", 0)
    monkeypatch.setattr(module, "train_from_scratch", made_up)
    monkeypatch.setattr(module, "_search", lambda config, path, source: (always, {"seconds": 1.0}))
    changes = {"real": {"policies": ["printed"], "random": 0, "repeats": 2}}
    config = merge(merge(StudyConfig(), REAL, "test"), changes, "test")
    _, result = study(config, tmp_path / "run")
    assert len(set(calls)) == 4
    (printed,) = result["real"]["groups"]
    assert printed["robust_accuracy"]["values"] == pytest.approx([0.15, 0.35])


def test_what_was_made_of_other_data_is_not_taken(few_operations, monkeypatch, tmp_path):
    """The name is the same: images were added to the folder, say."""
    calls = []

    def made_up(genotype, settings, folder, source):
        calls.append(settings.seed)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {
            "genotype": genotype.hash, "parameters": 10, "clean_accuracy": 0.9,
            "robust_accuracy": 0.5, "n": 32, "attack": "none", "seconds": 1.0,
        }  # fmt: skip

    monkeypatch.setattr(module, "train_from_scratch", made_up)
    changes = {"real": {"policies": ["printed"], "seeds": 1, "random": 1}}
    config = merge(merge(StudyConfig(), REAL, "test"), changes, "test")
    with pytest.raises(KeyboardInterrupt):
        study(config, tmp_path / "run")
    original = module.load

    def load(name, **options):
        return dataclasses.replace(original(name, **options), digest="0123456789abcdef")

    monkeypatch.setattr(module, "load", load)
    with pytest.raises(RunError, match=r"split.json: the data changed .*\(digest"):
        study(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "searches")
    study(config, tmp_path / "run")
    assert len(calls) == 4  # the first network, too, is trained again


# --- the command --------------------------------------------------------------------------------


def test_command_ends_with_the_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "smoke", TINY)
    assert main(["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run"
    assert out.splitlines()[-3:] == [
        f"run folder: {folder}",
        f"charts: {folder / 'study.html'}",
        f"next: python -m webbrowser {folder / 'study.html'}   (shows them)",
    ]
    assert re.search(r"^ridge +-?\d\.\d{3} \+- \d\.\d{3} +\d+\.\d \+- \d+\.\d %", out, re.M)
    assert main(["--preset", "smoke", "--out", str(tmp_path / "run")]) == 0
    again = capsys.readouterr()
    assert "all is done" in again.err
    assert again.out == out
    assert main(["--preset", "smoke", "--out", str(tmp_path / "run"), "--force", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == str(tmp_path / "run")


def test_command_plans_and_prints_settings(capsys, tmp_path):
    assert main(["--preset", "digits-small", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan == {
        "simulated_settings": 0,
        "simulated_searches": 0,
        "searches": 6,
        "search_epochs": 6 * 53,
        "networks": 12,
        "network_epochs": 72,
    }
    assert main(["--simulated.parts", "rate", "--simulated.seeds", "7", "--print-config"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.yaml").write_text(text)
    assert main(["--config", str(tmp_path / "mine.yaml"), "--print-config"]) == 0
    assert capsys.readouterr().out == text
    settings = yaml.safe_load(text)["simulated"]
    assert (settings["parts"], settings["seeds"]) == (["rate"], 7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "big"], "--preset: expected one of simulated, smoke"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
        (["--simulated.parts", "speed"], "simulated.parts: expected some of"),
    ],
)
def test_wrong_commands(arguments, message, capsys):
    try:
        status = main(arguments)
    except SystemExit as ended:  # tyro's own way out
        status = ended.code
    assert status != 0
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- the page -----------------------------------------------------------------------------------


def drawing(text):
    return ElementTree.fromstring(text)


def test_whisker_chart_draws_every_value_and_interval():
    nan = math.nan
    groups = [
        Points("a <b>", [0, 2], [1.0, 2.0], [0.5, nan], [1.5, nan], "s1"),
        Points("c", [1], [nan], [nan], [nan], "s2"),
    ]
    text = whisker_chart(
        groups, ["x", "y", "z"], title="t", x_label="", y_label="", lines=[(0.0, "none")]
    )
    chart = drawing(text)
    circles = chart.findall("circle")
    assert [circle.find("title").text for circle in circles] == [
        "a <b>, x: 1 (0.5 to 1.5)",
        "a <b>, z: 2",
    ]
    # One interval, one line through both values.
    lines = [p.get("d") for p in chart.findall("path") if p.get("class").startswith("line s1")]
    assert len(lines) == 2
    # Larger is higher; the interval's ends are on either side of its value.
    y = [float(circle.get("cy")) for circle in circles]
    assert y[1] < y[0]
    top, bottom = map(float, re.match(r"M[\d.]+ ([\d.]+)V([\d.]+)", lines[0]).groups())
    assert top < y[0] < bottom
    assert (bottom - y[0]) == pytest.approx(y[0] - top, abs=0.02)
    assert whisker_chart([], ["x"], title="t", x_label="", y_label="").startswith("<p")


def test_page_shows_every_part_and_loads_nothing(finished):
    path, result = finished
    page = (path / "study.html").read_text()
    assert charts_can_be_scrolled(page)
    for part in PARTS:
        assert f'<section id="{part}">' in page
    charts = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(charts) == len(PARTS)
    assert sum(len(drawing(chart).findall("circle")) for chart in charts) == len(
        result["simulated"]["rows"]
    )
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
