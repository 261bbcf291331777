"""Sizes of networks against the networks themselves, budgets, and random networks within one."""

from __future__ import annotations

import json

import pytest
from _tiny import TINY, tiny
from test_search import interrupted

from fastbandit import space
from fastbandit.bandit import replay
from fastbandit.config import ConfigError
from fastbandit.genotype import Genotype
from fastbandit.models import multiply_adds
from fastbandit.nn.network import Network
from fastbandit.operations import OperationOptions
from fastbandit.search import SearchConfig, networks, search
from fastbandit.search.sizes import Budget, Images, Sizes, stages

GREY, COLOUR = Images((1, 8, 8), 10), Images((3, 11, 9), 7)


@pytest.mark.parametrize(
    ("changes", "images"),
    [
        ({"space": "robust9-light", "init_channels": 4}, GREY),
        ({"space": "robust11", "denoise": "gaussian", "gabor": "released"}, COLOUR),
        ({"space": "robust11-light", "edges_per_node": "1"}, COLOUR),
        ({"space": "general7", "edges_per_node": "2"}, GREY),
    ],
)
def test_sizes_are_those_of_the_networks(changes, images):
    config = tiny(**changes)
    sizes = Sizes(
        space.get(config.space), config.init_channels, OperationOptions.of(config), images
    )
    for number in range(3):
        genotype = networks.random_genotype(config, "test", number)
        network = Network(genotype, in_channels=images.shape[0], classes=images.classes)
        found = sizes.of(genotype)
        assert found.parameters == sum(p.numel() for p in network.parameters())
        assert found.macs == multiply_adds(network, images.shape)


def test_sizes_of_a_search_are_counted_once_for_its_images():
    config = tiny()
    assert Sizes.of_search(config).images == GREY
    assert Sizes.of_search(config) is Sizes.of_search(config)
    assert Sizes.of_search(tiny(init_channels=4)) is not Sizes.of_search(config)


@pytest.mark.parametrize(
    ("cells", "expected"), [(6, "001122"), (1, "0"), (2, "01"), (3, "012"), (7, "0011222")]
)
def test_stages_begin_where_the_map_is_halved(cells, expected):
    searched = space.get("general7", nodes=2, cell_types=cells)
    assert stages(searched) == [int(one) for one in expected for _ in range(3)]


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("40k:60k", 40_000, 60_000),
        (":1.5M", 0, 1_500_000),
        ("0.25k:", 250, None),
        ("7:7", 7, 7),
        ("2G:3G", 2 * 10**9, 3 * 10**9),
    ],
)
def test_a_budget_is_read(text, low, high):
    budget = Budget.parse(text, "parameters")
    assert (budget.low, budget.high) == (low, high)
    assert budget.holds(low)
    assert not budget.holds(low - 1)
    top = 10**12 if high is None else high
    assert budget.holds(top)
    assert budget.holds(top + 1) == (high is None)


@pytest.mark.parametrize("text", ["", ":", "40k", "1:2:3", "a:b", "-1:2", "1.5:3", "1e3:2", "1K:2"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match=r"^parameters: expected LOW:HIGH, whole numbers"):
        tiny(parameters=text)


def test_budgets_that_exclude_each_other_are_refused():
    with pytest.raises(ConfigError, match="macs: expected LOW:HIGH with a high end"):
        tiny(macs="3k:2k")
    with pytest.raises(ConfigError, match=r"^parameters, macs: expected a budget of one of them"):
        tiny(macs="1:2", parameters="1:2")
    with pytest.raises(ConfigError, match=r"^macs, latency: expected a budget of one of them"):
        tiny(macs="1:2", latency="1:2")
    with pytest.raises(ConfigError, match=r"^macs: expected edges_per_node all, .*; got 1$"):
        tiny(macs="1:2", edges_per_node="1")
    config = tiny(parameters="10:20")
    expected = r"^parameters: budget: expected one that a path can meet; .* none has 10 to 20$"
    with pytest.raises(ConfigError, match=expected):
        config.size_budget()


@pytest.mark.parametrize("name", ["parameters", "macs"])
def test_random_networks_are_within_the_budget(name, monkeypatch):
    monkeypatch.setattr(networks, "_DRAWS", 16)
    free = tiny(space="robust9-light", init_channels=4)
    sizes = Sizes.of_search(free)

    def drawn(config, **how):
        found = [networks.random_genotype(config, "test", i, **how) for i in range(12)]
        return [getattr(sizes.of(one), name) for one in found], found

    usual, first = drawn(free)
    middle = sorted(usual)[6]
    # What is within without the budget stays as it is, draw for draw.
    around = tiny(**{"space": "robust9-light", "init_channels": 4, name: f"{middle}:"})
    inside, second = drawn(around)
    assert min(inside) >= middle
    same = [one.hash == other.hash for one, other in zip(first, second, strict=True)]
    assert same == [size >= middle for size in usual]
    # Far from the usual sizes, and with mixes.
    far = f"{int(1.6 * middle)}:{int(1.7 * middle)}"
    tight = tiny(**{"space": "robust9-light", "init_channels": 4, name: far})
    for how in ({}, {"mixes": 0.5}):
        found, _ = drawn(tight, **how)
        assert all(1.6 * middle - 1 <= size <= 1.7 * middle for size in found)
        assert len(set(found)) > 6
    again, _ = drawn(tight)
    assert again == drawn(tight)[0]
    other = networks.same_size(first[0], tight, 1)
    assert 1.6 * middle - 1 <= getattr(sizes.of(other), name) <= 1.7 * middle


def test_a_search_keeps_to_its_budget(tmp_path, monkeypatch):
    """Paths, the network found, the random ones and their log; with all that a bandit may know."""
    few = space.SearchSpace(
        "general7-light", space.SPACES["general7-light"][2:5], nodes=2, cell_types=2
    )
    monkeypatch.setattr(space, "get", lambda name, **_: few)
    monkeypatch.setattr(networks, "_DRAWS", 16)
    final = {**TINY["final"], "network_epochs": 1, "reference": True}
    bandit = {"policy": "hierarchical", "rounds": 1, "evaluations_per_epoch": 1, "mixes": 0.5}
    free = tiny(final=final, bandit=bandit)
    sizes = Sizes.of_search(free)
    largest = sizes.base_parameters + int(sizes.parameters.amax(1).sum())
    low, high = int(0.8 * largest), int(0.9 * largest)
    config = tiny(final=final, bandit=bandit, parameters=f"{low}:{high}")
    path, summary = search(config, tmp_path / "run")
    lines = [json.loads(line) for line in (path / "bandit.jsonl").read_text().splitlines()]
    start, *rest = lines
    assert start["groups"] == stages(space.get("general7-light"))
    assert start["costs"] == sizes.parameters.tolist()
    assert (start["base_cost"], start["budget_low"], start["budget_high"]) == (
        sizes.base_parameters, low, high
    )  # fmt: skip
    choices = [line["choice"] for line in rest if line["event"] in ("sample", "end")]
    assert len(choices) == 3 + 2 * 5 + 1
    for choice in choices:
        of_path = sizes.parameters[range(6), choice].sum().item() + sizes.base_parameters
        assert low <= of_path <= high
    assert replay(lines).final().tolist() == choices[-1]
    assert [low <= row["parameters"] <= high for row in summary["networks"]] == [True] * 3
    # Interrupted at a checkpoint and gone on with: the same bytes.
    interrupted(config, tmp_path / "again", 5, monkeypatch)
    search(config, tmp_path / "again")
    for name in ("bandit.jsonl", "genotype.json"):
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes()
    # A budget that nothing meets leaves no folder behind.
    with pytest.raises(
        ConfigError, match=r"^parameters: budget: expected one that a path can meet"
    ):
        search(tiny(parameters="1:2"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_the_bandit_of_a_search_knows():
    plain = tiny(space="robust9-light").make_bandit()
    assert plain.known() == {}
    config = tiny(space="robust9-light", bandit={"policy": "hierarchical"})
    known = config.make_bandit().known()
    sizes = Sizes.of_search(config)
    assert known == {
        "groups": stages(space.get("robust9-light")),
        "costs": sizes.parameters.tolist(),
        "base_cost": sizes.base_parameters,
    }
    macs = tiny(space="robust9-light", bandit={"policy": "hierarchical"}, macs="0:1G")
    known = macs.make_bandit().known()
    assert (known["costs"], known["base_cost"]) == (sizes.macs.tolist(), sizes.base_macs)
    with pytest.raises(ConfigError, match=r"^bandit\.mixes: expected 0 with printed, which gives"):
        tiny(bandit={"mixes": 0.5})
    tiny(bandit={"mixes": 0.5, "evaluations_per_epoch": 1})


def test_mixes_vary_the_shares_of_operations():
    config = tiny(space="robust9-light")

    def largest_share(**how):
        genotypes = [networks.random_genotype(config, "mix", i, **how) for i in range(30)]
        edges = [[edge.op for c in g.cells for n in c.nodes for edge in n] for g in genotypes]
        return sum(max(map(one.count, one)) / len(one) for one in edges) / 30

    assert largest_share() < 0.25
    assert largest_share(mixes=0.3) > 0.4


@pytest.mark.parametrize("end", ["argmax", "argmin"])
def test_a_random_network_has_the_size_of_the_largest_and_of_the_smallest(end):
    config = SearchConfig(layers=2)
    searched, sizes = config.search_space(), Sizes.of_search(config)
    choice = getattr(sizes.parameters, end)(1)
    # Not the very last: its operation differs on three edges, so that there are others of its size.
    choice[:3] = 3
    found = Genotype.from_choices(
        searched, choice.tolist(), macro={"layers": searched.cells, "channels": 8}
    )
    other = networks.same_size(found, config, 1)
    wanted = sizes.of(found).parameters
    assert other.hash != found.hash
    assert abs(sizes.of(other).parameters - wanted) <= 0.03 * wanted
