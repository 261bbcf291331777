"""The packed signs of a map, made once for all packed layers of a network that read the map."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
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


def packed_signs(*maps: Tensor) -> Tensor:
    """:func:`fastbandit.ops.pack_sign` of the maps side by side.

    Args:
        maps: at least one, [N, C_i, H, W].

    Returns:
        int64 [N, H, W, ceil(C / 64)], C the sum of the C_i.
    """
    if len(maps) == 1:
        return _signs(maps[0])
    widths = [one.shape[1] for one in maps]
    # Where words are whole, or as many maps of one width fill each, bits are put together: a
    # thirty-second of what the numbers would move.
    if all(width % 64 == 0 for width in widths):
        return torch.cat([_signs(one) for one in maps], -1)
    if 64 % widths[0] != 0 or len(set(widths)) > 1:
        return _signs(torch.cat(maps, 1))
    return _joined([_signs(one) for one in maps], widths[0])


def _joined(words: Sequence[Tensor], width: int) -> Tensor:
    """Maps of ``width`` channels, which divides 64, in one word each: as many as fit, to a word."""
    result = []
    for first in range(0, len(words), 64 // width):
        word, *others = words[first : first + 64 // width]
        for index, other in enumerate(others, 1):
            # What lies past the channels of a map is 0.
            word = word | (other << width * index)
        result.append(word)
    return result[0] if len(result) == 1 else torch.cat(result, -1)


def _signs(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() or _forward.number == 0:
        return ops.pack_sign(x)
    state = (_forward.number, 0 if x.is_inference() else x._version)
    kept: tuple[tuple[int, int], Tensor] | None = getattr(x, "_packed_signs", None)
    if kept is None or kept[0] != state:
        kept = (state, ops.pack_sign(x))
        x._packed_signs = kept  # type: ignore[attr-defined]
    return kept[1]
