"""Layers, candidate operations and networks."""

from typing import TYPE_CHECKING

from fastbandit._lazy import lazy

if TYPE_CHECKING:
    from fastbandit.nn.network import Network
    from fastbandit.nn.supernet import Supernet

_MODULES = (
    "binary",
    "blocks",
    "cell",
    "denoise",
    "frozen",
    "gabor",
    "network",
    "norm",
    "operations",
    "packed",
    "preprocess",
    "shortcuts",
    "signs",
    "supernet",
)

__all__ = ["Network", "Supernet"]
__getattr__ = lazy(__name__, {"Network": "network", "Supernet": "supernet"}, _MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
