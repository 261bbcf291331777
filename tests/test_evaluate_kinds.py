"""What may be evaluated: modules of every kind, or an error that says why not."""

import warnings

import pytest
import torch
from _centroids import fitted
from _digits import images
from torch import nn

import fastbandit
from fastbandit import attacks
from fastbandit.config import ConfigError

FAST = {
    "epsilon": "0.1",
    "preset": None,
    "attacks": "fgsm,apgd-ce,square",
    "apgd": {"steps": 4},
    "square": {"queries": 8},
    "checks": {"images": 8, "steps": 10, "queries": 5},
    "threads": 1,
    "progress": False,
}


def evaluate(model, **changes):
    return fastbandit.evaluate(model, *images(20), **{**FAST, **changes})


class Mapped(nn.Module):
    """A model that maps over the images of a batch itself."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return torch.func.vmap(lambda one: self.inner(one[None])[0])(x)


def exported(model, x):
    shapes = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(model, (x,), dynamic_shapes=shapes).module()


KINDS = {
    "traced": torch.jit.trace,
    "scripted": lambda model, x: torch.jit.script(model),
    "frozen": lambda model, x: torch.jit.freeze(torch.jit.script(model)),
    "exported": exported,
    "fx": lambda model, x: torch.fx.symbolic_trace(model),
    "mapped": lambda model, x: Mapped(model),
    "compiled": lambda model, x: torch.compile(model, backend="eager"),
}


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 10))
    return nn.Sequential(model, nn.Linear(10, 10)).eval()


def test_what_follows_a_program_without_modes_has_its_own(plain):
    """Its train and eval raise: without care the dropout after it would go on."""
    model = nn.Sequential(exported(plain, images(20)[0]), nn.Dropout(0.9))
    found = evaluate(model)
    assert torch.equal(found.images["clean_correct"], evaluate(plain).images["clean_correct"])
    assert model[1].training

    class Raises(nn.Sequential):
        def eval(self):
            raise NotImplementedError("mine")

    with pytest.raises(NotImplementedError, match="mine"):
        evaluate(Raises(*plain))


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_model_in_another_form(kind, plain):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript
        other = KINDS[kind](plain, images(20)[0])
    expected, found = (evaluate(model).images for model in (plain, other))
    assert torch.equal(found["clean_correct"], expected["clean_correct"])
    assert torch.equal(found["broken_by"], expected["broken_by"])
    x, y = images(8)
    perturbed = attacks.pgd(other, x, y, epsilon=0.1, steps=2)
    torch.testing.assert_close(perturbed, attacks.pgd(plain, x, y, epsilon=0.1, steps=2))


def test_within_a_transform_of_torch_func():
    model, (x, y) = fitted(), images(4)
    expected = r"expected a call outside of torch\.func's transforms"
    calls = (
        lambda one: attacks.pgd(model, one[None], epsilon=0.1),
        lambda one: attacks.square(model, one[None], y[:1], epsilon=0.1, queries=2),
        lambda one: fastbandit.evaluate(model, x, y, **FAST) and one,
    )
    for call in calls:
        with pytest.raises(ValueError, match=expected):
            torch.func.vmap(call)(x)
    with pytest.raises(ValueError, match=expected):
        torch.func.grad(lambda one: attacks.fgsm(model, one, y, epsilon=0.1).sum())(x)


class Detached(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.detach())


class WithoutAutograd(Detached):
    @torch.no_grad()
    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("kind", [Detached, WithoutAutograd])
def test_a_model_without_gradients(kind):
    model = kind(fitted())
    with pytest.raises(ValueError, match="with a gradient for the images, got none"):
        evaluate(model)
    with pytest.raises(ValueError, match="with a gradient for the images, got none"):
        attacks.pgd(model, *images(4), epsilon=0.1)
    black_box = {"attacks": "square", "checks": {"images": 0}}
    assert evaluate(model, **black_box).robust == evaluate(fitted(), **black_box).robust


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: fitted().double(),
            r"float32 \[N, 1, 8, 8\].*torch.float64, model.float\(\)",
        ),
        (lambda: nn.Linear(3, 10), r"model: it fails on images float32 \[N, 1, 8, 8\]: Runtime"),
        (lambda: fitted().to("meta"), r"model: linear\.\w+: expected weights, got .* device meta"),
    ],
)
def test_a_model_that_cannot_take_the_images(model, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(model())


def test_images_made_on_a_model_of_ones_own():
    by_code = evaluate(fitted(), transfer_from="_centroids:fitted", transfer_attacks="apgd-ce")
    (found,) = by_code.result["transfer"]
    assert found["from"]["code"] == "_centroids:fitted"
    assert found["attacks"][0]["describe"].endswith("; made on _centroids:fitted")
    # On itself they are those of the attack.
    alone = evaluate(fitted(), attacks="apgd-ce").robust
    assert found["attacks"][0]["accuracy"] == alone
    with pytest.raises(ConfigError, match="_centroids has no 'fited'; did you mean fitted"):
        evaluate(fitted(), transfer_from="_centroids:fited")
    with pytest.raises(ConfigError, match="transfer_from: it fails on images float32"):
        evaluate(fitted(), transfer_from="_centroids:misfit")
