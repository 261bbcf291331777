"""What a shortcut asks before it is taken: whether a call of a module may be replaced by what its
class is known to compute, and whether a tensor that is made now may be kept for later calls.
"""

from __future__ import annotations

from typing import Generic, TypeGuard, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["Plain"]


M = TypeVar("M", bound=nn.Module)


class Plain(Generic[M]):
    """The question whether a call of a module is the ``forward`` of ``kind`` and nothing else.

    It is not where the module is of another class (a subclass, or parametrised, which changes the
    class), has a hook of any kind (as pruning and the older forms of spectral and weight norm
    have) or a ``forward`` of its own, was compiled, or while a hook for all modules is set or the
    class itself was patched. A shortcut reads the module's parameters as ``forward`` would; so
    with yes for an answer it computes the same function.

    A question takes about a microsecond, so it can be asked at every call.
    """

    def __init__(self, kind: type[M]) -> None:
        self._kind, self._forward, self._call = kind, kind.forward, kind.__call__

    def __call__(self, module: nn.Module) -> TypeGuard[M]:
        kind = self._kind
        if type(module) is not kind:
            return False
        own = module.__dict__
        return not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in own
            or "_call_impl" in own
            or module._compiled_call_impl is not None
            or kind.forward is not self._forward
            or kind.__call__ is not self._call
            or _has_any_global_hook()
        )
