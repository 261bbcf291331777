"""A batch of training images out of a set of bytes: gather, crop, flip, cutout and conversion."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from fastbandit.ops import _linf
from fastbandit.ops._register import MISS, define, short_call

__all__ = ["augment_images"]

# Columns of ``draws``.
DRAWS = ("crop_row", "crop_column", "flip", "cutout_row", "cutout_column")

_MOST_PIXELS = (1 << 31) - 1  # as in csrc/check.h: sums with it do not overflow


# --- Reference ------------------------------------------------------------------------------------


def make_batch(
    op: str,
    images: Tensor,  # uint8 [M, C, H, W]
    ids: Tensor,  # [N]
    draws: Tensor | None,  # int64 [M, 5]
    fill: Tensor | None,  # [C]
    crop_padding: int,
    flip: bool,
    cutout_length: int,
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """The batch, for ``op`` as messages are to call it."""
    total, channels, height, width = images.shape
    # On a CPU indexing would take ids below zero. On a GPU looking would wait for the device, and
    # indexing itself raises there.
    if ids.device.type == "cpu":
        for bad in ids[(ids < 0) | (ids >= total)].tolist():
            raise RuntimeError(f"{op}: ids: expected 0 to {total - 1}, got {bad}")
    device = images.device
    row = torch.arange(height, device=device)
    column = torch.arange(width, device=device)
    rows = row.expand(len(ids), -1)  # [N, H]: the row of the source behind each row
    columns = column.expand(len(ids), -1)  # [N, W]
    drawn = None if draws is None else draws[ids].unbind(1)
    if flip and drawn is not None:
        columns = torch.where(drawn[2].bool().unsqueeze(1), width - 1 - columns, columns)
    if crop_padding and drawn is not None:
        rows = rows + (drawn[0] - crop_padding).unsqueeze(1)
        columns = columns + (drawn[1] - crop_padding).unsqueeze(1)
    x = images[
        ids.view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    x = _linf.pixels(x, _linf.compute_dtype(out_dtype))
    if crop_padding:
        inside_row = (rows >= 0) & (rows < height)
        inside_column = (columns >= 0) & (columns < width)
        x *= inside_row[:, None, :, None] & inside_column[:, None, None, :]
    if cutout_length and drawn is not None:
        top = (drawn[3] - cutout_length // 2).unsqueeze(1)
        left = (drawn[4] - cutout_length // 2).unsqueeze(1)
        hit_row = (row >= top) & (row < top + cutout_length)
        hit_column = (column >= left) & (column < left + cutout_length)
        hole = hit_row[:, None, :, None] & hit_column[:, None, None, :]
        colour = x.new_zeros(channels) if fill is None else fill.to(x.dtype)
        x = torch.where(hole, colour.view(1, -1, 1, 1), x)
    return x.to(out_dtype).contiguous(memory_format=memory_format)


_reference = partial(make_batch, "augment_images")


# --- Fake kernel ----------------------------------------------------------------------------------


def _fake(
    images: Tensor,
    ids: Tensor,
    draws: Tensor | None,
    fill: Tensor | None,
    crop_padding: int,
    flip: bool,
    cutout_length: int,
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    return torch.empty(
        (ids.shape[0], *images.shape[1:]),
        dtype=out_dtype,
        device=images.device,
        memory_format=memory_format,
    )


_op = define(
    "augment_images",
    "(Tensor images, Tensor ids, Tensor? draws, Tensor? fill, int crop_padding, bool flip, "
    "int cutout_length, ScalarType out_dtype, MemoryFormat memory_format) -> Tensor",
    _reference,
    _fake,
)

_native = short_call(_op)


# --- Public function ------------------------------------------------------------------------------


def check_batch(
    op: str,
    images: Tensor,
    ids: Tensor,
    draws: Tensor | None,
    fill: Tensor | None,
    crop_padding: int,
    flip: bool,
    cutout_length: int,
) -> None:
    _linf.check_constants(op, images=images, ids=ids)
    for name, tensor in (("draws", draws), ("cutout_fill", fill)):
        if tensor is not None:
            _linf.check_constants(op, **{name: tensor})
    if images.dtype != torch.uint8:
        raise TypeError(f"{op}: images: expected torch.uint8, got {images.dtype}")
    if images.dim() != 4 or 0 in images.shape[1:]:
        raise ValueError(
            f"{op}: images: expected shape (M, C, H, W) of at least one pixel, "
            f"got {tuple(images.shape)}"
        )
    if ids.dtype != torch.int64:
        raise TypeError(f"{op}: ids: expected torch.int64, got {ids.dtype}")
    if ids.dim() != 1:
        raise ValueError(f"{op}: ids: expected shape (N,), got {tuple(ids.shape)}")
    if draws is not None:
        if draws.dtype != torch.int64:
            raise TypeError(f"{op}: draws: expected torch.int64, got {draws.dtype}")
        if draws.shape != (images.shape[0], len(DRAWS)):
            raise ValueError(
                f"{op}: draws: expected shape ({images.shape[0]}, {len(DRAWS)}), one row for each "
                f"image of the set, got {tuple(draws.shape)}"
            )
    elif crop_padding or flip or cutout_length:
        raise ValueError(f"{op}: draws: expected a tensor with crop, flip or cutout, got None")
    if fill is not None:
        if fill.dtype != torch.float32:
            raise TypeError(f"{op}: cutout_fill: expected torch.float32, got {fill.dtype}")
        if fill.shape != images.shape[1:2]:
            raise ValueError(
                f"{op}: cutout_fill: expected shape ({images.shape[1]},), one value for each "
                f"channel, got {tuple(fill.shape)}"
            )
    for name, tensor in (("ids", ids), ("draws", draws), ("cutout_fill", fill)):
        if tensor is not None:
            _linf.check_device(op, name, tensor, "images", images)
    for name, value in (("crop_padding", crop_padding), ("cutout_length", cutout_length)):
        if not isinstance(value, int):
            raise TypeError(f"{op}: {name}: expected an int, got {type(value).__name__}")
        if not 0 <= value <= _MOST_PIXELS:
            raise ValueError(
                f"{op}: {name}: expected a number of pixels from 0 to {_MOST_PIXELS}, got {value}"
            )


def augment_images(
    images: Tensor,
    ids: Tensor,
    *,
    draws: Tensor | None = None,
    crop_padding: int = 0,
    flip: bool = False,
    cutout_length: int = 0,
    cutout_fill: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Take the images ``ids`` out of a set, change them at random and bring them to [0, 1].

    The same as ``images[ids] / 255``, then, where asked for: mirrored left and right; padded with
    ``crop_padding`` black pixels on every side and cropped to the size they had; a square of
    ``cutout_length`` pixels painted over. One pass, which reads the bytes once and writes the
    batch once. The random numbers are the caller's: those of an image belong to it wherever it
    stands in a batch, and a captured CUDA graph reads what the tensors hold at its replay.

    Args:
        images: the set, uint8 [M, C, H, W], any strides.
        ids: which images, int64 [N], any strides.
        draws: int64 [M, 5], a row for each image of the set: row and column of the crop's corner
            in the padded image, 0 to 2 ``crop_padding``; mirrored if not 0; row and column of the
            square's centre. Columns of what is not asked for are not read. Needed if any is.
        crop_padding: pixels of black added on each side before the crop; 0: no crop.
        flip: mirror those images whose draw says so.
        cutout_length: side of the square, which covers rows ``row - cutout_length // 2`` onward
            and may lie outside in part; 0: none.
        cutout_fill: its colour, float32 [C] in [0, 1]; None: black.
        out_dtype: computed in float32 (float64 for float64) and rounded once.
        memory_format: layout of the result, ``torch.contiguous_format`` or
            ``torch.channels_last``.

    Returns:
        [N, C, H, W] in ``out_dtype``. An id outside the set is an error on a CPU; on CUDA, where
        looking would wait for the device, its image is NaN (with the native kernel).

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a shape is not one of those above, ``draws`` is missing, a number is negative.
        RuntimeError: devices differ, or an id is outside the set.
    """
    arguments = (
        images,
        ids,
        draws,
        cutout_fill,
        crop_padding,
        flip,
        cutout_length,
        out_dtype,
        memory_format,
    )
    result = _native(*arguments)
    if result is not MISS:
        return result
    check_batch("augment_images", *arguments[:7])
    _linf.check_output("augment_images", out_dtype, memory_format)
    return _op(*arguments)
