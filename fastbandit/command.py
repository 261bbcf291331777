"""The shell of every command: options, presets, files, flags, processes, output and errors.

Settings come from, each winning over those before: defaults, preset, YAML file, flags.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, TypeVar

import tyro

from fastbandit._files import json_value
from fastbandit._latest import command_of, last_written, newest
from fastbandit._output import flushed, lasting_streams
from fastbandit._program import examples, program
from fastbandit._suggest import did_you_mean, with_hint
from fastbandit.config import BELONGS, Config, ConfigError, merge, read_config_file, to_plain

if TYPE_CHECKING:
    from fastbandit.distributed import Group
    from fastbandit.runs.progress import Progress

__all__ = [
    "Command",
    "CommonOptions",
    "Request",
    "RunOptions",
    "base_config",
    "check_choices",
    "guard",
    "take_option",
]

C = TypeVar("C", bound=Config)


@dataclass(frozen=True)
class CommonOptions:
    """Options that mean the same in every command with a configuration."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """YAML file with settings; they win over the preset, and flags win over them"""
    print_config: bool = False
    """print the resolved configuration as YAML and stop"""
    json: bool = False
    """print the result as JSON on standard output"""


@dataclass(frozen=True)
class RunOptions(CommonOptions):
    """Options of a command that writes a run folder and may run on several processes."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """run folder; default: an unfinished run of this configuration below runs/, else a new one"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the run in this folder, with the configuration stored there"""
    force: bool = False
    """replace a finished run, or one of another configuration, in --out"""
    peer_timeout: float = 600.0
    """seconds to wait for another process of the run before it counts as gone"""
    download: bool = False
    """fetch the images that --data names (mnist, fashion-mnist, cifar10) where they are not yet"""
    dry_run: bool = False
    """measure a few steps, print memory and time that the run will take, and stop"""


@dataclass(frozen=True)
class Request(Generic[C]):
    """What a command line asks for."""

    options: Any
    config: C
    out: str | None = None


class Command(ABC, Generic[C]):
    """A command; a subclass says what it runs, what that costs and how the result is shown."""

    name: ClassVar[str]
    description: ClassVar[str]
    config: type[C]
    options: ClassVar[type[Any]] = RunOptions
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    #: What the folder is called in the JSON output.
    folder_key: ClassVar[str] = "run"
    #: Whether torchrun may start it.
    several_processes: ClassVar[bool] = True

    # What a subclass provides.

    @abstractmethod
    def run(
        self, request: Request[C], progress: Progress, group: Group | None
    ) -> tuple[Path, dict[str, Any]]:
        """Do it; returns the folder and the result."""

    @abstractmethod
    def show(self, path: Path, result: dict[str, Any]) -> None:
        """Print the result."""

    @abstractmethod
    def estimate(self, request: Request[C], progress: Progress) -> dict[str, Any]:
        """What it will cost, measured within about half a minute."""

    @abstractmethod
    def show_estimate(self, result: dict[str, Any]) -> None:
        """Print what it will cost."""

    # What a subclass may change.

    def default(self) -> C:
        """The settings where nothing is said."""
        return self.config()

    def base(self, arguments: Sequence[str]) -> C:
        """The settings before the flags, but for what :func:`settle` makes of them."""
        return base_config(self.default(), self.presets, arguments)

    def stored(self, folder: Path) -> C:
        """The settings of the run in ``folder``, for ``--resume``."""
        from fastbandit.runs.folder import RunFolder

        return merge(self.config(), RunFolder.read_config(folder), f"{folder}/config.yaml")

    def prepare(self, arguments: Sequence[str]) -> Request[C]:
        """The request that a command line makes.

        Raises:
            ConfigError: ``--resume`` beside settings or a folder that are not those stored.
        """
        request: Request[C] = self.parse(arguments)
        folder = getattr(request.options, "resume", None)
        if folder is None:
            return request
        named = newest(folder, self._own, f"a folder of {self.name}", ConfigError)
        if named is not None:
            folder = str(named)
            options = dataclasses.replace(request.options, resume=folder)
            request = dataclasses.replace(request, options=options)
        stored = self.stored(Path(folder))
        # Whatever else is asked for must agree with what is stored, or it is refused.
        if request.config not in (self.config(), stored):
            raise ConfigError(
                "--resume takes its settings from the folder; give it no other settings"
            )
        if request.out is not None and Path(request.out) != Path(folder):
            raise ConfigError("--resume and --out name different folders; give one of them")
        return dataclasses.replace(request, config=stored, out=folder)

    def _own(self, folder: Path) -> Path | None:
        return last_written(folder) if command_of(folder) == self.name else None

    def resolved(self, request: Request[C]) -> Any:
        """The configuration with every ``auto`` replaced by what it means here."""
        return request.config

    def begin(self, request: Request[C], arguments: Sequence[str], many: bool) -> Request[C] | None:
        """What precedes the run; None where that was all.

        Args:
            many: this is one of several processes of torchrun.
        """
        return request

    # The same for all.

    def parse(self, arguments: Sequence[str], base: C | None = None) -> Request[C]:
        """Options and settings: defaults < preset < file < flags.

        Raises:
            ValueError: an unknown preset, setting or value. (tyro ends the process with status 2
                and a message of its own where a flag cannot be parsed at all.)
        """
        base = settle(self.base(arguments) if base is None else base, arguments)
        flat = tyro.conf.arg(name="")
        kind = dataclasses.make_dataclass(
            "Arguments",
            [("options", Annotated[self.options, flat]), ("config", Annotated[self.config, flat])],
            frozen=True,
        )
        check_choices(program(self.name), (self.options, self.config), arguments)
        parsed: Any = tyro.cli(
            kind,
            default=kind(self.options(), base),
            args=list(arguments),
            prog=program(self.name),
            description=self.description + examples(self.name),
        )
        return Request(parsed.options, parsed.config, getattr(parsed.options, "out", None))

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run the command; returns its exit status."""
        given = sys.argv[1:] if arguments is None else list(arguments)
        return guard(self.name, lambda: self._main(given), reports=self._reports_errors)

    def _reports_errors(self) -> bool:
        from fastbandit.distributed import first_to_speak

        return not self.several_processes or first_to_speak()

    def _main(self, arguments: Sequence[str]) -> int:
        from fastbandit.distributed import Group, launched
        from fastbandit.runs.progress import Progress

        request = self.prepare(arguments)
        options = request.options
        many = self.several_processes and launched()
        # What needs no run needs no other process either.
        if many and os.environ["RANK"] != "0" and (options.print_config or options.dry_run):
            return 0
        if options.print_config:
            import yaml

            # Through JSON: lists where the configuration has tuples.
            plain = json_value(to_plain(self.resolved(request)))
            print(yaml.safe_dump(plain, sort_keys=False), end="")
            return 0
        if getattr(options, "download", False):
            if many:
                raise ConfigError("--download: expected one process; fetch first, then torchrun")
            from fastbandit.data import download

            download(str(getattr(request.config, "data", None)), say=Progress().line)
        if options.dry_run:
            estimate = self.estimate(request, Progress())
            if options.json:
                print(json.dumps(estimate))
            else:
                self.show_estimate(estimate)
            return 0
        begun = self.begin(request, arguments, many)
        if begun is None:
            return 0
        request = begun
        if not many:
            path, result = self.run(request, Progress(), None)
        else:
            import torch

            kind = torch.device(self.resolved(request).device).type
            with Group.join(kind, timeout=options.peer_timeout) as group:
                path, result = self.run(request, Progress(), group)
                if group.rank:
                    return 0
        if options.json:
            print(json.dumps({self.folder_key: str(path), **result}))
        else:
            self.show(path, result)
        return 0


def check_choices(name: str, kinds: Sequence[type[Any]], arguments: Sequence[str]) -> None:
    """Say which choice of a setting was meant by a value that is none but near to one.

    All other mistakes are left to the parser.

    Args:
        name: the program, as messages call it.
        kinds: dataclasses of options and settings.

    Raises:
        SystemExit: with status 2, as the parser ends on a value that is no choice.
    """
    choices: dict[str, tuple[str, ...]] = {}
    for kind in kinds:
        choices |= _choices_of(kind)
    for flag, values in choices.items():
        plain = flag.replace("_", "-")
        value = take_option(arguments, plain) or take_option(arguments, flag)
        if value is None or value in values:
            continue
        if hint := did_you_mean(value, values):
            print(
                f"{name}: error: --{plain}: expected one of {', '.join(values)}, got {value!r}"
                f"{hint}",
                file=sys.stderr,
            )
            raise SystemExit(2)


def _choices_of(kind: type[Any], prefix: str = "") -> dict[str, tuple[str, ...]]:
    """The settings below a dataclass that are one of some words, by flag."""
    choices: dict[str, tuple[str, ...]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            choices |= _choices_of(hint, f"{prefix}{name}.")
            continue
        members = typing.get_args(hint) if typing.get_origin(hint) is not Literal else (hint,)
        for member in members:
            if typing.get_origin(member) is Literal:
                choices[prefix + name] = tuple(map(str, typing.get_args(member)))
    return choices


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


def base_config(config: C, presets: Mapping[str, Mapping[str, Any]], arguments: Sequence[str]) -> C:
    """``config`` with the preset and the file that the command line names; flags come after.

    Raises:
        ConfigError: no such preset, or a setting there that is unknown or of the wrong kind.
    """
    preset = take_option(arguments, "preset")
    if preset is not None:
        config = merge(config, preset_settings(presets, preset), f"preset {preset}")
    file = take_option(arguments, "config")
    if file is not None:
        config = merge(config, read_config_file(file), f"--config {file}")
    return config


def settle(config: Any, arguments: Sequence[str], prefix: str = "") -> Any:
    """``config`` without those settings that belong to one that a flag changes (``BELONGS``).

    What a preset says of its policy or its space, say, is none of another one's. A value that is
    of no use is left to whoever parses the flags.
    """
    for owner in {owner for _, owner in BELONGS.get(type(config), ())}:
        value = take_option(arguments, f"{prefix}{owner.replace('_', '-')}")
        if value is not None:
            with contextlib.suppress(ConfigError, ValueError):
                config = merge(config, {owner: value}, "flags")
    sections: dict[str, Any] = {
        field.name: settle(section, arguments, f"{prefix}{field.name.replace('_', '-')}.")
        for field in dataclasses.fields(config)
        if dataclasses.is_dataclass(section := getattr(config, field.name))
    }
    return dataclasses.replace(config, **sections) if sections else config


def preset_settings(presets: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The settings of a preset.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in presets:
        raise ConfigError(
            f"--preset: expected one of {', '.join(presets)}, got {name!r}"
            f"{did_you_mean(name, presets)}"
        )
    return presets[name]


def guard(
    command: str, action: Callable[[], int], *, reports: Callable[[], bool] = lambda: True
) -> int:
    """Run a command's body; turn errors that are the user's to mend into one line and a status.

    ``FASTBANDIT_DEBUG=1`` shows the traceback instead. ``reports`` is asked before the line is
    printed: of several processes with the same error one is enough. What is printed within goes
    through :func:`fastbandit._output.lasting_streams`.
    """
    with lasting_streams():
        try:
            return flushed(action)
        except KeyboardInterrupt:
            if reports():
                print(
                    f"\n{command}: interrupted; the same command goes on from here",
                    file=sys.stderr,
                )
            return 130
        except (ValueError, OSError, RuntimeError) as error:
            message = _message(error)
            if message is None or os.environ.get("FASTBANDIT_DEBUG") == "1":
                raise
            if reports():
                print(f"{command}: error: {with_hint(message)}", file=sys.stderr)
            return 1


def _message(error: Exception) -> str | None:
    """What is printed of an error; None for one that is a fault of ours."""
    if not isinstance(error, RuntimeError):
        return str(error)
    torch = sys.modules.get("torch")  # not every command needs it
    if torch is None or not isinstance(error, torch.OutOfMemoryError):
        return None
    return f"out of memory: {str(error).splitlines()[0]}; try half the --batch-size"
