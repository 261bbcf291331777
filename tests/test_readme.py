"""The Python examples of the README and of docs/ops.md print what they say they print."""

import doctest
import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
OPS = README.parent / "docs" / "ops.md"


@pytest.mark.parametrize(("page", "least"), [(README, 5), (OPS, 15)], ids=["README", "ops"])
def test_python_examples(page, least):
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    text = "\n".join(blocks)
    assert text.count(">>>") >= least
    test = doctest.DocTestParser().get_doctest(text, {}, page.name, str(page), 0)
    runner = doctest.DocTestRunner(verbose=False)
    output: list[str] = []
    runner.run(test, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


def test_presets_are_those_of_the_command():
    from fastbandit.search import PRESETS

    for name in PRESETS:
        assert f"`{name}`" in README.read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150
