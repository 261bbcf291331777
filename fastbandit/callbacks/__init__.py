"""Who is told of a run while it goes on.

``search(config, callbacks=[Csv(), TensorBoard()])``, ``retrain`` alike; on the command line
``--callbacks csv tensorboard mlflow wandb my_package.my_module:MyCallback``. Of one's own: a
subclass of :class:`Callback` with the methods that it needs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastbandit.callbacks.base import Callback, RunInfo
from fastbandit.callbacks.csv_file import Csv
from fastbandit.callbacks.named import READY, make

if TYPE_CHECKING:
    from fastbandit.callbacks.mlflow import MLflow
    from fastbandit.callbacks.optuna import OptunaPruning
    from fastbandit.callbacks.tensorboard import TensorBoard
    from fastbandit.callbacks.wandb import WandB

__all__ = [
    "Callback",
    "Csv",
    "MLflow",
    "OptunaPruning",
    "RunInfo",
    "TensorBoard",
    "WandB",
    "make",
]


def __getattr__(name: str) -> Any:
    # Their modules name libraries that need not be there.
    import importlib

    modules = {kind: module for module, kind in READY.values()} | {
        "OptunaPruning": "fastbandit.callbacks.optuna"
    }
    if name in modules:
        return getattr(importlib.import_module(modules[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
