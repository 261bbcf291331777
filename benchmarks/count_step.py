"""Operations and bytes of one recorded training step as a GPU gets it, counted without one.

    python benchmarks/count_step.py
    python benchmarks/count_step.py --attack PGD-7 --precision bfloat16 --paths 3

The step runs eagerly on a CPU with the kernels that only CPUs have left out (``conv_block``, batch
norm, max pooling), and a dispatch mode sees every operation that writes a tensor. An operation
stands for as many graph nodes as NODES says, else for one; its bytes are those of the tensors that
it reads and writes once, times PASSES for batch norm. So both are estimates by count: a library may
launch more kernels, and a cache may save bytes. Means over random paths.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbandit.training import Graphs

# What torch launches on CUDA for one operation: for batch norm a memset, the statistics, what they
# become, and the map; backward sums, what they become, and the map.
NODES = {
    "native_batch_norm": 4,
    "native_batch_norm_backward": 3,
    "convolution_backward": 2,
}
# Of the maps: the statistics read the input once more, and so do the sums of the backward pass.
PASSES = {"native_batch_norm": 1.5, "native_batch_norm_backward": 5 / 3}


class Counted(TorchDispatchMode):
    """Nodes, calls and bytes of the operations, by name. Views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nodes: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = op(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        name = op._schema.name.partition("::")[2].rstrip("_")
        storages = {t.untyped_storage().data_ptr() for t in given}
        mutates = op._schema.is_mutable
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in storages]
        if name.startswith(("empty", "new_empty")) or not (mutates or fresh):
            return result
        moved = sum(t.numel() * t.element_size() for t in given)
        moved += sum(t.numel() * t.element_size() for t in fresh)
        self.calls[name] += 1
        self.nodes[name] += NODES.get(name, 1)
        self.bytes[name] += round(moved * PASSES.get(name, 1))
        return result


def count(space: str, attack: str, precision: str, seed: int | None) -> Counted:
    """One step of a random path; ``seed`` None takes the benchmarks' path."""
    import bench_search_step as steps_of  # here, so that a test takes Counted without them
    from bench_search_step import TORCH_NORM, Task
    from gpu_stages import Calls

    device = torch.device("cpu")
    graphs = Graphs("yes", device, recorder=Calls())
    task = Task(space, steps_of.THREATS[attack], TORCH_NORM, device, precision=precision,  # type: ignore
                graphs=graphs)  # fmt: skip
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        task.take_random_path(generator)
    task.batches = 2  # the first one is eager, and the second one recorded
    task.step()
    kept = graphs._kept["train"][1]
    with Counted() as counted:
        kept((task.x, task.y, task.ids), rate=steps_of.RATE, offset=0)
    return counted


def main() -> None:
    import bench_search_step as steps_of

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", choices=list(steps_of.GOALS), default="robust9-light")
    parser.add_argument("--attack", choices=list(steps_of.THREATS), default="FGSM")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--paths", type=int, default=5, help="random paths; 0: the benchmarks'")
    parser.add_argument("--batch", type=int, default=8, help="images")
    options = parser.parse_args()
    steps_of.BATCH = options.batch
    seeds = list(range(options.paths)) or [None]
    found = [count(options.space, options.attack, options.precision, seed) for seed in seeds]
    nodes = statistics.mean(sum(one.nodes.values()) for one in found)
    images = statistics.mean(sum(one.bytes.values()) for one in found) / options.batch
    calls = statistics.mean(sum(one.calls.values()) for one in found)
    print(f"{options.attack} step of {options.space}, {options.precision}: {calls:.0f} operations, "
          f"{nodes:.0f} nodes, {images / 1e6:.1f} MB an image")  # fmt: skip
    total: Counter[str] = sum((one.nodes for one in found), Counter())
    moved: Counter[str] = sum((one.bytes for one in found), Counter())
    for name, number in total.most_common(20):
        share = moved[name] / options.batch / len(found) / 1e6
        print(f"{number / len(found):8.1f} nodes {share:8.2f} MB  {name}")


if __name__ == "__main__":
    main()
