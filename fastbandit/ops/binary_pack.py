"""Signs of a map as bits, 64 channels to a word: to bits and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastbandit.ops import _convolution, _linf
from fastbandit.ops._register import MISS, define, short_call

__all__ = ["pack_sign", "unpack_sign"]

WORD = 64  # channels of a word


def words_of(channels: int) -> int:
    """Words that hold one bit for each of ``channels``."""
    return (channels + WORD - 1) // WORD


# --- References -----------------------------------------------------------------------------------


def words_from(ones: Tensor) -> Tensor:
    """Bits, bool [N, C, H, W], as int64 [N, H, W, ceil(C / 64)]; bits past C are 0."""
    channels = ones.shape[1]
    words = words_of(channels)
    ones = F.pad(ones.permute(0, 2, 3, 1), (0, words * WORD - channels))
    places = torch.arange(WORD, device=ones.device)
    # Each bit occurs once, so the sum is the word; bit 63 is the sign of int64.
    return (ones.unflatten(3, (words, WORD)).long() << places).sum(-1)


def pack_reference(
    x: Tensor,  # [N, C, H, W]
    threshold: Tensor | None,  # [C]
) -> Tensor:
    if threshold is None:
        return words_from(x >= 0)
    return words_from(x >= threshold.view(-1, 1, 1))


def unpack_reference(
    bits: Tensor,  # int64 [N, H, W, words]
    channels: int,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    places = torch.arange(WORD, device=bits.device)
    ones = (bits.unsqueeze(-1) >> places & 1).flatten(3)[..., :channels].permute(0, 3, 1, 2)
    return (2 * ones - 1).to(dtype).contiguous(memory_format=memory_format)


# --- Fake kernels ---------------------------------------------------------------------------------


def _pack_fake(x: Tensor, threshold: Tensor | None) -> Tensor:
    n, channels, height, width = x.shape
    return torch.empty((n, height, width, words_of(channels)), dtype=torch.int64, device=x.device)


def _unpack_fake(
    bits: Tensor, channels: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> Tensor:
    n, height, width, _ = bits.shape
    shape = (n, channels, height, width)
    return torch.empty(shape, dtype=dtype, device=bits.device, memory_format=memory_format)


# --- The ops --------------------------------------------------------------------------------------

pack = define("pack_sign", "(Tensor x, Tensor? threshold) -> Tensor", pack_reference, _pack_fake)
unpack = define(
    "unpack_sign",
    "(Tensor bits, int channels, ScalarType dtype, MemoryFormat memory_format) -> Tensor",
    unpack_reference,
    _unpack_fake,
)

_native_pack = short_call(pack)


# --- Public functions -----------------------------------------------------------------------------


def check_bits(op: str, bits: Tensor, channels: int) -> None:
    """``bits`` is what :func:`pack_sign` makes of a map of ``channels`` channels."""
    _linf.check_tensors(op, bits=bits)
    if not isinstance(channels, int) or isinstance(channels, bool):
        raise TypeError(f"{op}: channels: expected an int, got {channels!r}")
    if not 1 <= channels <= _convolution.MOST_SIDE:
        raise ValueError(f"{op}: channels: expected 1 to {_convolution.MOST_SIDE}, got {channels}")
    if bits.dtype != torch.int64:
        raise TypeError(f"{op}: bits: expected torch.int64, got {bits.dtype}")
    if bits.dim() != 4 or bits.shape[3] != words_of(channels):
        raise ValueError(
            f"{op}: bits: expected shape (N, H, W, {words_of(channels)}), a bit for each of "
            f"{channels} channels, got {tuple(bits.shape)}"
        )


def pack_sign(x: Tensor, *, threshold: Tensor | None = None) -> Tensor:
    """The signs of ``x`` as bits: 1 where ``x >= threshold``, else 0; no gradient.

    A set bit stands for +1, a clear one for -1. So the sign of 0 and of -0.0 is +1, that of NaN is
    -1. Bits of a word past the last channel are 0.

    Args:
        x: [N, C, H, W] with C >= 1; float32, float64, bfloat16 or float16, any strides.
        threshold: [C], float32 or the dtype of x, compared in the wider of the two; None is 0.

    Weights of a convolution are packed in the same way, see :func:`binary_conv2d`.

    Returns:
        int64 [N, H, W, ceil(C / 64)]: bit ``c % 64`` of word ``c // 64`` is channel c. (torch has
        no shifts for uint64; bit 63 is the sign.)

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape is not one of those above.
        RuntimeError: devices differ, or x requires grad (:func:`sign_ste` has a gradient).

    Source: Rastegari et al., "XNOR-Net", arXiv 1603.05279, section 3.2.
    """
    # The short way is for the kernel, which checks its arguments itself.
    if type(x) is Tensor and x.is_cpu:
        bits = _native_pack(x, threshold)
        if bits is not MISS:
            return bits
    op = "pack_sign"
    _linf.check_constants(op, x=x)
    _convolution.check_input(op, x)
    if threshold is not None:
        _linf.check_constants(op, threshold=threshold)
        if threshold.dtype not in (torch.float32, x.dtype):
            wider = "" if x.dtype == torch.float32 else f" or {x.dtype} as x"
            raise TypeError(
                f"{op}: threshold: expected torch.float32{wider}, got {threshold.dtype}"
            )
        if tuple(threshold.shape) != (x.shape[1],):
            raise ValueError(
                f"{op}: threshold: expected shape ({x.shape[1]},), one for each channel of x, "
                f"got {tuple(threshold.shape)}"
            )
        _linf.check_device(op, "threshold", threshold, "x", x)
    # An exported program runs where this package is not.
    if torch.compiler.is_exporting():
        return pack_reference(x, threshold)
    return pack(x, threshold)


def unpack_sign(
    bits: Tensor,
    channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """The signs of :func:`pack_sign` as numbers, +1 and -1.

    Args:
        bits: int64 [N, H, W, ceil(channels / 64)], any strides.
        channels: C >= 1. Bits past it are not read.
        dtype: float32, float64, bfloat16 or float16.
        memory_format: ``torch.channels_last`` or ``torch.contiguous_format``.

    Returns:
        [N, C, H, W].

    Raises:
        TypeError: a dtype or type is not one of those above.
        ValueError: a shape, number or layout is not one of those above.
    """
    op = "unpack_sign"
    check_bits(op, bits, channels)
    _linf.check_output(op, dtype, memory_format)
    if torch.compiler.is_exporting():
        return unpack_reference(bits, channels, dtype, memory_format)
    return unpack(bits, channels, dtype, memory_format)
