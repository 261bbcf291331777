"""pgd_step_, pgd_step_normalize_, random_start, the input of a step, and a whole PGD attack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops

STEP, EPSILON = 2 / 255, 8 / 255
BATCHES = [256, 2048]
LARGE = 20480  # 1 GB of float32 in four tensors; on a GPU only


def eager_step(delta: Tensor, grad: Tensor, image: Tensor) -> Tensor:
    """As attack libraries write it, with the clamp on the image."""
    delta = torch.clamp(delta + STEP * grad.sign(), -EPSILON, EPSILON)
    return torch.clamp(image + delta, 0, 1) - image


def eager_step_(delta: Tensor, grad: Tensor, image: Tensor) -> None:
    delta.copy_(eager_step(delta, grad, image))


def images(batch: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, 3, 32, 32)
    delta = (torch.rand(shape, generator=generator) * 2 - 1) * EPSILON
    grad = torch.randn(shape, generator=generator)
    image = torch.rand(shape, generator=generator)
    return tuple(tensor.to(device, dtype) for tensor in (delta, grad, image))  # type: ignore


@pytest.mark.parametrize("rival", ["fastbandit", "eager", "torch.compile", "copy"])
@pytest.mark.parametrize("batch", [*BATCHES, LARGE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_pgd_step(measure: Callable[..., None], device, dtype, batch, rival):
    if batch == LARGE and device.type == "cpu":
        pytest.skip("for a GPU")
    delta, grad, image = images(batch, device, dtype)
    moved = 4 * delta.numel() * delta.element_size()  # three tensors read, one written
    if rival == "copy":  # the same bytes, half read and half written
        source = torch.rand(2 * delta.numel(), device=device).to(dtype)
        target = torch.empty_like(source)
        call: Callable[[], Any] = lambda: target.copy_(source)  # noqa: E731
    elif rival == "fastbandit":
        call = lambda: ops.pgd_step_(  # noqa: E731
            delta, grad, image, step_size=STEP, epsilon=EPSILON, lower=0.0, upper=1.0
        )
    else:
        step = torch.compile(eager_step_) if rival == "torch.compile" else eager_step_
        call = lambda: step(delta, grad, image)  # noqa: E731
    goals = {"torch.compile": 1.5, "eager": 6.0, "copy": 1 / 1.3}
    measure(
        call,
        rival=rival,
        group=f"pgd_step_ {batch} x 3 x 32 x 32 {str(dtype)[6:]}",
        device=device,
        goals=goals if dtype == torch.float32 else {},
        moved=moved,
        shape=list(delta.shape),
        dtype=str(dtype),
    )


@pytest.mark.parametrize("rival", ["fastbandit", "eager", "torch.compile"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_pgd_step_normalize(measure, device, layout, rival):
    delta, grad, image = (
        tensor.contiguous(memory_format=layout) for tensor in images(256, device, torch.float32)
    )
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device=device)
    std = torch.tensor([0.2470, 0.2435, 0.2616], device=device)

    def eager(delta: Tensor, grad: Tensor, image: Tensor) -> Tensor:
        eager_step_(delta, grad, image)
        normalized = (image + delta - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return normalized.to(torch.bfloat16, memory_format=layout)

    if rival == "fastbandit":
        call: Callable[[], Any] = lambda: ops.pgd_step_normalize_(  # noqa: E731
            delta,
            grad,
            image,
            mean,
            std,
            step_size=STEP,
            epsilon=EPSILON,
            lower=0.0,
            upper=1.0,
            out_dtype=torch.bfloat16,
            memory_format=layout,
        )
    else:
        step = torch.compile(eager) if rival == "torch.compile" else eager
        call = lambda: step(delta, grad, image)  # noqa: E731
    name = str(layout).removeprefix("torch.")
    measure(
        call,
        rival=rival,
        group=f"pgd_step_normalize_ 256 x 3 x 32 x 32 to bfloat16 {name}",
        device=device,
        moved=18 * delta.numel(),
        shape=list(delta.shape),
        dtype="float32 -> bfloat16",
    )


@pytest.mark.parametrize("rival", ["fastbandit", "torch.rand and scaling", "uniform_"])
@pytest.mark.parametrize("batch", BATCHES)
def test_random_start(measure, device, batch, rival):
    _, _, image = images(batch, device, torch.float32)
    calls: dict[str, Callable[[], Any]] = {
        "fastbandit": lambda: ops.random_start(image, epsilon=EPSILON, seed=1),
        "torch.rand and scaling": lambda: torch.rand_like(image).mul_(2 * EPSILON).sub_(EPSILON),
        "uniform_": lambda: torch.empty_like(image).uniform_(-EPSILON, EPSILON),
    }
    measure(
        calls[rival],
        rival=rival,
        group=f"random_start {batch} x 3 x 32 x 32 float32",
        device=device,
        goals={"torch.rand and scaling": 8.0},
        moved=4 * image.numel(),
        shape=list(image.shape),
        dtype="float32",
    )


@pytest.mark.parametrize("rival", ["fastbandit", "our single ops", "eager", "torch.compile"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_input(measure, device, layout, rival):
    """Crop, flip, cutout, random start and normalisation of 256 out of 10,000 images."""
    generator = torch.Generator().manual_seed(0)
    shape = (10_000, 3, 32, 32)
    data = torch.randint(0, 256, shape, generator=generator).to(torch.uint8).to(device)
    limits = (9, 9, 2, 32, 32)
    columns = [torch.randint(0, n, shape[:1], generator=generator) for n in limits]
    draws = torch.stack(columns, 1).to(device)
    ids = torch.randint(0, shape[0], (256,), generator=generator).to(device)
    mean = torch.tensor([0.4914, 0.4822, 0.4465], device=device)
    std = torch.tensor([0.2470, 0.2435, 0.2616], device=device)
    line = torch.arange(32, device=device)
    padded = F.pad(data, [4] * 4)  # once, as a loader would
    changes = {"draws": draws, "crop_padding": 4, "flip": True, "cutout_length": 8}
    bounds = {"epsilon": EPSILON, "lower": 0.0, "upper": 1.0}

    def eager(data: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """In few operations: one gather for crop and flip, one mask, torch's own numbers."""
        drawn = draws[ids]
        rows = line + drawn[:, :1]
        flipped = torch.where(drawn[:, 2:3].bool(), 31 - line, line)
        across = flipped + drawn[:, 1:2]
        image = padded[ids[:, None, None], :, rows[:, :, None], across[:, None, :]]
        image = image.permute(0, 3, 1, 2).float().div_(255)
        down = (line - drawn[:, 3:4] + 4)[:, None, :, None]
        right = (line - drawn[:, 4:5] + 4)[:, None, None, :]
        hole = (down >= 0) & (down < 8) & (right >= 0) & (right < 8)
        image = image.masked_fill(hole, 0.0).contiguous(memory_format=layout)
        delta = torch.rand_like(image).mul_(2 * EPSILON).sub_(EPSILON)
        delta = torch.clamp(image + delta, 0, 1) - image
        point = (image + delta - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        return image, delta, point

    def single() -> tuple[Tensor, Tensor, Tensor]:
        image = ops.augment_images(data, ids, memory_format=layout, **changes)
        delta = ops.random_start(image, seed=1, index=ids, **bounds)
        return image, delta, (image + delta - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)

    compiled = torch.compile(eager)
    calls: dict[str, Callable[[], Any]] = {
        "fastbandit": lambda: ops.augment_start_normalize(
            data, ids, mean, std, seed=1, memory_format=layout, **bounds, **changes
        ),
        "our single ops": single,
        "eager": lambda: eager(data, ids),
        "torch.compile": lambda: compiled(data, ids),
    }
    elements = 256 * 3 * 32 * 32
    measure(
        calls[rival],
        rival=rival,
        group=f"input of a step 256 x 3 x 32 x 32 {str(layout).removeprefix('torch.')}",
        device=device,
        moved=13 * elements,  # a byte read, three float32 written
        shape=[256, 3, 32, 32],
        dtype="uint8 -> float32",
    )


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 10),
    ).eval()


@pytest.mark.parametrize("rival", ["fastbandit", "torchattacks", "same loop in eager"])
@pytest.mark.parametrize("batch", [50, 512])
def test_whole_attack(measure, device, batch, rival):
    """PGD-10 on images of 8 x 8 and two small convolutions: the step itself weighs here."""
    model = small_net().to(device).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 1, 8, 8, generator=generator).to(device)
    label = torch.randint(0, 10, (batch,), generator=generator).to(device)

    def gradient(delta: Tensor) -> Tensor:
        x = (image + delta).requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(x), label), x)[0]

    if rival == "torchattacks":
        torchattacks = pytest.importorskip("torchattacks")
        attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP, steps=10)
        call: Callable[[], Any] = lambda: attack(image, label)  # noqa: E731
    elif rival == "fastbandit":

        def call() -> None:
            delta = ops.random_start(image, epsilon=EPSILON, seed=0, lower=0.0, upper=1.0)
            for _ in range(10):
                ops.pgd_step_(
                    delta,
                    gradient(delta),
                    image,
                    step_size=STEP,
                    epsilon=EPSILON,
                    lower=0.0,
                    upper=1.0,
                )
    else:

        def call() -> None:
            delta = torch.empty_like(image).uniform_(-EPSILON, EPSILON)
            delta = torch.clamp(image + delta, 0, 1) - image
            for _ in range(10):
                delta = eager_step(delta, gradient(delta), image)

    measure(
        call,
        rival=rival,
        group=f"PGD-10 on a small net, {batch} x 1 x 8 x 8",
        device=device,
        shape=list(image.shape),
        dtype="float32",
    )
