"""A model of one's own on the command line: its code, and its weights."""

import json
import threading
from pathlib import Path

import _centroids
import numpy as np
import pytest
import torch
from _centroids import Centroids, fitted
from _digits import images
from safetensors.torch import save_file
from torch import nn

import fastbandit
from fastbandit.config import ConfigError
from fastbandit.evaluate import __main__ as evaluate
from fastbandit.evaluate import evaluate_model, main
from fastbandit.model_code import ModelCode, load_weights, names_code, read_weights
from fastbandit.models import load_model
from fastbandit.runs.tensors import CheckpointError

QUICK = [
    "--limit", "40", "--epsilon", "0.1", "--attacks", "fgsm", "--checks.images", "0",
    "--threads", "1",
]  # fmt: skip

EMPTY = Centroids().state_dict()


@pytest.fixture
def weights(tmp_path) -> Path:
    torch.save(fitted().state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_code_is_told_from_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert names_code("my_package.my_module:make_model")
    assert names_code("m:Model.small")
    for path in ("runs/x", "model.safetensors", "C:\\models\\a", "m:", ":f", "a b:c", "1:2"):
        assert not names_code(path)
    (tmp_path / "a:b").mkdir()
    assert not names_code("a:b")


def test_a_model_of_ones_own_on_the_command_line(weights, capsys, monkeypatch):
    monkeypatch.chdir(weights.parent)
    arguments = ["_centroids:empty", "--weights", str(weights), *QUICK]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    folder = weights.parent / "evaluation-linf-0.1"
    assert shown.out.strip().splitlines()[-1] == f"evaluation: {folder / 'evaluation.json'}"
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["model"]["code"] == "_centroids:empty"
    assert result["model"]["weights"] == str(weights)
    assert result["results"][0]["clean"]["correct"] > 30
    # The same command finds it finished, and --resume goes on with the same code and weights.
    assert main(arguments) == 0
    assert "all is done" in capsys.readouterr().err
    (folder / "evaluation.json").unlink()
    assert main(["--resume", str(folder)]) == 0
    assert main(["--resume", str(folder), "_centroids:empty", "--weights", str(weights)]) == 0
    capsys.readouterr()
    assert main(["--resume", str(folder), "_centroids:fitted"]) == 1
    assert "expected the model _centroids:empty, got _centroids:fitted" in capsys.readouterr().err
    # Other weights in the same file are another model.
    torch.save(Centroids().state_dict(), weights)
    assert main(arguments) == 1
    assert "holds a run of another configuration (model.digest" in capsys.readouterr().err


def test_code_in_the_current_folder(tmp_path, monkeypatch, weights):
    (tmp_path / "my_net_of_a_test.py").write_text(
        "from _centroids import Centroids\n"
        "class Net(Centroids):\n"
        "    pass\n"
        "class Outer:\n"
        "    inner = Net\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p not in ("", ".")])
    for code in ("my_net_of_a_test:Net", "my_net_of_a_test:Outer.inner"):
        model = ModelCode(code, weights).load()
        assert torch.equal(model.linear.weight, fitted().linear.weight)
    assert isinstance(ModelCode("_centroids:ready").load(), Centroids)


def test_from_python_too(weights):
    settings = {
        "source": "digits", "limit": 30, "epsilon": "0.1", "preset": None, "attacks": "fgsm",
        "progress": False, "checks": {"images": 0},
    }  # fmt: skip
    model = Centroids()
    before = model.linear.weight.clone()
    found = [
        fastbandit.evaluate("_centroids:empty", weights=weights, **settings),
        fastbandit.evaluate("_centroids:fitted", **settings),
        fastbandit.evaluate(model, weights=weights, **settings),
    ]
    assert {one.digest for one in found} == {found[0].digest}
    assert found[0].clean > 0.7
    assert torch.equal(model.linear.weight, before)


def test_a_model_that_a_module_holds_stays_as_it_was(weights):
    held = _centroids.held.train()
    before = held.linear.weight.clone()
    found = fastbandit.evaluate(
        "_centroids:held", source="digits", weights=weights, limit=30, epsilon="0.1", preset=None,
        attacks="fgsm", progress=False, checks={"images": 0},
    )  # fmt: skip
    assert found.clean > 0.7
    assert held.training
    assert torch.equal(held.linear.weight, before)


def test_weights_for_a_model_that_cannot_be_copied(weights):
    model = Centroids()
    model.lock = threading.Lock()
    with pytest.raises(ConfigError, match="expected a model that can be copied, got Centroids"):
        fastbandit.evaluate(model, source="digits", weights=weights, epsilon=0.1)
    _centroids.held.lock = model.lock
    try:
        with pytest.raises(ConfigError, match=r"copied.*load them into it beforehand"):
            ModelCode("_centroids:held", weights).load()
    finally:
        del _centroids.held.lock


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("no_such_module_here:f", "no_such_module_here: no such module, looked for in"),
        ("_centroids:fited", "_centroids has no 'fited'; did you mean fitted?"),
        ("_centroids:needs", r"expected to be called without arguments \(missing a required"),
        ("_centroids:no_model", "expected it to return a torch.nn.Module, got a str"),
        ("_centroids:number", "expected a torch.nn.Module or a function that returns one, got a i"),
        ("_centroids", "expected code such as my_package.my_module:make_model"),
    ],
)  # fmt: skip
def test_code_that_makes_no_model(code, message):
    with pytest.raises(ConfigError, match=message):
        ModelCode(code).load()


def test_code_that_fails_on_import(tmp_path, monkeypatch):
    (tmp_path / "broken_of_a_test.py").write_text("import module_that_is_not_there\n")
    (tmp_path / "syntax_of_a_test.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="its import fails: No module named 'module_that"):
        ModelCode("broken_of_a_test:f").load()
    with pytest.raises(ConfigError, match="its import fails: SyntaxError"):
        ModelCode("syntax_of_a_test:f").load()


@pytest.mark.parametrize(
    "write",
    [
        lambda state, path: save_file(state, path.with_suffix(".safetensors")),
        lambda state, path: torch.save(state, path),
        lambda state, path: torch.save({"state_dict": state, "epoch": 3}, path),
        lambda state, path: torch.save({"model": state, "optimizer": {"lr": 0.1}}, path),
        lambda state, path: torch.save({f"module.{k}": v for k, v in state.items()}, path),
        lambda state, path: torch.save({f"_orig_mod.module.{k}": state[k] for k in state}, path),
        lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    ],
)  # fmt: skip
def test_weights_as_people_save_them(write, tmp_path):
    write(fitted().state_dict(), tmp_path / "w.pt")
    (path,) = tmp_path.iterdir()
    model = Centroids()
    load_weights(model, path)
    assert torch.equal(model.linear.weight, fitted().linear.weight)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: torch.save(fitted(), p), r"pickled objects \(_centroids.Centroids\), which are"),
        (lambda p: torch.jit.save(torch.jit.script(nn.Linear(2, 2)), p), "a TorchScript program"),
        (lambda p: p.write_bytes(b"\x00" * 100), "cannot read: damaged, or not of torch.save"),
        (
            lambda p: p.write_bytes(b"hello"),
            "read by torch: damaged, or not of torch.save",
        ),
        (lambda p: p.write_bytes(b""), "read by torch: damaged, or not of torch.save"),
        (lambda p: torch.save([1, 2], p), "tensors by name, got a list"),
        (lambda p: torch.save({"epoch": 1, "best": 2}, p), "got a mapping of epoch, best"),
        (
            lambda p: torch.save({"model": EMPTY, "net": EMPTY, "epoch": 1}, p),
            r"expected one state dict, got 'model', 'net' in a mapping; save.*\['model'\], NEW",
        ),
        (
            lambda p: torch.save({"generator": EMPTY, "critic": EMPTY}, p),
            "expected one state dict, got 'generator', 'critic' in a mapping",
        ),
        (lambda p: torch.save({"student": EMPTY, "epoch": 1}, p), "got 'student' in a mapping"),
        (lambda p: p.mkdir(), "expected a file of weights, got a folder"),
        (lambda p: None, "expected a file of weights, got no such file"),
        (lambda p: p.with_suffix(".safetensors").write_bytes(b"x"), "damaged or not a safetensors"),
        (lambda p: p.with_suffix(".h5").write_bytes(b"x"), "weights: expected a file of .pt, .pth"),
        (
            lambda p: torch.save({"linear.weight": torch.zeros(10, 64), "b": torch.zeros(1)}, p),
            r"not of this model \(Centroids\): lacks linear.bias; also has b",
        ),
        (
            lambda p: torch.save(Centroids(classes=7).state_dict(), p),
            r"where linear.weight is \[7, 64\], expected \[10, 64\]",
        ),
    ],
)
def test_what_are_no_weights_of_it(write, message, tmp_path):
    path = tmp_path / "w.pt"
    write(path)
    found = next(iter(tmp_path.iterdir()), path)
    with pytest.raises(ConfigError, match=message):
        load_weights(Centroids(), found)


def test_nothing_in_the_weights_is_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "was-run",))

    torch.save({"a": torch.zeros(1), "b": Bad()}, tmp_path / "w.pt")
    with pytest.raises(ConfigError, match="pickled objects"):
        read_weights(tmp_path / "w.pt")
    assert not (tmp_path / "was-run").exists()


def test_a_sound_file_of_others_is_not_called_damaged(weights, tmp_path, capsys):
    with pytest.raises(CheckpointError, match=r"a file of torch.save, and not of fastbandit"):
        load_model(weights)
    save_file(fitted().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="not one that fastbandit wrote; a model of your own"):
        load_model(tmp_path / "w.safetensors")
    assert main([str(weights), *QUICK]) == 1
    error = capsys.readouterr().err
    assert "damaged" not in error
    assert "my_package.my_module:make_model --weights FILE" in error
    # As torch wrote them before it wrote zip files.
    old = tmp_path / "old.pt"
    torch.save(fitted().state_dict(), old, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"a file of torch.save, and not of fastbandit"):
        load_model(old)
    assert set(read_weights(old)) == {"linear.weight", "linear.bias"}
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "program.pt2")
    with pytest.raises(CheckpointError, match=r"a torch.export program, and not of fastbandit"):
        load_model(tmp_path / "program.pt2")


def test_what_is_no_model_is_said_to_be_missing(capsys):
    assert main(["my_models", *QUICK]) == 1
    error = capsys.readouterr().err
    assert "my_models: no such file or folder; expected a model file or the folder of a" in error
    assert "or code such as my_package.my_module:make_model" in error


def test_images_of_one_part_are_taken_with_the_split_that_the_message_names(tmp_path, capsys):
    x, y = images(30)
    np.savez(tmp_path / "mine.npz", x=x.numpy(), y=y.numpy())
    arguments = ["_centroids:fitted", *QUICK, "--data", str(tmp_path / "mine.npz")]
    out = ["--out", str(tmp_path / "out")]
    assert main([*arguments, *out]) == 1
    assert "only one part, which counts as training images; --split train" in (
        capsys.readouterr().err
    )
    assert main([*arguments, *out, "--split", "train"]) == 0


def test_weights_beside_a_file_are_refused(weights, capsys):
    assert main([str(weights), "--weights", str(weights), *QUICK]) == 1
    assert "expected beside code of your own" in capsys.readouterr().err
    assert main(["--epsilon", "0.1"]) == 1
    assert "or my_package.my_module:make_model" in capsys.readouterr().err


def test_what_came_from_python_goes_on_from_python(tmp_path, capsys):
    """The command says so, and how; images and model of a program are in no folder."""
    settings = {"epsilon": 0.1, "preset": None, "attacks": "fgsm", "checks": {"images": 0},
                "progress": False, "out": tmp_path / "e"}  # fmt: skip
    x = torch.rand(4, 1, 8, 8).mul(255).round().div(255)
    fastbandit.evaluate("_centroids:fitted", x, torch.arange(4), **settings)
    assert main(["--resume", str(tmp_path / "e")]) == 1
    error = capsys.readouterr().err
    assert "e: its images came from Python; call fastbandit.evaluate (or" in error
    fastbandit.evaluate(fitted(), source="digits", limit=4, **settings | {"out": tmp_path / "f"})
    assert main(["--resume", str(tmp_path / "f")]) == 1
    error = capsys.readouterr().err
    assert "f: its model came from Python; call fastbandit.evaluate (or" in error
    assert f"out='{tmp_path / 'f'}'" in error


def test_the_same_command_goes_on_without_a_folder_too(tmp_path, monkeypatch, capsys):
    """Of code without a file of weights nothing is beside that the folder could be in."""
    monkeypatch.chdir(tmp_path)
    arguments = ["_centroids:fitted", *QUICK, "--json"]
    assert main(arguments) == 0
    (folder,) = Path("runs").iterdir()
    first = json.loads(capsys.readouterr().out)
    assert first["evaluation"] == str(folder)
    (folder / "evaluation.json").unlink()  # as if it had been stopped before its end
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "evaluation goes on" in shown.err
    again = json.loads(shown.out)["results"][0]
    assert again["worst_case"] == first["results"][0]["worst_case"]
    assert list(Path("runs").iterdir()) == [folder]
    # A finished one stays, and so does an unfinished one of a model that answers otherwise.
    assert main(arguments) == 0
    (second,) = set(Path("runs").iterdir()) - {folder}
    (second / "evaluation.json").unlink()
    model = fitted()
    model.factor = 3.0
    config = evaluate.parse([*arguments, "--device", "cpu"]).config
    found, _ = evaluate_model(model, config)
    (other,) = set(Path("runs").iterdir()) - {folder, second}
    assert found.name == other.name
    (found / "evaluation.json").unlink()
    model.factor = 5.0
    assert evaluate_model(model, config)[0] not in (folder, second, other)
