"""Python processes that start in a fraction of a second: forked from one that has loaded torch.

That server (multiprocessing's) is started once for a process that runs tests. It has loaded what
the package needs and not the package, so that a child reads its environment variables itself. Not
for tests of what an interpreter does at its start and end, nor for variables that C libraries read
as they are loaded: subprocess is for those. An optimiser's first step makes torch load its
compiler, which takes longer than all that most tests do, so the server has loaded that too.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed",
        "numpy",
        "pydantic",
        "rich.progress",
        "safetensors.torch",
        "tyro",
        "yaml",
    ]
)


class Process:
    """``python *arguments``: -c CODE, -m MODULE or a file, and the program's own arguments.

    Args:
        environment: the variables of the process; by default those of this one.
        folder: where it runs; by default where this one does.
    """

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        folder: Path | str | None = None,
    ) -> None:
        self.arguments = arguments
        self._output = tempfile.TemporaryDirectory()
        self._files = [Path(self._output.name) / name for name in ("stdout", "stderr")]
        given = dict(os.environ if environment is None else environment)
        place = str(folder or Path.cwd())
        self._process = _context.Process(
            target=_run, args=(arguments, given, place, [str(file) for file in self._files])
        )
        self._process.start()

    def poll(self) -> int | None:
        """The exit status, a signal as a negative number; None while the process runs."""
        return self._process.exitcode

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """What the process printed and its exit status."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        printed = [file.read_text() if file.exists() else "" for file in self._files]
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *printed)


def run(
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    folder: Path | str | None = None,
) -> subprocess.CompletedProcess[str]:
    """A :class:`Process` to its end."""
    return Process(*arguments, environment=environment, folder=folder).wait()


def run_pair(
    *arguments: str, environment: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """Two processes with what torchrun gives them, without its own messages.

    Like torchrun, this process keeps the store: it is there for one rank after the other has gone.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where = {
        **(os.environ if environment is None else environment),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "WORLD_SIZE": "2",
    }
    ranks = [{**where, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    started = [Process(*arguments, environment=rank) for rank in ranks]
    return [process.wait() for process in started]


def _run(
    arguments: tuple[str, ...], environment: dict[str, str], folder: str, files: list[str]
) -> None:
    """In the child."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    # The server may have been started for other tests than those of this directory.
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    elif arguments[0] == "-m":
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
