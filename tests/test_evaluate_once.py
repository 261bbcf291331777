"""``fastbandit.evaluate(model, images, labels)``: from a model to a number."""

import copy
import inspect
import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from _centroids import Centroids, fitted
from _digits import images
from _processes import run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastbandit
from fastbandit._intervals import wilson
from fastbandit.config import ConfigError
from fastbandit.data import DataError, ImageSet, load
from fastbandit.evaluate import EvaluateConfig, Robustness, RobustnessWarning, evaluate_model, main
from fastbandit.runs.progress import Progress

QUICK = {
    "epsilon": "0.1",
    "preset": None,
    "attacks": "fgsm,pgd-3",
    "checks": {"images": 24, "steps": 10, "queries": 10},
    "threads": 1,
    "progress": False,
}
N = 60


def quick(model=None, *arguments, **changes) -> Robustness:
    arguments = arguments or (() if "source" in changes else images(N))
    return fastbandit.evaluate(model or fitted(), *arguments, **{**QUICK, **changes})


@pytest.fixture(scope="module")
def found() -> Robustness:
    return quick()


def test_figures_are_those_of_the_evaluation_of_the_command(found, tmp_path):
    config = EvaluateConfig(
        limit=N, epsilon="0.1", attacks="fgsm,pgd-3", threads=1,
        checks=fastbandit.evaluate.ChecksConfig(images=24, steps=10, queries=10),
    )  # fmt: skip
    _, result = evaluate_model(fitted(), config, tmp_path / "e")
    (row,) = result["results"]
    assert found.clean == row["clean"]["accuracy"]
    assert found.robust == row["worst_case"]["accuracy"] < found.clean
    assert found.robust_interval == wilson(round(found.robust * N), N)
    assert found.clean_interval == wilson(round(found.clean * N), N)
    assert [a["fooled"] for a in found.attacks] == [a["fooled"] for a in row["attacks"]]
    assert (found.n, found.epsilon, found.norm) == (N, "0.1", "linf")
    assert found.verdict == "ok"
    assert found.reasons == []
    assert found.folder is None


def test_the_worst_case_is_image_by_image(found):
    x, y = images(N)
    right = fitted()(x).argmax(1) == y
    assert torch.equal(found.images["clean_correct"], right)
    assert found.standing.sum() == round(found.robust * N)
    assert not (found.standing & ~right).any()
    assert found.attack_names == ["FGSM", "PGD-3"]


def test_a_table_in_a_terminal_and_in_a_notebook(found):
    lines = repr(found).splitlines()
    assert lines[0] == f"robustness: L-infinity, epsilon 0.1, n = {N} images"
    assert str(found) == repr(found)
    robust = next(line for line in lines if line.lstrip().startswith("robust "))
    assert f"{100 * found.robust:.2f} %" in robust
    # A row of what several attacks leave together says so.
    assert any(line.startswith("  after PGD-3") for line in lines)
    assert "verdict: ok (7 checks passed)" in lines
    page = found._repr_html_()
    assert page.count("<tr>") == 5
    assert f"{100 * found.robust:.2f} %" in page
    odd = Robustness(
        {**found.result, "data": {**found.result["data"], "name": "<b>"}}, found.images, []
    )
    assert "<b>)" not in odd._repr_html_()
    alone = quick(attack_all=True)
    assert "after" not in repr(alone)
    assert alone.robust == found.robust


@pytest.mark.parametrize(
    "given",
    [
        lambda x, y: {"source": TensorDataset(x, y)},
        lambda x, y: {"source": DataLoader(TensorDataset(x, y), batch_size=7)},
        # A data set is evaluated in one order, whatever its loader does.
        lambda x, y: {
            "source": DataLoader(TensorDataset(x, y), batch_size=7, shuffle=True, drop_last=True)
        },
        lambda x, y: {"source": ImageSet((x * 255).round().to(torch.uint8), y)},
        lambda x, y: {"source": "digits", "limit": N},
        lambda x, y: {"source": load("digits"), "limit": N},
        lambda x, y: {"images": x.numpy(), "labels": y.tolist()},
        lambda x, y: {"images": (x * 255).round().to(torch.uint8), "labels": y},
        lambda x, y: {"images": list(x), "labels": y.numpy()},
        lambda x, y: {"images": tuple(x.numpy()), "labels": y.tolist()},
        lambda x, y: {"source": {"image": list(x), "label": y.tolist()}},
        lambda x, y: {"images": TensorDataset(x, y)},
    ],
)
def test_images_of_any_kind(found, given):
    x, y = images(N)
    same = fastbandit.evaluate(fitted(), **{**QUICK, **given(x, y)})
    assert torch.equal(same.images["broken_by"], found.images["broken_by"])
    assert same.clean == found.clean


def test_nothing_is_written_unless_asked(tmp_path, monkeypatch, found):
    monkeypatch.chdir(tmp_path)
    quick()
    assert list(tmp_path.iterdir()) == []
    kept = quick(out=tmp_path / "kept")
    assert kept.folder == tmp_path / "kept"
    assert json.loads((kept.folder / "evaluation.json").read_text())["status"] == "finished"
    assert torch.equal(kept.images["broken_by"], found.images["broken_by"])
    # The same call finds it finished.
    assert quick(out=tmp_path / "kept").result == kept.result


def test_progress_goes_to_standard_error_unless_told_not_to(capsys):
    quick(progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert f"evaluation begins: {N} images\n" in shown.err
    quick(progress=Progress.silent())
    quick(progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_verdict_that_is_not_ok_is_a_warning():
    model = nn.Sequential(fitted(), nn.Softmax(1))
    with pytest.warns(RobustnessWarning, match="not to be trusted: logits, not probabilities"):
        found = quick(model)
    assert found.verdict == "suspicious"
    assert "verdict: suspicious" in repr(found)
    assert "sum to 1" in repr(found)
    weaker = copy.deepcopy(quick().result)
    weaker["cross_check"] = {
        "n": 9, "fooled_by_both": 0, "fooled_by_ours_alone": 0, "fooled_by_reference_alone": 5,
        "verdict": "weaker than the reference by more than its interval",
    }  # fmt: skip
    assert Robustness(weaker, found.images, []).verdict == "suspicious"


def test_a_sound_model_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quick()


def test_results_of_two_models_are_told_apart(found):
    assert found.same_model(quick(seed=1))
    scaled = quick(Centroids(2.0).requires_grad_(False))
    assert not found.same_model(scaled)
    # The same weights and class, another constant.
    other = fitted()
    other.factor = 2.0
    twice = quick(other)
    assert twice.digest == found.digest
    assert not found.same_model(twice)
    assert len(found.digest) == 16


def test_standard_asks_the_reference_where_it_is_installed(monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack")
    original = pyautoattack.AutoAttack._set_version

    def short(self, version="standard"):
        original(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 3
        self.square.n_queries = 5

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", short)
    small = {"apgd": {"steps": 3}, "square": {"queries": 5}, "limit": 20, "preset": "standard"}
    settings = {k: v for k, v in QUICK.items() if k != "attacks"} | small
    found = fastbandit.evaluate(fitted(), *images(20), **settings)
    assert found.cross_check["n"] == round(20 * found.clean)
    assert "reference AutoAttack on" in repr(found)
    few = Centroids(classes=3)
    without = fastbandit.evaluate(few, images(20)[0], torch.arange(20) % 3, **settings)
    assert without.cross_check is None
    assert "AutoAttack left out: its loss needs 4 classes, the model has 3\n" in repr(without)
    at_zero = fastbandit.evaluate(fitted(), *images(20), **{**settings, "epsilon": 0})
    assert "AutoAttack left out: there is no attack at radius 0\n" in repr(at_zero)
    assert "left out" not in repr(found)
    monkeypatch.setattr("fastbandit.evaluate.config.has_reference", lambda: False)
    without = fastbandit.evaluate(fitted(), *images(20), **settings)
    assert without.cross_check is None
    line = "left out: the package pyautoattack is not installed (extra eval)\n"
    assert f"reference AutoAttack {line}" in repr(without)
    # Only where it was asked for.
    settings = {**settings, "cross_check": "none"}
    assert "left out" not in repr(fastbandit.evaluate(fitted(), *images(20), **settings))


def test_the_command_says_that_the_reference_is_left_out(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("fastbandit.evaluate.config.has_reference", lambda: False)
    arguments = ["_centroids:fitted", "--epsilon", "0.1", "--attacks", "fgsm", "--limit", "20",
                 "--checks.images", "0", "--out", str(tmp_path / "e")]  # fmt: skip
    assert main([*arguments, "--cross-check", "auto"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("cross-check  left out: the package pyautoattack is not installed") == 1


def test_how_many_checks_passed_and_how_many_were_not_made(found):
    assert "verdict: ok (7 checks passed)\n" in repr(found)
    bare = quick(attacks="fgsm", checks={"images": 0})
    assert "verdict: ok (1 check passed, 7 not made: no image was classified correctly" in (
        repr(bare)
    )


def test_images_of_another_size_are_brought_to_one():
    pytest.importorskip("PIL")
    x, y = images(20)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    found = quick(None, large, y, image_size=8)
    assert found.clean > 0.6
    mixed = [(one, label) for one, label in zip([*large[:10], *x[10:]], y, strict=True)]
    assert quick(source=mixed, image_size=8, limit=20).clean > 0.6
    with pytest.raises(DataError, match="image_size=N and image_color='rgb' make all alike"):
        quick(source=mixed)


def test_other_settings_by_name():
    found = quick(norm="l2", epsilon=0.5, epsilons="0,0.25", seed=3, limit=20)
    assert found.norm == "l2"
    assert [radius for radius, _ in found.sweep] == ["0.0", "0.25", "0.5"]
    assert found.sweep[0][1] == found.clean
    assert found.n == 20
    assert "seed 3" in found.provenance


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        (lambda x, y: (x,), {}, ConfigError, "labels: expected integers"),
        (lambda x, y: (), {}, ConfigError, r"images: expected images and labels, or source="),
        (lambda x, y: (None, y), {}, ConfigError, "labels: expected beside images"),
        (lambda x, y: (x, y), {"source": "digits"}, ConfigError, "in place of images and labels"),
        (lambda x, y: (x * 255, y), {}, DataError, r"expected values in \[0, 1\] \(float\)"),
        (lambda x, y: (x - 0.5, y), {}, DataError, "normalised beforehand, that is a layer"),
        (lambda x, y: (x[:-1], y), {}, DataError, "as many labels as images, got 7 images and 8"),
        (lambda x, y: (x, y + 10), {}, ConfigError, "expected labels from 0 to below 10"),
        (lambda x, y: (x, "abc"), {}, DataError, "integers or text, got str"),
        (lambda x, y: (x, 3), {}, DataError, "integers or text, got int"),
        (lambda x, y: (x, ["1", 2] * 4), {}, DataError, "all integers or all text, got both"),
        (lambda x, y: (x, [[1], [2, 3]]), {}, DataError, r"not labels \[N\]"),
        (lambda x, y: (x, y > 3), {}, DataError, "expected integer labels.*got bool"),
        (lambda x, y: (None, y), {"source": "digits"}, ConfigError, "beside images, got no images"),
        (lambda x, y: ("digits", y), {}, ConfigError, "got the path 'digits', which is passed al"),
        (lambda x, y: (x, y), {"data": "digits"}, ConfigError, "data: expected in place of images"),
        (lambda x, y: (), {"source": "a", "data": "digits"}, ConfigError, "data: expected"),
        (lambda x, y: (x, list("abcdefgh")), {}, DataError, "integer labels, as the model"),
        (lambda x, y: (x, y), {"preset": "standart"}, ConfigError, "did you mean standard"),
        (lambda x, y: (x, y), {"atacks": "fgsm"}, ConfigError, "did you mean attacks"),
        (lambda x, y: (x, y), {"attacks": "fgms"}, ConfigError, "did you mean fgsm"),
        (lambda x, y: (x, y), {"norm": "L2"}, ConfigError, r"got 'L2'; did you mean l2\?"),
        (lambda x, y: (x[:0], y[:0]), {}, DataError, r"images: expected at least one, got \[0, 1"),
        (lambda x, y: (x, y), {"epsilon": 8}, ValueError, "did you mean 8/255"),
        (lambda x, y: (x, y), {"epsilon": "auto"}, ConfigError, "expected a radius such as 8/255"),
        (lambda x, y: (x, y), {"weights": "w.bin", "model": "m"}, ConfigError, "weights: expected"),
    ],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_said(arguments, settings, error, message):
    x, y = images(8)
    model = settings.pop("model", None) or fitted()
    with pytest.raises(error, match=message):
        fastbandit.evaluate(model, *arguments(x, y), **{**QUICK, **settings})


def test_images_that_are_not_of_8_bits_are_said_to_be_rounded(tmp_path):
    x, y = images(8)
    with pytest.warns(UserWarning, match="rounded to 1/255, which moves pixels by up to 0.00"):
        quick(None, x * 0.999, y, attacks="fgsm")
    moved = x * 0.999
    pairs = list(zip(moved, y.tolist(), strict=True))
    numpy = {"x": moved.numpy().astype(np.float64), "y": y.numpy()}
    for given in (
        (moved.numpy(), y),
        (moved.double(), y),
        ((moved, y),),
        (pairs,),
        (DataLoader(pairs, batch_size=3),),
        (numpy,),
    ):
        with pytest.warns(UserWarning, match="images: not of 8 bits: images are rounded") as said:
            quick(None, *given, attacks="fgsm")
        assert len(said) == 1
        assert said[0].filename == __file__
    with pytest.warns(UserWarning, match="training data: not of 8 bits"):
        load((moved, y), classes=10)
    np.savez(tmp_path / "x.npz", images=numpy["x"][:, 0], labels=numpy["y"] % 2)
    with pytest.warns(UserWarning, match="x.npz: images: not of 8 bits"):
        load(tmp_path / "x.npz")
    # Those of 8 bits are as they were, in any type that holds them.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load((x, y), classes=10)
        load((x.double(), y), classes=10)
        load((x.half(), y), classes=10)


@pytest.mark.parametrize(
    "labels",
    [
        torch.Tensor.int,
        lambda y: y.to(torch.uint8).numpy(),
        torch.Tensor.tolist,
        list,
        lambda y: np.array(y.tolist(), dtype=object),
        lambda y: y[:, None],
    ],
)
def test_labels_of_any_integer_type(labels):
    x, y = images(20)
    assert torch.equal(quick(None, x, labels(y), attacks="fgsm").images["label"], y)
    assert torch.equal(load((x, labels(y)), classes=10).train.labels, y)


def test_a_path_in_place_of_images():
    by_path = quick(None, "digits", limit=20, attacks="fgsm")
    assert by_path.result["data"]["name"] == "digits"
    assert by_path.robust == quick(None, source="digits", limit=20, attacks="fgsm").robust


ORDERS = [
    "import fastbandit; e = fastbandit.evaluate",
    "import fastbandit.evaluate; e = fastbandit.evaluate",
    "from fastbandit import evaluate as e",
    "from fastbandit.evaluate import evaluate_model; import fastbandit; e = fastbandit.evaluate",
    "import fastbandit.evaluate.config; from fastbandit import evaluate as e",
    "import fastbandit.evaluate.once; import fastbandit; e = fastbandit.evaluate",
]


@pytest.mark.parametrize("order", ORDERS)
def test_the_package_of_the_command_is_the_function_in_any_order_of_imports(order):
    program = (
        f"{order}\n"
        "try: e(None)\n"
        "except ValueError as error: print(error)\n"
        "print(e.EvaluateConfig.__name__, e.__name__)\n"
    )
    done = run("-c", program)
    assert done.stdout.startswith("images: expected images and labels"), done.stderr
    assert done.stdout.endswith("EvaluateConfig fastbandit.evaluate\n")


def test_the_name_loads_no_torch_before_it_is_called():
    program = (
        "import sys, fastbandit\n"
        "assert callable(fastbandit.evaluate) and callable(fastbandit.evaluate)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert list(inspect.signature(fastbandit.evaluate).parameters)[:3] == [
        "model", "images", "labels"
    ]  # fmt: skip
    assert sys.modules["fastbandit.evaluate"] is fastbandit.evaluate
