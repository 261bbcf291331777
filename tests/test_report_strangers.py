"""What a stranger's search says of its tournament and networks: odd values never break a page."""

from __future__ import annotations

import copy
import json
import random
import re
from typing import Any

import pytest
from _pages import Page, charts_can_be_scrolled
from _runs import make_run, read_lines, write_lines

from fastbandit._files import FileError, check_seal
from fastbandit.report import write_report
from fastbandit.report.axes import tick_labels, ticks
from fastbandit.report.figures import figures
from fastbandit.report.html import interval
from fastbandit.report.networks import networks
from fastbandit.report.scatter import Cloud, Strip, scatter_chart, strip_chart
from fastbandit.report.search import Run, read_run
from fastbandit.report.tournament import tournament

NAN, INF = float("nan"), float("inf")
ODD = [
    *(True, None, -1, 0, 10**40, 10**400, 1e308, -1e308, 5e-324, 1e17, INF, 1.5),
    *("<b>x</b>", "9" * 400, [], {}, [None], [[]], [{}], {"n": 0}, ["x"] * 50_000),
]


def rung(epochs: int, robust: float) -> dict[str, Any]:
    return {
        "epochs": epochs,
        "robust_accuracy": robust,
        "clean_accuracy": robust + 0.1,
        "n": 100,
    }


def candidate(origin: str, parameters: int, *rungs: dict[str, Any]) -> dict[str, Any]:
    return {
        "origin": origin,
        "parameters": parameters,
        "genotype_hash": "ab" * 20,
        "rungs": list(rungs),
    }


def network(name: str) -> dict[str, Any]:
    return {
        "name": name,
        "clean_accuracy": 0.6,
        "robust_accuracy": 0.4,
        "n": 200,
        "split": "test",
        "attack": "PGD",
        "parameters": 1000,
        "macs": 2000,
        "epochs": 4,
        "seconds_total": 5.0,
        "folder": "networks/found",
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Run:
    folder = make_run(tmp_path_factory.mktemp("run") / "r", space_name="general7", rounds=1)
    run = read_run(folder, None)
    assert run.summary is not None
    run.summary |= {
        "chance": 0.1,
        "reward_check": {
            "rank_correlation": 0.3,
            "low": -0.1,
            "high": 0.6,
            "networks": 8,
            "epochs": 2,
            "threshold": 0.5,
            "trusted": False,
        },
        "networks": [network("found"), network("random-1"), network("reference")],
        "tournament": {
            "winner": 1,
            "attack": "PGD-20",
            "rungs": [{"epochs": 1}, {"epochs": 2}],
            "cost": {"seconds_total": 12.0},
            "candidates": [
                candidate("bandit", 1000, rung(1, 0.3)),
                candidate("random", 1100, rung(1, 0.4), rung(2, 0.5)),
                candidate("model", 1200, rung(1, 0.5), rung(2, 0.4)),
            ],
        },
    }
    return run


@pytest.fixture
def run(source) -> Run:
    changed = copy.copy(source)
    changed.summary, changed.notes = copy.deepcopy(source.summary), []
    return changed


def places(at: Any, where: tuple = ()):
    for key, entry in at.items() if isinstance(at, dict) else enumerate(at):
        yield (*where, key)
        if isinstance(entry, (dict, list)):
            yield from places(entry, (*where, key))


def put(value: Any, place: tuple, new: Any) -> None:
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new


def sound(text: str) -> Page:
    page = Page(text)
    assert not re.search(r'\b(?:cx|cy|x|y|d|points)="[^"]*(?:nan|inf)', text)
    assert not re.search(r"\b(?:nan|inf) %", text)
    assert "<b>x</b>" not in text
    assert len(text) < 100_000
    return page


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:20])
def test_odd_values_anywhere(run, value):
    whole = run.summary
    roots = ("tournament", "reward_check", "networks", "chance", "final", "test")
    every = [place for place in places(whole) if place[0] in roots]
    for place in random.Random(0).sample(every, 60):
        run.summary = copy.deepcopy(whole)
        put(run.summary, place, value)
        for section in (tournament, networks, figures):
            sound(section(run))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("rungs", 0, "robust_accuracy"), "0.5"),
        (("rungs", 0, "robust_accuracy"), 1.5),
        (("rungs", 1, "clean_accuracy"), INF),
        (("rungs",), [rung(1, 0.5)] * 17),
        (("rungs",), "0.5"),
        (("parameters",), -5),
        (("parameters",), 1e308),
        (("parameters",), "many"),
    ],
)
def test_a_candidate_that_is_none_is_left_out_with_a_note(run, place, value):
    put(run.summary, ("tournament", "candidates", 2, *place), value)
    page = sound(tournament(run))
    assert [row[0] for row in page.rows[1:]] == ["2, the winner", "1"]
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == 2 + 2  # points, and their key
    assert len(run.notes) == 1
    assert "summary.json: tournament.candidates: 1 of 3 are left out" in run.notes[0]
    tournament(run)
    assert len(run.notes) == 1


def test_the_chart_can_be_scrolled(run):
    assert charts_can_be_scrolled(tournament(run))


def test_what_is_no_list_of_candidates_is_noted(run):
    run.summary["tournament"]["candidates"] = "none"
    assert "Candidates are trained" not in tournament(run)
    assert run.notes == ["summary.json: tournament.candidates: expected a list, got str; left out"]


def test_the_rows_are_as_long_as_the_heads(run):
    """However many rungs the file says there were."""
    for rungs in ([], [{"epochs": 1}] * 5000, "x"):
        run.summary["tournament"]["rungs"] = rungs
        page = sound(tournament(run))
        assert {len(row) for row in page.rows} == {7}


def test_a_candidate_of_unknown_origin_is_drawn(run):
    run.summary["tournament"]["candidates"][0]["origin"] = "<b>x</b>"
    page = sound(tournament(run))
    assert "of unknown origin" in page.text
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == 3 + 3


def test_a_network_without_accuracies_is_left_out_with_a_note(run):
    run.summary["networks"][1]["robust_accuracy"] = 40.0
    run.summary["final"]["clean_accuracy"] = "high"
    sound(networks(run) + figures(run))
    assert "summary.json: networks: 1 of 3 are left out" in run.notes[0]
    assert run.notes[1].startswith(
        "summary.json: final.clean_accuracy: expected a number in [0, 1], got 'high'"
    )


def test_an_epoch_that_nobody_trains_is_left_out(tmp_path):
    folder = make_run(tmp_path / "r", space_name="general7", rounds=1, stop_after=9)
    lines = read_lines(folder / "metrics.jsonl")
    lines[3]["epoch"] = 10**400
    lines[4]["epoch"] = -3
    write_lines(folder / "metrics.jsonl", lines)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "metrics.jsonl: line 4: epoch: " in page.text
    assert "metrics.jsonl: line 5: epoch: " in page.text


@pytest.mark.parametrize("n", [None, 0, -1, 2.5, True, 10**400, "100", NAN])
def test_an_interval_of_no_number_of_images(n):
    assert interval(0.5, n) == "n not recorded"
    assert interval(0.5, 100) == "40.38 to 59.62 %"
    assert interval(NAN, 100) == interval(-0.1, 100) == "n not recorded"


def test_charts_leave_out_what_has_no_place():
    odd = [NAN, INF, -INF, 1e308, -1e308, 1.0]
    chart = scatter_chart(
        [Cloud("a", odd, odd[::-1], [""] * 6, "s1"), Cloud("b", [2.0], [3.0], [""], "s2")],
        title="t", x_label="x", y_label="y",
    )  # fmt: skip
    page = sound(chart)
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == 1 + 1
    strips = [Strip("a", odd, [""] * 6, NAN, NAN, INF, "s1")]
    page = sound(strip_chart(strips, title="t", y_label="y"))
    assert len([tag for tag, _ in page.tags if tag == "circle"]) == 1
    for low, high in ((1e17, 1e17 + 16), (-1e308, 1e308), (0.0, 5e-324), (NAN, 1.0)):
        assert len(tick_labels(ticks(low, high))) < 3


def test_a_sealed_file_with_an_infinite_number_is_damaged():
    value = json.loads('{"a": 1e999, "checksum": "0", "checksum_of": "all other entries"}')
    with pytest.raises(FileError, match="x: damaged or edited"):
        check_seal(value, "x")
