"""Every notebook of examples/ is executed, and shows what it is there to show."""

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples"
# Of some cell's outputs: a type, and words of it.
SHOWS = {
    "evaluate_my_model.ipynb": [
        ("text/html", "<th style='text-align:left'>robust</th>"),
        ("text/html", "verdict: ok"),
        ("text/plain", "'ok')"),
    ],
    "search.ipynb": [
        ("text/plain", "'skip_connect', "),
        ("stdout", ": 7 operations on each edge\n"),
        ("image/svg+xml", "<svg "),
        ("stdout", " upper bound "),
    ],
}

pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="not a source checkout")


def test_each_notebook_is_executed():
    assert {path.name for path in FOLDER.glob("*.ipynb")} == set(SHOWS)


@pytest.mark.parametrize("name", SHOWS)
def test_it_is_short_and_committed_without_outputs(name):
    cells = json.loads((FOLDER / name).read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert sum(len(cell["source"]) for cell in code) <= 60
    for cell in code:
        assert cell["outputs"] == []
        assert cell["execution_count"] is None


@pytest.fixture
def folder_of_jupyter():
    # The path of a socket has about 100 characters at most, and that of tmp_path may be longer.
    with tempfile.TemporaryDirectory(prefix="jupyter-") as folder:
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWS)
def test_it_runs_as_it_stands(name, tmp_path, monkeypatch, folder_of_jupyter):
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    config = pytest.importorskip("traitlets.config")
    # The kernel imports what this process does, and its own files lie elsewhere than the user's.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(variable, folder_of_jupyter)
    notebook = nbformat.read(FOLDER / name, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        resources={"metadata": {"path": str(tmp_path)}},
        # Sockets in that folder: ports may be taken by other tests on the same machine.
        config=config.Config(KernelManager={"transport": "ipc", "ip": f"{folder_of_jupyter}/ipc"}),
    )
    client.execute()
    shown: dict[str, str] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                assert output.name == "stdout", output.text
                texts = {output.name: output.text}
            else:
                texts = output.data
            for kind, text in texts.items():
                shown[kind] = shown.get(kind, "") + text
    for kind, words in SHOWS[name]:
        assert words in shown.get(kind, ""), f"{words!r} in {shown.get(kind)!r}"
    assert list(tmp_path.iterdir()) == []
