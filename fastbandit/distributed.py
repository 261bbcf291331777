"""One run on several processes, as torchrun starts them: NCCL on GPUs, Gloo on CPUs.

A :class:`Group` is all processes (ranks) of a run. For each epoch it is divided into teams
(:class:`Team`): the ranks that train the same path. Data-parallel training is one team of all
ranks; path-parallel training is as many teams as there are paths at a time, usually of one rank
each. One step of training is then, on every rank::

    images = the team's batch [team.part(n)]                # by position in the batch
    (team.weight(n) * mean loss of these images).backward()
    team.combine()                                          # the same gradient on every rank
    clip and step

All ranks hold the same weights, optimiser and bandit, and stay so because each applies the same
numbers; rank 0 alone writes files.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor, nn

from fastbandit.nn.norm import BatchNorm2d

__all__ = [
    "Group",
    "PeerError",
    "Team",
    "first_to_speak",
    "launched",
    "synchronise_batchnorm",
]

# Gradients travel in flat buffers of about this many bytes: large enough that the time of a
# message is its size, small enough that the copy is a small part of the memory.
_BUCKET_BYTES = 32 * 2**20

T = TypeVar("T")


class PeerError(ValueError):
    """Another process of the run ended, or did not answer in time."""


def launched() -> bool:
    """Whether torchrun (or a launcher that sets the same variables) started several processes."""
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return all(name in os.environ for name in needed) and os.environ["WORLD_SIZE"] != "1"


def first_to_speak() -> bool:
    """True for one process of a run alone: what is said by it need not be said by the others.

    Once the processes have found each other it is the first that asks, so that the cause of a
    failure is reported and not its consequences elsewhere.
    """
    if not launched():
        return True
    if not dist.is_initialized():
        return os.environ["RANK"] == "0"
    try:
        # torchrun keeps the store, so it is there whichever process has gone.
        store = dist.distributed_c10d._get_default_store()
        return int(store.add("fastbandit/failures", 1)) == 1
    except (RuntimeError, ValueError):
        return True  # better twice than not at all


class Group:
    """All processes of a run.

    Attributes:
        rank, size: this process and how many there are.
        local_rank: this process on its machine, which is the GPU it uses.

    Every method is collective: all ranks call it in the same order. Each raises
    :class:`PeerError` if another process ended or did not answer within the time given to
    :meth:`join`.
    """

    def __init__(self, rank: int, size: int, local_rank: int, device: torch.device) -> None:
        self.rank, self.size, self.local_rank, self.device = rank, size, local_rank, device

    @classmethod
    @contextmanager
    def join(cls, kind: str, *, timeout: float) -> Iterator[Group]:
        """The group that the environment describes; left when the context ends well.

        Args:
            kind: ``cuda`` (one GPU for each rank) or ``cpu``.
            timeout: seconds to wait for another process, in this and in every later call.

        Raises:
            PeerError: the processes did not find each other.
            ValueError: fewer GPUs than processes on this machine.
        """
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device(kind)
        if kind == "cuda":
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"rank {rank}: expected a GPU for each process, got "
                    f"{torch.cuda.device_count()} GPUs for local rank {local_rank}"
                )
            device = torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
        group = cls(rank, size, local_rank, device)
        # Imported later, by an optimiser for one, this module keeps the process group as a default
        # argument. The group's threads then meet the end of the interpreter, which can abort.
        importlib.import_module("torch.distributed.nn.functional")
        group._guarded(
            lambda: dist.init_process_group(
                "nccl" if kind == "cuda" else "gloo",
                timeout=datetime.timedelta(seconds=timeout),
            )
        )
        yield group
        # Only where all went well: with a process gone, waiting for it would hide the error.
        dist.destroy_process_group()

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The backends differ in what they say and have no common class for it.
            # Gloo begins with the line of its source.
            words = re.sub(r"^\[[^]]*\]\s*", "", str(error).strip()).splitlines()
            reason = words[0].split(". ")[0].removesuffix(".")[:160] if words else "no reason given"
            raise PeerError(
                f"rank {self.rank} of {self.size}: another process of this run ended or did not "
                f"answer in time ({reason}); the same command goes on from the last checkpoint, "
                "also with another number of processes"
            ) from error

    def sum_(self, tensor: Tensor) -> Tensor:
        """``tensor`` (on the group's device) summed over the ranks, in place."""
        self._guarded(lambda: dist.all_reduce(tensor))
        return tensor

    def maximum(self, value: int) -> int:
        """The largest value of all ranks."""
        tensor = torch.tensor(value, device=self.device)
        self._guarded(lambda: dist.all_reduce(tensor, op=dist.ReduceOp.MAX))
        return int(tensor)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum_(torch.zeros(1, device=self.device))

    def broadcast(
        self, state: Any, tensors: dict[str, Tensor] | None
    ) -> tuple[Any, dict[str, Tensor]]:
        """A plain value and CPU tensors of rank 0, on every rank; what the others pass is left.

        They travel as JSON and safetensors; nothing is unpickled.
        """
        header, body = b"", b""
        if self.rank == 0:
            header = json.dumps(state).encode()
            body = save({k: v.detach().cpu().contiguous() for k, v in (tensors or {}).items()})
        lengths = torch.tensor([len(header), len(body)], device=self.device)
        self._guarded(lambda: dist.broadcast(lengths, 0))
        # At least one byte: an empty message is not a message for every backend.
        data = torch.zeros(int(lengths.sum()) + 1, dtype=torch.uint8)
        if self.rank == 0:
            data[:-1] = torch.frombuffer(bytearray(header + body), dtype=torch.uint8)
        data = data.to(self.device)
        self._guarded(lambda: dist.broadcast(data, 0))
        if self.rank == 0:
            return state, tensors or {}
        raw = data.cpu().numpy().tobytes()
        first = int(lengths[0])
        return json.loads(raw[:first]), load(raw[first:-1])

    def check_same(self, what: str, value: Tensor) -> None:
        """See that all ranks hold the same integers.

        Raises:
            PeerError: they do not; the run must not go on.
        """
        tensor = value.to(self.device)
        first = tensor.clone()
        self._guarded(lambda: dist.broadcast(first, 0))
        different = torch.tensor(int(not torch.equal(first, tensor)), device=self.device)
        if int(self.sum_(different)):
            raise PeerError(f"rank {self.rank} of {self.size}: {what} differs between processes")


class Team:
    """The ranks that work on the same path, seen from one of them.

    Rank r works on path ``r % paths``; where the ranks are not a multiple of the paths, those of
    the first paths have one helper more.

    Args:
        group: all processes.
        paths: how many paths there are, at most ``group.size``.
    """

    def __init__(self, group: Group, paths: int) -> None:
        if not 1 <= paths <= group.size:
            raise ValueError(f"Team: paths: expected 1 to {group.size}, got {paths}")
        self.group, self.paths = group, paths
        self.path = group.rank % paths
        self.size = len(range(self.path, group.size, paths))
        self.member = group.rank // paths
        self._gradients: list[tuple[nn.Parameter, int]] = []

    @property
    def leads(self) -> bool:
        """The member that speaks for its path."""
        return self.member == 0

    # A batch is divided by the position of its images. Batch norm needs two images on each rank;
    # a batch with fewer is computed whole by every member, which gives the same gradient.

    def divides(self, n: int) -> bool:
        """Whether a batch of ``n`` images is divided, or computed by every member."""
        return n >= 2 * self.size

    def part(self, n: int) -> slice:
        """This member's images of a batch of ``n`` in training."""
        return self.share(n) if self.divides(n) else slice(0, n)

    def share(self, n: int) -> slice:
        """This member's images of ``n``, of which it may have none; sizes differ by one at most."""
        low = self.member * n // self.size
        return slice(low, (self.member + 1) * n // self.size)

    def weight(self, n: int) -> float:
        """Factor of this member's mean loss in the mean loss over a batch of ``n``."""
        if not self.divides(n):
            return 1.0 / self.size
        part = self.part(n)
        return (part.stop - part.start) / n

    def counts(self, n: int) -> bool:
        """Whether this member's images of a batch are to be counted: each image once."""
        return self.divides(n) or self.leads

    @contextmanager
    def batch(self, n: int, modules: Iterable[nn.Module]) -> Iterator[None]:
        """While a batch of ``n`` is computed: statistics are shared only if it is divided."""
        alone = [m for m in modules if isinstance(m, BatchNorm2d)] if not self.divides(n) else []
        shared = [module.synchronise for module in alone]
        for module in alone:
            module.synchronise = None
        try:
            yield
        finally:
            for module, synchronise in zip(alone, shared, strict=True):
                module.synchronise = synchronise

    # Gradients.

    def use(self, parameters: Sequence[Sequence[nn.Parameter]]) -> list[nn.Parameter]:
        """Say which parameters each path uses, in order of the paths.

        Returns:
            All of them, each once, in the same order on every rank: what one step updates.
        """
        users: dict[nn.Parameter, int] = {}
        for path in parameters:
            for parameter in path:
                users[parameter] = users.get(parameter, 0) + 1
        self._gradients = list(users.items())
        return list(users)

    @torch.no_grad()
    def combine(self) -> None:
        """Make each gradient its mean over the paths that use the parameter, on every rank.

        A path's gradient is the sum of its members', which :meth:`weight` has scaled.
        """
        bucket: list[tuple[nn.Parameter, int]] = []
        size = 0
        for entry in self._gradients:
            bucket.append(entry)
            size += entry[0].numel() * entry[0].element_size()
            if size >= _BUCKET_BYTES:
                self._reduce(bucket)
                bucket, size = [], 0
        if bucket:
            self._reduce(bucket)

    def _reduce(self, bucket: Sequence[tuple[nn.Parameter, int]]) -> None:
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p, _ in bucket]
        flat = self.group.sum_(torch.cat(parts))
        start = 0
        for parameter, users in bucket:
            end = start + parameter.numel()
            gradient = flat[start:end].view(parameter.shape)
            if users > 1:
                gradient = gradient / users
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
            parameter.grad.copy_(gradient)
            start = end

    # Results.

    def total(self, values: Tensor) -> Tensor:
        """``values`` [k], summed over the members of this team."""
        table = torch.zeros(self.paths, len(values), dtype=values.dtype, device=values.device)
        table[self.path] = values
        return self.group.sum_(table)[self.path]

    def collect(self, values: Sequence[float]) -> list[list[float]]:
        """The leaders' ``values``, for each path, on every rank."""
        table = torch.zeros(self.paths, len(values), dtype=torch.float64, device=self.group.device)
        if self.leads:
            table[self.path] = torch.tensor(values, dtype=torch.float64)
        return self.group.sum_(table).tolist()

    @torch.no_grad()
    def average_batchnorm(self, modules: Iterable[nn.Module]) -> None:
        """Give every member the mean of the members' running statistics."""
        if self.paths == self.group.size:
            return
        buffers = [
            buffer
            for module in modules
            if isinstance(module, BatchNorm2d) and module.synchronise is None
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        flat = torch.cat([b.reshape(-1) for b in buffers]) if buffers else torch.empty(0)
        # The paths differ in length.
        longest = self.group.maximum(len(flat))
        if not longest:
            return
        padded = torch.zeros(longest, device=self.group.device)
        padded[: len(flat)] = flat
        mean = self.total(padded) / self.size
        start = 0
        for buffer in buffers:
            buffer.copy_(mean[start : start + buffer.numel()].view(buffer.shape))
            start += buffer.numel()


# --- batch statistics over all ranks --------------------------------------------------------


class _BatchNorm(torch.autograd.Function):
    """Batch normalisation in training with the statistics of all ranks' images.

    torch.nn.SyncBatchNorm has no CPU kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None,
        factor: float,
        eps: float,
        group: Group,
    ) -> Tensor:
        channels = x.size(1)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, channels] + [1] * (x.dim() - 2)
        # In float64: the sum of squares less the squared sum loses half of the digits.
        wide = x.double()
        count = torch.full((1,), x.numel() / channels, dtype=torch.float64, device=x.device)
        sums = group.sum_(torch.cat([wide.sum(dims), wide.square().sum(dims), count]))
        n = sums[-1]
        mean = sums[:channels] / n
        variance = (sums[channels:-1] / n - mean.square()).clamp_min(0.0)
        scale = (variance + eps).rsqrt()
        if running is not None:
            unbiased = variance * (n / (n - 1))
            for buffer, value in zip(running, (mean, unbiased), strict=True):
                buffer.lerp_(value.to(buffer.dtype), factor)
        mean, scale = mean.to(x.dtype).view(shape), scale.to(x.dtype).view(shape)
        normal = (x - mean) * scale
        # Not `normal`, which is the result where there is no weight: others may add to that.
        ctx.save_for_backward(x, mean, scale, weight, n)
        ctx.group, ctx.dims, ctx.shape = group, dims, shape
        if weight is None:
            return normal
        out = normal * weight.view(shape)
        return out if bias is None else out + bias.view(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, mean, scale, weight, n = ctx.saved_tensors
        normal = (x - mean) * scale
        dims, shape = ctx.dims, ctx.shape
        sum_g = gradient.sum(dims, dtype=torch.float64)
        sum_gn = (gradient * normal).sum(dims, dtype=torch.float64)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        of_weight = sum_gn.to(gradient.dtype) if needs_weight else None
        of_bias = sum_g.to(gradient.dtype) if needs_bias else None
        of_x = None
        if needs_x:
            means = ctx.group.sum_(torch.cat([sum_g, sum_gn])) / n
            mean_g, mean_gn = (m.to(gradient.dtype).view(shape) for m in means.chunk(2))
            of_x = (gradient - mean_g - normal * mean_gn) * scale
            if weight is not None:
                of_x = of_x * weight.view(shape)
        return of_x, of_weight, of_bias, None, None, None, None


def synchronise_batchnorm(model: nn.Module, group: Group) -> None:
    """Let every BatchNorm2d of ``model`` use the statistics of all ranks in training mode.

    The ranks must run the same layers in the same order, forward and backward.
    """

    def normalise(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running: tuple[Tensor, Tensor] | None,
        factor: float,
        eps: float,
    ) -> Tensor:
        out: Tensor = _BatchNorm.apply(x, weight, bias, running, factor, eps, group)
        return out

    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.synchronise = normalise
