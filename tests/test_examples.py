"""Every script of examples/ runs, and says what it is there to say."""

import re
from pathlib import Path

import pytest
from _processes import run

from fastbandit.export import has_onnx

FOLDER = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "evaluate_my_model.py": ["  robust ", "verdict: ok", "stand whatever was tried"],
    "my_data.py": ["40 training and 10 test images [3, 16, 16], 2 classes", "classes: day, night"],
    "my_policy.py": ["\nrandom ", "\nprinted ", "\nhalf-greedy "],
    "ops_in_my_training_loop.py": ["epoch 3: clean ", "under PGD-10 "],
    "search_to_onnx.py": ["found: ", "the logits of 100 images are those of the network"],
}
SLOW = {"search_to_onnx.py"}


def number(printed: str, name: str) -> float:
    found = re.findall(rf"{re.escape(name)} +(-?[0-9.]+)", printed)
    assert found, printed
    return float(found[-1])


def my_policy(printed: str) -> None:
    chance, paper, mine = (
        number(printed, f"\n{name}") for name in ("random", "printed", "half-greedy")
    )
    assert abs(chance) < 0.15 < paper < mine


def ops_in_my_training_loop(printed: str) -> None:
    assert number(printed, "under PGD-10") > 65  # 55 without the attack in training


# What a script shows, of what it printed.
SHOWS = {"my_policy.py": my_policy, "ops_in_my_training_loop.py": ops_in_my_training_loop}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not a source checkout")


def test_each_script_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SAYS]
)
def test_it_runs_as_it_stands(name, tmp_path):
    if name == "search_to_onnx.py" and not has_onnx():
        pytest.skip("onnx, onnxscript and onnxruntime are not installed")
    done = run(str(FOLDER / name), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in SAYS[name]:
        assert words in done.stdout
    SHOWS.get(name, str)(done.stdout)
    assert list(tmp_path.iterdir()) == []


def test_a_script_is_short():
    for name in SAYS:
        assert len((FOLDER / name).read_text(encoding="utf-8").splitlines()) <= 60, name
