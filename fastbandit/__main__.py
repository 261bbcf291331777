"""The console command: ``fastbandit search ...`` is ``python -m fastbandit.search ...``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastbandit import _program, _start
from fastbandit._suggest import did_you_mean
from fastbandit._version import __version__

__all__ = ["main"]


def _help() -> str:
    width = max(map(len, _program.COMMANDS))
    lines = [
        f"fastbandit {__version__}: searches for image classifiers that stay accurate under",
        "attack, and measures how robust any model is.",
        "",
        "usage: fastbandit COMMAND [options], fastbandit COMMAND --help, fastbandit --version",
        "",
        *(f"  {name:<{width}}  {named.summary}" for name, named in _program.COMMANDS.items()),
        "",
        "The first command to type, minutes on a CPU, with the digits that are embedded:",
        "  fastbandit search",
        "A model of your own:",
        "  fastbandit evaluate my_package.my_module:make_model --weights model.pt --data FOLDER "
        "--epsilon 8/255",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    name = given[0] if given else "--help"
    if name in ("help", "-h", "--help"):
        if len(given) < 2:
            print(_help())
            return 0
        given = [given[1], "--help"]
        name = given[0]
    if name in ("-V", "--version"):
        print(f"fastbandit {__version__}")
        return 0
    if name not in _program.COMMANDS:
        print(
            f"fastbandit: error: expected one of {', '.join(_program.COMMANDS)}, got {name!r}"
            f"{did_you_mean(name, _program.COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    _start.begin()  # before the command's module loads torch
    _program.started_as(console=True)
    status: int = importlib.import_module(_program.COMMANDS[name].module).main(given[1:])
    return status


if __name__ == "__main__":
    raise SystemExit(main())
