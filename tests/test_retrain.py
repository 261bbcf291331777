"""Retraining as a whole: schedules, selection, exact resume, the guard, errors, the command."""

import json
import math
import time
from pathlib import Path

import pytest
import torch
import yaml
from _processes import Process, run, run_pair
from _retrain_ranks import retrain_double

from fastbandit.config import ConfigError, merge, to_plain
from fastbandit.data import Loader, load
from fastbandit.genotype import Genotype, GenotypeError
from fastbandit.models import BEST, LAST, load_model
from fastbandit.retrain import PRESETS, RetrainConfig, dry_run, find_genotype, main, parse, retrain
from fastbandit.retrain.genotypes import with_genotype
from fastbandit.retrain.loop import Retraining
from fastbandit.retrain.setup import build
from fastbandit.runs.environment import derive_seed, run_id
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.progress import Progress
from fastbandit.runs.session import Session
from fastbandit.runs.tensors import CheckpointError, RunError, load_tensors
from fastbandit.search import SearchConfig
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, evaluate
from fastbandit.training.overfitting import Verdict, stronger

# The files whose bytes are a function of the configuration.
EXACT = (BEST, LAST, "genotype.json", "split.json", "config.yaml")

NAME = "ABANDIT_MNIST_NORMAL_1"
# 48 images to train on in 2 batches, 16 to validate; every part that has a state.
TINY = {
    "genotype": NAME,
    "name": "tiny",
    "init_channels": 2,
    "layers": 3,
    "epochs": 4,
    "train_limit": 64,
    "train_portion": 0.75,
    "test_limit": 32,
    "batch_size": 24,
    "evaluation_batch_size": 32,
    "threads": 1,
    "device": "cpu",
    "ema_decay": 0.9,
    "auxiliary": True,
    "drop_path_prob": 0.2,
    "crop_padding": 1,
    "cutout_length": 2,
    "selection": {"steps": 2},
    "final": {"steps": 2, "step_size": "0.1"},
    "guard": {"every": 1, "images": 8},
}


def tiny(**changes) -> RetrainConfig:
    return merge(merge(RetrainConfig(), TINY, "tiny"), changes, "test")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(path):
    """The metrics without what a clock or the machine decides."""
    return [
        {k: v for k, v in line.items() if "second" not in k and "memory" not in k}
        for line in lines(path / "metrics.jsonl")
    ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted retraining, looked at by many tests."""
    return retrain(tiny(), tmp_path_factory.mktemp("retrain") / "run")


# --- settings -------------------------------------------------------------------------------


def test_schedules_by_hand():
    def rates(points, **settings):
        config = merge(RetrainConfig(), {"learning_rate": 0.5, **settings}, "test")
        return [config.rate(point) for point in points]

    # Up to the peak at 2/5, down to 0: half of the way up, the peak, half of the way down.
    found = rates([0, 0.2, 0.4, 0.7, 1], schedule="cyclic")
    assert found == pytest.approx([0, 0.25, 0.5, 0.25, 0])
    assert rates([0.25, 0.75], schedule="cyclic", warmup=0.5) == pytest.approx([0.25, 0.25])
    found = rates([0, 1 / 3, 0.5, 1], schedule="cosine")
    assert found == pytest.approx([0.5, 0.25 * (1 + math.cos(math.pi / 3)), 0.25, 0])
    # The cosine begins where the rise ends.
    found = rates([0, 0.05, 0.1, 0.55], schedule="cosine", warmup=0.1)
    assert found == pytest.approx([0, 0.25, 0.5, 0.25])
    found = rates([0, 0.49, 0.5, 0.74, 0.75, 0.99], schedule="multistep")
    assert found == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005, 0.005])


def test_the_rate_is_that_of_the_step(finished):
    path, _ = finished
    # The last step of epoch e is the second of two: progress (e + 1/2) / 4, peak at 0.4.
    expected = [0.1 * p / 0.4 if p < 0.4 else 0.1 * (1 - p) / 0.6 for p in (1 / 8, 3 / 8, 5 / 8)]
    found = [line["learning_rate"] for line in lines(path / "metrics.jsonl")]
    assert found[:3] == pytest.approx(expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_sound(preset):
    config = parse([NAME, "--preset", preset]).config.resolve()
    assert config.attack.steps == 1
    assert config.warmup is not None
    assert config.guard.enabled
    assert not {"test", "final"} & set(config.selection_threat().to_dict())


@pytest.mark.parametrize(
    ("method", "steps", "mode"),
    [("fgsm", 1, "train"), ("pgd", 7, "train"), ("free", 1, "train"), ("trades", 10, "eval"),
     ("clean", 0, "train")],
)  # fmt: skip
def test_the_adversary_of_each_method(method, steps, mode):
    config = tiny(method=method).resolve()
    assert (config.attack.steps, config.attack.bn_mode) == (steps, mode)
    assert config.resolve() == config
    assert config.selection_threat().steps == (0 if method == "clean" else 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "genotype: expected a genotype file, the folder of a search or one of ABANDIT"),
        (["nothing.json"], "nothing.json: expected a genotype file"),
        ([NAME, "--preset", "imagenet"], "--preset: expected one of digits, smoke, mnist"),
        ([NAME, "--attack.epsilon", "8"], "did you mean 8/255?"),
        ([NAME, "--method", "fgsm", "--attack.steps", "2"], "attack.steps: expected 1 with"),
        ([NAME, "--method", "pgd", "--attack.steps", "0"], "attack.steps: expected 1 or more"),
        ([NAME, "--warmup", "1.5"], "warmup: expected None or a share from 0 to 1, got 1.5"),
        ([NAME, "--ema-decay", "1"], r"ema_decay: expected a number in [0, 1), got 1.0"),
        ([NAME, "--genotype-hash", "abc"], "genotype_hash: expected abc, got "),
        ([NAME, "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        ([NAME, "--epochs", "0"], "epochs: expected 1 or more, got 0"),
        ([NAME, "--guard.steps", "1"], "guard.steps: expected 2 or more"),
        ([NAME, "--device", "tpu"], "device: expected cpu, cuda"),
        (["--resume", "/nowhere"], "/nowhere: not a run folder"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("retrain: error: ")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_genotype(tmp_path):
    with pytest.raises(GenotypeError, match=r"expected a folder with genotype\.json"):
        find_genotype(str(tmp_path))
    Genotype.published(NAME).save(tmp_path / "genotype.json")
    assert find_genotype(str(tmp_path)) == find_genotype(str(tmp_path / "genotype.json"))


def test_a_run_folder_gives_data_and_adversary_where_nothing_else_does(tmp_path):
    search = merge(
        SearchConfig(),
        {"name": "mnist", "data": "/my/mnist", "attack": {"epsilon": "0.25"}},
        "test",
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_plain(search)))
    Genotype.published(NAME).save(tmp_path / "genotype.json")
    run = str(tmp_path)
    config = parse([run]).config
    # The preset of the search's name, but the search's own data and radius.
    assert (config.name, config.epochs) == ("mnist", PRESETS["mnist"]["epochs"])
    assert (config.data, config.attack.epsilon) == ("/my/mnist", "0.25")
    config = parse([run, "--preset", "cifar10"]).config
    assert (config.epochs, config.data) == (PRESETS["cifar10"]["epochs"], "/my/mnist")
    file = tmp_path / "c.yaml"
    file.write_text(f"genotype: {run}\ndata: other\n")
    assert parse(["--config", str(file)]).config.data == "other"
    config = parse([run, "--data", "digits", "--attack.epsilon", "0.1"]).config
    assert (config.data, config.attack.epsilon) == ("digits", "0.1")


def test_size_of_the_network():
    genotype = Genotype.published("ABANDIT_CIFAR_1")
    built = tiny(init_channels=None, layers=None).architecture(genotype, 3, 10)
    assert (built.channels, built.cells, built.denoise_blocks) == (48, 10, True)
    built = tiny(denoise_blocks=False).architecture(genotype, 3, 10)
    assert (built.channels, built.cells, built.denoise_blocks) == (2, 3, False)
    assert (built.gabor, built.bn_eps) == ("released", 1e-3)
    genotype = Genotype.published("ABANDIT_CIFAR_2")  # of which only a part is known
    built = tiny(init_channels=None, layers=None).architecture(genotype, 3, 10)
    assert (built.channels, built.cells, built.bn_eps) == (16, 6, 1e-3)
    genotype = genotype.model_copy(update={"macro": None})
    assert tiny().architecture(genotype, 3, 10).bn_eps == 1e-5


def test_print_config_is_a_config(capsys, tmp_path):
    assert main([NAME, "--preset", "mnist", "--seed", "3", "--print-config"]) == 0
    file = tmp_path / "c.yaml"
    file.write_text(capsys.readouterr().out)
    config = parse(["--config", str(file)]).config
    assert config.genotype_hash == Genotype.published(NAME).hash
    assert (config.seed, config.name) == (3, "mnist")


# --- a run ----------------------------------------------------------------------------------


def test_folder_is_complete(finished):
    path, summary = finished
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    assert names == {
        "config.yaml",
        "env.json",
        "split.json",
        "metrics.jsonl",
        "genotype.json",
        BEST,
        LAST,
        "model-best.md",
        "model-last.md",
        "summary.json",
        "checkpoints",
    }
    card = (path / "model-best.md").read_text()
    assert card.startswith(f"# {BEST}\n")
    assert f"| epoch | {summary['best']['epoch'] + 1} of " in card
    assert "| checkpoint rule | best: the epoch with the highest" in card
    assert f"network = fastbandit.load('{BEST}')" in card
    assert RunFolder(path).read_json("summary.json") == summary
    assert json.loads((path / "env.json").read_text())["command"] == "retrain"
    assert summary["run_id"] == run_id(yaml.safe_load((path / "config.yaml").read_text()))
    assert summary["command"] == "retrain"
    assert summary["data"]["n"] == 48
    split = json.loads((path / "split.json").read_text())
    assert not set(split["weights"]) & set(split["validation"])


def test_the_best_epoch_is_the_most_robust_on_validation(finished):
    path, summary = finished
    metrics = lines(path / "metrics.jsonl")
    ranked = sorted(
        metrics, key=lambda m: (-m["robust_accuracy"], -m["clean_accuracy"], m["epoch"])
    )
    best, last = summary["best"], summary["last"]
    assert best["epoch"] == ranked[0]["epoch"]
    assert (best["robust_accuracy"], best["clean_accuracy"]) == (
        ranked[0]["robust_accuracy"],
        ranked[0]["clean_accuracy"],
    )
    assert last["epoch"] == 3
    assert last["clean_accuracy"] == metrics[-1]["clean_accuracy"]
    assert (best["file"], last["file"], best["n"]) == (BEST, LAST, 16)


def test_model_files_give_the_recorded_accuracies(finished):
    path, summary = finished
    split = json.loads((path / "split.json").read_text())
    for name, threat, key in (
        (BEST, tiny().selection_threat(), "best"),
        (LAST, tiny().selection_threat(), "last"),
        (BEST, tiny().final_threat(), "test"),
    ):
        model = load_model(path / name)
        assert model.training["epoch"] == summary[key if key != "test" else "best"]["epoch"]
        part, purpose = ("test", ("final", "test")) if key == "test" else (
            "validation", ("validation",))  # fmt: skip
        images = load("digits").test if part == "test" else load("digits").train
        found = evaluate(
            model.network,
            Loader(images, split[part], batch_size=32),
            threat,
            seed=derive_seed(0, "attack", *purpose),
            cost=Cost(),
        )
        assert found.clean_accuracy == summary[key]["clean_accuracy"]
        assert found.robust_accuracy == summary[key]["robust_accuracy"]
        assert found.images == summary[key]["n"]
    assert model.data["shape"] == [1, 8, 8]
    assert model.training["checkpoint"] == "best"
    assert "highest robust accuracy on 16 validation images" in model.training["rule"]
    parameters = sum(p.numel() for p in model.network.parameters())
    assert summary["parameters"] == parameters
    assert summary["macs"] > parameters


def test_a_model_file_loads_in_a_process_that_has_never_seen_the_run(finished, tmp_path):
    path, _ = finished
    file = tmp_path / "model.safetensors"
    file.write_bytes((path / BEST).read_bytes())
    code = (
        "import torch; from fastbandit.models import load_model; "
        f"m = load_model({str(file)!r}); x = torch.linspace(0, 1, 128).view(2, 1, 8, 8); "
        "print(m.network(x).double().sum().item())"
    )
    done = run("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    x = torch.linspace(0, 1, 128).view(2, 1, 8, 8)
    here = load_model(path).network(x).double().sum().item()
    assert float(done.stdout) == pytest.approx(here, rel=1e-6)


def test_cost_ledger_counts_what_was_done(finished):
    _, summary = finished
    cost = summary["cost"]
    # 2 batches of FGSM; PGD-2 on 1 batch of 16 images; the guard: FGSM and PGD-5 on 8 images.
    assert cost["images_trained"] == 4 * 48
    assert cost["images_evaluated"] == 4 * (16 + 2 * 8) + 32
    assert cost["forward_passes"] == 4 * (2 * 2 + (2 + 2) + (1 + 2) + (5 + 2)) + 2 + 2
    assert cost["backward_passes"] == 4 * (2 * 2 + 2 + 1 + 5) + 2
    phases = ("setup", "train", "validate", "guard", "test", "other")
    assert cost["seconds_total"] == pytest.approx(sum(cost[f"seconds_{p}"] for p in phases))


def test_same_seed_same_bytes_other_seed_other_bytes(finished, tmp_path):
    path, _ = finished
    torch.manual_seed(99)  # the process's own generator must not matter
    torch.rand(7)
    again, _ = retrain(tiny(), tmp_path / "again")
    for name in EXACT:
        assert (again / name).read_bytes() == (path / name).read_bytes(), name
    other, _ = retrain(tiny(seed=1), tmp_path / "other")
    assert (other / LAST).read_bytes() != (path / LAST).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "pgd", "attack": {"steps": 2}},
        {"method": "free", "replays": 3},
        {"method": "trades", "attack": {"steps": 2}, "ema_decay": 0.0},
        {"method": "clean", "schedule": "cosine"},
        {"schedule": "multistep", "selection": {"every": 3}, "guard": {"enabled": False}},
    ],
    ids=["pgd", "free", "trades", "clean", "no-guard"],
)
def test_every_method_runs_to_its_end(changes, tmp_path):
    path, summary = retrain(tiny(epochs=2, **changes), tmp_path / "run")
    metrics = lines(path / "metrics.jsonl")
    assert len(metrics) == 2
    assert summary["method"] == changes.get("method", "fgsm")
    if summary["method"] == "clean":
        assert summary["best"]["attack"] == "clean (no attack)"
        assert summary["best"]["robust_accuracy"] == summary["best"]["clean_accuracy"]
        assert summary["test"]["robust_accuracy"] <= summary["test"]["clean_accuracy"]
    if "guard" in changes or summary["method"] == "clean":
        assert [line["overfitting"] for line in metrics] == [None, None]
    else:
        assert [line["overfitting"]["images"] for line in metrics] == [8, 8]
    if "selection" in changes:
        # The last epoch is looked at whatever the interval.
        assert [line["clean_accuracy"] is None for line in metrics] == [True, False]
        assert summary["best"]["epoch"] == 1
    expected = {"pgd": 3, "free": 3, "trades": 5, "clean": 1, "fgsm": 2}[summary["method"]]
    evaluated = summary["cost"]["forward_passes"] - 2 * 2 * expected
    assert evaluated > 0


# --- exact resume ---------------------------------------------------------------------------


class StopError(Exception):
    pass


def interrupted(config, out, epochs, monkeypatch):
    """A retraining that ends with an error after so many epochs."""
    original = Retraining.run_epoch

    def run_epoch(self):
        if self.epoch == epochs:
            raise StopError
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Retraining, "run_epoch", run_epoch)
        with pytest.raises(StopError):
            retrain(config, out)


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_resume_is_exact(epochs, finished, tmp_path, monkeypatch):
    path, summary = finished
    out = tmp_path / "run"
    interrupted(tiny(), out, epochs, monkeypatch)
    # What a killed process may leave: a line and a model file of an epoch that does not count.
    with open(out / "metrics.jsonl", "ab") as log:
        log.write(b'{"epoch": 99')
    (out / BEST).write_bytes(b"half")
    _, again = retrain(tiny(), out)
    for name in EXACT:
        assert (out / name).read_bytes() == (path / name).read_bytes(), name
    assert without_times(out) == without_times(path)
    for key in ("best", "last", "test", "overfitting"):
        assert again[key] == summary[key]
    assert again["cost"]["forward_passes"] == summary["cost"]["forward_passes"]


def test_a_run_keeps_the_batch_norms_it_began_with(tmp_path, monkeypatch):
    """The hash of a genotype does not cover what is around its cells."""
    out, genotype = tmp_path / "run", tmp_path / "genotype.json"
    plain = Genotype.published(NAME).to_dict()
    del plain["macro"]["bn_eps"]
    genotype.write_text(json.dumps(plain))
    interrupted(tiny(genotype=str(genotype), epochs=1), out, 0, monkeypatch)
    Genotype.published(NAME).save(genotype)
    with pytest.raises(RunError, match=r"begun with .*bn_eps=1e-05.*got .*0\.001.*--resume"):
        retrain(tiny(genotype=str(genotype), epochs=1), out)
    assert main(["--resume", str(out)]) == 0
    model = load_model(out)
    assert model.architecture.bn_eps == 1e-5
    assert {m.eps for m in model.network.modules() if hasattr(m, "eps")} == {1e-5}


def test_kill_in_the_middle(finished, tmp_path):
    """kill -9, the same command again: the same bytes as the uninterrupted run."""
    path, _ = finished
    file, out = tmp_path / "tiny.yaml", tmp_path / "killed"
    file.write_text(yaml.safe_dump(TINY))
    command = ["-m", "fastbandit.retrain", "--config", str(file), "--out", str(out)]
    # Slow at one moment, so that there is something to kill.
    slow = (
        "import sys, time; from fastbandit.retrain import main\n"
        "from fastbandit.retrain.loop import Retraining; original = Retraining.train\n"
        "def train(self, *rest):\n"
        "    found = original(self, *rest)\n"
        "    time.sleep(60 * (self.epoch == 2))\n"
        "    return found\n"
        "Retraining.train = train\n"
        f"sys.exit(main({command[2:]!r}))"
    )
    process = Process("-c", slow)
    log, deadline = out / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (log.is_file() and len(lines(log)) == 2):
        assert process.poll() is None, process.wait()
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "retraining goes on after epoch" in done.stderr
    assert done.stdout.splitlines()[-1] == f"run folder: {out}"
    for name in EXACT:
        assert (out / name).read_bytes() == (path / name).read_bytes(), name


def test_resume_needs_nothing_but_the_folder(finished, tmp_path, monkeypatch, capsys):
    genotype, out = tmp_path / "g.json", tmp_path / "run"
    Genotype.published(NAME).save(genotype)
    interrupted(tiny(genotype=str(genotype)), out, 2, monkeypatch)
    genotype.unlink()
    assert main(["--resume", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["run"] == str(out)
    assert printed["best"] == finished[1]["best"]
    assert main(["--resume", str(out), "--json"]) == 0
    again = capsys.readouterr()
    assert "all is done" in again.err
    assert json.loads(again.out) == printed
    assert main(["--resume", str(out), "--seed", "9"]) == 1
    assert "--resume takes its settings from the folder" in capsys.readouterr().err


def test_another_genotype_in_the_same_file_is_noticed(tmp_path, monkeypatch):
    file, out = tmp_path / "g.json", tmp_path / "run"
    Genotype.published(NAME).save(file)
    interrupted(tiny(genotype=str(file)), out, 1, monkeypatch)
    Genotype.published("ABANDIT_CIFAR_1").save(file)
    with pytest.raises(RunError, match=r"another configuration \(genotype_hash"):
        retrain(tiny(genotype=str(file)), out)


@pytest.mark.parametrize("macro", [{"stem": 1}, {"reductions": [0, 1]}], ids=str)
def test_another_network_around_the_same_cells_is_noticed(macro, tmp_path, monkeypatch):
    """The hash is of the cells alone."""
    file, out = tmp_path / "g.json", tmp_path / "run"
    plain = Genotype.published(NAME).to_dict()
    around = {"layers": 3, "channels": 2}
    Genotype.from_dict({**plain, "macro": around}).save(file)
    interrupted(tiny(genotype=str(file)), out, 1, monkeypatch)
    Genotype.from_dict({**plain, "macro": {**around, **macro}}).save(file)
    with pytest.raises(RunError, match=r"genotype.json: the run was begun with layers=3 .* got"):
        retrain(tiny(genotype=str(file)), out)


def test_damaged_and_foreign_checkpoints(tmp_path, monkeypatch):
    out, other = tmp_path / "run", tmp_path / "other"
    interrupted(tiny(), out, 2, monkeypatch)
    interrupted(tiny(layers=4), other, 2, monkeypatch)
    latest = out / "checkpoints" / "latest.safetensors"
    whole = latest.read_bytes()
    latest.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    with pytest.raises(CheckpointError, match=r"checksum.*delete it to go on from"):
        retrain(tiny(), out)
    latest.write_bytes((other / "checkpoints" / "latest.safetensors").read_bytes())
    (out / "metrics.jsonl").write_bytes((other / "metrics.jsonl").read_bytes())
    with pytest.raises(CheckpointError, match="checkpoint of the configuration in"):
        retrain(tiny(), out)


def test_force_replaces_the_model_files(finished, tmp_path):
    path, _ = finished
    out = tmp_path / "run"
    out.mkdir()
    for file in path.iterdir():
        if file.is_file():
            (out / file.name).write_bytes(file.read_bytes())
    with pytest.raises(RunError, match="--force"):
        retrain(tiny(seed=5), out)
    with RunFolder.open(out, {"another": "run"}, force=True):
        assert not (out / BEST).exists()
        assert not (out / LAST).exists()


def test_a_data_set_of_ones_own(tmp_path):
    source = load("digits").limit(train=64, test=32)
    path, summary = retrain(
        tiny(epochs=1, data="mine"), tmp_path / "run", source=source,
        genotype=Genotype.published("ABANDIT_CIFAR_2"),
    )  # fmt: skip
    assert summary["genotype_hash"] == Genotype.published("ABANDIT_CIFAR_2").hash
    assert load_model(path).data["digest"] == source.digest


def test_dry_run_measures_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = dry_run(tiny())
    assert result["epochs"] == 4
    assert result["seconds_total"] == pytest.approx(
        result["seconds_setup"] + 4 * result["seconds_per_epoch"] + result["seconds_test"]
    )
    assert min(value for key, value in result.items() if key.startswith("seconds")) > 0
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY))
    assert main(["--config", str(file), "--dry-run"]) == 0
    assert "seconds per epoch" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_out_of_memory_suggests_a_batch_size(tmp_path, monkeypatch):
    def train(self, batches=None):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Retraining, "train", train)
    with pytest.raises(ValueError, match=r"in epoch 1 .*--batch-size 12 --evaluation-batch-size"):
        retrain(tiny(), tmp_path / "run")
    with pytest.raises(ValueError, match="in the dry run"):
        dry_run(tiny())


# --- several processes ------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one_up_to_rounding(tmp_path):
    """Batches that two do not divide, and one too small to be divided; in float64."""
    for done in run_pair(str(Path(__file__).with_name("_retrain_ranks.py")), str(tmp_path)):
        assert done.returncode == 0, done.stderr
    path, summary = retrain_double(tmp_path / "alone")
    both = json.loads((tmp_path / "data" / "summary.json").read_text())
    for name in (BEST, LAST):
        expected, _ = load_tensors(path / name, "network")
        found, _ = load_tensors(tmp_path / "data" / name, "network")
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert tensor.dtype in (torch.float64, torch.int64)
            torch.testing.assert_close(tensor, expected[key], rtol=1e-7, atol=1e-9)
    for one, two in zip(without_times(path), without_times(tmp_path / "data"), strict=True):
        assert two.pop("loss") == pytest.approx(one.pop("loss"), rel=1e-9)
        assert two == one
    for key in ("best", "last", "overfitting"):
        assert both[key] == summary[key]
    # Counted once, whoever computed it.
    for key in ("forward_passes", "backward_passes", "images_trained", "images_evaluated"):
        assert both["cost"][key] == summary["cost"][key], key
    assert load_model(tmp_path / "free").training["method"] == "free"


# --- catastrophic overfitting ---------------------------------------------------------------


def test_training_goes_back_and_on_with_a_stronger_attack(finished, tmp_path, monkeypatch):
    """The check is told to find something after epoch 1; the rest is real."""
    seen = []
    original = Retraining.check

    def check(self):
        now = {k: v.clone() for k, v in self._learning().items()}
        seen.append((self.epoch, self.threat, now))
        if self.epoch == 1:
            return Verdict(0.9, 0.05, 8, True)
        return original(self)

    monkeypatch.setattr(Retraining, "check", check)
    notes = []

    class Notes(Progress):
        def note(self, text):
            notes.append(text)

    progress = Notes.silent()
    path, summary = retrain(tiny(), tmp_path / "run", progress=progress)
    assert [(epoch, threat.steps) for epoch, threat, _ in seen] == [(0, 1), (1, 1), (2, 2), (3, 2)]
    (said,) = notes
    assert said == (
        "catastrophic overfitting in epoch 2: accuracy 90.0 % under the training attack, 5.0 % "
        "under a stronger one; back to epoch 1, and on with PGD-2, L-infinity, epsilon 0.2, step "
        "0.125, random start, x + delta in [0, 1], batch norm in train mode"
    )
    metrics = lines(path / "metrics.jsonl")
    assert [line["attack_steps"] for line in metrics] == [1, 1, 2, 2]
    assert metrics[1]["overfitting"]["back_to"] == 0
    # Validation after the way back is that of the epoch it went back to.
    for key in ("clean_accuracy", "robust_accuracy"):
        assert metrics[1][key] == metrics[0][key]
    (fired,) = summary["overfitting"]
    assert (fired["epoch"], fired["back_to"]) == (1, 0)
    # An interruption after it changes nothing.
    seen.clear()
    interrupted(tiny(), tmp_path / "again", 3, monkeypatch)
    retrain(tiny(), tmp_path / "again")
    for name in EXACT:
        assert (tmp_path / "again" / name).read_bytes() == (path / name).read_bytes(), name
    assert without_times(tmp_path / "again") == without_times(path)


def test_the_way_back_restores_weights_momentum_and_average(monkeypatch):
    config, genotype = with_genotype(tiny().resolve(), None)
    current = Retraining(build(config, genotype), Session(config))
    current.train()
    current.keep_good(0)
    good = {k: v.clone() for k, v in current._learning().items()}
    assert {k.partition(".")[0] for k in good} == {"model", "momentum", "average"}
    current.epoch = 1
    current.train()
    assert not all(torch.equal(good[k], v) for k, v in current._learning().items())
    monkeypatch.setattr(Retraining, "check", lambda self: Verdict(0.9, 0.0, 8, True))
    where = {k: v.data_ptr() for k, v in current._learning().items()}
    current.guarded()
    assert all(torch.equal(good[k], v) for k, v in current._learning().items())
    # A recorded step goes on writing to the memory it was recorded with.
    assert {k: v.data_ptr() for k, v in current._learning().items()} == where
    # Before the first epoch there is no momentum, which is the same as zero.
    fresh = Retraining(build(config, genotype), Session(config))
    fresh.train()
    fresh.guarded()
    assert fresh.good_epoch == -1
    momentum = [v for k, v in fresh._learning().items() if k.startswith("momentum")]
    assert momentum
    assert not any(v.any() for v in momentum)
    # What is good must not change with the weights.
    current.train()
    assert all(torch.equal(good[k], v) for k, v in current.good.items())


def test_the_attack_does_not_grow_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(Retraining, "check", lambda self: Verdict(0.9, 0.0, 8, True))
    path, summary = retrain(tiny(epochs=5), tmp_path / "run")
    assert [line["attack_steps"] for line in lines(path / "metrics.jsonl")] == [1, 2, 4, 8, 8]
    assert [fired["back_to"] for fired in summary["overfitting"]] == [-1, -1, -1]
    assert isinstance(tiny().training_threat(), ThreatModel)


def test_free_training_goes_on_as_pgd_training(tmp_path, monkeypatch):
    config = tiny(method="free").resolve()
    threat = config.training_threat()
    assert type(config.objective(threat)).__name__ == "Free"
    objective = config.objective(stronger(threat))
    assert (type(objective).__name__, objective.updates) == ("Adversarial", 1)


def test_an_error_of_the_settings_names_the_setting():
    with pytest.raises(ConfigError, match=r"unknown setting guard\.imagse; did you mean guard"):
        merge(RetrainConfig(), {"guard": {"imagse": 3}}, "file")
