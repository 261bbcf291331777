"""Numbers and tensors that nobody means: one error that names the op, never a crash.

A crash would end the tests, so what has crashed, or could, runs in a process of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from _processes import run
from torch import Tensor

from fastbandit import _native, ops
from fastbandit.ops._register import OPERATORS

LARGEST = 2**31 - 1
EXTREMES = (0, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 2**63, True, "a", None, 1.5)

Call = Callable[[], Any]


def maps(layout: torch.memory_format, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(2, 8, 9, 9).to(dtype).contiguous(memory_format=layout)


def conv_calls(**settings: Any) -> Iterator[tuple[str, Call]]:
    """Every convolution with these settings, forward and backward."""
    depthwise, pointwise = torch.rand(8, 1, 3, 3), torch.rand(4, 8, 1, 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        x = maps(layout).requires_grad_()
        yield "depthwise_conv2d", lambda x=x: ops.depthwise_conv2d(x, depthwise, **settings)
        yield (
            "dilated_conv2d",
            lambda x=x: ops.dilated_conv2d(x, depthwise.expand(8, 8, 3, 3), **settings),
        )
        yield "gabor_conv2d", lambda x=x: ops.gabor_conv2d(x, *torch.rand(5, 4) + 0.5, **settings)
        yield (
            "conv_block",
            lambda x=x: ops.conv_block(x, pointwise, depthwise=depthwise, **settings),
        )


def calls() -> Iterator[tuple[str, str, Call]]:
    """(op, what is extreme, the call)"""
    for name in ("stride", "padding", "dilation"):
        for value in EXTREMES:
            if (name, value) == ("padding", 0):
                continue
            for op, call in conv_calls(**{name: value}):
                yield op, f"{name}={value}", call
    # Overflow where two numbers meet: this stride makes a short output of any padding.
    for padding in (2**62, 2**63 - 1):
        for op, call in conv_calls(padding=padding, stride=8):
            yield op, f"{padding=}, stride=8", call
    for op, call in conv_calls(padding=LARGEST):
        yield op, "an output of 2^64 pixels", call

    parameters = torch.rand(5, 4) + 0.5
    batch = (torch.zeros(3, 3, 8, 8).byte(), torch.arange(2))
    draws = torch.zeros(3, 5).long()
    image = torch.rand(2, 3, 4, 4)
    bandit = (torch.rand(3, 5), torch.ones(3, 5))
    alive = torch.ones(3, 5, dtype=torch.bool)
    for value in EXTREMES:
        yield (
            "gabor_filters",
            f"kernel_size={value}",
            lambda v=value: ops.gabor_filters(*parameters, v),
        )
        if value is not True:
            yield "max_pool2d", f"stride={value}", lambda v=value: ops.max_pool2d(image, v)
        if value not in (0, True):
            for name in ("crop_padding", "cutout_length"):
                yield (
                    "augment_images",
                    f"{name}={value}",
                    lambda n=name, v=value: ops.augment_images(*batch, draws=draws, **{n: v}),
                )
        if value not in (0, 2**31, 2**32, 2**62, 2**63 - 1):
            yield (
                "random_start",
                f"seed={value}",
                lambda v=value: ops.random_start(image, epsilon=0.1, seed=v),
            )
        if value not in (0, 2**31):
            yield (
                "random_start",
                f"offset={value}",
                lambda v=value: ops.random_start(image, epsilon=0.1, seed=1, offset=v),
            )

    # What is no tensor, no dense one, or on another device.
    for bad in (None, 5, "a", image.to_sparse(), image.to("meta")):
        text = type(bad).__name__
        yield (
            "depthwise_conv2d",
            text,
            lambda b=bad: ops.depthwise_conv2d(maps(torch.channels_last), b),
        )
        yield "dilated_conv2d", text, lambda b=bad: ops.dilated_conv2d(maps(torch.channels_last), b)
        yield (
            "gabor_conv2d",
            text,
            lambda b=bad: ops.gabor_conv2d(maps(torch.channels_last), b, *parameters[1:]),
        )
        yield "conv_block", text, lambda b=bad: ops.conv_block(maps(torch.channels_last), b)
        yield (
            "pgd_step_",
            text,
            lambda b=bad: ops.pgd_step_(image.clone(), b, image, step_size=0.1, epsilon=0.1),
        )
        yield "bandit_bounds", text, lambda b=bad: ops.bandit_bounds(bandit[0], b)
        yield "bandit_prune_", text, lambda b=bad: ops.bandit_prune_(alive, bandit[0], b)
        yield "augment_images", text, lambda b=bad: ops.augment_images(batch[0], b)
        if bad is not None:
            yield (
                "batch_norm",
                text,
                lambda b=bad: ops.batch_norm(
                    torch.rand(2, 32, 32, 32).contiguous(memory_format=torch.channels_last), b
                ),
            )
            yield (
                "conv_block",
                text,
                lambda b=bad: ops.conv_block(
                    maps(torch.channels_last), torch.rand(4, 8, 1, 1), bias=b
                ),
            )
            yield (
                "random_start",
                text,
                lambda b=bad: ops.random_start(image, epsilon=0.1, seed=1, index=b),
            )


def raw_calls() -> Iterator[tuple[str, str, Call]]:
    """The ops themselves, which only the native kernels check."""
    x = maps(torch.channels_last)
    grad = torch.rand(2, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    depthwise, parameters = torch.rand(8, 1, 3, 3), [*torch.rand(5, 8)]
    pointwise = torch.rand(4, 8, 1, 1)
    for pad in (2**31, 2**62, 2**63 - 1):
        settings = ([8, 8], [pad, pad], [1, 1])
        for name in ("depthwise_conv2d_backward_input", "depthwise_conv2d_backward_weight"):
            op = OPERATORS[name]
            yield name, f"{pad=}", lambda op=op, s=settings: op(grad, x, depthwise, *s, False)
        yield (
            "gabor_conv2d_backward",
            f"{pad=}",
            lambda s=settings: OPERATORS["gabor_conv2d_backward"](
                grad, x, *parameters, 3, *s, [True, True]
            ),
        )
        yield (
            "conv_block",
            f"{pad=}",
            lambda p=pad: OPERATORS["conv_block"](
                [x], depthwise, pointwise, None, None, 8, p, 1, False, 1e-5
            ),
        )
        yield "conv_block_backward", f"{pad=}", lambda p=pad: OPERATORS["conv_block_backward"](
            grad[:, :4], [x], depthwise, pointwise, None, grad, None, None, None,
            8, p, 1, True, True,
        )  # fmt: skip
    for size in (2**15 + 1, 2**32 + 1, 2**63 - 1):
        yield "gabor_filters", f"{size=}", lambda s=size: OPERATORS["gabor_filters"](*parameters, s)

    # Shapes that only tensors with strides of 0 have; elsewhere no memory is found for them.
    one = torch.zeros(1, 1, 1, 1)
    many, alive = torch.zeros(1).expand(2**59), torch.ones(1).bool().expand(2**59)
    wide = one.expand(1, 8, 2**31, 9)
    yield "depthwise_conv2d", "rows", lambda: ops.depthwise_conv2d(wide, torch.rand(8, 1, 3, 3))
    yield (
        "depthwise_conv2d",
        "taps",
        lambda: ops.depthwise_conv2d(one, one.expand(1, 1, 2**31, 2**31), padding=2**30),
    )
    yield (
        "bandit_sample",
        "arms",
        lambda: ops.bandit_sample(many, many, alive, torch.tensor(0.5)),
    )


def main() -> None:
    """Prints the answer to each call; stops where a call crashes."""
    torch.set_num_threads(1)
    native = _native.status()["cpu"]["loaded"]
    for op, what, call in [*calls(), *(raw_calls() if native else ())]:
        print(json.dumps([op, what]), end="", flush=True)
        try:
            result = call()
            if isinstance(result, Tensor) and result.requires_grad:
                result.sum().backward()
            answer = "no error"
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        print("\t" + json.dumps(answer), flush=True)


# The ops that conv_block consists of speak for it where it has no kernel.
PARTS = {"conv_block": ("conv_block", "depthwise_conv2d")}


@pytest.mark.one_backend
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_extremes_are_refused_by_name(backend):
    done = run(__file__, environment={**os.environ, "FASTBANDIT_BACKEND": backend})
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"exit status {done.returncode} at {lines[-1:]}: {done.stderr}"
    assert len(lines) > 300
    for line in lines:
        (op, what), answer = map(json.loads, line.split("\t"))
        assert any(f"Error: {part}: " in answer for part in PARTS.get(op, (op,))), (
            f"{op}, {what}: {answer}"
        )


# --- the largest numbers that are taken -----------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_stride_and_padding(dtype, layout):
    """Of 3 x 3 outputs the one in the middle has its first tap on the first pixel."""
    settings = {"stride": LARGEST, "padding": LARGEST}
    x = maps(layout, dtype).requires_grad_()
    weight = torch.rand(8, 1, 3, 3).to(dtype).requires_grad_()
    y = ops.depthwise_conv2d(x, weight, **settings)
    wanted = (x[:, :, :3, :3] * weight[:, 0]).sum((2, 3))
    check_middle(y, wanted, (x, weight))

    if dtype == torch.bfloat16:
        return  # the gradients of the parameters go through a bank that is rounded elsewhere
    parameters = (torch.rand(5, 8) + 0.5).to(dtype).requires_grad_()
    y = ops.gabor_conv2d(x, *parameters, **settings)
    bank = ops.gabor_filters(*parameters, 3)
    wanted = torch.einsum("nhw,chw->nc", x[:, :, :3, :3].sum(1), bank)
    check_middle(y, wanted, (x, parameters))


@pytest.mark.parametrize("size", [2**20, LARGEST])
def test_the_largest_stride_and_padding_of_a_dense_convolution(size):
    """torch's own gradients crash from 2^20 on."""
    x = maps(torch.contiguous_format).requires_grad_()
    weight = torch.rand(5, 8, 3, 3).requires_grad_()
    y = ops.dilated_conv2d(x, weight, stride=size, padding=size, dilation=1)
    wanted = torch.einsum("nchw,ochw->no", x[:, :, :3, :3], weight)
    check_middle(y, wanted, (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = ops.dilated_conv2d(x, weight, stride=size, padding=size, dilation=1)
    assert half.dtype == torch.bfloat16
    check_middle(half, wanted.bfloat16(), (x, weight))


@pytest.mark.parametrize("normalize", [False, True])
def test_the_largest_stride_and_padding_of_a_block(normalize):
    x = maps(torch.channels_last).requires_grad_()
    weight, pointwise = torch.rand(8, 1, 3, 3), torch.rand(8, 8, 1, 1)
    y = ops.conv_block(
        x, pointwise, depthwise=weight, stride=LARGEST, padding=LARGEST, normalize=normalize
    )
    if normalize:
        assert y.shape == (2, 8, 3, 3)
        assert y.isfinite().all()
        return
    d = (x.relu()[:, :, :3, :3] * weight[:, 0]).sum((2, 3))
    check_middle(y, d @ pointwise[:, :, 0, 0].T, (x,))


def check_middle(y: Tensor, wanted: Tensor, leaves: tuple[Tensor, ...]) -> None:
    assert y.shape == (*wanted.shape, 3, 3)
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if y.dtype == torch.bfloat16 else {}
    torch.testing.assert_close(y[:, :, 1, 1], wanted, **tolerance)
    assert y.sum((2, 3)).sub(y[:, :, 1, 1]).abs().max() == 0
    grad = torch.rand(y.shape).to(y.dtype)
    got = torch.autograd.grad(y, leaves, grad, retain_graph=True)
    for one, other in zip(
        got, torch.autograd.grad(wanted, leaves, grad[:, :, 1, 1], retain_graph=True), strict=True
    ):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_largest_dilation_and_padding(layout):
    """The tap in the middle alone lies on the map."""
    x = maps(layout).requires_grad_()
    weight = torch.rand(8, 1, 3, 3, requires_grad=True)
    y = ops.depthwise_conv2d(x, weight, dilation=LARGEST, padding=LARGEST)
    wanted = x * weight[:, 0, 1:2, 1:2]
    torch.testing.assert_close(y, wanted)
    grad = torch.rand(y.shape)
    for one, other in zip(
        torch.autograd.grad(y, (x, weight), grad),
        torch.autograd.grad(wanted, (x, weight), grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("draw", [-(2**63), 2**63 - 1, -(2**31), 2**31])
def test_draws_far_outside_the_image(draw):
    """The crop is black, and the square lies outside: sums with such a number do not wrap."""
    images = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    draws = torch.full((1, 5), draw)
    cropped = ops.augment_images(images, torch.tensor([0]), draws=draws, crop_padding=LARGEST)
    assert cropped.abs().max() == 0 or draw == 2**31  # 2^31 - (2^31 - 1): one pixel aside
    cut = ops.augment_images(images, torch.tensor([0]), draws=draws, cutout_length=3)
    assert cut.min() == 1


if __name__ == "__main__":
    main()
