"""The ops under every way of asking for a derivative: the right one, or an error that names the op.

Each op is compared with the same composition of torch's own operations. Ops without a gradient, and
the backward ops, refuse tangents as they refuse gradients.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastbandit import _native, ops
from fastbandit.ops._register import OPERATORS
from fastbandit.ops.binary_sep import separable

Function = Callable[..., Tensor]
Tensors = tuple[Tensor, ...]

# `fastbandit.ops.gabor_filters` is the function; its plain form is the reference of the module.
filters = importlib.import_module("fastbandit.ops.gabor")._filters_reference

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def normed(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(z, None, None, weight, bias, True)


def depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x.relu(), weight, None, 1, 1, 1, x.shape[1])


def block(x: Tensor, d: Tensor, p: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return normed(F.conv2d(depthwise(x, d), p), weight, bias)


def gabor(x: Tensor, *parameters: Tensor) -> Tensor:
    bank = filters(*parameters, 3)[:, None].expand(-1, x.shape[1], -1, -1)
    return F.conv2d(x, bank, None, 1, 1)


def numbers_between(theta: Tensor, sigma: Tensor, gamma: Tensor, wavelength: Tensor) -> Tensors:
    return (
        6.283185307179586 * theta.sigmoid(),
        0.5 + sigma.sigmoid(),
        1 + gamma / 2,
        2 + 4 * wavelength.sigmoid(),
    )


def quadratic(x: Tensor) -> Tensor:
    inside = x.clamp(-1, 1)
    return inside * (2 - inside.abs())


def signs(x: Tensor, smooth: Function = quadratic) -> Tensor:
    """+1 and -1, with the derivatives of another function."""
    value = smooth(x)
    return torch.where(x.detach() >= 0, 1.0, -1.0) + (value - value.detach())


# Name: the op, the same in torch's operations, shapes of the arguments. The maps are large enough
# for the kernels that serve large maps alone.
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "depthwise_conv2d": (
        lambda x, w: ops.depthwise_conv2d(x, w, padding=1, relu=True),
        depthwise,
        [(2, 6, 8, 8), (6, 1, 3, 3)],
    ),
    "gabor_filters": (
        lambda *parameters: ops.gabor_filters(*parameters, 3),
        lambda *parameters: filters(*parameters, 3),
        [(4,)] * 5,
    ),
    "gabor_parameters": (
        lambda *numbers: torch.stack(ops.gabor_parameters(*numbers)),
        lambda *numbers: torch.stack(numbers_between(*numbers)),
        [(4,)] * 4,
    ),
    "gabor_conv2d": (ops.gabor_conv2d, gabor, [(2, 6, 8, 8), *[(4,)] * 5]),
    "dilated_conv2d": (
        lambda x, w: ops.dilated_conv2d(x, w, padding=4, relu=True),
        lambda x, w: F.conv2d(x.relu(), w, None, 1, 4, 2),
        [(2, 6, 8, 8), (4, 6, 5, 5)],
    ),
    "conv_block": (
        lambda x, d, p, w, b: ops.conv_block(
            x, p, depthwise=d, padding=1, normalize=True, weight=w, bias=b
        ),
        block,
        [(2, 6, 8, 8), (6, 1, 3, 3), (5, 6, 1, 1), (5,), (5,)],
    ),
    "conv_block of two maps": (
        lambda x, y, p, b: ops.conv_block([x, y], p, bias=b),
        lambda x, y, p, b: F.conv2d(torch.cat([x, y], 1).relu(), p, b),
        [(2, 6, 8, 8), (2, 4, 8, 8), (5, 10, 1, 1), (5,)],
    ),
    "batch_norm": (ops.batch_norm, normed, [(2, 32, 32, 32), (32,), (32,)]),
    "norm_sum": (
        lambda x, y, weight, bias: ops.norm_sum([ops.Normalized(x, weight, bias), y]),
        lambda x, y, weight, bias: normed(x, weight, bias) + y,
        [(2, 32, 32, 32), (2, 32, 32, 32), (32,), (32,)],
    ),
    "max_pool2d": (ops.max_pool2d, lambda x: F.max_pool2d(x, 3, 1, 1), [(1, 32, 32, 32)]),
    "sign_ste": (ops.sign_ste, signs, [(2, 6, 8, 8)]),
    "binary_conv2d_ste": (
        lambda x, w: ops.binary_conv2d_ste(x, w, padding=1, alpha="none", weight_ste="identity"),
        lambda x, w: F.conv2d(signs(x), signs(w, smooth=lambda w: w), None, 1, 1),
        [(2, 6, 8, 8), (5, 6, 3, 3)],
    ),
}


def arguments(name: str, layout: str) -> tuple[Tensors, Tensors]:
    """Arguments of a case, and tangents for them."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in CASES[name][2] * 2:
        tensor = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            tensor = tensor.abs() + 0.5  # a scale, or a parameter of a Gabor function
        elif shape[-1] > 1 and shape[1] > 1:
            tensor = tensor.contiguous(memory_format=LAYOUTS[layout])
        made.append(tensor)
    half = len(made) // 2
    return tuple(made[:half]), tuple(made[half:])


def leaves(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


# --- ways to a derivative -------------------------------------------------------------------------


def loss(f: Function) -> Function:
    return lambda *args: f(*args).sin().sum()


def numbers(args: Tensors) -> tuple[int, ...]:
    return tuple(range(len(args)))


def by_jvp(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return jvp(f, args, tangents)


def by_dual_tensors(f: Function, args: Tensors, tangents: Tensors) -> Any:
    with forward_ad.dual_level():
        y = f(*map(forward_ad.make_dual, args, tangents))
        return tuple(forward_ad.unpack_dual(y))


def by_one_dual_tensor(f: Function, args: Tensors, tangents: Tensors) -> Any:
    with forward_ad.dual_level():
        return tuple(
            forward_ad.unpack_dual(f(forward_ad.make_dual(args[0], tangents[0]), *args[1:]))
        )


def by_jacfwd(f: Function, args: Tensors, tangents: Tensors) -> Any:
    """By a number that scales all arguments: one column, and vmap over jvp."""
    scale = torch.ones(1)
    moved = lambda s: f(*(a + (s - 1) * t for a, t in zip(args, tangents, strict=True))).mean((0,))  # noqa: E731
    return jacfwd(moved)(scale)


def by_jacrev(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return jacrev(lambda *a: f(*a).flatten()[:3], numbers(args))(*args)


def by_linearize(f: Function, args: Tensors, tangents: Tensors) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch.fx, about its own graph
        return linearize(f, *args)[1](*tangents)


def by_grad(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return grad(loss(f), numbers(args))(*args)


def by_vjp(f: Function, args: Tensors, tangents: Tensors) -> Any:
    y, back = vjp(f, *args)
    return back(y.detach().cos())


def by_forward_over_reverse(f: Function, args: Tensors, tangents: Tensors) -> Any:
    """Products with the Hessian."""
    return jvp(grad(loss(f), numbers(args)), args, tangents)


def by_reverse_over_reverse(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return vjp(grad(loss(f), numbers(args)), *args)[1](tangents)


def by_dual_tensors_over_autograd(f: Function, args: Tensors, tangents: Tensors) -> Any:
    with forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, leaves(args), tangents))
        grads = torch.autograd.grad(loss(f)(*duals), duals)
        return [forward_ad.unpack_dual(g).tangent for g in grads]


def by_jvp_of_vjp(f: Function, args: Tensors, tangents: Tensors) -> Any:
    y, back = vjp(f, *args)
    return jvp(back, (y.detach().cos(),), (y.detach().sin(),))


def stacked(args: Tensors, tangents: Tensors) -> Tensors:
    return tuple(torch.stack([a, a + t]) for a, t in zip(args, tangents, strict=True))


def by_vmap(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return vmap(f)(*stacked(args, tangents))


def by_vmap_of_grad(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return vmap(grad(loss(f), numbers(args)))(*stacked(args, tangents))


def by_grad_of_vmap(f: Function, args: Tensors, tangents: Tensors) -> Any:
    return grad(loss(vmap(f)), numbers(args))(*stacked(args, tangents))


def by_jvp_of_vmap(f: Function, args: Tensors, tangents: Tensors) -> Any:
    both = stacked(args, tangents)
    return jvp(vmap(f), both, tuple(b.cos() for b in both))


def by_checkpoint(f: Function, args: Tensors, tangents: Tensors) -> Any:
    args = leaves(args)
    return torch.autograd.grad(loss(lambda *a: checkpoint(f, *a, use_reentrant=False))(*args), args)


def by_reentrant_checkpoint(f: Function, args: Tensors, tangents: Tensors) -> Any:
    args = leaves(args)
    loss(lambda *a: checkpoint(f, *a, use_reentrant=True))(*args).backward()
    return [arg.grad for arg in args]


def by_save_on_cpu(f: Function, args: Tensors, tangents: Tensors) -> Any:
    args = leaves(args)
    with torch.autograd.graph.save_on_cpu():
        y = f(*args)
    return torch.autograd.grad(y, args, y.detach().cos())


def by_tensors_saved_for_one_reading(f: Function, args: Tensors, tangents: Tensors) -> Any:
    args = leaves(args)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: [t.detach()], lambda kept: kept.pop()):
        y = f(*args)
    return torch.autograd.grad(y, args, y.detach().cos())


def by_tensors_saved_in_another_layout(f: Function, args: Tensors, tangents: Tensors) -> Any:
    args = leaves(args)

    def pack(tensor: Tensor) -> Tensor:
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        y = f(*args)
    return torch.autograd.grad(y, args, y.detach().cos())


def by_a_second_backward(f: Function, args: Tensors, tangents: Tensors) -> Any:
    args = leaves(args)
    y = loss(f)(*args)
    first = torch.autograd.grad(y, args, retain_graph=True)
    return first, torch.autograd.grad(y, args)


WAYS = {name[3:]: way for name, way in globals().items() if name.startswith("by_")}
# What goes through torch's operations is the same for both layouts, which only kernels see; to
# trace a function takes seconds.
COMBINATIONS = [
    (way, name, layout)
    for way in WAYS
    for name in CASES
    for layout in LAYOUTS
    if (layout == "channels_last" or way in ("jvp", "dual_tensors", "vmap_of_grad", "checkpoint"))
    and (way != "linearize" or name in ("depthwise_conv2d", "conv_block", "max_pool2d"))
]


def check_way(way: str, f: Function, plain: Function, args: Tensors, tangents: Tensors) -> None:
    got, wanted = (tree_leaves(WAYS[way](g, args, tangents)) for g in (f, plain))
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        # Against the largest value: sums of a few thousand float32 terms of either sign, twice in a
        # second derivative, cancel.
        scale = other.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(one / scale, other / scale, rtol=0, atol=5e-5)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("way", "name", "layout"), COMBINATIONS)
def test_derivatives_are_those_of_torchs_operations(way, name, layout):
    f, plain, _ = CASES[name]
    check_way(way, f, plain, *arguments(name, layout))


@pytest.mark.parametrize("name", ["depthwise_conv2d", "gabor_filters"])
@pytest.mark.parametrize("way", ["jvp", "dual_tensors"])
def test_compiled_tangents_are_those_of_torchs_operations(way, name):
    """A compiled graph enters forward mode without telling Python."""
    f, plain, _ = CASES[name]
    args, tangents = arguments(name, "channels_last")
    torch.compiler.reset()
    compiled = torch.compile(lambda *a: WAYS[way](f, a, tangents), backend="eager")
    for one, other in zip(compiled(*args), WAYS[way](plain, args, tangents), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


FUSED = {
    "max_pool2d": lambda x: OPERATORS["max_pool2d"](x, 1)[0],
    "gabor_parameters": lambda *numbers: torch.stack(
        OPERATORS["gabor_parameters"](*numbers, 0.5, 1.0, 2.0, 4.0)
    ),
    "batch_norm": lambda x, w, b: OPERATORS["batch_norm"](x, w, b, 1e-5)[0],
    # The first term is normalised (1), with a weight (2) and a bias (4).
    "norm_sum": lambda x, y, w, b: OPERATORS["norm_sum"]([x, y], [7, 0], [w, b], 1e-5)[0],
    "conv_block": lambda x, d, p, w, b: OPERATORS["conv_block"](
        [x], d, p, w, b, 1, 1, 1, True, 1e-5
    )[0],
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("way", ["jvp", "dual_tensors", "grad", "forward_over_reverse"])
def test_derivatives_of_the_ops_that_small_maps_go_round(way, name):
    check_way(way, FUSED[name], CASES[name][1], *arguments(name, "channels_last"))


# --- what is refused ------------------------------------------------------------------------------

# A dilated convolution is one of torch's own operations, and so is what has no kernel.
ONCE = [
    *("depthwise_conv2d", "gabor_filters", "gabor_conv2d", "sign_ste", "binary_conv2d_ste"),
    *FUSED,
]


def once(name: str, args: Tensors) -> Tensor:
    return FUSED.get(name, CASES[name][0])(*args)


@pytest.mark.parametrize("name", ONCE)
def test_a_second_backward_through_the_first_is_refused(name):
    args = leaves(arguments(name, "channels_last")[0])
    y = once(name, args).sum()
    with pytest.raises(RuntimeError, match=f"^{name}: expected a backward pass without create"):
        torch.autograd.grad(y, args, create_graph=True)


@pytest.mark.parametrize("name", ONCE)
def test_a_gradient_with_a_tangent_is_refused(name):
    args = leaves(arguments(name, "channels_last")[0])
    y = once(name, args)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(y.detach().cos(), y.detach().sin())
        with pytest.raises(RuntimeError, match=f"^{name}: expected a gradient without tangent"):
            torch.autograd.grad(y, args, dual)


class Recorder(TorchDispatchMode):
    """Keeps the arguments of this package's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastbandit":
            copies = [
                [t.detach().clone() for t in a]
                if isinstance(a, list) and a and isinstance(a[0], Tensor)
                else a.detach().clone()
                if isinstance(a, Tensor)
                else a
                for a in args
            ]
            self.calls[func._opname] = tuple(copies)
        return func(*args, **(kwargs or {}))


def call_everything() -> None:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    for name in ONCE:
        once(name, leaves(arguments(name, "channels_last")[0])).sum().backward()
    # Its Function is made of other ops.
    OPERATORS["binary_conv2d_ste"](
        *(rand(2, 6, 8, 8), rand(5, 6, 3, 3), [1, 1], [1, 1], [1, 1], 1),
        *("filter", "poly", "clip", False, torch.float32),
    )
    delta, image = rand(2, 3, 4, 4), rand(2, 3, 4, 4)
    mean, std = rand(3), rand(3) + 0.5
    bounds = {"epsilon": 0.1, "lower": 0.0, "upper": 1.0}
    ops.pgd_step_(delta, image, image, step_size=0.1, **bounds)
    ops.pgd_step_normalize_(delta, image, image, mean, std, step_size=0.1, **bounds)
    seed, offset, index = torch.tensor(1), torch.tensor(2), torch.arange(2)
    ops.random_start(image, seed=seed, offset=offset, index=index, **bounds)
    images, ids = (rand(5, 3, 4, 4) * 255).byte(), torch.arange(2)
    batch = {"draws": torch.ones(5, 5).long(), "cutout_fill": mean, "cutout_length": 2}
    ops.augment_images(images, ids, **batch)
    ops.augment_start_normalize(images, ids, mean, std, seed=seed, offset=offset, **batch, **bounds)
    means, count, alive = rand(3, 5), torch.ones(3, 5), rand(3, 5) > -1
    choice, reward, prune, uniform = torch.arange(3), rand(3), rand(3) > 0.5, rand(3)
    ops.bandit_bounds(means, count)
    ops.bandit_probabilities(means, count, alive)
    ops.bandit_sample(means, count, alive, uniform)
    ops.bandit_update_(means, count, choice, reward, rate=0.7)
    ops.bandit_prune_(alive, means, count)
    ops.bandit_step_(means, count, alive, choice, reward, prune, uniform, rate=0.7)
    weight = ops.pack_sign(image[:, :, :2, :2], threshold=mean)
    bits = ops.pack_sign(image)
    ops.unpack_sign(bits, 3)
    scale, bias = rand(2) + 0.5, rand(2)
    ops.binary_conv2d(bits, weight, 3, kernel_size=2, scale=scale, bias=bias)
    threshold = ops.sign_threshold(scale, bias, 12)
    ops.binary_conv2d(bits, weight, 3, kernel_size=2, threshold=threshold)
    threshold = ops.sign_threshold(mean, mean, 4)
    separable(bits, weight[:1], *threshold, weight[:, :1, :1], scale, bias, 3, 1, 0, 1, False,
              torch.float32)  # fmt: skip


@pytest.fixture(scope="module")
def calls() -> dict[str, tuple[Any, ...]]:
    with Recorder() as recorder:
        call_everything()
    return recorder.calls


def tensor_arguments(args: tuple[Any, ...]) -> list[int]:
    return [
        index
        for index, value in enumerate(args)
        if isinstance(value, Tensor)
        or (isinstance(value, list) and value and isinstance(value[0], Tensor))
    ]


def replaced(args: tuple[Any, ...], index: int, change: Callable[[Tensor], Tensor]) -> list[Any]:
    result = list(args)
    value = result[index]
    result[index] = [change(t) for t in value] if isinstance(value, list) else change(value)
    return result


def test_every_op_is_called_here(calls):
    assert set(calls) == set(OPERATORS)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_an_op_without_gradient_refuses_tangents(calls, name):
    if name in ONCE:
        pytest.skip("differentiable")
    op, args = OPERATORS[name], calls[name]
    refused = 0
    for index in tensor_arguments(args):
        value = args[index]
        if not (value[0] if isinstance(value, list) else value).is_floating_point():
            continue
        argument = op._schema.arguments[index].name
        before = [a.clone() if isinstance(a, Tensor) else a for a in args]
        with (
            forward_ad.dual_level(),
            pytest.raises(RuntimeError, match=f"^{name}: {argument}: expected a tensor without t"),
        ):
            op(*replaced(args, index, lambda t: forward_ad.make_dual(t, torch.ones_like(t))))
        for now, then in zip(args, before, strict=True):
            assert not isinstance(now, Tensor) or torch.equal(now, then)
        refused += 1
    whole = ("augment_images", "bandit_prune_", "unpack_sign", "binary_conv2d_bits")
    assert refused or name in whole  # no argument of real numbers


def test_public_functions_without_gradient_refuse_tangents():
    """They go round the check of the op where a native kernel serves them."""
    x = torch.rand(2, 3, 4, 4)
    mean, count, alive = torch.rand(5), torch.ones(5), torch.ones(5, dtype=torch.bool)
    for name, f in {
        "pgd_step_": lambda t: ops.pgd_step_(x.clone(), t, x, step_size=0.1, epsilon=0.1),
        "random_start": lambda t: ops.random_start(t, epsilon=0.1, seed=1),
        "bandit_bounds": lambda t: ops.bandit_bounds(mean + t.mean(), count),
        "bandit_sample": lambda t: ops.bandit_sample(mean, count, alive, t.mean()),
    }.items():
        with pytest.raises(RuntimeError, match=f"^{name}: .* without tangent"):
            jvp(f, (x,), (x,))


def test_a_compiled_op_without_gradient_refuses_tangents():
    x = torch.rand(2, 3, 4, 4)

    def f(t: Tensor) -> Tensor:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(t, t)
            y = dual + ops.random_start(dual, epsilon=0.1, seed=torch.tensor(1))
            return forward_ad.unpack_dual(y).tangent

    torch.compiler.reset()
    with pytest.raises(RuntimeError, match="random_start: image: expected a tensor without tang"):
        torch.compile(f, backend="eager")(x)


def test_ops_without_gradient_run_beside_tangents():
    """In forward mode the op serves whoever does not differentiate it."""
    x, delta = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    wanted = ops.random_start(x, epsilon=0.1, seed=1)

    def f(t: Tensor) -> Tensor:
        return t * ops.random_start(x, epsilon=0.1, seed=1)

    assert torch.equal(jvp(f, (delta,), (delta,))[1], delta * wanted)


# --- tensors of several devices -------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_tensors_of_several_devices_are_refused(calls, name):
    """The dispatcher gives them to the kernel for shapes alone, whose results nobody writes."""
    op, args = OPERATORS[name], calls[name]
    given = tensor_arguments(args)
    for index in given if len(given) > 1 else []:
        with pytest.raises(RuntimeError, match=f"^{name}: .*: expected device .*meta|cpu"):
            op(*replaced(args, index, lambda t: t.to("meta")))


# --- the other backend ----------------------------------------------------------------------------


def test_the_same_without_native_kernels():
    if not _native.status()["cpu"]["loaded"]:
        pytest.skip("the native CPU library is not loaded")
    chosen = "derivatives and (jvp or dual_tensors) and channels_last or refuses_tangents"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "FASTBANDIT_BACKEND": "reference"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
