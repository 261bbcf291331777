"""Memory of running 1-bit networks beside the same in float32: weights, and maps at their peak.

    python benchmarks/binary_memory.py

Prints what the table in docs/binary.md is made of. Weights are all parameters and buffers, bytes
in memory. Maps are the most bytes of tensors that one evaluation of one image of 32 x 32 holds at a
time, beyond weights and image: counted storage by storage as operations make them and as they are
freed, so without what a kernel takes for itself within a call.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbandit import space as spaces
from fastbandit.genotype import Genotype
from fastbandit.nn.binary import pack
from fastbandit.nn.frozen import freeze
from fastbandit.nn.network import Network


class Peak(TorchDispatchMode):
    """The most bytes that storages hold which were made within it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in before and key not in self.live:
                self.live[key] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, sum(self.live.values()))
        return result


def weights(network: nn.Module) -> int:
    kept = [*network.parameters(), *network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def maps(network: nn.Module, image: Tensor) -> int:
    with torch.no_grad():
        network(image)  # what a network keeps from its first call is no map
        with Peak() as peak:
            network(image)
    return peak.peak


def everywhere(operation: str) -> Genotype:
    space = spaces.get("binary8")
    choice = [space.operations.index(operation)] * space.rows
    return Genotype.from_choices(space, choice, options={"preprocess": "binary"})


def main() -> None:
    torch.manual_seed(0)
    subjects = [
        ("`BNAS_XNOR_1`", Genotype.published("BNAS_XNOR_1"), 36, 20),
        ("`BNAS_A_KIM`", Genotype.published("BNAS_A_KIM"), 36, 20),
        ("`bin_sep_conv_3x3` everywhere", everywhere("bin_sep_conv_3x3"), 16, 6),
        ("the same", everywhere("bin_sep_conv_3x3"), 36, 20),
    ]
    print("| network, one image, float32 | weights | packed | maps at their peak | packed |")
    print("| --- | --- | --- | --- | --- |")
    image = torch.rand(1, 3, 32, 32).to(memory_format=torch.channels_last)
    for name, genotype, channels, cells in subjects:
        network = Network(genotype, in_channels=3, classes=10, channels=channels, cells=cells)
        network = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        packed = freeze(pack(network))
        sizes = [weights(network), weights(packed), maps(network, image), maps(packed, image)]
        row = [f"{size:,}" for size in sizes]
        row[1] += f" ({sizes[0] / sizes[1]:.1f} times smaller)"
        row[3] += f" ({sizes[2] / sizes[3]:.1f})"
        print(f"| {name}, C = {channels}, V = {cells} | {' | '.join(row)} |")


if __name__ == "__main__":
    main()
