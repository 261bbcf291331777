"""Declares an op: schema, plain-PyTorch reference, fake kernel and what autograd may do with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad

from fastbandit import _native

_LIBRARY = torch.library.Library("fastbandit", "DEF")

# Dispatch keys below autograd, for a redispatch out of a kernel on the Autograd key.
_BELOW_AUTOGRAD = torch._C._after_autograd_keyset

OPERATORS: dict[str, torch._ops.OpOverload] = {}
"""Every op of the package by name, e.g. ``OPERATORS["pgd_step_"]``."""


class Applicable(Protocol):
    """A :class:`torch.autograd.Function`, or what stands for one."""

    def apply(self, *args: Any) -> Any: ...


def define(
    name: str,
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    autograd: Applicable | None = None,
) -> torch._ops.OpOverload:
    """Declare ``torch.ops.fastbandit.<name>``.

    Args:
        name: the op's name; ends in an underscore if the op mutates an argument.
        schema: arguments and results, ``"(Tensor x, int k) -> Tensor"``. Mutated arguments are
            marked ``Tensor(a!)`` and are not returned.
        reference: the op in plain PyTorch, which serves every device without a native kernel. It
            is registered below the keys of single devices, so a kernel that a library registers
            for CPU or CUDA takes precedence. For a differentiable op it consists of operations
            that torch differentiates: forward mode and the transforms of torch.func go through it.
        fake: shapes, dtypes and strides of the results, for tracing; no data. It is asked only
            about tensors of one device.
        autograd: for a differentiable op, a Function whose ``forward(ctx, *args)`` gets the op's
            arguments in schema order and calls the op through :func:`below_autograd`, or anything
            whose ``apply`` takes them and applies such a Function. Without one, the op raises
            RuntimeError when an argument requires a gradient or has a tangent: a gradient that is
            silently missing trains the wrong thing.

    Returns:
        The op, called with its arguments by position (keywords cost twice as much).
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    op = getattr(torch.ops.fastbandit, name).default
    torch.library.register_fake(f"fastbandit::{name}", _on_one_device(op, fake), lib=_LIBRARY)
    kernel = _no_gradient(op) if autograd is None else _differentiable(op, autograd, reference)
    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)
    OPERATORS[name] = op
    return op


def declare_short(name: str, schema: str) -> torch._ops.OpOverload:
    """Declare the overload ``short`` of an op: its arguments in fewer, for :func:`short_call`.

    A call from Python costs by its arguments (docs/decisions.md#short-overload). Kernels of one
    device serve it, no reference; whatever looks at ops (modes, transforms, tracers, compilers,
    subclasses) is shown the op itself.

    Args:
        name: the op's name.
        schema: arguments and results of the overload.

    Returns:
        The overload.
    """
    _LIBRARY.define(f"{name}.short{schema}")
    overload: torch._ops.OpOverload = getattr(torch.ops.fastbandit, name).short
    return overload


def below_autograd(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Call ``op`` below autograd, from the ``forward`` or ``backward`` of a Function."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def refuse_second_derivative(name: str, grad: torch.Tensor | None) -> None:
    """To be called first in the ``backward`` of a Function whose backward op has no gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name}: expected a backward pass without create_graph=True: this op has no second "
            "derivative"
        )
    if differentiated_by_torch() and _has_tangent(grad):
        raise RuntimeError(
            f"{name}: expected a gradient without tangent, got a dual tensor: this op has no "
            "second derivative (run its forward in forward mode too)"
        )


def differentiated_by_torch() -> bool:
    """Whether derivatives are asked for in a way that only torch's own operations serve.

    That is forward mode (dual tensors) or a transform of torch.func. Both know nothing of the
    Functions here, which have one gradient, and with the arguments of this package's kernels would
    lose tangents without a word.
    """
    return forward_mode() or _transforms_active()


def forward_mode() -> bool:
    """Whether dual tensors may exist.

    False in a compiled graph, which enters the level of dual tensors without telling Python; so a
    public function has to ask too, while it is traced.
    """
    return forward_ad._current_level >= 0


def refuse_tangent(op: str, name: str, argument: Any) -> None:
    """For the arguments of an op without gradient, in forward mode."""
    if _has_tangent(argument):
        raise RuntimeError(
            f"{op}: {name}: expected a tensor without tangent, got a dual tensor; this op has no "
            "gradient, nor a derivative in forward mode (take the primal of the tensor)"
        )


MISS = object()
"""What a function of :func:`short_call` returns where it does not apply."""

# Looked up once: a small op takes a few microseconds.
_Tensor = torch.Tensor
_BelowAutograd = torch._C._AutoDispatchBelowAutograd
_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_is_inference = torch.is_inference_mode_enabled
_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack  # also while make_fx traces before dispatch
_is_tracing = torch._C._is_tracing
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_increment_versions = torch._C._increment_version  # the public one looks at the type first


def short_call(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The short way to an op without gradient: below autograd, arguments checked by the kernel.

    On small tensors the checks in Python and the kernel on the Autograd key take three times as
    long as the op itself. A native kernel checks all its arguments before it changes anything, so
    where one serves the device it can be called at once. The short way needs a plain tensor as
    first argument (a subclass may mean something else by the call), every other tensor on a device
    of that type (otherwise they would go to a kernel of another device, or to none), and that no
    gradient is asked for. It does not see tangents, so forward mode goes the long way. Afterwards
    it moves the version counters of what was mutated, as :func:`_no_gradient` does.

    Args:
        op: the op, declared with :func:`define`, or an overload of :func:`declare_short`, which is
            called only where nothing looks at ops.

    Returns:
        A function of the op's arguments, by position. Where the short way does not apply or the
        call fails, it returns :data:`MISS`: the caller then goes the long way, which finds the
        error and names it.
    """
    run = op._op  # what OpOverload.__call__ does nothing but call
    served = _native.served
    named, mutated = _tensor_arguments(op)
    tensors = tuple(index for index, _ in named)
    private = op._schema.overload_name == "short"

    def call(*args: Any) -> Any:
        first = args[0]
        # The level is forward_mode(), without a call.
        if type(first) is not _Tensor or _is_compiling() or forward_ad._current_level >= 0:
            return MISS
        if private and (
            _dispatch_modes() or _function_modes() or _is_tracing() or _transforms_active()
        ):
            return MISS
        try:
            cpu, grad = first.is_cpu, _is_grad_enabled()
            if not (cpu or first.is_cuda) or ("cpu" if cpu else "cuda") not in served:
                return MISS
            for index in tensors:
                argument = args[index]
                if argument is not None and (
                    argument.is_cpu is not cpu
                    or (grad and argument.requires_grad)
                    or (private and type(argument) not in _PLAIN)
                ):
                    return MISS
            if _is_inference():  # is below autograd
                result = run(*args)
            else:
                with _BelowAutograd():
                    result = run(*args)
        except (RuntimeError, TypeError, AttributeError):
            return MISS
        if mutated:
            _increment_versions([args[index] for index in mutated])
        return result

    return call


_increment_version = torch.autograd.graph.increment_version

# Both kernels below are Python and run at every eager call of an op. The way from C++ into Python
# and back is what costs, not the body (docs/decisions.md#eager-call).


def _tensor_arguments(
    op: torch._ops.OpOverload,
) -> tuple[tuple[tuple[int, str], ...], tuple[int, ...]]:
    """Index and name of each tensor argument, and the indices of those that are mutated."""
    arguments = op._schema.arguments
    tensors = tuple(
        (index, argument.name)
        for index, argument in enumerate(arguments)
        if "Tensor" in str(argument.type)
    )
    mutated = tuple(
        index
        for index, argument in enumerate(arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
    return tensors, mutated


def _on_one_device(op: torch._ops.OpOverload, fake: Callable[..., Any]) -> Callable[..., Any]:
    """``fake`` for tensors of one device.

    Of tensors on the meta device and on another one the dispatcher takes the fake kernel, whose
    results would then be memory that nobody has written.
    """
    tensors, _ = _tensor_arguments(op)

    def checked(*args: Any) -> Any:
        first: tuple[str, torch.device] | None = None
        for index, name in tensors:
            given = args[index]
            for tensor in given if isinstance(given, (list, tuple)) else (given,):
                if tensor is None:
                    continue
                first = first or (name, tensor.device)
                if tensor.device != first[1]:
                    raise RuntimeError(
                        f"{op._opname}: {name}: expected device {first[1]} as {first[0]}, "
                        f"got {tensor.device}"
                    )
        return fake(*args)

    return checked


def _requires_grad(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(tensor.requires_grad for tensor in argument)
    return argument is not None and argument.requires_grad


def _has_tangent(argument: Any) -> bool:
    if isinstance(argument, (list, tuple)):
        return any(map(_has_tangent, argument))
    # Levels do not nest: 0 is the only one that torch has.
    return argument is not None and forward_ad.unpack_dual(argument, level=0).tangent is not None


def _no_gradient(op: torch._ops.OpOverload) -> Callable[..., Any]:
    tensors, mutated = _tensor_arguments(op)
    redispatch = op.redispatch
    is_grad_enabled = torch.is_grad_enabled

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if differentiated_by_torch():
            for index, argument in tensors:
                refuse_tangent(op._opname, argument, args[index])
        if is_grad_enabled():
            for index, argument in tensors:
                if _requires_grad(args[index]):
                    raise RuntimeError(
                        f"{op._opname}: {argument}: expected a tensor without gradient, got one "
                        "that requires grad; this op has no gradient (detach the tensor or call "
                        "it under torch.no_grad())"
                    )
        result = redispatch(keyset & _BELOW_AUTOGRAD, *args)
        # A native kernel writes through plain pointers. Without this, a later backward would not
        # notice that a tensor it saved has changed.
        for index in mutated:
            _increment_version(args[index])
        return result

    return kernel


def _differentiable(
    op: torch._ops.OpOverload, function: Applicable, reference: Callable[..., Any]
) -> Callable[..., Any]:
    redispatch = op.redispatch
    is_grad_enabled = torch.is_grad_enabled
    tensors = tuple(index for index, _ in _tensor_arguments(op)[0])

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        if differentiated_by_torch():
            return reference(*args)
        if is_grad_enabled():
            for index in tensors:
                if _requires_grad(args[index]):
                    return function.apply(*args)
        return redispatch(keyset & _BELOW_AUTOGRAD, *args)

    return kernel
