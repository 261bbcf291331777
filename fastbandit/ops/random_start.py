"""A uniform random perturbation inside the L-infinity ball, the same numbers on every device."""

from __future__ import annotations

import torch
from torch import Tensor

from fastbandit.ops import _linf
from fastbandit.ops._register import MISS, define, short_call
from fastbandit.ops.philox import philox4x32, split64

__all__ = ["random_start"]


# --- Reference ------------------------------------------------------------------------------------


def _reference(
    image: Tensor,
    epsilon: float,
    seed: int,
    offset: int,
    seed_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    index: Tensor | None,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    delta = torch.empty_like(image, dtype=_result_dtype(image))
    if image.numel() == 0:
        return delta
    dtype = _linf.compute_dtype(delta.dtype)
    elements = image[0].numel()
    # One counter for four elements, numbered in C, H, W order whatever the strides.
    quarter = torch.arange((elements + 3) // 4, device=image.device)  # [Q]
    if index is None:
        index = torch.arange(image.shape[0], device=image.device)
    index_low, index_high = split64(index[:, None])  # [N, 1]
    key = split64(seed if seed_tensor is None else seed_tensor.reshape(()))
    offset_word = offset if offset_tensor is None else offset_tensor.reshape(())
    words = philox4x32((quarter, offset_word, index_low, index_high), key)
    bits = torch.stack(words, dim=-1).flatten(1)[:, :elements]  # [N, elements]
    # The upper 24 bits, as odd multiples of 2^-24 in (-1, 1): symmetric, never 0, exact in float32.
    odd = 2 * (bits >> 8) + (1 - (1 << 24))
    uniform = (odd.to(dtype) * 2.0**-24).view(image.shape)
    x = image if lower is None and upper is None else _linf.pixels(image, dtype)
    start = _linf.project(uniform * epsilon, x, epsilon, lower, upper)
    delta.copy_(_linf.round_toward_zero(start, delta.dtype))
    return delta


# --- Fake kernel ----------------------------------------------------------------------------------


def _result_dtype(image: Tensor) -> torch.dtype:
    return torch.float32 if image.dtype == torch.uint8 else image.dtype


def _fake(
    image: Tensor,
    epsilon: float,
    seed: int,
    offset: int,
    seed_tensor: Tensor | None,
    offset_tensor: Tensor | None,
    index: Tensor | None,
    lower: float | None,
    upper: float | None,
) -> Tensor:
    return torch.empty_like(image, dtype=_result_dtype(image))


_op = define(
    "random_start",
    "(Tensor image, float epsilon, int seed, int offset, Tensor? seed_tensor, "
    "Tensor? offset_tensor, Tensor? index, float? lower, float? upper) -> Tensor",
    _reference,
    _fake,
)

_native = short_call(_op)


# --- Public function ------------------------------------------------------------------------------


def _check(
    image: Tensor,
    epsilon: float,
    seed: int | Tensor,
    index: Tensor | None,
    offset: int | Tensor,
    lower: float | None,
    upper: float | None,
) -> None:
    op = "random_start"
    _linf.check_constants(op, image=image)
    if image.dtype != torch.uint8 and image.dtype not in _linf.FLOAT_TYPES:
        raise TypeError(
            f"{op}: image: expected float32, float64, bfloat16, float16 or uint8, got {image.dtype}"
        )
    if image.dim() == 0:
        raise ValueError(f"{op}: image: expected shape (N, ...), got ()")
    _linf.check_draw(op, "image", image, seed, offset)
    if index is not None:
        _linf.check_constants(op, index=index)
        if index.dtype != torch.int64:
            raise TypeError(f"{op}: index: expected torch.int64, got {index.dtype}")
        if index.dim() != 1 or index.shape[0] != image.shape[0]:
            raise ValueError(
                f"{op}: index: expected shape ({image.shape[0]},), one id for each image, "
                f"got {tuple(index.shape)}"
            )
        _linf.check_device(op, "index", index, "image", image)
    _linf.check_epsilon(op, epsilon)
    _linf.check_bounds(op, lower, upper)


def random_start(
    image: Tensor,
    *,
    epsilon: float,
    seed: int | Tensor,
    index: Tensor | None = None,
    offset: int | Tensor = 0,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    """Draw a perturbation uniformly from [-epsilon, epsilon], then clip it into the bounds.

    Each element is a function of ``seed``, ``offset``, the id of its image and its position in
    that image, and of nothing else: not of the batch it is drawn in, the layout, the device, the
    number of threads or torch's generators. Random bits are Philox4x32-10 with the key ``seed``
    and the counter (element // 4, offset, index low, index high), where ``element`` numbers the
    elements of one image in C, H, W order. With m the upper 24 bits of word ``element % 4``:
    ``delta = float32(2 m + 1 - 2^24) / 2^24 * epsilon`` (in float64 for a float64 image), then the
    clip, then rounding toward zero to bfloat16 or float16; so ``abs(delta) <= epsilon`` holds
    exactly for epsilon rounded to float32.

    Args:
        image: the images, [N, ...]; float32, float64, bfloat16, float16, or uint8 for
            value / 255. Any strides. Its values are read only if there is a bound.
        epsilon: radius of the ball, in the units of the image, >= 0.
        seed: in [0, 2^63); an int, or an int64 tensor of one element on the image's device, which
            a captured CUDA graph reads anew at each replay.
        index: ids of the images, [N], int64, >= 0; None is 0..N-1. An id gives the same start
            wherever it stands in a batch.
        offset: in [0, 2^32), int or tensor as ``seed``: the number of the draw, for restarts and
            epochs. The values of tensors are not checked: that would wait for the device.
        lower, upper: the range of valid pixels; None leaves that side open.

    Returns:
        delta, shape, layout and dtype of ``image`` (float32 for uint8).

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: ``index`` has another shape, a number is out of its range, ``lower > upper``.
        RuntimeError: devices differ, or an argument requires grad (there is no gradient).

    Source: the random start of Madry et al., arXiv 1706.06083; *Binary Neural Networks*,
    Algorithm 8, line 10.
    """
    if type(seed) is int and type(offset) is int:
        delta = _native(image, epsilon, seed, offset, None, None, index, lower, upper)
        if delta is not MISS:
            return delta
    _check(image, epsilon, seed, index, offset, lower, upper)
    seed, seed_tensor = (0, seed) if isinstance(seed, Tensor) else (seed, None)
    offset, offset_tensor = (0, offset) if isinstance(offset, Tensor) else (offset, None)
    return _op(image, epsilon, seed, offset, seed_tensor, offset_tensor, index, lower, upper)
