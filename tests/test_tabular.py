"""Studies on a table of true accuracies; the tables are invented ones."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
import torch
from _tables import arrays, write_table

from fastbandit.bandit import AntiBandit, Bandits, BanditSettings, HierarchicalRidge
from fastbandit.bandit.simulation import World
from fastbandit.config import ConfigError
from fastbandit.study.tabular.candidates import Candidates
from fastbandit.study.tabular.models import (
    _ALIKE,
    _NOISES,
    _RATIOS,
    effects,
    neighbours,
    ridge_weights,
)
from fastbandit.study.tabular.searches import (
    Search,
    _untrained,
    best_of,
    parse_search,
    run_search,
)
from fastbandit.study.tabular.table import TableError, read_table
from fastbandit.study.tabular.world import TabularWorld, search

PARAMETERS = torch.tensor([0, 0, 1, 9, 0])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    return read_table(write_table(tmp_path_factory.mktemp("table") / "t.npz"), "robust")


@pytest.fixture(scope="module")
def additive(tmp_path_factory):
    path = tmp_path_factory.mktemp("additive") / "t.npz"
    # Without cells that compute the same, whose accuracies would not be additive.
    whole = arrays(interaction=0.0)
    effect = np.array([[0, 3, -2, 5, 1], [2, -1, 6, 0, -4], [1, 0, -3, 2, 4]])
    robust = 50_000 + 1_000 * effect[np.arange(3), whole["cells"]].sum(1)
    accuracy = np.stack([robust, robust], 1)
    write_table(path, accuracy=accuracy, same_as=np.arange(125))
    return read_table(path, "robust")


def world(table, budget=None, count=1, allowed=None, **settings):
    size = PARAMETERS[table.cells].sum(1)
    allowed = torch.ones_like(size, dtype=torch.bool) if allowed is None else allowed
    spread = float(table.accuracy[allowed].std())
    candidates = Candidates(allowed, size, budget, count)
    return TabularWorld(table, candidates, spread, PARAMETERS, PARAMETERS, **settings)


# --- the table ----------------------------------------------------------------------------------


def test_accuracies_are_those_of_their_cells(table):
    whole = arrays()
    cells = table.cells.tolist()
    for row in (0, 17, 124):
        code = cells.index(whole["cells"][row].tolist())
        assert table.accuracy[code].item() == whole["accuracy"][row, 1] / 100_000
        same = cells.index(whole["cells"][whole["same_as"][row]].tolist())
        assert table.same[code].item() == same
    assert (table.operations, table.edges, len(cells)) == (5, 3, 125)


def test_cells_with_a_path(table, tmp_path):
    for cell, found in zip(table.cells.tolist(), table.connected(0).tolist(), strict=True):
        assert found == (cell[1] != 0 or (cell[0] != 0 and cell[2] != 0)), cell
    # Six edges: 0-1, 0-2, 1-2, 0-3, 1-3, 2-3.
    six = read_table(write_table(tmp_path / "six.npz", operations=2, edges=6), "clean")
    connected = dict(zip(map(tuple, six.cells.tolist()), six.connected(0).tolist(), strict=True))
    assert connected[(1, 0, 1, 0, 0, 1)]  # 0-1-2-3
    assert connected[(0, 0, 0, 1, 0, 0)]
    assert connected[(0, 1, 0, 0, 0, 1)]
    assert not connected[(1, 1, 1, 0, 0, 0)]
    assert not connected[(0, 0, 1, 0, 1, 1)]
    two = read_table(write_table(tmp_path / "two.npz", operations=2, edges=2), "clean")
    with pytest.raises(TableError, match=r"expected 1, 3, 6, 10, \.\.\. edges .* got 2"):
        two.connected(0)


def changed(name, place, value):
    array = arrays()[name].astype(np.int64)
    array[place] = value
    return {name: array}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": arrays()["cells"][:-1]}, "cells: expected all 5^3 = 125 cells of 5 operations"),
        (changed("cells", 3, arrays()["cells"][4]), "cells: expected each cell once, got ["),
        (changed("cells", (3, 1), -1), "cells: expected numbers in 0..4, got -1 at [3, 1]"),
        ({"cells": arrays()["cells"] / 1.0}, "cells: expected integers with 2 dimensions, got f"),
        ({"cells": np.zeros((1, 30), int)}, "cells: expected cells of 1 to 24 edges, got [1, 30]"),
        (changed("accuracy", (7, 1), 100_001), "expected numbers in 0..100000, got 100001 at [7, "),
        ({"accuracy": arrays()["accuracy"][:, :1]}, "accuracy: expected [125, 2], a column for"),
        (
            {"columns": np.array(["a", "a"])},
            "columns: expected different names as text, got <U1 [2",
        ),
        ({"columns": np.array(["a", "b"])}, "expected one of the columns a, b; got 'robust'"),
        ({"same_as": np.arange(124)}, "same_as: expected [125], got [124]"),
        (changed("same_as", 3, 125), "same_as: expected numbers in 0..124, got 125 at [3]"),
        ({"same_as": np.roll(np.arange(125), 1)}, "same_as: expected a cell that stands for"),
        ({"same_as": np.zeros(125, int)}, "has the same accuracies, got 0 for cell"),
    ],
)
def test_wrong_tables(changes, message, tmp_path):
    path = write_table(tmp_path / "wrong.npz", **changes)
    with pytest.raises(TableError, match=re.escape(message)) as error:
        read_table(path, "robust")
    assert str(error.value).startswith(str(path))


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(TableError, match="found no such file"):
        read_table(tmp_path / "none.npz", "robust")
    (tmp_path / "text.npz").write_text("cells")
    with pytest.raises(TableError, match=r"text\.npz: damaged, or not \.npz"):
        read_table(tmp_path / "text.npz", "robust")
    np.savez(tmp_path / "other.npz", cells=np.zeros(3))
    with pytest.raises(TableError, match=r"expected the arrays cells, accuracy, .* got cells"):
        read_table(tmp_path / "other.npz", "robust")


# --- candidates ---------------------------------------------------------------------------------

SIZE = torch.tensor([0, 1, 1, 3, 4, 0, 2])
ALLOWED = torch.tensor([True, True, True, True, True, False, True])


@pytest.mark.parametrize(("budget", "count"), [((1, 1), 1), ((1, 2), 3), (None, 2), ((2, 3), 2)])
def test_candidates_against_all_networks(budget, count):
    found = Candidates(ALLOWED, SIZE, budget, count)
    low, high = (0, 99) if budget is None else (count * budget[0], count * budget[1])
    everyone = list(itertools.product(range(7), repeat=count))
    inside = {
        network
        for network in everyone
        if all(ALLOWED[c] for c in network) and low <= sum(int(SIZE[c]) for c in network) <= high
    }
    contained = found.contain(torch.tensor(everyone)).tolist()
    assert {n for n, yes in zip(everyone, contained, strict=True) if yes} == inside
    value = torch.arange(7).double() ** 2
    mean = sum(sum(float(value[c]) for c in network) / count for network in inside) / len(inside)
    assert found.mean(value) == pytest.approx(mean)
    # Every network as often as every other: chi-square of 6,000 draws.
    uniform = torch.rand(6000, count, 2, generator=torch.Generator().manual_seed(1)).double()
    drawn = [tuple(network) for network in found.draw(uniform).tolist()]
    assert set(drawn) <= inside
    expected = 6000 / len(inside)
    square = sum((drawn.count(network) - expected) ** 2 / expected for network in inside)
    free = len(inside) - 1
    assert square < free + 5 * math.sqrt(2 * free)
    # The best, by a score of each cell in each place.
    score = torch.randn(4, count, 7, generator=torch.Generator().manual_seed(2)).double()
    networks, values = found.best(score[:, :, found.codes], 5)
    for b in range(4):
        ranked = sorted(
            ((sum(float(score[b, i, c]) for i, c in enumerate(n)), n) for n in inside), reverse=True
        )[:5]
        assert [tuple(n) for n in networks[b].tolist()] == [n for _, n in ranked]
        assert values[b].tolist() == pytest.approx([v for v, _ in ranked])


def test_draws_at_the_ends_of_their_numbers():
    found = Candidates(ALLOWED, SIZE, (1, 2), 3)
    for end in (0.0, 1 - 2.0**-53):
        drawn = found.draw(torch.full((1, 3, 2), end, dtype=torch.float64))
        assert found.contain(drawn).all()


def test_no_candidate():
    with pytest.raises(
        ValueError, match=r"no network of 2 cells .* sizes of the cells: 0, 1, 2, 3"
    ):
        Candidates(ALLOWED, SIZE, (5, 9), 2)


# --- the world ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("rho", "count"), [(1.0, 1), (0.7, 1), (0.4, 1), (0.4, 3)])
def test_rewards_have_the_correlation(table, rho, count):
    """Over all cells: the covariance of the truth with the bias is 0 on average over seeds."""
    made = world(table, count=count, rho=rho)
    seeds = torch.arange(400)
    codes = made.draw(seeds, 100)
    bias = made.edge_bias(seeds)
    truth, reward = made.accuracy(codes), made.expected(seeds, bias, codes)
    functions = made.expected(seeds, torch.zeros_like(bias), codes) - truth
    edges = reward - truth - functions
    # Of networks around the mean of their search.
    spread = [(x - x.mean(1, keepdim=True)).square().mean().item() for x in (truth, edges)]
    wanted = spread[0] * (1 / rho**2 - 1) / 2
    assert spread[1] == pytest.approx(wanted, rel=0.08, abs=1e-12)
    assert functions.square().mean().item() == pytest.approx(wanted, rel=0.12, abs=1e-12)
    pooled = torch.stack([(x - x.mean(1, keepdim=True)).flatten() for x in (truth, reward)])
    assert torch.corrcoef(pooled)[0, 1].item() == pytest.approx(rho, abs=0.03)


def test_cells_that_compute_the_same_have_the_same_bias(table):
    made = world(table, rho=0.5)
    seeds = torch.tensor([5, 6])
    dead = (~table.connected(0)).nonzero().view(1, -1, 1).expand(2, -1, -1)
    rewards = made.expected(seeds, torch.zeros(2, 3, 5).double(), dead)
    assert (rewards == rewards[:, :1]).all()
    assert rewards[0, 0] != rewards[1, 0]
    whole = torch.arange(125).view(1, -1, 1).expand(2, -1, -1)
    different = made.expected(seeds, torch.zeros(2, 3, 5).double(), whole) - made.accuracy(whole)
    assert len(different[0].mul(1e9).round().unique()) == len(table.same.unique())


def test_noise_falls_with_the_number_of_cells(table):
    seeds = torch.arange(50)
    for count in (1, 4):
        made = world(table, count=count, noise=0.03, short_rho=0.6)
        assert made.noises(seeds, 200).std().item() == pytest.approx(
            0.03 / math.sqrt(count), rel=0.04
        )
        codes = made.draw(seeds, 200)
        truth, short = made.accuracy(codes), made.short(seeds, codes, 0)
        found = torch.corrcoef(torch.stack([truth.flatten(), short.flatten()]))[0, 1].item()
        assert found == pytest.approx(0.6, abs=0.03)
        later = made.short(seeds, codes[:, 5:9], 5)
        assert torch.equal(later, short[:, 5:9])
        assert torch.equal(made.draw(seeds, 4, 5), codes[:, 5:9])


@pytest.mark.parametrize(
    "settings",
    [
        BanditSettings(rounds=2),
        BanditSettings("ridge", rounds=1, evaluations_per_epoch=2),
        BanditSettings("thompson", rounds=1),
    ],
    ids=lambda s: s.policy,
)
def test_a_search_is_that_of_the_bandit(table, settings):
    # So that no reward leaves [0, 1], where an AntiBandit wants it.
    made = world(table, count=2, rho=0.97, noise=0.01, rise=0.1)
    seeds = torch.tensor([3, 2**40 + 1])
    found = search(made, settings, seeds)
    extra = settings.evaluations_per_epoch
    for i, seed in enumerate(seeds.tolist()):
        one = seeds[i : i + 1]
        bandit = AntiBandit(6, 5, settings, seed=seed)
        total = bandit.total_samples
        noise = made.noises(one, total + extra * (total - 5))[0]
        trend = World(start=0.0, rise=0.1)
        while not bandit.finished:
            initial = bandit.phase == "initial"
            level = trend.level(bandit.trained + 1, total) - 0.1
            for trained in [True] + [False] * (0 if initial else extra):
                path = bandit.sample(trained=trained)
                codes = made.codes(path).view(1, 1, 2)
                reward = made.expected(one, made.edge_bias(one), codes).item() + level
                bandit.credit(path, reward + noise[bandit.samples].item(), trained=trained)
            while bandit.due:
                bandit.prune()
        assert made.codes(bandit.final()).tolist() == found[i].tolist()


@pytest.mark.parametrize(("budget", "count"), [((9, 10), 1), ((2, 9), 2)])
@pytest.mark.parametrize("policy", ["printed", "random", "ucb1", "hierarchical"])
def test_a_search_draws_within_the_budget(table, monkeypatch, budget, count, policy):
    """Also where cells without a path are not wanted, of which the bandit knows nothing."""
    made = world(table, budget, count, allowed=table.connected(0), rho=0.7)
    drawn = []
    original = Bandits.credit

    def credit(self, choice, reward, *, trained=True):
        drawn.append(made.candidates.contain(made.codes(choice)).all().item())
        original(self, choice, reward, trained=trained)

    monkeypatch.setattr(Bandits, "credit", credit)
    found = search(made, BanditSettings(policy, rounds=1), torch.arange(6))
    assert len(drawn) == 5 + 5 + 4 + 3 + 2
    assert all(drawn)
    assert made.candidates.contain(found).all()


def test_a_path_changes_as_little_as_it_can(table):
    made = world(table, (9, 9), allowed=table.connected(0))
    inside = table.cells[made.candidates.codes]
    paths = table.cells[torch.arange(0, 125, 3)]
    seeds = torch.arange(len(paths))
    cost = torch.rand(len(paths), 3, 5, generator=torch.Generator().manual_seed(1)).double()
    fitted = made.fit(seeds, paths, cost, 0)
    for path, new, prices in zip(paths, fitted, cost, strict=True):
        changes = (inside != path).sum(1)
        price = (prices[torch.arange(3), inside] * (inside != path)).sum(1)
        nearest = inside[changes == changes.min()]
        cheapest = nearest[price[changes == changes.min()].argmin()]
        assert new.tolist() == cheapest.tolist()
    # Equal costs: at random, so not the same of all ways.
    many = torch.full((200, 3), 3)
    ways = made.fit(torch.arange(200), many, torch.zeros(200, 3, 5).double(), 0)
    changes = (inside != many[0]).sum(1)
    assert len(ways.unique(dim=0)) == int((changes == changes.min()).sum()) > 1


def test_the_largest_networks(table):
    made = world(table, (1, 11), count=2, allowed=table.connected(0))
    size = PARAMETERS[table.cells].sum(1)
    assert torch.equal(made.size(torch.arange(125)), size)
    found = made.largest(torch.arange(30))
    # 22 in all, of cells of 0 to 3, 9 to 11, 18, 19 and 27: 22 = 19 + 3 = 11 + 11.
    assert size[found].sum(1).unique().tolist() == [22]
    assert len(found.unique(dim=0)) > 5


# --- models and composed searches ---------------------------------------------------------------


def test_ridge_against_the_likelihood_written_out():
    generator = torch.Generator().manual_seed(3)
    design = torch.randn(3, 9, 4, generator=generator).double()
    value = design @ torch.tensor([0.5, 0.0, -1.0, 0.2]).double()
    value = value + 0.7 * torch.randn(3, 9, generator=generator).double() + 4
    found = ridge_weights(design, value)
    ones = torch.ones(9, 1).double()
    for b in range(3):
        centred = design[b] - design[b].mean(0)
        unit = torch.linalg.eigvalsh(centred @ centred.T).mean()
        best = (math.inf, None)
        for step in _RATIOS.tolist():
            h = step / unit
            v = torch.eye(9).double() + h * design[b] @ design[b].T
            inverse = torch.linalg.inv(v)
            gram = ones.T @ inverse @ ones
            p = inverse - inverse @ ones @ torch.linalg.inv(gram) @ ones.T @ inverse
            noise = value[b] @ p @ value[b] / 8
            loss = (8 * noise.log() + v.logdet() + gram.logdet()).item()
            if loss < best[0] - 1e-6:
                best = (loss, h * design[b].T @ p @ value[b])
        assert torch.allclose(found[b], best[1], rtol=1e-6, atol=1e-9)


def test_what_each_model_can_learn(additive):
    seeds = torch.arange(8)
    made = world(additive, short_rho=1.0)
    learnt = run_search(Search("model", 90), made, made, seeds)
    best = int(additive.accuracy.argmax())
    assert learnt.flatten().tolist() == [best] * 8
    # Operation by operation the same everywhere: counts know no edges.
    path = torch.randint(5, (2, 40, 3), generator=torch.Generator().manual_seed(1))
    weight = torch.tensor([0.0, 0.1, 0.3, -0.2, 0.05]).double()
    found = effects("counts", path, weight[path].sum(-1), PARAMETERS, [0] * 3)
    assert torch.equal(found[:, 0], found[:, 2])
    assert torch.allclose(found[0, 0] - found[0, 0, 0], weight, atol=1e-2)


def test_the_hierarchical_model_is_that_of_the_bandit(table):
    made = world(table, count=6)
    seeds = torch.arange(2)
    trained = made.draw(seeds, 12)
    value = made.short(seeds, trained, 0)
    found = effects("hierarchical", made.paths(trained), value, PARAMETERS, made.stages())
    # Three edges a cell, two cells a stage.
    stages = [0] * 6 + [1] * 6 + [2] * 6
    for i in range(2):
        model = HierarchicalRidge(stages, 5, PARAMETERS.expand(18, 5))
        expected, _ = model.fit(made.paths(trained)[i], value[i]).effects()
        assert torch.equal(found[i], expected)
        assert expected.abs().max() > 0


def test_neighbours_against_the_likelihood_written_out(table):
    made = world(table, short_rho=0.8)
    seeds = torch.arange(3)
    trained = made.draw(seeds, 9)
    paths, value = made.paths(trained), made.short(seeds, trained, 0)
    other = table.cells[::6]
    found = neighbours(paths, value, other)
    ones = torch.ones(9, 1).double()
    for b in range(3):
        best = (math.inf, None)
        for r, s in itertools.product(_ALIKE, _NOISES):
            known = r ** (paths[b][:, None] != paths[b][None]).sum(-1).double()
            new = r ** (other[:, None] != paths[b][None]).sum(-1).double()
            inverse = torch.linalg.inv(known + s * torch.eye(9))
            gram = ones.T @ inverse @ ones
            mean = (ones.T @ inverse @ value[b] / gram).item()
            left = inverse @ (value[b] - mean)
            square = (value[b] - mean) @ left
            loss = (8 * square.log() - inverse.logdet() + gram.log()).item()
            if loss < best[0] - 1e-6:
                best = (loss, mean + new @ left)
        assert torch.allclose(found[b], best[1], rtol=1e-6, atol=1e-9)


def test_a_tournament_in_rounds(table):
    """After each round the model learns from what was trained; each network is trained once."""
    made = world(table, (0, 9), allowed=table.connected(0))
    seeds = torch.arange(6)
    how = Search("model", 5, "neighbours", tournament=3, rounds=2)
    found = run_search(how, made, made, seeds)
    cells = made.candidates.codes
    for i, seed in enumerate(seeds.view(-1, 1)):
        codes = made.draw(seed, 5)
        for number in (2, 1):
            value = made.short(seed, codes, 0)
            score = neighbours(made.paths(codes), value, table.cells[cells])[0]
            score = score + 1e-9 * made.chances(seed)[0, 0]
            score[torch.isin(cells, codes.flatten())] = -math.inf
            new = cells[score.topk(number)[1]]
            codes = torch.cat([codes, new.view(1, -1, 1)], 1)
        assert found[i].item() == codes[0, made.short(seed, codes, 0).argmax()].item()
    with pytest.raises(ConfigError, match=r"expected networks of one cell, .* got 2 cells"):
        run_search(how, world(table, count=2), world(table, count=2), seeds)


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("rounds", [1, 3])
def test_no_network_is_trained_twice(additive, monkeypatch, count, rounds):
    """Of several cells neither: after a round the model's best are often those of the last one."""
    made = world(additive, (0, 9), count=count)
    seeds, trained, short = torch.arange(8), [], TabularWorld.short

    def spy(self, seeds, codes, first):
        trained.append(codes)
        return short(self, seeds, codes, first)

    monkeypatch.setattr(TabularWorld, "short", spy)
    run_search(Search("model", 12, "counts", tournament=6, rounds=rounds), made, made, seeds)
    assert [len(one[0]) for one in trained] == [12, *[6 // rounds] * rounds]
    drawn, *chosen = (one.tolist() for one in trained)
    for i in range(8):
        before = {tuple(network) for network in drawn[i]}
        new = [tuple(network) for round_of in chosen for network in round_of[i]]
        assert len(set(new) - before) == 6


def test_a_tournament_trains_fewer_where_fewer_are_left(table):
    made = world(table, (0, 0), count=1)
    codes = made.candidates.codes
    left = _untrained(made, torch.zeros(1, 1, len(codes)), codes[:-2].view(1, -1, 1), 5)
    assert sorted(left.flatten().tolist()) == codes[-2:].tolist()
    none = _untrained(made, torch.zeros(1, 1, len(codes)), codes.view(1, -1, 1), 5)
    assert none.shape == (1, 0, 1)


def test_random_mixes(table):
    """Within the budget; and the share of an operation varies more than in uniform draws."""
    budget = world(table, (0, 5), count=4, allowed=table.connected(0))
    assert budget.candidates.contain(budget.mixes(torch.arange(20), 5)).all()
    free = world(table, count=4)
    seeds = torch.arange(300)
    # Of Dirichlet(1/2, ..., 1/2) over five: variance of a share 0.2 * 0.8 / 3.5.
    of_share = 0.16 / 3.5
    for paths, share in ((free.mixes(seeds, 4), of_share), (free.draw(seeds, 4), 0.0)):
        counts = (free.paths(paths) == 2).double().mean(-1)
        assert counts.mean().item() == pytest.approx(0.2, abs=0.03)
        expected = share + (0.16 - share) / 12
        assert counts.var().item() == pytest.approx(expected, rel=0.15)
    drawn = run_search(Search("model", 6, draws="mix", tournament=2), free, free, seeds[:5])
    trained = free.mixes(seeds[:5], 6)
    top = free.short(seeds[:5], trained, 0).argmax(1)
    kept = (drawn == trained[torch.arange(5), top]).all(1)
    others = (drawn.unsqueeze(1) == trained).all(-1).any(1)
    assert torch.equal(kept, others)  # of those that were trained only the best can win


def test_a_supernet_without_error_finds_the_best(additive):
    made = world(additive, (9, 9), rho=1.0, noise=0.0)
    anywhere = world(additive, rho=1.0, noise=0.0)
    best = additive.accuracy[made.candidates.codes].max()
    for how in (Search("supernet", 90), Search("supernet", 90, within="any")):
        found = run_search(how, made, anywhere, torch.arange(6))
        assert additive.accuracy[found].flatten().tolist() == [best] * 6


def test_best_of_by_hand(table):
    made = world(table, (0, 9), count=2)
    seeds = torch.arange(30)
    drawn = made.draw(seeds, 6)
    short, truth = made.short(seeds, drawn, 0), made.accuracy(drawn)
    for value, kind in ((short, "best-of"), (truth, "full")):
        found = run_search(Search(kind, 6), made, made, seeds)
        assert torch.equal(found, drawn[torch.arange(30), value.argmax(1)])
    assert torch.equal(best_of(made, seeds, 1), drawn[:, 0])


@pytest.mark.parametrize("count", [1, 2])
def test_a_tournament_by_hand(table, count):
    made = world(table, (0, 9), count=count, allowed=table.connected(0))
    seeds = torch.arange(20)
    found = run_search(Search("model", 5, tournament=3), made, made, seeds)
    trained = made.draw(seeds, 5)
    value = made.short(seeds, trained, 0)
    learnt = effects("additive", made.paths(trained), value, PARAMETERS, [0] * 3 * count)
    for i in range(20):
        known = [tuple(network) for network in trained[i].tolist()]
        # Operations that were never seen have equal effects.
        score = made.scores(learnt[i : i + 1]) + 1e-9 * made.chances(seeds[i : i + 1])
        ranked, _ = made.candidates.best(score, 40)
        new = [n for n in ranked[0].tolist() if tuple(n) not in known][:3]
        again = made.short(seeds[i : i + 1], torch.tensor([new]), 5)
        everyone = torch.cat([trained[i], torch.tensor(new)])
        winner = everyone[torch.cat([value[i], again[0]]).argmax()]
        assert found[i].tolist() == winner.tolist()


def test_chunks_do_not_change_a_search(table, monkeypatch):
    made = world(table, (0, 9), count=2, rho=0.6)
    seeds = torch.arange(7)
    ways = [
        lambda: run_search(Search("model", 4, tournament=2), made, made, seeds),
        lambda: search(made, BanditSettings("printed", rounds=1), seeds),
        lambda: made.largest(seeds),
    ]
    whole = [way() for way in ways]
    monkeypatch.setattr("fastbandit.study.tabular.world._ELEMENTS", 1)
    assert all(torch.equal(a, way()) for a, way in zip(whole, ways, strict=True))


def test_costs_of_composed_searches():
    for text, short, full, rewards in (
        ("best-of,trainings=8", 8, 0, False),
        ("full,trainings=4", 0, 4, False),
        ("model,trainings=16,features=counts,tournament=8,within=any", 24, 0, False),
        ("supernet,trainings=235,tournament=8", 8, 0, True),
    ):
        found = parse_search(text, "x")
        assert (found.short, found.full, found.uses_rewards) == (short, full, rewards)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("evolution", "here: 'evolution': expected one of best-of, full, model, supernet, got 'e"),
        ("model,steps=3", "expected SETTING=VALUE with one of trainings, features, tournament"),
        (
            "best-of,tournament=3",
            "expected SETTING=VALUE with one of trainings; got 'tournament=3'",
        ),
        ("model,trainings=few", "trainings: expected a whole number, got 'few'"),
        ("model,trainings=1", "trainings: expected 2 or more, got 1"),
        ("model,within=near", "within: expected one of budget, any, got 'near'"),
        (
            "model,features=all",
            "features: expected one of additive, counts, hierarchical, neighbours",
        ),
        ("model,tournament=2,rounds=3", "rounds: expected 1, or of a model 2 to tournament, got 3"),
        ("supernet,tournament=8,rounds=2", "rounds: expected 1, or of a model 2 to tournament"),
        ("supernet,tournament=-1", "tournament: expected 0 or more, got -1"),
    ],
)
def test_wrong_searches(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_search(text, "here")
