"""A model of one's own: code that makes it, named ``module:function``, and a file of its weights.

The code is the user's and is run. The file of weights may be anybody's: it holds tensors under
names (a state dict), and nothing in it is unpickled but what ``torch.load(weights_only=True)``
takes.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import os
import pickle
import re
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fastbandit._suggest import did_you_mean
from fastbandit.config import ConfigError

__all__ = ["ModelCode", "load_weights", "names_code", "read_weights", "torch_file", "with_weights"]

_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# Under these names training scripts keep the state dict beside other things.
_INNER = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params")
# What DataParallel, torch.compile and Lightning put before every name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
# How a file begins that torch.save wrote before it wrote zip files, or was told to: the pickle of
# a number that torch chose.
_OLD_FORMAT = bytes.fromhex("80028a0a6cfc9c46f9206aa85019")
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")


def names_code(text: str) -> bool:
    """Whether a text is of the form ``my_package.my_module:make_model``."""
    return _NAME.fullmatch(text) is not None and not os.path.lexists(text)


@dataclass(frozen=True)
class ModelCode:
    """A model that code of the user makes.

    code: ``my_package.my_module:make_model``; what it names is a ``torch.nn.Module``, or is called
        without arguments and returns one. The current folder is searched first, as by ``python
        -m``.
    weights: a file of its state dict, or None: as the code makes it.
    """

    code: str
    weights: Path | None = None

    def load(self) -> nn.Module:
        """The model with its weights.

        Raises:
            ConfigError: no such code, or it makes no model.
            ValueError: the weights cannot be read or do not fit.
        """
        target = _named(self.code)
        if isinstance(target, nn.Module):
            # Of the module that defines it, which keeps its own weights.
            return target if self.weights is None else with_weights(target, self.weights)
        model = _made(target, self.code)
        if self.weights is not None:
            load_weights(model, self.weights)
        return model


def _named(code: str) -> Any:
    """What ``module:name`` names."""
    if _NAME.fullmatch(code) is None:
        raise ConfigError(
            f"model: expected code such as my_package.my_module:make_model, got {code!r}"
        )
    module_name, _, path = code.partition(":")
    folder = os.getcwd()
    if folder not in sys.path:
        # The console command has its own folder there, not the one it is called in.
        sys.path.insert(0, folder)
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(f"model: {module_name}: its import fails: {error}") from error
        raise ConfigError(
            f"model: {module_name}: no such module, looked for in {folder} and in the installed "
            "packages; run the command in the folder that holds it, or name that in PYTHONPATH"
        ) from None
    except Exception as error:
        raise ConfigError(
            f"model: {module_name}: its import fails: {type(error).__name__}: {error}"
        ) from error
    for name in path.split("."):
        if not hasattr(target, name):
            names = [one for one in dir(target) if not one.startswith("_")]
            raise ConfigError(
                f"model: {code}: {module_name} has no {name!r}{did_you_mean(name, names)}"
            )
        target = getattr(target, name)
    return target


def _made(target: Any, code: str) -> nn.Module:
    """What ``target`` returns when it is called."""
    if not callable(target):
        raise ConfigError(
            f"model: {code}: expected a torch.nn.Module or a function that returns one, got a "
            f"{type(target).__name__}"
        )
    try:
        inspect.signature(target).bind()
    except TypeError as error:
        raise ConfigError(
            f"model: {code}: expected to be called without arguments ({error}); write a function "
            "of none that calls it"
        ) from None
    except ValueError:
        pass  # a builtin that does not say what it takes
    made = target()
    if not isinstance(made, nn.Module):
        raise ConfigError(
            f"model: {code}: expected it to return a torch.nn.Module, got a {type(made).__name__}"
        )
    return made


def torch_file(path: Path) -> str | None:
    """What torch wrote there, for a message; None where it is no file of torch."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_OLD_FORMAT))
        if head.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                names = {name.split("/", 1)[-1] for name in archive.namelist()}
            if "constants.pkl" in names and "data.pkl" in names:
                return "a TorchScript program"
            if "archive_format" in names and "data.pkl" not in names:
                return "a torch.export program"
            return "a file of torch.save" if "data.pkl" in names else None
        if head == _OLD_FORMAT:
            return "a file of torch.save"
    except (OSError, zipfile.BadZipFile):
        return None
    return None


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: ``.safetensors``, or of ``torch.save(model.state_dict(), ...)``.

    A state dict that a training script keeps under a name such as ``state_dict`` or ``model`` is
    taken from there.

    Raises:
        ConfigError: no such file.
        ValueError: no state dict, damaged, or one that holds pickled objects, which are not read.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ConfigError(f"weights: expected a file of {', '.join(_SUFFIXES)}, got {path}")
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"weights: {path}: expected a file of weights, got {what}")
    if path.suffix.lower() == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise ConfigError(
                f"weights: {path}: damaged or not a safetensors file: {error}"
            ) from None
    kind = torch_file(path)
    if kind == "a TorchScript program":
        raise ConfigError(
            f"weights: {path}: expected a state dict, got {kind}; save "
            "torch.jit.load(FILE).state_dict() with torch.save"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        culprit = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({culprit[1]})" if culprit else ""
        raise ConfigError(
            f"weights: {path}: expected a state dict, got "
            + (
                f"pickled objects{what}, which are never read; save model.state_dict() alone: "
                "torch.save(model.state_dict(), FILE)"
                if kind or culprit
                else "a file that torch cannot read: damaged, or not of torch.save"
            )
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        reason = "damaged, or not of torch.save"
        if kind is not None and str(error).strip():
            reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"weights: {path}: cannot be read by torch: {reason}") from None
    return _state_dict(content, path)


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    def tensors(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and len(value) > 0
            and all(isinstance(key, str) and isinstance(v, Tensor) for key, v in value.items())
        )

    if tensors(content):
        return dict(content)
    if isinstance(content, Mapping):
        inner = [name for name in _INNER if tensors(content.get(name))]
        if len(inner) == 1:
            return dict(content[inner[0]])
        several = inner or [name for name, value in content.items() if tensors(value)]
        if several:
            raise ConfigError(
                f"weights: {path}: expected one state dict, got "
                f"{', '.join(map(repr, several[:8]))} in a mapping; save the one that is wanted "
                f"alone: torch.save(torch.load(FILE)[{several[0]!r}], NEW)"
            )
        held = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise ConfigError(
            f"weights: {path}: expected a state dict, tensors by name, or one below one of "
            f"{', '.join(_INNER)}; got a mapping of {held}"
        )
    raise ConfigError(
        f"weights: {path}: expected a state dict, tensors by name, got a {type(content).__name__}"
    )


def with_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """A copy of ``model`` with a file of weights.

    Raises:
        ConfigError: it cannot be copied, or as of :func:`load_weights`.
    """
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise ConfigError(
            f"weights: expected a model that can be copied, got {type(model).__name__} "
            f"({str(error) or type(error).__name__}); load them into it beforehand"
        ) from None
    load_weights(copied, path)
    return copied


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a file of weights into ``model``; every tensor must be there and have its shape.

    A prefix that DataParallel, torch.compile or a trainer put before all names is taken off.

    Raises:
        ConfigError: as of :func:`read_weights`, or it is the state dict of another model; the
            message names the first tensors that differ.
    """
    state, wanted = read_weights(path), model.state_dict()
    changed = True
    while changed and not set(state) & set(wanted):
        changed = False
        for prefix in _PREFIXES:
            if state and all(name.startswith(prefix) for name in state):
                state = {name.removeprefix(prefix): value for name, value in state.items()}
                changed = True
    missing = [name for name in wanted if name not in state]
    more = [name for name in state if name not in wanted]
    shapes = [
        f"{name} is {list(state[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in state
        and isinstance(wanted[name], Tensor)
        and state[name].shape != wanted[name].shape
    ]
    if missing or more or shapes:
        reasons = [
            f"{word} {', '.join(names[:3])}" + (f" and {len(names) - 3} more" * (len(names) > 3))
            for word, names in (("lacks", missing), ("also has", more), ("where", shapes))
            if names
        ]
        raise ConfigError(
            f"weights: {path}: not of this model ({type(model).__name__}): {'; '.join(reasons)}"
        )
    model.load_state_dict(state)
