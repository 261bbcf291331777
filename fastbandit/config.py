"""Configurations: frozen dataclasses whose ranges stand beside the fields, presets, YAML files.

A setting is ``Annotated[int, at_least(2)]`` and the like; :class:`Config` checks type and range of
all of them, those of nested dataclasses included, whichever way a configuration is made.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Iterator, Mapping
from fractions import Fraction
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fastbandit._files import FileError, read_text
from fastbandit._suggest import did_you_mean
from fastbandit._yaml import LARGEST_YAML, parse_yaml
from fastbandit.threat import format_fraction, plain_number

__all__ = [
    "BELONGS",
    "LATER",
    "POSITIVE",
    "SEED",
    "SHARE",
    "Config",
    "ConfigError",
    "Radius",
    "Range",
    "at_least",
    "check_values",
    "keep_plain_numbers",
    "merge",
    "read_config_file",
    "to_plain",
]

T = TypeVar("T")

#: Of a class of settings: pairs of a setting and the one that it belongs to, as the parameters of a
#: policy do. Where a file or a flag changes the second, the first has its default again.
BELONGS: dict[type, tuple[tuple[str, str], ...]] = {}


class ConfigError(ValueError):
    """A setting that is unknown or has a value of the wrong kind."""


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a setting may have: metadata of an ``Annotated`` field.

    Args:
        expected: the range in words, for the message of an error.
        least, most: bounds that belong to the range.
        above, below: bounds that do not.
        multiple_of: of which every number is a multiple.
    """

    expected: str
    least: float = -math.inf
    most: float = math.inf
    above: float | None = None
    below: float | None = None
    multiple_of: int | None = None

    def holds(self, value: float) -> bool:
        """Whether ``value`` is in the range; NaN never is."""
        return (
            self.least <= value <= self.most
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )


def at_least(least: float) -> Range:
    """Finite numbers from ``least`` on."""
    return Range(f"{least} or more", least=least, below=math.inf)


#: A finite number above 0.
POSITIVE = Range("a positive number", above=0, below=math.inf)
#: A share of something that is neither nothing nor all of it.
SHARE = Range("a share between 0 and 1", above=0, below=1)
#: What a generator takes.
SEED = Range("a whole number in [0, 2^63)", least=0, below=2**63)
#: A number that a fraction gives exactly, such as 8/255; Python numbers are taken too.
Radius = Annotated[str, "a number, or a fraction as text"]


#: A setting that came later: files leave it out while it has its default, so that a run without
#: it has the bytes and the run id that it had before there was the setting.
LATER = "left out of files at its default"


class Config:
    """Base of a frozen dataclass of settings: checks types and ranges of all fields.

    Raises:
        ConfigError: a value of the wrong type or outside of its range, or two that exclude each
            other (:meth:`check`).
    """

    #: The presets of the command, by name.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @classmethod
    def preset(cls: type[T], name: str, /, **settings: Any) -> T:
        """The settings of a preset, as ``--preset`` has them, with others in their place.

        Args:
            settings: by name, those of a section as a mapping: ``attack={"epsilon": "8/255"}``.

        Raises:
            ConfigError: no such preset, or a setting that is unknown or of the wrong kind.
        """
        presets = cls.presets  # type: ignore[attr-defined]
        if name not in presets:
            raise ConfigError(
                f"preset: expected one of {', '.join(presets) or 'none'}, got {name!r}"
                f"{did_you_mean(str(name), presets)}"
            )
        return merge(merge(cls(), presets[name], f"preset {name}"), settings, "preset")

    def __post_init__(self) -> None:
        keep_plain_numbers(self)
        check_values(self)
        self.check()

    def check(self) -> None:
        """Rules between settings, for subclasses."""


@dataclasses.dataclass(frozen=True)
class _Field:
    """What is checked of a setting."""

    name: str
    hint: Any
    adapter: TypeAdapter[Any]
    ranges: tuple[Range, ...]
    optional: bool
    radius: bool


@cache
def _fields(kind: Any) -> tuple[_Field, ...]:
    plain, full = typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    fields = []
    for setting in dataclasses.fields(kind):
        hint = plain[setting.name]
        if dataclasses.is_dataclass(hint):
            continue
        # A tuple may be given as a list; a number that is no part of one never as text.
        strict = ConfigDict(strict=typing.get_origin(hint) is not tuple)
        marks = list(_metadata(full[setting.name]))
        fields.append(
            _Field(
                setting.name,
                hint,
                TypeAdapter(hint, config=strict),
                tuple(mark for mark in marks if isinstance(mark, Range)),
                type(None) in typing.get_args(hint),
                any(mark in Radius.__metadata__ for mark in marks),  # type: ignore[attr-defined]
            )
        )
    return tuple(fields)


@cache
def _nested(kind: Any) -> tuple[tuple[str, type[Any]], ...]:
    """Settings that are dataclasses of settings."""
    hints = typing.get_type_hints(kind)
    return tuple(
        (n, hint)
        for n, hint in hints.items()
        if isinstance(hint, type) and dataclasses.is_dataclass(hint)
    )


def _metadata(hint: Any) -> Iterator[Any]:
    """Of an annotation and of the members of a union in it."""
    yield from getattr(hint, "__metadata__", ())
    for part in typing.get_args(hint):
        if not isinstance(part, Range):
            yield from _metadata(part)


def _hint(setting: Any, value: Any) -> str:
    """The nearest of the words that a setting may be, where it is one of some words."""
    if not isinstance(value, str):
        return ""
    words = [word for part in (setting, *typing.get_args(setting)) for word in _words(part)]
    return did_you_mean(value, words)


def _words(hint: Any) -> list[str]:
    if typing.get_origin(hint) is not typing.Literal:
        return []
    return [word for word in typing.get_args(hint) if isinstance(word, str)]


def check_values(config: Any, prefix: str = "") -> None:
    """Check type and range of every setting, nested dataclasses included.

    Raises:
        ConfigError: which setting, what was expected and what it is.
    """
    for field in _fields(type(config)):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (field.radius and number):
            try:
                field.adapter.validate_python(value)
            except ValidationError as error:
                message = error.errors()[0]["msg"]
                hint = _hint(field.hint, value)
                raise ConfigError(f"{prefix}{field.name}: {message}, got {value!r}{hint}") from None
        for range_ in field.ranges if value is not None else ():
            if not range_.holds(value):
                expected = f"None or {range_.expected}" if field.optional else range_.expected
                raise ConfigError(f"{prefix}{field.name}: expected {expected}, got {value!r}")
    for name, kind in _nested(type(config)):  # type: ignore[arg-type]
        value = getattr(config, name)
        if not isinstance(value, kind):
            raise ConfigError(f"{prefix}{name}: expected {kind.__name__}, got {value!r}")
        check_values(value, f"{prefix}{name}.")


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
    """A configuration dataclass as nested dictionaries of plain values; see :data:`LATER`."""
    plain = dataclasses.asdict(config)
    _drop_later(config, plain)
    return plain


def _drop_later(config: Any, plain: dict[str, Any]) -> None:
    kind: Any = type(config)
    for name, default in _later(kind):
        if getattr(config, name) == default:
            del plain[name]
    for setting in dataclasses.fields(config):
        value = getattr(config, setting.name)
        if dataclasses.is_dataclass(value) and setting.name in plain:
            _drop_later(value, plain[setting.name])


@cache
def _later(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Settings that are left out at their default, with it."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return tuple(
        (setting.name, setting.default)
        for setting in dataclasses.fields(kind)
        if LATER in list(_metadata(hints[setting.name]))
    )


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

    Of what :data:`BELONGS` has, a setting that is not given has its default again where the one it
    belongs to changes.

    Raises:
        ConfigError: an unknown name (the nearest known one is suggested) or a value of the wrong
            kind; ``where`` says which file or preset it came from.
    """
    assert dataclasses.is_dataclass(config)
    hints = typing.get_type_hints(type(config))
    names = [field.name for field in dataclasses.fields(config)]
    updates: dict[str, Any] = {}
    for raw, value in changes.items():
        name = str(raw).replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(names)}"
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
            raise ConfigError(
                f"{where}: {prefix}{name}: {message}, got {value!r}{_hint(hint_type, value)}"
            ) from None
    for parameter, owner in BELONGS.get(type(config), ()):
        if owner in updates and updates[owner] != getattr(config, owner):
            (field,) = (one for one in dataclasses.fields(config) if one.name == parameter)
            updates.setdefault(parameter, field.default)
    result: T = dataclasses.replace(config, **updates)  # type: ignore[type-var]
    return result
