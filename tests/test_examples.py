"""Every script of examples/ runs, and says what it is there to say."""

from pathlib import Path

import pytest
from _processes import run

FOLDER = Path(__file__).resolve().parent.parent / "examples"
SAYS = {
    "evaluate_my_model.py": ["  robust ", "verdict: ok", "stand whatever was tried"],
    "my_data.py": ["40 training and 10 test images [3, 16, 16], 2 classes", "classes: day, night"],
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not a source checkout")


def test_each_script_is_run():
    assert {path.name for path in FOLDER.glob("*.py")} == set(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_it_runs_as_it_stands(name, tmp_path):
    done = run(str(FOLDER / name), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in SAYS[name]:
        assert words in done.stdout
    assert list(tmp_path.iterdir()) == []
