"""A comparison: its arms, the frozen protocol, the closed test images, the result, the page."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from _pages import charts_can_be_scrolled
from _tiny import TINY

from fastbandit import space
from fastbandit._files import FileError, canonical_json, read_sealed, seal
from fastbandit._statistics import mann_whitney
from fastbandit.config import ConfigError, merge
from fastbandit.data import load
from fastbandit.genotype import Genotype
from fastbandit.models import load_model
from fastbandit.report.scatter import Cloud, Strip, scatter_chart, strip_chart
from fastbandit.runs.tensors import RunError
from fastbandit.search import SearchConfig
from fastbandit.study import PRESETS, StudyConfig, main, study
from fastbandit.study.compare import jobs, protocol, result, stages
from fastbandit.study.compare.arms import Chance, largest_sum
from fastbandit.study.compare.config import image_range
from fastbandit.study.compare.stages import affordable
from fastbandit.study.compare.tables import format_compare

SMALL = {
    "name": "small",
    "data": "digits",
    "simulated": {"parts": []},
    "compare": {
        "searches": 2,
        "claim": False,
        "epochs": 1,
        "train_limit": 48,
        "repeats": 2,
        "tolerance": 0.2,
        "test": "900:932",
        "attacks": "pgd-2,apgd-ce",
        "apgd_steps": 2,
        "pilot": {
            "networks": 3,
            "images": "100:116",
            "attacks": "pgd-1",
            "differences": [10.0],
            "simulations": 100,
        },
    },
    "search": {
        **{
            name: TINY[name]
            for name in ("space", "init_channels", "train_limit", "batch_size", "bandit")
        },
        "evaluation_batch_size": 48,
        "device": "cpu",
        "final": {"steps": 2, "step_size": "0.1", "tune_epochs": 0, "network_epochs": 0}
        | {"rungs": [1]},
    },
}


def small(**changes) -> StudyConfig:
    return merge(merge(StudyConfig(), SMALL, "small"), changes, "test")


@pytest.fixture(scope="module", autouse=True)
def small_space():
    """Three operations on six edges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            space,
            "get",
            lambda name, **shape: space.SearchSpace(
                name, space.SPACES[name][2:5], nodes=2, cell_types=2
            ),
        )
        yield


def without_seconds(value):
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in k}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


@dataclasses.dataclass
class Seen:
    """What happened in a comparison, in order: (what, whether a protocol and images were there)."""

    calls: list = dataclasses.field(default_factory=list)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One comparison from beginning to end, stage by stage, and what it called."""
    path, seen, said = tmp_path_factory.mktemp("compare") / "run", Seen(), []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("search", "retrain", "hold", "evaluate_model"):
            original = getattr(jobs, name)

            def spy(*arguments, original=original, name=name, **keywords):
                source = keywords.get("source", arguments[1] if name == "hold" else None)
                n = None if source.test is None else len(source.test)
                frozen, opened = (path / protocol.FILE).is_file(), (path / stages.OPENED).is_file()
                seen.calls.append((name, n, frozen, opened))
                return original(*arguments, **keywords)

            patch.setattr(jobs, name, spy)
        for until in ("pilot", "freeze", "run"):
            partial = study(small(), path, until=until, log=said.append)[1]["compare"]
            seen.calls.append(("end", until))
            assert "claims" not in partial
            assert not (path / "summary.json").is_file()
        _, whole = study(small(), path, log=said.append)
    return path, whole["compare"], seen, said


@pytest.fixture
def copy(finished, tmp_path):
    """The folder of the comparison before its test images were opened."""
    path = tmp_path / "copy"
    shutil.copytree(finished[0], path)
    for name in ("summary.json", "study.json", "study.html", stages.OPENED):
        (path / name).unlink()
    for piece in (path / "pieces").glob("attacked-*"):
        if read_sealed(piece)["key"]["protocol"] is not None:
            piece.unlink()
    return path


# --- the whole ----------------------------------------------------------------------------------


def test_nothing_that_trains_sees_a_test_image_and_the_protocol_comes_first(finished):
    calls = finished[2].calls
    trained = [call for call in calls if call[0] in ("search", "retrain", "hold")]
    # Pilot 6; 2 searches, 3 tournaments (one to measure), (3 arms of 2 + 3 + 1) networks twice.
    counts = {name: sum(call[0] == name for call in calls) for name in ("search", "hold")}
    assert counts == {"search": 2, "hold": 3}
    assert all(n is None for _, n, _, _ in trained)
    pilot = calls[: calls.index(("end", "pilot"))]
    assert [call[0] for call in pilot] == ["retrain"] * 6 + ["evaluate_model"] * 6
    assert not any(frozen for _, _, frozen, _ in pilot)
    assert calls[len(pilot) + 1] == ("end", "freeze")
    later = calls[len(pilot) + 2 :]
    run = later[: later.index(("end", "run"))]
    assert {name for name, *_ in run} == {"search", "retrain", "hold"}
    assert all(frozen and not opened for _, _, frozen, opened in run)
    after = later[len(run) + 1 :]
    assert after == [("evaluate_model", 32, True, True)] * 20


def test_the_folder_and_the_rows_of_every_network(finished):
    path, found, _, _ = finished
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    expected = {"config.yaml", "env.json", "study.json", "study.html", "summary.json", "pieces"}
    expected |= {"pilot.json", "protocol.json", "opened.json", "compare.csv", "models"}
    assert names == expected | {"searches", "training"}
    assert list((path / "training").iterdir()) == []
    rows = list(csv.DictReader((path / "compare.csv").open()))
    roles = [row["role"] for row in rows]
    networks = sum(one["m"] for one in _origins(found, "best"))
    assert roles.count("pilot") == 6
    assert roles.count("compared") == 20
    assert roles.count("candidate, rung 1") == networks
    robust = {(row["arm"], row["number"], row["repeat"]): row["test_robust"] for row in rows}
    for one in found["networks"]:
        for repeat, value in enumerate(one["robust_accuracies"]):
            assert float(robust[one["arm"], str(one["number"]), str(repeat)]) == value


def _origins(found, arm):
    return [one["origin"] for one in found["networks"] if one["arm"] == arm]


def test_stored_weights_have_the_accuracy_that_is_told(finished):
    path, found, _, _ = finished
    test = load("digits").test
    images, labels = test.images[900:932].float() / 255, test.labels[900:932]
    for one in found["networks"][::3]:
        shares = []
        for repeat in range(2):
            file = path / "models" / f"{one['arm']}-{one['number']}-{repeat}.safetensors"
            network = load_model(file).network.eval()
            with torch.no_grad():
                shares.append((network(images).argmax(1) == labels).double().mean().item())
        assert one["clean_accuracy"] == pytest.approx(sum(shares) / 2)
        assert one["robust_accuracy"] == pytest.approx(sum(one["robust_accuracies"]) / 2)
        assert 0 <= one["robust_accuracy"] <= one["clean_accuracy"]


def test_files_have_the_fields_of_the_page(finished):
    path, found, _, _ = finished
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text()
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))

    def documented(title):
        rows = re.findall(r"^\| (`.+?) \|", sections[title], re.MULTILINE)
        return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}

    assert set(found) == documented("study.json of a comparison")
    for name in (protocol.FILE, stages.OPENED):
        assert set(read_sealed(path / name)) == documented(name)


def test_the_arms_are_what_the_protocol_says(finished):
    path, found, _, _ = finished
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert {name: arm["networks"] for name, arm in arms.items()} == {
        "search": 2,
        "matched": 2,
        "best": 2,
        "largest": 1,
        "one-operation": 3,
    }
    networks = found["networks"]
    for number, one in enumerate(networks[:2]):
        folder = path / one["origin"]["folder"]
        assert Genotype.load(folder / "genotype.json").hash == one["genotype"]
        summary = read_sealed(folder / "summary.json")
        assert one["cost"]["forward_passes"] == summary["cost"]["forward_passes"]
        match = networks[2 + number]
        assert match["arm"] == "matched"
        assert match["genotype"] != one["genotype"]
        assert abs(match["parameters"] - one["parameters"]) <= 0.2 * one["parameters"]
        assert match["origin"]["wanted_parameters"] == one["parameters"]
    assert networks[0]["genotype"] != networks[1]["genotype"]
    biggest = max(one["parameters"] for one in networks)
    assert arms["largest"]["parameters"] == biggest
    # No tournament costs more than its search, and one candidate more would.
    for search, best in zip(networks[:2], networks[4:6], strict=True):
        spent, had = (one["cost"] for one in (best, search))
        passes = [one["forward_passes"] + one["backward_passes"] for one in (spent, had)]
        assert passes[0] <= passes[1] or best["origin"]["m"] == 1
        assert best["origin"]["rungs"][0]["networks"] == best["origin"]["m"]


def test_tests_and_size_of_the_result(finished):
    _, found, _, _ = finished
    values = {arm["name"]: arm["robust_accuracy"]["values"] for arm in found["arms"]}
    assert [one["name"] for one in found["tests"]] == [
        "search against matched",
        "search against best",
    ]
    for one in found["tests"]:
        assert one["p"] == mann_whitney(values["search"], values[one["arms"][1]])
        assert one["p_adjusted"] >= one["p"]
        assert one["smallest_p"] == pytest.approx(1 / 3)
    assert found["claims"] is None
    assert found["size"]["networks"] == 7
    assert found["n"] == 32
    assert "PGD-2, APGD-CE" in found["attack"]


def test_the_protocol_holds_what_decides_the_result(finished):
    path, found, _, _ = finished
    frozen = protocol.read_frozen(path)
    assert frozen.sha256 == found["sha256"]
    said = frozen.protocol
    assert said == found["protocol"]
    assert said["data"]["test_images"] == [900, 932]
    seeds = said["search"]["seeds"]
    assert seeds == [one.seed for one in protocol.searches(small())]
    assert len(set(seeds)) == 2
    seeds = [seed for arm in said["training"]["seeds"].values() for pair in arm for seed in pair]
    assert len(seeds) == len(set(seeds)) == 12
    assert said["attack"]["settings"]["attacks"] == "pgd-2,apgd-ce"
    assert said["attack"]["settings"]["epsilon"] == "0.2"
    assert said["training"]["settings"]["threads"] == 1
    pilot = read_sealed(path / "pilot.json")
    assert said["pilot"]["sd_of_a_network"] == pilot["sd"]
    groups = [one["robust_accuracy"] for one in pilot["networks"]]
    assert [len(group) for group in groups] == [2, 2, 2]
    variance = pilot["components"]["between"] ** 2 + pilot["components"]["within"] ** 2 / 2
    assert pilot["sd"] == pytest.approx(variance**0.5)
    assert pilot["level"] == 0.01 / 2


def test_page_and_text(finished):
    path, found, _, said = finished
    page = (path / "study.html").read_text()
    assert charts_can_be_scrolled(page)
    assert found["sha256"] in page
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 2
    strips, scatter = (ElementTree.fromstring(chart) for chart in charts)
    # Every network, and five means; every network and a key of five.
    for chart in (strips, scatter):
        assert len(chart.findall("{*}circle") or chart.findall("circle")) == 10 + 5
    assert "none registered" in page
    text = format_compare(found)
    assert "search against matched" in text
    assert "no claim was registered" in text
    assert f"SHA-256 {found['sha256']}" in text
    assert any("is frozen" in line for line in said)


def test_a_finished_comparison_is_kept_whatever_the_processes(finished):
    path, found, _, _ = finished
    before = (path / "study.json").read_bytes()
    said = []
    _, again = study(small(compare={"processes": 3}), path, log=said.append)
    assert again["compare"] == json.loads(json.dumps(found))
    assert "all is done" in said[0]
    assert (path / "study.json").read_bytes() == before
    with pytest.raises(RunError, match="another configuration"):
        study(small(seed=5), path)
    with pytest.raises(RunError, match=r"opened\.json: --force does not replace a comparison"):
        study(small(seed=5), path, force=True)


# --- the protocol -------------------------------------------------------------------------------


def _rewrite(path, change, *, hashed):
    stored = read_sealed(path / protocol.FILE)
    change(stored["protocol"])
    if hashed:
        stored["sha256"] = protocol.protocol_sha256(stored["protocol"])
    (path / protocol.FILE).write_text(json.dumps(seal(stored)))


def test_a_changed_protocol_is_refused(copy):
    original = (copy / protocol.FILE).read_text()
    # As a text; as values; and with a new hash.
    (copy / protocol.FILE).write_text(original.replace('"alpha": 0.01', '"alpha": 0.05'))
    with pytest.raises(FileError, match="damaged or edited"):
        study(small(), copy)
    (copy / protocol.FILE).write_text(original)
    _rewrite(copy, lambda said: said.update(margin_points=9.0), hashed=False)
    with pytest.raises(RunError, match="the protocol does not have the SHA-256"):
        study(small(), copy)
    _rewrite(copy, lambda said: None, hashed=True)
    with pytest.raises(RunError, match=re.escape("margin_points differs: 9.0 there, 1.0 now")):
        study(small(), copy)
    # With the settings of the changed protocol nothing that was trained counts for it.
    said = []
    with pytest.raises(RunError, match="stop"):
        study(small(compare={"margin": 9.0}), copy, until="run", log=_stop(said, "search"))
    assert "(stored)" not in said[-1]


def _stop(said, word):
    def log(text):
        said.append(text)
        if text.startswith(word):
            raise RunError("stop")

    return log


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"compare": {"alpha": 0.05}}, "alpha differs: 0.01 there, 0.05 now"),
        ({"compare": {"searches": 3}}, "n differs: 2 there, 3 now"),
        ({"compare": {"test": "900:940"}}, "data.test_images differs: [900, 932] there"),
        ({"compare": {"attacks": "pgd-2"}}, "attack.settings.attacks differs: pgd-2,apgd-ce"),
        ({"compare": {"epochs": 2}}, "training.settings.epochs differs: 1 there, 2 now"),
        ({"compare": {"margin": 2.0}}, "margin_points differs: 1.0 there, 2.0 now"),
        ({"compare": {"policy": "ridge"}}, "search.policy differs: printed there, ridge now"),
        ({"compare": {"pilot": {"networks": 4}}}, "pilot.settings.networks differs: 3 there"),
        ({"compare": {"power": 0.8}}, "pilot.power differs: 0.9 there, 0.8 now"),
        ({"compare": {"tolerance": 0.1}}, "arms.matched.tolerance differs: 0.2 there, 0.1 now"),
    ],
)
def test_another_setting_after_the_freeze_is_refused_by_name(copy, changes, field):
    before = (copy / "config.yaml").read_bytes()
    with pytest.raises(RunError, match=re.escape(field)):
        study(small(**changes), copy)
    assert (copy / "config.yaml").read_bytes() == before
    assert study(small(), copy)[1]["compare"]["stage"] == "opened"  # it goes on as it was


def test_a_setting_that_came_later_had_its_default(copy):
    """A protocol of an older version lacks it, and goes on; another value is another protocol."""
    stored = read_sealed(copy / protocol.FILE)
    found = stored["protocol"]
    del found["attack"]["settings"]["surrogates"]
    del found["search"]["settings"]["final"]["tournament"]
    stored = {**stored, "sha256": protocol.protocol_sha256(found)}
    (copy / protocol.FILE).write_text(json.dumps(seal(stored)))
    assert protocol.freeze(copy, protocol.make_protocol(small(), pilot(copy))).protocol == found
    with pytest.raises(RunError, match=r"search\.settings\.final\.tournament differs: 0 there, 4"):
        protocol.freeze(
            copy, protocol.make_protocol(small(search={"final": {"tournament": 4}}), pilot(copy))
        )


def pilot(path: Path) -> dict:
    return read_sealed(path / "pilot.json")


def unfreeze(path: Path) -> None:
    """Make the folder one whose pilot alone is done."""
    (path / protocol.FILE).unlink()
    for piece in (path / "pieces").glob("attacked-*.json"):
        if read_sealed(piece)["key"]["protocol"] is not None:
            piece.unlink()


def test_a_pilot_has_not_looked_at_the_test_images(copy):
    unfreeze(copy)
    changes = {"test": "112:140", "pilot": {"networks": 0, "images": ""}}
    with pytest.raises(RunError, match=r"got 112:140; a pilot in this folder attacked 100:116"):
        study(small(compare=changes), copy)
    assert not (copy / protocol.FILE).exists()
    changes["test"] = "116:140"
    study(small(compare=changes), copy, until="freeze")
    assert protocol.read_frozen(copy).protocol["data"]["test_images"] == [116, 140]


def test_settings_may_change_until_the_freeze(copy):
    unfreeze(copy)
    said = []
    config = small(compare={"searches": 4, "epochs": 1})
    _, found = study(config, copy, until="freeze", log=said.append)
    assert "goes on with other settings" in said[0]
    assert sum("(stored)" in line for line in said) == 12  # the whole pilot
    assert protocol.read_frozen(copy).protocol["n"] == 4
    assert "searches: 4" in (copy / "config.yaml").read_text()
    assert found["compare"]["sha256"] == protocol.read_frozen(copy).sha256


# --- the test images ----------------------------------------------------------------------------


def _never(*arguments, **keywords):
    raise AssertionError("a test image was attacked")


def test_test_images_stay_closed_while_a_network_is_missing(finished, copy, monkeypatch):
    monkeypatch.setattr(jobs, "evaluate_model", _never)
    (copy / "models" / "matched-1-0.safetensors").unlink()
    with pytest.raises(RunError, match=r"matched-1-0\.safetensors: the test images stay closed"):
        study(small(), copy)
    other = copy / "models" / "matched-0-0.safetensors"
    shutil.copyfile(other, copy / "models" / "matched-1-0.safetensors")
    with pytest.raises(RunError, match="expected the weights that were stored"):
        study(small(), copy)
    assert not (copy / stages.OPENED).exists()
    frozen = protocol.read_frozen(copy)
    members = [
        stages.Member(arm, number, "", None, {}, {}, trained=[{"model": None}] * 2)
        for arm, networks in frozen.protocol["training"]["seeds"].items()
        for number in range(len(networks))
    ]
    members += [stages.Member("largest", 0, "", None, {}, {}, trained=[{"model": None}] * 2)]
    for missing in ("search", "best", "largest", "one-operation"):
        kept = [one for one in members if (one.arm, one.number) != (missing, 0)]
        with pytest.raises(RunError, match=f"network 0 of arm {missing} is not trained"):
            stages.seal_networks(copy, frozen, kept)
    members[3].trained = members[3].trained[:1]
    with pytest.raises(RunError, match="network 1 of arm matched is not trained"):
        stages.seal_networks(copy, frozen, members)


def test_test_images_are_opened_once(finished, tmp_path, monkeypatch):
    """Once open, nothing is trained; and they are open for these networks alone."""
    path = tmp_path / "run"
    shutil.copytree(finished[0], path)
    (path / "summary.json").unlink()
    for name in ("search", "retrain", "evaluate_model", "hold"):
        monkeypatch.setattr(jobs, name, _never)
    _, again = study(small(), path)
    assert without_seconds(again["compare"]) == without_seconds(finished[1])
    (path / "summary.json").unlink()
    opened = read_sealed(path / stages.OPENED)
    models = {**opened["models"], "search-0-0.safetensors": "0" * 64}
    (path / stages.OPENED).write_text(json.dumps(seal({**opened, "models": models})))
    with pytest.raises(RunError, match="opened for other networks than these"):
        study(small(), path)
    piece = next(
        piece
        for piece in sorted((path / "pieces").glob("alone-*"))
        if read_sealed(piece)["key"]["protocol"]
    )
    piece.unlink()
    with pytest.raises(RunError, match="nothing more is searched or trained; 1 pieces are missing"):
        study(small(), path)


def test_an_interrupted_comparison_goes_on(finished, copy):
    """Stopped among the trainings and among the attacks; the result is the same."""
    pieces = [
        piece
        for piece in sorted((copy / "pieces").glob("alone-*"))
        if read_sealed(piece)["key"]["model"].startswith("matched")
    ]
    for piece in pieces[:2]:
        piece.unlink()
    for word in ("matched 1", "best 0, attacked"):
        with pytest.raises(RunError, match="stop"):
            study(small(), copy, log=_stop_after(word))
    _, found = study(small(), copy)
    assert without_seconds(found["compare"]) == without_seconds(finished[1])


def _stop_after(word):
    def log(text):
        if text.startswith(word) and "(stored)" not in text:
            raise RunError("stop")

    return log


def test_test_images_that_are_not_there_are_refused_before_a_folder(tmp_path):
    with pytest.raises(ConfigError, match="test images 900:2000: expected at most the 1,797"):
        study(small(compare={"test": "900:2000"}), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"compare\.attacks: .*expected"):
        study(small(compare={"attacks": "pgd"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_train_to_the_same_bytes(finished, tmp_path):
    """A child of its own knows nothing of this test's space, and needs nothing of it."""
    path, found, _, _ = finished
    one = found["networks"][0]
    genotype = Genotype.load(path / one["origin"]["folder"] / "genotype.json")
    config = small()
    made = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        (folder / "pieces").mkdir(parents=True)
        todo = [
            jobs.network_job(
                "network",
                genotype,
                protocol.recipe(config, 1, protocol.network_seed(config, "search", 0, repeat)),
                folder,
                protocol=found["sha256"],
                keeps=f"search-0-{repeat}.safetensors",
            )
            for repeat in range(2)
        ]
        made[processes] = without_seconds(jobs.Work(folder, processes, lambda text: None).do(todo))
    assert made[1] == made[2]
    opened = read_sealed(path / stages.OPENED)["models"]
    for one in made[2]:
        assert opened[one["model"]["file"]] == one["model"]["sha256"]


# --- networks of chance -------------------------------------------------------------------------


def chance(**changes) -> Chance:
    config = merge(
        SearchConfig(), {"space": "general7-light", "init_channels": 4, **changes}, "test"
    )
    return Chance(config, load("digits"))


@pytest.mark.parametrize("kept", ["all", "1", "2"])
def test_a_matched_network_has_the_size_of_the_other(kept):
    drawn = chance(edges_per_node=kept)
    for number in range(3):
        other = drawn.random("other", number)
        found = drawn.matched(other, tolerance=0.05, draws=2000, nearest=False, number=number)
        network = _network(found.genotype)
        assert sum(p.numel() for p in network.parameters()) == found.parameters
        assert abs(found.parameters / found.wanted - 1) <= 0.05
        assert found.genotype.hash != other.hash
        again = drawn.matched(other, tolerance=0.05, draws=2000, nearest=False, number=number)
        assert again.genotype.hash == found.genotype.hash


def _network(genotype):
    from fastbandit.nn.network import Network

    return Network(genotype, in_channels=1, classes=10, channels=4, cells=2)


def test_networks_of_one_size_are_equally_likely():
    drawn = chance()
    sizes = drawn.sizes.parameters
    least = int(sizes.amin(1).sum()) + drawn.sizes.base_parameters
    most = int(sizes.amax(1).sum()) + drawn.sizes.base_parameters
    slopes = []
    for share in (0.2, 0.5, 0.9):
        wanted = round(least + share * (most - least))
        probabilities = drawn._probabilities(wanted)
        mean = (probabilities * sizes).sum().item() + drawn.sizes.base_parameters
        assert mean == pytest.approx(wanted, abs=1)
        # log p is a straight line over size, the same for every row.
        logs = probabilities.log()
        rise = (logs - logs[:, :1]) / (sizes - sizes[:, :1]).double()
        rise = rise[:, 1:]
        assert torch.allclose(rise, rise[0, 0].expand_as(rise), rtol=1e-6)
        slopes.append(rise[0, 0].item())
    assert slopes == sorted(slopes)


def test_no_network_of_that_size():
    drawn = chance()
    other = drawn.random("other", 0)
    with pytest.raises(
        ConfigError, match=r"within 1e-07 % of [\d,]+ parameters among 2; the nearest has"
    ):
        drawn.matched(other, tolerance=1e-9, draws=2, nearest=False, number=0)
    found = drawn.matched(other, tolerance=1e-9, draws=2, nearest=True, number=0)
    assert found.parameters != found.wanted
    (_, smallest), *_ = drawn.one_operation()
    with pytest.raises(ConfigError, match="expected another network than the found one among 40"):
        drawn.matched(smallest, tolerance=0.01, draws=40, nearest=True, number=0)


def test_the_largest_network():
    drawn = chance()
    sizes = {
        one: drawn.sizes.of(genotype).parameters
        for one, genotype in [("largest", drawn.largest()), *drawn.one_operation()]
    }
    assert sizes["largest"] == max(sizes.values())
    budget = chance(parameters=":2500")
    within = budget.sizes.of(budget.largest()).parameters
    table = budget.sizes.parameters.tolist()
    base = budget.sizes.base_parameters
    sums = [base + sum(chosen) for chosen in itertools.product(*table)]
    assert within == max(size for size in sums if size <= 2500)
    macs = chance(macs=":30k")
    table = macs.sizes.macs.tolist()
    sums = [macs.sizes.base_macs + sum(chosen) for chosen in itertools.product(*table)]
    assert macs.sizes.of(macs.largest()).macs == max(size for size in sums if size <= 30_000)


def test_the_largest_sum():
    rows = [[0, 6, 10], [4, 10, 2], [2, 8, 0]]
    for most in range(2, 30):
        chosen = largest_sum(rows, most)
        got = sum(row[position] for row, position in zip(rows, chosen, strict=True))
        assert got == max(s for s in map(sum, itertools.product(*rows)) if s <= most)
    with pytest.raises(ConfigError, match="expected room for 2 beside"):
        largest_sum(rows, 1)


def test_what_the_cost_of_a_search_buys():
    # One rung: a plain division. Two: 5 + 2 go on costs 5 * 3 + 2 * 10.
    assert affordable(30, [3], 0.5) == 10
    assert affordable(29.9, [3], 0.5) == 9
    assert affordable(34.9, [3, 10], 0.25) == 4
    assert affordable(35, [3, 10], 0.25) == 5
    assert affordable(1, [3, 10], 0.25) == 1


# --- tests and claims ---------------------------------------------------------------------------


def said(**changes):
    return {
        "tests": [
            {"name": f"search against {arm}", "arms": ["search", arm], "test": "Mann-Whitney"}
            for arm in ("matched", "best")
        ],
        "alpha": 0.01,
        "margin_points": 1.0,
        "claim": {
            "better than chance": "",
            "not inferior to best of m": "",
            "better than best of m": "",
        },
        **changes,
    }


def test_claims_by_made_up_accuracies():
    high = [0.80 + i / 1000 for i in range(12)]
    low = [0.70 + i / 1010 for i in range(12)]
    same = [0.80 + i / 1003 + 1e-5 for i in range(12)]
    found = result.judge(said(), {"search": high, "matched": low, "best": same})
    assert found["claims"] == {
        "better than chance": True,
        "not inferior to best of m": True,
        "better than best of m": False,
    }
    first, second = found["tests"]
    assert first["difference"] == pytest.approx(sum(high) / 12 - sum(low) / 12)
    assert first["p_adjusted"] == pytest.approx(2 * first["p"])
    assert second["p_adjusted"] == second["p"]
    # The other way round nothing is shown, though p is as small.
    turned = result.judge(said(), {"search": low, "matched": high, "best": same})
    assert not any(turned["claims"].values())
    assert turned["tests"][0]["p"] == pytest.approx(first["p"])
    # A smaller margin than the interval reaches down.
    strict = said(margin_points=0.01)
    narrow = result.judge(strict, {"search": high, "matched": low, "best": same})
    assert narrow["claims"]["not inferior to best of m"] is False


def test_holm_decides_between_one_test_and_two():
    # 5 against 5, all above: p = 0.0079, which two tests double.
    high, low = [0.9, 0.91, 0.92, 0.93, 0.94], [0.1, 0.11, 0.12, 0.13, 0.14]
    middle = [0.9, 0.911, 0.919, 0.931, 0.941]
    both = result.judge(said(), {"search": high, "matched": low, "best": middle})
    assert both["claims"]["better than chance"] is False
    alone = said(tests=said()["tests"][:1], claim={"better than chance": ""})
    one = result.judge(alone, {"search": high, "matched": low})
    assert one["claims"] == {"better than chance": True}


# --- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claim": True}, "compare.searches: expected 6 or more for a claim at 0.01"),
        ({"claim": True, "searches": 5}, "5 networks against 5 give no adjusted p below 0.016"),
        ({"claim": True, "arms": ["largest"]}, "compare.arms: expected matched or best"),
        ({"arms": ["first"]}, "compare.arms: expected some of matched, best, largest"),
        ({"arms": ["best", "best"]}, "each once; got 'best, best'"),
        ({"test": "9"}, "compare.test: expected FIRST:END such as 900:1797, got '9'"),
        ({"test": "9:9"}, "compare.test: expected FIRST:END such as 900:1797, got '9:9'"),
        ({"pilot": {"images": "0:901"}}, "expected none of the test images of compare.test"),
        ({"test": ""}, "compare.pilot.images: expected none of the test images"),
        ({"pilot": {"networks": 2}}, "compare.pilot.networks: expected 0, or 3 or more"),
        ({"pilot": {"differences": [0.0]}}, "compare.pilot.differences: expected positive"),
        ({"alpha": 1.0}, "compare.alpha: expected a share between 0 and 1, got 1.0"),
        ({"policy": "best"}, "compare.policy: 'best': policy: expected one of"),
    ],
)
def test_wrong_comparisons(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        small(compare=changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "data: expected a data set to compare networks on, got None"),
        ({"real": {"seeds": 5}}, "real: expected no settings with compare.searches 2"),
        ({"simulated": {"seeds": 5, "parts": ["rate"]}}, "simulated: expected no settings"),
        ({"search": {"final": {"rungs": []}}}, "search.final.rungs: expected 1 epoch or more"),
        ({"search": {"edges_per_node": "2"}}, "compare.arms: expected edges_per_node all"),
    ],
)
def test_a_comparison_is_a_study_of_its_own(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        small(**changes)


def test_enough_networks_for_a_claim():
    assert small(compare={"claim": True, "searches": 6}).compare.searches == 6
    one = {"claim": True, "searches": 5, "arms": ["matched"]}
    assert small(compare=one).compare.tested == ("matched",)


def test_image_ranges():
    assert image_range("", "x") is None
    assert image_range("0:5", "x") == (0, 5)


def test_command_line(capsys):
    # The budget of the preset is one of its space.
    budget = ["--search.parameters", ":1M"]
    status = main(["--preset", "compare-digits", *budget, "--dry-run", "--json"])
    plan = json.loads(capsys.readouterr().out)
    assert status == 0
    # Three arms of 12, the largest, and the three operations of this file's space.
    assert (plan["searches"], plan["networks"], plan["trainings"]) == (12, 40, 80)
    assert main(["--preset", "smoke", "--until", "pilot"]) == 1
    assert "--until: expected a comparison" in capsys.readouterr().err
    assert {"compare-digits", "compare-fashion", "compare-smoke"} <= set(PRESETS)


# --- charts -------------------------------------------------------------------------------------


def _circles(chart):
    found = {}
    for element in ElementTree.fromstring(chart):
        title = element.find("title")
        if element.tag == "circle" and title is not None:
            found[title.text] = (float(element.get("cx")), float(element.get("cy")))
    return found


def test_strips_and_clouds():
    nan = float("nan")
    chart = strip_chart(
        [
            Strip("a", [1.0, 3.0], ["one", "three"], 2.0, 0.5, 3.5, "s1"),
            Strip("b", [2.0], ["two"], 2.0, nan, nan, "s2"),
        ],
        title="strips",
        y_label="y",
    )
    at = _circles(chart)
    assert at["three"][1] < at["two"][1] < at["one"][1]
    assert at["two"][1] == at["a: mean 2 (0.5 to 3.5)"][1] == at["b: mean 2"][1]
    assert at["one"][0] < at["three"][0] < at["two"][0]
    clouds = [Cloud("a", [1, 2], [5, 6], ["p", "q"], "s1"), Cloud("b", [], [], [], "s2")]
    at = _circles(scatter_chart(clouds, title="t", x_label="x", y_label="y"))
    assert at["p"][0] < at["q"][0]
    assert at["p"][1] > at["q"][1]
    assert "Nothing to draw" in scatter_chart([], title="t", x_label="x", y_label="y")
    assert "Nothing to draw" in strip_chart([], title="t", y_label="y")


def test_hash_of_a_protocol_does_not_depend_on_the_order_of_its_keys():
    one, other = {"a": 1, "b": [1, 2]}, {"b": [1, 2], "a": 1}
    assert protocol.protocol_sha256(one) == protocol.protocol_sha256(other)
    assert canonical_json(one) == '{"a":1,"b":[1,2]}'
    assert protocol.protocol_sha256({"a": 2, "b": [1, 2]}) != protocol.protocol_sha256(one)
