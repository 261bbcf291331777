"""Sizes of networks against the networks themselves, budgets, and random networks within one."""

from __future__ import annotations

import pytest
from _tiny import tiny

from fastbandit import space
from fastbandit.config import ConfigError
from fastbandit.models import multiply_adds
from fastbandit.nn.network import Network
from fastbandit.operations import OperationOptions
from fastbandit.search import networks
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


def test_mixes_vary_the_shares_of_operations():
    config = tiny(space="robust9-light")

    def largest_share(**how):
        genotypes = [networks.random_genotype(config, "mix", i, **how) for i in range(30)]
        edges = [[edge.op for c in g.cells for n in c.nodes for edge in n] for g in genotypes]
        return sum(max(map(one.count, one)) / len(one) for one in edges) / 30

    assert largest_share() < 0.25
    assert largest_share(mixes=0.3) > 0.4
