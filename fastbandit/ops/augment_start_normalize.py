"""An adversarial step's input out of a set of bytes: batch, random start and model input."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbandit.ops import _linf
from fastbandit.ops._register import MISS, define, short_call
from fastbandit.ops.augment_images import check_batch, make_batch
from fastbandit.ops.random_start import _reference as start_reference

__all__ = ["augment_start_normalize"]


# --- Reference ------------------------------------------------------------------------------------


def _reference(
    images: Tensor,  # uint8 [M, C, H, W]
    ids: Tensor,  # [N]
    draws: Tensor | None,  # int64 [M, 5]
    fill: Tensor | None,  # [C]
    crop_padding: int,
    flip: bool,
    cutout_length: int,
    epsilon: float,
    seed: int,
    offset: int,
    seed_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    lower: float | None,
    upper: float | None,
    mean: Tensor,  # [C]
    std: Tensor,  # [C]
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    image = make_batch(
        "augment_start_normalize",
        images,
        ids,
        draws,
        fill,
        crop_padding,
        flip,
        cutout_length,
        torch.float32,
        memory_format,
    )
    delta = start_reference(
        image, epsilon, seed, offset, seed_tensor, offset_tensor, ids, lower, upper
    ).contiguous(memory_format=memory_format)
    normalized = (image + delta - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    return image, delta, normalized.to(out_dtype).contiguous(memory_format=memory_format)


# --- Fake kernel ----------------------------------------------------------------------------------


def _fake(
    images: Tensor,
    ids: Tensor,
    draws: Tensor | None,
    fill: Tensor | None,
    crop_padding: int,
    flip: bool,
    cutout_length: int,
    epsilon: float,
    seed: int,
    offset: int,
    seed_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    lower: float | None,
    upper: float | None,
    mean: Tensor,
    std: Tensor,
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (ids.shape[0], *images.shape[1:])

    def empty(dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=images.device, memory_format=memory_format)

    return empty(torch.float32), empty(torch.float32), empty(out_dtype)


_op = define(
    "augment_start_normalize",
    "(Tensor images, Tensor ids, Tensor? draws, Tensor? fill, int crop_padding, bool flip, "
    "int cutout_length, float epsilon, int seed, int offset, Tensor? seed_tensor, "
    "Tensor? offset_tensor, float? lower, float? upper, Tensor mean, Tensor std, "
    "ScalarType out_dtype, MemoryFormat memory_format) -> (Tensor, Tensor, Tensor)",
    _reference,
    _fake,
)

_native = short_call(_op)


# --- Public function ------------------------------------------------------------------------------


def augment_start_normalize(
    images: Tensor,
    ids: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    epsilon: float,
    seed: int | Tensor,
    offset: int | Tensor = 0,
    lower: float | None = None,
    upper: float | None = None,
    draws: Tensor | None = None,
    crop_padding: int = 0,
    flip: bool = False,
    cutout_length: int = 0,
    cutout_fill: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> tuple[Tensor, Tensor, Tensor]:
    """A batch, the start of its attack and the model's first input, in one pass over the bytes.

    The same bits as ``image = augment_images(images, ids, ...)``, then ``delta =
    random_start(image, index=ids, ...)``, then ``((image + delta - mean) / std).to(out_dtype)``.
    The steps of the attack go on with :func:`pgd_step_normalize_`.

    Args:
        images, ids, draws, crop_padding, flip, cutout_length, cutout_fill: as for
            :func:`augment_images`.
        mean, std: float32 [C], in the units of the image; ``std`` has no zeros (not checked: that
            would wait for the device).
        epsilon, seed, offset, lower, upper: as for :func:`random_start`; the ids of the images
            are ``ids``.
        out_dtype: dtype of the model's input, which is computed in float32 and rounded once.
        memory_format: layout of all three results, ``torch.contiguous_format`` or
            ``torch.channels_last``.

    Returns:
        ``(image, delta, normalized)``, each [N, C, H, W]; the first two float32, the last
        ``out_dtype``. An id outside the set is an error on a CPU; on CUDA, where looking would
        wait for the device, its image is NaN (with the native kernel).

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape is not one of those above, ``draws`` is missing, a number is out of its
            range, ``lower > upper``.
        RuntimeError: devices differ, or an id is outside the set.

    Source: *Binary Neural Networks*, Algorithm 8, line 10; Madry et al., arXiv 1706.06083.
    """
    batch = (images, ids, draws, cutout_fill, crop_padding, flip, cutout_length)
    output = (lower, upper, mean, std, out_dtype, memory_format)
    if type(seed) is int and type(offset) is int:
        result = _native(*batch, epsilon, seed, offset, None, None, *output)
        if result is not MISS:
            return result
    op = "augment_start_normalize"
    check_batch(op, *batch)
    _linf.check_draw(op, "images", images, seed, offset)
    _linf.check_epsilon(op, epsilon)
    _linf.check_bounds(op, lower, upper)
    _linf.check_statistics(op, "images", images, torch.float32, mean, std)
    _linf.check_output(op, out_dtype, memory_format)
    seed, seed_tensor = (0, seed) if isinstance(seed, Tensor) else (seed, None)
    offset, offset_tensor = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    return _op(*batch, epsilon, seed, offset, seed_tensor, offset_tensor, *output)
