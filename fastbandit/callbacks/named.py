"""Callbacks that a command line names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from fastbandit._suggest import did_you_mean
from fastbandit.callbacks.base import Callback

__all__ = ["READY", "make"]

#: Name on the command line: module and class.
READY = {
    "csv": ("fastbandit.callbacks.csv_file", "Csv"),
    "tensorboard": ("fastbandit.callbacks.tensorboard", "TensorBoard"),
    "mlflow": ("fastbandit.callbacks.mlflow", "MLflow"),
    "wandb": ("fastbandit.callbacks.wandb", "WandB"),
}


def make(names: Sequence[str]) -> list[Callback]:
    """The callbacks of a list of names.

    Args:
        names: ``csv``, ``tensorboard``, ``mlflow``, ``wandb``, or ``my_package.my_module:NAME``,
            which is a callback, or a class or function that makes one without arguments. The
            current folder is searched first, as by ``python -m``.

    Raises:
        ValueError: there is none of that name, or its library is not installed.
    """
    return [_make(name) for name in names]


def _make(name: str) -> Callback:
    if name in READY:
        module, attribute = READY[name]
    elif ":" in name:
        module, _, attribute = name.partition(":")
        if "" not in sys.path:
            sys.path.insert(0, "")
    else:
        raise ValueError(
            f"callbacks: expected {', '.join(READY)} or MODULE:NAME, got {name!r}"
            f"{did_you_mean(name, READY)}"
        )
    try:
        target = importlib.import_module(module)
        for part in attribute.split("."):
            target = getattr(target, part)
        made = target() if callable(target) else target
    except (ImportError, AttributeError) as error:
        hint = f"; pip install {name}" if name in READY else ""
        raise ValueError(f"callbacks: {name}: {error}{hint}") from error
    if not isinstance(made, Callback):
        raise ValueError(
            f"callbacks: {name}: expected a fastbandit.callbacks.Callback, got "
            f"{type(made).__name__}"
        )
    return made
