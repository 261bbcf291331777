"""Independent jobs on several processes, each with one thread, and with a GPU where there are some."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fastbandit.runs.tensors import RunError

__all__ = ["Call", "cores", "run_calls"]

# What a child is started with: one thread, and it sleeps while it waits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Call:
    """A call of a function of a module, with what can be pickled; its name is for messages."""

    name: str
    function: Callable[..., dict[str, Any]]
    arguments: tuple[Any, ...]


def run_calls(
    calls: Sequence[Call], processes: int, done: Callable[[int, dict[str, Any]], None]
) -> None:
    """Make every call, at most ``processes`` at a time.

    With one process the calls are made in this one, in their order. A program that asks for more
    keeps its own start below ``if __name__ == "__main__":``, as for any new Python process. What a call returns must not
    depend on where it is made. However this function is left, its processes end before; and they
    end themselves when this process is killed.

    Args:
        done: is called with the position of a call and what it returned, as soon as it did.

    Raises:
        RunError: a call failed, or its process ended; the others are stopped.
    """
    if processes == 1 or len(calls) == 1:
        for position, call in enumerate(calls):
            done(position, call.function(*call.arguments))
        return
    todo = list(enumerate(calls))
    with _children(min(processes, len(calls))) as children:
        busy: dict[Any, int] = {}
        idle = list(children)
        while todo or busy:
            while todo and idle:
                pipe = idle.pop()
                position, call = todo.pop(0)
                pipe.send((call.function, call.arguments))
                busy[pipe] = position
            for pipe in wait(list(busy)):
                position = busy.pop(pipe)
                try:
                    good, answer = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    child = children[pipe]
                    child.join()
                    raise RunError(
                        f"{calls[position].name}: its process ended with status {child.exitcode}; "
                        "the same command goes on from here"
                    ) from None
                if not good:
                    raise RunError(f"{calls[position].name}: {answer}")
                idle.append(pipe)
                done(position, answer)


@contextlib.contextmanager
def _children(count: int) -> Iterator[dict[Any, Any]]:
    """So many waiting processes by their pipes; they are gone when the context is left."""
    context = multiprocessing.get_context("spawn")
    children: dict[Connection, Any] = {}
    before = {name: os.environ.get(name) for name in _ENVIRONMENT}
    try:
        os.environ.update(_ENVIRONMENT)
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                child = context.Process(target=_serve, args=(theirs, number), daemon=True)
                child.start()
                theirs.close()
                children[ours] = child
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
        yield children
    finally:
        for pipe, child in children.items():
            child.kill()
            child.join()
            pipe.close()


def _serve(pipe: Connection, number: int) -> None:
    """In a child: make the calls that come."""
    if torch.cuda.is_available():
        # "cuda" then means another GPU in each process, as far as there are some.
        torch.cuda.set_device(number % torch.cuda.device_count())
    # Ctrl-C reaches every process of a terminal; it is the parent that ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:
            answer = (False, str(error) or type(error).__name__)
        pipe.send(answer)
