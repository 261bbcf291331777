"""One step of adversarial training of a sampled path: what a search spends its time on.

Each rival runs the same path with the same weights on the same images and random start:

``authors' style``   contiguous; F.conv2d for everything, dense Gabor filters; the attack calls
                     ``loss.backward()``, which computes weight gradients that nobody reads
``eager``            channels-last; F.conv2d, the Gabor filters as a channel sum and a convolution;
                     the attack asks for the gradient of the input alone; multi-tensor optimiser
``torch.compile``    the model of ``eager``, compiled as one graph
``eager in a graph``  on a GPU: the whole step of ``eager``, recorded by hand as a CUDA graph
``fastbandit``       what ``python -m fastbandit.search`` runs
``single ops``       the same with ReLU, depthwise and 1x1 convolution and batch norm one by one
``torch's batch norm``  that without the batch-norm kernel of this package

On a GPU, where neither kernel of the last two is used, they are left out; a call is then
STEPS steps, and ``fastbandit`` replays all but the first of them as a CUDA graph, as in an epoch.

A test checks that the first three compute the same losses to rounding. FASTBANDIT_BENCH_BATCH is
the number of images, 128. On a machine that does other work, one thread and its own time:

    OMP_NUM_THREADS=1 pytest benchmarks/bench_search_step.py --benchmark-timer time.process_time
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMOKE
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops
from fastbandit.nn import operations
from fastbandit.nn.blocks import DepthwiseConv2d, DilatedConv2d, ReluConvBN, Residual
from fastbandit.nn.denoise import Denoise
from fastbandit.nn.gabor import Gabor
from fastbandit.nn.norm import BatchNorm2d, reset_running_stats
from fastbandit.nn.supernet import Supernet
from fastbandit.space import get
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, Engine, Graphs, Precision, train_epoch

AUTHORS, EAGER, COMPILED, OURS = "authors' style", "eager", "torch.compile", "fastbandit"
GRAPHED = "eager in a graph"
SINGLE, TORCH_NORM = "single ops", "torch's batch norm"  # ours but for something
RIVALS = [OURS, AUTHORS, EAGER, GRAPHED, COMPILED, SINGLE, TORCH_NORM]
batch_norm = importlib.import_module("fastbandit.ops.batch_norm")
LEAST_ELEMENTS = batch_norm._LEAST_ELEMENTS
max_pool2d = importlib.import_module("fastbandit.ops.max_pool2d")
LEAST_OUTPUTS = max_pool2d._LEAST_OUTPUTS
BLOCK = importlib.import_module("fastbandit.ops.conv_block")
REDUCE = importlib.import_module("fastbandit.ops.factorized_reduce")
SERVES = BLOCK.serves


def never(*_: Any) -> bool:
    """In place of SERVES: layers are computed one by one, as they are written."""
    return False


# Small enough in a smoke run that compiling and checking take seconds.
BATCH = int(os.environ.get("FASTBANDIT_BENCH_BATCH", "8" if SMOKE else "128"))
CHANNELS, SIZE, RATE = (4, 16, 0.025) if SMOKE else (16, 32, 0.025)
STEPS = 2 if SMOKE else 30  # of a call on a GPU
NODES, CELL_TYPES = (2, 2) if SMOKE else (4, 6)
GOALS = {
    "robust9-light": {AUTHORS: 3.0, EAGER: 2.0, COMPILED: 2.0},
    "robust9": {AUTHORS: 1.5, EAGER: 1.2, COMPILED: 1.2},
}
THREATS = {
    "FGSM": ThreatModel(epsilon="8/255", steps=1, bn_mode="train"),
    "PGD-7": ThreatModel(epsilon="8/255", steps=7, step_size="2/255", bn_mode="train"),
}


# --- the same layers in plain PyTorch -------------------------------------------------------------


class PlainDepthwise(DepthwiseConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(
            F.relu(x),
            self.weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            groups=x.shape[1],
        )


class PlainDilated(DilatedConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.relu(x), self.weight, None, self.stride, self.padding, self.dilation)


class PlainGabor(Gabor):
    """Filters and convolution in single PyTorch operations; ``dense``: as the authors have it."""

    dense = True

    def forward(self, x: Tensor) -> Tensor:
        theta, sigma, gamma, wavelength, psi = (p[:, None, None] for p in self.filter_parameters())
        half = self.kernel_size // 2
        ticks = torch.arange(-half, half + 1, dtype=x.dtype, device=x.device)
        rows, columns = ticks[:, None], ticks[None, :]
        across = rows * theta.cos() + columns * theta.sin()
        along = columns * theta.cos() - rows * theta.sin()
        envelope = torch.exp((across**2 + (gamma * along) ** 2) / (-2 * sigma**2))
        bank = (envelope * torch.cos(2 * torch.pi * across / wavelength + psi))[:, None]
        if self.dense:
            return F.conv2d(x, bank.expand(-1, x.shape[1], -1, -1), padding=half)
        return F.conv2d(x.sum(1, keepdim=True), bank, padding=half)


class PlainChannelSumGabor(PlainGabor):
    dense = False


class PlainBatchNorm(BatchNorm2d):
    """torch.nn.BatchNorm2d with a momentum: its cumulative average reads a count back from the
    device at every forward, where a compiler has to stop too."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x)


def plain_block(x: Any, norm: nn.Module, pointwise: Tensor, depthwise: nn.Module | None) -> Tensor:
    x = x if isinstance(x, Tensor) else torch.cat(x, 1)
    return norm(F.conv2d(F.relu(x) if depthwise is None else depthwise(x), pointwise))


class PlainReluConvBN(ReluConvBN):
    def forward(self, x: Any) -> Tensor:
        return plain_block(x, self.bn, self.weight, None)


class PlainDilConv(operations.DilConv):
    def forward(self, x: Tensor) -> Tensor:
        return plain_block(x, self.bn, self.pointwise, self.depthwise)


class PlainSepConvM(operations.SepConvM):
    def forward(self, x: Tensor) -> Tensor:
        x = plain_block(x, self.bn1, self.pointwise1, self.depthwise1)
        return plain_block(x, self.bn2, self.pointwise2, self.depthwise2)


class PlainDenoise(Denoise):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        flat = x.reshape(n, c, h * w)
        if c <= h * w:
            return (torch.bmm(torch.bmm(flat, flat.mT), flat) / (c * h * w)).view(n, c, h, w)
        return (torch.bmm(flat, torch.bmm(flat.mT, flat)) / (c * h * w)).view(n, c, h, w)


def in_plain_pytorch(model: nn.Module, *, dense: bool) -> nn.Module:
    plain: dict[type[nn.Module], type[nn.Module]] = {
        DepthwiseConv2d: PlainDepthwise,
        DilatedConv2d: PlainDilated,
        Gabor: PlainGabor if dense else PlainChannelSumGabor,
        BatchNorm2d: PlainBatchNorm,
        Denoise: PlainDenoise,
        ReluConvBN: PlainReluConvBN,
        operations.DilConv: PlainDilConv,
        operations.SepConvM: PlainSepConvM,
    }
    for module in model.modules():
        module.__class__ = plain.get(type(module), type(module))
        if isinstance(module, PlainBatchNorm):
            module.momentum = 0.1
    return model


# --- the rivals' steps ----------------------------------------------------------------------------


def balanced_path(arms: int, rows: int) -> list[int]:
    """Every operation as often as every other, in random places."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(1))
    return [int(place) % arms for place in order]


class Task:
    """A path of ``space`` with one rival's layers, a batch, and that rival's training step."""

    def __init__(
        self,
        space: str,
        threat: ThreatModel,
        rival: str,
        device: torch.device,
        *,
        precision: Precision = "float32",
        graphs: Graphs | None = None,
        compiler: dict[str, Any] | None = None,
    ) -> None:
        """graphs: what records our steps; compiler: options of torch.compile."""
        self.threat, self.rival, self.device = threat, rival, device
        torch.manual_seed(0)
        searched = get(space, nodes=NODES, cell_types=CELL_TYPES)
        model = Supernet(searched, in_channels=3, classes=10, channels=CHANNELS)
        for module in model.modules():  # a block that starts as the identity would hide its errors
            if isinstance(module, Residual):
                nn.init.constant_(module.bn.weight, 0.3)
        model.set_path(balanced_path(model.arms, model.rows))
        self.layout = torch.contiguous_format if rival == AUTHORS else torch.channels_last
        if rival not in (OURS, SINGLE, TORCH_NORM):
            in_plain_pytorch(model, dense=rival == AUTHORS)
        model.to(device).to(memory_format=self.layout)  # type: ignore[call-overload]
        self.model = model
        self.modules = list(model.path_modules())
        self.parameters = list(model.path_parameters())
        if graphs is None and rival == OURS and device.type == "cuda":
            graphs = Graphs("yes", device)
        self.engine = Engine(precision, graphs)
        # A graph takes the rate of a fused step from a tensor, and one launch is the fastest.
        fused = device.type == "cuda" and rival in (OURS, GRAPHED)
        self.optimizer = torch.optim.SGD(
            self.parameters,
            lr=RATE,
            momentum=0.9,
            weight_decay=3e-4,
            fused=fused,
            foreach=rival != AUTHORS and not fused,
        )
        self.batches = 1
        generator = torch.Generator().manual_seed(2)
        x = torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
        y = torch.randint(0, 10, (BATCH,), generator=generator)
        self.x = x.to(device).contiguous(memory_format=self.layout)
        self.y, self.ids = y.to(device), torch.arange(BATCH, device=device)
        self.start = ops.random_start(
            self.x, epsilon=threat.epsilon_value, seed=0, index=self.ids, lower=0.0, upper=1.0
        )
        self.forward: Callable[[Tensor], Tensor] = model
        if rival == COMPILED:
            torch._dynamo.reset()
            # A smoke run asks whether it is one graph; its kernels take minutes to compile.
            options = {"backend": "aot_eager"} if SMOKE else compiler or {}
            self.forward = torch.compile(model, fullgraph=True, **options)  # type: ignore
        self.replay: Callable[[], None] | None = None
        self.loss = torch.zeros((), device=device)
        self.cost = Cost()
        model.train()
        reset_running_stats(self.modules)

    def take_random_path(self, generator: torch.Generator) -> None:
        """Train another path from here on."""
        path = torch.randint(self.model.arms, (self.model.rows,), generator=generator)
        self.model.set_path(path)
        self.modules = list(self.model.path_modules())
        self.parameters = list(self.model.path_parameters())
        self.optimizer.param_groups[0]["params"] = self.parameters
        reset_running_stats(self.modules)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batch, as often as a call has steps: what train_epoch asks of a loader."""
        for _ in range(self.batches):
            yield self.x, self.y, self.ids

    def steps(self, number: int) -> None:
        """So many steps, as one epoch where they are ours."""
        if self.rival == OURS:
            self.batches = number
            self.step()
            return
        for _ in range(number):
            self.step()

    def record(self) -> None:
        """The step of plain PyTorch as a CUDA graph, which is replayed from now on."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                self.plain_step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            self.loss = self.plain_step()
        self.replay = graph.replay

    def step(self) -> float | Tensor:
        """The loss on the attacked images, before the optimiser's step."""
        BLOCK.serves = REDUCE.serves = SERVES if self.rival == OURS else never
        ours = self.rival in (OURS, SINGLE, TORCH_NORM)
        max_pool2d._LEAST_OUTPUTS = LEAST_OUTPUTS if ours else 1 << 62  # for all layers of a rival
        if ours:
            least = 1 << 62 if self.rival == TORCH_NORM else LEAST_ELEMENTS
            batch_norm._LEAST_ELEMENTS = least
            return train_epoch(
                self.model,
                self,
                0,
                self.optimizer,
                self.threat,
                seed=0,
                cost=self.cost,
                grad_clip=5.0,
                modules=self.modules,
                parameters=self.parameters,
                engine=self.engine,
            ).loss
        if self.rival == GRAPHED and self.device.type == "cuda":
            if self.replay is None:
                self.record()
            assert self.replay is not None
            self.replay()
            return self.loss
        return self.plain_step()

    def loss_at(self, point: Tensor) -> Tensor:
        with self.engine.autocast(self.device):
            return F.cross_entropy(self.forward(point), self.y)

    def plain_step(self) -> Tensor:
        """The step in plain PyTorch, without a read from the device."""
        delta, threat = self.start.clone(), self.threat
        for _ in range(threat.steps):
            if self.rival == AUTHORS:
                delta.requires_grad_()
                self.optimizer.zero_grad()
                self.loss_at(self.x + delta).backward()
                gradient = delta.grad
            else:
                for parameter in self.parameters:
                    parameter.requires_grad_(False)
                point = (self.x + delta).requires_grad_()
                (gradient,) = torch.autograd.grad(self.loss_at(point), point)
                for parameter in self.parameters:
                    parameter.requires_grad_()
            with torch.no_grad():
                delta = delta.detach() + threat.step_value * gradient.sign()
                delta = delta.clamp(-threat.epsilon_value, threat.epsilon_value)
                delta = (self.x + delta).clamp(0, 1) - self.x
        self.optimizer.zero_grad()
        loss = self.loss_at(self.x + delta)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 5.0)
        self.optimizer.step()
        return loss.detach()


# --- what is not time -----------------------------------------------------------------------------


def profiled(function: Callable[[], Any], device: torch.device) -> dict[str, int | None]:
    """Kernels (operations that call no other one) and peak memory of one call, in bytes."""
    cuda = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(
        activities=[activity.CUDA if cuda else activity.CPU], profile_memory=not cuda
    ) as profile:
        if cuda:
            torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) if cuda else 0
        function()
        if cuda:
            torch.cuda.synchronize(device)
    if cuda:
        kernels = sum(event.device_type.name == "CUDA" for event in profile.events())
        return {"kernels": kernels, "peak_bytes": torch.cuda.max_memory_allocated(device) - before}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e["args"] for e in events if e.get("name") == "[memory]"]
    total = [e["Total Allocated"] for e in memory]
    # The counter starts at 0 with the profiler; what is freed of older tensors makes it negative.
    return {
        "kernels": sum(
            not event.cpu_children and "::" in event.name and not event.name.endswith("empty")
            for event in profile.events()
        ),
        "peak_bytes": max(total) if total else None,
    }


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("attack", list(THREATS))
@pytest.mark.parametrize("space", list(GOALS))
def test_step(measure: Callable[..., None], benchmark: Any, device, space, attack, rival):
    cuda = device.type == "cuda"
    if cuda and rival in (SINGLE, TORCH_NORM):
        pytest.skip("on a GPU the same as fastbandit")
    if rival == GRAPHED and not cuda:
        pytest.skip("a CUDA graph needs a GPU")
    steps = STEPS if cuda else 1
    task = Task(space, THREATS[attack], rival, device)
    task.step()  # the first one plans, compiles and makes the optimiser's state
    counts = profiled(task.step, device)
    if cuda:
        task.steps(3)  # the second one records
    if rival == COMPILED:
        counts["kernels"] = None  # its fused loops are not events of the profiler
    measure(
        (lambda: task.steps(steps)) if cuda else task.step,
        rival=rival,
        group=f"{f'{steps} {attack} steps' if cuda else f'{attack} step'} of {space}, "
        f"{BATCH} x 3 x {SIZE} x {SIZE}, C = {CHANNELS}",
        device=device,
        goals=GOALS[space],
        shape=[BATCH, 3, SIZE, SIZE],
        dtype="float32",
        rounds=3 if cuda or attack != "FGSM" else 7,
        steps=steps,
        **counts,
    )
    benchmark.extra_info["images_per_second"] = BATCH * steps / benchmark.stats.stats.median


@pytest.mark.parametrize("space", list(GOALS))
def test_all_compute_the_same(device, space):
    threat = ThreatModel(epsilon="8/255", steps=2, step_size="2/255", bn_mode="train")
    losses = {}
    for rival in (OURS, AUTHORS, EAGER):
        task = Task(space, threat, rival, device)
        losses[rival] = [float(task.step()) for _ in range(3)]
    for rival in (AUTHORS, EAGER):
        assert losses[rival] == pytest.approx(losses[OURS], rel=1e-3), losses
