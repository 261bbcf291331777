"""CUDA graphs: a step is recorded once and then replayed with one launch.

A supernet's step is a thousand small kernels, and eager PyTorch takes longer to launch them than a
GPU takes to run them. The sampled path is fixed for an epoch, so that its step can be recorded
when the epoch begins: :class:`Recorded` runs a function on fixed buffers, :class:`Graphs` says
whether there are graphs at all, and keeps what was recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

__all__ = ["Choice", "CudaRecorder", "Graphs", "Recorded", "Recorder"]

Choice = Literal["auto", "yes", "no"]


class Recorder(Protocol):
    """Records what a function launches; the result launches it again."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]: ...


class CudaRecorder:
    """Records into CUDA graphs that share one memory pool: they are replayed one at a time.

    ``torch.cuda.graph`` would give all cached memory back to the driver before each recording, and
    the next eager step would ask for it again, block by block. Here the cache stays, and is emptied
    only where a recording does not fit beside it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.cuda.device(device):
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(device)
        # A pool without a graph cannot be recorded into again while gradients still lie in it, and
        # a recording may be given up before the next one is made. So this one stays.
        self._keeper = self._graph(lambda: torch.zeros(1, device=device))

    def _graph(self, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        # torch records on the current device, whatever the tensors' is.
        with torch.cuda.device(self._device):
            try:
                return self._captured(function)
            except torch.OutOfMemoryError:
                # While it records, torch gives no cached block back to make room.
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            return self._captured(function)

    def _captured(self, function: Callable[[], Any]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool)
            try:
                function()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        return self._graph(function).replay


class Recorded:
    """A function of a batch, recorded on buffers of its own that each call fills.

    Args:
        inputs: tensors of the shapes, dtypes and layouts that every call will have.
        function: gets the buffers; what it leaves behind it writes into tensors that it holds.
            Recording does not run it.
    """

    def __init__(
        self, recorder: Recorder, inputs: Sequence[Tensor], function: Callable[..., None]
    ) -> None:
        self._buffers = [tensor.clone() for tensor in inputs]
        self._replay = recorder.record(lambda: function(*self._buffers))

    def __call__(self, *inputs: Tensor) -> None:
        for buffer, tensor in zip(self._buffers, inputs, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._replay()


class Graphs:
    """Whether steps are recorded, and the last one of each kind that was.

    Args:
        choice: ``auto``: where possible; ``yes``: or an error; ``no``.
        device: where the steps run.
        processes: how many processes share a step.
        recorder: None takes CUDA graphs.

    Raises:
        ValueError: ``yes`` where it is not possible.
    """

    def __init__(
        self,
        choice: Choice,
        device: torch.device,
        *,
        processes: int = 1,
        recorder: Recorder | None = None,
    ) -> None:
        self.reason = self._why_not(choice, device, processes, recorder)
        """Why nothing is recorded, in one line; None where steps are."""
        if choice == "yes" and self.reason is not None:
            raise ValueError(f"graphs: expected auto or no here, got yes: {self.reason}")
        self._recorder: Recorder | None = None
        if self.reason is None:
            self._recorder = CudaRecorder(device) if recorder is None else recorder
        self._kept: dict[str, tuple[Hashable, Any]] = {}

    @staticmethod
    def _why_not(
        choice: Choice, device: torch.device, processes: int, recorder: Recorder | None
    ) -> str | None:
        if choice == "no":
            return "not asked for"
        if recorder is None and device.type != "cuda":
            return f"CUDA graphs need a CUDA device, and this one is {device}"
        if processes > 1:
            return f"{processes} processes exchange gradients within a step"
        return None

    def _made(self, kind: str, make: Callable[[Recorder], Any]) -> Any:
        assert self._recorder is not None
        try:
            return make(self._recorder)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            raise RuntimeError(
                f"graphs: the step '{kind}' could not be recorded as a CUDA graph ({reason}); "
                "--graphs no computes the same without"
            ) from error

    def recorded(
        self,
        kind: str,
        key: Hashable,
        make: Callable[[Recorder], Any],
    ) -> Any:
        """What ``make`` returned for this ``kind`` and ``key``, made now if the last one of that
        kind had another key; that one is given up first, and its memory with it.

        Raises:
            RuntimeError: the step cannot be recorded.
        """
        assert self._recorder is not None
        kept = self._kept.pop(kind, None)
        if kept is None or kept[0] != key:
            del kept
            kept = (key, self._made(kind, make))
        self._kept[kind] = kept
        return kept[1]
