"""The sum of several maps, some of which are batch-normalised first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbandit.ops import _convolution
from fastbandit.ops._linf import FLOAT_TYPES, check_number, check_tensors, compute_dtype
from fastbandit.ops._register import below_autograd, define, refuse_second_derivative
from fastbandit.ops.batch_norm import by_itself, check_running

__all__ = ["Normalized", "norm_sum"]

# What is done to a term before it is added: 0, or the first with any of the others. As in
# csrc/norm_checks.h.
_NORMALIZED, _WEIGHT, _BIAS, _GIVEN = 1, 2, 4, 8

# Fewer elements are added as fast by torch: the call of an op that is declared in Python costs what
# the kernel saves. (docs/kernels.md)
_LEAST_ELEMENTS = 1 << 16

# Where the gradients of several readers wait for each other, to be added at once. A CPU is not
# faster so: what waits is memory that is fresh each time. (docs/kernels.md)
_WAITING_DEVICES = ("cuda",)

# Of a launch of the CUDA kernels, whose parameters hold the addresses. As in csrc/cuda/norm_sum.h.
_MOST_TERMS = 32
_MOST_CHANNELS = 4096


@dataclass(eq=False, slots=True)
class Normalized:
    """A term of :func:`norm_sum`: ``x`` after batch norm with the statistics of this batch.

    Args:
        x: [N, C, H, W] with more than one value for each channel.
        weight, bias: [C] or None for 1 and 0.
        running_mean, running_var: [C], moved towards mean and unbiased variance of the batch by
            ``momentum``, or None.
        momentum: see there.
        eps: added to the variance.
        statistics: mean and reciprocal deviation of the batch, [C] each, where the caller has them;
            they must be those of ``x`` and ``eps``. The gradient is that of a function of ``x``
            all the same.
        keep: gets mean and unbiased variance of the batch, [C] each, in place of ``running_mean``
            and ``running_var`` where a kernel of this package has computed them.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    momentum: float = 0.1
    eps: float = 1e-5
    statistics: tuple[Tensor, Tensor] | None = None
    keep: Callable[[Tensor, Tensor], None] | None = None

    @property
    def kind(self) -> int:
        """The bits of ``kinds`` of the op."""
        weight, bias, given = (one is not None for one in (self.weight, self.bias, self.statistics))
        return _NORMALIZED + _WEIGHT * weight + _BIAS * bias + _GIVEN * given

    def close(self) -> Tensor:
        """The term by itself: on CUDA a sum of one, whose two launches are half of torch's."""
        if self.x.is_cuda and _serves_all([self]):
            return _by_kernel([self])
        return by_itself(
            self.x, self.weight, self.bias, self.running_mean, self.running_var,
            self.momentum, self.eps,
        )  # fmt: skip


# --- References -----------------------------------------------------------------------------------


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(-1, 1, 1)


def _taken_apart(
    kinds: Sequence[int], vectors: Sequence[Tensor]
) -> list[tuple[Tensor | None, Tensor | None]]:
    """Weight and bias of each term."""
    left = iter(vectors)
    result = []
    for kind in kinds:
        weight = next(left) if kind & _WEIGHT else None
        bias = next(left) if kind & _BIAS else None
        if kind & _GIVEN:
            next(left), next(left)
        result.append((weight, bias))
    return result


def _reference(
    xs: list[Tensor],  # [N, C, H, W] each
    kinds: list[int],
    vectors: list[Tensor],  # weight, bias, mean, inverse of each term as its kind says, [C] each
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Statistics that are given are those of x, and so found again: then they are differentiated.
    first = xs[0]
    wide = compute_dtype(first.dtype)
    total: Tensor | None = None
    means, inverses, unbiased = [], [], []
    for x, kind, (weight, bias) in zip(xs, kinds, _taken_apart(kinds, vectors), strict=True):
        term = x.to(wide)
        if kind & _NORMALIZED:
            if x.numel() <= x.shape[1]:
                raise RuntimeError(
                    "norm_sum: xs: expected more than one value for each channel, got shape "
                    f"{list(x.shape)}"
                )
            variance, mean = torch.var_mean(term, (0, 2, 3), correction=0)
            inverse = (variance + eps).rsqrt()
            means.append(mean)
            inverses.append(inverse)
            count = x.numel() // x.shape[1]
            unbiased.append(variance * (count / (count - 1)))
            scale = inverse if weight is None else inverse * weight
            term = (term - _per_channel(mean)) * _per_channel(scale)
            if bias is not None:
                term = term + _per_channel(bias)
        total = term if total is None else total + term
    assert total is not None
    y = _convolution.in_layout(total.to(first.dtype), _convolution.memory_format(first))
    if total is first:
        y = y.clone()
    nothing = first.new_empty((0, first.shape[1]), dtype=wide)
    mean, inverse, variance = (
        torch.stack(rows) if rows else nothing.clone() for rows in (means, inverses, unbiased)
    )
    return y, mean, inverse, variance


def _backward_reference(
    grad: Tensor,  # [N, C, H, W]
    xs: list[Tensor],  # the normalised terms
    kinds: list[int],
    vectors: list[Tensor],  # their weights
    mean: Tensor,  # [len(xs), C]
    inverse: Tensor,
) -> list[Tensor]:
    wide = mean.dtype
    g = grad.to(wide)
    count = grad.numel() // grad.shape[1]
    by_bias = g.sum((0, 2, 3))
    grads, by_weight = [], []
    for x, middle, scale, (weight, _) in zip(
        xs, mean, inverse, _taken_apart(kinds, vectors), strict=True
    ):
        normal = (x.to(wide) - _per_channel(middle)) * _per_channel(scale)
        product = (g * normal).sum((0, 2, 3))
        factor = scale if weight is None else scale * weight
        inner = g - _per_channel(by_bias / count) - normal * _per_channel(product / count)
        grads.append(
            (inner * _per_channel(factor))
            .to(x.dtype)
            .contiguous(memory_format=_convolution.memory_format(x))
        )
        by_weight.append(product)
    return [*grads, torch.stack(by_weight), by_bias]


# --- Fake kernels ---------------------------------------------------------------------------------


def _empty_map(x: Tensor) -> Tensor:
    layout = _convolution.memory_format(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fake(
    xs: list[Tensor], kinds: list[int], vectors: list[Tensor], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = xs[0]
    rows = sum(kind & _NORMALIZED for kind in kinds)
    mean, inverse, variance = (
        x.new_empty((rows, x.shape[1]), dtype=compute_dtype(x.dtype)) for _ in range(3)
    )
    return _empty_map(x), mean, inverse, variance


def _backward_fake(
    grad: Tensor,
    xs: list[Tensor],
    kinds: list[int],
    vectors: list[Tensor],
    mean: Tensor,
    inverse: Tensor,
) -> list[Tensor]:
    by_weight = torch.empty_like(mean, memory_format=torch.contiguous_format)
    return [*map(_empty_map, xs), by_weight, mean.new_empty(mean.shape[1])]


# --- The ops --------------------------------------------------------------------------------------


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kinds: list[int], eps: float, count: int, *tensors: Tensor) -> Any:
        xs, vectors = list(tensors[:count]), list(tensors[count:])
        y, mean, inverse, variance = below_autograd(_forward, xs, kinds, vectors, eps)
        normalized = [x for x, kind in zip(xs, kinds, strict=True) if kind]
        weights = [weight for weight, _ in _taken_apart(kinds, vectors) if weight is not None]
        ctx.save_for_backward(mean, inverse, *normalized, *weights)
        ctx.kinds, ctx.vectors = kinds, len(vectors)
        # The statistics have no gradient here, and torch gives them none either.
        ctx.mark_non_differentiable(mean, inverse, variance)
        ctx.set_materialize_grads(False)
        return y, mean, inverse, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
        kinds = ctx.kinds
        if any(kinds):  # a sum alone is linear, and its gradient the one that came
            refuse_second_derivative("norm_sum" if len(kinds) > 1 else "batch_norm", grad)
        if grad is None:
            return (None,) * (3 + len(kinds) + ctx.vectors)
        mean, inverse, *tensors = ctx.saved_tensors
        rows = len(mean)
        by_x: list[Tensor] = []
        if rows:
            own = [kind & (_NORMALIZED | _WEIGHT) for kind in kinds if kind]
            by_x = below_autograd(
                _backward, grad, tensors[:rows], own, tensors[rows:], mean, inverse
            )
            *by_x, by_weight, by_bias = by_x
        of_xs: list[Tensor] = []
        of_vectors: list[Tensor | None] = []
        row = 0
        for kind in kinds:
            of_xs.append(by_x[row] if kind else grad)
            if kind & _WEIGHT:
                of_vectors.append(by_weight[row])
            if kind & _BIAS:
                # Each its own: a parameter may keep what it is given.
                of_vectors.append(by_bias.clone() if row else by_bias)
            if kind & _GIVEN:
                of_vectors += [None, None]
            row += kind & _NORMALIZED
        needed = ctx.needs_input_grad[3:]
        return (None, None, None, *(
            g if want else None for g, want in zip([*of_xs, *of_vectors], needed, strict=True)
        ))  # fmt: skip


class _NormSum:
    """Autograd sees tensors among the arguments of a Function, but not in a list of them."""

    @staticmethod
    def apply(
        xs: list[Tensor], kinds: list[int], vectors: list[Tensor], eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        result: tuple[Tensor, Tensor, Tensor, Tensor] = _Function.apply(
            kinds, eps, len(xs), *xs, *vectors
        )
        return result


_forward = define(
    "norm_sum",
    "(Tensor[] xs, int[] kinds, Tensor[] vectors, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    _reference,
    _fake,
    autograd=_NormSum,
)
_backward = define(
    "norm_sum_backward",
    "(Tensor grad, Tensor[] xs, int[] kinds, Tensor[] vectors, Tensor mean, Tensor inverse) "
    "-> Tensor[]",
    _backward_reference,
    _backward_fake,
)


# --- Public function ------------------------------------------------------------------------------


def serves(x: Tensor, elements: int | None = None) -> bool:
    """Whether the kernel of this package serves terms like ``x``, of that many elements."""
    return (
        not torch.compiler.is_compiling()  # which is asked nothing about sizes that may be open
        and (x.numel() if elements is None else elements) >= _LEAST_ELEMENTS
        and _convolution.has_kernel("norm_sum", x, FLOAT_TYPES if x.is_cuda else (torch.float32,))
    )


def _serves_all(terms: Sequence[Tensor | Normalized]) -> bool:
    xs = [term if isinstance(term, Tensor) else term.x for term in terms]
    first = xs[0]
    if len(xs) > _MOST_TERMS or first.shape[1] > _MOST_CHANNELS or not all(map(serves, xs)):
        return False
    wide = compute_dtype(first.dtype)
    eps = None
    for x, term in zip(xs, terms, strict=True):
        if x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            return False
        if isinstance(term, Tensor):
            continue
        if eps is not None and term.eps != eps:
            return False
        eps = term.eps
        for vector in (term.weight, term.bias, term.running_mean, term.running_var):
            if vector is not None and (vector.dtype != wide or not vector.is_contiguous()):
                return False
    return True


def norm_sum(terms: Sequence[Tensor | Normalized]) -> Tensor:
    """The sum of maps, some of them batch-normalised: a node of a cell. Differentiable once.

    The same as the sum, from the first to the last, of the maps and of
    ``ops.batch_norm(t.x, t.weight, t.bias, t.running_mean, t.running_var, momentum=t.momentum,
    eps=t.eps)`` for each ``t`` of :class:`Normalized`, and computed like that by single ops, except
    where one kernel does it: channels-last maps of one size and dtype with 2^16 elements or more,
    float32 on a CPU and any floating type on a GPU. It writes the sum alone, and backward reads the
    gradient, which the terms share, for all of them at once. Statistics are summed in blocks, about
    the first value of each channel, the blocks in float64 and in order; each term is rounded to
    float32 (float64 of float64) and added in order: the same bits for any number of threads.

    Args:
        terms: [N, C, H, W] each, at least one.

    Returns:
        [N, C, H, W], like the first term. Of a single tensor: that tensor, not a copy.

    Raises:
        TypeError: a term is neither a tensor nor :class:`Normalized`.
        ValueError: there is none; one of ``running_mean`` and ``running_var`` is None alone.
        RuntimeError: shapes do not fit, devices differ, or a second derivative is asked for.
    """
    op = "norm_sum"
    if not isinstance(terms, (list, tuple)):
        raise TypeError(f"{op}: terms: expected a list, got {type(terms).__name__}")
    if not terms:
        raise ValueError(f"{op}: terms: expected at least one, got none")
    for term in terms:
        if isinstance(term, Normalized):
            _check(op, term)
        else:
            check_tensors(op, terms=term)
    return computed(terms)


def _check(op: str, term: Normalized) -> None:
    check_tensors(op, x=term.x)
    check_running(op, term.running_mean, term.running_var)
    check_number(op, "momentum", term.momentum)
    check_number(op, "eps", term.eps)
    mean, inverse = term.statistics or (None, None)
    _convolution.check_optional(
        op, term.x,
        weight=term.weight, bias=term.bias, mean=mean, inverse=inverse,
        running_mean=term.running_mean, running_var=term.running_var,
    )  # fmt: skip


def computed(terms: Sequence[Tensor | Normalized]) -> Tensor:
    """:func:`norm_sum` of terms that are known to be right, as those of layers are."""
    first = terms[0]
    if len(terms) == 1:
        return first if isinstance(first, Tensor) else first.close()
    return _by_kernel(terms) if _serves_all(terms) else _one_by_one(terms)


def _by_kernel(terms: Sequence[Tensor | Normalized]) -> Tensor:
    normalized = [term for term in terms if not isinstance(term, Tensor)]
    xs = [term if isinstance(term, Tensor) else term.x for term in terms]
    kinds = [0 if isinstance(term, Tensor) else term.kind for term in terms]
    vectors = [
        vector
        for term in normalized
        for vector in (term.weight, term.bias, *(term.statistics or ()))
        if vector is not None
    ]
    eps = normalized[0].eps if normalized else 0.0
    y, mean, _, variance = _forward(xs, kinds, vectors, eps)
    _update_running(normalized, mean, variance)
    result: Tensor = y
    return result


class _Fork(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        arrived = [grad for grad in grads if grad is not None]
        return (computed(arrived) if arrived else None), None


def waits(x: Tensor) -> bool:
    """Whether :func:`fork` may do anything with x, by what is asked at once."""
    return x.device.type in _WAITING_DEVICES and torch.is_grad_enabled() and x.requires_grad


def fork(x: Tensor, count: int) -> Sequence[Tensor]:
    """``x`` for ``count`` readers, whose gradients are added at once, in the order of the readers.

    autograd adds them two at a time, which reads and writes the sum for each but the first. Where
    that is as fast, the kernel does not serve ``x``, or no gradient is asked for, each reader gets
    ``x`` itself.
    """
    if not (waits(x) and serves(x)):
        return [x] * count
    readers: tuple[Tensor, ...] = _Fork.apply(x, count)
    return readers


def _one_by_one(terms: Sequence[Tensor | Normalized]) -> Tensor:
    total: Tensor | None = None
    for count, term in enumerate(terms):
        y = term if isinstance(term, Tensor) else term.close()
        # In place where the total is a sum that was made here: what a module returned may be
        # somebody else's too. Under autocast terms differ in dtype, and the sum has the wider one.
        # A compiler reuses memory itself.
        if total is None:
            total = y
        elif count < 2 or total.dtype != y.dtype or torch.compiler.is_compiling():
            total = total + y
        else:
            total = total.add_(y)
    assert total is not None
    return total


@torch.no_grad()
def _update_running(terms: Sequence[Normalized], mean: Tensor, variance: Tensor) -> None:
    """Move the running statistics of all terms by one operation."""
    running, batch, factors = [], [], []
    for term, own_mean, own_variance in zip(terms, mean, variance, strict=True):
        if term.keep is not None:
            term.keep(own_mean, own_variance)
        elif term.running_mean is not None and term.running_var is not None:
            running += [term.running_mean, term.running_var]
            batch += [own_mean, own_variance]
            factors += [term.momentum] * 2
    if running:
        torch._foreach_lerp_(running, batch, factors)
