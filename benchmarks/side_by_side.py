"""Are small networks trained faster side by side than one after the other?

In the first rung of a tournament many small networks are trained alone, and a step of such a
network is bound by the calls of its operations. Networks of different architectures can share a
call where they have the same operation on an edge: n depthwise convolutions are one of n C
channels, n 1x1 convolutions are one with n groups (or a batched matrix product), n batch norms are
one of n C channels. All of it is exact up to rounding.

This measures a forward and a backward pass of n operations alone and of one grouped operation, in
training mode, at the widths and sizes of the embedded digits, and from that what the rung's 16
random networks would gain on their edges: of 16 networks few share an operation. Concatenation of
the inputs and cutting of the outputs are counted, since neighbours on one edge are others on the
next. Each ratio is the median of ratios of samples that are taken in turn, in processor time of
one thread, so that another program on the machine disturbs both sides alike.

    python benchmarks/side_by_side.py [--rounds 21]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbandit import ops, space
from fastbandit.nn.norm import BatchNorm2d
from fastbandit.nn.operations import DilConv, Pool, SepConvM, make

NETWORKS = 16
OPERATIONS = ("max_pool_3x3", "avg_pool_3x3", "dil_conv_3x3", "sep_conv_m_3x3", "sep_conv_m_5x5")
SIZES = {8: 8, 16: 4, 32: 2}  # channels: height and width, as in a search on the digits


def batch_norm(alone: list[nn.Module], name: str, channels: int) -> BatchNorm2d:
    """The batch norms of that name as one of all their channels."""
    grouped = BatchNorm2d(len(alone) * channels)
    for kind, tensors in (("weight", []), ("bias", [])):
        for module in alone:
            tensors.append(getattr(getattr(module, name), kind).detach())
        getattr(grouped, kind).data.copy_(torch.cat(tensors))
    return grouped


class Grouped(nn.Module):
    """Operations of one kind side by side: a map of n C channels from one of n C channels."""

    def __init__(self, alone: list[nn.Module], channels: int) -> None:
        super().__init__()
        self.count, first = len(alone), alone[0]
        self.pool = ""
        self.blocks = nn.ModuleList()
        if isinstance(first, Pool):
            self.pool = "max" if first.maximum else "avg"
            self.norm = batch_norm(alone, "bn", channels)
            return
        assert isinstance(first, DilConv | SepConvM)
        names = (
            [("depthwise", "pointwise", "bn")]
            if isinstance(first, DilConv)
            else [(f"depthwise{i}", f"pointwise{i}", f"bn{i}") for i in (1, 2)]
        )
        for depthwise, pointwise, norm in names:
            block = nn.Module()
            one = getattr(first, depthwise)
            block.padding, block.dilation = one.padding, one.dilation
            block.depthwise = nn.Parameter(
                torch.cat([getattr(m, depthwise).weight.detach() for m in alone])
            )
            block.pointwise = nn.Parameter(
                torch.cat([getattr(m, pointwise).detach() for m in alone])
            )
            block.norm = batch_norm(alone, norm, channels)
            self.blocks.append(block)

    def forward(self, x: Tensor) -> Tensor:
        if self.pool:
            pool = ops.max_pool2d if self.pool == "max" else ops.avg_pool2d
            return self.norm(pool(x, 1))
        for block in self.blocks:
            y = ops.depthwise_conv2d(
                x, block.depthwise, stride=1, padding=block.padding, dilation=block.dilation,
                relu=True,
            )  # fmt: skip
            x = block.norm(self.pointwise(y, block.pointwise))
        return x

    def pointwise(self, y: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(y, weight, groups=self.count)


class Batched(Grouped):
    """The 1x1 convolutions as one batched matrix product."""

    def pointwise(self, y: Tensor, weight: Tensor) -> Tensor:
        n, _, height, width = y.shape
        rows = y.permute(0, 2, 3, 1).reshape(n * height * width, self.count, -1).transpose(0, 1)
        square = weight.view(self.count, -1, weight.shape[1]).transpose(1, 2)
        found = torch.bmm(rows, square).transpose(0, 1)
        return found.reshape(n, height, width, -1).permute(0, 3, 1, 2)


def sides(
    name: str, count: int, channels: int, batch: int, kind: type[Grouped]
) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """A step of each operation alone, and of all grouped: outputs, gradients of the inputs."""
    torch.manual_seed(0)
    size = SIZES[channels]
    alone = [make(name, channels) for _ in range(count)]
    shape = (batch, channels, size, size)
    inputs = [
        torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
        for _ in range(count)
    ]
    wanted = [torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(count)]
    grouped = kind(alone, channels)

    def apart() -> list[Tensor]:
        found = []
        for module, x, gradient in zip(alone, inputs, wanted, strict=True):
            y = module(x)
            own = torch.autograd.grad(y, [x, *module.parameters()], gradient)
            found += [y.detach(), own[0]]
        return found

    def together() -> list[Tensor]:
        outputs = grouped(torch.cat(inputs, 1)).chunk(count, 1)
        own = torch.autograd.grad(outputs, [*inputs, *grouped.parameters()], wanted)
        return [t for pair in zip(outputs, own[:count], strict=True) for t in pair]

    return apart, together


def ratio(apart: Callable[[], object], together: Callable[[], object], rounds: int) -> float:
    """How many times faster together: the median of ratios of neighbouring samples."""

    def sample(call: Callable[[], object], repeats: int) -> int:
        started = time.process_time_ns()
        for _ in range(repeats):
            call()
        return time.process_time_ns() - started

    for call in (apart, together):
        sample(call, 3)
    repeats = max(1, 4_000_000 // max(sample(apart, 1), 1))
    return statistics.median(
        sample(apart, repeats) / sample(together, repeats) for _ in range(rounds)
    )


def shared() -> Counter[int]:
    """How many of 16 random networks share an operation with how many others, on an edge."""
    found: Counter[int] = Counter()
    searched = space.get("robust9-light")
    generator = torch.Generator().manual_seed(0)
    for _ in range(1000):
        drawn = torch.randint(searched.arms, (NETWORKS,), generator=generator)
        for size in torch.bincount(drawn).tolist():
            found[size] += size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    total = sum(shared().values())
    print("share of operations by networks on the edge that have the same:")
    print("  " + ", ".join(f"{n}: {100 * c / total:.0f} %" for n, c in sorted(shared().items())))
    print("times faster grouped (1x1 as grouped convolution / as batched product), and the largest")
    print("difference of outputs and input gradients")
    for batch in (16, 64):
        for name in OPERATIONS:
            for channels in SIZES:
                cells = []
                for count in (2, 3, NETWORKS):
                    pair = []
                    for kind in (Grouped, Batched):
                        if kind is Batched and "pool" in name:
                            continue
                        apart, together = sides(name, count, channels, batch, kind)
                        away = max(
                            float((a - b).detach().abs().max())
                            for a, b in zip(apart(), together(), strict=True)
                        )
                        pair.append(f"{ratio(apart, together, rounds):.2f}")
                    cells.append(f"{count}: {' / '.join(pair)} ({away:.0e})")
                print(
                    f"batch {batch:>2} C {channels:>2} {name:<16} {'   '.join(cells)}", flush=True
                )


if __name__ == "__main__":
    main()
