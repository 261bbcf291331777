"""ReLU - depthwise convolution - 1x1 convolution - batch norm, as one op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fastbandit._modes import autocast_dtype
from fastbandit.ops import _convolution
from fastbandit.ops._linf import check_number, check_tensors
from fastbandit.ops._register import below_autograd, define, refuse_second_derivative
from fastbandit.ops.batch_norm import check_running, update_running
from fastbandit.ops.depthwise_conv2d import depthwise_conv2d
from fastbandit.ops.norm_sum import Normalized
from fastbandit.ops.norm_sum import serves as sum_serves

__all__ = ["conv_block"]


# --- References -----------------------------------------------------------------------------------


def _reference(
    xs: list[Tensor],  # [N, C_i, H, W] each
    depthwise: Tensor | None,  # [C, 1, k, k]
    pointwise: Tensor,  # [C_out, C, 1, 1]
    weight: Tensor | None,  # [C_out]
    bias: Tensor | None,  # [C_out]
    stride: int,
    padding: int,
    dilation: int,
    normalize: bool,
    eps: float,
    deferred: bool = False,  # the batch norm itself: z and its statistics are returned
) -> list[Tensor]:
    layout = _convolution.memory_format(xs[0])
    activated = torch.cat(xs, 1).relu()
    between = []
    if depthwise is not None:
        groups = activated.shape[1]
        activated = F.conv2d(activated, depthwise, None, stride, padding, dilation, groups)
        between.append(_convolution.in_layout(activated, layout))
    z = F.conv2d(activated, pointwise, None if normalize else bias)
    if not normalize:
        return [_convolution.in_layout(z, layout), *between]
    y, mean, inverse = torch.native_batch_norm(z, weight, bias, None, None, True, 0.0, eps)
    maps = (z, *between) if deferred else (y, *between, z)
    return [*(_convolution.in_layout(tensor, layout) for tensor in maps), mean, inverse]


def _backward_reference(
    grad: Tensor,  # [N, C_out, H_out, W_out]
    xs: list[Tensor],
    depthwise: Tensor | None,
    pointwise: Tensor,
    weight: Tensor | None,
    d: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    input: bool,
    weights: bool,
    added: bool = True,  # there is a bias, or a batch norm
) -> list[Tensor]:
    layout = _convolution.memory_format(xs[0])
    by_weight = []
    if z is not None:
        grad, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, z, weight, None, None, mean, inverse, True, 1e-5, [True, True, True]
        )
        by_weight = [grad_weight, grad_bias]
    elif added:
        by_weight = [grad.sum((0, 2, 3))]
    x = torch.cat(xs, 1)
    activated = x.relu()
    backward = _convolution.convolution_backward
    grad, grad_pointwise = backward(
        grad, activated if d is None else d, pointwise, [1, 1], [0, 0], [1, 1], 1, (True, True)
    )
    by_pointwise = [grad_pointwise.contiguous()]
    if depthwise is not None:
        grad, grad_depthwise = backward(
            grad, activated, depthwise, [stride] * 2, [padding] * 2, [dilation] * 2,
            x.shape[1], (True, True),
        )  # fmt: skip
        by_pointwise.append(grad_depthwise.contiguous())
    results = []
    if input:
        grad = torch.where(x > 0, grad, 0.0)
        parts = grad.split([part.shape[1] for part in xs], 1)
        results += [part.clone(memory_format=layout) for part in parts]
    return results + (by_pointwise + by_weight if weights else [])


# --- Fake kernels ---------------------------------------------------------------------------------


def _fake(
    xs: list[Tensor],
    depthwise: Tensor | None,
    pointwise: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    normalize: bool,
    eps: float,
    deferred: bool = False,
) -> list[Tensor]:
    x, layout = xs[0], _convolution.memory_format(xs[0])
    size = (x.shape[2], x.shape[3])
    if depthwise is not None:
        kernel = (depthwise.shape[2], depthwise.shape[3])
        size = _convolution.output_size(x, kernel, [stride] * 2, [padding] * 2, [dilation] * 2)

    def empty(channels: int) -> Tensor:
        shape = (x.shape[0], channels, *size)
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)

    results = [empty(pointwise.shape[0])]
    if depthwise is not None:
        results.append(empty(pointwise.shape[1]))
    if normalize:
        if not deferred:
            results.append(empty(pointwise.shape[0]))
        results += [x.new_empty(pointwise.shape[0]), x.new_empty(pointwise.shape[0])]
    return results


def _backward_fake(
    grad: Tensor,
    xs: list[Tensor],
    depthwise: Tensor | None,
    pointwise: Tensor,
    weight: Tensor | None,
    d: Tensor | None,
    z: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    input: bool,
    weights: bool,
    added: bool = True,
) -> list[Tensor]:
    layout = _convolution.memory_format(xs[0])
    results = [torch.empty_like(x, memory_format=layout) for x in xs] if input else []
    if weights:
        results.append(torch.empty_like(pointwise, memory_format=torch.contiguous_format))
        if depthwise is not None:
            results.append(torch.empty_like(depthwise, memory_format=torch.contiguous_format))
        vectors = int(added) if z is None else 2
        results += [pointwise.new_empty(pointwise.shape[0]) for _ in range(vectors)]
    return results


# --- The ops --------------------------------------------------------------------------------------


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, settings: tuple[Any, ...], *tensors: Any) -> Any:
        depthwise, pointwise, weight, bias, *xs = tensors
        results = below_autograd(_forward, xs, depthwise, pointwise, weight, bias, *settings)
        _, _, _, normalize, _, *deferred = settings
        saved = results[1:]
        mean = inverse = z = d = None
        if normalize:
            *saved, mean, inverse = saved
            if any(deferred):
                mean = inverse = None
            else:
                *saved, z = saved
        if depthwise is not None:
            (d,) = saved
        ctx.save_for_backward(depthwise, pointwise, weight, d, z, mean, inverse, *xs)
        ctx.settings = settings[:3]
        ctx.given = tuple(tensor is not None for tensor in tensors[:4])
        # The statistics have no gradient here, and torch gives them none either. Neither has what
        # is returned only because the op returns it.
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return (*results,)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_second_derivative("conv_block", grad)
        depthwise, pointwise, weight, d, z, mean, inverse, *xs = ctx.saved_tensors
        nothing = (None,) * (6 + len(xs))
        if grad is None:
            return nothing
        wanted_input = any(ctx.needs_input_grad[6:])
        wanted_weights = any(ctx.needs_input_grad[2:6]) and _convolution.gradient_wanted(
            ctx, *range(sum(ctx.given))
        )
        if not (wanted_input or wanted_weights):
            return nothing
        results = below_autograd(
            _backward, grad, xs, depthwise, pointwise, weight, d, z, mean, inverse,
            *ctx.settings, wanted_input, wanted_weights, ctx.given[3] or z is not None,
        )  # fmt: skip
        grad_xs = results[: len(xs)] if wanted_input else [None] * len(xs)
        by_depthwise = by_pointwise = by_weight = by_bias = None
        if wanted_weights:
            by_pointwise, *rest = results[len(xs) if wanted_input else 0 :]
            if depthwise is not None:
                by_depthwise, *rest = rest
            if z is not None:
                by_weight, *rest = rest
            by_bias = rest[0] if rest else None
        given = (by_depthwise, by_pointwise, by_weight, by_bias)
        by_tensor = (g if has else None for g, has in zip(given, ctx.given, strict=True))
        return (None, None, *by_tensor, *grad_xs)


class _ConvBlock:
    """Autograd sees tensors among the arguments of a Function, but not in a list of them."""

    @staticmethod
    def apply(
        xs: list[Tensor],
        depthwise: Tensor | None,
        pointwise: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        *settings: Any,
    ) -> list[Tensor]:
        return list(_Function.apply(len(xs), settings, depthwise, pointwise, weight, bias, *xs))


_SETTINGS = "int stride, int padding, int dilation"

_forward = define(
    "conv_block",
    "(Tensor[] xs, Tensor? depthwise, Tensor pointwise, Tensor? weight, Tensor? bias, "
    f"{_SETTINGS}, bool normalize, float eps, bool deferred=False) -> Tensor[]",
    _reference,
    _fake,
    autograd=_ConvBlock,
)
_backward = define(
    "conv_block_backward",
    "(Tensor grad, Tensor[] xs, Tensor? depthwise, Tensor pointwise, Tensor? weight, Tensor? d, "
    f"Tensor? z, Tensor? mean, Tensor? inverse, {_SETTINGS}, bool input, bool weights, "
    "bool added=True) -> Tensor[]",
    _backward_reference,
    _backward_fake,
)


@register_flop_formula(torch.ops.fastbandit.conv_block)
def _flops(
    xs: list[list[int]],
    depthwise: list[int] | None,
    pointwise: list[int],
    *_: Any,
    out_shape: list[list[int]],
    **__: Any,
) -> int:
    """Multiply-adds count as two, taps on the padding included, as in torch's own formulas."""
    n, c_out, h, w = out_shape[0]
    taps = depthwise[2] * depthwise[3] if depthwise is not None else 0
    return 2 * n * h * w * pointwise[1] * (c_out + taps)


@register_flop_formula(torch.ops.fastbandit.conv_block_backward)
def _backward_flops(
    grad: list[int],
    xs: list[list[int]],
    depthwise: list[int] | None,
    pointwise: list[int],
    *arguments: Any,
    **__: Any,
) -> int:
    wanted_input, wanted_weights = arguments[8:10]
    n, c_out, h, w = grad
    taps = depthwise[2] * depthwise[3] if depthwise is not None else 0
    return 2 * n * h * w * pointwise[1] * (c_out + taps) * (wanted_input + wanted_weights)


# --- Public function ------------------------------------------------------------------------------


def serves(xs: Sequence[Tensor], pointwise: Tensor) -> bool:
    """Whether the kernel of this package serves these tensors; see :func:`conv_block`."""
    return (
        all(_convolution.has_kernel("conv_block", x) for x in xs)
        and pointwise.dtype == torch.float32
        and autocast_dtype(xs[0]) is None
    )


def conv_block(
    x: Tensor | Sequence[Tensor],
    pointwise: Tensor,
    *,
    depthwise: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    normalize: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    norm: Callable[[Tensor], Tensor] | None = None,
    fold: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """ReLU, an optional depthwise convolution, a 1x1 convolution, then batch norm or a bias.

    What cells and separable operations of the search spaces are made of (the order ReLU - conv - BN
    is that of DARTS, Liu et al., ICLR 2019). Differentiable once. The same as::

        a = F.relu(torch.cat(x, 1))
        if depthwise is not None:
            a = F.conv2d(a, depthwise, None, stride, padding, dilation, groups=C)
        if not normalize:
            return F.conv2d(a, pointwise, bias)
        return ops.batch_norm(F.conv2d(a, pointwise), weight, bias, running_mean, running_var,
                              momentum=momentum, eps=eps)

    and computed like that by single ops, except for float32 in channels-last on a CPU outside
    autocast, where one kernel works through tiles that stay in the cache: several maps are not put
    side by side in memory, the ReLU and the gradient before the batch norm are not written out. The
    result for an image does not depend on the others of its batch (without ``normalize``), and the
    bits are the same for every number of threads.

    Args:
        x: [N, C, H, W], or several such maps that are taken side by side (not with ``depthwise``);
            only float32 in channels-last has a kernel.
        pointwise: [C_out, C, 1, 1].
        depthwise: [C, 1, k, k] or None.
        stride, padding, dilation: of the depthwise convolution.
        normalize: batch norm with the statistics of this batch.
        weight: [C_out] scale after the normalisation, or None for 1.
        bias: [C_out] added at the end, or None for 0.
        running_mean, running_var: see :func:`fastbandit.ops.batch_norm`.
        momentum, eps: of the batch norm.
        norm: another normalisation, called on the result; not with ``normalize``.
        fold: gives, for ``pointwise`` (or the weights of convolutions side by side, in a tuple),
            weight and bias of the convolution that has ``norm`` in it.
            Where one kernel computes all, that convolution is computed and ``norm`` is not called.

    Returns:
        [N, C_out, H_out, W_out]; channels-last if x is.

    Raises:
        TypeError: an argument is not of the type above.
        ValueError: several maps before a depthwise convolution, a stride or padding without one,
            a ``weight`` without ``normalize``, ``norm`` with it or with a ``bias``, ``fold``
            without ``norm``, one running statistic alone; a number is out of its range.
        RuntimeError: shapes do not fit, devices differ, or a second derivative is asked for.
    """
    op = "conv_block"
    if not isinstance(x, (Tensor, list, tuple)):
        raise TypeError(f"{op}: x: expected a tensor or several, got {type(x).__name__}")
    xs = [x] if isinstance(x, Tensor) else list(x)
    if not xs:
        raise ValueError(f"{op}: x: expected at least one tensor, got none")
    for part in xs:
        check_tensors(op, x=part)
        _convolution.check_optional(op, xs[0], x=part)
    check_tensors(op, pointwise=pointwise)
    _convolution.check_optional(
        op, xs[0],
        pointwise=pointwise, depthwise=depthwise, weight=weight, bias=bias,
        running_mean=running_mean, running_var=running_var,
    )  # fmt: skip
    for name, value in (("stride", stride), ("padding", padding), ("dilation", dilation)):
        if not isinstance(value, int):
            raise TypeError(f"{op}: {name}: expected an int, got {type(value).__name__}")
        _convolution.pair(op, name, value, 0 if name == "padding" else 1)
    if depthwise is not None and len(xs) > 1:
        raise ValueError(
            f"{op}: x: expected one tensor before a depthwise convolution, got {len(xs)}"
        )
    if depthwise is None and (stride, padding) != (1, 0):
        raise ValueError(
            f"{op}: stride, padding: expected 1 and 0 without a depthwise convolution, "
            f"got {stride} and {padding}"
        )
    check_normalization(
        op, normalize, weight, bias, norm, fold, running_mean, running_var, momentum, eps
    )
    return computed(
        xs, pointwise, depthwise=depthwise, stride=stride, padding=padding, dilation=dilation,
        normalize=normalize, weight=weight, bias=bias, running_mean=running_mean,
        running_var=running_var, momentum=momentum, eps=eps, norm=norm, fold=fold,
    )  # fmt: skip


def check_normalization(
    op: str,
    normalize: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: Callable[[Tensor], Tensor] | None = None,
    fold: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> None:
    """Refuse what is wrong with the arguments of :func:`conv_block` about its end."""
    check_running(op, running_mean, running_var)
    check_number(op, "momentum", momentum)
    check_number(op, "eps", eps)
    if weight is not None and not normalize:
        raise ValueError(f"{op}: weight: expected None without normalize, got a tensor")
    if (norm is not None and normalize) or (fold is not None and norm is None):
        raise ValueError(f"{op}: norm, fold: expected norm alone or both, without normalize")
    if bias is not None and norm is not None:
        raise ValueError(f"{op}: bias: expected None with norm, which has its own; got a tensor")


def computed(xs: Sequence[Tensor], pointwise: Tensor, **how: Any) -> Tensor:
    """:func:`conv_block` of arguments that are known to be right, as those of a layer are.

    The checks would take a tenth of a call on small maps.
    """
    y: Tensor = as_term(xs, pointwise, **how)
    return y


def as_term(
    xs: Sequence[Tensor],
    pointwise: Tensor,
    *,
    depthwise: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    normalize: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    norm: Callable[[Tensor], Any] | None = None,
    fold: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
    deferred: bool = False,
) -> Any:
    """:func:`computed`, whose batch norm may be left to a sum.

    Args:
        deferred: with ``normalize``: what is returned is a term of :func:`fastbandit.ops.norm_sum`,
            normalised or not, as is faster.
    """
    if serves(xs, pointwise):
        folded = fold is not None
        if fold is not None:
            pointwise, bias = fold(pointwise)
        if deferred and sum_serves(
            xs[0], _outputs(xs[0], pointwise, depthwise, stride, padding, dilation)
        ):
            z, *_, mean, inverse = _forward(
                xs, depthwise, pointwise, None, None, stride, padding, dilation, True, eps, True
            )
            return Normalized(
                z, weight, bias, running_mean, running_var, momentum, eps, (mean, inverse)
            )
        results = _forward(
            xs, depthwise, pointwise, weight, bias, stride, padding, dilation, normalize, eps
        )
        y: Tensor = results[0]
        if normalize and running_mean is not None and running_var is not None:
            *_, mean, inverse = results
            update_running(running_mean, running_var, mean, inverse, y, momentum, eps)
        return y if norm is None or folded else norm(y)
    joined = xs[0] if len(xs) == 1 else torch.cat(list(xs), 1)
    if depthwise is None:
        activated = F.relu(joined)
    else:
        activated = depthwise_conv2d(
            joined, depthwise, stride=stride, padding=padding, dilation=dilation, relu=True
        )
    if not normalize:
        y = F.conv2d(activated, pointwise, bias)
        return y if norm is None else norm(y)
    result = Normalized(
        F.conv2d(activated, pointwise), weight, bias, running_mean, running_var, momentum, eps
    )
    return result if deferred else result.close()


def _outputs(
    x: Tensor, pointwise: Tensor, depthwise: Tensor | None, stride: int, padding: int, dilation: int
) -> int:
    """Elements of the result."""
    height, width = x.shape[2:]
    if depthwise is not None:
        kernel = (depthwise.shape[2], depthwise.shape[3])
        height, width = _convolution.output_size(
            x, kernel, [stride] * 2, [padding] * 2, [dilation] * 2
        )
    return x.shape[0] * pointwise.shape[0] * height * width


def normalized(
    y: Tensor,
    *,
    normalize: bool = False,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    norm: Callable[[Tensor], Any] | None = None,
    fold: object = None,
    deferred: bool = False,
) -> Any:
    """What :func:`as_term` does to the result of its convolution, by single ops.

    Args:
        fold: not used: the convolution is done.
    """
    if normalize:
        result = Normalized(y, weight, bias, running_mean, running_var, momentum, eps)
        return result if deferred else result.close()
    if bias is not None:
        y = y + bias.view(-1, 1, 1)
    return y if norm is None else norm(y)
