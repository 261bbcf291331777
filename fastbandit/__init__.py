"""fastbandit: anti-bandit search for architectures that stay accurate under attack.

Importing the package loads no third-party module. The kernels are in :mod:`fastbandit.ops`
(loads torch and nothing else); the commands are ``python -m fastbandit.search``, ``.retrain``,
``.evaluate``, ``.report``, ``.study``, ``.export`` and ``.info``.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastbandit._version import __version__

if TYPE_CHECKING:
    from fastbandit.evaluate.once import evaluate
    from fastbandit.info import build_info
    from fastbandit.models import load

__all__ = ["__version__", "build_info", "evaluate", "load"]


def __getattr__(name: str) -> Any:
    # Not imported above: they load torch, or will.
    if name == "build_info":
        from fastbandit.info import build_info

        return build_info
    if name == "load":
        from fastbandit.models import load

        return load
    if name == "evaluate":
        # The package of the command, which can be called: see its docstring.
        return importlib.import_module("fastbandit.evaluate")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
