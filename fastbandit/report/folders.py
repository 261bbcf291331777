"""Folders of retraining runs and evaluations, read for the report, and how runs belong together.

Nothing in a file is trusted: a value of another kind than expected is left out, and where the
page would show less than the file holds, or files disagree, a note says so.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from fastbandit._files import MEGABYTE, FileError, plain_file, read_sealed
from fastbandit._identity import ROUNDING, Fingerprint
from fastbandit._intervals import wilson
from fastbandit.report.html import finite, get
from fastbandit.report.reading import (
    Folder,
    Line,
    ReportError,
    Run,
    check_config,
    parse,
    read_config,
    read_lines,
    read_optional,
    read_run,
    without_folder,
)
from fastbandit.threat import parse_fraction

__all__ = [
    "Attack",
    "Collection",
    "Epoch",
    "Evaluation",
    "Examples",
    "Model",
    "Result",
    "Retraining",
    "Share",
    "collect",
    "make_share",
    "radius_of",
    "read_folder",
]

EVALUATION, EXAMPLES = "evaluation.json", "examples.safetensors"
_LARGEST_EXAMPLES = 128 * MEGABYTE
# Evaluations are looked for so many levels below a retraining run, among so many folders.
_DEEPEST, _MOST_FOLDERS = 8, 10_000


# --- shares of images -----------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """Images classified rightly: the share, of how many, and its 95 % interval.

    ``computed``: the file holds no interval and this one is Wilson's.
    """

    accuracy: float
    n: int | None = None
    correct: int | None = None
    low: float | None = None
    high: float | None = None
    computed: bool = False


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        return None
    return value


def make_share(
    accuracy: Any, n: Any, correct: Any = None, limits: Any = None, *, where: str, notes: list[str]
) -> Share | None:
    """A share as a file states it; None, with a note, where it states none.

    Args:
        where: file and place, for the notes: a share that is no share, or that is not
            ``correct / n``.
    """
    value, n, correct = finite(accuracy), _count(n) or None, _count(correct)
    if value is None and correct is not None and n is not None and correct <= n:
        value = correct / n
    if value is None or not 0 <= value <= 1:
        notes.append(f"{where}: accuracy: expected a number in [0, 1], got {accuracy!r:.60}")
        return None
    if correct is not None and n is not None and abs(correct / n - value) > 5e-4:
        notes.append(
            f"{where}: accuracy: expected correct / n = {correct} / {n} = {correct / n:.6g}, "
            f"got {value:.6g}"
        )
    low = high = None
    if isinstance(limits, Sequence) and not isinstance(limits, str) and len(limits) == 2:
        low, high = finite(limits[0]), finite(limits[1])
    if low is not None and high is not None and 0 <= low <= high <= 1:
        return Share(value, n, correct, low, high)
    if n is None:
        return Share(value, None, correct)
    return Share(value, n, correct, *wilson(value * n, n), computed=True)


def _share(value: Any, where: str, notes: list[str]) -> Share | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        notes.append(f"{where}: expected an object, got {type(value).__name__}")
        return None
    return make_share(
        value.get("accuracy"),
        value.get("n"),
        value.get("correct"),
        value.get("interval"),
        where=where,
        notes=notes,
    )


# --- retraining -----------------------------------------------------------------------------


class Epoch(Line):
    """One epoch of a retraining; what else the line holds is kept in ``model_extra``."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    epoch: int
    loss: float | None = None
    train_accuracy: float | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    learning_rate: float | None = None
    seconds_total: float | None = None
    images_per_second: float | None = None
    peak_memory_mb: float | None = None


@dataclass
class Retraining(Folder):
    """A retraining run, finished or not."""

    split: dict[str, Any] | None = None
    epochs: list[Epoch] = field(default_factory=list)
    digest: str | None = None
    #: Clean and robust accuracy of the summary's parts ``best``, ``last`` and ``test``.
    measured: dict[str, tuple[Share | None, Share | None]] = field(default_factory=dict)

    @property
    def planned(self) -> int | None:
        return _count(self.config.get("epochs"))

    @cached_property
    def model_files(self) -> dict[str, str]:
        """Name of each model file in the folder by its digest, the best first."""
        found: dict[str, str] = {}
        for name in ("model-best.safetensors", "model-last.safetensors"):
            file, digest = self.folder / name, hashlib.sha256()
            if not file.is_file():
                continue
            try:
                with open(file, "rb") as opened:
                    while piece := opened.read(2**20):
                        digest.update(piece)
            except OSError as error:
                self.notes.append(f"{name}: cannot be read: {error.strerror}")
                continue
            found.setdefault(digest.hexdigest()[:16], name)
        return found


def _read_retraining(folder: Path, summary: Mapping[str, Any] | None) -> Retraining:
    config, text, notes = _lenient_config(folder, ("metrics.jsonl", "summary.json"))
    run = Retraining(folder, config, text, notes=notes, label=folder.name)
    run.environment = read_optional(run, "env.json")
    run.split = read_optional(run, "split.json")
    run.summary = dict(summary) if summary is not None else read_optional(run, "summary.json")
    check_config(run)
    for position, value in read_lines(run, "metrics.jsonl"):
        line = parse(run, "metrics.jsonl", position, Epoch, value)
        if line is not None:
            run.epochs.append(line)
    for part in ("best", "last", "test"):
        found = get(run.summary, part)
        if found is None:
            continue
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            run.notes.append(f"summary.json: {part}: expected an object, got {kind}")
            continue
        shares = [
            None
            if found.get(f"{kind}_accuracy") is None
            else make_share(
                found[f"{kind}_accuracy"],
                found.get("n"),
                where=f"summary.json: {part}.{kind}_accuracy",
                notes=run.notes,
            )
            for kind in ("clean", "robust")
        ]
        run.measured[part] = (shares[0], shares[1])
    run.digest = _digest(run)
    return run


def _digest(run: Folder) -> str | None:
    """The genotype's hash: as the summary says, else that of genotype.json."""
    from fastbandit.genotype import Genotype

    stated = get(run.summary, "genotype_hash") or get(run.summary, "model", "genotype_hash")
    if isinstance(stated, str) and stated:
        return stated
    file = run.folder / "genotype.json"
    try:
        if not plain_file(file).is_file():
            return None
        return Genotype.load(file).hash
    except (ValueError, OSError) as error:
        run.notes.append(without_folder(str(error), run.folder))
        return None


# --- evaluation -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Attack:
    """One attack of one threat.

    ``attacked``: images that it was run on; ``fooled``: how many of them it changed the class of.
    """

    name: str
    describe: str
    share: Share
    attacked: int | None = None
    fooled: int | None = None
    unconfirmed: int | None = None
    seconds: float | None = None
    forward: int | None = None
    backward: int | None = None


@dataclass(frozen=True)
class Result:
    """One threat: clean accuracy, each attack, the worst case over all of them."""

    threat: dict[str, Any]
    clean: Share | None
    attacks: list[Attack]
    worst: Share | None
    provenance: str | None
    #: Every attack was run on all images that are classified rightly, not only on those that
    #: stood after the attacks before it.
    every: bool = False

    @property
    def norm(self) -> str:
        return str(self.threat.get("norm") or "linf")

    @property
    def epsilon(self) -> str:
        found = self.threat.get("epsilon")
        return "not recorded" if found is None else str(found)

    @property
    def radius(self) -> float | None:
        """Epsilon as a number."""
        return radius_of(self.threat)


def radius_of(threat: Mapping[str, Any]) -> float | None:
    """Epsilon of a threat as a number; None where it is none."""
    value = finite(threat.get("epsilon_value"))
    if value is None:
        try:
            value = float(parse_fraction(str(threat.get("epsilon")), "epsilon"))
        except ValueError:
            return None
    return value if value >= 0 else None


@dataclass(frozen=True)
class Examples:
    """Images before and after the attack, uint8 [m, C, H, W], with labels and predictions [m]."""

    clean: np.ndarray[Any, Any]
    adversarial: np.ndarray[Any, Any]
    #: Adversarial less clean, in units of the full range, not rounded to 8 bits.
    difference: np.ndarray[Any, Any]
    label: list[int]
    before: list[int]
    after: list[int]
    identity: list[int]


@dataclass
class Evaluation(Folder):
    """An evaluation; ``summary`` is what evaluation.json holds."""

    results: list[Result] = field(default_factory=list)
    digest: str | None = None
    examples: Examples | None = None

    @property
    def model(self) -> Any:
        """What the files say of the model; the configuration alone where it is not finished."""
        return get(self.summary, "model") or get(self.config, "model")

    @property
    def weights(self) -> str | None:
        """Digest of the model: of its file, or of the class and tensors of one from Python."""
        found = get(self.model, "digest")
        return found if isinstance(found, str) and found else None

    @cached_property
    def fingerprint(self) -> Fingerprint | None:
        return Fingerprint.read(get(self.summary, "model", "fingerprint"))

    @property
    def data(self) -> tuple[Any, ...]:
        """Which images were attacked: digest of the set, or its name, and part."""
        name = get(self.summary, "data", "digest") or get(self.summary, "data", "name")
        return str(name), str(get(self.summary, "data", "split"))

    @property
    def suspicious(self) -> bool:
        return get(self.summary, "suspicion", "verdict") == "suspicious"


def _read_result(value: Any, where: str, notes: list[str]) -> Result | None:
    if not isinstance(value, Mapping):
        notes.append(f"{where}: expected an object, got {type(value).__name__}")
        return None
    threat = value.get("threat")
    if not isinstance(threat, Mapping):
        notes.append(f"{where}.threat: expected an object, got {type(threat).__name__}")
        return None
    attacks = []
    listed = value.get("attacks")
    if not isinstance(listed, list):
        notes.append(f"{where}.attacks: expected a list, got {type(listed).__name__}")
        listed = []
    for position, entry in enumerate(listed):
        place = f"{where}.attacks[{position}]"
        share = _share(entry, place, notes)
        if share is None:
            if entry is None:
                notes.append(f"{place}: expected an object, got NoneType")
            continue
        attacks.append(
            Attack(
                name=str(entry.get("name") or f"attack {position + 1}"),
                describe=str(entry.get("describe") or ""),
                share=share,
                attacked=_count(entry.get("attacked")),
                fooled=_count(entry.get("fooled")),
                unconfirmed=_count(entry.get("unconfirmed")),
                seconds=finite(entry.get("seconds")),
                forward=_count(entry.get("forward_passes")),
                backward=_count(entry.get("backward_passes")),
            )
        )
    clean = _share(value.get("clean"), f"{where}.clean", notes)
    worst = _share(value.get("worst_case"), f"{where}.worst_case", notes)
    if worst is not None:
        for attack in attacks:
            if worst.accuracy > attack.share.accuracy + 1e-9:
                notes.append(
                    f"{where}: the worst case, {worst.accuracy:.6g}, is above the accuracy under "
                    f"{attack.name}, {attack.share.accuracy:.6g}; it can be no larger"
                )
    line = value.get("provenance")
    every = value.get("attacked_images") == "all"
    provenance = None if line is None else str(line)
    return Result(dict(threat), clean, attacks, worst, provenance, every)


def _read_evaluation(folder: Path, summary: Mapping[str, Any] | None) -> Evaluation:
    config, text, notes = _lenient_config(folder, (EVALUATION,))
    run = Evaluation(folder, config, text, notes=notes, label=folder.name)
    run.environment = read_optional(run, "env.json")
    run.summary = dict(summary) if summary is not None else read_optional(run, EVALUATION)
    check_config(run)
    listed = get(run.summary, "results")
    if isinstance(listed, list):
        for position, value in enumerate(listed):
            result = _read_result(value, f"{EVALUATION}: results[{position}]", run.notes)
            if result is not None:
                run.results.append(result)
    elif run.summary is not None:
        kind = type(listed).__name__
        run.notes.append(f"{EVALUATION}: results: expected a list, got {kind}")
    run.digest = _digest(run)
    run.examples = _read_examples(run)
    return run


def _read_examples(run: Evaluation) -> Examples | None:
    file = run.folder / EXAMPLES
    if not os.path.lexists(file):
        return None
    from fastbandit.runs.tensors import CheckpointError, load_tensors

    try:
        tensors, _ = load_tensors(plain_file(file), "examples", _LARGEST_EXAMPLES)
        clean, adversarial = tensors["clean"], tensors["adversarial"]
        if clean.ndim != 4 or clean.shape != adversarial.shape or 0 in clean.shape[1:]:
            raise ValueError(
                "clean and adversarial: expected two of one shape [m, C, H, W], got "
                f"{list(clean.shape)} and {list(adversarial.shape)}"
            )
        images = []
        for name, tensor in (("clean", clean), ("adversarial", adversarial)):
            if str(tensor.dtype) == "torch.uint8":
                images.append(tensor.double().numpy() / 255)
                continue
            pixels = tensor.double().numpy()
            if not (np.isfinite(pixels).all() and pixels.min(initial=0.0) >= -1e-6):
                raise ValueError(f"{name}: expected values in [0, 1] or uint8")
            if pixels.max(initial=0.0) > 1 + 1e-6:
                raise ValueError(f"{name}: expected values in [0, 1], got {pixels.max():.6g}")
            images.append(pixels)
        columns = []
        for name in ("label", "prediction_clean", "prediction_adversarial", "id"):
            if name == "id" and name not in tensors:
                columns.append(list(range(len(clean))))
                continue
            values = tensors[name]
            if values.shape != clean.shape[:1]:
                raise ValueError(
                    f"{name}: expected shape {list(clean.shape[:1])}, got {list(values.shape)}"
                )
            columns.append([int(value) for value in values.tolist()])
    except KeyError as error:
        run.notes.append(f"{EXAMPLES}: expected a tensor {error}, there is none")
        return None
    except (CheckpointError, ValueError, OSError) as error:
        message = without_folder(str(error), run.folder)
        run.notes.append(message if message.startswith(EXAMPLES) else f"{EXAMPLES}: {message}")
        return None
    eight = [np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8) for image in images]
    return Examples(eight[0], eight[1], images[1] - images[0], *columns)


# --- any folder -----------------------------------------------------------------------------


def _lenient_config(folder: Path, others: Sequence[str]) -> tuple[dict[str, Any], str, list[str]]:
    """A configuration; empty with a note where it cannot be read but the run's results can."""
    try:
        return (*read_config(folder), [])
    except ReportError as error:
        if not any((folder / name).is_file() for name in others):
            raise
        message = without_folder(str(error), folder)
        return {}, "", [message.replace(f"{folder}: not a run folder", "config.yaml: missing")]


def _command(folder: Path) -> str:
    """Which command wrote a folder, from its files; ``search`` where they do not say."""
    if (folder / EVALUATION).is_file():
        return "evaluate"
    for name in ("summary.json", "env.json"):
        try:
            found = get(read_sealed(plain_file(folder / name)), "command")
        except FileError:
            continue
        if found in ("search", "retrain", "evaluate"):
            return str(found)
    if (folder / "bandit.jsonl").is_file():
        return "search"
    if any(folder.glob("model-*.safetensors")):
        return "retrain"
    return "search"


def read_folder(folder: Path, summary: Mapping[str, Any] | None = None) -> Folder:
    """A run of any command, finished or not.

    Args:
        summary: what the file that the command writes last is going to hold.

    Raises:
        ReportError: ``folder`` is not a run.
    """
    if folder.is_dir():
        command = get(summary, "command") or _command(folder)
        if command == "evaluate":
            return _read_evaluation(folder, summary)
        if command == "retrain":
            return _read_retraining(folder, summary)
    return read_run(folder, summary)


def _evaluations_below(folder: Path) -> Iterator[Path]:
    """Folders of evaluations inside that of a retraining run, by name. Links are not followed."""
    below = [folder]
    found: list[Path] = []
    for _ in range(_DEEPEST):
        below = [
            Path(entry.path)
            for parent in below
            for entry in _entries(parent)
            if entry.is_dir(follow_symlinks=False)
        ][: _MOST_FOLDERS - len(found)]
        found += below
    for path in sorted(found):
        named = any((path / name).is_file() for name in (EVALUATION, "env.json"))
        if named and _command(path) == "evaluate":
            yield path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


@dataclass
class Model:
    """What one network's results come from: those that exist of the three steps.

    ``searches`` found its genotype. A retraining made its weights, and ``evaluations`` are of
    these weights.
    """

    retraining: Retraining | None = None
    searches: list[Run] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    digest: str | None = None

    @property
    def first(self) -> Folder:
        """The run that the model is named after."""
        found = [self.retraining, *self.evaluations, *self.searches]
        return next(run for run in found if run is not None)


@dataclass
class Collection:
    """All runs of one page, and which of them belong together."""

    searches: list[Run] = field(default_factory=list)
    retrainings: list[Retraining] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def runs(self) -> list[Folder]:
        return [*self.searches, *self.retrainings, *self.evaluations]


def collect(folders: Sequence[Path], summary: Mapping[str, Any] | None = None) -> Collection:
    """Read the folders and the evaluations below those of retraining runs, each once.

    Args:
        summary: for the first folder, see :func:`read_folder`.

    Raises:
        ReportError: one of ``folders`` is not a run.
    """
    found = Collection()
    seen: set[Path] = set()

    def add(run: Folder) -> None:
        seen.add(run.folder.resolve())
        kinds: tuple[tuple[type[Folder], list[Any]], ...] = (
            (Run, found.searches),
            (Retraining, found.retrainings),
            (Evaluation, found.evaluations),
        )
        next(known for kind, known in kinds if isinstance(run, kind)).append(run)

    for position, folder in enumerate(folders):
        if folder.resolve() not in seen:
            add(read_folder(folder, summary if position == 0 else None))
    for retraining in found.retrainings:
        for path in _evaluations_below(retraining.folder):
            if path.resolve() in seen:
                continue
            try:
                add(read_folder(path))
            except ReportError as error:
                retraining.notes.append(without_folder(str(error), retraining.folder))
                seen.add(path.resolve())
    _name(found)
    _match(found)
    return found


def _name(found: Collection) -> None:
    """Keys S1, R1, E1, and labels that tell the folders apart."""
    for letter, runs in (
        ("S", found.searches),
        ("R", found.retrainings),
        ("E", found.evaluations),
    ):
        for number, run in enumerate(runs, 1):
            run.key = f"{letter}{number}"
    for evaluation in found.evaluations:
        for retraining in found.retrainings:
            if _inside(evaluation, retraining):
                inner = evaluation.folder.resolve().relative_to(retraining.folder.resolve())
                evaluation.label = f"{retraining.label}/{inner.as_posix()}"
    taken: dict[str, int] = {}
    for run in found.runs:
        taken[run.label] = taken.get(run.label, 0) + 1
    for run in found.runs:
        if not run.label or taken[run.label] > 1:
            whole = run.folder.resolve()
            run.label = f"{whole.parent.name}/{whole.name}"


def _inside(inner: Folder, outer: Folder) -> bool:
    return outer.folder.resolve() in inner.folder.resolve().parents


def _owner(evaluation: Evaluation, found: Collection) -> Retraining | None:
    """The retraining that an evaluation names: by place, by run id, by genotype alone.

    Of several with one run id or genotype it is that whose folder holds the model. Whether the
    evaluation is of the model that lies there now, :func:`_attach` sees.
    """
    for retraining in found.retrainings:
        if _inside(evaluation, retraining):
            return retraining
    identity = get(evaluation.model, "training", "run_id")
    if identity is not None:
        named = [r for r in found.retrainings if get(r.summary, "run_id") == identity]
    else:
        named = [r for r in found.retrainings if r.digest and r.digest == evaluation.digest]
    if evaluation.weights is not None:
        named = [r for r in named if evaluation.weights in r.model_files] or named
    return named[0] if len(named) == 1 or (named and identity is not None) else None


def _same_model(one: Evaluation, other: Evaluation) -> bool:
    """Whether two evaluations are of one model, as far as their files can tell; else they are not.

    A model from Python is known by its logits too; those of two sets of images cannot be compared.
    """
    if one.weights is None or one.weights != other.weights:
        return False
    if one.data == other.data and one.fingerprint is not None and other.fingerprint is not None:
        return one.fingerprint.distance(other.fingerprint) <= ROUNDING
    return all(get(run.model, "file") is not None for run in (one, other))


def _attach(retraining: Retraining, evaluations: Sequence[Evaluation]) -> list[Evaluation]:
    """Those of a retraining's evaluations that are of the model that stands for it.

    That is its best model where its file is there, and else the one evaluated first. The others
    are of its last model, or of weights that another training replaced since.
    """
    files = retraining.model_files if any(run.weights for run in evaluations) else {}
    best = next(iter(files), None)
    stands: Evaluation | None = None
    mine = set()
    # Where the file is not there: the best model before the last.
    for run in sorted(evaluations, key=lambda run: _checkpoint(run) == "last"):
        if None not in (run.digest, retraining.digest) and run.digest != retraining.digest:
            continue
        if run.weights is not None:
            if files and run.weights not in files:
                run.notes.append(
                    f"{EVALUATION}: its model is none of those in {retraining.label}: it was "
                    "replaced since, or is of another run; its accuracy is not that run's"
                )
            if best not in (None, run.weights) or (
                stands is not None and not _same_model(stands, run)
            ):
                continue
            stands = stands or run
        mine.add(id(run))
    return [run for run in evaluations if id(run) in mine]


def _checkpoint(run: Evaluation) -> Any:
    return get(run.model, "training", "checkpoint")


def _match(found: Collection) -> None:
    models = [Model(retraining=run, digest=run.digest) for run in found.retrainings]
    owned: dict[int, list[Evaluation]] = {}
    for evaluation in found.evaluations:
        owner = _owner(evaluation, found)
        if owner is not None:
            owned.setdefault(id(owner), []).append(evaluation)
            if None not in (evaluation.digest, owner.digest) and evaluation.digest != owner.digest:
                evaluation.notes.append(
                    f"{EVALUATION}: genotype {str(evaluation.digest)[:12]} is not that of the run "
                    f"{owner.label}, {str(owner.digest)[:12]}"
                )
    for model in list(models):
        assert model.retraining is not None
        model.evaluations = _attach(model.retraining, owned.get(id(model.retraining), []))
        if model.digest is None:
            model.digest = next((run.digest for run in model.evaluations if run.digest), None)
    attached = {id(run) for model in models for run in model.evaluations}
    for evaluation in found.evaluations:
        if id(evaluation) in attached:
            continue
        same = next(
            (
                model
                for model in models
                if model.retraining is None and _same_model(model.evaluations[0], evaluation)
            ),
            None,
        )
        if same is None:
            models.append(Model(evaluations=[evaluation], digest=evaluation.digest))
        else:
            same.evaluations.append(evaluation)
    for search in found.searches:
        digest = _digest(search)
        own = [model for model in models if digest is not None and model.digest == digest]
        # Weights shared in two searches are two models, also where both found one genotype.
        own = [model for model in own if model.retraining is not None or model.evaluations]
        own = [model for model in own if model.retraining is not None] or own
        for model in own:
            model.searches.append(search)
        if not own:
            models.append(Model(searches=[search], digest=digest))
    found.models = models
