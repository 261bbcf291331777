"""The API reference is built from the docstrings without a warning, and has every public name."""

import importlib
import re
from pathlib import Path

import pytest
from _processes import run

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "api"
MODULES = (
    "attacks", "bandit", "callbacks", "data", "evaluate", "export", "genotype", "latency", "models",
    "nn", "operations", "ops", "retrain", "search", "space", "threat",
)  # fmt: skip

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not a source checkout")


def test_each_page_is_in_the_index():
    listed = re.findall(r"^   (fastbandit\S*)$", (FOLDER / "index.rst").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.stem for path in FOLDER.glob("fastbandit*.rst"))
    assert sorted(listed) == ["fastbandit", *(f"fastbandit.{name}" for name in MODULES)]


@pytest.mark.slow
def test_it_is_built_without_a_warning_and_has_every_public_name(tmp_path):
    pytest.importorskip("sphinx")
    pytest.importorskip("furo")
    # A process of its own: conf.py changes annotations of the package.
    done = run(
        "-m", "sphinx", "-q", "-W", "--keep-going",
        "-d", str(tmp_path / "doctrees"), str(FOLDER), str(tmp_path / "api"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for module in ("fastbandit", *(f"fastbandit.{name}" for name in MODULES)):
        page = (tmp_path / "api" / f"{module}.html").read_text(encoding="utf-8")
        there = set(re.findall(r'id="([\w.]+)"', page))
        # The page of the module has evaluate, under its own name; of main see conf.py.
        names = {*importlib.import_module(module).__all__} - {"main", "__version__", "evaluate"}
        assert {f"{module}.{name}" for name in names} <= there, module
        # What autodoc could not read, or napoleon took for something else.
        assert "Annotated[" not in page
        assert not re.search(r"(?:Args|Returns|Raises):\s*<", page)
    # Of settings: inherited ones, and those of files where an f-string in an annotation hid them.
    for module, words in (
        ("search", "images in a mini-batch"),
        ("bandit", "lambda, the weight of the new accuracy"),
        ("evaluate", "adversarial images to keep"),
    ):
        page = (tmp_path / "api" / f"fastbandit.{module}.html").read_text(encoding="utf-8")
        assert words in page, module
