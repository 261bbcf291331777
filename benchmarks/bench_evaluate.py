"""A whole test set under PGD-20: this package's evaluation and torchattacks on the same network.

    pytest benchmarks/bench_evaluate.py --benchmark-timer=time.process_time

The network is one of the space robust9-light, drawn at random, and trained for some epochs by FGSM
on the digits (minutes). FASTBANDIT_BENCH_MODEL names a model file to time instead,
FASTBANDIT_BENCH_ROUNDS a number of rounds other than 3. On a machine
that does other work too, the time of the process is what can be compared.

Each entry ends with the number of images that PGD-20 leaves standing. Entries that are ours in part
say what each part is worth:

- torchattacks, plain ops: the network as others would have it, contiguous, with torch's own
  depthwise convolution after a ReLU;
- torchattacks, our kernels: the network as this package builds it;
- torchattacks, our kernels and layout: and channels-last;
- every step: our loop, which takes no weight gradient, on the frozen network, all steps of all;
- no cycles: images are dropped as they fall, but not when their iterate repeats;
- fastbandit: what ``python -m fastbandit.evaluate --attacks pgd-20`` does;
- fastbandit, FGSM first: as ``--attacks fgsm,pgd-20``, whose worst case is at least as low.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import conftest
import numpy as np
import pytest
import torch
from conftest import OURS, SMOKE
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops, space
from fastbandit._intervals import wilson
from fastbandit.attacks import _pgd
from fastbandit.attacks._model import Oracle
from fastbandit.data import Loader, load, statistics
from fastbandit.genotype import Genotype
from fastbandit.models import Architecture, load_model
from fastbandit.nn.frozen import freeze
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, cosine, train_epoch

EPSILON, STEP, STEPS, BATCH = 0.2, 0.02, 20, 256
EPOCHS = 1 if SMOKE else 10
ROUNDS = 1 if SMOKE else int(os.environ.get("FASTBANDIT_BENCH_ROUNDS", "3"))


@pytest.fixture(scope="module")
def network(device: torch.device) -> nn.Module:
    named = os.environ.get("FASTBANDIT_BENCH_MODEL")
    if named:
        return load_model(Path(named)).network.to(device)
    torch.manual_seed(0)
    found, generator = space.get("robust9-light"), np.random.default_rng(0)
    choices = [int(generator.integers(9)) for _ in range(found.rows)]
    genotype = Genotype.from_choices(found, choices, macro={"channels": 4, "layers": 6})
    train = load("digits").train
    mean, std = statistics(train)
    made = Architecture(1, 10, 4, 1 if SMOKE else 6).build(genotype, mean=mean, std=std)
    made.to(device, memory_format=torch.channels_last)
    loader = Loader(
        train,
        range(256 if SMOKE else len(train)),
        batch_size=128,
        seed=0,
        shuffle=True,
        device=device,
    )
    optimizer = torch.optim.SGD(made.parameters(), lr=0.05, momentum=0.9, weight_decay=3e-4)
    threat = ThreatModel(epsilon="0.2", steps=1, bn_mode="train")
    for epoch in range(EPOCHS):
        optimizer.param_groups[0]["lr"] = cosine(epoch, EPOCHS, 0.05)
        train_epoch(made, loader, epoch, optimizer, threat, seed=0, cost=Cost(), grad_clip=5.0)
    return made.eval()


@pytest.fixture(scope="module")
def images(device: torch.device) -> tuple[Tensor, Tensor]:
    test = load("digits").test
    n = 64 if SMOKE else len(test)
    return (test.images[:n].float() / 255).to(device), test.labels[:n].to(device)


@contextmanager
def plain_ops() -> Iterator[None]:
    """torch's own convolution in place of the depthwise kernel."""
    ours = ops.depthwise_conv2d

    def plain(
        x: Tensor,
        weight: Tensor,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        relu: bool = False,
    ) -> Tensor:
        return F.conv2d(
            F.relu(x) if relu else x, weight, None, stride, padding, dilation, x.size(1)
        )

    ops.depthwise_conv2d = plain
    try:
        yield
    finally:
        ops.depthwise_conv2d = ours


def theirs(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Images that torchattacks' PGD-20 leaves standing."""
    torchattacks = pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP, steps=STEPS, random_start=True)
    standing = 0
    for part, labels in zip(x.split(BATCH), y.split(BATCH), strict=True):
        adversarial = attack(part, labels)
        with torch.no_grad():
            standing += int((model(adversarial).argmax(1) == labels).sum())
    return standing


def ours(
    exact: nn.Module,
    fast: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    drop: bool = True,
    first_fgsm: bool = False,
) -> int:
    """The same by our loop, as the command runs it."""
    pgd = ThreatModel(epsilon=str(EPSILON), step_size=str(STEP), steps=STEPS)
    fgsm = ThreatModel(epsilon=str(EPSILON), steps=1, random_start=False)
    with Oracle(fast, batch_size=BATCH, exact=exact) as oracle:
        rows = torch.arange(len(x), device=x.device)
        if drop:
            rows = (oracle.logits(x, exact=True).argmax(1) == y).nonzero()[:, 0]
        for threat in (fgsm, pgd) if first_fgsm else (pgd,):
            kept = []
            for part in rows.split(4 * BATCH):
                found = _pgd.pgd_loop(
                    oracle, x[part], y[part], threat, seed=0, index=part, stop_early=drop
                )
                kept.append(part[~found.success])
            rows = torch.cat(kept)
    return len(rows)


RIVALS = (
    OURS,
    "fastbandit, FGSM first",
    "no cycles",
    "every step",
    "torchattacks, our kernels and layout",
    "torchattacks, our kernels",
    "torchattacks, plain ops",
)


@pytest.mark.parametrize("rival", RIVALS)
def test_pgd20_of_a_test_set(
    benchmark: Any,
    device: torch.device,
    network: nn.Module,
    images: tuple[Tensor, Tensor],
    rival: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = images
    benchmark.group = f"PGD-{STEPS} of {len(x)} images [{device.type}]"
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    last = "our kernels" not in rival or "layout" in rival
    layout = torch.channels_last if last and "plain" not in rival else torch.contiguous_format
    model = copy.deepcopy(network).to(memory_format=layout)
    fast = freeze(copy.deepcopy(model))
    if rival == "no cycles":
        monkeypatch.setattr(
            _pgd._Iterates, "repeats", lambda self, d: d.new_zeros(len(d), dtype=torch.bool)
        )

    def run() -> int:
        if rival == "torchattacks, plain ops":
            with plain_ops():
                return theirs(model, x, y)
        if rival.startswith("torchattacks"):
            return theirs(model, x, y)
        return ours(
            model, fast, x, y, drop=rival != "every step", first_fgsm=rival.endswith("first")
        )

    try:
        # On a GPU the first time through plans a convolution for each size of batch.
        warm = 1 if device.type == "cuda" else 0
        standing = benchmark.pedantic(run, rounds=ROUNDS, iterations=1, warmup_rounds=warm)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(
        rival=rival,
        device=conftest.device_name(device),
        threads=1 if device.type == "cpu" else threads,
        torch=str(torch.__version__),
        cuda=torch.version.cuda,
        commit=conftest.COMMIT,
        goals={"torchattacks, plain ops": 3.0} if rival == OURS and device.type == "cpu" else {},
        bytes=None,
        images=len(x),
        batch=BATCH,
        epsilon=EPSILON,
        step=STEP,
        standing=standing,
        interval=list(wilson(standing, len(x))),
    )
