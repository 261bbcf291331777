"""Independent jobs on several processes, each with one thread, or with a GPU where there are."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fastbandit.runs.tensors import RunError

__all__ = ["Call", "Workers", "cores", "run_calls"]

# What a child is started with: one thread, and it sleeps while it waits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Call:
    """A call of a function of a module, with what can be pickled; its name is for messages.

    Attributes:
        shared: the first argument, where many calls have the same large one; a process gets it
            once.
    """

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]
    shared: Any = None

    def make(self) -> dict[str, Any]:
        """Make the call in this process."""
        first = () if self.shared is None else (self.shared,)
        return self.function(*first, *self.arguments)


class Workers:
    """Processes that make calls; they are started when there is something to do.

    However the context is left, the processes end before; and they end themselves when this process
    is killed.

    Args:
        processes: calls at a time. With one, calls are made in this process. A program that asks
            for more keeps its own start below ``if __name__ == "__main__":``, as for any new Python
            process.
    """

    def __init__(self, processes: int = 1) -> None:
        self.processes = processes
        self._children: dict[Connection, Any] = {}
        # What each process was given to keep.
        self._given: dict[Connection, Any] = {}

    def run(self, calls: Sequence[Call], done: Callable[[int, dict[str, Any]], None]) -> None:
        """Make every call. What a call returns must not depend on where it is made.

        Args:
            done: is called with the position of a call and what it returned, as soon as it did.

        Raises:
            RunError: a call failed, or its process ended; the others are stopped.
        """
        if self.processes == 1 or (len(calls) == 1 and not self._children):
            for position, call in enumerate(calls):
                done(position, call.make())
            return
        try:
            self._start()
            self._run(calls, done)
        except BaseException:
            self.close()
            raise

    def _run(self, calls: Sequence[Call], done: Callable[[int, dict[str, Any]], None]) -> None:
        todo = list(enumerate(calls))
        busy: dict[Connection, int] = {}
        idle = list(self._children)
        while todo or busy:
            while todo and idle:
                pipe = idle.pop()
                position, call = todo.pop(0)
                if self._given.get(pipe) is not call.shared:
                    pipe.send((None, call.shared))
                    self._given[pipe] = call.shared
                pipe.send((call.function, call.arguments))
                busy[pipe] = position
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                position = busy.pop(ready)
                try:
                    good, answer = ready.recv()
                except EOFError:
                    child = self._children[ready]
                    child.join()
                    raise RunError(
                        f"{calls[position].name}: its process ended with status {child.exitcode}; "
                        "the same command goes on from here"
                    ) from None
                if not good:
                    raise RunError(f"{calls[position].name}: {answer}")
                idle.append(ready)
                done(position, answer)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        before = {name: os.environ.get(name) for name in _ENVIRONMENT}
        os.environ.update(_ENVIRONMENT)
        try:
            for number in range(len(self._children), self.processes):
                ours, theirs = context.Pipe()
                child = context.Process(target=_serve, args=(theirs, number), daemon=True)
                child.start()
                theirs.close()
                self._children[ours] = child
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value

    def close(self) -> None:
        """End the processes; they are started again when there is something to do."""
        for pipe, child in self._children.items():
            child.kill()
            child.join()
            pipe.close()
        self._children, self._given = {}, {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def run_calls(
    calls: Sequence[Call], processes: int, done: Callable[[int, dict[str, Any]], None]
) -> None:
    """Make every call with :class:`Workers` of their own, whose arguments and errors these are."""
    with Workers(min(processes, len(calls)) or 1) as workers:
        workers.run(calls, done)


def _serve(pipe: Connection, number: int) -> None:
    """In a child: make the calls that come."""
    # Ctrl-C reaches every process of a terminal; it is the parent that ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if torch.cuda.is_available():
        # "cuda" then means another GPU in each process, as far as there are some.
        torch.cuda.set_device(number % torch.cuda.device_count())
    shared = None
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        if function is None:
            shared = arguments
            continue
        try:
            answer: tuple[bool, Any] = (True, Call("", function, arguments, shared).make())
        except Exception as error:
            answer = (False, str(error) or type(error).__name__)
        with contextlib.suppress(BrokenPipeError):
            pipe.send(answer)
