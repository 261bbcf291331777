"""Entries of a study: a policy with settings of its own, as text."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from pydantic import TypeAdapter

from fastbandit.bandit import BanditSettings
from fastbandit.config import ConfigError

__all__ = ["parse_entry"]


def parse_entry(text: str, base: BanditSettings, where: str) -> tuple[BanditSettings, str | None]:
    """``POLICY,SETTING=VALUE,...`` as settings, and the space it names, if any.

    Args:
        text: the entry.
        base: where other settings come from.
        where: what the message of an error begins with.

    Raises:
        ConfigError: an unknown policy or setting, or a value that is none.
    """
    name, *changes = (word.strip() for word in text.split(","))
    values: dict[str, Any] = {"policy": name}
    kinds = typing.get_type_hints(type(base))
    del kinds["policy"]
    searched = None
    for change in changes:
        setting, equals, value = change.partition("=")
        setting = setting.strip().replace("-", "_")
        if setting == "space" and equals:
            searched = value.strip()
            continue
        if setting not in kinds or not equals:
            raise ConfigError(
                f"{where}: {text!r}: expected SETTING=VALUE with one of "
                f"{', '.join(kinds).replace('_', '-')}, space; got {change!r}"
            )
        try:
            values[setting] = TypeAdapter(kinds[setting]).validate_python(value.strip())
        except ValueError:
            raise ConfigError(
                f"{where}: {text!r}: {setting}: expected a number, got {value!r}"
            ) from None
    settings = dataclasses.replace(base, **values)
    try:
        settings.check()
    except ValueError as error:
        raise ConfigError(f"{where}: {text!r}: {error}") from None
    return settings, searched
