"""Configuration of the commands: defaults < preset < file < command line."""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from pydantic import TypeAdapter, ValidationError

from fastbandit._files import FileError, read_text
from fastbandit._output import flushed, lasting_streams
from fastbandit._yaml import LARGEST_YAML, parse_yaml
from fastbandit.threat import format_fraction, plain_number

if typing.TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "CommonOptions",
    "ConfigError",
    "base_config",
    "guard",
    "keep_plain_numbers",
    "merge",
    "read_config_file",
    "resumed_config",
    "take_option",
    "to_plain",
]

T = TypeVar("T", bound="DataclassInstance")


class ConfigError(ValueError):
    """A setting that is unknown or has a value of the wrong kind."""


@dataclasses.dataclass(frozen=True)
class CommonOptions:
    """Options that mean the same in every command with a configuration."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with settings; they win over the preset, and flags win over them"""
    print_config: bool = False
    """print the resolved configuration as YAML and stop"""
    json: bool = False
    """print the result as JSON on standard output"""


def take_option(arguments: Sequence[str], name: str) -> str | None:
    """The value of ``--name VALUE`` or ``--name=VALUE``, the last one given; None without it.

    The preset and the configuration file have to be known before the command line is parsed,
    because they give its defaults.
    """
    value = None
    flag = f"--{name}"
    for position, argument in enumerate(arguments):
        if argument == "--":
            break
        if argument == flag:
            value = arguments[position + 1] if position + 1 < len(arguments) else None
        elif argument.startswith(flag + "="):
            value = argument[len(flag) + 1 :]
    return value


def read_config_file(path: str) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: missing, larger than 64 KiB, not YAML as
            :func:`~fastbandit._yaml.parse_yaml` has it (no key twice), or not a mapping.
    """
    try:
        value = parse_yaml(read_text(path, LARGEST_YAML))
    except FileError as error:
        raise ConfigError(f"--config {error}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"--config {path}: expected a mapping, got {type(value).__name__}")
    return value


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration dataclass as nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def keep_plain_numbers(config: Any) -> None:
    """Scalars of numpy, tensors and Fractions among the settings as what a file can hold.

    For the ``__post_init__`` of a configuration; those within it are included.
    """
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value):
            keep_plain_numbers(value)
            continue
        number = None if type(value) in (int, float) else plain_number(value)
        if number is not None:
            plain = format_fraction(number) if isinstance(number, Fraction) else number
            object.__setattr__(config, setting.name, plain)  # the class is frozen


def merge(config: T, changes: Mapping[str, Any], where: str, prefix: str = "") -> T:
    """``config`` (a dataclass) with ``changes`` applied, nested mappings into nested dataclasses.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested) or a value of the wrong
            kind; ``where`` says which file or preset it came from.
    """
    assert dataclasses.is_dataclass(config)
    hints = typing.get_type_hints(type(config))
    known = [field.name for field in dataclasses.fields(config)]
    updates: dict[str, Any] = {}
    for raw, value in changes.items():
        name = str(raw).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"{where}: unknown setting {prefix}{raw}{hint}")
        if name in updates:
            raise ConfigError(
                f"{where}: {prefix}{name} is given twice, with an underscore and with a hyphen"
            )
        current = getattr(config, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{where}: {prefix}{name}: expected a mapping, got {type(value).__name__}"
                )
            assert not isinstance(current, type)
            updates[name] = merge(current, value, where, f"{prefix}{name}.")
            continue
        hint_type = hints[name]
        accepts = typing.get_args(hint_type) or (hint_type,)
        # YAML reads 0.3 as a number where the setting is text that may also be 8/255.
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and str in accepts and type(value) not in accepts:
            value = repr(value)
        if isinstance(value, str) and hint_type in (str, str | None):
            updates[name] = value  # also the name of a folder that is not UTF-8
            continue
        try:
            updates[name] = TypeAdapter(hint_type).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"{where}: {prefix}{name}: {message}, got {value!r}") from None
    return dataclasses.replace(config, **updates)


def base_config(config: T, presets: Mapping[str, Mapping[str, Any]], arguments: Sequence[str]) -> T:
    """``config`` with the preset and the file that the command line names; flags come after.

    Raises:
        ConfigError: no such preset, or a setting there that is unknown or of the wrong kind.
    """
    preset = take_option(arguments, "preset")
    if preset is not None:
        if preset not in presets:
            raise ConfigError(f"--preset: expected one of {', '.join(presets)}, got {preset!r}")
        config = merge(config, presets[preset], f"preset {preset}")
    file = take_option(arguments, "config")
    if file is not None:
        config = merge(config, read_config_file(file), f"--config {file}")
    return config


def resumed_config(given: T, stored: T, folder: str, out: str | None) -> T:
    """The configuration of a run that ``--resume FOLDER`` goes on with: what is stored there.

    Raises:
        ConfigError: something else was asked for beside it.
    """
    # Whatever else is asked for must agree with what is stored, or it is refused.
    if given not in (type(given)(), stored):
        raise ConfigError("--resume takes its settings from the folder; give it no other settings")
    if out is not None and Path(out) != Path(folder):
        raise ConfigError("--resume and --out name different folders; give one of them")
    return stored


def guard(
    command: str, action: Callable[[], int], *, speaks: Callable[[], bool] = lambda: True
) -> int:
    """Run a command's body; turn errors that are the user's to mend into one line and a status.

    ``FASTBANDIT_DEBUG=1`` shows the traceback instead. ``speaks`` is asked before the line is
    printed: of several processes with the same error one is enough. What is printed within goes
    through :func:`fastbandit._output.lasting_streams`.
    """
    with lasting_streams():
        try:
            return flushed(action)
        except KeyboardInterrupt:
            if speaks():
                print(
                    f"\n{command}: interrupted; the same command goes on from here",
                    file=sys.stderr,
                )
            return 130
        except (ValueError, OSError, RuntimeError) as error:
            told = _told(error)
            if told is None or os.environ.get("FASTBANDIT_DEBUG") == "1":
                raise
            if speaks():
                print(f"{command}: error: {told}", file=sys.stderr)
            return 1


def _told(error: Exception) -> str | None:
    """What a user is told of an error; None for one that is a fault of ours."""
    if not isinstance(error, RuntimeError):
        return str(error)
    torch = sys.modules.get("torch")  # not every command needs it
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    return f"out of memory: {str(error).splitlines()[0]}; try half the --batch-size"
