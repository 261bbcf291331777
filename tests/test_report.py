"""The report: its numbers are those of the files, its page is sound, and damage is survived."""

from __future__ import annotations

import ast
import json
import math
import random
import re
import shutil
from html import unescape
from itertools import pairwise
from pathlib import Path

import _processes
import pytest
from _pages import Page
from _runs import make_run, read_lines, write_json, write_lines
from jinja2 import UndefinedError

from fastbandit import report
from fastbandit.bandit import AntiBandit, log
from fastbandit.genotype import Genotype
from fastbandit.report import ReportError, wilson, write_report
from fastbandit.report.charts import Lane, Series, arm_lanes, line_chart, ticks
from fastbandit.report.html import render


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A full run: 60 edges, 9 arms, 141 samples."""
    return make_run(tmp_path_factory.mktemp("run") / "full")


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return Page(write_report(finished).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def small_source(tmp_path_factory) -> Path:
    return make_run(
        tmp_path_factory.mktemp("run") / "small", space_name="general7", rounds=1, name="small"
    )


@pytest.fixture
def small(small_source, tmp_path) -> Path:
    """A run of 7 arms and 1 round, to be changed at will."""
    return Path(shutil.copytree(small_source, tmp_path / "small"))


# --- numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    # 8 of 10 and the two ends, worked by hand from Wilson's formula with z = 1.96.
    [(8, 10, 0.4902, 0.9433), (10, 10, 0.7225, 1.0), (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)],
)
def test_wilson_values(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("correct", "n"), [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses(correct, n):
    with pytest.raises(ValueError, match=f"got {correct} of {n}"):
        wilson(correct, n)


def test_key_figures_are_those_of_the_summary(finished, page):
    summary = json.loads((finished / "summary.json").read_text())
    for part in ("final", "test"):
        n = summary[part]["n"]
        for kind in ("clean", "robust"):
            value = summary[part][f"{kind}_accuracy"]
            low, high = wilson(value * n, n)
            shown = f"{100 * value:.2f} % 95 %: {100 * low:.2f} to {100 * high:.2f} % , n = {n}"
            assert shown.replace(" ,", ",") in page.text
    assert f"epochs {summary['cost']['epochs']} " in page.text
    assert "8.2 min 493.5 seconds" in page.text
    assert "images/s 288 " in page.text
    assert "peak memory 770 MiB" in page.text
    for needed in ("run a1b2c3d4e5f6", "seed 0", "PGD-20", "epsilon 8/255", "L-infinity",
                   "float32", "bn_mode train", "selection: the last arm"):  # fmt: skip
        assert needed in page.text


def test_ledger_is_that_of_the_summary(finished, page):
    cost = json.loads((finished / "summary.json").read_text())["cost"]
    table = {row[0]: row[1] for row in page.rows if len(row) >= 2}
    for phase in ("train", "validate", "other", "total"):
        assert table[phase] == f"{cost[f'seconds_{phase}']:.2f}"
    assert table["forward passes (mini-batches)"] == f"{cost['forward_passes']:,}"
    assert table["backward passes (mini-batches)"] == f"{cost['backward_passes']:,}"
    assert table["peak memory, MiB"] == f"{cost['peak_memory_mb']:,.1f}"


def test_every_abandoned_arm_is_listed_with_its_reason(finished, page):
    events = read_lines(finished / "bandit.jsonl")
    logged = [e for e in events if e["event"] == "abandon"]
    operations = events[0]["operations"]
    shown = [row for row in page.rows if len(row) == 11 and row[0] != "cell"]
    assert len(logged) == len(shown) == 60 * 8
    # State of the bandit at each pruning, worked out here a second time and one arm at a time.
    mean: dict[tuple[int, int], float] = {}
    count: dict[tuple[int, int], int] = {}
    gone: set[tuple[int, int]] = set()
    position = 0
    for event in events:
        if event["event"] == "sample":
            for row, arm in enumerate(event["choice"]):
                old = mean.get((row, arm))
                mean[row, arm] = (
                    event["reward"] if old is None else 0.3 * old + 0.7 * event["reward"]
                )
                count[row, arm] = count.get((row, arm), 0) + 1
        if event["event"] != "abandon":
            continue
        row, arm = event["row"], event["arm"]
        bounds = {
            other: mean[row, other] + math.sqrt(2 * math.log(event["total"]) / count[row, other])
            for other in range(9)
            if (row, other) not in gone
        }
        gone.add((row, arm))
        assert bounds.pop(arm) == pytest.approx(event["upper"])
        following = min(bounds, key=bounds.__getitem__)
        assert shown[position] == [
            event["cell"],
            event["edge"],
            event["operation"],
            str(event["round"]),
            str(event["sample"]),
            f"{event['mean']:.4f}",
            str(event["count"]),
            f"{event['lower']:.4f}",
            f"{event['upper']:.4f}",
            str(event["total"]),
            f"smallest upper bound {event['upper']:.4f}; next smallest "
            f"{bounds[following]:.4f} ({operations[following]})",
        ]
        position += 1


def test_means_and_survivors(finished, page):
    events = read_lines(finished / "bandit.jsonl")
    start, end = events[0], events[-1]
    operations = start["operations"]
    by_edge = {row[0]: row[1:] for row in page.rows if row and row[0] in start["edges"]}
    assert len(by_edge) == 60
    for event in events:
        if event["event"] == "abandon":
            shown = by_edge[event["edge"]][event["arm"]]
            assert shown == f"{event['mean']:.4f}n {event['count']}"
    # n of an edge's arms adds up to all samples.
    for cells in by_edge.values():
        counts = [int(cell.partition("n ")[2]) for cell in cells]
        assert len(counts) == 9
        assert sum(counts) == 141
    survivors = {name: end["choice"].count(arm) for arm, name in enumerate(operations)}
    rounds = [row for row in page.rows if row[0] in operations and len(row) == 10]
    assert {row[0]: int(row[-1]) for row in rounds} == survivors
    assert all(row[1] == "60" for row in rounds)
    for column in range(9):
        assert sum(int(row[1 + column]) for row in rounds) == 60 * (9 - column)
    cells = [row for row in page.rows if row[0] in operations and len(row) == 7]
    assert {row[0]: sum(map(int, row[1:])) for row in cells} == survivors


def test_lanes_hold_every_choice_of_every_edge(finished, page):
    events = read_lines(finished / "bandit.jsonl")
    samples = [e for e in events if e["event"] == "sample"]
    drawn = [a["d"] for tag, a in page.tags if tag == "path" and a.get("class") == "chosen"]
    assert len(drawn) == 60
    for row, path in enumerate(drawn):
        marks = sorted((int(x), (int(y) - 6) // 12) for x, y in re.findall(r"M(\d+) (\d+)h1", path))
        assert marks == [(s["sample"], s["choice"][row]) for s in samples]
    # A lane is as long as its arm lived: 8 crosses on each edge.
    crosses = [a["d"] for tag, a in page.tags if tag == "path" and a.get("class") == "cross"]
    assert [path.count("M") for path in crosses] == [8] * 60
    lived = re.findall(r"chosen (\d+) times, m [\d.]+ at the end; abandoned after (\d+)", page.text)
    assert sorted(int(s) for _, s in lived) == sorted(
        e["sample"] for e in events if e["event"] == "abandon"
    )


def test_curve_tooltips_hold_the_logged_accuracies(finished, page):
    for event in read_lines(finished / "bandit.jsonl"):
        if event["event"] == "sample":
            assert (
                f"after {event['sample'] + 1} samples ({event['phase']}): "
                f"clean {event['clean_accuracy']:.4f}, robust {event['robust_accuracy']:.4f}, "
                f"reward {event['reward']:.4f}"
            ) in page.text


# --- the page -------------------------------------------------------------------------------


def test_page_is_offline_and_without_scripts(finished, page):
    text = (finished / "report.html").read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    assert not any(tag in ("script", "link", "img", "iframe", "object") for tag, _ in page.tags)
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert "url(" not in text.replace("url(#", "")
    assert "@import" not in text
    assert next(a for t, a in page.tags if t == "meta" and a.get("http-equiv"))["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'"
    )
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    anchors = {a["href"] for t, a in page.tags if t == "a"}
    assert anchors <= {f"#{name}" for name in ids}


def test_every_section_names_its_source(page):
    titles = sum(tag == "h2" for tag, _ in page.tags)
    sources = [a for t, a in page.tags if t == "p" and a.get("class") == "source"]
    assert titles == 9
    assert len(sources) == titles + 2  # header and footer
    for file in ("bandit.jsonl", "metrics.jsonl", "summary.json", "config.yaml", "env.json",
                 "genotype.json"):  # fmt: skip
        assert f"from {file}" in page.text or f", {file}" in page.text


def test_drawings_have_names(page):
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert len(drawings) >= 60 + 3 + 1
    assert all(a.get("aria-label") for a in drawings if "class" in a)


def test_hostile_text_is_escaped(small):
    evil = "<script>alert('x')</script>\"&<img src=http://example.org/a>"
    config = (small / "config.yaml").read_text()
    (small / "config.yaml").write_text(config.replace("name: small", f"name: {json.dumps(evil)}"))
    summary = json.loads((small / "summary.json").read_text())
    for place in (summary, summary["data"], summary["final"], summary["cost"], summary["versions"]):
        for key, value in place.items():
            if isinstance(value, str) and key != "status":
                place[key] = evil
    summary["threat"]["norm"] = summary["cost"][evil] = summary["final"]["split"] = evil
    write_json(small / "summary.json", summary)
    write_json(small / "env.json", {evil: evil, "date": evil})
    events = read_lines(small / "bandit.jsonl")
    events[0]["operations"][2] = events[0]["space"] = events[0]["policy"] = evil
    events[0]["edges"][3] = evil
    for event in events[1:]:
        for key in ("operation", "edge", "cell", "phase"):
            if key in event:
                event[key] = evil
    write_lines(small / "bandit.jsonl", events)
    (small / "genotype.json").write_text(json.dumps({"name": evil}))
    with (small / "metrics.jsonl").open("a") as log:
        log.write(json.dumps({"event": evil}) + "\n")
    text = write_report(small).read_text(encoding="utf-8")
    found = Page(text)
    assert not any(tag in ("script", "img") for tag, _ in found.tags)
    assert "<script" not in text
    assert "<img" not in text
    assert evil in "".join(found.words)
    assert evil in unescape(text)
    for _, attributes in found.tags:
        assert set(attributes) <= {
            "class", "id", "style", "href", "name", "content", "charset", "http-equiv", "lang",
            "open", "viewbox", "role", "aria-label", "d", "x", "y", "dy", "cx", "cy", "r", "width",
            "height", "transform", "text-anchor", "stroke-width",
        }  # fmt: skip


def test_hostile_name_of_a_genotype(small):
    evil = "</svg><script>1</script>"
    found = Genotype.load(small / "genotype.json").model_copy(update={"name": evil})
    found.save(small / "genotype.json")
    text = write_report(small).read_text(encoding="utf-8")
    assert "cannot be drawn" not in text
    assert "<script" not in text
    Page(text)


def test_writing_twice_replaces_the_page_and_leaves_nothing_else(small):
    before = {path.name for path in small.iterdir()}
    (small / "report.html").write_text("old")
    assert write_report(small) == small / "report.html"
    assert (small / "report.html").read_text(encoding="utf-8") != "old"
    assert {path.name for path in small.iterdir()} == before | {"report.html"}


def test_summary_that_is_not_written_yet(small):
    summary = json.loads((small / "summary.json").read_text())
    (small / "summary.json").unlink()
    text = write_report(small, summary=summary).read_text(encoding="utf-8")
    assert '<span class="status finished">finished</span>' in text
    assert "unfinished" not in Page(text).text
    assert not (small / "summary.json").exists()


# --- unfinished and damaged runs ------------------------------------------------------------


def test_unfinished_run(tmp_path):
    run = make_run(tmp_path / "part", stop_after=70)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "unfinished" in page.text
    assert "70 of 141 samples so far" in page.text
    assert "The best arms after 60 samples, with 7 arms left on each edge" in page.text
    last = [e for e in read_lines(run / "bandit.jsonl") if e["event"] == "sample"][-1]
    assert f"{100 * last['robust_accuracy']:.2f} %" in page.text
    assert f"{70 * 3.5:.1f} seconds" in page.text
    assert sum(len(row) == 11 for row in page.rows) == 2 * 61  # with a heading each


def test_samples_and_epochs_are_counted_apart(tmp_path):
    """Two of three paths only evaluated: samples are all, epochs those that were trained."""
    run = make_run(tmp_path / "part", stop_after=30)
    file = run / "bandit.jsonl"
    start, *events = read_lines(file)
    mixed = [{**start, "evaluations_per_epoch": 2}]
    mixed += [{**e, "trained": e["sample"] < 9 or e["sample"] % 3 == 0} for e in events]
    file.write_text("".join(json.dumps(e) + "\n" for e in mixed))
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert f"30 of {141 + 2 * 132} samples so far" in page.text
    assert "of 141 planned, 14 more paths only evaluated" in page.text
    assert "after 30 samples (search, only evaluated)" in page.text
    assert "after 28 samples (search):" in page.text


@pytest.mark.parametrize("samples", [0, 1, 5])
def test_run_that_has_just_begun(tmp_path, samples):
    run = make_run(tmp_path / "run", stop_after=samples)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert f"{samples} of 141 samples so far" in page.text
    assert "No genotype yet" in page.text


def test_run_of_a_config_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("name: alone\n")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "alone unfinished" in page.text
    assert "No sample yet" in page.text


@pytest.mark.parametrize("log", ["bandit.jsonl", "metrics.jsonl", "genotypes.jsonl"])
def test_last_line_cut_off(tmp_path, log):
    run = make_run(tmp_path / "run", space_name="general7", rounds=1, stop_after=20)
    whole = Page(write_report(run).read_text(encoding="utf-8"))
    data = (run / log).read_bytes()
    line = data.splitlines()[-1]
    (run / log).write_bytes(data + line[: len(line) // 2])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert f"{log}: the last line ({len(data.splitlines()) + 1}) is cut off" in page.text
    assert page.rows == whole.rows


def test_line_in_the_middle_is_damaged(small):
    lines = (small / "bandit.jsonl").read_text().splitlines()
    lines[5] = lines[5][:-4]  # the fifth sample
    (small / "bandit.jsonl").write_text("\n".join(lines) + "\n")
    page = Page(write_report(small).read_text(encoding="utf-8"))
    assert "bandit.jsonl: line 6 is not a JSON object" in page.text
    assert "line 7 (sample, sample 5) does not follow from the 4 samples before it" in page.text


def test_damaged_genotype_summary_and_environment(small):
    (small / "genotype.json").write_text('{"cells": 3}')
    (small / "env.json").write_text("{")
    (small / "summary.json").write_text("[]")
    page = Page(write_report(small).read_text(encoding="utf-8"))
    assert "The cells cannot be drawn: genotype.json" in page.text
    assert "env.json: not valid JSON" in page.text
    assert "summary.json: expected an object, got list" in page.text
    assert str(small) not in page.text


def test_any_damage_gives_a_page_or_one_clear_error(small_source, tmp_path):
    chance = random.Random(0)
    names = ["config.yaml", "env.json", "summary.json", "split.json", "bandit.jsonl",
             "metrics.jsonl", "genotypes.jsonl", "genotype.json"]  # fmt: skip
    pieces = [b"", b"{", b"\xff", b"null", b"1e999", b"NaN", b'"', b"-1", b"[[]]", b"9" * 30]
    pages = 0
    for trial in range(24):
        run = Path(shutil.copytree(small_source, tmp_path / str(trial)))
        for name in chance.sample(names, 2):
            data = bytearray((run / name).read_bytes())
            for _ in range(chance.randint(1, 3)):
                at = chance.randrange(len(data))
                data[at : at + chance.randint(0, 12)] = chance.choice(pieces)
            (run / name).write_bytes(data)
        try:
            text = write_report(run).read_text(encoding="utf-8")
        except ReportError as error:
            assert "config.yaml" in str(error)  # noqa: PT017 - either outcome is right
            continue
        Page(text)
        pages += 1
    assert pages > 15


@pytest.mark.parametrize("value", [True, "9" * 400, [], {}, None, -1, 10**40])
@pytest.mark.parametrize("key", ["n", "clean_accuracy", "split", "attack"])
def test_odd_values_in_the_summary(small, key, value):
    summary = json.loads((small / "summary.json").read_text())
    summary["final"][key] = value
    summary["cost"]["seconds_total"] = summary["cost"]["epochs"] = value
    Page(write_report(small, summary=summary).read_text(encoding="utf-8"))


# --- reasons --------------------------------------------------------------------------------


def test_reason_of_random_pruning(tmp_path):
    run = make_run(tmp_path / "run", space_name="general7", rounds=1, policy="random")
    page = Page(write_report(run).read_text(encoding="utf-8"))
    reasons = [row[-1] for row in page.rows if len(row) == 11 and row[0] != "cell"]
    assert len(reasons) == 60 * 6
    assert all(re.fullmatch(r"drawn at random; upper bound \d of \d from below", r)
               for r in reasons)  # fmt: skip
    assert "smallest upper bound" not in page.text


def test_reason_of_a_tie(small):
    # Equal rewards and equal counts: with one sample each, every bound of a row is the same.
    events = read_lines(small / "bandit.jsonl")
    kept = events[:8]
    for event in kept[1:]:
        event["reward"] = 0.5
    bonus = math.sqrt(2 * math.log(7))
    kept.append(
        {
            **next(e for e in events if e["event"] == "abandon"),
            "sample": 7,
            "arm": 0,
            "operation": "max_pool_3x3",
            "mean": 0.5,
            "count": 1,
            "lower": 0.5 - bonus,
            "upper": 0.5 + bonus,
            "total": 7,
        }
    )
    write_lines(small / "bandit.jsonl", kept)
    page = Page(write_report(small).read_text(encoding="utf-8"))
    shown = f"smallest upper bound {0.5 + bonus:.4f}, equal to avg_pool_3x3's; the lowest index"
    assert shown in page.text


def test_two_rounds_at_one_sample(small):
    # A policy may abandon the next arm at once: nothing is sampled between two rounds.
    events = read_lines(small / "bandit.jsonl")
    end = next(i for i, e in enumerate(events) if e["event"] == "abandon")
    first = {**events[end], "row": 0}
    samples = events[:end]
    mean, count = {}, dict.fromkeys(range(7), 0)
    for event in samples[1:]:
        arm = event["choice"][0]
        mean[arm] = 0.3 * mean[arm] + 0.7 * event["reward"] if count[arm] else event["reward"]
        count[arm] += 1
    total = sum(count.values())
    radius = {arm: math.sqrt(2 * math.log(total) / count[arm]) for arm in range(7)}
    order = sorted(range(7), key=lambda arm: mean[arm] + radius[arm])
    lines = [
        {
            **first,
            "round": number,
            "arm": arm,
            "operation": events[0]["operations"][arm],
            "mean": mean[arm],
            "count": count[arm],
            "lower": mean[arm] - radius[arm],
            "upper": mean[arm] + radius[arm],
            "arms_left": 7 - number,
        }
        for number, arm in enumerate(order[:2], 1)
    ]
    write_lines(small / "bandit.jsonl", samples + lines)
    page = Page(write_report(small).read_text(encoding="utf-8"))
    reasons = [row[-1] for row in page.rows if len(row) == 11 and row[0] != "cell"]
    assert reasons == [
        f"smallest upper bound {mean[arm] + radius[arm]:.4f}; next smallest "
        f"{mean[following] + radius[following]:.4f} ({events[0]['operations'][following]})"
        for arm, following in pairwise(order[:3])
    ]
    survived = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    assert survived[lines[0]["operation"]] == ["60", "59", "59"]
    assert survived[lines[1]["operation"]] == ["60", "60", "59"]


def test_means_of_a_policy_that_averages(small):
    """The lanes and tables are those of its own rule, which is not Eq. 4.11."""
    events = read_lines(small / "bandit.jsonl")
    operations, edges = events[0]["operations"], events[0]["edges"]
    bandit = AntiBandit(len(edges), len(operations), policy="ucb1", rounds=1)
    start = log.Start.of("general7", operations, edges, bandit.settings, 0)
    events = [start.to_line()]
    while not bandit.finished:
        number, phase, choice = bandit.samples, bandit.phase, bandit.sample()
        reward = 0.3 + 0.01 * (choice.sum().item() % 40)
        line = log.Sample(sample=number, phase=phase, choice=choice.tolist(), reward=reward)
        bandit.credit(choice, reward)
        events.append(line.to_line())
        while bandit.due:
            events += [one.to_line() for one in log.prune(bandit, edges, operations)]
    write_lines(small / "bandit.jsonl", events)
    page = Page(write_report(small).read_text(encoding="utf-8"))
    assert "are not those of Eq. 4.11" not in page.text
    averages = {tuple(row) for row in page.rows if row[0] in edges}
    for row, edge in enumerate(edges):
        shown = tuple(
            f"{mean:.4f}n {count}"
            for mean, count in zip(bandit.mean[row], bandit.count[row], strict=True)
        )
        assert (edge, *shown) in averages


def test_means_of_another_rule_are_noted(small):
    events = read_lines(small / "bandit.jsonl")
    events[0]["policy"] = "another"
    next(e for e in events if e["event"] == "abandon")["mean"] += 0.25
    write_lines(small / "bandit.jsonl", events)
    page = Page(write_report(small).read_text(encoding="utf-8"))
    assert "are not those of Eq. 4.11" in page.text
    assert "rule of policy another" in page.text
    assert "next smallest" not in page.text


# --- the command ----------------------------------------------------------------------------


def test_command_names_the_file_last(small, capsys):
    assert report.main([str(small)]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == f"report: {small / 'report.html'}"


def test_command_as_a_process_with_out_and_json(small, tmp_path):
    out = tmp_path / "page.html"
    done = _processes.run("-m", "fastbandit.report", str(small), "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {
        "report": str(out),
        "bytes": out.stat().st_size,
        "status": "finished",
        "samples": 34,
        "planned": 34,
        "notes": [],
    }
    assert not (small / "report.html").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "expected a run folder, got nothing there"),
        (lambda p: p.write_text(""), "expected a run folder, got a file"),
        (lambda p: p.mkdir(), "not a run folder: expected config.yaml"),
        (
            lambda p: (p.mkdir(), (p / "config.yaml").write_text("a: [")),
            "config.yaml: not valid YAML",
        ),
        (
            lambda p: (p.mkdir(), (p / "config.yaml").write_text("- 1")),
            "config.yaml: expected a mapping, got list",
        ),
    ],
)
def test_not_a_run(tmp_path, capsys, make, message):
    folder = tmp_path / "folder"
    make(folder)
    assert report.main([str(folder)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("report: error: ")
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (folder / "report.html").exists()


def test_file_that_cannot_be_written(small, tmp_path, capsys):
    assert report.main([str(small), "--out", str(tmp_path / "no" / "page.html")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    assert report.main([str(small), "--out", str(tmp_path)]) == 1
    assert "expected a file to write to, got a folder" in capsys.readouterr().err


def test_style_sheet_and_templates_are_package_data():
    # Read as an installed package would: by name, from package data that is declared.
    root = Path(report.__file__).parent.parent
    declared = (root.parent / "pyproject.toml").read_text()
    assert '"_data/*"' in declared
    assert (root / "_data" / "report.css").is_file()
    assert '"report/templates/*.html"' in declared
    assert {file.suffix for file in (root / "report" / "templates").iterdir()} == {".html"}


def test_html_is_in_templates_alone():
    """A string with a tag beside the drawings would be one that no template escapes."""
    drawings = {"axes.py", "cells.py", "charts.py", "scatter.py"}
    modules = list(Path(report.__file__).parent.glob("*.py"))
    assert drawings < {file.name for file in modules}
    for file in modules:
        if file.name in drawings:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        assert not [text for text in words if isinstance(text, str) and re.search("</?[a-z]", text)]


def test_a_template_escapes_what_is_not_markup():
    hostile = ("<b>name</b>", '1 & 2 "', "<script>")
    html = render("figures", tiles=[hostile], optimistic=False, attacks=[None, 12345, "<i>", 0.1])
    assert not re.search("<(b|script|i)>", html)
    page = Page(html)
    assert all(text in page.text for text in (*hostile, "robust: <i>"))
    # Values are shown as the report shows them everywhere.
    assert all(f"robust: {text}" in page.text for text in ("none", "12,345", "0.1"))
    with pytest.raises(UndefinedError, match="'attacks' is undefined"):
        render("figures", tiles=[], optimistic=False)


# --- charts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 141, [0, 50, 100]),
        (-0.3, 0.35, [-0.2, 0, 0.2]),
        (3, 3, [3]),
        (math.nan, 1, []),
    ],
)
def test_ticks(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_line_chart_places_points_and_breaks_lines():
    chart = line_chart(
        [Series("a<b", [0, 1, 2, 3], [0.0, 1.0, None, 1.0], "s1")],
        title="t",
        x_label="x",
        y_label="y",
        x_range=(0, 3),
    )
    page = Page(chart)
    (path,) = [a["d"] for t, a in page.tags if t == "path" and "line" in (a["class"] or "").split()]
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]
    assert path.count("M") == 2
    assert path.count("L") == 1
    step = points[1][0] - points[0][0]
    assert points[2][0] - points[0][0] == pytest.approx(3 * step, abs=0.02)
    assert points[0][1] > points[1][1] == points[2][1]
    assert "a<b 1" in page.text


def test_line_chart_with_nothing_to_draw():
    empty = Series("a", [0, 1], [None, math.nan], "s1")
    assert "Nothing to draw yet" in line_chart(
        [empty], title="t", x_label="x", y_label="y", x_range=(0, 1)
    )


def test_labels_at_the_ends_do_not_overlap():
    series = [Series(n, [0, 1], [0, 1 - i / 1e4], "s1") for i, n in enumerate("abc")]
    page = Page(line_chart(series, title="t", x_label="x", y_label="y", x_range=(0, 1)))
    at = [float(a["y"] or "nan") for t, a in page.tags
          if t == "text" and "name" in (a["class"] or "").split()]  # fmt: skip
    gaps = [abs(p - q) for i, p in enumerate(at) for q in at[:i]]
    assert min(gaps) >= 14.9
    # Near the top they are pushed down, not out of the drawing.
    assert min(at) >= 12


def test_arm_lanes_by_hand():
    lanes = [
        Lane("one", "first", [-1, 3, 3, 6], [1, 3], True),
        Lane("two", "second", [0, 0], [0], False),
    ]
    page = Page(arm_lanes(lanes, title="edge", samples=4, events=[2]))
    paths = {a["class"]: a["d"] for t, a in page.tags if t == "path"}
    assert paths["lane untried"] == "M0 6h1"
    assert paths["lane d3"] == "M1 6h2"
    assert paths["lane d6"] == "M3 6h1"
    assert paths["lane d0"] == "M0 18h2"
    assert paths["chosen"] == "M1 6h1M3 6h1M0 18h1"
    assert paths["cross"].count("M") == 1
