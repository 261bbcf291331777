"""One step of projected gradient descent on an L-infinity ball, in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastbandit.ops import _linf
from fastbandit.ops._register import MISS, define, short_call

__all__ = ["pgd_step_", "pgd_step_normalize_"]


# --- References -----------------------------------------------------------------------------------


def _step_reference(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    step_size: float,
    epsilon: float,
    lower: float | None,
    upper: float | None,
) -> None:
    dtype = _linf.compute_dtype(delta.dtype)
    # Multiplying a sign by the step is exact, so the step is one rounding: that of the sum.
    stepped = grad.to(dtype).sign().mul_(step_size).add_(delta.to(dtype))
    x = image if lower is None and upper is None else _linf.pixels(image, dtype)
    projected = _linf.project(stepped, x, epsilon, lower, upper)
    delta.copy_(_linf.round_toward_zero(projected, delta.dtype))


def _step_normalize_reference(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    step_size: float,
    epsilon: float,
    lower: float | None,
    upper: float | None,
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    _step_reference(delta, grad, image, step_size, epsilon, lower, upper)
    dtype = _linf.compute_dtype(delta.dtype)
    # The delta as it was written, rounding included: the model sees what the attack keeps.
    attacked = _linf.pixels(image, dtype) + delta.to(dtype)  # [N, C, H, W]
    mean, std = (statistic.to(dtype).view(-1, 1, 1) for statistic in (mean, std))
    normalized = (attacked - mean) / std
    return normalized.to(out_dtype).contiguous(memory_format=memory_format)


# --- Fake kernels ---------------------------------------------------------------------------------


def _step_fake(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    step_size: float,
    epsilon: float,
    lower: float | None,
    upper: float | None,
) -> None:
    return None


def _step_normalize_fake(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    step_size: float,
    epsilon: float,
    lower: float | None,
    upper: float | None,
    out_dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    return torch.empty(
        image.shape, dtype=out_dtype, device=image.device, memory_format=memory_format
    )


_step = define(
    "pgd_step_",
    "(Tensor(a!) delta, Tensor grad, Tensor image, float step_size, float epsilon, "
    "float? lower, float? upper) -> ()",
    _step_reference,
    _step_fake,
)
_step_normalize = define(
    "pgd_step_normalize_",
    "(Tensor(a!) delta, Tensor grad, Tensor image, Tensor mean, Tensor std, float step_size, "
    "float epsilon, float? lower, float? upper, ScalarType out_dtype, MemoryFormat memory_format) "
    "-> Tensor",
    _step_normalize_reference,
    _step_normalize_fake,
)

_native_step = short_call(_step)


# --- Public functions -----------------------------------------------------------------------------


def _check_step(
    op: str,
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    step_size: float,
    epsilon: float,
    lower: float | None,
    upper: float | None,
) -> None:
    _linf.check_constants(op, delta=delta, grad=grad, image=image)
    dtype = delta.dtype
    if dtype not in _linf.FLOAT_TYPES:
        raise TypeError(f"{op}: delta: expected float32, float64, bfloat16 or float16, got {dtype}")
    if grad.dtype != dtype:
        raise TypeError(f"{op}: grad: expected {dtype} as delta, got {grad.dtype}")
    if image.dtype not in (dtype, torch.float32, torch.uint8):
        raise TypeError(
            f"{op}: image: expected {dtype} as delta, torch.float32 or torch.uint8, "
            f"got {image.dtype}"
        )
    shape = delta.shape
    for name, tensor in (("grad", grad), ("image", image)):
        if tensor.shape != shape:
            raise ValueError(
                f"{op}: {name}: expected shape {tuple(shape)} as delta, got {tuple(tensor.shape)}"
            )
        _linf.check_device(op, name, tensor, "delta", delta)
    _linf.check_number(op, "step_size", step_size)
    if not -math.inf < step_size < math.inf:
        raise ValueError(f"{op}: step_size: expected a finite number, got {step_size}")
    _linf.check_epsilon(op, epsilon)
    _linf.check_bounds(op, lower, upper)


def pgd_step_(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    *,
    step_size: float,
    epsilon: float,
    lower: float | None = None,
    upper: float | None = None,
) -> None:
    """Take one sign step and project, in place.

    The same as ``delta += step_size * grad.sign()``, then ``delta.clamp_(-epsilon, epsilon)``,
    then ``delta.clamp_(lower - image, upper - image)`` for the bounds that are given; in one pass,
    computed in float32 (float64 for float64 tensors), and so that ``abs(delta) <= epsilon`` holds
    exactly for epsilon rounded to float32: bfloat16 and float16 results are rounded toward zero.
    As with ``torch.sign``, a gradient that is NaN takes no step; a NaN in ``delta``, or in
    ``image`` where there is a bound, gives NaN.

    Args:
        delta: the perturbation, any shape; float32, float64, bfloat16 or float16. Any strides, but
            no element may lie in memory twice. Overwritten.
        grad: gradient of the loss with respect to the model's input; shape, dtype and device of
            ``delta``, any strides.
        image: the unperturbed images, in the units of ``delta``: the shape and device of
            ``delta``, and its dtype, float32, or uint8 for value / 255. Read only if there is a
            bound.
        step_size: alpha, in the units of the image; negative to descend.
        epsilon: radius of the ball, in the units of the image, >= 0.
        lower, upper: the range of valid pixels, for example 0 and 1; None leaves that side open.
            With both None this is line 12 of Algorithm 8 as printed.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: shapes differ, a number is NaN or infinite, ``epsilon < 0``, ``lower > upper``.
        RuntimeError: devices differ, an argument requires grad (there is no gradient), or
            ``delta`` overlaps itself.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
    arXiv 1706.06083, Eq. (PGD); *Binary Neural Networks*, Algorithm 8, lines 11 and 12.
    """
    if _native_step(delta, grad, image, step_size, epsilon, lower, upper) is not MISS:
        return
    _check_step("pgd_step_", delta, grad, image, step_size, epsilon, lower, upper)
    _step(delta, grad, image, step_size, epsilon, lower, upper)


def pgd_step_normalize_(
    delta: Tensor,
    grad: Tensor,
    image: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    step_size: float,
    epsilon: float,
    lower: float | None = None,
    upper: float | None = None,
    out_dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """:func:`pgd_step_` that also returns the normalised model input, in the same pass.

    The result is ``(image + delta - mean) / std`` with the new ``delta``, as it is stored, computed
    in float32 (float64 for a float64 ``delta``) and rounded once to ``out_dtype``.

    Args:
        delta, grad, image: as for :func:`pgd_step_`, of shape [N, C, H, W]; ``image`` is always
            read.
        mean, std: [C], float32 or the dtype of ``delta``, in the units of the image; ``std`` has
            no zeros (not checked: that would wait for the device).
        step_size, epsilon, lower, upper: as for :func:`pgd_step_`.
        out_dtype: a floating-point dtype; None is that of ``delta``.
        memory_format: layout of the result, ``torch.contiguous_format`` or
            ``torch.channels_last``.

    Returns:
        [N, C, H, W] in ``out_dtype``.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`pgd_step_`, for all arguments.
    """
    op = "pgd_step_normalize_"
    _check_step(op, delta, grad, image, step_size, epsilon, lower, upper)
    if delta.dim() != 4:
        raise ValueError(f"{op}: delta: expected shape (N, C, H, W), got {tuple(delta.shape)}")
    _linf.check_statistics(op, "delta", delta, delta.dtype, mean, std)
    out_dtype = delta.dtype if out_dtype is None else out_dtype
    _linf.check_output(op, out_dtype, memory_format)
    return _step_normalize(
        delta,
        grad,
        image,
        mean,
        std,
        step_size,
        epsilon,
        lower,
        upper,
        out_dtype,
        memory_format,
    )
