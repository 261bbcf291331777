"""fastbandit: anti-bandit search for architectures that stay accurate under attack.

Importing the package loads no third-party module. The kernels are in :mod:`fastbandit.ops`
(loads torch and nothing else); the commands are ``python -m fastbandit.search``, ``.retrain``,
``.evaluate``, ``.report``, ``.study``, ``.export`` and ``.info``.
"""

from typing import Any

from fastbandit._version import __version__

__all__ = ["__version__", "build_info"]


def __getattr__(name: str) -> Any:
    # Not imported above: it loads torch.
    if name == "build_info":
        from fastbandit.info import build_info

        return build_info
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
