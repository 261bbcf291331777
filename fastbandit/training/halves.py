"""Weights of convolutions in a half type, cast once for a whole step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit.nn.blocks import DepthwiseConv2d, DilatedConv2d, ReluConvBN, Signed
from fastbandit.nn.denoise import Denoise, DenoiseBlock
from fastbandit.nn.operations import DilConv, Downsample, SepConv, SepConvM
from fastbandit.nn.shortcuts import Plain

__all__ = ["Halves"]

# Layers that give their weights [C_out, C, k, k] to convolutions and to nothing else; autocast
# rounds them there at each use.
_KINDS: dict[type, Plain[nn.Module]] = {
    kind: Plain(kind)
    for kind in (
        *(DepthwiseConv2d, DilatedConv2d, ReluConvBN, Downsample, SepConv, SepConvM, DilConv),
        *(Denoise, DenoiseBlock, nn.Conv2d),
    )
}


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kept: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.weights = weights
        torch._foreach_copy_(kept, weights)
        return tuple(one.detach() for one in kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Made here, and not kept: what nobody else holds becomes the gradient without a copy.
        wide = [
            None if grad is None else torch.empty_like(weight)
            for grad, weight in zip(grads, ctx.weights, strict=True)
        ]
        there = [one for one in wide if one is not None]
        if there:
            torch._foreach_copy_(there, [grad for grad in grads if grad is not None])
        there.clear()
        return (None, *wide)


class Halves:
    """What layers compute with in place of their weights in a step that is recorded.

    Under autocast each convolution casts its weight at each of its uses, and the gradient back: as
    many launches of a few hundred numbers. Here all are cast by one operation at the beginning of a
    step, into buffers, and all gradients by one at its end. The bits are the same.

    Args:
        modules: the layers of the model. Those of other kinds, with 1-bit weights, or with
            something attached (see :class:`~fastbandit.nn.shortcuts.Plain`) stay as they are.
        dtype: the half type; None: nothing is cast.
    """

    def __init__(self, modules: Iterable[nn.Module], dtype: torch.dtype | None) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter]] = []
        for module in modules if dtype is not None else ():
            question = _KINDS.get(type(module))
            if question is None or not question(module):
                continue
            if isinstance(module, Signed) and module.sign:
                continue
            self._places += [
                (module, name, weight)
                for name, weight in module._parameters.items()
                if weight is not None and weight.dim() == 4 and weight.dtype == torch.float32
            ]
        self._kept = [torch.empty_like(weight, dtype=dtype) for *_, weight in self._places]
        for one in self._kept:
            one.requires_grad_(False)

    @contextmanager
    def put(self) -> Iterator[None]:
        """Within it the layers have the casts of their weights for weights."""
        if not self._places:
            yield
            return
        casts = _Cast.apply(self._kept, *(weight for *_, weight in self._places))
        try:
            for (module, name, _), cast in zip(self._places, casts, strict=True):
                module._parameters[name] = cast
            yield
        finally:
            for module, name, weight in self._places:
                module._parameters[name] = weight
