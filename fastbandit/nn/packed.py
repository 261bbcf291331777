"""What the packed layers of a 1-bit network have in common: bits of weights, bits of maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit import ops
from fastbandit.nn.signs import packed_signs
from fastbandit.ops.binary_ste import pack_weight

__all__ = ["PackedLayer", "wide"]

_WIDE = (torch.float32, torch.float64)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scales and shifts, in which sums are scaled: float32, or float64 for that."""
    return torch.promote_types(dtype, torch.float32)


class PackedLayer(nn.Module):
    """What the packed layers have in common: 1-bit convolutions as bits and settings, by name.

    They have no gradient and are for evaluation only.

    Attributes:
        settings: of each convolution by name, the arguments of
            :func:`fastbandit.ops.binary_conv2d`; its words are the buffer ``<name>_bits``.

    Raises:
        RuntimeError: in a call, of an input that requires grad, or in training mode.
    """

    def __init__(self) -> None:
        super().__init__()
        self.settings: dict[str, dict[str, Any]] = {}
        self.training = False

    def _keep(self, name: str, conv: Any) -> None:
        if conv.full_precision or conv.real_weights:
            raise RuntimeError("pack: expected the child, got a layer with real weights")
        groups = conv.groups
        self.register_buffer(f"{name}_bits", pack_weight(conv.weight.detach(), groups))
        self.settings[name] = {
            "channels": conv.weight.shape[0] if groups > 1 else conv.weight.shape[1],
            # One number: only with such does the op take its short way.
            "kernel_size": conv.weight.shape[2],
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": groups,
            "pad": conv.pad,
        }

    def _keep_affine(self, scale: Tensor | None, shift: Tensor | None) -> None:
        self.register_buffer("scale", None if scale is None else scale.detach())
        self.register_buffer("shift", None if shift is None else shift.detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        for name in self.settings:  # in any layout of maps the words of a pixel stay side by side
            setattr(self, f"{name}_bits", getattr(self, f"{name}_bits").contiguous())
        return self

    def _bits(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        kind = type(self).__name__
        if self.training:
            raise RuntimeError(f"{kind}: expected evaluation mode, got training mode")
        maps = [x] if isinstance(x, Tensor) else x
        if torch.is_grad_enabled() and any(one.requires_grad for one in maps):
            raise RuntimeError(
                f"{kind}: expected an input without gradient, got one that requires grad: a packed "
                "layer has none (attack or train the network it was packed from, whose logits are "
                "the same, or call this one under torch.no_grad())"
            )
        return packed_signs(*maps)

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        scale, shift = self._buffers["scale"], self._buffers["shift"]
        # A module that was cast to half precision is one with rounded scales.
        if scale is not None and scale.dtype not in _WIDE:
            scale = scale.float()
        if shift is not None and shift.dtype not in _WIDE:
            shift = shift.float()
        return scale, shift

    def _scaled(self, name: str, bits: Tensor, dtype: torch.dtype) -> Tensor:
        words = self._buffers[f"{name}_bits"]
        assert words is not None
        scale, shift = self._affine()
        return ops.binary_conv2d(
            bits, words, **self.settings[name], scale=scale, bias=shift, out_dtype=dtype
        )
