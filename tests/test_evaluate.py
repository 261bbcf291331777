"""The evaluation: its table and files, resuming, several processes, what it finds suspicious."""

import copy
import json
import signal
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from _digits import _train, images, model_file, network
from _processes import run, run_pair
from torch import nn
from torch.nn.utils import weight_norm

from fastbandit._intervals import sign_test, wilson
from fastbandit.attacks import pgd
from fastbandit.attacks._pgd import PGDSettings
from fastbandit.config import ConfigError, merge, to_plain
from fastbandit.data import load
from fastbandit.evaluate import (
    PRESETS,
    ChecksConfig,
    EvaluateConfig,
    dry_run,
    evaluate_model,
    main,
)
from fastbandit.evaluate import __main__ as command
from fastbandit.evaluate import grid as grids
from fastbandit.evaluate import run as running
from fastbandit.evaluate import subject as subjects
from fastbandit.evaluate.plans import same_logits
from fastbandit.evaluate.sanity import Evidence, judge
from fastbandit.nn.frozen import freeze
from fastbandit.report import wilson as exported
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.tensors import CheckpointError, RunError, load_tensors

TINY = {
    "limit": 90,
    "epsilon": "0.15",
    "attacks": "fgsm,pgd-5,apgd-ce,square",
    "batch_size": 32,
    "threads": 1,
    "apgd": {"steps": 8},
    "square": {"queries": 15},
    "checks": {"images": 24, "steps": 10, "queries": 15},
}


def configure(**changes) -> EvaluateConfig:
    return merge(merge(EvaluateConfig(), TINY, "tiny"), changes, "test")


def settled(value):
    """A result without what differs from run to run."""
    if isinstance(value, dict):
        return {
            k: settled(v)
            for k, v in value.items()
            if k not in ("seconds", "seconds_total", "peak_memory_mb", "processes", "evaluation")
        }
    return [settled(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return model_file(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    """A finished evaluation with everything in it."""
    out = tmp_path_factory.mktemp("evaluation") / "whole"
    config = configure(
        epsilons="0,0.05,0.15", transfer_from=str(model), transfer_attacks="mifgsm", examples=5
    )
    return config, *evaluate_model(model, config, out)


def test_result_says_what_the_page_reads(done, model):
    _, path, result = done
    assert RunFolder(path, running.FILES).read_json("evaluation.json") == result
    assert (result["schema_version"], result["command"], result["status"]) == (
        1, "evaluate", "finished",
    )  # fmt: skip
    assert result["model"]["file"] == str(model)
    assert len(result["model"]["genotype_hash"]) == 64
    assert result["model"]["architecture"]["cells"] == 2
    assert result["model"]["training"]["threat"]["epsilon"] == "0.15"
    assert (result["data"]["name"], result["data"]["split"], result["data"]["n"]) == (
        "digits", "test", 90,
    )  # fmt: skip
    assert [r["threat"]["epsilon"] for r in result["results"]] == ["0.15", "0.0", "0.05"]
    main_result = result["results"][0]
    assert [a["name"] for a in main_result["attacks"]] == ["FGSM", "PGD-5", "APGD-CE", "Square"]
    clean = main_result["clean"]
    assert 0 < clean["correct"] < 90
    assert clean["interval"] == list(wilson(clean["correct"], 90))
    left = clean["correct"]
    for attack in main_result["attacks"]:
        # Only those who still stand are attacked, and the table counts down.
        assert attack["attacked"] == left
        left -= attack["fooled"]
        assert attack["correct"] == left
        assert attack["accuracy"] == left / 90
        assert attack["unconfirmed"] == 0
    assert main_result["worst_case"]["correct"] == left < clean["correct"]
    for word in (
        "n 90", "seed 0", "PGD restarts 1", "L-infinity", "epsilon 0.15", "float32",
        "batch norm eval", "checkpoint rule", "APGD-CE 8 steps", "Square 15 queries",
    ):  # fmt: skip
        assert word in main_result["provenance"]
    zero, small = result["results"][1:]
    assert zero["attacks"] == []
    assert zero["worst_case"] == zero["clean"]
    assert small["worst_case"]["correct"] > main_result["worst_case"]["correct"]
    assert set(result["robustbench"]) >= {
        "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue",
        "architecture", "eps", "clean_acc", "reported", "autoattack_acc",
    }  # fmt: skip
    assert result["robustbench"]["autoattack_acc"] is None
    assert result["robustbench"]["eps"] == "0.15"
    assert result["cost"]["forward_passes"] > 90


def test_transfer_from_itself_is_the_attack_itself(done):
    _, _, result = done
    (found,) = result["transfer"]
    (attack,) = found["attacks"]
    assert attack["name"] == "MI-FGSM"
    assert attack["correct"] < result["results"][0]["clean"]["correct"]
    checks = {c["name"]: c["verdict"] for c in result["suspicion"]["checks"]}
    assert checks["transfer not above white-box"] == "ok"


def test_tensors_beside_the_result(done):
    _, path, result = done
    images, facts = load_tensors(path / "images.safetensors", "images")
    main_result = result["results"][0]
    right, broken = images["clean_correct"], images["broken_by"]
    assert facts["attacks"] == [a["name"] for a in main_result["attacks"]]
    assert int(right.sum()) == main_result["clean"]["correct"]
    assert int((right & (broken < 0)).sum()) == main_result["worst_case"]["correct"]
    assert not (broken[~right] >= 0).any()
    for number, attack in enumerate(main_result["attacks"]):
        assert int((broken == number).sum()) == attack["fooled"]
    assert torch.equal(images["label"], load("digits").test.labels[:90])
    examples, _ = load_tensors(path / "examples.safetensors", "examples")
    assert torch.equal(examples["id"], (broken >= 0).nonzero()[:5, 0])
    clean = examples["clean"].float() / 255
    assert (examples["adversarial"] - clean).abs().max() <= 0.15 + 1e-6
    assert (examples["adversarial"] != clean).any()
    assert torch.equal(examples["prediction_clean"], examples["label"])
    assert (examples["prediction_adversarial"] != examples["label"]).all()


def test_other_batch_size_same_answer(done, model, tmp_path):
    config, path, result = done
    _, again = evaluate_model(model, merge(config, {"batch_size": 48}, "test"), tmp_path / "a")
    assert settled(again) == settled(result)
    for name in ("images.safetensors", "examples.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (path / name).read_bytes()


def test_attack_all_gives_each_attack_alone(done, model, tmp_path):
    _, _, before = done
    _, result = evaluate_model(
        model, configure(attack_all=True, checks={"images": 0}), tmp_path / "all"
    )
    found, standing = result["results"][0], before["results"][0]
    clean = found["clean"]["correct"]
    assert all(a["attacked"] == clean for a in found["attacks"])
    assert found["worst_case"]["correct"] <= min(a["correct"] for a in found["attacks"])
    # An image's fate under an attack does not depend on who else is attacked.
    assert found["worst_case"] == standing["worst_case"]
    checks = {c["name"]: c["verdict"] for c in result["suspicion"]["checks"]}
    # Two checks need no sample.
    assert checks.pop("successes confirmed") == "ok"
    assert checks.pop("not randomised") == "ok"
    assert set(checks.values()) == {"skipped"}


@pytest.mark.slow
def test_killed_and_resumed_is_the_same(done, model, tmp_path):
    """kill -9 after some checkpoints, in the middle of an attack; then the same command."""
    config, path, result = done
    out = tmp_path / "killed"
    script = (
        "import os, signal, sys\n"
        "from fastbandit.evaluate import evaluate_model, grid\n"
        "from test_evaluate import configure\n"
        "save, count = grid.Evaluation.save, 0\n"
        "def dies(self):\n"
        "    global count\n"
        "    save(self)\n"
        "    count += 1\n"
        "    if count == 6:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "grid.Evaluation.save = dies\n"
        "grid._SECONDS_BETWEEN_CHECKPOINTS, grid._BATCHES = -1.0, 1\n"
        f"config = configure(epsilons='0,0.05,0.15', transfer_from={str(model)!r},\n"
        "                   transfer_attacks='mifgsm', examples=5)\n"
        f"evaluate_model({str(model)!r}, config, {str(out)!r})\n"
    )
    dead = run("-c", script)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert not (out / "evaluation.json").exists()
    with pytest.raises(RunError, match=r"another configuration \(seed"):
        evaluate_model(model, merge(config, {"seed": 3}, "test"), out)
    # What was known is not asked again.
    asked = []
    original = grids.AttackGrid.todo

    def todo(self, plan, candidates):
        found = original(self, plan, candidates)
        asked.append(len(found))
        return found

    grids.AttackGrid.todo = todo
    try:
        _, again = evaluate_model(model, config, out)
    finally:
        grids.AttackGrid.todo = original
    assert asked[0] == 0  # clean accuracy was there
    assert settled(again) == settled(result)
    for name in ("images.safetensors", "examples.safetensors"):
        assert (out / name).read_bytes() == (path / name).read_bytes()


def test_checkpoint_holds_all_that_is_known(done):
    _, path, _ = done
    tensors, metadata = load_tensors(path / "checkpoints" / "latest.safetensors", "checkpoint")
    names = ("clean", "radius0", "radius1", "radius2", "checks", "transfer", "reference")
    bits = {f"{name}.{part}" for name in names for part in ("tried", "yes", "denied")}
    assert set(tensors) == bits | {"examples", "example_ids", "fingerprint"}
    assert set(metadata["state"]["work"]) == set(names)


def test_finished_is_not_overwritten(done, model):
    config, path, result = done
    before = (path / "evaluation.json").read_bytes()
    assert evaluate_model(model, config, path) == (path, json.loads(json.dumps(result)))
    assert (path / "evaluation.json").read_bytes() == before


def test_damaged_checkpoint_is_named(model, tmp_path):
    out = tmp_path / "damaged"
    config = configure(checks={"images": 0})
    evaluate_model(model, config, out)
    (out / "evaluation.json").unlink()
    latest = out / "checkpoints" / "latest.safetensors"
    data = bytearray(latest.read_bytes())
    data[-1] ^= 1
    latest.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum"):
        evaluate_model(model, config, out)


@pytest.mark.slow
def test_two_processes_give_the_same(done, model, tmp_path):
    config, path, result = done
    file = tmp_path / "config.yaml"
    import yaml

    plain = to_plain(config)
    plain["batch_size"] = 16  # several rounds
    file.write_text(yaml.safe_dump(plain))
    found, other = run_pair(
        "-m", "fastbandit.evaluate", str(model), "--config", str(file), "--device", "cpu",
        "--out", str(tmp_path / "two"), "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert (other.returncode, other.stdout) == (0, ""), other.stderr
    told = json.loads(found.stdout)
    assert told["cost"]["processes"] == 2
    assert settled(told) == settled(result)
    for name in ("images.safetensors", "examples.safetensors"):
        assert (tmp_path / "two" / name).read_bytes() == (path / name).read_bytes()


# --- suspicion ------------------------------------------------------------------------------


class Wrapped(nn.Module):
    def __init__(self, before=None, after=None):
        super().__init__()
        self.inner = network()
        self.before, self.after = before, after

    def forward(self, x):
        logits = self.inner(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


def suspicion(model, tmp_path, **more):
    config = configure(
        limit=200, attacks="fgsm", checks={"images": 96, "steps": 20, "queries": 150}, **more
    )
    _, result = evaluate_model(model, config, tmp_path / "out")
    checks = {c["name"]: c for c in result["suspicion"]["checks"]}
    return result["suspicion"]["verdict"], checks


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_sound_model_is_not_suspicious(norm, tmp_path):
    more = {"norm": "l2", "epsilon": "0.8"} if norm == "l2" else {}
    verdict, checks = suspicion(network(), tmp_path, **more)
    assert verdict == "ok", checks
    assert {c["verdict"] for c in checks.values()} == {"ok", "skipped"}


MASKED = {
    # A softmax so sharp that its gradient is zero in float32.
    "logits scaled": (lambda: Wrapped(after=lambda z: 1e4 * z), "gradients not zero"),
    # No gradient passes a rounding.
    "input quantised": (
        lambda: Wrapped(before=lambda x: torch.round(x * 4) / 4),
        "gradients not zero",
    ),
    "input saturated": (
        lambda: Wrapped(before=lambda x: torch.sigmoid(400 * (x - 0.5))),
        "everything in reach",
    ),
    "probabilities": (
        lambda: Wrapped(after=lambda z: z.softmax(1)),
        "logits, not probabilities",
    ),
    "randomised": (
        lambda: Wrapped(before=lambda x: (x + 0.2 * torch.randn_like(x)).clamp(0, 1)),
        "not randomised",
    ),
}


@pytest.mark.parametrize("name", MASKED)
def test_masked_model_is_flagged(name, tmp_path):
    make, expected = MASKED[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        verdict, checks = suspicion(make(), tmp_path)
    assert verdict == "suspicious"
    assert checks[expected]["verdict"] == "suspicious", checks


# --- the fast copy --------------------------------------------------------------------------


def normalised(attach=None):
    """A trained network with a batch norm, to which something is attached before it is trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        if attach is not None:
            attach(made[1])
        return _train(made, 2)


def squash(module, inputs, output):
    return torch.tanh(3 * output)


def call_through(module):
    original = module.forward
    module.forward = lambda x: torch.tanh(3 * original(x))


FEW = {"limit": 150, "attacks": "pgd-20", "epsilon": "0.1", "checks": {"images": 0}}


@pytest.mark.parametrize("attach", [lambda m: m.register_forward_hook(squash), call_through])
def test_what_is_attached_to_a_norm_is_attacked_too(attach, tmp_path):
    net = normalised(attach)
    x, y = images(150)
    fell = net(pgd(net, x, y, epsilon="0.1", steps=20)).argmax(1) != y
    clean = int((net(x).argmax(1) == y).sum())
    net.train()  # as it is left by training
    before = copy.deepcopy(net.state_dict())
    _, result = evaluate_model(net, configure(**FEW), tmp_path / "out")
    found = result["results"][0]
    assert found["clean"]["correct"] == clean
    # The starts differ, so a few images may.
    assert abs(found["worst_case"]["correct"] - int((~fell).sum())) <= 4
    assert result["fast_copy"] == {"used": True, "differs": 0}  # the other norm is frozen
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_copy_that_computes_something_else_is_not_attacked(tmp_path, monkeypatch, capsys):
    net = normalised()
    _, honest = evaluate_model(net, configure(**FEW), tmp_path / "honest")
    assert honest["fast_copy"] == {"used": True, "differs": 0}

    def spoilt(network):
        copied = freeze(network)
        with torch.no_grad():
            copied[1].running_mean.add_(0.05)
        return copied

    class StopError(Exception):
        pass

    def stop(self, ids, mine):
        raise StopError

    monkeypatch.setattr(subjects, "freeze", spoilt)
    with monkeypatch.context() as patch:
        patch.setattr(grids.Evaluation, "keep_examples", stop)
        patch.setattr(grids, "_SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        with pytest.raises(StopError):
            evaluate_model(net, configure(**FEW), tmp_path / "out")
    monkeypatch.setattr(subjects, "freeze", freeze)  # what was found is remembered
    _, result = evaluate_model(net, configure(**FEW), tmp_path / "out")
    assert result["fast_copy"]["used"] is False
    assert result["fast_copy"]["differs"] > 100
    assert result["results"][0]["worst_case"] == honest["results"][0]["worst_case"]
    check = result["suspicion"]["checks"][-1]
    assert (check["name"], check["verdict"]) == ("successes confirmed", "skipped")
    command.EvaluateCommand().show(tmp_path, result)
    assert "attacks followed the network itself" in capsys.readouterr().out


class SeesAttacks(nn.Module):
    """The network on images of whole grey levels; elsewhere it says that it is fooled."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        logits = self.inner(x)
        plain = (x * 255 - (x * 255).round()).abs().flatten(1).amax(1) < 1e-3
        return torch.where(plain[:, None], logits, -logits)


def test_many_successes_that_the_network_denies_are_suspicious(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "fast_copy", SeesAttacks)
    config = configure(**FEW | {"epsilon": "0.02"})
    _, result = evaluate_model(normalised(), config, tmp_path / "out")
    assert result["fast_copy"] == {"used": True, "differs": 0}
    check = result["suspicion"]["checks"][-1]
    assert (check["name"], check["verdict"]) == ("successes confirmed", "suspicious")
    assert result["suspicion"]["verdict"] == "suspicious"


@pytest.mark.parametrize(
    ("denied", "total", "verdict"),
    [
        (0, 0, "ok"),
        (2, 40, "ok"),
        (3, 40, "suspicious"),
        (20, 1000, "ok"),
        (21, 1000, "suspicious"),
    ],
)
def test_unconfirmed_by_hand(denied, total, verdict):
    evidence = Evidence(
        answers={},
        n=0,
        norm="linf",
        steps=10,
        queries=1,
        transfer=None,
        unconfirmed=(denied, total),
        fallen=torch.empty(0, dtype=torch.bool),
        fixed=(0, 32),
    )
    found = judge(evidence)
    assert found["verdict"] == verdict
    assert f"{denied} of {total} images" in found["checks"][-1]["detail"]


def test_logits_that_are_not_numbers_are_not_the_same():
    exact = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    copied = exact + torch.tensor([[1e-4], [3e-4], [torch.nan], [0.0]])
    assert same_logits(copied, exact).tolist() == [True, False, False, True]


def test_a_module_that_cannot_be_copied(tmp_path):
    net = normalised()
    weight_norm(net[3])
    net(images(4)[0])
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(net)
    net.train()
    net[1].weight.grad = torch.zeros_like(net[1].weight)
    before = placed(net)
    assert dry_run(net, configure(**FEW))["images"] == 150
    assert placed(net) == before
    net(images(4)[0])
    before = placed(net)
    _, result = evaluate_model(net, configure(**FEW), tmp_path / "out")
    assert result["fast_copy"] is None
    assert placed(net) == before


def placed(net) -> list:
    """Where every tensor of a module is and how it is laid out, and the modes."""
    tensors = [*net.parameters(), *net.buffers()]
    tensors += [p.grad for p in net.parameters() if p.grad is not None]
    places = [(id(t), t.data_ptr(), t.stride(), t.device) for t in tensors]
    return [*places, *(module.training for module in net.modules())]


def test_a_model_of_the_callers_stays_as_it_was(tmp_path):
    net = normalised().train()
    net[3].eval()
    before = placed(net)
    dry_run(net, configure(**FEW))
    assert placed(net) == before
    evaluate_model(net, configure(**FEW), tmp_path / "out")
    assert placed(net) == before


def test_sign_test():
    assert sign_test(0, 0) == 1.0
    assert sign_test(3, 0) == 0.125
    assert sign_test(0, 5) == 1.0
    with pytest.raises(ValueError, match="counts >= 0"):
        sign_test(-1, 0)
    assert exported is wilson


# --- other options --------------------------------------------------------------------------


def test_bfloat16_counts_what_float32_confirms(model, tmp_path):
    """The same images fall, or nearly; each of them in float32."""
    path, result = evaluate_model(
        model, configure(precision="bfloat16", checks={"images": 0}), tmp_path / "out"
    )
    examples, _ = load_tensors(path / "examples.safetensors", "examples")
    # The predictions there are the float32 model's.
    assert (examples["prediction_adversarial"] != examples["label"]).all()
    assert "bfloat16, successes confirmed in float32" in result["results"][0]["provenance"]


def test_cross_check_with_the_reference(model, tmp_path, monkeypatch):
    pyautoattack = pytest.importorskip("pyautoattack")
    original = pyautoattack.AutoAttack._set_version

    def quick(self, version="standard"):
        original(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = self.fab.n_iter = 5
        self.square.n_queries = 10

    monkeypatch.setattr(pyautoattack.AutoAttack, "_set_version", quick)
    _, result = evaluate_model(
        model,
        configure(limit=40, cross_check="autoattack", checks={"images": 0}),
        tmp_path / "out",
    )
    check = result["cross_check"]
    parts = ("fooled_by_both", "fooled_by_ours_alone", "fooled_by_reference_alone")
    assert sum(check[p] for p in parts) + check["fooled_by_neither"] == check["n"]
    assert check["n"] == result["results"][0]["clean"]["correct"]
    assert check["fooled_by_both"] > 0
    survived = check["n"] - check["fooled_by_both"] - check["fooled_by_reference_alone"]
    assert result["robustbench"]["autoattack_acc"] == f"{100 * survived / 40:.2f}"
    assert check["reference"]["correct"] == survived
    assert check["describe"].startswith("AutoAttack standard (APGD-CE, APGD-T, FAB-T, Square)")
    assert "not weaker" in check["verdict"]


def test_module_keeps_its_mode_and_weights(tmp_path):
    made = network()
    made.train()
    before = {k: v.clone() for k, v in made.state_dict().items()}
    path, result = evaluate_model(
        made, configure(checks={"images": 0}), root=tmp_path, source=load("digits")
    )
    assert made.training
    made.eval()
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert all(p.grad is None for p in made.parameters())
    assert path.parent == tmp_path
    assert path.name.endswith("-evaluation")
    assert result["model"]["file"] is None


def test_l2(model, tmp_path):
    _, result = evaluate_model(
        model, configure(norm="l2", epsilon="0.8", checks={"images": 0}), tmp_path / "out"
    )
    found = result["results"][0]
    assert [a["name"] for a in found["attacks"]] == ["FGM", "PGD-5", "APGD-CE", "Square"]
    assert found["worst_case"]["correct"] < found["clean"]["correct"]
    assert result["robustbench"]["threat_model"] == "L2"


def test_command(model, capsys):
    arguments = [str(model.parent), "--limit", "40", "--attacks", "fgsm", "--checks.images", "0"]
    assert main([*arguments, "--threads", "1"]) == 0
    out = capsys.readouterr().out
    folder = model.parent / "evaluation-linf-0.15"  # the radius the model was trained for
    assert out.strip().splitlines()[-1] == f"evaluation: {folder / 'evaluation.json'}"
    assert "worst case" in out
    assert main([*arguments, "--threads", "1"]) == 0
    again = capsys.readouterr()
    assert "all is done" in again.err
    assert again.out == out
    assert main([*arguments, "--threads", "1", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "finished"
    (folder / "evaluation.json").unlink()
    assert main(["--resume", str(folder)]) == 0
    assert main(["--resume", str(folder), "--limit", "30"]) == 1
    assert "takes its settings from the folder" in capsys.readouterr().err


def test_print_config_and_dry_run(model, capsys):
    assert main([str(model), "--preset", "quick", "--print-config"]) == 0
    out = capsys.readouterr().out
    assert "epsilon: '0.15'" in out
    assert "limit: 200" in out
    measured = dry_run(model, configure())
    assert measured["images"] == 90
    assert measured["seconds_most"] > measured["seconds_clean"] > 0
    assert set(PRESETS) == {"quick", "standard", "binary", "digits", "mnist", "cifar10"}
    for name, preset in PRESETS.items():
        merge(EvaluateConfig(), preset, name)


def test_quick_preset_ends_in_seconds(model, tmp_path):
    started = time.perf_counter()
    assert main([str(model), "--preset", "quick", "--out", str(tmp_path / "q")]) == 0
    assert time.perf_counter() - started < 120


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attacks": "fgsm,deepfool"}, "attacks: expected names of fgsm"),
        ({"attacks": "fgsm,fgsm"}, "each attack once, got fgsm twice"),
        ({"attacks": "pgd-0"}, "attacks: expected names of"),
        ({"attacks": ""}, "^attacks: expected names with commas between them, of fgsm.*got ''"),
        ({"attacks": " \n"}, "^attacks: expected names with commas"),
        ({"attacks": "fgsm,"}, "^attacks: expected names with commas between them.*got 'fgsm,'"),
        ({"attacks": "fgsm, ,pgd-5"}, "^attacks: expected names with commas"),
        ({"attacks": "pgd-5, PGD5"}, "^attacks: expected each attack once, got pgd-5 twice"),
        ({"attacks": "", "epsilon": "0"}, "^attacks: expected names with commas"),
        ({"transfer_attacks": ""}, "^transfer_attacks: expected names with commas"),
        ({"transfer_attacks": "deepfool"}, "^transfer_attacks: expected names of fgsm"),
        ({"epsilons": "0.1,,0.2"}, "epsilons: expected a number"),
        ({"epsilon": "8"}, r"did you mean 8/255\?"),
        ({"epsilons": "0.1,x"}, "epsilons: expected a number"),
        ({"limit": 0}, "limit: expected 1 or more"),
        ({"batch_size": 0}, "batch_size: expected 1 or more"),
        ({"checks": {"steps": 3}}, "checks.steps: expected 10 or more"),
        ({"square": {"share": 2.0}}, r"square.share: expected a number in \(0, 1\]"),
        ({"seed": -1}, "seed: expected a whole number"),
    ],
)
def test_settings_are_checked(changes, message):
    with pytest.raises(ValueError, match=message):
        configure(**changes)


def test_what_does_not_fit_is_named(model, tmp_path):
    with pytest.raises(RunError, match="expected a model file or the folder"):
        evaluate_model(tmp_path / "none", configure())
    with pytest.raises(ConfigError, match="epsilon: expected a radius such as 8/255"):
        evaluate_model(network(), configure(epsilon="auto"), tmp_path / "a")
    colour = load(
        (torch.rand(4, 3, 8, 8), torch.arange(4)),
        test=(torch.rand(4, 3, 8, 8), torch.arange(4)),
    )
    with pytest.raises(ConfigError, match="expected images of 1 channels for this model, got 3"):
        evaluate_model(model, configure(), tmp_path / "b", source=colour)
    broken = Wrapped(after=lambda z: z * float("nan"))
    with pytest.raises(ConfigError, match="expected finite logits"):
        evaluate_model(broken, configure(), tmp_path / "c")


def test_no_attack_is_no_evaluation(model, capsys, tmp_path):
    out = tmp_path / "none"
    for empty in ("", " ", ","):
        assert main([str(model), "--attacks", empty, "--out", str(out)]) == 1
        assert "attacks: expected names with commas between them" in capsys.readouterr().err
    assert not out.exists()


def test_numbers_of_other_libraries_are_settings(tmp_path):
    config = EvaluateConfig(
        epsilon=np.float32(0.15),
        limit=np.int64(12),
        attacks="fgsm,pgd-2",
        pgd=PGDSettings(step_size=Fraction(1, 30), restarts=torch.tensor(2)),
        checks=ChecksConfig(images=np.int32(0)),
        seed=np.int64(3),
        threads=1,
    )
    assert type(config.limit) is int
    folder, result = evaluate_model(network(), config, tmp_path / "e")
    assert result["results"][0]["threat"]["epsilon"] == "0.15"
    stored = yaml.safe_load((folder / "config.yaml").read_text())
    assert stored["pgd"] == {"step_size": "1/30", "restarts": 2}
    # The same settings, written as usual, are those of the folder.
    again = EvaluateConfig(
        epsilon="0.15", limit=12, attacks="fgsm,pgd-2", threads=1, seed=3,
        pgd=PGDSettings(step_size="1/30", restarts=2), checks=ChecksConfig(images=0),
    )  # fmt: skip
    assert (
        evaluate_model(network(), again, tmp_path / "f")[1]["results"][0]["worst_case"]
        == (result["results"][0]["worst_case"])
    )


class Blind(nn.Module):
    """Right on images of whole grey values, and NaN on any other."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        grey = x * 255
        whole = ((grey - grey.round()).abs().flatten(1).amax(1) < 1e-3)[:, None]
        return torch.where(whole, self.inner(x), torch.nan)


def test_an_answer_that_is_not_finite_is_no_robust_one(tmp_path):
    """An argmax over NaN is class 0."""
    config = configure(attacks="fgsm,pgd-5,apgd-ce,apgd-t,square", attack_all=True, examples=90)
    with torch.inference_mode():  # as a trainer's validation loop has it
        folder, result = evaluate_model(Blind(network()), config, tmp_path / "blind")
    (found,) = result["results"]
    assert found["clean"]["correct"] > 80
    assert found["worst_case"]["correct"] == 0
    assert all(attack["correct"] == 0 for attack in found["attacks"])
    examples, _ = load_tensors(folder / "examples.safetensors", "examples")
    assert examples["adversarial"].isfinite().all()
    assert (examples["prediction_adversarial"] == -1).all()
    assert (examples["label"] == 0).any()
    checks = {check["name"]: check["verdict"] for check in result["suspicion"]["checks"]}
    assert checks["gradients not zero"] == "ok"


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        (lambda z: z[:, :1], ValueError, "two classes or more, got shape"),
        (lambda z: (z, z), TypeError, "model: expected logits.*got a tuple"),
        (lambda z: z[:, :5], ValueError, "expected labels from 0 to below 5"),
    ],
)
def test_what_is_no_classifier_is_refused(after, error, message, tmp_path):
    with pytest.raises(error, match=message):
        evaluate_model(Wrapped(after=after), configure(), tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("made", [None, len, np.zeros(3)])
def test_what_is_no_model_is_refused(made, tmp_path):
    with pytest.raises(
        TypeError, match=r"model: expected a torch.nn.Module or the path of a model"
    ):
        evaluate_model(made, configure(), tmp_path / "a")
