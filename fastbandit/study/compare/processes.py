"""Independent jobs on several processes, each with one thread."""

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

__all__ = ["Call", "run_calls"]

# What a child is started with: one thread, and it sleeps while it waits.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


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

    With one process the calls are made in this one, in their order. What a call returns must not
    depend on where it is made. However this function is left, its processes end before; and they
    end themselves when this process is killed.

    Args:
        done: is called with the position of a call and what it returned, as soon as it did.

    Raises:
        RunError: a call failed, or its process ended; the others are stopped.
    """
    # Imported here: it loads torch, which a child does when it is asked for what needs it.
    from fastbandit.runs.tensors import RunError

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
            for _ in range(count):
                ours, theirs = context.Pipe()
                child = context.Process(target=_serve, args=(theirs,), daemon=True)
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


def _serve(pipe: Connection) -> None:
    """In a child: make the calls that come."""
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
