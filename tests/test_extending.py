"""docs/extending.md: its recipes, followed to the letter on a copy of the package."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import _processes
import pytest
import torch
import yaml
from _digits import model_file
from _tiny import TINY
from safetensors import safe_open

from fastbandit.bandit import replay

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "extending.md"
# In the package that runs there.
SMALL_SPACE = "from _tiny import small_space\nsmall_space()\n"


def recipe(title: str) -> str:
    """The section of that title."""
    found = re.split(r"^## (.+)\n", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))[title]


def apply(section: str, folder: Path) -> None:
    """Apply the blocks of a recipe to the copy of the repository in ``folder``."""
    blocks = re.findall(
        r"^```(diff|python)\n# (\S+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL
    )
    assert blocks
    for kind, name, body in blocks:
        path = folder / name
        if kind == "python":
            assert not path.exists(), f"{name} is there already"
            path.write_text(body)
            continue
        lines = body.splitlines()
        old = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "+")
        new = "".join(f"{line[1:]}\n" for line in lines if line[:1] != "-")
        text = path.read_text()
        assert text.count(old) == 1, f"{name} has {text.count(old)} places for:\n{body}"
        path.write_text(text.replace(old, new))


@pytest.fixture
def follow(tmp_path):
    """Applies the recipe of a title to a copy; returns what runs a module of the copy."""

    def following(title: str):
        skip = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "fastbandit", tmp_path / "fastbandit", ignore=skip)
        for library in (ROOT / "fastbandit").glob("*.so"):
            (tmp_path / "fastbandit" / library.name).symlink_to(library)
        apply(recipe(title), tmp_path)
        (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

        def run(module: str, *arguments: str) -> dict:
            code = (
                f"{SMALL_SPACE}import runpy\nrunpy.run_module({module!r}, None, '__main__', True)"
            )
            environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
            given = ("-c", code, *arguments, "--json")
            done = _processes.run(*given, environment=environment, folder=tmp_path)
            assert done.returncode == 0, done.stderr
            return json.loads(done.stdout)

        return run

    return following


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_an_arm_with_an_option(follow, tmp_path):
    run = follow("An arm with an option")
    run(
        "fastbandit.search", "--config", "tiny.yaml", "--out", "run", "--space", "gated3",
        "--squeeze", "2",
    )  # fmt: skip
    found = json.loads((tmp_path / "run" / "genotype.json").read_text())
    assert found["options"]["squeeze"] == 2
    nodes = [node for cell in found["cells"] for node in cell["nodes"]]
    assert "squeeze_excite" in {edge["op"] for node in nodes for edge in node}
    # The gate is in the weights, with one hidden channel for each two.
    with safe_open(tmp_path / "run" / "weights.safetensors", "pt") as weights:
        names = list(weights.keys())
        shapes = {weights.get_tensor(name).shape for name in names if "down" in name}
    assert all(hidden == channels // 2 for hidden, channels, _, _ in shapes)
    assert shapes


@pytest.mark.slow
def test_a_policy_with_a_parameter(follow, tmp_path):
    run = follow("A policy with a parameter")
    setting = ("--bandit.policy", "epsilon-greedy", "--bandit.explore")
    run("fastbandit.search", "--config", "tiny.yaml", "--out", "run", *setting, "0.3")
    log = lines(tmp_path / "run" / "bandit.jsonl")
    assert (log[0]["policy"], log[0]["explore"]) == ("epsilon-greedy", 0.3)
    # Of three arms alive the best has 0.7 + 0.3 / 3, each other 0.3 / 3.
    first = next(line for line in log if line.get("phase") == "search")
    assert {round(p, 9) for p in first["probability"]} <= {
        round(0.3 / 3, 9), round(0.7 + 0.3 / 3, 9)
    }  # fmt: skip
    assert "epsilon-greedy" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_an_attack(follow, tmp_path):
    run = follow("An attack")
    result = run(
        "fastbandit.evaluate", str(model_file(tmp_path)), "--out", "evaluation",
        "--epsilon", "0.2", "--limit", "100", "--attacks", "noise,pgd-2", "--noise.draws", "3",
        "--checks.images", "0", "--examples", "0",
    )  # fmt: skip
    (found,) = result["results"]
    assert [attack["name"] for attack in found["attacks"]] == ["Noise", "PGD-2"]
    assert found["attacks"][0]["fooled"] > 0
    assert "Noise 3 draws" in found["provenance"]


@pytest.mark.slow
def test_a_search_algorithm(follow, tmp_path):
    run = follow("A search algorithm")
    given = ("fastbandit.search.economical", "--config", "tiny.yaml", "--out", "run")
    run(*given, "--price", "0.05", "--reward", "clean")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["price"] == 0.05
    samples = [one for one in lines(tmp_path / "run" / "bandit.jsonl") if one["event"] == "sample"]
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert len(samples) == len(metrics) == 8
    for sample, one in zip(samples, metrics, strict=True):
        assert sample["reward"] == one["reward"]
    # Each parameter costs the same, unless the score is 0.
    costs = [
        (one["clean_accuracy"] - one["reward"]) / one["path_parameters"]
        for one in metrics
        if one["reward"]
    ]
    assert len(costs) > 2
    assert costs == pytest.approx([costs[0]] * len(costs))
    assert costs[0] > 0
    bandit = replay(lines(tmp_path / "run" / "bandit.jsonl"))
    assert torch.equal(bandit.final(), torch.tensor(end(tmp_path / "run")))


def end(folder: Path) -> list[int]:
    return lines(folder / "bandit.jsonl")[-1]["choice"]


def test_a_cuda_kernel_names_what_there_is():
    section = recipe("A CUDA kernel for an op that has a CPU one")
    names = set(re.findall(r"`([^`\s]+)`", re.sub(r"^```.*?^```$", "", section, flags=re.M | re.S)))
    to_be = {f"csrc/cuda/max_pool2d{end}" for end in (".h", ".cpp", "_kernel.cu")}
    paths = {name for name in names if "/" in name or name.endswith(".py")}
    assert to_be < paths
    for name in paths - to_be:
        places = [ROOT / name, ROOT / "tests" / "cuda_on_cpu" / name]
        assert any(place.exists() for place in places), name
    for name in to_be:
        assert not (ROOT / name).exists(), f"{name} is there: take another op for the recipe"
    text = "".join(
        path.read_text()
        for folder in ("csrc", "fastbandit/ops", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".py")
    )
    symbols = set(re.findall(r"\b(?:FB_[A-Z]+|STABLE_TORCH_\w+|TORCH_BOX)\b", section)) | {
        name for name in names if re.fullmatch(r"\w+", name)
    }
    assert {"DeviceGuard", "FB_LAUNCH", "kernel_pools", "check_launch"} <= symbols
    for symbol in symbols:
        assert re.search(rf"\b{symbol}\b", text), symbol
    # The declarations of the recipe register what Python declares.
    for op in re.findall(r'library\.impl\("(\w+)"', section):
        assert hasattr(torch.ops.fastbandit, op)
