"""A run that goes on from the last epoch of another one, with other settings."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from fastbandit._files import plain_file, write_atomic
from fastbandit._latest import command_of
from fastbandit.callbacks.base import flat
from fastbandit.config import ConfigError
from fastbandit.runs.environment import run_id
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.tensors import RunError

__all__ = ["fork"]

# Beside the logs: what a run has from its beginning on.
_COPIED = ("split.json", "genotype.json")


def fork(
    source: Path,
    path: Path,
    config: dict[str, Any],
    files: RunFiles,
    free: tuple[str, ...],
) -> int:
    """Make a run folder that stands where another one does, with a configuration of its own.

    The run there is left as it is. The new folder appears whole or not at all. What a search has
    trained from scratch so far is not taken over, since its recipe follows from the settings.

    Args:
        source: a run of the same command.
        path: the new folder.
        config: its resolved configuration, plain values.
        files: what the command writes.
        free: settings that may differ; ``a`` stands for ``a.b`` too. The state of a run belongs to
            the others.

    Returns:
        Epochs that are done.

    Raises:
        ConfigError: nothing differs, or a setting that may not.
        RunError: there is no run of this command with a checkpoint, or something else at ``path``.
    """
    if os.path.lexists(path):
        raise RunError(f"{path}: expected a new folder for --fork, got one that is there")
    stored = RunFolder.read_config(source, files.result)
    written = command_of(source)
    if written not in (None, files.command):
        raise RunError(f"{source}: expected a run of {files.command}, got one of {written}")
    _check_settings(source, stored, config, free)
    states: list[tuple[dict[str, Tensor], dict[str, Any]]] = []
    # Its lock, so that it does not grow meanwhile; and its checks.
    with RunFolder.open(source, stored, files=files) as old:
        if not old.load_checkpoint(lambda *state: states.append(state)):
            raise RunError(f"{source}: expected a run with a checkpoint, got none yet")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            with RunFolder.open(temporary, config, files=files) as new:
                epochs = 0
                for name in files.logs:
                    if (source / name).is_file():
                        lines = old.read_lines(name)
                        new.append(name, *lines)
                        epochs = len(lines) if name == "metrics.jsonl" else epochs
                for name in _COPIED:
                    if (source / name).is_file():
                        write_atomic(temporary / name, plain_file(source / name).read_bytes())
                origin = {"run_id": run_id(stored), "folder": str(source), "epochs": epochs}
                new.write_json("env.json", {**old.read_json("env.json"), "forked_from": origin})
                new.save_checkpoint(*states[0])
            # mkdtemp's folders are for their owner alone.
            temporary.chmod(source.stat().st_mode & 0o777)
            os.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
            raise
    return epochs


def _check_settings(
    source: Path, stored: Mapping[str, Any], config: Mapping[str, Any], free: tuple[str, ...]
) -> None:
    then, now = flat(stored), flat(config)
    changed = [
        name for name in (*now, *(name for name in then if name not in now))
        if then.get(name) != now.get(name)
    ]  # fmt: skip
    if not changed:
        raise ConfigError(
            f"--fork {source}: expected other settings than those of this run, got the same; "
            f"--resume {source} goes on with it"
        )
    for name in changed:
        if not any(name == one or name.startswith(f"{one}.") for one in free):
            raise ConfigError(
                f"--fork {source}: {name}: expected {then.get(name)!r} as there, since a run's "
                f"state belongs to it, got {now.get(name)!r}; what may differ: {', '.join(free)}"
            )
