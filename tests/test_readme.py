"""The README's Python examples print what it says they print."""

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_python_examples():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    text = "\n".join(blocks)
    assert text.count(">>>") >= 15
    test = doctest.DocTestParser().get_doctest(text, {}, "README.md", str(README), 0)
    runner = doctest.DocTestRunner(verbose=False)
    output: list[str] = []
    runner.run(test, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


def test_presets_are_those_of_the_command():
    from fastbandit.search import PRESETS

    # Those for 1-bit networks have a page of their own.
    binary = (README.parent / "docs" / "binary.md").read_text(encoding="utf-8")
    for name in PRESETS:
        page = binary if "binary" in name else README.read_text(encoding="utf-8")
        assert f"`{name}`" in page
