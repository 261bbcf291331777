"""What tells one recorded step from another.

That is where its tensors lie, and the numbers and modes that a replay no longer asks for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch
from torch import Tensor, nn

__all__ = ["form_of", "is_plain", "place_of", "settings_of", "update_of"]


def is_plain(value: object) -> bool:
    """Whether ``value`` is a number, a text or a tuple of such, which compare by what they say."""
    if type(value) is tuple:
        return all(inner is None or is_plain(inner) for inner in value)
    return type(value) in (bool, int, float, str)


def place_of(tensor: Tensor) -> Hashable:
    """Where a recorded step finds ``tensor``, and what it takes it for."""
    form = tensor.dtype, tensor.shape, tensor.stride(), tensor.requires_grad
    return id(tensor), tensor.data_ptr(), form


def form_of(tensors: Iterable[Tensor]) -> Hashable:
    """Equal for batches that fit the same buffers."""
    return tuple((t.shape, t.dtype, t.stride(), t.device) for t in tensors)


def settings_of(module: nn.Module) -> Hashable:
    """What decides what ``module`` computes and is no longer asked for in a recorded step: which
    module it is, its mode, its numbers, where its tensors lie."""
    own = vars(module)
    tensors = (*module._parameters.values(), *module._buffers.values())
    return (
        id(module),
        type(module),
        own.get("forward"),
        module._compiled_call_impl,
        tuple(place_of(tensor) for tensor in tensors if tensor is not None),
        # A count of batches is no setting. Nor is None, so that an attribute which is put back to
        # the None of its class changes nothing.
        tuple((n, value) for n, value in own.items() if n != "batches" and is_plain(value)),
    )


def update_of(optimizer: torch.optim.Optimizer) -> Hashable:
    """The same of an optimiser, whose rate is told to a recorded step."""
    groups = []
    for group in optimizer.param_groups:
        state = [s for p in group["params"] for s in optimizer.state.get(p, {}).values()]
        tensors = [*group["params"], *(s for s in state if isinstance(s, Tensor))]
        plain = [(n, value) for n, value in group.items() if n != "lr" and is_plain(value)]
        groups.append((tuple(map(place_of, tensors)), tuple(plain)))
    return id(optimizer), tuple(groups)
