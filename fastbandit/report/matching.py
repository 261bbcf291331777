"""Which runs of a page belong together: one network from its search to its evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastbandit._identity import ROUNDING
from fastbandit.report.evaluation import EVALUATION, Evaluation
from fastbandit.report.html import get
from fastbandit.report.reading import Folder, genotype_digest
from fastbandit.report.retraining import Retraining
from fastbandit.report.search import Run

__all__ = ["Collection", "Model", "match", "name_runs"]


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
        runs = [self.retraining, *self.evaluations, *self.searches]
        return next(run for run in runs if run is not None)


@dataclass
class Collection:
    """All runs of one page, and which of them belong together."""

    searches: list[Run] = field(default_factory=list)
    retrainings: list[Retraining] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    models: list[Model] = field(default_factory=list)

    @property
    def runs(self) -> list[Folder]:
        return [*self.searches, *self.retrainings, *self.evaluations]


def name_runs(collection: Collection) -> None:
    """Keys S1, R1, E1, and labels that tell the folders apart."""
    for letter, runs in (
        ("S", collection.searches),
        ("R", collection.retrainings),
        ("E", collection.evaluations),
    ):
        for number, run in enumerate(runs, 1):
            run.key = f"{letter}{number}"
    for evaluation in collection.evaluations:
        for retraining in collection.retrainings:
            if _inside(evaluation, retraining):
                inner = evaluation.folder.resolve().relative_to(retraining.folder.resolve())
                evaluation.label = f"{retraining.label}/{inner.as_posix()}"
    taken: dict[str, int] = {}
    for run in collection.runs:
        taken[run.label] = taken.get(run.label, 0) + 1
    for run in collection.runs:
        if not run.label or taken[run.label] > 1:
            whole = run.folder.resolve()
            run.label = f"{whole.parent.name}/{whole.name}"


def _inside(inner: Folder, outer: Folder) -> bool:
    return outer.folder.resolve() in inner.folder.resolve().parents


def _owner(evaluation: Evaluation, collection: Collection) -> Retraining | None:
    """The retraining that an evaluation names: by place, by run id, by genotype alone.

    Of several with one run id or genotype it is that whose folder holds the model. Whether the
    evaluation is of the model that lies there now, :func:`_attach` sees.
    """
    for retraining in collection.retrainings:
        if _inside(evaluation, retraining):
            return retraining
    identity = get(evaluation.model, "training", "run_id")
    if identity is not None:
        named = [r for r in collection.retrainings if get(r.summary, "run_id") == identity]
    else:
        named = [r for r in collection.retrainings if r.digest and r.digest == evaluation.digest]
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
    attached = set()
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
        attached.add(id(run))
    return [run for run in evaluations if id(run) in attached]


def _checkpoint(run: Evaluation) -> Any:
    return get(run.model, "training", "checkpoint")


def match(collection: Collection) -> None:
    models = [Model(retraining=run, digest=run.digest) for run in collection.retrainings]
    owned: dict[int, list[Evaluation]] = {}
    for evaluation in collection.evaluations:
        owner = _owner(evaluation, collection)
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
    for evaluation in collection.evaluations:
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
    for search in collection.searches:
        digest = genotype_digest(search)
        own = [model for model in models if digest is not None and model.digest == digest]
        # Weights shared in two searches are two models, also where both found one genotype.
        own = [model for model in own if model.retraining is not None or model.evaluations]
        own = [model for model in own if model.retraining is not None] or own
        for model in own:
            model.searches.append(search)
        if not own:
            models.append(Model(searches=[search], digest=digest))
    collection.models = models
