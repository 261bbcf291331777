"""Standard output and error of a command: they outlive their readers and can say everything.

- A reader that goes away, as ``head`` does, has what it wanted: nothing is said of it, the command
  goes on to its end, and its status is that of its work. So is it with a stream that was closed
  from the beginning.
- A character that the encoding lacks is written as ``\\xfc`` or ``\\u221e``.
- Any other failure to write standard output, such as a full disk, is an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

__all__ = ["flushed", "lasting_streams"]


class _Lasting:
    """A text stream that goes on without its reader; everything else is the stream's own."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name = stream, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except OSError as error:
            # What could not be written is still in the buffer. It goes nowhere now, or the
            # interpreter would fail at it once more when it ends.
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())
                os.close(null)
            # Nobody can be told about standard error.
            if isinstance(error, BrokenPipeError) or self._name == "standard error":
                return
            raise OSError(f"{self._name}: {error.strerror or error}") from error


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within, ``sys.stdout`` and ``sys.stderr`` are as this module says."""
    with contextlib.ExitStack() as stack:
        for attribute, name in (("stdout", "standard output"), ("stderr", "standard error")):
            stream = before = getattr(sys, attribute)
            if stream is None:  # closed from the beginning; print would take another in its place
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            elif hasattr(stream, "reconfigure") and stream.errors != "backslashreplace":
                with contextlib.suppress(OSError):
                    stack.callback(stream.reconfigure, errors=stream.errors)
                    stream.reconfigure(errors="backslashreplace")
            setattr(sys, attribute, _Lasting(stream, name))
            stack.callback(setattr, sys, attribute, before)
        try:
            yield
        finally:
            sys.stderr.flush()


def flushed(action: Callable[[], int]) -> int:
    """The status of ``action``, once all that it printed is written.

    Raises:
        OSError: standard output cannot be written.
    """
    try:
        status = action()
    except SystemExit:  # --help
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status
