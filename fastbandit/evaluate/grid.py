"""Attacks over images: which attack has been tried on which image, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit._identity import ROUNDING, Fingerprint
from fastbandit.attacks._model import Oracle
from fastbandit.attacks._reference import FEWEST_CLASSES
from fastbandit.attacks.registry import AttackResult
from fastbandit.config import ConfigError
from fastbandit.data import DataSource
from fastbandit.distributed import Group
from fastbandit.evaluate.config import EvaluateConfig
from fastbandit.evaluate.plans import Plan, clean_plan, on_another, reference_plan
from fastbandit.evaluate.sanity import sanity_plans
from fastbandit.evaluate.signs import has_signs, of_signs, surrogates_plan
from fastbandit.evaluate.subject import Subject, probe_images, take_fingerprint
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.tensors import CheckpointError, RunError
from fastbandit.threat import ThreatModel
from fastbandit.training import is_out_of_memory

# One call of an attack takes so many batches: enough to keep batches full as images fall, few
# enough that little is lost when the process is killed.
_BATCHES = 4
_SECONDS_BETWEEN_CHECKPOINTS = 2.0


# Images that the batch norms of a 1-bit network's parent are estimated from.
_OF_PARENT = 256


class OtherModelError(RunError):
    """An evaluation was begun with a model that answers otherwise."""


# The parts of a grid, by their names in a checkpoint.
_PARTS = {"tried": "attempted", "yes": "succeeded", "denied": "unconfirmed"}


@dataclass
class AttackGrid:
    """Plans that are tried on the same candidates, and a bit for each image and plan.

    attempted, succeeded, unconfirmed: int64 [n], bit p belongs to plan p: asked, answered yes (an
    attack succeeded), and would have but for the float32 model.
    every: ask each plan about every candidate; else only about those that no plan before it has.
    """

    plans: list[Plan]
    every: bool
    attempted: Tensor
    succeeded: Tensor
    unconfirmed: Tensor
    work: list[dict[str, float]]

    @classmethod
    def begin(cls, plans: list[Plan], n: int, *, every: bool) -> AttackGrid:
        if len(plans) > 62:
            raise ConfigError(f"attacks: expected at most 62, got {len(plans)}")
        zeros = torch.zeros(n, dtype=torch.int64)
        work = [{"seconds": 0.0, "forward": 0, "backward": 0} for _ in plans]
        return cls(plans, every, zeros, zeros.clone(), zeros.clone(), work)

    def tried(self, plan: int) -> Tensor:
        """Which images the plan was asked about, bool [n]."""
        return (self.attempted >> plan & 1).bool()

    def success(self, plan: int) -> Tensor:
        """Of which images the plan said yes, bool [n]."""
        return (self.succeeded >> plan & 1).bool()

    def any_success(self) -> Tensor:
        """Of which images any plan said yes, bool [n]."""
        return self.succeeded != 0

    def first(self) -> Tensor:
        """The first plan that said yes, or -1, int64 [n]."""
        first = torch.full_like(self.succeeded, -1)
        for plan in reversed(range(len(self.plans))):
            first[self.success(plan)] = plan
        return first

    def todo(self, plan: int, candidates: Tensor) -> Tensor:
        """Positions of the images that this plan has to be asked about, ascending."""
        remaining = candidates & ~self.tried(plan)
        if not self.every:
            remaining &= (self.succeeded & ~(1 << plan)) == 0
        return remaining.nonzero()[:, 0]


def classes_of(network: nn.Module, image: Tensor, what: str = "model") -> int:
    """The classes that a network answers with, for one image [1, C, H, W]; its first call.

    Args:
        what: what messages call it.

    Raises:
        ConfigError: it fails on the image. Others: see :func:`check_answer`.
    """
    with Oracle(network) as oracle:
        try:
            return oracle.logits(image).shape[1]
        except (RuntimeError, AssertionError, AttributeError, LookupError) as error:
            if is_out_of_memory(error):
                raise
            weights = next((p for p in network.parameters() if p.is_floating_point()), None)
            hint = ""
            if weights is not None and weights.dtype != torch.float32:
                hint = f"; its weights are {weights.dtype}, model.float() makes them float32"
            raise ConfigError(
                f"{what}: it fails on images float32 [N, {', '.join(map(str, image.shape[1:]))}]: "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}{hint}"
            ) from error


class Evaluation:
    """An evaluation in progress: what is known so far, and how it goes to disk and back."""

    def __init__(
        self,
        config: EvaluateConfig,
        subject: Subject,
        source: DataSource,
        device: torch.device,
        folder: RunFolder | None,
        group: Group | None,
        surrogate: tuple[nn.Module, dict[str, Any]] | None,
    ) -> None:
        self.config, self.subject, self.source = config, subject, source
        self.device, self.folder, self.group = device, folder, group
        self.model, self.surrogate = subject.network, surrogate
        images = source.test if config.split == "test" else source.train
        if images is None:
            raise ConfigError(
                f"split: {source.name} has no test images, only one part, which counts as training "
                "images; --split train, or split='train' from Python, evaluates that"
            )
        n = len(images) if config.limit is None else min(config.limit, len(images))
        self.images, self.labels, self.n = images.images[:n], images.labels[:n], n
        self._check_shapes()
        # Of the whole set, so that it does not depend on the limit.
        self.fingerprint = take_fingerprint(self.model, probe_images(images.images, device))
        self.threats = [ThreatModel(norm=config.norm, epsilon=config.epsilon)]
        self.threats += [t for t in config.sweep() if t.epsilon != self.threats[0].epsilon]
        main = self.threats[0]

        def begin(plans: list[Plan], *, every: bool) -> AttackGrid:
            return AttackGrid.begin(plans, n, every=every)

        first = torch.arange(min(n, _OF_PARENT))
        self.grids = {"clean": begin([clean_plan(subject.fast)], every=True)}
        for number, threat in enumerate(self.threats):
            plans = config.plans(threat)
            if surrogates := config.surrogate_names():
                plans = of_signs(plans, surrogates, self.model, self.pixels(first))
            self.grids[f"radius{number}"] = begin(plans, every=config.attack_all)
        checks = []
        if config.checks.images:
            checks = sanity_plans(
                main.ball,
                images.images[0].numel(),
                steps=config.checks.steps,
                queries=config.checks.queries,
            )
            if has_signs(self.model):
                checks.append(surrogates_plan(main.ball, steps=config.checks.steps))
        self.grids["checks"] = begin(checks, every=True)
        transfer = []
        if surrogate is not None:
            network, facts = surrogate
            classes_of(network, self.pixels(torch.arange(1)), "transfer_from")
            transfer = [
                on_another(plan, network, facts["file"] or facts["code"])
                for plan in config.transfer_plans(main)
            ]
        self.grids["transfer"] = begin(transfer, every=True)
        reference = []
        # Why the reference is not asked though it was to be; None where it was not.
        self.reference_left_out: str | None = None
        if config.cross_check != "none":
            classes = self._classes()
            if not main.epsilon:
                self.reference_left_out = "there is no attack at radius 0"
            elif config.cross_check == "auto" and classes < FEWEST_CLASSES:
                self.reference_left_out = (
                    f"its loss needs {FEWEST_CLASSES} classes, the model has {classes}"
                )
            else:
                reference = [reference_plan(main.ball, classes)]
        self.grids["reference"] = begin(reference, every=True)
        self.example_ids = torch.empty(0, dtype=torch.int64)
        self.examples = torch.empty(0, *images.shape)
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._saved = -math.inf

    def _classes(self) -> int:
        return classes_of(self.model, self.pixels(torch.arange(1)))

    def _check_shapes(self) -> None:
        channels = self.subject.facts["architecture"].get("in_channels")
        shape = tuple(self.images.shape[1:])
        if channels is not None and channels != shape[0]:
            raise ConfigError(
                f"data: expected images of {channels} channels for this model, "
                f"got {shape[0]} in {self.source.name}"
            )
        if self.subject.shape is not None and self.subject.shape != shape:
            raise ConfigError(
                f"data: expected images of shape {list(self.subject.shape)}, as the model was "
                f"trained on, got {list(shape)} in {self.source.name}"
                + (
                    f"; --image-size {self.subject.shape[1]} brings them to it"
                    if self.subject.shape[1] == self.subject.shape[2]
                    else ""
                )
            )
        classes = self._classes()
        lowest, highest = (int(bound) for bound in torch.aminmax(self.labels))
        if lowest < 0 or highest >= classes:
            raise ConfigError(
                f"data: expected labels from 0 to below {classes}, the model's outputs, "
                f"got {lowest if lowest < 0 else highest} in {self.source.name}"
            )

    def pixels(self, index: Tensor) -> Tensor:
        """The images at these positions as float32 in [0, 1], on the device."""
        white = torch.tensor(255.0, device=self.device)
        return self.images[index.to(self.images.device)].to(self.device).float() / white

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"example_ids": self.example_ids, "examples": self.examples}
        tensors["fingerprint"] = torch.from_numpy(self.fingerprint.logits)
        for name, grid in self.grids.items():
            for stored, part in _PARTS.items():
                tensors[f"{name}.{stored}"] = getattr(grid, part)
        work = {name: grid.work for name, grid in self.grids.items()}
        return tensors, {"work": work, "seconds": self.seconds}

    def check_result(self, result: dict[str, Any]) -> None:
        """See that a finished evaluation is of this model.

        Raises:
            RunError: its model answers otherwise.
        """
        # Evaluations of older versions hold no fingerprint.
        stored = Fingerprint.read(result.get("model", {}).get("fingerprint"))
        if stored is not None:
            self._check_model(stored)

    def _check_model(self, stored: Fingerprint) -> None:
        apart = self.fingerprint.distance(stored)
        if not apart <= ROUNDING:
            where = "" if self.folder is None else f"{self.folder.path}: "
            hint = (
                "its answers are random, and not by torch's generator, so no evaluation of it can "
                "go on"
                if self.fingerprint.randomised
                else "choose another --out, or pass --force to begin again"
            )
            raise OtherModelError(
                f"{where}begun with a model of the same weights that answers otherwise: expected "
                f"the same logits at {len(self.fingerprint.logits)} fixed images up to "
                f"{ROUNDING:g} of the largest, got a difference of {apart:.2g}; {hint}"
            )

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._check_model(Fingerprint(tensors["fingerprint"].numpy()))
        for name, grid in self.grids.items():
            for stored, part in _PARTS.items():
                value = tensors[f"{name}.{stored}"]
                if value.shape != (self.n,):
                    raise CheckpointError(
                        f"the checkpoint does not fit: expected {self.n} images, "
                        f"got {list(value.shape)}"
                    )
                setattr(grid, part, value)
            grid.work = [dict(entry) for entry in state["work"][name]]
        self.example_ids, self.examples = tensors["example_ids"], tensors["examples"]
        self.seconds = float(state["seconds"])

    def save(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = self._saved = now
        if self.folder is not None:
            self.folder.save_checkpoint(*self.state())

    @property
    def differing(self) -> int:
        """Images for which the fast copy has been found to compute something else."""
        return int((self.grids["clean"].unconfirmed != 0).sum())

    @property
    def fast(self) -> nn.Module | None:
        """The fast copy, where it is known to compute what the network does."""
        return None if self.differing else self.subject.fast

    def candidates(self, name: str) -> Tensor:
        """The images that a grid is about, bool [n]."""
        if name == "clean":
            return torch.ones(self.n, dtype=torch.bool)
        right = ~self.grids["clean"].success(0)
        limit = {
            "checks": self.config.checks.images,
            "reference": self.config.cross_check_limit,
        }.get(name)
        if limit is not None:
            right &= right.cumsum(0) <= limit
        return right

    def run(self, name: str, number: int, show: Callable[[str], None]) -> None:
        """Ask one plan about all images it has to be asked about."""
        grid = self.grids[name]
        plan, work = grid.plans[number], grid.work[number]
        todo = grid.todo(number, self.candidates(name))
        chunks = list(todo.split(self.config.batch_size * _BATCHES))
        rank, size = (0, 1) if self.group is None else (self.group.rank, self.group.size)
        seed = derive_seed(self.config.seed, "attack", plan.key)
        precision = getattr(torch, self.config.precision)
        for low in range(0, len(chunks), size):
            started = time.perf_counter()
            chunk = chunks[low + rank] if low + rank < len(chunks) else todo[:0]
            # The bits of this round, then its passes.
            tally = torch.zeros(3 * self.n + 2, dtype=torch.int64)
            attempted, succeeded, unconfirmed = tally[: 3 * self.n].view(3, self.n)
            attacked: AttackResult | None = None
            if len(chunk):
                fast = self.fast
                oracle = Oracle(
                    self.model if fast is None else fast,
                    batch_size=self.config.batch_size,
                    precision=precision,
                    exact=None if fast is None else self.model,
                )
                x = self.pixels(chunk)
                y = self.labels[chunk.to(self.labels.device)].to(self.device)
                with oracle:
                    attacked = plan.run(oracle, x, y, chunk.to(self.device), seed)
                attempted[chunk] = 1 << number
                succeeded[chunk[attacked.success.cpu()]] = 1 << number
                denied = torch.tensor(sorted(oracle.unconfirmed), dtype=torch.int64)
                unconfirmed[denied] = 1 << number
                tally[-2:] = torch.tensor([oracle.forward_passes, oracle.backward_passes])
            if self.group is not None:
                tally = self.group.sum_(tally.to(self.device)).cpu()
                attempted, succeeded, unconfirmed = tally[: 3 * self.n].view(3, self.n)
            grid.attempted |= attempted
            grid.succeeded |= succeeded
            grid.unconfirmed |= unconfirmed & ~succeeded
            if name == "radius0":
                self.keep_examples(chunk, attacked)
            work["forward"] += int(tally[-2])
            work["backward"] += int(tally[-1])
            work["seconds"] += time.perf_counter() - started
            show(f"{plan.name}: {min(low + size, len(chunks))} of {len(chunks)} parts")
            if time.perf_counter() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self.save()

    def keep_examples(self, chunk: Tensor, attacked: AttackResult | None) -> None:
        """Keep the adversarial images of the lowest ids that fell at the main radius."""
        fallen = self.grids["radius0"].any_success().nonzero()[:, 0]
        ids = fallen[: self.config.examples]
        if torch.equal(ids, self.example_ids):
            return
        kept = torch.zeros(len(ids), *self.examples.shape[1:])
        held = {int(i): position for position, i in enumerate(self.example_ids)}
        fresh = {int(i): position for position, i in enumerate(chunk)} if attacked else {}
        is_main = self.group is None or self.group.rank == 0
        for row, i in enumerate(ids.tolist()):
            if i in held:
                if is_main:
                    kept[row] = self.examples[held[i]]
            elif i in fresh and attacked is not None:
                kept[row] = attacked.adversarial[fresh[i]].float().cpu()
        if self.group is not None:
            kept = self.group.sum_(kept.to(self.device)).cpu()
        self.example_ids, self.examples = ids, kept
