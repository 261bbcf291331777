"""The packed signs of a map, made once for all packed layers of a network that read the map."""

from __future__ import annotations

import itertools
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastbandit import ops

__all__ = ["packed_signs", "shared_signs"]


class _Forward(threading.local):
    number = 0  # of the forward pass of a network that runs; 0: none


_forward = _Forward()
_numbers = itertools.count(1)


class _Shared:
    def __enter__(self) -> None:
        self._before, _forward.number = _forward.number, next(_numbers)

    def __exit__(self, *_: Any) -> None:
        _forward.number = self._before


def shared_signs() -> AbstractContextManager[None]:
    """One forward pass of a network: within it :func:`packed_signs` makes a map's bits once.

    A node of a cell has many edges. Outside of it a map is packed at each call: whether it has been
    written to since could not be told in inference mode, whose tensors have no version.
    """
    return nullcontext() if torch.compiler.is_compiling() else _Shared()


def packed_signs(x: Tensor) -> Tensor:
    """:func:`fastbandit.ops.pack_sign` of ``x``."""
    if torch.compiler.is_compiling() or _forward.number == 0:
        return ops.pack_sign(x)
    state = (_forward.number, 0 if x.is_inference() else x._version)
    kept: tuple[tuple[int, int], Tensor] | None = getattr(x, "_packed_signs", None)
    if kept is None or kept[0] != state:
        kept = (state, ops.pack_sign(x))
        x._packed_signs = kept  # type: ignore[attr-defined]
    return kept[1]
