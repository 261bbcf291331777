"""Modes of torch that decide how a call is computed; the ops and the layers both ask."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["autocast_dtype", "may_keep", "result_dtype"]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, None where it is off or leaves x alone (float64)."""
    device = x.device.type
    if x.dtype == torch.float64:
        return None
    # Of a device without autocast, such as meta, torch refuses the question whether it is on.
    if not (x.is_cpu or x.is_cuda or torch.amp.is_autocast_available(device)):
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of what a convolution makes of x: that of autocast, else that of x."""
    return autocast_dtype(x) or x.dtype


def may_keep() -> bool:
    """Whether a tensor made now is one for any later call, and one kept from before is one for now.

    Not under a mode that makes tensors of its own kind (``FakeTensorMode``, a tracer), nor within
    a transform of ``torch.func``.
    """
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )
