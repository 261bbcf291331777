"""The report of retraining runs, evaluations and several runs: true to the files, and sound."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import random
import re
import shutil
import struct
import zlib
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _pages import Page
from _runs import make_evaluation, make_retraining, make_run, read_lines, write_json, write_lines

from fastbandit import report
from fastbandit._identity import Fingerprint
from fastbandit.genotype import Genotype
from fastbandit.report import ReportError, png, write_report
from fastbandit.report.charts import Bar, Series, bar_chart, line_chart
from fastbandit.report.folders import collect
from fastbandit.runs.tensors import load_tensors, save_tensors

SWEEP = ("8/255", "2/255", "4/255", "16/255")


@pytest.fixture(scope="module")
def found() -> Genotype:
    return Genotype.published("ABANDIT_CIFAR_1")


@pytest.fixture(scope="module")
def source(tmp_path_factory, found) -> Path:
    """A finished retraining run with two evaluations below it."""
    run = make_retraining(tmp_path_factory.mktemp("runs") / "retrained", found, overfitted=7)
    make_evaluation(run / "evaluation-linf-8_255", found, epsilons=SWEEP, shape=(3, 5, 4))
    make_evaluation(run / "evaluation-l2-1_2", found, norm="l2", epsilons=("1/2",), drop=0.01)
    return run


@pytest.fixture(scope="module")
def page(source, tmp_path_factory) -> Page:
    out = tmp_path_factory.mktemp("page") / "page.html"
    return Page(write_report(source, out).read_text(encoding="utf-8"))


@pytest.fixture
def run(source, tmp_path) -> Path:
    """The same, to be changed at will."""
    return Path(shutil.copytree(source, tmp_path / "retrained"))


def evaluation(run: Path, name: str = "evaluation-linf-8_255") -> dict[str, Any]:
    return json.loads((run / name / "evaluation.json").read_text())


def read(folder: Path | list[Path], out: Path) -> Page:
    return Page(write_report(folder, out).read_text(encoding="utf-8"))


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def cell(share: dict[str, Any]) -> str:
    low, high = share["interval"]
    return f"{percent(share['accuracy'])}{100 * low:.2f} to {100 * high:.2f}"


def rows_with(page: Page, first: str, columns: int) -> list[list[str]]:
    return [row for row in page.rows if row and row[0] == first and len(row) == columns]


# --- numbers --------------------------------------------------------------------------------


def test_headline_is_the_evaluation_of_the_training_threat(source, page):
    first = evaluation(source)["results"][0]
    assert first["threat"]["epsilon"] == "8/255"
    for name, share in (("clean", first["clean"]), ("robust", first["worst_case"])):
        low, high = share["interval"]  # the file's, which is not Wilson's
        where = "clean accuracy" if name == "clean" else "robust accuracy, L∞, epsilon 8/255"
        assert (
            f"{where} {percent(share['accuracy'])} "
            f"95 %: {100 * low:.2f} to {100 * high:.2f} %, n = 1,000"
        ) in page.text
    assert first["provenance"] in page.text
    assert "parameters 123,456 MACs 7,654,321" in page.text


def test_headline_is_found_among_the_radii_of_a_sweep(tmp_path, found):
    run = make_retraining(tmp_path / "run", found)
    make_evaluation(run / "evaluation", found, epsilons=("16/255", "2/255", "8/255"))
    page = read(run, tmp_path / "page.html")
    share = evaluation(run, "evaluation")["results"][2]["worst_case"]
    assert f"robust accuracy, L∞, epsilon 8/255 {percent(share['accuracy'])}" in page.text


def test_every_accuracy_of_every_threat_is_listed(source, page):
    listed = [row for row in page.rows if len(row) == 8 and row[0] in ("R1", "E1", "E2")]
    wanted = []
    for key, name in (("E1", "evaluation-l2-1_2"), ("E2", "evaluation-linf-8_255")):
        for result in evaluation(source, name)["results"]:
            norm = {"linf": "L∞", "l2": "L2"}[result["threat"]["norm"]]
            attacks = ", ".join(attack["name"] for attack in result["attacks"])
            wanted.append(
                [
                    key,
                    cell(result["clean"]),
                    cell(result["worst_case"]),
                    "1,000",
                    f"{norm}, epsilon {result['threat']['epsilon']}",
                    "evaluation, digits test",
                    f"worst case over {attacks}",
                    f"retrained/{name}: evaluation.json",
                ]
            )
    assert sorted(row for row in listed if row[0] != "R1") == sorted(wanted)
    summary = json.loads((source / "summary.json").read_text())
    own = {row[-1]: row for row in listed if row[0] == "R1"}
    for part in ("test", "best", "last"):
        row = own[f"retrained: summary.json ({part})"]
        for column, kind in ((1, "clean"), (2, "robust")):
            value, n = summary[part][f"{kind}_accuracy"], summary[part]["n"]
            low, high = report.wilson(value * n, n)
            assert row[column] == f"{percent(value)}{100 * low:.2f} to {100 * high:.2f}"
        assert row[3] == f"{summary[part]['n']:,}"
        assert row[6] == summary[part]["attack"]
    assert f"(epoch {summary['best']['epoch'] + 1})" in own["retrained: summary.json (best)"][5]


def test_every_attack_with_its_counts(source, page):
    for name in ("evaluation-linf-8_255", "evaluation-l2-1_2"):
        for result in evaluation(source, name)["results"]:
            for attack in result["attacks"]:
                assert [
                    attack["name"],
                    cell(attack),
                    f"{attack['correct']:,}",
                    f"{attack['n']:,}",
                    f"{attack['attacked']:,}",
                    str(attack["fooled"]),
                    f"{attack['seconds']:.2f}",
                    str(attack["forward_passes"]),
                    str(attack["backward_passes"]),
                    str(attack["unconfirmed"]),
                    attack["describe"],
                ] in page.rows
            worst = result["worst_case"]
            assert any(
                row[2] == str(worst["correct"]) and row[1] == cell(worst)
                for row in rows_with(page, "worst case", 11)
            )


def test_curve_against_epsilon_lies_where_the_file_says(source, tmp_path):
    """The points of the chart, scaled back, are (epsilon, worst case)."""
    text = write_report(source, tmp_path / "page.html").read_text()
    start = text.index('aria-label="Accuracy against epsilon, L∞"')
    chart = text[start : text.index("</svg>", start)]
    path = re.search(r'class="line s1" d="([^"]+)"', chart)
    whiskers = re.search(r'class="whisker s1" d="([^"]+)"', chart)
    assert path is not None
    assert whiskers is not None
    results = {r["threat"]["epsilon_value"]: r for r in evaluation(source)["results"]}
    wanted = [(0.0, results[8 / 255]["clean"])]
    wanted += [(radius, results[radius]["worst_case"]) for radius in sorted(results)]
    points = [
        (float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path.group(1))
    ]
    assert len(points) == len(wanted) == 5
    (x0, y0), (x1, y1) = points[0], points[-1]
    scale_x = (x1 - x0) / (wanted[-1][0] - wanted[0][0])
    scale_y = (y1 - y0) / (wanted[-1][1]["accuracy"] - wanted[0][1]["accuracy"])
    for (x, y), (radius, share) in zip(points, wanted, strict=True):
        assert x - x0 == pytest.approx(scale_x * radius, abs=0.02)
        rise = share["accuracy"] - wanted[0][1]["accuracy"]
        assert y - y0 == pytest.approx(scale_y * rise, abs=0.02)
    ends = re.findall(r"M(-?[\d.]+) (-?[\d.]+)V(-?[\d.]+)", whiskers.group(1))
    assert len(ends) == 5
    for (x, low, high), (radius, share) in zip(ends, wanted, strict=True):
        assert float(x) - x0 == pytest.approx(scale_x * radius, abs=0.02)
        for y, end in zip((low, high), share["interval"], strict=True):
            rise = end - wanted[0][1]["accuracy"]
            assert float(y) - y0 == pytest.approx(scale_y * rise, abs=0.02)
    # The scales themselves: each point is above the tick of its epsilon, and the grid says 0 and 1.
    texts = {
        text: (float(x), y)
        for x, y, text in re.findall(
            r'class="tick" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]*)</text>', chart
        )
    }
    for (x, _), epsilon in zip(points, ("0", "2/255", "4/255", "8/255", "16/255"), strict=True):
        assert texts[epsilon][0] == pytest.approx(x, abs=0.02)
    zero, one = float(texts["0.0"][1]), float(texts["1.0"][1])
    assert scale_y == pytest.approx(one - zero, rel=1e-3)
    assert y0 == pytest.approx(zero + scale_y * wanted[0][1]["accuracy"], abs=0.05)


def test_training_curves_hold_the_logged_epochs(source, page):
    for line in read_lines(source / "metrics.jsonl"):
        assert (
            f"epoch {line['epoch'] + 1}: clean accuracy {line['clean_accuracy']:.4g}, "
            f"robust accuracy {line['robust_accuracy']:.4g}, "
            f"train accuracy {line['train_accuracy']:.4g}"
        ) in page.text
        assert f"epoch {line['epoch'] + 1}: loss {line['loss']:.4g}" in page.text
    assert (
        "R1, epoch 8: 50.00 % under the training attack, 1.25 % under a stronger one, "
        "of 256 images; back to epoch 7"
    ) in page.text
    assert page.text.count("under a stronger one") == 1


def test_training_curves_lie_where_the_epochs_say(source, tmp_path):
    text = write_report(source, tmp_path / "page.html").read_text()
    start = text.index('aria-label="Accuracy of each epoch"')
    chart = text[start : text.index("</svg>", start)]
    lines = read_lines(source / "metrics.jsonl")
    ends = {}
    for style, field in (("s1", "clean"), ("s2", "robust")):
        path = re.search(rf'class="line {style}" d="([^"]+)"', chart)
        assert path is not None
        at = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path.group(1))]
        values = [line[f"{field}_accuracy"] for line in lines]
        assert len(at) == len(values) == 12
        scale = (at[-1][1] - at[0][1]) / (values[-1] - values[0])
        for (x, y), epoch, value in zip(at, range(12), values, strict=True):
            assert x - at[0][0] == pytest.approx(epoch * (at[1][0] - at[0][0]), abs=0.1)
            assert y - at[0][1] == pytest.approx(scale * (value - values[0]), abs=0.05)
        ends[field] = (at[0][1], scale)
        assert f"{field} {values[-1]:.3g}" in chart
    # Both lines are on one axis.
    assert ends["clean"][1] == pytest.approx(ends["robust"][1], rel=1e-3)


def test_checks_and_verdicts(source, page):
    for entry in evaluation(source)["suspicion"]["checks"]:
        mark = {"ok": "✓ ", "suspicious": "⚠ ", "skipped": ""}[entry["verdict"]]
        assert [entry["name"], mark + entry["verdict"], entry["detail"]] in page.rows
    assert "before quoting them" not in page.text


def test_suspicious_evaluation_is_named_before_its_numbers(run, found):
    make_evaluation(run / "evaluation-linf-8_255", found, suspicious=True)
    page = read(run, run / "page.html")
    warning = page.text.index("(retrained/evaluation-linf-8_255) are suspicious")
    # The other one is preferred, though it is not of the radius that was trained for.
    assert warning < page.text.index("robust accuracy, L2, epsilon 1/2")
    assert "robust accuracy, L∞" not in page.text
    shutil.rmtree(run / "evaluation-l2-1_2")
    page = read(run, run / "page.html")
    assert re.search(r"robust accuracy, L∞, epsilon 8/255 \S+ % .{,60}, suspicious", page.text)
    share = cell(evaluation(run)["results"][0]["worst_case"])
    assert [row[2] for row in rows_with(page, "E1", 8)] == [f"{share}⚠ suspicious"]


def test_search_and_retraining_cost_are_never_added(source, tmp_path):
    search = make_run(tmp_path / "search", space_name="general7", rounds=1)
    page = read([search, source], tmp_path / "page.html")
    totals = [row for row in page.rows if row and row[0] == "seconds, total"]
    searched = json.loads((search / "summary.json").read_text())["cost"]["seconds_total"]
    retrained = json.loads((source / "summary.json").read_text())["cost"]["seconds_total"]
    assert [row[1].split()[0] for row in totals] == [
        f"{value:.2f}" for value in (searched, retrained, 17.75)
    ]
    assert [len(row) for row in totals] == [2, 2, 3]  # one search, one retraining, two evaluations
    for mixed in (searched + retrained, searched + retrained + 2 * 17.75):
        assert f"{mixed:.2f}" not in page.text
        assert f"{mixed:.1f}" not in page.text


# --- examples -------------------------------------------------------------------------------


def decode(uri: str) -> np.ndarray:
    """A PNG of ours, read by hand: signature, checksums, one filter byte in each row."""
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    data = base64.b64decode(data, validate=True)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        (crc,) = struct.unpack(">I", data[at + 8 + length : at + 12 + length])
        assert crc == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (28, 28), (1, 1, 3), (7, 5, 3)])
def test_png_decodes_to_the_pixels(shape):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode(png.data_uri(pixels)).reshape(shape), pixels)
    image = Image.open(io.BytesIO(png.encode(pixels)))
    assert np.array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((2, 2)), r"expected uint8 of shape \[H, W\] or \[H, W, 3\], got float64"),
        (np.zeros((2, 2, 4), np.uint8), r"got uint8 of shape \[2, 2, 4\]"),
        (np.zeros((0, 2), np.uint8), "expected at least one, got 0 x 2"),
    ],
)
def test_png_refuses(pixels, message):
    with pytest.raises(ValueError, match=message):
        png.encode(pixels)


def pictures(page: Page) -> list[np.ndarray]:
    return [decode(a["src"] or "") for tag, a in page.tags if tag == "img"]


def test_examples_are_the_pixels_of_the_file(source, page):
    found = pictures(page)
    at = 0
    for name, channels in (("evaluation-l2-1_2", 1), ("evaluation-linf-8_255", 3)):
        tensors, _ = load_tensors(source / name / "examples.safetensors", "examples")
        for i in range(4):
            clean, adversarial = (
                tensors[kind][i].double().numpy().transpose(1, 2, 0)
                for kind in ("clean", "adversarial")
            )
            change = adversarial - clean
            scaled = 127.5 + 127.5 * change / np.abs(change).max()
            for wanted in (255 * clean, 255 * adversarial, scaled):
                picture = found[at]
                assert picture.shape[2] == channels
                assert np.abs(picture - wanted).max() <= 0.5 + 1e-6
                at += 1
            label, after = int(tensors["label"][i]), int(tensors["prediction_adversarial"][i])
            largest = float(np.abs(change).max())
            assert (
                f"image {100 + i}, class {label} {label} → {after} "
                f"largest change {largest:.4f} = {255 * largest:.2f}/255"
            ) in page.text
    assert at == len(found) == 24


def save_examples(folder: Path, clean: torch.Tensor, adversarial: torch.Tensor, **more: Any):
    m = len(clean)
    tensors = {
        "clean": clean,
        "adversarial": adversarial,
        "label": torch.zeros(m, dtype=torch.long),
        "prediction_clean": torch.zeros(m, dtype=torch.long),
        "prediction_adversarial": torch.zeros(m, dtype=torch.long),
        "id": torch.arange(m),
        **more,
    }
    save_tensors(folder / "examples.safetensors", tensors, "examples", {})


def test_examples_of_bytes_and_of_two_channels(tmp_path, found):
    folder = make_evaluation(tmp_path / "evaluation", found)
    clean = torch.randint(0, 256, (2, 2, 3, 3), dtype=torch.uint8)
    save_examples(folder, clean, clean.clone())
    page = read(folder, tmp_path / "page.html")
    first, second, difference, *_ = pictures(page)
    assert np.abs(first[..., 0] - clean[0].double().mean(0).numpy()).max() <= 0.5
    assert np.array_equal(first, second)
    assert np.array_equal(difference, np.full_like(difference, 128))  # no change: grey
    assert "the mean of their 2 channels" in page.text
    assert "largest change 0.0000" in page.text


def test_many_or_large_examples_are_cut(tmp_path, found):
    folder = make_evaluation(tmp_path / "evaluation", found, examples=40)
    page = read(folder, tmp_path / "page.html")
    assert len(pictures(page)) == 3 * 16
    assert "the first 16 of 40" in page.text
    folder = make_evaluation(tmp_path / "evaluation", found, examples=3, shape=(3, 300, 300))
    text = write_report(folder).read_text()
    assert text.count("<img") == 3
    assert len(text) < 2_000_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"clean": torch.zeros(2, 1, 4, 4)}, "expected two of one shape [m, C, H, W]"),
        ({"clean": torch.zeros(4, 16), "adversarial": torch.zeros(4, 16)}, "[m, C, H, W]"),
        ({"adversarial": torch.full((4, 1, 4, 4), 1.5)}, "expected values in [0, 1], got 1.5"),
        ({"adversarial": torch.full((4, 1, 4, 4), float("nan"))}, "expected values in [0, 1]"),
        ({"label": torch.zeros(3, dtype=torch.long)}, "label: expected shape [4], got [3]"),
        ({"label": None}, "expected a tensor 'label', there is none"),
    ],
)
def test_examples_that_cannot_be_shown_are_noted(tmp_path, found, change, message):
    folder = make_evaluation(tmp_path / "evaluation", found)
    tensors = {"clean": torch.zeros(4, 1, 4, 4), "adversarial": torch.zeros(4, 1, 4, 4), **change}
    if tensors.get("label", 0) is None:
        del tensors["label"]
        tensors["prediction_clean"] = torch.zeros(4, dtype=torch.long)
        save_tensors(folder / "examples.safetensors", tensors, "examples", {})
    else:
        save_examples(folder, tensors.pop("clean"), tensors.pop("adversarial"), **tensors)
    page = read(folder, tmp_path / "page.html")
    assert not pictures(page)
    assert "examples.safetensors: " in page.text
    assert message in page.text


def test_no_pictures_where_there_are_none(tmp_path, found):
    folder = make_evaluation(tmp_path / "evaluation", found)
    (folder / "examples.safetensors").unlink()
    text = write_report(folder).read_text()
    assert "img-src" not in text
    assert "No adversarial examples" in text


# --- several runs ---------------------------------------------------------------------------


def runs_table(page: Page) -> list[list[str]]:
    return [row[:5] for row in page.rows if len(row) == 10 and re.fullmatch(r"[SRE]\d+", row[0])]


@pytest.mark.parametrize("stated", ["search", "retrain", "evaluate", "brew", ["search"], None])
def test_env_json_says_which_command_made_a_folder(tmp_path, stated):
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    (tmp_path / "model-best.safetensors").write_bytes(b"")  # what an older retraining looks like
    write_json(tmp_path / "env.json", {"command": stated})
    guessed = stated not in ("search", "retrain", "evaluate")
    found = collect([tmp_path])
    assert len(found.runs) == 1
    assert len(found.searches) == (stated == "search")
    assert len(found.retrainings) == (stated == "retrain" or guessed)
    assert len(found.evaluations) == (stated == "evaluate")


def test_runs_are_matched_by_genotype(tmp_path, found):
    searches = [make_run(tmp_path / f"search-{i}", space_name="general7", rounds=1, seed=i)
                for i in range(2)]  # fmt: skip
    genotypes = [Genotype.load(search / "genotype.json") for search in searches]
    assert genotypes[0].hash != genotypes[1].hash
    # Named in another order than they belong together, the evaluation of the first one elsewhere.
    second = make_retraining(tmp_path / "second", genotypes[1], name="second", seed=2)
    make_evaluation(second / "evaluation-linf-8_255", genotypes[1], clean=880)
    first = make_retraining(tmp_path / "first", genotypes[0], name="first", seed=1)
    apart = make_evaluation(tmp_path / "apart", genotypes[0], run_id="beef00000001")
    alone = make_retraining(tmp_path / "alone", found, name="alone", seed=3)
    page = read([*searches, second, first, apart, alone], tmp_path / "page.html")
    short = [genotype.hash[:12] for genotype in genotypes]
    assert runs_table(page) == [
        ["S2", "search", "search-1", "finished", short[1]],
        ["R1", "retraining", "second", "finished", short[1]],
        ["E2", "evaluation", "second/evaluation-linf-8_255", "finished", short[1]],
        ["S1", "search", "search-0", "finished", short[0]],
        ["R2", "retraining", "first", "finished", short[0]],
        ["E1", "evaluation", "apart", "finished", short[0]],
        ["R3", "retraining", "alone", "finished", found.hash[:12]],
    ]
    table = [row for row in page.rows if len(row) == 9 and re.match(r"R\d ", row[0])]
    assert [row[0] for row in table] == ["R1 second", "R2 first", "R3 alone"]
    for row, folder in zip(table, (second / "evaluation-linf-8_255", apart), strict=False):
        result = json.loads((folder / "evaluation.json").read_text())["results"][0]
        assert row[1:4] == [cell(result["clean"]), cell(result["worst_case"]), "1,000"]
    assert table[2][1].startswith(percent(1650 / 1797))  # not evaluated: its own test
    assert "Not all of these were measured in the same way" in page.text
    # Curves over each other: a line for each of the three, in each of the four charts.
    names = [f"R1 {second.name}", f"R2 {first.name}", f"R3 {alone.name}"]
    for name in names:
        assert len(re.findall(rf"{name} [\d.]+", page.text)) >= 4
    assert "Searches over each other" in page.text
    # Each search keeps its own sections, under anchors of their own.
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(ids) == len(set(ids))
    assert {"S1-arms", "S2-arms", "S1-abandoned", "S2-abandoned"} <= set(ids)
    assert {a["href"] for t, a in page.tags if t == "a"} <= {f"#{name}" for name in ids}


def test_two_retrainings_of_one_genotype_keep_their_evaluations(tmp_path, found):
    runs = [make_retraining(tmp_path / f"seed-{seed}", found, seed=seed) for seed in (1, 2)]
    apart = [make_evaluation(tmp_path / f"evaluation-{seed}", found, run_id=f"beef000{seed:05d}",
                             clean=900 + seed) for seed in (2, 1)]  # fmt: skip
    page = read([*runs, *apart], tmp_path / "page.html")
    assert [row[2] for row in runs_table(page)] == [
        "seed-1", "evaluation-1", "seed-2", "evaluation-2",
    ]  # fmt: skip
    # Inside the folder of one of them it needs no run id.
    make_evaluation(runs[0] / "evaluation-linf-8_255", found)
    page = read(runs, tmp_path / "page.html")
    assert [row[2] for row in runs_table(page)] == [
        "seed-1", "seed-1/evaluation-linf-8_255", "seed-2",
    ]  # fmt: skip
    shutil.rmtree(runs[0] / "evaluation-linf-8_255")
    # Without a run id the genotype alone cannot tell which of the two it was.
    unknown = make_evaluation(tmp_path / "unknown", found)
    page = read([*runs, unknown], tmp_path / "page.html")
    assert [row[2] for row in runs_table(page)] == ["seed-1", "seed-2", "unknown"]
    page = read([runs[0], unknown], tmp_path / "page.html")
    assert [row[2] for row in runs_table(page)] == ["seed-1", "unknown"]
    assert len([row for row in page.rows if len(row) == 9]) == 0  # one network, so no comparison


# --- one model is not taken for another ------------------------------------------------------


def rewrite(folder: Path, model: dict[str, Any] | None = None, **more: Any) -> Path:
    """Change what an evaluation says of its model, and other parts of it."""
    value = json.loads((folder / "evaluation.json").read_text())
    value["model"].update(model or {})
    for name, part in more.items():
        value[name].update(part)
    write_json(folder / "evaluation.json", value)
    return folder


def python_model(logits: float, **more: Any) -> dict[str, Any]:
    """A model from Python: same class, same weights, logits of its own."""
    found = Fingerprint(np.array([[logits, 1.0], [2.0, 0.0]], np.float32)).to_dict()
    return {"file": None, "genotype_hash": None, "digest": "a" * 16, "fingerprint": found, **more}


def side_by_side(page: Page) -> list[list[str]]:
    return [row for row in page.rows if len(row) == 9 and row[0] != "network"]


def test_models_of_the_same_weights_stand_side_by_side(tmp_path, found):
    folders = [
        rewrite(make_evaluation(tmp_path / name, found, clean=clean, epsilons=epsilons),
                python_model(logits))
        for name, clean, logits, epsilons in (
            ("a", 900, 3.0, ("8/255",)),
            ("b", 700, 3.1, ("8/255",)),
            ("c", 900, 3.0 * (1 + 1e-6), ("2/255",)),  # the first, with another number of threads
        )
    ]  # fmt: skip
    page = read(folders, tmp_path / "page.html")
    assert [row[1] for row in side_by_side(page)] == [
        cell(evaluation(tmp_path, name)["results"][0]["clean"]) for name in ("a", "b")
    ]
    assert [row[0] for row in runs_table(page)] == ["E1", "E3", "E2"]


@pytest.mark.parametrize(
    "model", [{"fingerprint": None}, {"fingerprint": {"images": 2}}, {"digest": None}], ids=str
)
def test_models_that_cannot_be_told_apart_are_kept_apart(tmp_path, found, model):
    folders = [rewrite(make_evaluation(tmp_path / name, found), python_model(3.0, **model))
               for name in "ab"]  # fmt: skip
    assert len(side_by_side(read(folders, tmp_path / "page.html"))) == 2


def test_models_from_python_on_other_images_are_kept_apart(tmp_path, found):
    folders = [rewrite(make_evaluation(tmp_path / name, found), python_model(3.0),
                       data={"digest": name}) for name in "ab"]  # fmt: skip
    page = read(folders, tmp_path / "page.html")
    assert len(side_by_side(page)) == 2
    # The name of the data is the same, and yet:
    assert "Not all of these were measured in the same way" in page.text


def test_evaluations_of_one_file_are_one_network(tmp_path, found):
    folders = [rewrite(make_evaluation(tmp_path / name, found, epsilons=(epsilon,)),
                       {"file": f"/{name}/model.safetensors", "digest": "a" * 16})
               for name, epsilon in (("a", "8/255"), ("b", "2/255"))]  # fmt: skip
    page = read(folders, tmp_path / "page.html")
    assert side_by_side(page) == []
    assert "Accuracy against epsilon" in page.text


def test_a_retraining_keeps_the_evaluations_of_its_best_model_alone(tmp_path, found):
    """The last model has other weights, and a training that was repeated left an evaluation."""
    run = make_retraining(tmp_path / "run", found)
    digests = {}
    for name in ("best", "last"):
        data = name.encode() * 1000
        (run / f"model-{name}.safetensors").write_bytes(data)
        digests[name] = hashlib.sha256(data).hexdigest()[:16]
    evaluated = {"a-last": digests["last"], "b-best": digests["best"], "c-gone": "f" * 16}
    for position, (name, digest) in enumerate(evaluated.items()):
        attacks = ("FGSM", "PGD-20", "APGD-CE", "Square")[: 4 - position]
        folder = make_evaluation(run / name, found, clean=900 + position, attacks=attacks)
        rewrite(folder, {"digest": digest, "file": f"model-{name[2:]}.safetensors"})
    page = read(run, tmp_path / "page.html")
    rows = side_by_side(page)
    assert [row[0] for row in rows] == [
        "R1 retrained", "E1 model-last.safetensors", "E3 model-gone.safetensors",
    ]  # fmt: skip
    for row, name in zip(rows, ("b-best", "a-last", "c-gone"), strict=True):
        assert row[1] == cell(evaluation(run, name)["results"][0]["clean"])
    assert "its model is none of those in run: it was replaced since" in page.text
    assert page.text.count("none of those in") == 1
    # Without the files, the evaluation itself says of which one it is.
    for name in ("best", "last"):
        (run / f"model-{name}.safetensors").unlink()
    shutil.rmtree(run / "c-gone")
    for name in ("a-last", "b-best"):
        rewrite(run / name, {"training": {"checkpoint": name[2:]}})
    rows = side_by_side(read(run, tmp_path / "page.html"))
    assert [row[0] for row in rows] == ["R1 retrained", "E1 model-last.safetensors"]
    assert rows[0][1] == cell(evaluation(run, "b-best")["results"][0]["clean"])


def test_of_two_trainings_of_one_configuration_the_file_decides(tmp_path, found):
    """Their run id is the same."""
    runs = [make_retraining(tmp_path / name, found, name=name) for name in ("first", "second")]
    for run in runs:
        (run / "model-best.safetensors").write_bytes(run.name.encode())
    digest = hashlib.sha256(b"second").hexdigest()[:16]
    apart = make_evaluation(tmp_path / "apart", found, run_id="beef00000000")
    rewrite(apart, {"digest": digest})
    page = read([*runs, apart], tmp_path / "page.html")
    assert [row[2] for row in runs_table(page)] == ["first", "second", "apart"]


def test_evaluation_of_another_genotype_is_not_the_retrainings(run):
    change(run, lambda v: v["model"].update(genotype_hash="0" * 64))
    page = read(run, run / "page.html")
    assert [row[0] for row in side_by_side(page)] == ["R1 retrained", "E2 model-best.safetensors"]


def test_two_searches_that_found_one_genotype_are_two_networks(tmp_path):
    """The weights that a search shares are its own."""
    searches = [make_run(tmp_path / name, space_name="general7", rounds=1) for name in "ab"]
    summary = json.loads((searches[1] / "summary.json").read_text())
    summary["test"]["clean_accuracy"] = 0.25
    write_json(searches[1] / "summary.json", summary)
    rows = side_by_side(read(searches, tmp_path / "page.html"))
    assert len(rows) == 2
    assert "25.00 %" in rows[0][1] + rows[1][1]


def test_a_suspicious_row_is_never_preferred(tmp_path, found):
    """Though it is of more attacks, and of the radius that was trained for."""
    run = make_retraining(tmp_path / "run", found)
    make_evaluation(run / "a", found, epsilons=("8/255", "4/255"), clean=999, suspicious=True)
    make_evaluation(run / "b", found, epsilons=("4/255",), attacks=("FGSM",))
    page = read(run, tmp_path / "page.html")
    sound = evaluation(run, "b")["results"][0]["worst_case"]
    assert f"robust accuracy, L∞, epsilon 4/255 {percent(sound['accuracy'])}" in page.text
    # Nor for a point of the curve.
    assert f"epsilon 4/255, R1 retrained: worst case {percent(sound['accuracy'])}" in page.text
    flagged = evaluation(run, "a")["results"][0]["worst_case"]
    assert (
        f"epsilon 8/255, R1 retrained: worst case {percent(flagged['accuracy'])} of 1,000, "
        "suspicious"
    ) in page.text


def test_a_curve_is_of_one_set_of_images(tmp_path, found):
    folders = [
        rewrite(make_evaluation(tmp_path / name, found, epsilons=epsilons, n=n),
                {"digest": "a" * 16}, data={"digest": digest})
        for name, epsilons, digest, n in (
            ("a", ("8/255", "2/255"), "x", 1000),
            ("b", ("4/255", "8/255"), "y", 1000),
            ("c", ("1/255", "8/255"), "x", 2000),
            ("d", ("16/255",), "x", 1000),
        )
    ]  # fmt: skip
    text = write_report(folders, tmp_path / "page.html").read_text()
    start = text.index('aria-label="Accuracy against epsilon, L∞"')
    chart = text[start : text.index("</svg>", start)]
    lines = re.findall(r'class="line s\d[^"]*" d="([^"]+)"', chart)
    # Each begins at the clean accuracy.
    assert sorted(len(re.findall("[ML]", line)) for line in lines) == [3, 3, 4]


def test_a_folder_named_twice_is_read_once(source, tmp_path):
    inner = source / "evaluation-linf-8_255"
    page = read([inner, source, source / ".." / source.name], tmp_path / "page.html")
    assert [row[0] for row in runs_table(page)] == ["R1", "E1", "E2"]


def test_folders_of_one_name_are_told_apart(tmp_path, found):
    runs = [make_retraining(tmp_path / where / "run", found, seed=i)
            for i, where in enumerate(("here", "there"))]  # fmt: skip
    page = read(runs, tmp_path / "page.html")
    assert [row[2] for row in runs_table(page)] == ["here/run", "there/run"]


def test_an_evaluation_by_itself(tmp_path, found):
    folder = make_evaluation(tmp_path / "evaluation", found)
    page = read(folder, folder / "report.html")
    assert "1 evaluation" in page.text
    assert percent(evaluation(tmp_path, "evaluation")["results"][0]["worst_case"]["accuracy"]) in (
        page.text
    )


def test_every_source_has_a_name(source, tmp_path):
    search = make_run(tmp_path / "search", space_name="general7", rounds=1)
    text = write_report([search, source], tmp_path / "page.html").read_text()
    named = re.findall(r'<p class="source">from (.*?)</p>', text)
    assert len(named) > 10
    for sources in named:
        assert all(sources.split("; ")), sources


def test_the_page_of_one_search_names_no_other_run(tmp_path):
    search = make_run(tmp_path / "search", space_name="general7", rounds=1)
    text = write_report(search).read_text()
    assert "S1" not in Page(text).text
    assert 'id="figures"' in text


# --- the page -------------------------------------------------------------------------------


def test_page_is_offline_and_without_scripts(source, page):
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                good = "data:image/png;base64," if tag == "img" else "#"
                assert (value or "").startswith(good), (tag, name)
        if tag == "img":
            assert attributes["alt"]
    text = write_report(source, source.parent / "again.html").read_text()
    assert "url(" not in text
    assert "@import" not in text
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert str(source.parent) not in text
    policy = next(a for t, a in page.tags if t == "meta" and a.get("http-equiv"))["content"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    titles = sum(tag == "h2" for tag, _ in page.tags)
    sources = [a for t, a in page.tags if t == "p" and a.get("class") == "source"]
    assert len(sources) == titles + 2  # header and footer


def poison(value: Any, evil: str, *, keep: tuple[str, ...] = ()) -> Any:
    """Every text in a value from JSON replaced, but for those of the keys in ``keep``."""
    if isinstance(value, dict):
        return {key: entry if key in keep else poison(entry, evil, keep=keep)
                for key, entry in value.items()}  # fmt: skip
    if isinstance(value, list):
        return [poison(entry, evil, keep=keep) for entry in value]
    return evil if isinstance(value, str) else value


def test_hostile_text_is_escaped(source, tmp_path):
    evil = "<script>alert('x')</script>\"&<img src=http://example.org/a onload=b>"
    run = Path(shutil.copytree(source, tmp_path / "<b onclick=x>&'\""))
    keep = ("status", "command", "verdict", "epsilon")
    for file in [run / "summary.json", run / "env.json", *run.glob("*/*.json")]:
        value = poison(json.loads(file.read_text()), evil, keep=keep)
        write_json(file, value)
    inner = run / "evaluation-linf-8_255"
    value = json.loads((inner / "evaluation.json").read_text())
    value["suspicion"]["checks"][0]["verdict"] = evil
    value["results"][1]["threat"]["epsilon"] = evil
    value["cost"][evil] = value["cross_check"][evil] = evil
    value["transfer"] = [*value["transfer"], {"from": evil, "attacks": [{evil: evil}]}]
    write_json(inner / "evaluation.json", value)
    lines = read_lines(run / "metrics.jsonl")
    lines[3]["overfitting"] = evil
    lines[4]["overfitting"] = {"overfitted": True, "trained": 0.5, "strong": 0.0, "images": evil}
    lines[5]["loss"] = evil
    write_lines(run / "metrics.jsonl", lines)
    (run / "config.yaml").write_text(json.dumps({"name": evil, "seed": evil, "data": evil}))
    found = Genotype.load(run / "genotype.json").model_copy(update={"name": evil})
    found.save(run / "genotype.json")
    text = write_report([run], tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "<script" not in text
    assert text.count("<img") == sum(tag == "img" for tag, _ in page.tags) == 24
    assert evil in unescape(text)
    assert f"of {evil} images" in unescape(text)
    for tag, attributes in page.tags:
        assert set(attributes) <= {
            "class", "id", "style", "href", "name", "content", "charset", "http-equiv", "lang",
            "open", "viewbox", "role", "aria-label", "d", "x", "y", "dy", "dx", "cx", "cy", "r",
            "rx", "width", "height", "transform", "text-anchor", "stroke-width", "src", "alt",
            "xmlns", "font-family", "font-size", "fill", "stroke", "points", "fill-opacity",
            "stroke-dasharray",
        }, tag  # fmt: skip


def test_why_the_reference_was_left_out_is_said(run):
    value = evaluation(run)
    file = next(run.glob("*/evaluation.json"))
    told = "no cross-check with the reference AutoAttack"
    assert told not in read(run, run / "page.html").text
    value["cross_check"], value["cross_check_left_out"] = None, "<b>pyautoattack</b> is missing"
    write_json(file, value)
    page = read(run, run / "page.html")
    assert f"{told}: <b>pyautoattack</b> is missing." in page.text
    # Neither a file of an older version nor one that says nonsense.
    for other in (None, "", 3, ["x"]):
        value["cross_check_left_out"] = other
        write_json(file, value)
        assert told not in read(run, run / "page.html").text


def test_attacks_that_all_met_every_image_are_told_apart(run):
    cumulative = "each only on the images that were still classified rightly"
    own = "so each accuracy is that attack's own"
    page = read(run, run / "page.html")
    assert cumulative in page.text
    assert own not in page.text
    value = evaluation(run)
    for result in value["results"]:
        result["attacked_images"] = "all"
    write_json(run / "evaluation-linf-8_255" / "evaluation.json", value)
    page = read(run, run / "page.html")
    assert cumulative in page.text  # of the other evaluation
    assert own in page.text
    assert "Under attack: L∞, epsilon 8/255 *" in page.text
    assert "Under attack: L2, epsilon 1/2 *" not in page.text


def test_transfer_is_a_table(source, page):
    entry = evaluation(source)["transfer"][0]
    attack = entry["attacks"][0]
    assert [entry["from"]["file"], attack["name"], str(attack["attacked"]), "1,000",
            cell(attack), ""] in page.rows  # fmt: skip


# --- what is missing, damaged or contradicts itself -----------------------------------------


def test_unfinished_retraining(tmp_path, found):
    run = make_retraining(tmp_path / "going", found, stop_after=5)
    page = read(run, tmp_path / "page.html")
    last = read_lines(run / "metrics.jsonl")[-1]
    assert "Not finished: R1 (going)" in page.text
    assert "epoch 5 so far, validation images" in page.text
    low, high = report.wilson(last["robust_accuracy"] * 500, 500)
    assert (
        f"{percent(last['robust_accuracy'])} 95 %: {100 * low:.2f} to {100 * high:.2f} %, n = 500"
        in page.text
    )
    assert found.hash[:12] in page.text
    assert rows_with(page, "seconds, total", 2)[0][1].startswith("35.00")
    assert rows_with(page, "file", 2)[0][1] == "metrics.jsonl, summed"


@pytest.mark.parametrize("stop_after", [0, 1])
def test_retraining_that_has_just_begun(tmp_path, found, stop_after):
    run = make_retraining(tmp_path / "run", found, stop_after=stop_after)
    page = read(run, tmp_path / "page.html")
    assert ("No epoch of a retraining yet" in page.text) == (stop_after == 0)


@pytest.mark.parametrize("best", [10**400, 5000, -3, True, "last"])
def test_a_best_epoch_that_was_not_trained_has_no_mark(run, best):
    summary = json.loads((run / "summary.json").read_text())
    summary["best"]["epoch"] = best
    text = write_report(run, run / "page.html", summary=summary).read_text()
    section = text[text.index('id="training"') :]
    assert ">best</text>" not in section[: section.index("</section>")]


def test_unfinished_evaluation_below_a_retraining(run):
    (run / "evaluation-linf-8_255" / "evaluation.json").unlink()
    page = read(run, run / "page.html")
    assert "Not finished: E2 (retrained/evaluation-linf-8_255)" in page.text
    assert [row[2:4] for row in runs_table(page)][-1] == [
        "retrained/evaluation-linf-8_255", "unfinished",
    ]  # fmt: skip


FILES = ("config.yaml", "env.json", "split.json", "metrics.jsonl", "genotype.json", "summary.json")
INNER = ("config.yaml", "env.json", "examples.safetensors", "evaluation.json")


@pytest.mark.parametrize("name", [*FILES, *(f"evaluation-linf-8_255/{inner}" for inner in INNER)])
@pytest.mark.parametrize("how", ["missing", "damaged"])
def test_any_file_may_be_missing_or_damaged(run, name, how):
    if how == "missing":
        (run / name).unlink()
    else:
        (run / name).write_bytes(b'{"a": [\xff')
    page = read(run, run / "page.html")
    if how == "damaged":
        # Cells are drawn, or not, in their own section.
        told = "cannot be drawn" if name == "genotype.json" else "Not everything could be read"
        assert told in page.text
        assert Path(name).name in page.text
    assert str(run) not in page.text
    # What the other files hold is still there.
    if Path(name).name not in ("summary.json", "evaluation.json"):
        assert "8/255" in page.text
        assert percent(evaluation(run)["results"][0]["worst_case"]["accuracy"]) in page.text


@pytest.mark.parametrize(
    "value", [None, True, [], {}, "x", -1, 10**400, 1e308, [None], [[]], [{}], {"n": 0}]
)
def test_odd_values_anywhere_in_an_evaluation(tmp_path, found, value):
    folder = make_evaluation(tmp_path / "evaluation", found, epsilons=("8/255", "1/255"))
    whole = json.loads((folder / "evaluation.json").read_text())

    def places(at: Any, where: tuple = ()):
        entries = at.items() if isinstance(at, dict) else enumerate(at)
        for key, entry in entries:
            yield (*where, key)
            if isinstance(entry, (dict, list)):
                yield from places(entry, (*where, key))

    every = [place for place in places(whole) if place != ("command",)]
    # Some places for each value: a page for all of them would take minutes.
    for place in random.Random(str(value)).sample(every, 25):
        changed = json.loads((folder / "evaluation.json").read_text())
        at = changed
        for key in place[:-1]:
            at = at[key]
        at[place[-1]] = value
        text = write_report(folder, tmp_path / "page.html", summary=changed).read_text()
        Page(text)
        assert "Traceback" not in text


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("robustbench", [{f"k{i}": i} for i in range(1500)]),
        ("robustbench", [{f"k{i}": i for i in range(3000)}]),
        ("cross_check", {f"k{i}": i for i in range(3000)}),
        ("cost", {"seconds": {f"k{i}": i for i in range(3000)}}),
    ],
)
def test_a_page_does_not_grow_with_what_a_file_lists(tmp_path, found, key, value):
    folder = make_evaluation(tmp_path / "evaluation", found)
    changed = {**json.loads((folder / "evaluation.json").read_text()), key: value}
    text = write_report(folder, tmp_path / "page.html", summary=changed).read_text()
    page = Page(text)
    # Every row has two cells or more; a square of 1,500 would have two million.
    assert sum(len(row) for row in page.rows) < 50_000
    assert len(page.rows) < 600
    if key != "cost":
        assert f"and {len(value) - 200 if len(value) > 1 else 2800:,} more" in page.text


def test_any_damage_gives_a_page_or_one_clear_error(source, tmp_path):
    chance = random.Random(0)
    pieces = [b"", b"{", b"\xff", b"null", b"1e999", b"NaN", b'"', b"-1", b"[[]]", b"9" * 30]
    pages = 0
    names = [*FILES, *(f"evaluation-linf-8_255/{name}" for name in INNER)]
    for trial in range(24):
        run = Path(shutil.copytree(source, tmp_path / str(trial)))
        for name in chance.sample(names, 3):
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


def change(run: Path, edit) -> None:
    value = evaluation(run)
    edit(value)
    write_json(run / "evaluation-linf-8_255" / "evaluation.json", value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda v: v["results"][0]["clean"].update(accuracy=0.5),
            "results[0].clean: accuracy: expected correct / n = 912 / 1000 = 0.912, got 0.5",
        ),
        (
            lambda v: v["results"][0]["worst_case"].update(accuracy=0.9, correct=900),
            "the worst case, 0.9, is above the accuracy under FGSM",
        ),
        (
            lambda v: v["model"].update(genotype_hash="0" * 64),
            "evaluation.json: genotype 000000000000 is not that of the run retrained",
        ),
        (
            lambda v: v["results"][1]["attacks"][2].update(accuracy=1.5, correct=None),
            "results[1].attacks[2]: accuracy: expected a number in [0, 1], got 1.5",
        ),
        (lambda v: v.update(results=3), "results: expected a list, got int"),
    ],
)
def test_contradictions_are_noted(run, edit, message):
    change(run, edit)
    page = read(run, run / "page.html")
    assert "Not everything could be read" in page.text
    assert message in page.text


def test_interval_that_is_missing_is_wilsons(run):
    change(run, lambda v: v["results"][0]["worst_case"].pop("interval"))
    share = evaluation(run)["results"][0]["worst_case"]
    low, high = report.wilson(share["correct"], share["n"])
    page = read(run, run / "page.html")
    assert f"95 %: {100 * low:.2f} to {100 * high:.2f} %, n = 1,000" in page.text


# --- the command ----------------------------------------------------------------------------


def test_command_of_several_writes_where_it_was_called(source, tmp_path, capsys, monkeypatch):
    search = make_run(tmp_path / "search", space_name="general7", rounds=1)
    monkeypatch.chdir(tmp_path)
    assert report.main([str(search), str(source)]) == 0
    assert capsys.readouterr().out.splitlines()[-2] == "report: report.html"
    assert (tmp_path / "report.html").is_file()
    out = tmp_path / "other.html"
    assert report.main([str(search), str(source), "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == {
        "report": str(out),
        "bytes": out.stat().st_size,
        "status": "finished",
        "searches": 1,
        "retrainings": 1,
        "evaluations": 2,
        "suspicious": 0,
        "notes": [],
    }


def test_command_of_one_retraining_writes_into_its_folder(run, capsys):
    assert report.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[:-1] == [f"report: {run / 'report.html'}"]


def test_command_tells_notes_with_the_run(run, capsys):
    (run / "evaluation-linf-8_255" / "env.json").write_text("{")
    assert report.main([str(run)]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("note: E2 (retrained/evaluation-linf-8_255): env.json: not valid JSON")


def test_command_refuses_nothing_and_what_is_no_run(source, tmp_path, capsys):
    assert report.main([]) == 1
    assert "RUN: expected at least one run folder, got none" in capsys.readouterr().err
    out = tmp_path / "page.html"
    assert report.main([str(source), str(tmp_path / "none"), "--out", str(out)]) == 1
    assert "none: expected a run folder, got nothing there" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(ReportError, match="expected at least one run folder"):
        write_report([])


def test_summary_that_is_not_written_yet(run):
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    page = Page(write_report(run, summary=summary).read_text(encoding="utf-8"))
    assert "Not finished" not in page.text
    inner = run / "evaluation-linf-8_255"
    value = evaluation(run)
    (inner / "evaluation.json").unlink()
    page = Page(write_report(inner, summary=value).read_text(encoding="utf-8"))
    assert "Not finished" not in page.text
    assert percent(value["results"][0]["worst_case"]["accuracy"]) in page.text


# --- charts ---------------------------------------------------------------------------------


def test_bars_by_hand():
    chart = Page(
        bar_chart(
            [Bar("a<b", 0.5, "50 %", "s1", 0.25, 0.75, "note"), Bar("c", 2.0, "200 %", "s2")],
            title="t",
            x_label="x",
        )
    )
    bars = {(a["class"] or "").split()[1]: a for t, a in chart.tags
            if t == "rect" and (a["class"] or "").startswith("bar")}  # fmt: skip
    half, whole = float(bars["s1"]["width"] or 0), float(bars["s2"]["width"] or 0)
    assert whole == pytest.approx(2 * half, abs=0.02)  # cut at the end of the axis
    (interval,) = [a["d"] for t, a in chart.tags if t == "path" and a["class"] == "interval"]
    start, end = (float(x) for x in re.match(r"M([\d.]+) [\d.]+H([\d.]+)", interval).groups())
    left = float(bars["s1"]["x"] or 0)
    assert start - left == pytest.approx(half / 2, abs=0.02)
    assert end - left == pytest.approx(half * 1.5, abs=0.02)
    assert "a<b" in chart.text
    assert "note" in chart.text
    assert "Nothing to draw yet" in bar_chart([], title="t", x_label="x")


def test_ticks_that_would_lie_on_each_other_lose_their_text():
    chart = line_chart(
        [Series("a", [0, 1], [0, 1], "s1")],
        title="t",
        x_label="x",
        y_label="y",
        x_range=(0, 1),
        x_ticks=[(0, "0"), (0.5, "128/255"), (0.505, "129/255"), (1, "1")],
        y_range=(0, 1),
    )
    assert "128/255" in chart
    assert "129/255" not in chart
    assert ">1</text>" in chart


def test_events_side_by_side_are_both_read():
    chart = Page(
        line_chart(
            [Series("a", [0, 9], [0, 1], "s1")],
            title="t",
            x_label="x",
            y_label="y",
            x_range=(0, 9),
            events=[(5, "best"), (4.9, "guard")],
        )
    )
    at = [float(a["x"] or 0) for t, a in chart.tags
          if t == "text" and a.get("y") == "18"]  # fmt: skip
    assert len(at) == 2
    assert abs(at[0] - at[1]) > 6 * 4.5
