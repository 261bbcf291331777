"""``python -m fastbandit.evaluate MODEL``: how robust a network is, and how sure that is.

Clean accuracy, a list of attacks, and the worst case of all of them image by image, which is the
number; each with its number of images and interval. Checks of the kind that catch gradient masking
stand beside it with a verdict each.

What is known about an image is one bit for each attack, so an evaluation can stop anywhere, go on
with another batch size or number of processes, and give the same result.
"""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import copy
import dataclasses
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import tyro
from torch import Tensor, nn

from fastbandit import _cli, _evaluation, ops, run
from fastbandit._cli import ConfigError
from fastbandit._evaluation import Plan
from fastbandit._identity import ROUNDING, Fingerprint
from fastbandit._intervals import wilson
from fastbandit._progress import Progress, format_seconds
from fastbandit._ranges import out_of_range
from fastbandit._running import (
    check_group_device,
    finished_before,
    resolve_device,
    torch_settings,
)
from fastbandit.attacks._model import Oracle, kind, misclassified, with_autograd
from fastbandit.attacks.registry import ATTACKS, SECTIONS, AttackResult
from fastbandit.data import DataSource, load
from fastbandit.distributed import Group, first_to_speak, launched
from fastbandit.models import Model, find_model, load_model
from fastbandit.nn.frozen import FrozenBatchNorm, freeze
from fastbandit.run import RunError, RunFolder, derive_seed
from fastbandit.threat import ThreatModel, format_fraction, parse_fraction
from fastbandit.training import is_out_of_memory, synchronise

if TYPE_CHECKING:
    from fastbandit.attacks._apgd import APGDSettings
    from fastbandit.attacks._mifgsm import MIFGSMAttack
    from fastbandit.attacks._pgd import PGDSettings
    from fastbandit.attacks._square import SquareAttack

__all__ = ["PRESETS", "EvaluateConfig", "dry_run", "evaluate_model", "main"]

RESULT = "evaluation.json"
_SCHEMA = 1
# One call of an attack takes so many batches: enough to keep batches full as images fall, few
# enough that little is lost when the process is killed.
_BATCHES = 4
_SECONDS_BETWEEN_CHECKPOINTS = 2.0


@dataclass(frozen=True)
class ChecksConfig:
    """The suspicion checks, on a sample of the images that are classified correctly."""

    images: int = 128
    """how many; 0 for no checks"""
    steps: int = 50
    """of the longest attack"""
    queries: int = 200
    """of the black-box attack"""


@dataclass(frozen=True)
class _General:
    """The settings that are no attack's."""

    name: str = "evaluation"
    """part of the folder's name where the model comes from Python"""
    data: str = "digits"
    """'digits' (embedded) or a path: IDX, CIFAR-10 or image folder, .npz file, parquet"""
    split: Literal["test", "train"] = "test"
    """which images of the data"""
    limit: int | None = None
    """only the first so many images"""
    norm: Literal["linf", "l2"] = "linf"
    """the norm of the perturbation"""
    epsilon: str = "auto"
    """radius, for images in [0, 1]; write 8/255 as 8/255; auto: the model's training radius"""
    epsilons: str = ""
    """further radii for a sweep, with commas: 0,2/255,8/255"""
    attacks: Annotated[
        str, tyro.conf.arg(help=f"attacks in this order, with commas, of {', '.join(ATTACKS)}")
    ] = "fgsm,mifgsm,pgd-7,pgd-20,pgd-40,pgd-100,apgd-ce,apgd-t,square"
    attack_all: bool = False
    """attack every image with every attack, for a table as in papers; the worst case is the same
    kind of number, at a multiple of the time"""
    seed: int = 0
    """decides everything random, together with the image's position in the data"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    threads: int = 0
    """CPU threads, 0: as torch chooses"""
    deterministic: bool | None = None
    """deterministic algorithms only; default: yes on a CPU, no on a GPU"""
    batch_size: int = 256
    """images in one call of the model"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """what attacks compute in; whatever they find is asked of the float32 model before it counts"""
    channels_last: bool = True
    """lay the network out channels-last, which is faster"""
    cross_check: Literal["none", "autoattack"] = "none"
    """run the reference AutoAttack (extra eval) on the same images and compare image by image"""
    cross_check_limit: int | None = None
    """only on the first so many correctly classified images"""
    transfer_from: str | None = None
    """a second model whose adversarial images are tried on this one"""
    transfer_attacks: str = "mifgsm,pgd-20"
    """attacks on that second model"""
    examples: int = 32
    """adversarial images to keep"""


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class _WithAttacks(_General):
        pgd: PGDSettings = field(default_factory=PGDSettings)
        mifgsm: MIFGSMAttack = field(default_factory=MIFGSMAttack)
        apgd: APGDSettings = field(default_factory=APGDSettings)
        square: SquareAttack = field(default_factory=SquareAttack)
else:
    # One field for each group of settings in the registry; above is what a type checker knows.
    _WithAttacks = dataclasses.make_dataclass(
        "_WithAttacks",
        [(name, kind, field(default_factory=kind)) for name, kind in SECTIONS.items()],
        bases=(_General,),
        frozen=True,
    )


@dataclass(frozen=True)
class EvaluateConfig(_WithAttacks):
    """Everything that decides the result of an evaluation, beside the model."""

    checks: ChecksConfig = field(default_factory=ChecksConfig)

    def __post_init__(self) -> None:
        _cli.keep_plain_numbers(self)
        whole = (
            ("limit", self.limit, 1),
            ("threads", self.threads, 0),
            ("batch_size", self.batch_size, 1),
            ("cross_check_limit", self.cross_check_limit, 1),
            ("examples", self.examples, 0),
            ("checks.images", self.checks.images, 0),
            ("checks.steps", self.checks.steps, 10),
            ("checks.queries", self.checks.queries, 1),
        )
        for name, value, least in whole:
            if value is not None and value < least:
                raise ConfigError(f"{name}: expected {least} or more, got {value!r}")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed: expected a whole number in [0, 2^63), got {self.seed}")
        for section, settings in self.attack_settings().items():
            for name, allowed, value in out_of_range(settings):
                raise ConfigError(f"{section}.{name}: expected {allowed.expected}, got {value!r}")
        radius = "0.1" if self.epsilon == "auto" else self.epsilon
        threat = ThreatModel(norm=self.norm, epsilon=radius)
        # The names are checked at radius 0 too, where no attack runs.
        threat = threat if threat.epsilon else dataclasses.replace(threat, epsilon="0.1")
        for setting in ("attacks", "transfer_attacks"):
            self._plans(setting, threat)
        self.sweep()

    def sweep(self) -> list[ThreatModel]:
        """The further radii, ascending, each once."""
        texts = self.epsilons.split(",") if self.epsilons.strip() else []
        values = sorted({parse_fraction(text, "epsilons") for text in texts})
        return [ThreatModel(norm=self.norm, epsilon=value) for value in values]

    def attack_settings(self) -> dict[str, Any]:
        """The attacks' settings by section."""
        return {section: getattr(self, section) for section in SECTIONS}

    def _plans(self, setting: str, threat: ThreatModel) -> list[Plan]:
        names = getattr(self, setting)
        return _evaluation.attack_plans(names, threat.ball, self.attack_settings(), setting=setting)

    def plans(self, threat: ThreatModel) -> list[Plan]:
        """The attacks at one radius; none at radius 0."""
        return self._plans("attacks", threat) if threat.epsilon else []

    def transfer_plans(self, threat: ThreatModel) -> list[Plan]:
        """The attacks whose images are made on the second model."""
        if not threat.epsilon or self.transfer_from is None:
            return []
        return self._plans("transfer_attacks", threat)

    def resolve(self, training: dict[str, Any] | None = None) -> EvaluateConfig:
        """The same configuration with every ``auto`` replaced by what it means here.

        Args:
            training: what the model file says about its training.

        Raises:
            ConfigError: no such device, or no radius is known.
        """
        device, deterministic = resolve_device(self.device, self.deterministic)
        epsilon = self.epsilon
        if epsilon == "auto":
            threat = (training or {}).get("threat")
            if not isinstance(threat, dict) or threat.get("norm") != self.norm:
                raise ConfigError(
                    f"epsilon: expected a radius such as 8/255, since the model does not say that "
                    f"it was trained for one in the norm {self.norm}; give --epsilon"
                )
            epsilon = str(threat["epsilon"])
        epsilon = format_fraction(parse_fraction(epsilon, "epsilon"))
        return dataclasses.replace(
            self, device=device, epsilon=epsilon, deterministic=deterministic
        )


# Radii and steps are the ones that the field reports on these data.
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "limit": 200,
        "attacks": "fgsm,pgd-20,apgd-ce",
        "apgd": {"steps": 20},
        "checks": {"images": 64, "steps": 20, "queries": 100},
    },
    "standard": {
        "attacks": "apgd-ce,apgd-t,square",
        "checks": {"images": 256, "steps": 100, "queries": 500},
    },
    "digits": {"data": "digits", "epsilon": "0.2", "pgd": {"step_size": "0.02"}},
    "mnist": {
        "data": "mnist",
        "epsilon": "0.3",
        "batch_size": 512,
        "pgd": {"step_size": "0.01"},
    },
    "cifar10": {
        "data": "cifar10",
        "epsilon": "8/255",
        "batch_size": 512,
        "pgd": {"step_size": "2/255"},
    },
}


@dataclass(frozen=True)
class Options(_cli.CommonOptions):
    """What to do with the configuration; none of it changes a result."""

    model: tyro.conf.Positional[str | None] = None
    """a model file, or the folder of a retraining run"""
    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: quick (seconds), standard, digits, mnist, cifar10"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of the result; default: evaluation-<norm>-<epsilon> beside the model"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the evaluation in this folder, with the model and configuration stored there"""
    force: bool = False
    """replace a finished evaluation, or one of another configuration, in the folder"""
    peer_timeout: float = 600.0
    """seconds to wait for another process before it counts as gone"""
    dry_run: bool = False
    """measure the model on a few batches, print the most that the evaluation can take, and stop"""


@dataclass(frozen=True)
class _Command:
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    config: Annotated[EvaluateConfig, tyro.conf.arg(name="")] = field(
        default_factory=EvaluateConfig
    )


class _Folder(RunFolder):
    """The folder of an evaluation: finished when its result, written last, is there."""

    RESULT = RESULT
    FILES = (*RunFolder.FILES, "summary.json", "examples.safetensors", "images.safetensors")

    def forget(self) -> None:
        """Remove what is known so far; the configuration stays."""
        for name in ("latest", "previous"):
            (self.path / "checkpoints" / f"{name}.safetensors").unlink(missing_ok=True)


class _OtherModelError(RunError):
    """An evaluation was begun with a model that answers otherwise."""


# --- the model ------------------------------------------------------------------------------


@dataclass
class _Subject:
    """The model to evaluate and what is known about it."""

    network: nn.Module
    # A faster one that computes nearly the same; ``network`` decides what counts.
    fast: nn.Module | None
    facts: dict[str, Any]
    training: dict[str, Any]
    shape: tuple[int, ...] | None
    classes: int | None
    file: Path | None

    def identity(self, folder: Path) -> dict[str, Any]:
        """What the folder remembers of the model, so that no other goes on in its place.

        The file's name is relative to the folder: both may be moved together. What the weights do
        not say, the fingerprint in the checkpoint does.
        """
        file = None if self.file is None else Path(os.path.relpath(self.file, folder)).as_posix()
        return {"file": file, "digest": self.facts["digest"]}


def _file_digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def _module_digest(model: nn.Module) -> str:
    """16 hexadecimal digits for the class, the parameters and all buffers of a module."""
    tensors: dict[str, Any] = dict(model.state_dict())
    tensors |= dict(model.named_parameters(remove_duplicate=False))
    # Those that the state dict leaves out, too: a mean to subtract is often such a buffer.
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in sorted(tensors.items()):
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _subject(model: nn.Module | str | Path) -> _Subject:
    if not isinstance(model, nn.Module):
        file = find_model(model)
        digest = _file_digest(file)
        loaded: Model = load_model(file)
        if _file_digest(file) != digest:
            # A retraining in progress replaces its best model.
            raise RunError(f"{file}: another model was written there while it was read")
        architecture = dataclasses.asdict(loaded.architecture)
        facts = {
            "file": str(file),
            "digest": digest,
            "genotype_hash": loaded.genotype.hash,
            "parameters": sum(p.numel() for p in loaded.network.parameters()),
            "architecture": architecture,
            "training": loaded.training,
        }
        shape = loaded.data.get("shape")
        return _Subject(
            loaded.network,
            None,
            facts,
            loaded.training,
            tuple(shape) if isinstance(shape, (list, tuple)) else None,
            loaded.architecture.classes,
            file,
        )
    facts = {
        "file": None,
        "digest": _module_digest(model),
        "genotype_hash": None,
        "parameters": sum(p.numel() for p in model.parameters()),
        "architecture": {"class": type(model).__qualname__},
        "training": {},
    }
    return _Subject(model, None, facts, {}, None, None, None)


def _probes(images: Tensor, device: torch.device) -> Tensor:
    """32 images to know a model by, float32 [32, C, H, W] in [0, 1], the same on every device.

    16 spread over ``images`` (uint8), 8 of these moved by noise, which tells apart what is the same
    at 8 bits, and 8 of noise alone.
    """
    spread = torch.linspace(0, len(images) - 1, 16).long()
    white = torch.tensor(255.0, device=device)
    clean = images[spread.to(images.device)].to(device).float() / white
    moved = clean[::2] + ops.random_start(clean[::2], epsilon=0.1, seed=1, lower=0.0, upper=1.0)
    grey = torch.full_like(moved, 0.5)
    noise = grey + ops.random_start(grey, epsilon=0.5, seed=2)
    return torch.cat([clean, moved, noise]).clamp_(0, 1)


def _fingerprint(network: nn.Module, probes: Tensor) -> Fingerprint:
    """What ``network`` says to ``probes``; torch's random numbers are the same each time."""
    device = probes.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), Oracle(network, batch_size=16) as oracle:
        # Not torch.manual_seed, which would also seed devices that are not put back.
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index].manual_seed(0)
        first, second = (oracle.logits(probes, exact=True).float().cpu().numpy() for _ in range(2))
    return Fingerprint.of(first, second)


def _place(network: nn.Module, config: EvaluateConfig, device: torch.device) -> nn.Module:
    """The network on the device in the asked layout; one from a file may be changed in place."""
    network = network.to(device)
    if config.channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in evaluation mode within the context, and back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _fast_copy(network: nn.Module) -> nn.Module | None:
    """A copy with frozen batch norms; None where it would be no faster, or none can be made."""
    try:
        copied = freeze(copy.deepcopy(network))
    except (RuntimeError, TypeError):
        return None
    return copied if any(type(m) is FrozenBatchNorm for m in copied.modules()) else None


# --- the evaluation -------------------------------------------------------------------------


@dataclass
class _Campaign:
    """Plans that are tried on the same candidates, and a bit for each image and plan.

    tried, yes, denied: int64 [n], bit p belongs to plan p: asked, answered yes (an attack
    succeeded), and would have but for the float32 model.
    every: ask each plan about every candidate; else only about those that no plan before it has.
    """

    plans: list[Plan]
    every: bool
    tried: Tensor
    yes: Tensor
    denied: Tensor
    work: list[dict[str, float]]

    @classmethod
    def begin(cls, plans: list[Plan], n: int, *, every: bool) -> _Campaign:
        if len(plans) > 62:
            raise ConfigError(f"attacks: expected at most 62, got {len(plans)}")
        zeros = torch.zeros(n, dtype=torch.int64)
        work = [{"seconds": 0.0, "forward": 0, "backward": 0} for _ in plans]
        return cls(plans, every, zeros, zeros.clone(), zeros.clone(), work)

    def bit(self, plan: int) -> Tensor:
        return (self.yes >> plan & 1).bool()

    def first(self) -> Tensor:
        """The first plan that said yes, or -1, int64 [n]."""
        found = torch.full_like(self.yes, -1)
        for plan in reversed(range(len(self.plans))):
            found[self.bit(plan)] = plan
        return found

    def todo(self, plan: int, candidates: Tensor) -> Tensor:
        """Positions of the images that this plan has to be asked about, ascending."""
        open_ = candidates & ((self.tried >> plan & 1) == 0)
        if not self.every:
            open_ &= (self.yes & ~(1 << plan)) == 0
        return open_.nonzero()[:, 0]


class _Evaluation:
    """An evaluation in progress: what is known so far, and how it goes to disk and back."""

    def __init__(
        self,
        config: EvaluateConfig,
        subject: _Subject,
        source: DataSource,
        device: torch.device,
        folder: _Folder | None,
        group: Group | None,
        surrogate: tuple[nn.Module, dict[str, Any]] | None,
    ) -> None:
        self.config, self.subject, self.source = config, subject, source
        self.device, self.folder, self.group = device, folder, group
        self.model, self.surrogate = subject.network, surrogate
        images = source.test if config.split == "test" else source.train
        if images is None:
            raise ConfigError(
                f"split: expected train, since {source.name} has no test images; got test"
            )
        n = len(images) if config.limit is None else min(config.limit, len(images))
        self.images, self.labels, self.n = images.images[:n], images.labels[:n], n
        self._check_shapes()
        # Of the whole set, so that it does not depend on the limit.
        self.fingerprint = _fingerprint(self.model, _probes(images.images, device))
        self.threats = [ThreatModel(norm=config.norm, epsilon=config.epsilon)]
        self.threats += [t for t in config.sweep() if t.epsilon != self.threats[0].epsilon]
        main = self.threats[0]

        def begin(plans: list[Plan], *, every: bool) -> _Campaign:
            return _Campaign.begin(plans, n, every=every)

        self.campaigns = {"clean": begin([_clean_plan(subject.fast)], every=True)}
        for number, threat in enumerate(self.threats):
            plans = config.plans(threat)
            self.campaigns[f"radius{number}"] = begin(plans, every=config.attack_all)
        checks = []
        if config.checks.images:
            checks = _evaluation.check_plans(
                main.ball,
                images.images[0].numel(),
                steps=config.checks.steps,
                queries=config.checks.queries,
            )
        self.campaigns["checks"] = begin(checks, every=True)
        transfer = []
        if surrogate is not None:
            network, facts = surrogate
            transfer = [
                _evaluation.on_another(plan, network, facts["file"] or "another model")
                for plan in config.transfer_plans(main)
            ]
        self.campaigns["transfer"] = begin(transfer, every=True)
        reference = []
        if config.cross_check != "none" and main.epsilon:
            reference = [_evaluation.reference_plan(main.ball, self._classes())]
        self.campaigns["reference"] = begin(reference, every=True)
        self.example_ids = torch.empty(0, dtype=torch.int64)
        self.examples = torch.empty(0, *images.shape)
        self.seconds = 0.0
        self._since = time.perf_counter()
        self._saved = -math.inf

    def _classes(self) -> int:
        # The first answer, with the checks of Oracle.
        with Oracle(self.model) as oracle:
            return oracle.logits(self.pixels(torch.arange(1))).shape[1]

    def _check_shapes(self) -> None:
        channels = self.subject.facts["architecture"].get("in_channels")
        found = tuple(self.images.shape[1:])
        if channels is not None and channels != found[0]:
            raise ConfigError(
                f"data: expected images of {channels} channels for this model, "
                f"got {found[0]} in {self.source.name}"
            )
        if self.subject.shape is not None and self.subject.shape != found:
            raise ConfigError(
                f"data: expected images of shape {list(self.subject.shape)}, as the model was "
                f"trained on, got {list(found)} in {self.source.name}"
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

    # State on disk.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"example_ids": self.example_ids, "examples": self.examples}
        tensors["fingerprint"] = torch.from_numpy(self.fingerprint.logits)
        for name, campaign in self.campaigns.items():
            for part in ("tried", "yes", "denied"):
                tensors[f"{name}.{part}"] = getattr(campaign, part)
        work = {name: campaign.work for name, campaign in self.campaigns.items()}
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
            raise _OtherModelError(
                f"{where}begun with a model of the same weights that answers otherwise: expected "
                f"the same logits at {len(self.fingerprint.logits)} fixed images up to "
                f"{ROUNDING:g} of the largest, got a difference of {apart:.2g}; {hint}"
            )

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._check_model(Fingerprint(tensors["fingerprint"].numpy()))
        for name, campaign in self.campaigns.items():
            for part in ("tried", "yes", "denied"):
                value = tensors[f"{name}.{part}"]
                if value.shape != (self.n,):
                    raise run.CheckpointError(
                        f"the checkpoint does not fit: expected {self.n} images, "
                        f"got {list(value.shape)}"
                    )
                setattr(campaign, part, value)
            campaign.work = [dict(entry) for entry in state["work"][name]]
        self.example_ids, self.examples = tensors["example_ids"], tensors["examples"]
        self.seconds = float(state["seconds"])

    def save(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = self._saved = now
        if self.folder is not None:
            self.folder.save_checkpoint(*self.state())

    # Work.

    @property
    def differing(self) -> int:
        """Images for which the fast copy has been found to compute something else."""
        return int((self.campaigns["clean"].denied != 0).sum())

    @property
    def fast(self) -> nn.Module | None:
        """The fast copy, where it is known to compute what the network does."""
        return None if self.differing else self.subject.fast

    def candidates(self, name: str) -> Tensor:
        """The images that a campaign is about, bool [n]."""
        if name == "clean":
            return torch.ones(self.n, dtype=torch.bool)
        right = ~self.campaigns["clean"].bit(0)
        limit = {
            "checks": self.config.checks.images,
            "reference": self.config.cross_check_limit,
        }.get(name)
        if limit is not None:
            right &= right.cumsum(0) <= limit
        return right

    def ask(self, name: str, number: int, show: Callable[[str], None]) -> None:
        """Ask one plan about all images it has to be asked about."""
        campaign = self.campaigns[name]
        plan, work = campaign.plans[number], campaign.work[number]
        todo = campaign.todo(number, self.candidates(name))
        chunks = list(todo.split(self.config.batch_size * _BATCHES))
        rank, size = (0, 1) if self.group is None else (self.group.rank, self.group.size)
        seed = derive_seed(self.config.seed, "attack", plan.key)
        precision = getattr(torch, self.config.precision)
        for low in range(0, len(chunks), size):
            started = time.perf_counter()
            mine = chunks[low + rank] if low + rank < len(chunks) else todo[:0]
            # Tried, yes and denied of this round, then the passes.
            found = torch.zeros(3 * self.n + 2, dtype=torch.int64)
            tried, yes, denied = found[: 3 * self.n].view(3, self.n)
            attacked: AttackResult | None = None
            if len(mine):
                fast = self.fast
                oracle = Oracle(
                    self.model if fast is None else fast,
                    batch_size=self.config.batch_size,
                    precision=precision,
                    exact=None if fast is None else self.model,
                )
                x = self.pixels(mine)
                y = self.labels[mine.to(self.labels.device)].to(self.device)
                with oracle:
                    attacked = plan.run(oracle, x, y, mine.to(self.device), seed)
                hit = attacked.success.cpu()
                tried[mine] = 1 << number
                yes[mine[hit]] = 1 << number
                lost = torch.tensor(sorted(oracle.unconfirmed), dtype=torch.int64)
                denied[lost] = 1 << number
                found[-2:] = torch.tensor([oracle.forward_passes, oracle.backward_passes])
            if self.group is not None:
                found = self.group.sum_(found.to(self.device)).cpu()
                tried, yes, denied = found[: 3 * self.n].view(3, self.n)
            campaign.tried |= tried
            campaign.yes |= yes
            campaign.denied |= denied & ~yes
            if name == "radius0":
                self.keep_examples(mine, attacked)
            work["forward"] += int(found[-2])
            work["backward"] += int(found[-1])
            work["seconds"] += time.perf_counter() - started
            show(f"{plan.name}: {min(low + size, len(chunks))} of {len(chunks)} parts")
            if time.perf_counter() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS:
                self.save()

    def keep_examples(self, mine: Tensor, attacked: AttackResult | None) -> None:
        """Keep the adversarial images of the lowest ids that fell at the main radius."""
        fallen = (self.campaigns["radius0"].yes != 0).nonzero()[:, 0]
        ids = fallen[: self.config.examples]
        if torch.equal(ids, self.example_ids):
            return
        kept = torch.zeros(len(ids), *self.examples.shape[1:])
        held = {int(i): position for position, i in enumerate(self.example_ids)}
        fresh = {int(i): position for position, i in enumerate(mine)} if attacked else {}
        speaks = self.group is None or self.group.rank == 0
        for row, i in enumerate(ids.tolist()):
            if i in held:
                if speaks:
                    kept[row] = self.examples[held[i]]
            elif i in fresh and attacked is not None:
                kept[row] = attacked.adversarial[fresh[i]].float().cpu()
        if self.group is not None:
            kept = self.group.sum_(kept.to(self.device)).cpu()
        self.example_ids, self.examples = ids, kept

    # The result.

    def _share(self, correct: int, n: int) -> dict[str, Any]:
        return {
            "correct": correct,
            "n": n,
            "accuracy": correct / n if n else None,
            "interval": list(wilson(correct, n)) if n else None,
        }

    def result_of(self, number: int) -> dict[str, Any]:
        """The table of one radius."""
        threat, campaign = self.threats[number], self.campaigns[f"radius{number}"]
        right = self.candidates(f"radius{number}")
        clean = int(right.sum())
        attacks = []
        standing = right.clone()
        for plan, work, position in zip(
            campaign.plans, campaign.work, range(len(campaign.plans)), strict=True
        ):
            tried = (campaign.tried >> position & 1).bool()
            fell = campaign.bit(position)
            standing &= ~fell
            correct = clean - int(fell.sum()) if campaign.every else int(standing.sum())
            attacks.append(
                {
                    "name": plan.name,
                    "describe": plan.describe,
                    "settings": plan.settings,
                    "attacked": int(tried.sum()),
                    "fooled": int(fell.sum()),
                    **self._share(correct, self.n),
                    "seconds": work["seconds"],
                    "forward_passes": int(work["forward"]),
                    "backward_passes": int(work["backward"]),
                    "unconfirmed": int((campaign.denied >> position & 1).sum()),
                }
            )
        plain = threat.to_dict()
        keys = ("norm", "epsilon", "epsilon_value", "lower", "upper", "bn_mode")
        return {
            "threat": {key: plain[key] for key in keys},
            "attacked_images": "all" if campaign.every else "standing",
            "clean": self._share(clean, self.n),
            "attacks": attacks,
            "worst_case": self._share(int(standing.sum()), self.n),
            "provenance": self.provenance(threat, campaign),
        }

    def provenance(self, threat: ThreatModel, campaign: _Campaign) -> str:
        """The one line that stands beside a robust accuracy."""
        config = self.config
        norm = "L-infinity" if threat.norm == "linf" else "L2"
        names = ", ".join(plan.name for plan in campaign.plans) or "no attack"
        rule = self.subject.training.get("checkpoint_rule") or self.subject.training.get("rule")
        budgets = [
            f"{plan.name} {plan.budget}"
            for plan in sorted(campaign.plans, key=lambda plan: plan.black_box)
            if plan.budget is not None
        ]
        notes = {
            note
            for attack in ATTACKS.values()
            if (note := attack.note(getattr(config, attack.section, None))) is not None
        }
        precision: str = config.precision
        if precision != "float32":
            precision += ", successes confirmed in float32"
        parts = [
            f"n {self.n} ({config.split} images of {self.source.name})",
            f"seed {config.seed}",
            f"worst case of {names}",
            *budgets,
            *sorted(notes),
            f"norm {norm}",
            f"epsilon {format_fraction(Fraction(threat.epsilon))}",
            f"dtype {precision}",
            "batch norm eval",
            f"checkpoint rule: {rule or 'not recorded'}",
        ]
        return "; ".join(parts)

    def suspicion(self) -> dict[str, Any]:
        config, checks = self.config, self.campaigns["checks"]
        sample = self.candidates("checks")
        found = {
            plan.key: checks.bit(position)[sample] for position, plan in enumerate(checks.plans)
        }
        moved = None
        if self.campaigns["transfer"].plans:
            right = self.candidates("transfer")
            by_transfer = (self.campaigns["transfer"].yes != 0) & right
            main = self.campaigns["radius0"]
            white = torch.zeros_like(right)
            for position, plan in enumerate(main.plans):
                if not plan.black_box:
                    white |= main.bit(position)
            alone, other = int((by_transfer & ~white).sum()), int((white & ~by_transfer).sum())
            moved = (alone, other, int(right.sum()))
        n = int(sample.sum()) if config.checks.images else 0
        unconfirmed = None
        if self.fast is not None or config.precision != "float32":
            right = ~self.campaigns["clean"].bit(0)
            denied = max(
                int((right & (c.denied != 0) & (c.yes == 0)).sum())
                for name, c in self.campaigns.items()
                if name.startswith("radius")
            )
            unconfirmed = (denied, int(right.sum()))
        return _evaluation.verdicts(
            found,
            n,
            norm=config.norm,
            steps=config.checks.steps,
            queries=config.checks.queries,
            transfer=moved,
            unconfirmed=unconfirmed,
            fixed=(self.fingerprint.randomised, len(self.fingerprint.logits)),
        )

    def transfer(self) -> list[dict[str, Any]] | None:
        campaign = self.campaigns["transfer"]
        if self.surrogate is None:
            return None
        clean = int(self.candidates("transfer").sum())
        return [
            {
                "from": self.surrogate[1],
                "threat": {"norm": self.config.norm, "epsilon": self.config.epsilon},
                "counts_in_worst_case": False,
                "attacks": [
                    {
                        "name": plan.name,
                        "describe": plan.describe,
                        "settings": plan.settings,
                        "attacked": int((campaign.tried >> position & 1).sum()),
                        **self._share(clean - int(campaign.bit(position).sum()), self.n),
                        "seconds": campaign.work[position]["seconds"],
                    }
                    for position, plan in enumerate(campaign.plans)
                ],
            }
        ]

    def cross_check(self) -> dict[str, Any] | None:
        campaign = self.campaigns["reference"]
        if not campaign.plans:
            return None
        right = self.candidates("reference")
        n = int(right.sum())
        theirs = campaign.bit(0)[right]
        ours = (self.campaigns["radius0"].yes != 0)[right]
        both = int((ours & theirs).sum())
        only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
        # Over the images that both were tried on, which the model has right.
        counts = {
            "ours": self._share(n - both - only_ours, n),
            "reference": self._share(n - both - only_theirs, n),
        }
        interval = counts["reference"]["interval"]
        within = interval is None or counts["ours"]["accuracy"] <= interval[1]
        return {
            "describe": campaign.plans[0].describe,
            "of": "images that the model classifies correctly",
            "n": n,
            "fooled_by_both": both,
            "fooled_by_ours_alone": only_ours,
            "fooled_by_reference_alone": only_theirs,
            "fooled_by_neither": n - both - only_ours - only_theirs,
            "agreement": (n - only_ours - only_theirs) / n if n else None,
            **counts,
            "verdict": "not weaker than the reference by more than its interval"
            if within
            else "weaker than the reference by more than its interval",
            "seconds": campaign.work[0]["seconds"],
        }

    def robustbench(self, main: dict[str, Any], cross_check: dict[str, Any] | None) -> Any:
        """The fields of RobustBench's model claims; what it asks of a paper is left null."""

        def percent(share: float | None) -> str | None:
            return None if share is None else f"{100 * share:.2f}"

        reference = None
        whole = cross_check is not None and self.config.cross_check_limit is None
        if whole and cross_check is not None:
            reference = cross_check["reference"]["correct"] / self.n
        return {
            "link": None,
            "name": None,
            "authors": None,
            "additional_data": None,
            "number_forward_passes": 1,
            "dataset": self.source.name,
            "venue": None,
            "architecture": self.architecture_name(),
            "eps": main["threat"]["epsilon"],
            "threat_model": "Linf" if self.config.norm == "linf" else "L2",
            "clean_acc": percent(main["clean"]["accuracy"]),
            "reported": percent(main["worst_case"]["accuracy"]),
            # Only the reference's own figure may bear this name.
            "autoattack_acc": percent(reference),
        }

    def architecture_name(self) -> str:
        facts = self.subject.facts
        if facts["genotype_hash"] is None:
            return str(facts["architecture"]["class"])
        built = facts["architecture"]
        return (
            f"fastbandit genotype {facts['genotype_hash'][:12]}, "
            f"{built['cells']} cells, {built['channels']} channels"
        )

    def finish(self) -> dict[str, Any]:
        """Write the files and return the result (None of it on a process that is not the first)."""
        self.save()
        results = [self.result_of(number) for number in range(len(self.threats))]
        cross_check = self.cross_check()
        work = [entry for campaign in self.campaigns.values() for entry in campaign.work]
        names = [(name, plan.name) for name, c in self.campaigns.items() for plan in c.plans]
        environment = run.environment(self.device)
        seconds: dict[str, float] = {}
        for (campaign, _), entry in zip(names, work, strict=True):
            phase = "attacks" if campaign.startswith("radius") else campaign
            seconds[phase] = seconds.get(phase, 0.0) + entry["seconds"]
        result = {
            "schema_version": _SCHEMA,
            "command": "evaluate",
            "status": "finished",
            "model": {**self.subject.facts, "fingerprint": self.fingerprint.to_dict()},
            "data": {
                "name": self.source.name,
                "description": self.source.description,
                "split": self.config.split,
                "n": self.n,
                "digest": self.source.digest,
            },
            "seed": self.config.seed,
            "results": results,
            "suspicion": self.suspicion(),
            "fast_copy": None
            if self.subject.fast is None
            else {"used": self.fast is not None, "differs": self.differing},
            "cross_check": cross_check,
            "transfer": self.transfer(),
            "robustbench": self.robustbench(results[0], cross_check),
            "cost": {
                "seconds_total": self.seconds,
                "seconds": seconds,
                "unit_of_passes": "images",
                "forward_passes": int(sum(entry["forward"] for entry in work)),
                "backward_passes": int(sum(entry["backward"] for entry in work)),
                "peak_memory_mb": run.peak_memory_mb(self.device),
                "device": str(self.device),
                "device_name": environment["device_name"],
                "threads": torch.get_num_threads(),
                "processes": 1 if self.group is None else self.group.size,
            },
            "versions": {
                key: environment[key] for key in ("fastbandit", "torch", "python", "cuda")
            },
        }
        if self.folder is not None:
            self._write_tensors(self.folder)
            self.folder.write_json(RESULT, result)
        return result

    def _write_tensors(self, folder: _Folder) -> None:
        clean = self.campaigns["clean"]
        outcome = {
            "id": torch.arange(self.n),
            "label": self.labels.cpu(),
            "clean_correct": ~clean.bit(0),
        }
        facts: dict[str, Any] = {"attacks": [p.name for p in self.campaigns["radius0"].plans]}
        for number, threat in enumerate(self.threats):
            key = "broken_by" if number == 0 else f"broken_by_{number}"
            outcome[key] = self.campaigns[f"radius{number}"].first()
            facts[key] = format_fraction(Fraction(threat.epsilon))
        run.save_tensors(folder.path / "images.safetensors", outcome, "images", facts)
        ids = self.example_ids
        adversarial = self.examples
        with Oracle(self.model, batch_size=self.config.batch_size) as oracle:
            # -1: the answer is not finite.
            predictions = [
                _prediction(oracle.logits(x, exact=True)).cpu()
                if len(ids)
                else torch.empty(0, dtype=torch.int64)
                for x in (self.pixels(ids), adversarial.to(self.device))
            ]
        run.save_tensors(
            folder.path / "examples.safetensors",
            {
                "clean": self.images[ids.to(self.images.device)].cpu(),
                "adversarial": adversarial,
                "label": self.labels[ids.to(self.labels.device)].cpu(),
                "prediction_clean": predictions[0],
                "prediction_adversarial": predictions[1],
                "id": ids,
            },
            "examples",
            {"norm": self.config.norm, "epsilon": self.config.epsilon},
        )


def _prediction(logits: Tensor) -> Tensor:
    """The predicted class, -1 where the answer is not finite, int64 [N]."""
    return logits.argmax(1).masked_fill(~logits.isfinite().all(1), -1)


def _clean_plan(fast: nn.Module | None) -> Plan:
    """Who is classified wrongly; and whose logits the fast copy has not, as unconfirmed."""

    def wrong(oracle: Oracle, x: Tensor, y: Tensor, ids: Tensor, seed: int) -> AttackResult:
        logits = oracle.logits(x, exact=True)
        finite = logits.isfinite().all(1)
        if not bool(finite.all()):
            raise ConfigError(
                f"model: expected finite logits, got NaN or infinity for image "
                f"{int(ids[~finite][0])}"
            )
        if fast is not None:
            # In float32 whatever the attacks compute in: it is the function that is compared.
            with Oracle(fast, batch_size=oracle.batch_size) as copied:
                same = _evaluation.same_logits(copied.logits(x), logits)
            oracle.forward_passes += copied.forward_passes
            oracle.unconfirmed.update(ids[~same].tolist())
        return AttackResult(x, misclassified(logits, y))

    passes = 1 if fast is None else 2
    return Plan("clean", "clean", "clean (no attack)", wrong, forward=passes)


@contextmanager
def _memory_enough_for(config: EvaluateConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(
            f"out of memory with batches of {config.batch_size} images; start again with "
            f"--batch-size {max(config.batch_size // 2, 1)} (in a new --out, or with --force)"
        ) from error


def _default_path(subject: _Subject, config: EvaluateConfig, root: Path) -> Path:
    if subject.file is None:
        return RunFolder.fresh_path(root, config.name)
    return subject.file.parent / f"evaluation-{config.norm}-{config.epsilon.replace('/', '-')}"


def _prepare(
    model: nn.Module | str | Path, config: EvaluateConfig
) -> tuple[_Subject, EvaluateConfig]:
    """The model, and the configuration with nothing left open."""
    if not isinstance(model, (nn.Module, str, Path)):
        raise TypeError(
            f"model: expected a torch.nn.Module or the path of a model, got {kind(model)}"
        )
    subject = _subject(model)
    config = config.resolve(subject.training)
    if config.transfer_from is not None:
        # As it will be found again, whatever else the folder holds by then.
        config = dataclasses.replace(config, transfer_from=str(find_model(config.transfer_from)))
    return subject, config


@with_autograd
def evaluate_model(
    model: nn.Module | str | Path,
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
        model: a model file, the folder of a retraining run, or any module that returns logits for
            images in [0, 1]. A module is evaluated as a copy where it can be copied, in evaluation
            mode; it is known by its weights and by its logits at 32 fixed images.
        config: the settings; see :class:`EvaluateConfig`.
        out: the folder of the result; None: ``evaluation-<norm>-<epsilon>`` beside the model file,
            or a new folder below ``root`` for a module.
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
    subject, config = _prepare(model, config)
    progress = progress or Progress.silent()
    check_group_device(config.device, group)
    device = torch.device(config.device) if group is None else group.device
    if isinstance(model, nn.Module):
        # Some modules cannot be copied; then the caller's own is moved.
        try:
            subject.network = copy.deepcopy(model)
        except (RuntimeError, TypeError):
            subject.network = model
    with torch_settings(config.threads, bool(config.deterministic)), ExitStack() as stack:
        # float32 is what the model decides in, whatever the caller computes in.
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if isinstance(model, nn.Module):
            # What is attached to a module may call the caller's own modules from within the copy.
            stack.enter_context(_evaluating(model))
        subject.network = _place(subject.network, config, device)
        subject.fast = _fast_copy(subject.network)
        source = load(config.data) if source is None else source
        surrogate = None
        if config.transfer_from is not None:
            other = _subject(config.transfer_from)
            surrogate = (_place(other.network, config, device), other.facts)
        current = _Evaluation(config, subject, source, device, None, group, surrogate)
        first = group is None or group.rank == 0
        path = Path(out) if out is not None else _default_path(subject, config, Path(root))
        resumed = False
        folder: _Folder | None = None
        if first:
            plain = {
                **_cli.to_plain(config),
                "model": subject.identity(path),
                "data_digest": source.digest,
            }
            if current.surrogate is not None:
                plain["transfer_digest"] = current.surrogate[1]["digest"]
            opened = stack.enter_context(_Folder.open(path, plain, force=force))
            assert isinstance(opened, _Folder)
            folder = current.folder = opened
            if folder.finished:
                current.check_result(folder.result())
        if (done := finished_before(folder, group, progress)) is not None:
            return done
        if folder is not None:
            try:
                resumed = folder.load_checkpoint(current.restore)
            except _OtherModelError:
                if not force:
                    raise
                folder.forget()
            if not resumed:
                environment = {"command": "evaluate", **run.environment(device)}
                folder.write_json("env.json", environment)
        else:
            progress = Progress.silent()
        if group is not None:
            digest = derive_seed(0, subject.facts["digest"])
            group.check_same("the model", torch.tensor(digest))
            tensors, state = current.state()
            shared, tensors = group.broadcast({"state": state, "path": str(path)}, tensors)
            if group.rank:
                current.restore(tensors, shared["state"])
            path = Path(shared["path"])
            group.check_same("the data", torch.tensor(derive_seed(0, source.digest, current.n)))
        show = _Show(progress, current, path, resumed)
        with _memory_enough_for(config):
            try:
                for name, campaign in current.campaigns.items():
                    for number in range(len(campaign.plans)):
                        current.ask(name, number, show)
                        show.done(name, number)
            finally:
                show.close()
            result = current.finish() if first else {}
        if group is not None:
            result, _ = group.broadcast(result if first else None, {})
        return path, result


class _Show:
    """Progress: a status line on a terminal, a line every few seconds elsewhere."""

    def __init__(self, progress: Progress, current: _Evaluation, path: Path, resumed: bool) -> None:
        self.console, self.interval = progress.console, progress.interval
        self.current, self.started = current, time.perf_counter()
        self.last = self.started
        self.status: Any = None
        if self.console is None:
            return
        verb = "goes on" if resumed else "begins"
        self._print(f"evaluation {verb}: {current.n} images; folder {path}")
        if self.console.is_terminal:
            spinner = "line" if self.console.options.ascii_only else "dots"
            self.status = self.console.status("clean", spinner=spinner)
            self.status.start()

    def _print(self, text: str) -> None:
        assert self.console is not None
        self.console.print(text, markup=False, soft_wrap=True)

    def __call__(self, text: str) -> None:
        if self.console is None:
            return
        now = time.perf_counter()
        if self.status is not None:
            self.status.update(f"{text}, {format_seconds(now - self.started)}")
        elif now - self.last >= self.interval:
            self.last = now
            self._print(f"{text}, {format_seconds(now - self.started)}")

    def done(self, name: str, number: int) -> None:
        """One line for each attack that is through."""
        if self.console is None:
            return
        if name == "clean" and self.current.differing:
            self._print(
                f"the copy with frozen batch norms has other logits for {self.current.differing} "
                f"of {self.current.n} images: attacks follow the network itself"
            )
        if not name.startswith("radius"):
            return
        campaign = self.current.campaigns[name]
        right = self.current.candidates(name)
        plan = campaign.plans[number]
        fell = int((campaign.bit(number) & right).sum())
        tried = int((campaign.tried >> number & 1).sum())
        self._print(f"{plan.describe}: {fell} of {tried} fall")

    def close(self) -> None:
        if self.status is not None:
            self.status.stop()


@with_autograd
def dry_run(model: nn.Module | str | Path, config: EvaluateConfig) -> dict[str, Any]:
    """The most that the evaluation can take, from a few batches. Writes nothing.

    Returns:
        ``images``; ``seconds_forward`` and ``seconds_backward`` of one image; ``seconds_most``, if
        no image ever fell, and ``seconds_clean``; ``peak_memory_mb``.
    """
    subject, config = _prepare(model, config)
    device = torch.device(config.device)
    with (
        torch_settings(config.threads, bool(config.deterministic)),
        _memory_enough_for(config),
        _evaluating(subject.network),  # a caller's own module comes back in its mode
    ):
        subject.network = _place(subject.network, config, device)
        subject.fast = _fast_copy(subject.network)
        current = _Evaluation(config, subject, load(config.data), device, None, None, None)
        few = torch.arange(min(config.batch_size, current.n))
        x, y = current.pixels(few), current.labels[few].to(device)
        times = {}
        attacked = subject.network if subject.fast is None else subject.fast
        with Oracle(attacked, precision=getattr(torch, config.precision)) as oracle:
            for name, action in (
                ("forward", lambda: oracle.logits(x)),
                ("both", lambda: oracle.gradient(x, _evaluation.cross_entropy, y)),
            ):
                action()
                synchronise(device)
                started = time.perf_counter()
                for _ in range(3):
                    action()
                synchronise(device)
                times[name] = (time.perf_counter() - started) / 3 / len(few)
        backward = max(times["both"] - times["forward"], 0.0)
        most = 0.0
        for name, campaign in current.campaigns.items():
            n = min(config.checks.images, current.n) if name == "checks" else current.n
            most += n * sum(
                plan.forward * times["forward"] + plan.backward * backward
                for plan in campaign.plans
            )
        return {
            "images": current.n,
            "seconds_forward": times["forward"],
            "seconds_backward": backward,
            "seconds_clean": times["forward"]
            * current.n
            * current.campaigns["clean"].plans[0].forward,
            "seconds_most": most,
            "peak_memory_mb": run.peak_memory_mb(device),
            "device": config.device,
            "threads": torch.get_num_threads(),
        }


# --- the command ----------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> _Command:
    """Options and configuration: defaults < preset < file < flags."""
    base = _cli.base_config(EvaluateConfig(), PRESETS, arguments)
    return tyro.cli(
        _Command,
        default=_Command(config=base),
        args=list(arguments),
        prog="python -m fastbandit.evaluate",
        description="Clean and robust accuracy of a trained network: many attacks, the worst case "
        "of each image, and checks of whether to trust it.",
    )


def _percent(share: dict[str, Any]) -> str:
    if share["accuracy"] is None:
        return "no image"
    low, high = share["interval"]
    return (
        f"{100 * share['accuracy']:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]  "
        f"({share['correct']} of {share['n']})"
    )


def _print_result(path: Path, result: dict[str, Any]) -> None:
    for found in result["results"]:
        threat = found["threat"]
        norm = "L-infinity" if threat["norm"] == "linf" else "L2"
        print(f"{norm}, epsilon {threat['epsilon']}")
        print(f"  {'clean':12} {_percent(found['clean'])}")
        for attack in found["attacks"]:
            note = ""
            if attack["unconfirmed"]:
                note = f", {attack['unconfirmed']} not confirmed in float32"
            print(
                f"  {attack['name']:12} {_percent(attack)}  "
                f"{attack['fooled']} of {attack['attacked']} attacked fall, "
                f"{attack['seconds']:.1f} s{note}"
            )
        print(f"  {'worst case':12} {_percent(found['worst_case'])}")
        print(f"  {found['provenance']}")
    for found in result["transfer"] or []:
        for attack in found["attacks"]:
            print(f"transfer     {attack['name']:12} {_percent(attack)}")
    if result["fast_copy"] is not None and not result["fast_copy"]["used"]:
        print(
            "the copy with frozen batch norms computes something else: attacks followed the "
            "network itself"
        )
    check = result["cross_check"]
    if check is not None:
        print(
            f"cross-check  of {check['n']} images both fool {check['fooled_by_both']}, ours alone "
            f"{check['fooled_by_ours_alone']}, the reference alone "
            f"{check['fooled_by_reference_alone']}: {check['verdict']}"
        )
    print(f"suspicion: {result['suspicion']['verdict']}")
    for one in result["suspicion"]["checks"]:
        print(f"  {one['verdict']:10} {one['name']}: {one['detail']}")
    print(f"evaluation: {path / RESULT}")


def _stored(folder: Path) -> tuple[str, EvaluateConfig]:
    """Model file and configuration of the evaluation in ``folder``."""
    plain = _Folder.read_config(folder)
    identity = plain.pop("model", None)
    for key in ("data_digest", "transfer_digest"):
        plain.pop(key, None)
    if not isinstance(identity, dict):
        raise RunError(f"{folder}: expected the folder of an evaluation")
    if identity.get("file") is None:
        raise RunError(
            f"{folder}: its model came from Python; call evaluate_model with it again to go on"
        )
    return os.path.normpath(folder / identity["file"]), _cli.merge(
        EvaluateConfig(), plain, f"{folder}/config.yaml"
    )


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    options, config = command.options, command.config
    model, out = options.model, options.out
    if options.resume is not None:
        folder = Path(options.resume)
        stored_model, stored = _stored(folder)
        if model is not None and not find_model(model).samefile(stored_model):
            raise ConfigError(f"--resume: expected the model {stored_model}, got {model}")
        config = _cli.resumed_config(config, stored, options.resume, out)
        model, out = stored_model, options.resume
    if model is None:
        raise ConfigError("expected a MODEL: a model file or the folder of a retraining run")
    speaks = not launched() or os.environ["RANK"] == "0"
    if options.print_config or options.dry_run:
        if not speaks:
            return 0
        if options.print_config:
            import yaml

            _, resolved = _prepare(model, config)
            print(yaml.safe_dump(_cli.to_plain(resolved), sort_keys=False), end="")
            return 0
        measured = dry_run(model, config)
        if options.json:
            print(json.dumps(measured))
        else:
            print(f"images               {measured['images']}")
            print(f"peak memory          {measured['peak_memory_mb']:.0f} MiB")
            print(f"clean                {measured['seconds_clean']:.1f} s")
            print(
                f"all, at most         {measured['seconds_most'] / 60:.1f} minutes on "
                f"{measured['device']}, {measured['threads']} CPU threads, if no image ever fell"
            )
        return 0
    if not launched():
        path, result = evaluate_model(model, config, out, force=options.force, progress=Progress())
    else:
        _, resolved = _prepare(model, config)
        kind = torch.device(resolved.device).type
        with Group.join(kind, timeout=options.peer_timeout) as group:
            path, result = evaluate_model(
                model, config, out, force=options.force, progress=Progress(), group=group
            )
            if group.rank:
                return 0
    if options.json:
        print(json.dumps({"evaluation": str(path), **result}))
    else:
        _print_result(path, result)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return _cli.guard("evaluate", lambda: _run(given), speaks=first_to_speak)


if __name__ == "__main__":
    raise SystemExit(main())
