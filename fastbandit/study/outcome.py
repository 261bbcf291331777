"""How a study of any kind begins in its folder, and what it leaves there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastbandit._files import write_atomic
from fastbandit.runs.environment import environment
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.session import Session, torch_settings

if TYPE_CHECKING:
    from fastbandit.study.config import StudyConfig

__all__ = ["in_folder"]

#: Makes the page from the environment and the text of ``config.yaml``.
Page = Callable[[dict[str, Any], str], str]


def in_folder(
    config: StudyConfig,
    files: RunFiles,
    work: Callable[[RunFolder], tuple[dict[str, Any], Page | None]],
    out: str | Path | None,
    *,
    kind: str,
    threads: int,
    root: str | Path,
    force: bool,
    log: Callable[[str], None],
    **facts: Any,
) -> tuple[Path, dict[str, Any]]:
    """Do the work of a study in its run folder; of a finished one return what is stored.

    Args:
        work: returns the result and its page; without a page the study goes on another time.
        kind: study or comparison.
        facts: more of where it runs than every command records.
    """
    session, device = Session(config), torch.device(config.search.resolve().device)
    with (
        torch_settings(threads, False),
        session.open(files, out, root=root, name=config.name, force=force, progress=None),
    ):
        folder, path = session.folder, session.path
        assert folder is not None
        result: dict[str, Any]
        if session.finished() is not None:
            result = folder.read_json("study.json")
            result.pop("environment")
            log(
                f"{path}: all is done: the {kind} of this configuration is finished, and this is "
                "its stored result; --force runs it again"
            )
            return path, result
        if not (path / "env.json").is_file():
            folder.write_json(
                "env.json", {"command": files.command, **environment(device), **facts}
            )
        started = time.perf_counter()
        result, page = work(folder)
        if page is not None:
            where = folder.read_json("env.json")
            folder.write_json("study.json", {**result, "environment": where})
            write_atomic(path / "study.html", page(where, (path / "config.yaml").read_text()))
            # Last, since it makes the study finished.
            seconds = time.perf_counter() - started
            session.finish({"status": "finished", "seconds_last_call": seconds})
    return path, result
