"""``runs/latest``, in every command that takes a run."""

import json
import os

import pytest
from test_models import write

from fastbandit import export
from fastbandit._files import seal
from fastbandit._latest import command_of, last_written, newest
from fastbandit.evaluate import __main__ as evaluate
from fastbandit.genotype import Genotype, GenotypeError
from fastbandit.models import BEST
from fastbandit.report import command as report
from fastbandit.retrain import __main__ as retrain
from fastbandit.retrain.genotypes import find_genotype, named_run, with_genotype

NAME = "ABANDIT_MNIST_NORMAL_1"


def folder(path, age, **files):
    """A run folder, all of whose files are of one age."""
    path.mkdir(parents=True)
    for name, text in {"config_yaml": "seed: 0\n", **files}.items():
        (path / name.replace("_", ".")).write_text(text)
    for file in path.iterdir():
        os.utime(file, (age, age))
    return path


def says(command):
    return json.dumps(seal({"command": command}))


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A search, a newer one, a retraining newer still, and folders that are none."""
    monkeypatch.chdir(tmp_path)
    genotype = json.dumps(Genotype.published(NAME).to_dict())
    folder(tmp_path / "runs/old", 1, genotype_json=genotype)
    folder(tmp_path / "runs/new", 2, env_json=says("search"), genotype_json=genotype)
    folder(tmp_path / "runs/again", 3, env_json=says("retrain"), genotype_json=genotype)
    write(tmp_path / "runs/again" / BEST)
    os.utime(tmp_path / "runs/again" / BEST, (3, 3))
    folder(tmp_path / "runs/begun", 4, env_json=says("search"))
    (tmp_path / "runs/nothing").mkdir()
    return tmp_path / "runs"


def test_the_newest_of_its_kind(runs):
    assert newest("runs/new", last_written, "a run", ValueError) is None
    assert newest("runs/latest", last_written, "a run", ValueError).name == "begun"
    with pytest.raises(ValueError, match="none/latest: expected a run in none, got none"):
        newest("none/latest", last_written, "a run", ValueError)
    # A page that is made again makes a run no newer.
    (runs / "old/report.html").write_text("")
    assert newest("runs/latest", last_written, "a run", ValueError).name == "begun"
    assert [command_of(runs / name) for name in ("old", "new", "again")] == [
        None, "search", "retrain"
    ]  # fmt: skip
    (runs / "latest").mkdir()  # a folder of that name is itself
    assert newest("runs/latest", last_written, "a run", ValueError) is None


def test_a_retraining_takes_the_newest_search_and_keeps_its_name(runs, capsys):
    assert named_run("runs/latest") == "runs/new"
    assert find_genotype("runs/latest").hash == Genotype.published(NAME).hash
    config = retrain.parse(["runs/latest", "--preset", "smoke"]).config
    assert with_genotype(config, None)[0].genotype == "runs/new"
    assert retrain.main(["runs/latest", "--preset", "smoke", "--print-config"]) == 0
    assert "genotype: runs/new\n" in capsys.readouterr().out
    with pytest.raises(GenotypeError, match="expected the folder of a finished search in none"):
        find_genotype("none/latest")


def test_a_retraining_takes_the_settings_of_the_newest_search(runs, capsys):
    (runs / "new/config.yaml").write_text("attack: {epsilon: 3/255}\n")
    assert retrain.main(["runs/latest", "--preset", "smoke", "--print-config"]) == 0
    assert "epsilon: 3/255" in capsys.readouterr().out


def test_export_and_evaluate_take_the_newest_model(runs, capsys):
    assert evaluate.main(["runs/latest", "--epsilon", "0.1", "--limit", "2", "--dry-run"]) == 1
    assert "expected images of 2 channels" in capsys.readouterr().err  # of the model there
    assert export.main(["runs/latest", "--format", "torch"]) == 0
    assert "exported: runs/again/" in capsys.readouterr().out


def test_a_report_is_of_the_run_that_wrote_last(runs, capsys):
    assert report.main(["runs/latest"]) == 0
    assert capsys.readouterr().out.endswith(
        "report: runs/begun/report.html\n"
        "next: python -m webbrowser runs/begun/report.html   (shows it)\n"
    )
    assert report.write_report("runs/latest").samefile(runs / "begun/report.html")
    assert report.main(["none/latest"]) == 1
    assert "latest: expected a run folder in none, got none" in capsys.readouterr().err


def test_resume_takes_the_newest_run_of_its_command(runs, capsys):
    assert retrain.main(["--resume", "runs/latest", "--print-config"]) == 0
    capsys.readouterr()
    (runs / "begun/config.yaml").write_text("nonsense: 1\n")
    assert retrain.main(["--resume", "runs/latest", "--print-config"]) == 0
    capsys.readouterr()
    assert evaluate.main(["--resume", "runs/latest"]) == 1
    assert "latest: expected a folder of evaluate in runs, got none" in capsys.readouterr().err
