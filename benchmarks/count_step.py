"""Operations and bytes of one recorded training step as a GPU gets it, counted without one.

    python benchmarks/count_step.py
    python benchmarks/count_step.py --attack PGD-7 --precision bfloat16 --paths 3

The step runs eagerly on a CPU, but the package is told that every tensor is on a GPU, so that it
takes the ways that it takes there, and a dispatch mode sees every operation that writes a tensor.
An operation stands for as many graph nodes as NODES says, else for one; its bytes are those of the
tensors that it reads and writes once, times PASSES for batch norm. So both are estimates by count:
a library may launch more kernels, and a cache may save bytes. Means over random paths.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastbandit.ops import _convolution
from fastbandit.training import Graphs

ROOT = Path(__file__).resolve().parents[1]
sums = importlib.import_module("fastbandit.ops.norm_sum")


# --- Launches of our kernels, as csrc/cuda makes them ---------------------------------------------


def _norm_sum(xs: Sequence[Tensor], kinds: Sequence[int], *_: Any) -> int:
    """Statistics, where a term is normalised, and the sum."""
    return 1 + any(kinds)


def _norm_sum_backward(grad: Tensor, *_: Any) -> int:
    """Sums, and the gradients; before them a gradient in another layout, as that of a mean, is
    copied."""
    return 2 + (not grad.is_contiguous(memory_format=torch.channels_last))


def _gabor_backward(*args: Any) -> int:
    """Filters and gradient of the channel sum; channel sum, gradient of the filters by blocks, of
    all blocks, and of the parameters."""
    by_input, by_parameters = args[-1]
    return 2 * by_input + 4 * by_parameters


# --- Launches of torch ----------------------------------------------------------------------------


def _listed(most: int, extra: int = 0) -> Callable[..., int]:
    """An operation on lists of tensors, ``most`` of which are parameters of one launch."""
    return lambda tensors, *_: -(-len(tensors) // most) + extra


NODES: dict[str, int | Callable[..., int]] = {
    "norm_sum": _norm_sum,
    "norm_sum_backward": _norm_sum_backward,
    "depthwise_conv2d_backward_weight": 2,  # by blocks, and of all blocks
    "gabor_conv2d": 3,  # filters, channel sum, convolution
    "gabor_conv2d_backward": _gabor_backward,
    # A memset, the statistics, what they become, and the map.
    "native_batch_norm": 4,
    "native_batch_norm_backward": 3,
    "convolution_backward": lambda *args: sum(args[-1]),
    # Zeros, and what is added to them or written into them.
    "max_pool2d_with_indices_backward": 2,
    "upsample_bilinear2d_backward": 2,
    "slice_backward": 2,
    "nll_loss_backward": 2,
    # By the number of lists that a launch has.
    "_foreach_mul": _listed(110),
    "_foreach_add": _listed(64),
    "_foreach_copy": _listed(64),
    "_foreach_lerp": _listed(48),
    "_foreach_norm": _listed(110, 2),
    "_fused_sgd": _listed(48),
}
# Of the maps: the statistics read the input once more, and so do the sums of the backward pass.
PASSES = {"native_batch_norm": 1.5, "native_batch_norm_backward": 5 / 3}

# What the CPU kernel of an op refuses and the CUDA kernel takes: half types.
REFERENCES = {
    "norm_sum": sums._reference,
    "norm_sum_backward": sums._backward_reference,
}


class Counted(TorchDispatchMode):
    """Nodes, calls and bytes of the operations, by name. Views and allocations are none."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.nodes: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = op._schema.name.partition("::")[2].rstrip("_")
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = _run(op, name, given, args, kwargs)
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        mutates = op._schema.is_mutable
        fresh = [t for t in made if t.untyped_storage().data_ptr() not in storages]
        if name.startswith(("empty", "new_empty")) or not (mutates or fresh):
            return result
        moved = sum(t.numel() * t.element_size() for t in given)
        moved += sum(t.numel() * t.element_size() for t in fresh)
        nodes = NODES.get(name, 1)
        self.calls[name] += 1
        self.nodes[name] += nodes if isinstance(nodes, int) else nodes(*args)
        self.bytes[name] += round(moved * _passes(name, args))
        return result


def _run(op: Any, name: str, given: Sequence[Tensor], args: Any, kwargs: Any) -> Any:
    half = any(t.dtype in (torch.bfloat16, torch.float16) for t in given)
    if half and name in REFERENCES:
        return REFERENCES[name](*args)
    return op(*args, **kwargs)


def _passes(name: str, args: Any) -> float:
    """The share of bytes of our sum that the statistics read again is that of its terms."""
    if name == "norm_sum" and any(args[1]):
        measured = sum(kind & 1 and not kind & sums._GIVEN for kind in args[1])
        return 1 + measured / (len(args[0]) + 1)
    if name == "norm_sum_backward":  # reads and writes a map for each term, and the gradient
        terms = len(args[1])
        return 1 + (1 + terms) / (1 + 2 * terms)
    return PASSES.get(name, 1)


def on_cuda(op: str) -> bool:
    """Whether csrc/cuda registers a kernel of this op."""
    found = re.compile(rf'library\.impl\("{op}"')
    return any(found.search(path.read_text("utf-8")) for path in ROOT.glob("csrc/cuda/*.cpp"))


@contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it the package takes the ways that it takes on CUDA, with tensors of a CPU."""
    known: dict[str, bool] = {}

    def registered(op: str, key: str) -> bool:
        return known.setdefault(op, on_cuda(op))

    with (
        mock.patch.object(Tensor, "is_cuda", property(lambda self: True)),
        mock.patch.object(Tensor, "is_cpu", property(lambda self: False)),
        mock.patch.object(_convolution, "_registered", registered),
        mock.patch.object(sums, "_WAITING_DEVICES", ("cpu",)),
    ):
        yield


def count(space: str, attack: str, precision: str, seed: int | None) -> Counted:
    """One step of a random path; ``seed`` None takes the benchmarks' path."""
    import bench_search_step as steps_of  # here, so that a test takes Counted without them
    from bench_search_step import OURS, Task
    from gpu_stages import Calls

    device = torch.device("cpu")
    graphs = Graphs("yes", device, recorder=Calls())
    task = Task(space, steps_of.THREATS[attack], OURS, device, precision=precision,  # type: ignore
                graphs=graphs)  # fmt: skip
    for group in task.optimizer.param_groups:  # as on a GPU
        group.update(fused=True, foreach=False)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        task.take_random_path(generator)
    task.batches = 2  # the first one is eager, and the second one recorded
    with as_on_a_gpu():
        with Counted():  # which knows what CPU kernels refuse
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
    parser.add_argument("--batch", type=int, default=16, help="images; with fewer, kernels that "
                        "serve the maps of a search leave the smallest to torch")  # fmt: skip
    parser.add_argument("--all", action="store_true", help="all operations, not the first 20")
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
    for name, number in total.most_common(None if options.all else 20):
        share = moved[name] / options.batch / len(found) / 1e6
        print(f"{number / len(found):8.1f} nodes {share:8.2f} MB  {name}")


if __name__ == "__main__":
    main()
