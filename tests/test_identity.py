"""What tells one model from another, and that no evaluation goes on with another."""

import hashlib

import numpy as np
import pytest
import torch
from _digits import model_file, network
from test_evaluate import configure, settled
from torch import nn

from fastbandit._identity import ROUNDING, Fingerprint
from fastbandit.evaluate import evaluate_model
from fastbandit.evaluate import subject as module
from fastbandit.runs.tensors import RunError

QUICK = {"limit": 60, "attacks": "fgsm", "checks": {"images": 0}}


class Scaled(nn.Module):
    """The same weights; constants and code are not among them."""

    def __init__(self, **constants):
        super().__init__()
        self.inner = network()
        self.constants = constants

    def forward(self, x):
        held = {"mean": 0.0, "scale": 1.0, "levels": 0, "softmax": False, **self.constants}
        x = x - held["mean"]
        if held["levels"]:
            x = (x * held["levels"]).round() / held["levels"]
        logits = held["scale"] * self.inner(x)
        return logits.softmax(1) if held["softmax"] else logits


def interrupted(model, out):
    """An evaluation that ends before its result is written."""
    _, result = evaluate_model(model, configure(**QUICK), out)
    (out / "evaluation.json").unlink()
    return result


@pytest.mark.parametrize(
    "constants",
    [{"mean": 0.3}, {"mean": 1e-3}, {"scale": 1.001}, {"softmax": True}, {"levels": 255}],
    ids=str,
)
def test_no_other_model_goes_on_with_an_evaluation(tmp_path, constants):
    """Rounding to 8 bits changes no image of the data, but what an attack finds."""
    first, other = Scaled(), Scaled(**constants)
    interrupted(first, tmp_path / "a")
    before = (tmp_path / "a" / "checkpoints" / "latest.safetensors").read_bytes()
    with pytest.raises(RunError, match=r"same weights that answers otherwise.*--force"):
        evaluate_model(other, configure(**QUICK), tmp_path / "a")
    assert (tmp_path / "a" / "checkpoints" / "latest.safetensors").read_bytes() == before
    _, again = evaluate_model(other, configure(**QUICK), tmp_path / "a", force=True)
    _, alone = evaluate_model(other, configure(**QUICK), tmp_path / "b")
    assert settled(again) == settled(alone)


def test_rounding_does_not_make_another_model(tmp_path):
    interrupted(Scaled(), tmp_path / "a")
    evaluate_model(Scaled(scale=1 + 1e-6), configure(**QUICK), tmp_path / "a")


def test_fingerprint_depends_on_neither_limit_nor_batch_nor_mode(tmp_path):
    model = Scaled().train()
    found = [
        evaluate_model(model, configure(**{**QUICK, **more}), tmp_path / str(number))[1]["model"]
        for number, more in enumerate(
            [{}, {"limit": 20, "batch_size": 7, "seed": 3}, {"channels_last": False}]
        )
    ]
    assert found[0] == found[1]
    prints = [Fingerprint.read(one["fingerprint"]) for one in (found[0], found[2])]
    assert prints[0].logits.shape == (32, 10)
    assert prints[0].distance(prints[1]) < ROUNDING


def test_probes_are_images_and_all_different():
    for shape in ((1, 8, 8), (3, 5, 4)):
        images = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
        probes = module.probe_images(images, torch.device("cpu"))
        assert probes.shape == (32, *shape)
        assert probes.min() >= 0
        assert probes.max() <= 1
        assert torch.equal(probes[[0, 15]], images[[0, 2]].float() / 255)
        rest = probes[16:]
        assert len(rest.flatten(1).unique(dim=0)) == 16
        # Not of 8 bits.
        assert ((255 * rest) - (255 * rest).round()).abs().amax((1, 2, 3)).min() > 0.1


class Random(nn.Module):
    def __init__(self, generator=None):
        super().__init__()
        self.inner, self.generator = network(), generator

    def forward(self, x):
        noise = torch.rand(x.shape, generator=self.generator, device=x.device)
        return self.inner((x + 0.1 * noise).clamp(0, 1))


def test_random_model_is_suspicious_without_any_check(tmp_path):
    state = torch.random.get_rng_state()
    result = interrupted(Random(), tmp_path / "a")
    assert result["model"]["fingerprint"]["randomised"] > 0
    assert result["suspicion"]["verdict"] == "suspicious"
    (found,) = (c for c in result["suspicion"]["checks"] if c["name"] == "not randomised")
    assert found["verdict"] == "suspicious"
    assert "of 32 fixed ones" in found["detail"]
    checks = interrupted(network(), tmp_path / "b")["suspicion"]["checks"]
    (same,) = (c for c in checks if c["name"] == "not randomised")
    assert same["verdict"] == "ok"
    assert "fixed" in same["detail"]
    # Its numbers are torch's, so it can be told from others, and go on.
    evaluate_model(Random(), configure(**QUICK), tmp_path / "a")
    torch.random.set_rng_state(state)


def test_random_model_with_a_generator_of_its_own_cannot_go_on(tmp_path):
    class Own(Random):
        def __deepcopy__(self, memo):
            return self

    model = Own(torch.Generator())
    interrupted(model, tmp_path / "a")
    with pytest.raises(RunError, match="answers are random, and not by torch's generator"):
        evaluate_model(model, configure(**QUICK), tmp_path / "a")


def test_digest_covers_every_tensor():
    def made(persistent, value, shape=(2,), dtype=torch.float32):
        model = nn.Module()
        buffer = torch.full(shape, value, dtype=dtype)
        model.register_buffer("mean", buffer, persistent=persistent)
        return module.module_digest(model)

    digests = [
        made(False, 1.0),
        made(False, 2.0),
        made(False, 1.0, (2, 1)),
        made(False, 1.0, (1,), torch.float64),
        made(False, 1.0, ()),
    ]
    assert len(set(digests)) == len(digests)
    assert made(False, 1.0) == made(True, 1.0) == digests[0]


def test_file_that_is_replaced_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = model_file(tmp_path)
    original = module.load_model

    def load_model(file):
        found = original(file)
        file.write_bytes(b"of the next epoch")
        return found

    monkeypatch.setattr(module, "load_model", load_model)
    with pytest.raises(RunError, match="another model was written there while it was read"):
        evaluate_model(path, configure(**QUICK), tmp_path / "out")


def test_model_that_was_retrained_needs_force(tmp_path):
    path = model_file(tmp_path)
    interrupted(path, tmp_path / "out")
    from fastbandit.models import load_model, save_model

    model = load_model(path)
    weights = {name: value + 0.01 for name, value in model.network.state_dict().items()}
    save_model(
        path, weights, genotype=model.genotype, architecture=model.architecture,
        data=model.data, training=model.training,
    )  # fmt: skip
    with pytest.raises(RunError, match=r"another configuration \(model.digest"):
        evaluate_model(path, configure(**QUICK), tmp_path / "out")
    _, result = evaluate_model(path, configure(**QUICK), tmp_path / "out", force=True)
    assert result["model"]["digest"] == hashlib.sha256(path.read_bytes()).hexdigest()[:16]


# --- the comparison -------------------------------------------------------------------------


def of(*rows):
    return Fingerprint(np.array(rows, np.float32))


def test_distance_by_hand():
    nan, inf = np.nan, np.inf
    assert of([100, 1]).distance(of([100, 2])) == 0.01
    assert of([1, 2], [0, 0]).distance(of([1, 2], [0, 0])) == 0
    assert of([1, 2], [4, 0]).distance(of([1, 2], [4, 2])) == 0.5  # the worst image counts
    assert of([1e6, 0]).distance(of([1e6, 30])) < ROUNDING  # float32 knows 1e6 to 0.06
    assert of([nan, inf, 1]).distance(of([nan, inf, 1])) == 0
    assert of([nan, 1]).distance(of([1, 1])) == inf
    assert of([-inf, 1]).distance(of([inf, 1])) == inf
    assert of([inf, 1]).distance(of([1e30, 1])) == inf
    assert of([1, 2]).distance(of([1, 2], [1, 2])) == of([1]).distance(of([1, 1])) == inf
    assert Fingerprint.of(of([1, 2], [3, 4]).logits, of([1, 2], [3, 4.1]).logits).randomised == 1


def test_fingerprint_goes_through_json():
    first = Fingerprint(np.array([[1.5, np.nan], [-np.inf, 3e-30]], np.float32), 1)
    again = Fingerprint.read(first.to_dict())
    assert again.randomised == 1
    assert again.logits.tobytes() == first.logits.tobytes()


@pytest.mark.parametrize(
    "change",
    [
        {"images": 3}, {"images": -1}, {"images": True}, {"classes": 2**70}, {"classes": None},
        {"logits": None}, {"logits": "x"}, {"logits": 7}, {"logits": []}, {"randomised": "0"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_fingerprint_is_none(change):
    assert Fingerprint.read({**of([1, 2], [3, 4]).to_dict(), **change}) is None
    assert Fingerprint.read(change.get("logits")) is None
