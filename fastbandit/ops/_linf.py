"""The L-infinity ball in floating point, and the checks that its ops share.

Everything is computed in float32 (float64 for float64 tensors), each operation rounded once and
none contracted, so that every implementation gives the same bits.
"""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from fastbandit.ops._register import forward_mode, refuse_tangent

HALF_TYPES = (torch.float16, torch.bfloat16)
FLOAT_TYPES = (torch.float32, torch.float64, *HALF_TYPES)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which perturbations stored as ``dtype`` are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pixels(image: Tensor, dtype: torch.dtype) -> Tensor:
    """The image in the dtype of the computation; uint8 values are divided by 255."""
    if image.dtype != torch.uint8:
        return image.to(dtype)
    # By a tensor: on CUDA, division by a Python number multiplies by its rounded reciprocal.
    return image.to(dtype) / torch.full((), 255.0, dtype=dtype, device=image.device)


def project(
    delta: Tensor, x: Tensor, epsilon: float, lower: float | None, upper: float | None
) -> Tensor:
    """``min(max(delta, max(-epsilon, lower - x)), min(epsilon, upper - x))``; NaN propagates.

    ``delta`` and ``x`` are in the dtype of the computation. The difference of two images is never
    taken: x' - x would be rounded to the spacing of x and could exceed epsilon.
    """
    # Each bound's tensor takes the result: fresh memory costs more here than the arithmetic.
    if lower is None:
        delta = delta.clamp(min=-epsilon)
    else:
        low = (lower - x).clamp_(min=-epsilon)
        delta = torch.maximum(delta, low, out=low)
    if upper is None:
        return delta.clamp_(max=epsilon)
    high = (upper - x).clamp_(max=epsilon)
    return torch.minimum(delta, high, out=high)


def round_toward_zero(value: Tensor, dtype: torch.dtype) -> Tensor:
    """float32 to bfloat16 or float16 without ever growing in magnitude; other dtypes unchanged."""
    if dtype not in HALF_TYPES:
        return value.to(dtype)
    nearest = value.to(dtype)
    # The encoding is sign and magnitude: one less in the bits is the next value toward zero. This
    # turns an infinity that comes from rounding back into the largest finite value. A comparison
    # with NaN is false, so NaN stays.
    grown = nearest.to(torch.float32).abs() > value.abs()
    return (nearest.view(torch.int16) - grown.to(torch.int16)).view(dtype)


def check_statistics(
    op: str, like_name: str, like: Tensor, dtype: torch.dtype, mean: Tensor, std: Tensor
) -> None:
    """``mean`` and ``std``: a value for each channel of ``like``, [N, C, H, W]."""
    check_constants(op, mean=mean, std=std)
    for name, statistic in (("mean", mean), ("std", std)):
        if statistic.dtype not in (torch.float32, dtype):
            wider = "" if dtype == torch.float32 else f" or {dtype} as {like_name}"
            raise TypeError(f"{op}: {name}: expected torch.float32{wider}, got {statistic.dtype}")
        if statistic.dim() != 1 or statistic.shape[0] != like.shape[1]:
            raise ValueError(
                f"{op}: {name}: expected shape ({like.shape[1]},), one value for each channel of "
                f"{like_name}, got {tuple(statistic.shape)}"
            )
        check_device(op, name, statistic, like_name, like)


def check_tensors(op: str, /, **tensors: Tensor) -> None:
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")
        if value.layout != torch.strided:
            raise TypeError(f"{op}: {name}: expected a dense tensor, got layout {value.layout}")


def check_constants(op: str, /, **tensors: Tensor) -> None:
    """:func:`check_tensors`, for an op without gradient."""
    check_tensors(op, **tensors)
    if forward_mode():
        for name, value in tensors.items():
            refuse_tangent(op, name, value)


def check_number(op: str, name: str, value: float) -> None:
    # A tensor of one element is one: torch takes it for a number too.
    if not isinstance(value, (numbers.Real, Tensor)):
        raise TypeError(f"{op}: {name}: expected a number, got {type(value).__name__}")


def check_device(op: str, name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    if tensor.device != like.device:
        raise RuntimeError(
            f"{op}: {name}: expected device {like.device} as {like_name}, got {tensor.device}"
        )


def check_output(op: str, out_dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    if out_dtype not in FLOAT_TYPES:
        raise TypeError(
            f"{op}: out_dtype: expected float32, float64, bfloat16 or float16, got {out_dtype}"
        )
    if memory_format not in (torch.contiguous_format, torch.channels_last):
        raise ValueError(
            f"{op}: memory_format: expected torch.contiguous_format or torch.channels_last, "
            f"got {memory_format}"
        )


def check_draw(
    op: str, like_name: str, like: Tensor, seed: int | Tensor, offset: int | Tensor
) -> None:
    """The two numbers of a draw, each an int or an int64 tensor of one element."""
    for name, value, limit in (("seed", seed, 63), ("offset", offset, 32)):
        if isinstance(value, Tensor):
            if value.dtype != torch.int64:
                raise TypeError(
                    f"{op}: {name}: expected an int or a torch.int64 tensor, got {value.dtype}"
                )
            if value.numel() != 1:
                raise ValueError(
                    f"{op}: {name}: expected a tensor of one element, "
                    f"got shape {tuple(value.shape)}"
                )
            check_device(op, name, value, like_name, like)
        elif not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(
                f"{op}: {name}: expected an int or a torch.int64 tensor, got {type(value).__name__}"
            )
        elif not 0 <= value < 1 << limit:
            raise ValueError(f"{op}: {name}: expected an int in [0, 2^{limit}), got {value}")


def check_epsilon(op: str, epsilon: float) -> None:
    check_number(op, "epsilon", epsilon)
    if not 0.0 <= epsilon < math.inf:  # NaN fails too
        raise ValueError(f"{op}: epsilon: expected a finite number >= 0, got {epsilon}")


def check_bounds(op: str, lower: float | None, upper: float | None) -> None:
    for name, bound in (("lower", lower), ("upper", upper)):
        if bound is not None:
            check_number(op, name, bound)
        if bound is not None and not -math.inf < bound < math.inf:
            raise ValueError(f"{op}: {name}: expected a finite number or None, got {bound}")
    if lower is not None and upper is not None and lower > upper:
        raise ValueError(f"{op}: lower: expected at most upper = {upper}, got {lower}")
