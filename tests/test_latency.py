"""Tables of latencies: text, sums, the cache, and budgets of latency; all times are invented."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from _tiny import TINY, tiny
from test_search import interrupted

from fastbandit import latency, space
from fastbandit.bandit import replay
from fastbandit.config import ConfigError
from fastbandit.latency import Conditions, LatencyTable, Subject
from fastbandit.nn.binary import PackedSepConv
from fastbandit.nn.frozen import FrozenBatchNorm
from fastbandit.nn.signs import packed_signs
from fastbandit.operations import OperationOptions
from fastbandit.report import write_report
from fastbandit.search import networks, search
from fastbandit.search.sizes import LATENCY, Budget, Sizes, table_of_search, timed

FEW = space.SearchSpace(
    "general7-light", space.SPACES["general7-light"][2:5], nodes=2, cell_types=2
)
BASE = 1_500_000


def subject(searched=FEW, channels=4, shape=(1, 8, 8)) -> Subject:
    return Subject(searched, channels, OperationOptions(), shape, 10)


def invented(about: Subject, conditions: Conditions | None = None) -> LatencyTable:
    """A table in which an arm takes longer than the one before, and more so on a larger map."""
    places = space.placements(about.space, about.channels, about.shape[1:])
    times = {
        place: 1000 * (arm + 1) * place.height * place.channels + row for row, arm, place in places
    }
    whole = ((2_000_000, 2_100_000), (3_000_000, 2_900_000), (2_500_000, 2_500_000))
    text = about.describe(conditions or Conditions())
    machine = json.dumps({"device": "a machine"})
    return LatencyTable(text, machine, BASE, whole, tuple(times.items()))


@pytest.fixture
def few(monkeypatch, tmp_path):
    """The small space, a cache of its own, and no clock: the subjects that were measured."""
    monkeypatch.setattr(space, "get", lambda name, **_: FEW)
    monkeypatch.setenv("FASTBANDIT_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "_known", {})
    measured = []

    def measure(about, conditions):
        measured.append(about)
        return replace(invented(about, conditions), machine=_machine(conditions))

    monkeypatch.setattr(latency, "measure_table", measure)
    return measured


def _machine(conditions) -> str:
    return latency.canonical_json(latency.machine(conditions))


def test_a_table_as_text():
    table = invented(subject())
    assert LatencyTable.parse(table.lines()) == table
    assert table.rank_correlation == pytest.approx(1.0)
    assert table.error == pytest.approx(1 / 30)
    assert "rank correlation 1.00, median error 3.3 %" in str(table)
    facts = table.facts()
    assert (facts["base_ms"], facts["batch_size"], facts["networks"]) == (1.5, 1, 3)
    for line in ("dil_conv_3x3 4 1 8 x 5", "dil_conv_3x3 4 1 8 8", "base -1", "network 1", "of []"):
        with pytest.raises(ValueError, match=r"^latency table, line 2: expected an operation"):
            LatencyTable.parse([table.lines()[0], line])
    with pytest.raises(ValueError, match="expected the lines of, machine, base"):
        LatencyTable.parse(table.lines()[:3])


def test_a_table_of_other_networks_is_refused():
    table = invented(subject())
    table.check_subject(subject(), Conditions())
    with pytest.raises(ValueError, match="expected one for channels 8, got one for 4"):
        table.check_subject(subject(channels=8), Conditions())
    with pytest.raises(ValueError, match="expected one for threads 2, got one for 1"):
        table.check_subject(subject(), Conditions(threads=2))
    with pytest.raises(ValueError, match=r"expected a time of skip_connect with 16 channels and"):
        table.edges(FEW, 8, (8, 8))


def test_a_cell_that_is_in_the_chain_several_times_counts_as_often():
    about = subject(space.SearchSpace("b", ("zero", "skip_connect"), 2, 2, 2, chain=5))
    one = latency.Place("skip_connect", 4, 1, 8, 8)
    table = replace(
        invented(about),
        times=tuple(
            (place, int(place == one)) for _, _, place in space.placements(about.space, 4, (8, 8))
        ),
    )
    edges = table.edges(about.space, 4, (8, 8))
    # Of five cells the first alone is normal, of 4 channels and before a reduction.
    assert edges[:, 0].sum() == 0
    assert edges[: about.space.rows // 2, 1].tolist() == [1] * 5
    # A chain of seven has two of them.
    longer = replace(about.space, chain=7)
    times = tuple((place, int(place == one)) for _, _, place in space.placements(longer, 4, (8, 8)))
    found = replace(table, times=times).edges(longer, 4, (8, 8))
    assert found[: longer.rows // 2, 1].tolist() == [2] * 5


def test_what_is_measured_is_what_users_run(monkeypatch):
    """Frozen and packed, in evaluation mode, the bits of a map made before; base and sums."""
    seen = []

    def times(calls, conditions):
        assert torch.is_inference_mode_enabled()
        assert torch.get_num_threads() == conditions.threads
        for call in calls:
            call()
            seen.append(call)
        # The networks take 1,000 more than their operations, which take 7 each.
        if len(seen) == len(calls):
            return [7] * len(calls)
        return [7 * 4 * 2 + 1000] * len(calls)

    monkeypatch.setattr(latency, "_median_times", times)
    searched = space.SearchSpace("b", ("skip_connect", "bin_sep_conv_3x3"), 1, 2, 2, chain=4)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    table = latency.measure_table(subject(searched), Conditions(batch_size=3))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.get_num_threads() == threads
    assert table.base == 1000
    assert table.networks == ((1056, 1056),) * latency.CHECKS
    operations = [call.args[0] for call in seen[: -latency.CHECKS]]
    assert sum(isinstance(one, PackedSepConv) for one in operations) == len(operations) / 2
    assert seen[0].args[1].shape == (3, 4, 8, 8)
    wholes = [call.func for call in seen[-latency.CHECKS :]]
    for network in wholes:
        assert not network.training
        kinds = {type(module) for module in network.modules()}
        assert FrozenBatchNorm in kinds
        assert not any(kind.__name__.startswith("Binary") for kind in kinds)


def test_the_bits_of_a_map_are_not_an_operations(monkeypatch):
    made = []
    original = packed_signs.__globals__["ops"].pack_sign
    monkeypatch.setattr(
        packed_signs.__globals__["ops"], "pack_sign", lambda x: made.append(1) or original(x)
    )

    def times(calls, _):
        for call in calls:
            call()
        count = len(made)
        for call in calls:
            call()
        assert len(made) == count
        return [1] * len(calls)

    monkeypatch.setattr(latency, "_median_times", times)
    place = latency.Place("bin_sep_conv_3x3", 8, 1, 4, 4)
    latency._measure_places([place], OperationOptions(), Conditions())
    assert made


def test_a_clock_is_read_and_calls_are_made_in_turn():
    order = []
    found = latency._median_times(
        [lambda: order.append(0), lambda: order.append(1)], Conditions(rounds=3)
    )
    assert len(found) == 2
    assert min(found) >= 0
    turns = [one for place, one in enumerate(order) if place == 0 or order[place - 1] != one]
    assert turns == [0, 1] * 4  # the warm-up, and three rounds


def test_a_table_is_measured_once_a_machine(few, tmp_path, monkeypatch):
    first = latency.table_of(subject())
    assert latency.table_of(subject()) is first
    monkeypatch.setattr(latency, "_known", {})
    assert latency.table_of(subject()) == first
    assert len(few) == 1
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    # One that is damaged, or another under its name, is measured again.
    for text in ("{", json.dumps({"lines": []})):
        file.write_text(text)
        monkeypatch.setattr(latency, "_known", {})
        assert latency.table_of(subject()) == first
    assert len(few) == 3
    # Another size, other conditions, another machine.
    latency.table_of(subject(channels=8))
    latency.table_of(subject(), Conditions(threads=2))
    original = latency.machine
    monkeypatch.setattr(latency, "machine", lambda c: {**original(c), "torch": "0"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            latency, "measure_table", lambda about, _: few.append(about) or invented(about)
        )
        latency.table_of(subject())
    assert len(few) == 6
    # Without a cache the process has one table all the same.
    monkeypatch.setattr(latency, "machine", original)
    monkeypatch.setattr(latency, "_known", {})
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setenv("FASTBANDIT_DATA", str(blocked))
    assert latency.table_of(subject()) is latency.table_of(subject())
    assert len(few) == 7


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("1.5:2.5", 1_500_000, 2_500_000), (":4", 0, 4_000_000), ("0.0005:", 500, None)],
)
def test_a_budget_of_latency_is_read(text, low, high):
    budget = Budget.parse(text, LATENCY)
    assert (budget.low, budget.high) == (low, high)


@pytest.mark.parametrize("text", ["", ":", "1", "1k:2k", "a:b", "2:1:3"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match=r"^latency: expected LOW:HIGH, milliseconds of which"):
        tiny(latency=text)


def test_errors_of_a_budget(few):
    with pytest.raises(ConfigError, match=r"^latency: expected LOW:HIGH with a high end"):
        tiny(latency="2:1")
    with pytest.raises(ConfigError, match=r"^latency: expected edges_per_node all"):
        tiny(latency="1:2", edges_per_node="1")
    expected = r"^latency: budget: expected one that a path can meet; .*, and none has .* nanosec"
    with pytest.raises(ConfigError, match=expected):
        tiny(latency="0.1:0.2").size_budget()
    config = timed(tiny(latency="1:"))
    lines = config.timing.table
    assert timed(config) is config
    with pytest.raises(ConfigError, match=r"^timing.table: latency table, line 1"):
        table_of_search(replace(config, timing=replace(config.timing, table=("x", *lines[1:]))))
    other = replace(config, timing=replace(config.timing, threads=2))
    with pytest.raises(ConfigError, match=r"^timing.table: .* expected one for threads 2"):
        other.size_budget()
    # Where latency is not the budget nothing is measured.
    count = len(few)
    assert table_of_search(tiny(parameters="1:")) is None
    assert timed(tiny()) == tiny()
    assert len(few) == count


def test_a_search_keeps_to_its_budget_of_latency(few, tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "_DRAWS", 16)
    monkeypatch.setattr(
        "fastbandit.latency._median_times", lambda calls, _: [3_000_000] * len(calls)
    )
    final = {
        **TINY["final"], "network_epochs": 1, "reference": True, "tournament": 3, "rungs": [1],
    }  # fmt: skip
    bandit = {"rounds": 1, "evaluations_per_epoch": 1}
    costs = invented(subject(channels=2)).edges(FEW, 2, (8, 8))
    smallest, largest = (BASE + int(end) for end in (costs.amin(1).sum(), costs.amax(1).sum()))
    low, high = (smallest + int(share * (largest - smallest)) for share in (0.5, 0.7))
    config = tiny(final=final, bandit=bandit, latency=f"{low / 1e6:.6f}:{high / 1e6:.6f}")
    path, summary = search(config, tmp_path / "run")
    assert len(few) == 1
    lines = [json.loads(line) for line in (path / "bandit.jsonl").read_text().splitlines()]
    assert lines[0]["costs"] == costs.tolist()
    assert (lines[0]["base_cost"], lines[0]["budget_low"]) == (BASE, low)
    choices = [line["choice"] for line in lines if line["event"] in ("sample", "end")]
    entries = summary["tournament"]["candidates"]
    for choice in [*choices, *(one["choice"] for one in entries)]:
        assert low <= BASE + int(costs[range(6), choice].sum()) <= high
    assert replay(lines).final().tolist() == choices[-1]
    for row in [*summary["networks"], *entries]:
        assert row["latency_ms"] == 3.0
        assert low <= 1e6 * row["latency_table_ms"] <= high + 1
    assert summary["latency"]["rank_correlation"] == pytest.approx(1.0)
    text = "".join((path / "report.html").read_text())
    assert text.count("ms, by the table") == 1
    assert "<th>ms</th>" in text
    # The table is in the configuration of the run: a run that goes on draws by it, whatever the
    # machine would say by then.
    interrupted(config, tmp_path / "again", 5, monkeypatch)  # 3 epochs, and one of two samples
    stored = (tmp_path / "again" / "config.yaml").read_text()
    assert "dil_conv_3x3 4 2 8 8" in stored
    monkeypatch.setattr(latency, "measure_table", None)
    monkeypatch.setattr(latency, "_known", {})
    monkeypatch.setenv("FASTBANDIT_DATA", str(tmp_path / "none"))
    from fastbandit.config import merge
    from fastbandit.runs.folder import RunFolder

    kept = merge(type(config)(), RunFolder.read_config(tmp_path / "again"), "stored")
    search(kept, tmp_path / "again")
    for name in ("bandit.jsonl", "genotype.json"):
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes()
    write_report(tmp_path / "again")


def test_sizes_have_latencies(few):
    config = timed(tiny(latency="1:"))
    sizes = Sizes.of_search(config)
    genotype = networks.random_genotype(config, "test")
    choice = networks.random_choice(config, "test")
    edges = sizes.costs(LATENCY)[torch.arange(6), choice]
    assert sizes.of(genotype).latency == BASE + int(edges.sum())
    assert Sizes.of_search(tiny()).of(genotype).latency is None
    with pytest.raises(ValueError, match="expected a table of latencies"):
        Sizes.of_search(tiny()).costs(LATENCY)
