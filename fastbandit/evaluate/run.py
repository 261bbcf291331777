"""One evaluation from beginning to end: its folder, its processes, its progress."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastbandit.attacks._model import with_autograd
from fastbandit.data import DataSource, load_data
from fastbandit.distributed import Group
from fastbandit.evaluate.config import EvaluateConfig
from fastbandit.evaluate.grid import Evaluation, OtherModelError
from fastbandit.evaluate.result import RESULT, finish
from fastbandit.evaluate.subject import Subject, borrowed, fast_copy, load_subject, place, prepare
from fastbandit.model_code import ModelCode
from fastbandit.runs.environment import derive_seed, environment
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.progress import Progress, Update
from fastbandit.runs.session import Session, check_group_device, torch_settings
from fastbandit.runs.tensors import RunError
from fastbandit.training import is_out_of_memory

__all__ = ["FILES", "begun", "evaluate_model", "measure", "memory_enough_for"]


FILES = RunFiles(
    "evaluate",
    result=RESULT,
    files=("summary.json", "examples.safetensors", "images.safetensors"),
)


@contextmanager
def memory_enough_for(config: EvaluateConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory with batches of {config.batch_size} images; start again with "
            f"--batch-size {max(config.batch_size // 2, 1)} (in a new --out, or with --force)"
        ) from error


def _default_path(subject: Subject, config: EvaluateConfig) -> Path | None:
    """Beside the files of the model; None where it has none."""
    beside = subject.file or subject.weights
    if beside is None:
        return None
    return beside.parent / f"evaluation-{config.norm}-{config.epsilon.replace('/', '-')}"


@contextmanager
def begun(
    model: nn.Module | ModelCode | str | Path,
    config: EvaluateConfig,
    source: DataSource | None = None,
    group: Group | None = None,
) -> Iterator[Evaluation]:
    """An evaluation of which nothing is known yet, and torch as it runs in; arguments as of
    :func:`evaluate_model`. It has no folder; its configuration is the resolved one."""
    asked = config.cross_check
    subject, config = prepare(model, config)
    check_group_device(config.device, group)
    device = torch.device(config.device) if group is None else group.device
    with torch_settings(config.threads, bool(config.deterministic)), ExitStack() as stack:
        # float32 is what the model decides in, whatever the caller computes in.
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(borrowed(subject))
        subject.network = place(subject.network, config, device)
        subject.fast = fast_copy(subject.network)
        source = load_data(config, source)
        surrogate = None
        if config.transfer_from is not None:
            other = load_subject(config.transfer_from)
            stack.enter_context(borrowed(other))
            surrogate = (place(other.network, config, device), other.facts)
        evaluation = Evaluation(config, subject, source, device, None, group, surrogate)
        if config.cross_check != asked:
            evaluation.reference_left_out = "the package pyautoattack is not installed (extra eval)"
        yield evaluation


def measure(
    current: Evaluation, progress: Progress, path: Path | None = None, *, resumed: bool = False
) -> dict[str, Any]:
    """Ask all that is not known yet, and return the result; with a folder, write it."""
    total = sum(len(grid.plans) for grid in current.grids.values())
    verb = "goes on" if resumed else "begins"
    where = "" if path is None else f"; folder {path}"
    begins = f"evaluation {verb}: {current.n} images{where}"
    with memory_enough_for(current.config):
        with progress.steps(begins, total, alike=False) as update:
            show = _Show(progress, current, total, update)
            for name, grid in current.grids.items():
                for number, plan in enumerate(grid.plans):
                    show(plan.name)
                    current.run(name, number, show)
                    show.done(name, number)
        return finish(current) if current.group is None or current.group.rank == 0 else {}


@with_autograd
def evaluate_model(
    model: nn.Module | ModelCode | str | Path,
    config: EvaluateConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    progress: Progress | None = None,
    group: Group | None = None,
    source: DataSource | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Evaluate a model to the end, or go on with an evaluation that was interrupted.

    Args:
        model: a model file, the folder of a retraining run, ``module:function`` of code of your
            own (with weights: a :class:`ModelCode`), or any module that returns logits for
            images in [0, 1]. A module is evaluated as a copy where it can be copied, in evaluation
            mode; it is known by its weights and by its logits at 32 fixed images.
        config: the settings; see :class:`EvaluateConfig`.
        out: the folder of the result; None: ``evaluation-<norm>-<epsilon>`` beside the model file
            or the weights; where there is neither, that of an unfinished evaluation of the same
            model and configuration below ``root``, else a new one there.
        force: replace what a finished or a different evaluation left there.
        progress: where progress is shown; None shows none.
        group: the processes that share the work, each of them calling this function; None: this
            one alone. Only the first reads and writes files, and shows progress.
        source: the images; None: those that ``config.data`` names.

    Returns:
        The folder and the result, as it stands in ``evaluation.json``; of a finished evaluation of
        the same model and configuration the stored one, unless ``force`` is given.

    Raises:
        ValueError: settings, data, model or folder cannot be used; the message says why.
        TypeError: the model is none, or its answer is no tensor of floating-point logits.
        OSError: a file could not be written; the evaluation goes on from its last checkpoint.
    """
    with begun(model, config, source, group) as current:
        path = Path(out) if out is not None else _default_path(current.subject, current.config)
        run = partial(_in_folder, current, root=Path(root), force=force, progress=progress)
        try:
            return run(path)
        except OtherModelError:
            # An unfinished evaluation that was found below the root, of a model that is another by
            # its answers alone. Several processes cannot begin anew by themselves.
            if path is not None or group is not None:
                raise
            return run(RunFolder.fresh_path(Path(root), current.config.name))


def _in_folder(
    current: Evaluation,
    path: Path | None,
    *,
    root: Path,
    force: bool,
    progress: Progress | None,
) -> tuple[Path, dict[str, Any]]:
    """Evaluate to the end in the folder ``path``, or where :meth:`Session.open` says for None."""
    subject, config, group = current.subject, current.config, current.group
    # The files of a model that has any are named relative to its folder.
    identity = {"model": subject.identity(path or root), "data_digest": current.source.digest}
    if current.surrogate is not None:
        identity["transfer_digest"] = current.surrogate[1]["digest"]
    session = Session(config, group=group)
    with session.open(
        FILES,
        path,
        root=root,
        name=config.name,
        force=force,
        progress=progress,
        identity=identity,
    ):
        folder = current.folder = session.folder
        if folder is not None and folder.finished:
            current.check_result(folder.result())
        if (done := session.finished()) is not None:
            return session.path, done
        resumed = folder is not None and _resume(current, folder, force)
        if group is not None:
            digest = derive_seed(0, subject.facts["digest"])
            group.check_same("the model", torch.tensor(digest))
            session.share(current)
            digest = derive_seed(0, current.source.digest, current.n)
            group.check_same("the data", torch.tensor(digest))
        measured = measure(current, session.progress, session.path, resumed=resumed)
        result: dict[str, Any] = session.broadcast(measured)
        return session.path, result


def _resume(current: Evaluation, folder: RunFolder, force: bool) -> bool:
    """Go on from the checkpoint, if there is one; begin the folder otherwise."""
    resumed = False
    try:
        resumed = folder.load_checkpoint(current.restore)
    except OtherModelError:
        if not force:
            raise
        folder.forget()
    if not resumed:
        folder.write_json("env.json", {"command": FILES.command, **environment(current.device)})
    return resumed


class _Show:
    """Says how an evaluation goes on: a step is an attack at a radius, or a check.

    Args:
        total: the number of steps.
        update: of :meth:`Progress.steps`.
    """

    def __init__(self, progress: Progress, current: Evaluation, total: int, update: Update) -> None:
        self.progress, self.current = progress, current
        self.total, self.update, self.steps = total, update, 0

    def __call__(self, text: str) -> None:
        self.update(self.steps, text)

    def done(self, name: str, number: int) -> None:
        """One line for each attack that is through."""
        self.steps += 1
        if name == "clean" and self.current.differing:
            self.progress.line(
                f"the copy with frozen batch norms has other logits for {self.current.differing} "
                f"of {self.current.n} images: attacks follow the network itself"
            )
        grid = self.current.grids[name]
        plan = grid.plans[number]
        if name.startswith("radius"):
            right = self.current.candidates(name)
            fell = int((grid.success(number) & right).sum())
            tried = int(grid.tried(number).sum())
            self.progress.line(f"{plan.describe}: {fell} of {tried} fall")
        self.update(self.steps, f"{self.steps} of {self.total} attacks and checks")
