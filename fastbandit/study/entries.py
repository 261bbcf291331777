"""Entries of a study: a policy or a search with settings of its own, as text."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter

from fastbandit.bandit import BanditSettings
from fastbandit.config import ConfigError

__all__ = ["parse_entry", "parse_settings"]


def parse_settings(
    text: str, kinds: Mapping[str, Any], where: str, number: str = "a number"
) -> tuple[str, dict[str, Any]]:
    """``NAME,SETTING=VALUE,...`` as its name and its settings.

    Args:
        text: the entry.
        kinds: the type of each setting that it may have.
        where: what the message of an error begins with.
        number: what a value is that is none of a few words.

    Raises:
        ConfigError: an unknown setting, or a value of the wrong kind.
    """
    name, *changes = (word.strip() for word in text.split(","))
    values: dict[str, Any] = {}
    for change in changes:
        setting, equals, value = (part.strip() for part in change.partition("="))
        setting = setting.replace("-", "_")
        if setting not in kinds or not equals:
            raise ConfigError(
                f"{where}: {text!r}: expected SETTING=VALUE with one of "
                f"{', '.join(kinds).replace('_', '-')}; got {change!r}"
            )
        try:
            values[setting] = TypeAdapter(kinds[setting]).validate_python(value)
        except ValueError:
            words = typing.get_args(kinds[setting])
            expected = f"one of {', '.join(words)}" if words else number
            raise ConfigError(
                f"{where}: {text!r}: {setting}: expected {expected}, got {value!r}"
            ) from None
    return name, values


def parse_entry(text: str, base: BanditSettings, where: str) -> tuple[BanditSettings, str | None]:
    """``POLICY,SETTING=VALUE,...`` as settings, and the space it names, if any.

    Args:
        base: where other settings come from.

    Raises:
        ConfigError: an unknown policy or setting, or a value that is none.
    """
    kinds = typing.get_type_hints(type(base))
    del kinds["policy"]
    policy, values = parse_settings(text, kinds | {"space": str}, where)
    space = values.pop("space", None)
    settings = dataclasses.replace(base, policy=policy, **values)
    try:
        settings.check()
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r}: {error}") from None
    return settings, space
