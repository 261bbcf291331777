"""How a study of any kind begins in its folder, and what it leaves there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from fastbandit._files import write_atomic
from fastbandit.runs.environment import environment
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.session import Session

__all__ = ["begin", "end", "stored"]


def stored(session: Session, kind: str, log: Callable[[str], None]) -> dict[str, Any] | None:
    """The result of a study or comparison (its ``kind``) that is finished; None of another."""
    if session.finished() is None:
        return None
    assert session.folder is not None
    result: dict[str, Any] = session.folder.read_json("study.json")
    result.pop("environment")
    log(
        f"{session.path}: all is done: the {kind} of this configuration is finished, and this is "
        "its stored result; --force runs it again"
    )
    return result


def begin(folder: RunFolder, device: str, **more: Any) -> None:
    """Write where the study runs, unless it goes on."""
    if not (folder.path / "env.json").is_file():
        facts = environment(torch.device(device))
        folder.write_json("env.json", {"command": folder.files.command, **facts, **more})


def end(
    session: Session,
    result: dict[str, Any],
    page: Callable[[dict[str, Any], str], str],
    started: float,
) -> None:
    """Write the result and the page, and last what makes the study finished.

    Args:
        page: makes the page from the environment and the text of ``config.yaml``.
        started: on the clock of :func:`time.perf_counter`.
    """
    folder, path = session.folder, session.path
    assert folder is not None
    facts = folder.read_json("env.json")
    folder.write_json("study.json", {**result, "environment": facts})
    write_atomic(path / "study.html", page(facts, (path / "config.yaml").read_text()))
    session.finish({"status": "finished", "seconds_last_call": time.perf_counter() - started})
