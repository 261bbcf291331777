"""What the convolution ops share: argument forms, checks, output shape and layout, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastbandit.ops._linf import FLOAT_TYPES, check_tensors
from fastbandit.ops._register import differentiated_by_torch

Pair = int | Sequence[int]

# As in csrc/check.h: no memory holds what is larger, and below it no product of sizes overflows.
MOST_SIDE = (1 << 31) - 1
MOST_ELEMENTS = 1 << 56


def check_optional(op: str, x: Tensor, /, **tensors: Tensor | None) -> None:
    """Each of ``tensors`` is None or a tensor on the device of ``x``."""
    device = x.device
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        check_tensors(op, **{name: tensor})
        if tensor.device != device:
            raise RuntimeError(f"{op}: {name}: expected device {device} as x, got {tensor.device}")


def pair(op: str, name: str, value: Pair, minimum: int) -> tuple[int, int]:
    """``value`` for height and width, each from ``minimum`` to 2^31 - 1."""
    if isinstance(value, int):
        height = width = value
    elif isinstance(value, Sequence) and len(value) == 2:
        height, width = value
    else:
        raise TypeError(f"{op}: {name}: expected an int or two ints, got {value!r}")
    for side in (height, width):
        if not isinstance(side, int) or isinstance(side, bool):
            raise TypeError(f"{op}: {name}: expected an int or two ints, got {value!r}")
    if height < minimum or width < minimum:
        raise ValueError(f"{op}: {name}: expected at least {minimum}, got {value!r}")
    if height > MOST_SIDE or width > MOST_SIDE:
        raise ValueError(f"{op}: {name}: expected at most {MOST_SIDE}, got {value!r}")
    return height, width


def check_input(op: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise TypeError(f"{op}: x: expected float32, float64, bfloat16 or float16, got {x.dtype}")
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(
            f"{op}: x: expected shape (N, C, H, W) with at least one channel, got {tuple(x.shape)}"
        )


def output_size(
    x: Tensor,
    kernel: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """Height and width of the output; below 1 where the kernel does not fit."""
    height, width = (
        (x.shape[2 + axis] + 2 * padding[axis] - dilation[axis] * (kernel[axis] - 1) - 1)
        // stride[axis]
        + 1
        for axis in (0, 1)
    )
    return height, width


def check_output(
    op: str,
    x: Tensor,
    channels: int,
    kernel: tuple[int, int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    height, width = output_size(x, kernel, stride, padding, dilation)
    if height < 1 or width < 1:
        raise ValueError(
            f"{op}: x: expected at least the extent of the kernel, "
            f"{dilation[0] * (kernel[0] - 1) + 1} x {dilation[1] * (kernel[1] - 1) + 1} with "
            f"dilation {tuple(dilation)}, got {x.shape[2]} x {x.shape[3]} with padding "
            f"{tuple(padding)}"
        )
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return  # sizes may be open, and a question about them closes them
    if x.shape[0] * channels * height * width > MOST_ELEMENTS:
        raise ValueError(
            f"{op}: padding: expected an output of at most {MOST_ELEMENTS} elements, got shape "
            f"{(x.shape[0], channels, height, width)}"
        )


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout of results that follow x: channels-last if its strides say so, views included.

    A tensor of one channel is both; it counts as contiguous.
    """
    channels = x.shape[1]
    strides = x.stride()
    if channels > 1 and strides[1] == 1 and channels <= strides[3] <= strides[2]:
        return torch.channels_last
    return torch.contiguous_format


def in_layout(y: Tensor, layout: torch.memory_format) -> Tensor:
    """``y`` in this layout; as it is under a transform of torch.func, whose vmap knows but one."""
    if torch._C._are_functorch_transforms_active():
        return y
    return y.contiguous(memory_format=layout)


@cache
def _registered(op: str, key: str) -> bool:
    """Whether a library has a kernel of this op for CPU or CUDA, by torch's own table."""
    registered: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"fastbandit::{op}", key)
    return registered


def registered(op: str, x: Tensor) -> bool:
    """Whether there is a kernel of ``op`` for the device of ``x``."""
    return (x.is_cpu or x.is_cuda) and _registered(op, "CPU" if x.is_cpu else "CUDA")


def has_kernel(op: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Whether x is what the kernels for one layout serve: [N, C, H, W] of one of ``dtypes``,
    channels-last, C > 1, on a device that ``op`` has a kernel for; outside a compiler or exporter,
    which is shown the plain operations and is asked nothing about sizes that may be open, and
    outside of derivatives that only torch's operations have."""
    return (
        not torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and registered(op, x)
        and not differentiated_by_torch()
        and x.dtype in dtypes
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and memory_format(x) == torch.channels_last
    )


def gradient_wanted(ctx: Any, *edges: int) -> bool:
    """Whether the running backward will use the gradient of one of these tensor arguments.

    ``ctx.needs_input_grad`` only tells what requires a gradient. In an attack, which asks for the
    gradient of the input alone, the weights still require one, and computing it would cost as much
    as that of the input. ``edges`` count the tensor arguments of the Function.
    """
    for edge in edges:
        node = ctx.next_functions[edge][0]
        if node is None:
            continue
        try:
            if torch._C._will_engine_execute_node(node):
                return True
        except RuntimeError:  # a leaf that autograd.grad was asked for by name
            return True
    return False


# No map is so large. Beyond it oneDNN's gradients end in a crash: F.conv2d itself does, from a
# padding and stride of 2^20 on.
_ONEDNN = 4096


def beyond_onednn(x: Tensor, *numbers: Sequence[int]) -> bool:
    """Whether torch's gradient of a convolution has to be computed without oneDNN."""
    return x.device.type == "cpu" and max(map(max, numbers)) > _ONEDNN


def convolution_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    mask: tuple[bool, bool],
) -> tuple[Tensor, Tensor]:
    """torch's gradients of a convolution by x and by weight; what ``mask`` leaves out is None."""

    def run() -> tuple[Tensor, Tensor]:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, stride, padding, dilation, False, [0, 0], groups, [*mask, False]
        )
        return grad_x, grad_weight

    if beyond_onednn(x, stride, padding, dilation):
        with torch.backends.mkldnn.flags(enabled=False):
            return run()
    return run()
