"""docs/formats.md: its generated parts are current, and files hold what it says."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest
import yaml
from _digits import model_file
from _tiny import small_space, tiny
from safetensors import safe_open

from fastbandit import evaluate, study
from fastbandit.config import to_plain
from fastbandit.genotype import Genotype
from fastbandit.runs.folder import RunFolder
from fastbandit.search import search

DOCS = Path(__file__).parents[1] / "docs"
MADE = runpy.run_path(str(DOCS / "formats.py"))
PAGE = (DOCS / "formats.md").read_text(encoding="utf-8")
CHECKED = {"checksum", "checksum_of"}


def documented(title: str) -> set[str]:
    """The names in the first column of the tables of a section."""
    found = re.split(r"^## (.+)\n", PAGE, flags=re.MULTILINE)
    section = dict(zip(found[1::2], found[2::2], strict=True))[title]
    rows = re.findall(r"^\| (`.+?) \|", section, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def keys(path: Path) -> set[str]:
    """The fields of a file: of all lines of a log."""
    if path.suffix == ".jsonl":
        return {key for line in path.read_text().splitlines() for key in json.loads(line)}
    return set(read(path)) - CHECKED


def metadata(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        return set(json.loads(file.metadata()["fastbandit"])) - {"kind", "version", "crc32"}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A search with all that it may write."""
    folder = tmp_path_factory.mktemp("formats") / "search"
    final = {"tune_epochs": 1, "network_epochs": 1, "random_networks": 0, "reference": False}
    with pytest.MonkeyPatch.context() as patch:
        small_space(patch)
        search(tiny(final={"steps": 2, "step_size": "0.1", **final}), folder)
    return folder


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    given = ["--limit", "20", "--epsilons", "0.1", "--attacks", "fgsm", "--checks.images", "0"]
    model = str(model_file(folder))
    assert evaluate.main([model, *given, "--epsilon", "0.2", "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_the_generated_parts_are_current():
    assert MADE["page"](PAGE) == PAGE, "run python docs/formats.py"


def test_the_list_of_files_is_complete(run, evaluation):
    table = PAGE.split("| file | of | |\n")[1].split("\n\n")[0]
    patterns = re.findall(r"`([^`]+)`", "".join(row.split("|")[1] for row in table.splitlines()))
    for folder in (run, run / "networks" / "found", evaluation):
        files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        named = {
            file
            for file in files
            if any(file.match(name) or file.parts[0] == name.rstrip("/") for name in patterns)
        }
        assert named == files


@pytest.mark.parametrize("name", ["env.json", "split.json", "genotypes.jsonl", "metrics.jsonl"])
def test_a_file_of_a_search_has_the_fields_of_the_page(run, name):
    # tests/test_fork.py has the field of a run that was forked.
    assert keys(run / name) == documented(name) - {"forked_from"}


def test_a_retraining_has_the_fields_of_the_page(run):
    folder = run / "networks" / "found"
    assert keys(folder / "env.json") == documented("env.json") - {"forked_from"}
    assert keys(folder / "split.json") == documented("split.json")
    # Of a 1-bit network that is trained in two steps: tests/test_retrain_binary.py.
    metrics = documented("metrics.jsonl of a retraining") - {"binary_step"}
    assert keys(folder / "metrics.jsonl") == metrics
    assert keys(folder / "summary.json") == documented("summary.json of a retraining")


def test_the_summary_has_the_fields_of_the_page(run):
    # With a budget of latency: tests/test_latency.py.
    assert keys(run / "summary.json") == documented("summary.json") - {"latency"}


def test_lines_of_the_bandit_have_the_fields_of_the_page(run):
    lines = [json.loads(line) for line in (run / "bandit.jsonl").read_text().splitlines()]
    parts = re.split(r'^`"event": "(\w+)"`', MADE["bandit_part"](), flags=re.MULTILINE)[1:]
    for event, part in zip(parts[::2], parts[1::2], strict=True):
        fields = re.findall(r"^\| `(\w+)` \| (.+?) \| (.*?) \|", part, re.MULTILINE)
        found = [set(line) - {"event"} for line in lines if line["event"] == event]
        required = {name for name, _, default in fields if not default}
        assert found or event in ("attack", "reward")  # where something is found wrong
        for line in found:
            assert required <= line <= {name for name, _, _ in fields}


def test_a_genotype_has_the_fields_of_the_page(run):
    found = read(run / "genotype.json")
    fields = set(re.findall(r"^\| `([^`]+)`", MADE["genotype_part"](), re.MULTILINE))
    top = {name for name in fields if "." not in name}
    own = {"format", "schema_version", "hash", "checksum"}
    assert set(found) == (top | own) - {"inputs"}  # written where there are two
    assert set(Genotype.published("BNAS_XNOR_1").to_dict()) == (top | own) - {"checksum"}
    assert set(found["macro"]) == {name[6:] for name in fields if name.startswith("macro.")}
    cell = found["cells"][0]
    of_cells = {name[8:] for name in fields if re.match(r"cells\[\]\.\w+$", name)}
    assert set(cell) == of_cells - {"inputs"}  # of the genotype
    assert {f"cells[].nodes[][].{name}" for name in cell["nodes"][0][0]} <= fields
    recorded = {name[7:] for name in fields if name.startswith("search.")}
    assert set(found["search"]) == recorded | {"samples", "policy", "data", "threat"}
    line = json.loads((run / "genotypes.jsonl").read_text().splitlines()[-1])["genotype"]
    assert set(line) == set(found) - {"checksum"}
    assert Genotype.from_dict(line).hash == found["hash"]


def test_settings_are_those_of_the_command(run):
    found = yaml.safe_load((run / "config.yaml").read_text())
    assert set(found) == set(to_plain(tiny()))
    assert RunFolder.read_config(run) == found


def test_an_evaluation_has_the_fields_of_the_page(evaluation):
    fields = documented("evaluation.json")
    assert keys(evaluation / "evaluation.json") == {name for name in fields if "[" not in name}
    assert keys(evaluation / "env.json") == documented("env.json") - {"processes", "forked_from"}
    inner = {name.partition("[].")[2] for name in fields if "[" in name}
    for result in read(evaluation / "evaluation.json")["results"]:
        assert set(result) == inner
    added = set(yaml.safe_load((evaluation / "config.yaml").read_text()))
    assert {"model", "data_digest"} <= added


def test_a_study_has_the_fields_of_the_page(tmp_path):
    given = ["--preset", "smoke", "--threads", "1", "--simulated.parts", "policies"]
    given += ["--simulated.policies", "random", "printed", "--simulated.seeds", "2"]
    assert study.main([*given, "--out", str(tmp_path)]) == 0
    # With a table alone, which nothing here is.
    assert keys(tmp_path / "study.json") == documented("study.json") - {"tabular"}
    assert keys(tmp_path / "summary.json") == documented("summary.json of a study")
    for piece in (tmp_path / "pieces").iterdir():
        assert keys(piece) == {"key", "result"}


def test_tensor_files_say_what_the_page_says(run, evaluation):
    network = run / "networks" / "found"
    section = PAGE.split("## Tensor files")[1]
    for path in (
        run / "weights.safetensors",
        network / "model-best.safetensors",
        evaluation / "images.safetensors",
        evaluation / "examples.safetensors",
        run / "checkpoints" / "latest.safetensors",
    ):
        row = next(
            row
            for row in section.splitlines()
            if row.startswith("| `") and path.match(re.findall("`([^`]+)`", row)[0])
        )
        said = set(re.findall(r"`([\w]+)`", row.split("|")[3]))
        found = {name for name in metadata(path) if not re.fullmatch(r"broken_by_\d", name)}
        assert found == said, path
        with safe_open(path, "pt") as file:
            tensors = set(file.keys())
        names = set(re.findall(r"`([\w.*]+)`", row.split("|")[2]))
        for name in names:
            assert name in tensors or any(
                tensor.startswith(name.rstrip("*")) for tensor in tensors if name.endswith("*")
            ), name
