"""``python -m fastbandit.retrain``: from a genotype to a robust network, trained from scratch.

The genotype is a file, the folder of a search or the name of a published one. The network is
trained adversarially on one part of the training images; the other part chooses the epoch whose
weights are kept as best, and tells catastrophic overfitting. The test images are looked at once,
at the end.
"""

from __future__ import annotations

if __name__ == "__main__":
    from fastbandit import _start

    _start.begin()  # before torch is loaded

import dataclasses
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from fastbandit import _cli, run
from fastbandit._cli import ConfigError
from fastbandit._files import plain_file
from fastbandit._graphs import Choice, Graphs
from fastbandit._progress import Progress
from fastbandit._running import (
    accounting,
    check_group_device,
    check_same,
    divide,
    finished_before,
    memory_enough_for,
    note_changes,
    pace,
    resolve_device,
    sgd,
    torch_settings,
)
from fastbandit.averaging import WeightAverage
from fastbandit.data import Augment, DataSource, Loader, load
from fastbandit.distributed import Group, Team, first_to_speak, launched, synchronise_batchnorm
from fastbandit.genotype import Genotype, GenotypeError
from fastbandit.models import BEST, LAST, Architecture, multiply_adds, save_model
from fastbandit.nn.network import Network
from fastbandit.objectives import Adversarial, Free, Trades
from fastbandit.overfitting import (
    MOST_STEPS,
    GuardConfig,
    OverfittingGuard,
    Verdict,
    stronger,
)
from fastbandit.run import RunError, RunFolder, derive_seed
from fastbandit.threat import ThreatModel
from fastbandit.training import Cost, Engine, Evaluation, Precision, evaluate, train_epoch

__all__ = ["PRESETS", "RetrainConfig", "dry_run", "main", "retrain"]

# Steps of the training attack where --attack.steps is not given.
_STEPS = {"fgsm": 1, "pgd": 7, "free": 1, "trades": 10, "clean": 0}
# Part of training in which the rate rises, where --warmup is not given: Wong et al. peak at 2/5.
_WARMUP = {"cyclic": 0.4, "cosine": 0.0, "multistep": 0.0}


@dataclass(frozen=True)
class AttackConfig:
    """The adversary that the network is trained against."""

    epsilon: str = "0.2"
    """radius in the L-infinity norm, for images in [0, 1]; write 8/255 as 8/255"""
    steps: int | None = None
    """gradient steps; default 1 for fgsm and free, 7 for pgd, 10 for trades"""
    step_size: str | None = None
    """step along the gradient's sign; default 1.25 epsilon for one step, 2.5 epsilon / steps for
    more, epsilon for free"""
    random_start: bool = True
    """start uniformly in the ball"""
    clip: Literal["image", "none"] = "image"
    """keep x + delta in [0, 1] (image), or not (none)"""
    bn_mode: Literal["auto", "train", "eval"] = "auto"
    """batch norm while attacking in training; auto: eval for trades, train for the rest, as their
    authors do"""


@dataclass(frozen=True)
class SelectionConfig:
    """The attack (PGD, eval mode) on the validation images, by which the best epoch is chosen."""

    steps: int = 10
    """gradient steps"""
    step_size: str | None = None
    """step along the gradient's sign; None: 2.5 epsilon / steps"""
    every: int = 1
    """epochs between two looks; the last epoch is always looked at"""


@dataclass(frozen=True)
class FinalConfig:
    """The attack (PGD, eval mode) on the test images, at the end."""

    steps: int = 20
    """gradient steps"""
    step_size: str | None = "0.02"
    """step along the gradient's sign; None: 2.5 epsilon / steps"""


@dataclass(frozen=True)
class RetrainConfig:
    """Everything that decides the result of a retraining. Its hash is the run's id."""

    genotype: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GENOTYPE|RUN|NAME")] = ""
    """a genotype file, the folder of a search or the name of a published genotype"""
    genotype_hash: str | None = None
    """what the genotype must be; filled in from the file"""
    name: str = "digits"
    """part of the run folder's name"""
    data: str = "digits"
    """'digits' (embedded) or a path: IDX, CIFAR-10 or image folder, .npz file, parquet; default:
    as in the search's run folder, where one is given"""
    seed: int = 0
    """decides everything random: weights, split, order, augmentation, attacks, dropped paths"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    threads: int = 0
    """CPU threads, 0: as torch chooses; exact repetition needs the same number"""
    deterministic: bool | None = None
    """deterministic algorithms only; default: yes on a CPU, no on a GPU"""
    init_channels: int | None = 16
    """C, the channels of the first cell; None: as in the genotype, or 16"""
    layers: int | None = 6
    """V, the cells of the network; None: as in the genotype, or 6"""
    denoise_blocks: bool | None = None
    """hand-placed denoising blocks after three of the cells; default: as in the genotype"""
    method: Literal["fgsm", "pgd", "free", "trades", "clean"] = "fgsm"
    """fgsm: one step from a random start; pgd: several; free: every batch several times, the
    perturbation moved by the same backward pass; trades; clean: no adversary"""
    replays: int = 4
    """free: steps on each batch; an epoch is still one pass over the images"""
    beta: float = 6.0
    """trades: weight of the divergence"""
    epochs: int = 30
    """passes over the training images"""
    batch_size: int = 64
    """images in a mini-batch"""
    evaluation_batch_size: int = 256
    """images in a batch of validation and test; larger is faster on small images"""
    schedule: Literal["cyclic", "cosine", "multistep"] = "cyclic"
    """learning rate of each step: cyclic (straight up to the peak and down to 0), cosine (down to
    0), multistep (a tenth after 1/2 and again after 3/4 of training)"""
    warmup: float | None = None
    """share of training in which the rate rises from 0; default 0.4 for cyclic, 0 for the rest"""
    learning_rate: float = 0.1
    """of SGD, at the peak of the schedule"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 5e-4
    """of SGD"""
    grad_clip: float | None = 5.0
    """largest 2-norm of the gradient"""
    ema_decay: float = 0.0
    """exponential moving average of the weights, which is then what is validated and kept; the
    factor for each step, such as 0.999; 0: none"""
    auxiliary: bool = False
    """an auxiliary classifier at two thirds of the cells, in training"""
    auxiliary_weight: float = 0.4
    """weight of its loss"""
    drop_path_prob: float = 0.0
    """chance that an operation is dropped for one image, growing linearly from 0 to this"""
    train_portion: float = 0.9
    """share of the training images that train the weights; the rest chooses the best epoch"""
    train_limit: int | None = None
    """use only so many training images (a stratified choice)"""
    test_limit: int | None = None
    """use only so many test images (a stratified choice)"""
    crop_padding: int = 0
    """random crop after zero padding by so many pixels"""
    flip: bool = False
    """random horizontal flip"""
    cutout_length: int = 0
    """side of the square that is cut out at random, in pixels"""
    precision: Precision = "float32"
    """bfloat16: convolutions and matrix products in bfloat16; weights, statistics, logits and loss
    stay float32"""
    graphs: Choice = "auto"
    """CUDA graphs: the step is recorded once and replayed; auto: where that is possible"""
    sync_batchnorm: bool = False
    """with several processes: batch statistics over all of them, not over each one's images"""
    attack: AttackConfig = field(default_factory=AttackConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)

    def __post_init__(self) -> None:
        _cli.keep_plain_numbers(self)

        def positive(value: float) -> bool:
            return math.isfinite(value) and value > 0

        checks: tuple[tuple[str, Any, bool, str], ...] = (
            ("seed", self.seed, 0 <= self.seed < 2**63, "a whole number in [0, 2^63)"),
            ("threads", self.threads, self.threads >= 0, "0 or more"),
            (
                "init_channels",
                self.init_channels,
                self.init_channels is None or self.init_channels >= 1,
                "None or 1 or more",
            ),
            ("layers", self.layers, self.layers is None or self.layers >= 1, "None or 1 or more"),
            ("replays", self.replays, self.replays >= 1, "1 or more"),
            ("beta", self.beta, math.isfinite(self.beta) and self.beta >= 0, "0 or more"),
            ("epochs", self.epochs, self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size, self.batch_size >= 2, "2 or more"),
            (
                "evaluation_batch_size",
                self.evaluation_batch_size,
                self.evaluation_batch_size >= 1,
                "1 or more",
            ),
            (
                "warmup",
                self.warmup,
                self.warmup is None or 0 <= self.warmup <= 1,
                "None or a share from 0 to 1",
            ),
            (
                "learning_rate",
                self.learning_rate,
                positive(self.learning_rate),
                "a positive number",
            ),
            ("momentum", self.momentum, 0 <= self.momentum < 1, "a number in [0, 1)"),
            (
                "weight_decay",
                self.weight_decay,
                math.isfinite(self.weight_decay) and self.weight_decay >= 0,
                "0 or more",
            ),
            (
                "grad_clip",
                self.grad_clip,
                self.grad_clip is None or self.grad_clip > 0,
                "None or a positive number",
            ),
            ("ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "a number in [0, 1)"),
            (
                "auxiliary_weight",
                self.auxiliary_weight,
                positive(self.auxiliary_weight),
                "a positive number (--no-auxiliary switches it off)",
            ),
            (
                "drop_path_prob",
                self.drop_path_prob,
                0 <= self.drop_path_prob < 1,
                "a number in [0, 1)",
            ),
            (
                "train_portion",
                self.train_portion,
                0 < self.train_portion < 1,
                "a share between 0 and 1",
            ),
            (
                "train_limit",
                self.train_limit,
                self.train_limit is None or self.train_limit >= 4,
                "None or 4 or more",
            ),
            (
                "test_limit",
                self.test_limit,
                self.test_limit is None or self.test_limit >= 1,
                "None or 1 or more",
            ),
            ("crop_padding", self.crop_padding, self.crop_padding >= 0, "0 or more"),
            ("cutout_length", self.cutout_length, self.cutout_length >= 0, "0 or more"),
            ("selection.steps", self.selection.steps, self.selection.steps >= 1, "1 or more"),
            ("selection.every", self.selection.every, self.selection.every >= 1, "1 or more"),
            ("final.steps", self.final.steps, self.final.steps >= 1, "1 or more"),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ConfigError(f"{name}: expected {expected}, got {value!r}")
        steps, only = self.attack.steps, {"fgsm": 1, "free": 1, "clean": 0}
        if steps is not None and steps != only.get(self.method, steps):
            raise ConfigError(
                f"attack.steps: expected {only[self.method]} with method {self.method}, got "
                f"{steps}; more steps are --method pgd"
            )
        if steps is not None and self.method in ("pgd", "trades") and steps < 1:
            raise ConfigError(
                f"attack.steps: expected 1 or more with method {self.method}, got {steps}; "
                "without a step it is --method clean"
            )
        if self.graphs == "yes" and (self.method == "free" or self.drop_path_prob):
            what = "method free" if self.method == "free" else "drop_path_prob"
            raise ConfigError(
                f"graphs: expected auto or no with {what}, whose steps cannot be replayed, got yes"
            )
        self.guard.check()
        self.training_threat()
        self.selection_threat()
        self.final_threat()

    def training_threat(self) -> ThreatModel:
        """The adversary of the training step."""
        clip = self.attack.clip == "image"
        mode = self.attack.bn_mode
        if mode == "auto":
            mode = "eval" if self.method == "trades" else "train"
        return ThreatModel(
            epsilon=self.attack.epsilon,
            lower=0.0 if clip else None,
            upper=1.0 if clip else None,
            step_size=self.attack.step_size,
            steps=_STEPS[self.method] if self.attack.steps is None else self.attack.steps,
            random_start=self.attack.random_start,
            bn_mode=mode,
        )

    def selection_threat(self) -> ThreatModel:
        """PGD for the choice of the best epoch; nothing where the network is trained clean."""
        return ThreatModel(
            epsilon=self.attack.epsilon,
            step_size=self.selection.step_size,
            steps=0 if self.method == "clean" else self.selection.steps,
        )

    def final_threat(self) -> ThreatModel:
        """PGD for the figures at the end."""
        return ThreatModel(
            epsilon=self.attack.epsilon, step_size=self.final.step_size, steps=self.final.steps
        )

    def objective(self, threat: ThreatModel) -> Adversarial:
        """What is minimised against this adversary."""
        auxiliary = self.auxiliary_weight if self.auxiliary else 0.0
        if self.method == "free" and threat.steps == 1:
            return Free(self.replays, auxiliary)
        if self.method == "trades":
            return Trades(self.beta, auxiliary)
        return Adversarial(auxiliary)

    def rate(self, progress: float) -> float:
        """Learning rate when the share ``progress``, in [0, 1), of training is done."""
        warmup = _WARMUP[self.schedule] if self.warmup is None else self.warmup
        if progress < warmup:
            return self.learning_rate * progress / warmup
        if self.schedule == "multistep":
            return self.learning_rate * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
        done = (progress - warmup) / (1.0 - warmup)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * (1.0 - done)

    def architecture(self, genotype: Genotype, in_channels: int, classes: int) -> Architecture:
        """What is built from the genotype."""
        macro = genotype.macro
        blocks = self.denoise_blocks
        return Architecture(
            in_channels=in_channels,
            classes=classes,
            channels=self.init_channels or (macro and macro.channels) or 16,
            cells=self.layers or (macro and macro.layers) or 6,
            denoise_blocks=bool(macro and macro.denoise_blocks) if blocks is None else blocks,
            bn_eps=macro.bn_eps if macro else 1e-5,
            **vars(genotype.options),
        )

    def resolve(self) -> RetrainConfig:
        """The same configuration with every ``auto`` and default replaced by what it means here."""
        device, deterministic = resolve_device(self.device, self.deterministic)
        threat = self.training_threat()
        attack = dataclasses.replace(
            self.attack,
            steps=threat.steps,
            bn_mode="eval" if threat.bn_mode == "eval" else "train",
        )
        warmup = _WARMUP[self.schedule] if self.warmup is None else self.warmup
        return dataclasses.replace(
            self, device=device, deterministic=deterministic, attack=attack, warmup=warmup
        )


# What each preset changes. Why: docs/retrain.md. The guard takes 2 to 3 % of the time in all.
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "smoke": {
        "name": "smoke",
        "init_channels": 4,
        "layers": 3,
        "epochs": 8,
        "batch_size": 32,
        "train_limit": 256,
        "test_limit": 256,
        "train_portion": 0.75,
        "selection": {"steps": 5},
        "final": {"steps": 5, "step_size": "0.05"},
    },
    "mnist": {
        "name": "mnist",
        "data": "mnist",
        "init_channels": None,
        "layers": None,
        "epochs": 20,
        "batch_size": 128,
        "evaluation_batch_size": 500,
        "train_portion": 0.95,
        "attack": {"epsilon": "0.3"},
        "guard": {"every": 1, "images": 256},
        "final": {"steps": 40, "step_size": "0.01"},
    },
    "fashion-mnist": {
        "name": "fashion-mnist",
        "data": "fashion-mnist",
        "init_channels": None,
        "layers": None,
        "epochs": 30,
        "batch_size": 128,
        "evaluation_batch_size": 500,
        "train_portion": 0.95,
        "crop_padding": 2,
        "flip": True,
        "attack": {"epsilon": "0.1"},
        "guard": {"every": 1, "images": 256},
        "final": {"steps": 40, "step_size": "0.01"},
    },
    "cifar10": {
        "name": "cifar10",
        "data": "cifar10",
        "init_channels": 48,
        "layers": 10,
        "epochs": 60,
        "batch_size": 128,
        "evaluation_batch_size": 500,
        "train_portion": 0.96,
        "crop_padding": 4,
        "flip": True,
        "auxiliary": True,
        "drop_path_prob": 0.1,
        "ema_decay": 0.999,
        "attack": {"epsilon": "8/255"},
        "guard": {"every": 1, "images": 256},
        "final": {"steps": 20, "step_size": "2/255"},
    },
}


@dataclass(frozen=True)
class Options(_cli.CommonOptions):
    """What to do with the configuration; none of it changes a result."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: digits (the default), smoke, mnist, fashion-mnist, cifar10; with a
    run folder: the preset of the same name as its search"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """run folder; default: an unfinished run of this configuration below runs/, else a new one"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the run in this folder, with the configuration and genotype stored there"""
    force: bool = False
    """replace a finished run, or one of another configuration, in --out"""
    peer_timeout: float = 600.0
    """seconds to wait for another process of the run before it counts as gone"""
    dry_run: bool = False
    """train and validate a few batches, print memory and time that all will take, and stop"""


@dataclass(frozen=True)
class _Command:
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    config: Annotated[RetrainConfig, tyro.conf.arg(name="")] = field(default_factory=RetrainConfig)


# --- the genotype ---------------------------------------------------------------------------


def find_genotype(where: str) -> Genotype:
    """The genotype of a file, of a run folder or of a published name.

    Raises:
        GenotypeError: there is none, or it is damaged.
    """
    path = Path(where)
    if where and path.is_dir():
        if not (path / "genotype.json").is_file():
            raise GenotypeError(
                f"{path}: expected a folder with genotype.json, as a finished search leaves it"
            )
        return Genotype.load(plain_file(path / "genotype.json"))
    if where in Genotype.names():
        return Genotype.published(where)
    if path.is_file():
        return Genotype.load(path)
    raise GenotypeError(
        f"{where or 'genotype'}: expected a genotype file, the folder of a search or one of "
        f"{', '.join(Genotype.names())}"
    )


def _settings_of(where: str) -> dict[str, Any]:
    """What a run folder says about data and adversary, as settings of a retraining."""
    path = Path(where)
    if not where or not (path / "config.yaml").is_file():
        return {}
    stored = RunFolder.read_config(path)
    found: dict[str, Any] = {name: stored[name] for name in ("name", "data") if name in stored}
    attack = stored.get("attack")
    if isinstance(attack, dict) and "epsilon" in attack:
        found["attack"] = {"epsilon": attack["epsilon"]}
    return found


# --- the training ---------------------------------------------------------------------------


@dataclass
class _Setup:
    """What is built from the configuration alone, the same at every start."""

    config: RetrainConfig
    genotype: Genotype
    architecture: Architecture
    device: torch.device
    source: DataSource
    splits: dict[str, Any]
    network: Network
    optimizer: torch.optim.SGD
    weights: Loader
    validation: Loader
    guard: Loader
    test: Loader | None


def _build(
    config: RetrainConfig,
    genotype: Genotype,
    group: Group | None = None,
    source: DataSource | None = None,
) -> _Setup:
    device = torch.device(config.device) if group is None else group.device
    source = load(config.data) if source is None else source
    parts = divide(source, config)
    train = parts.train.to(device)
    evaluated = partial(Loader, batch_size=config.evaluation_batch_size, device=device)
    architecture = config.architecture(genotype, train.images.shape[1], source.classes)
    # The initial weights come from the run's own seed, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        network = architecture.build(
            genotype, mean=parts.mean, std=parts.std, auxiliary=config.auxiliary
        )
    # Channels-last is the faster layout for the depthwise and the dense convolutions alike.
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if group is not None and config.sync_batchnorm:
        synchronise_batchnorm(network, group)
    return _Setup(
        config,
        genotype,
        architecture,
        device,
        source,
        parts.splits,
        network,
        sgd(network, config, device),
        weights=Loader(
            train,
            parts.weights,
            batch_size=config.batch_size,
            device=device,
            augment=Augment(config.crop_padding, config.flip, config.cutout_length),
            seed=derive_seed(config.seed, "order"),
            shuffle=True,
            # A last batch of one image has no batch statistics on 1 x 1 maps.
            drop_last=len(parts.weights) % config.batch_size == 1,
        ),
        validation=evaluated(train, parts.validation),
        guard=evaluated(train, parts.guard),
        test=None
        if parts.test is None or parts.test_index is None
        else evaluated(parts.test, parts.test_index),
    )


@dataclass(frozen=True)
class _Record:
    """How the weights of one epoch did on the validation images."""

    epoch: int
    clean_correct: int
    robust_correct: int
    images: int

    def better_than(self, other: _Record | None) -> bool:
        """More robust; of two alike the more accurate one, then the earlier one."""
        if other is None:
            return True
        mine, theirs = (
            (self.robust_correct, self.clean_correct),
            (
                other.robust_correct,
                other.clean_correct,
            ),
        )
        return mine > theirs

    def facts(self, attack: ThreatModel, file: str) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "clean_accuracy": self.clean_correct / self.images,
            "robust_accuracy": self.robust_correct / self.images,
            "n": self.images,
            "split": "validation",
            "attack": attack.describe(),
            "file": file,
        }


class _Retraining:
    """A retraining in progress: its state, one epoch, and how the state goes to disk and back.

    Args:
        folder: where files go; None for a process that writes none.
        group: all processes of the run; None where there is one.
    """

    def __init__(self, setup: _Setup, folder: RunFolder | None, group: Group | None = None) -> None:
        self.setup, self.folder, self.config = setup, folder, setup.config
        self.group = group
        self.team = None if group is None else Team(group, 1)
        self.network = setup.network
        self.engine = Engine(
            self.config.precision,
            Graphs(self.config.graphs, setup.device, processes=1 if group is None else group.size),
        )
        # What is dropped is drawn anew in every step, by a generator that a replay would not move.
        self.training_engine = self.engine
        if self.config.drop_path_prob:
            self.training_engine = Engine(self.config.precision)
        self.average = (
            WeightAverage(self.network, self.config.ema_decay) if self.config.ema_decay else None
        )
        self.cost = Cost()
        self.threat = self.config.training_threat()
        self.selection = self.config.selection_threat()
        self.guard: OverfittingGuard | None = None
        if self.config.guard.enabled and self.threat.attacks:
            self.guard = OverfittingGuard(
                setup.guard,
                seed=derive_seed(self.config.seed, "attack", "guard"),
                steps=self.config.guard.steps,
            )
        self.epoch = 0
        self.peak_memory = 0.0
        self.fired: list[dict[str, Any]] = []
        self.best: _Record | None = None
        self.last: _Record | None = None
        self.best_weights: dict[str, Tensor] = {}
        # The state at the last check that found nothing wrong.
        self.good: dict[str, Tensor] = {}
        self.good_epoch = -1
        if self.guard is not None:
            self.keep_good(-1)

    @property
    def no_graphs(self) -> str | None:
        """Why training steps are not recorded; None where they are."""
        config = self.config
        if self.engine.graphs is not None and self.engine.graphs.reason:
            return self.engine.graphs.reason
        if config.drop_path_prob:
            return "dropped paths are drawn anew in every step"
        if not config.objective(self.threat).recordable:
            return f"a mini-batch of method {config.method} has several steps"
        return None

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network whose accuracy counts: the average where there is one."""
        return self.network if self.average is None else self.average.network

    # State on disk.

    def _learning(self) -> dict[str, Tensor]:
        """Weights, momentum and average: what training goes on from."""
        tensors = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        state = self.setup.optimizer.state
        for name, parameter in self.network.named_parameters():
            momentum = state.get(parameter, {}).get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum.{name}"] = momentum
        if self.average is not None:
            average = self.average.network.state_dict()
            tensors |= {f"average.{k}": v for k, v in average.items()}
        return tensors

    def _learn_from(self, tensors: dict[str, Tensor]) -> None:
        """Undo what happened since :meth:`_learning`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "average": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        try:
            self.network.load_state_dict(parts["model"])
            if self.average is not None:
                self.average.network.load_state_dict(parts["average"])
        except RuntimeError as error:
            raise run.CheckpointError(
                f"the checkpoint does not fit this network: {str(error).splitlines()[0]}"
            ) from None
        # Where there is a buffer it is kept, since a recorded step writes to its memory; without an
        # entry it is what it was before the first step, zero.
        for name, parameter in self.network.named_parameters():
            state, buffer = self.setup.optimizer.state[parameter], parts["momentum"].get(name)
            if state.get("momentum_buffer") is None:
                if buffer is None:
                    continue
                state["momentum_buffer"] = torch.empty_like(parameter)
            if buffer is None:
                state["momentum_buffer"].zero_()
            else:
                state["momentum_buffer"].copy_(buffer)

    def keep_good(self, epoch: int) -> None:
        self.good = {name: tensor.clone() for name, tensor in self._learning().items()}
        self.good_epoch = epoch

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that :meth:`restore` needs."""
        tensors = {f"now.{k}": v for k, v in self._learning().items()}
        tensors |= {f"good.{k}": v for k, v in self.good.items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()}
        state = {
            "epoch": self.epoch,
            "cost": self.cost.state_dict(),
            "peak_memory_mb": self.peak_memory,
            "average_steps": 0 if self.average is None else self.average.steps,
            "good_epoch": self.good_epoch,
            "fired": self.fired,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "last": None if self.last is None else dataclasses.asdict(self.last),
        }
        return tensors, state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"now": {}, "good": {}, "best": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self._learn_from(parts["now"])
        device = self.setup.device
        self.good = {name: tensor.to(device) for name, tensor in parts["good"].items()}
        self.best_weights = {name: tensor.to(device) for name, tensor in parts["best"].items()}
        self.epoch, self.good_epoch = state["epoch"], state["good_epoch"]
        self.cost.load_state_dict(state["cost"])
        self.peak_memory = state["peak_memory_mb"]
        if self.average is not None:
            self.average.steps = state["average_steps"]
        self.fired = state["fired"]
        self.threat = self.config.training_threat()
        for _ in self.fired:
            self.threat = stronger(self.threat)
        self.best, self.last = (
            None if state[name] is None else _Record(**state[name]) for name in ("best", "last")
        )

    def save(self) -> None:
        if self.folder is not None:
            self.folder.save_checkpoint(*self.state())

    def share(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Give every process the first one's state; returns its ``facts``."""
        assert self.group is not None
        tensors, state = self.state()
        found, tensors = self.group.broadcast({"facts": facts, "state": state}, tensors)
        if self.group.rank:
            self.restore(tensors, found["state"])
        facts = found["facts"]
        return facts

    # One epoch.

    @contextmanager
    def _dropping_paths(self) -> Iterator[None]:
        """Paths are dropped by torch's own generator, which starts anew in every epoch."""
        config, device = self.config, self.setup.device
        self.network.drop_path_prob = config.drop_path_prob * self.epoch / config.epochs
        rank = 0 if self.group is None else self.group.rank
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(config.seed, "drop path", self.epoch, rank))
            yield

    def _rate(self, updates: int, step: int) -> float:
        """Learning rate of that step of this epoch."""
        done = self.epoch + step / (len(self.setup.weights) * updates)
        return self.config.rate(min(done / self.config.epochs, 1.0))

    def train(self, batches: Any = None) -> Any:
        """One epoch of training."""
        setup, config = self.setup, self.config
        objective = config.objective(self.threat)
        if self.team is not None:
            self.team.use([list(self.network.parameters())])
        with self._dropping_paths():
            result = train_epoch(
                self.network,
                setup.weights if batches is None else batches,
                self.epoch,
                setup.optimizer,
                self.threat,
                seed=derive_seed(config.seed, "attack", "train"),
                cost=self.cost,
                grad_clip=config.grad_clip,
                team=self.team,
                objective=objective,
                learning_rate=partial(self._rate, objective.updates),
                after_step=None if self.average is None else self.average.update,
                engine=self.training_engine,
            )
        if self.team is not None and self.average is not None:
            self.team.average_batchnorm(self.average.network.modules())
        return result

    def check(self) -> Verdict:
        """Look for catastrophic overfitting; its cost is a phase of its own in the ledger."""
        assert self.guard is not None
        before = self.cost.seconds.get("validate", 0.0)
        trained, strong = self.guard.measure(
            self.network, self.threat, cost=self.cost, team=self.team, engine=self.engine
        )
        self.cost.add_seconds("guard", self.cost.seconds["validate"] - before)
        self.cost.seconds["validate"] = before
        return self.guard.judge([trained], [strong])

    def guarded(self) -> tuple[dict[str, Any] | None, str | None]:
        """Check what this epoch did and undo it if it has to be; a line for the log, and a note."""
        if self.guard is None or (self.epoch + 1) % self.config.guard.every:
            return None, None
        verdict = self.check()
        line: dict[str, Any] = {"steps": self.threat.steps, **verdict.to_dict()}
        if not verdict.overfitted:
            self.keep_good(self.epoch)
            return line, None
        self._learn_from(self.good)
        back = (
            f"back to epoch {self.good_epoch}" if self.good_epoch >= 0 else "back to the beginning"
        )
        said = (
            f"catastrophic overfitting in epoch {self.epoch}: accuracy "
            f"{100 * verdict.trained:.1f} % under the training attack, "
            f"{100 * verdict.strong:.1f} % under a stronger one; {back}"
        )
        line["back_to"] = self.good_epoch
        if self.threat.steps < MOST_STEPS:
            self.threat = stronger(self.threat)
            self.fired.append(
                {
                    "epoch": self.epoch,
                    "back_to": self.good_epoch,
                    "trained": verdict.trained,
                    "strong": verdict.strong,
                    "attack": self.threat.describe(),
                }
            )
            said += f", and on with {self.threat.describe()}"
        return line, said

    def validate(self) -> Evaluation:
        """Accuracy on the validation images; every epoch meets the same random starts."""
        return evaluate(
            self.evaluated,
            self.setup.validation,
            self.selection,
            seed=derive_seed(self.config.seed, "attack", "validation"),
            cost=self.cost,
            team=self.team,
            engine=self.engine,
        )

    def run_epoch(self) -> tuple[dict[str, Any], str | None]:
        """Train, check, validate, log and save. Returns the metrics, and a note if there is one."""
        config, number = self.config, self.epoch
        started, accounted = time.perf_counter(), sum(self.cost.seconds.values())
        with accounting(self.cost, self.team):
            steps = self.threat.steps
            trained = self.train()
            checked, note = self.guarded()
            found = None
            if (number + 1) % config.selection.every == 0 or number + 1 == config.epochs:
                found = self.validate()
        improved = False
        if found is not None:
            self.last = _Record(number, found.clean_correct, found.robust_correct, found.images)
            improved = self.last.better_than(self.best)
            if improved:
                self.best = self.last
                weights = self.evaluated.state_dict()
                self.best_weights = {k: v.detach().clone() for k, v in weights.items()}
        self.epoch += 1
        seconds = time.perf_counter() - started
        self.cost.add_seconds("other", seconds - (sum(self.cost.seconds.values()) - accounted))
        self.peak_memory = max(self.peak_memory, run.peak_memory_mb(self.setup.device))
        metrics = {
            "epoch": number,
            "loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "clean_accuracy": None if found is None else found.clean_accuracy,
            "robust_accuracy": None if found is None else found.robust_accuracy,
            "best": improved,
            "attack_steps": steps,
            "overfitting": checked,
            "learning_rate": self.setup.optimizer.param_groups[0]["lr"],
            "seconds_train": trained.seconds,
            "seconds_validate": 0.0 if found is None else found.seconds,
            "seconds_total": seconds,
            "images_per_second": trained.images / trained.seconds,
            "peak_memory_mb": self.peak_memory,
        }
        if self.folder is not None:
            self.folder.append("metrics.jsonl", metrics)
        self.save()
        if improved:
            # Early, so that a long run has something to show; it is written again at the end.
            self.write_model(BEST)
        return metrics, note

    # The end.

    @property
    def run_id(self) -> str:
        return run.run_id(_cli.to_plain(self.config))

    @property
    def rule(self) -> str:
        """How the best epoch is chosen, in words."""
        n = len(self.setup.splits["validation"])
        what = "robust accuracy" if self.selection.attacks else "accuracy"
        averaged = ", of the averaged weights" if self.average is not None else ""
        return (
            f"best: the epoch with the highest {what} on {n} validation images held out of the "
            f"training set{averaged} ({self.selection.describe()}; of two alike the one with more "
            "clean accuracy, then the earlier one); last: the last epoch; the test set is looked "
            "at once, at the end"
        )

    def write_model(self, name: str) -> None:
        """Write one of the two model files."""
        if self.folder is None:
            return
        config = self.config
        record = self.best if name == BEST else self.last
        assert record is not None
        save_model(
            self.folder.path / name,
            self.best_weights if name == BEST else self.evaluated.state_dict(),
            genotype=self.setup.genotype,
            architecture=self.setup.architecture,
            data={
                "name": self.setup.source.name,
                "digest": self.setup.source.digest,
                "shape": list(self.setup.source.train.shape),
                "classes": self.setup.source.classes,
                "class_names": list(self.setup.source.class_names),
            },
            training={
                "run_id": self.run_id,
                "seed": config.seed,
                "method": config.method,
                "threat": config.training_threat().to_dict(),
                "epochs": config.epochs,
                "epoch": record.epoch,
                "checkpoint": "best" if name == BEST else "last",
                "rule": self.rule,
                "weights": "averaged" if self.average is not None else "of that epoch",
                "validation": record.facts(self.selection, name),
            },
        )

    def test_engine(self) -> Engine:
        """In float32 whatever the precision of the training, but recorded where that is."""
        return Engine(graphs=self.engine.graphs)

    def test(self) -> dict[str, Any] | None:
        """Accuracy of the best weights on the test images."""
        setup, config = self.setup, self.config
        if setup.test is None:
            return None
        network = setup.architecture.build(setup.genotype)
        kept = {k: v for k, v in self.best_weights.items() if not k.startswith("auxiliary.")}
        network.load_state_dict(kept)
        network.to(setup.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        threat = config.final_threat()
        before = self.cost.seconds.get("validate", 0.0)
        with accounting(self.cost, self.team):
            found = evaluate(
                network,
                setup.test,
                threat,
                seed=derive_seed(config.seed, "attack", "final", "test"),
                cost=self.cost,
                team=self.team,
                engine=self.test_engine(),
            )
        self.cost.add_seconds("test", self.cost.seconds["validate"] - before)
        self.cost.seconds["validate"] = before
        return {
            "split": "test",
            "n": found.images,
            "clean_accuracy": found.clean_accuracy,
            "robust_accuracy": found.robust_accuracy,
            "attack": threat.describe(),
            "of": "best",
        }

    def finish(self) -> dict[str, Any]:
        """Measure the best weights on the test images and write the last files."""
        setup, config, folder = self.setup, self.config, self.folder
        test = self.test()
        if folder is None:
            return self.told_summary(None)
        assert self.best is not None
        assert self.last is not None
        self.write_model(BEST)
        self.write_model(LAST)
        self.peak_memory = max(self.peak_memory, run.peak_memory_mb(setup.device))
        cost, source = self.cost, setup.source
        plain = setup.architecture.build(setup.genotype)
        summary = {
            "status": "finished",
            "command": "retrain",
            "run_id": self.run_id,
            "name": config.name,
            "genotype": "genotype.json",
            "genotype_name": setup.genotype.name,
            "genotype_hash": setup.genotype.hash,
            "architecture": dataclasses.asdict(setup.architecture),
            "parameters": sum(p.numel() for p in plain.parameters()),
            "macs": multiply_adds(plain, source.train.shape),
            "method": config.method,
            "threat": config.training_threat().to_dict(),
            "data": {
                "name": source.name,
                "description": source.description,
                "n": len(setup.splits["weights"]),
                "weights": len(setup.splits["weights"]),
                "validation": len(setup.splits["validation"]),
                "test": len(setup.splits["test"]),
                "classes": source.classes,
            },
            "selection": self.rule,
            "overfitting": self.fired,
            "best": self.best.facts(self.selection, BEST),
            "last": self.last.facts(self.selection, LAST),
            "test": test,
            "cost": {
                "epochs": config.epochs,
                "seconds_total": sum(cost.seconds.values()),
                **{f"seconds_{phase}": value for phase, value in cost.seconds.items()},
                "images_per_second": cost.images_trained / cost.seconds["train"],
                "images_trained": cost.images_trained,
                "images_evaluated": cost.images_evaluated,
                "forward_passes": cost.forward_passes,
                "backward_passes": cost.backward_passes,
                "peak_memory_mb": self.peak_memory,
                "device": config.device,
                "threads": torch.get_num_threads(),
                "processes": 1 if self.group is None else self.group.size,
                "precision": config.precision,
                "graphs": self.no_graphs is None,
            },
            "versions": {"torch": torch.__version__, "fastbandit": run.__version__},
        }
        # The summary is what makes a run finished, so it comes last.
        folder.write_json("summary.json", summary)
        return self.told_summary(summary)

    def told_summary(self, summary: dict[str, Any] | None) -> dict[str, Any]:
        """The summary of the process that has written it, on every process, once it is there."""
        if self.group is not None:
            summary, _ = self.group.broadcast(summary, {})
        assert summary is not None
        return summary


def _with_genotype(
    config: RetrainConfig, genotype: Genotype | None
) -> tuple[RetrainConfig, Genotype]:
    """The genotype that a configuration means, and the configuration with its hash."""
    found = find_genotype(config.genotype) if genotype is None else genotype
    if config.genotype_hash not in (None, found.hash):
        raise ConfigError(
            f"genotype_hash: expected {config.genotype_hash}, got {found.hash} from "
            f"{config.genotype or 'the genotype given'}"
        )
    return dataclasses.replace(config, genotype_hash=found.hash), found


def _check_genotype(folder: RunFolder, genotype: Genotype) -> None:
    """See that a run goes on with the genotype it began with, the parts without a hash included."""
    file = plain_file(folder.path / "genotype.json")
    if not file.is_file():
        return
    stored = Genotype.load(file)
    if (stored.hash, stored.macro, stored.options) != (
        genotype.hash, genotype.macro, genotype.options
    ):  # fmt: skip
        raise RunError(
            f"{file}: the run was begun with {stored.macro} and {stored.options}, got "
            f"{genotype.macro} and {genotype.options} around hash {genotype.hash[:12]}; --resume "
            f"{file.parent} goes on with what is stored there, another --out begins anew"
        )


def retrain(
    config: RetrainConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    progress: Progress | None = None,
    group: Group | None = None,
    source: DataSource | None = None,
    genotype: Genotype | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Train the network of a genotype to the end, or go on with a run that was interrupted.

    Args:
        config: the settings; see :class:`RetrainConfig`.
        out: run folder; None: an unfinished run of the same configuration below ``root``, else a
            new folder there.
        force: replace what a finished or a different run left in ``out``.
        progress: where progress is shown; None shows none.
        group: the processes that train together, each of them calling this function; None: this
            one alone. Only the first reads and writes files, and shows progress.
        source: the images, for instance :func:`fastbandit.data.load` of a torch Dataset; None:
            those that ``config.data`` names. To go on with a run, give the same images again:
            their digest is stored and compared.
        genotype: the architecture; None: that which ``config.genotype`` names.

    Returns:
        The run folder and its summary; of a finished run of the same configuration in ``out``
        those that are stored, unless ``force`` is given.

    Raises:
        OutOfMemoryError: there is not enough memory; the run goes on from its last epoch.
        ValueError: settings, genotype, data, run folder or checkpoint cannot be used; the message
            says why.
        OSError: a file could not be written; the run goes on from its last checkpoint.
    """
    config, genotype = _with_genotype(config.resolve(), genotype)
    plain = _cli.to_plain(config)
    progress = progress or Progress.silent()
    check_group_device(config.device, group)
    enough = partial(memory_enough_for, config.batch_size, config.evaluation_batch_size)
    # Before there is a run folder: what cannot be is said and leaves nothing behind.
    Graphs(config.graphs, torch.device(config.device), processes=1 if group is None else group.size)
    with torch_settings(config.threads, bool(config.deterministic)), ExitStack() as stack:
        started = time.perf_counter()
        setup = _build(config, genotype, group, source)
        folder = None
        if group is None or group.rank == 0:
            if out is not None:
                path = Path(out)
            else:
                unfinished = RunFolder.find_unfinished(Path(root), plain)
                path = unfinished or RunFolder.fresh_path(Path(root), f"{config.name}-retrain")
            folder = stack.enter_context(RunFolder.open(path, plain, force=force))
        else:
            progress = Progress.silent()
        if folder is not None:
            _check_genotype(folder, genotype)
        if (done := finished_before(folder, group, progress, setup.splits)) is not None:
            return done
        current = _Retraining(setup, folder, group)
        if setup.device.type == "cuda" and (reason := current.no_graphs):
            progress.note(f"no CUDA graphs in training: {reason}")
        resumed = False
        if folder is not None:
            resumed = folder.load_checkpoint(current.restore)
            check_same(folder, "split.json", setup.splits)
            environment = {"command": "retrain", **run.environment(setup.device)}
            environment["processes"] = 1 if group is None else group.size
            if resumed:
                note_changes(progress, folder.read_json("env.json"), environment)
            else:
                genotype.save(folder.path / "genotype.json")
                folder.write_json("env.json", environment)
                current.cost.add_seconds("setup", time.perf_counter() - started)
                current.save()
        if group is not None:
            digest = derive_seed(0, json.dumps(setup.splits))
            group.check_same("the data", torch.tensor(digest))
            facts = current.share({"path": str(folder.path) if folder else ""})
            path = Path(facts["path"])
        title = (
            f"{config.method}, {genotype.name or genotype.hash[:12]}, "
            f"{setup.architecture.cells} cells, C = {setup.architecture.channels}"
        )
        with progress.training(path, title, config.epochs, current.epoch, resumed=resumed) as show:
            while not current.finished:
                with enough(f"in epoch {current.epoch}"):
                    metrics, note = current.run_epoch()
                if note is not None:
                    progress.note(note)
                show(metrics)
        with enough("when the test images were attacked"):
            return path, current.finish()


def dry_run(
    config: RetrainConfig, *, source: DataSource | None = None, genotype: Genotype | None = None
) -> dict[str, Any]:
    """What the retraining will cost, measured on a few batches. Writes nothing lasting.

    Returns:
        ``epochs``, ``parameters``, ``macs``, ``seconds_setup``, ``seconds_per_epoch`` (training,
        guard, validation and checkpoint), ``seconds_test``, ``seconds_total``,
        ``peak_memory_mb`` in MiB, ``device``, ``threads``. On a CPU memory is the process's, so it
        is right in a process that did nothing before.

    Raises:
        OutOfMemoryError: not even this fits.
    """
    config, genotype = _with_genotype(config.resolve(), genotype)
    enough = partial(memory_enough_for, config.batch_size, config.evaluation_batch_size)
    with torch_settings(config.threads, bool(config.deterministic)), enough("in the dry run"):
        started = time.perf_counter()
        setup = _build(config, genotype, None, source)
        seconds_setup = time.perf_counter() - started
        current = _Retraining(setup, None)
        for group in setup.optimizer.param_groups:
            group["lr"] = 0.0

        def train(batches: int) -> tuple[float, int]:
            cost = current.cost = Cost()
            current.train(setup.weights.first(batches))
            return cost.seconds["train"], cost.images_trained

        def validate(
            loader: Loader, threat: ThreatModel, engine: Engine, batches: int
        ) -> tuple[float, int]:
            cost = Cost()
            few = loader.first(batches)
            evaluate(current.evaluated, few, threat, seed=0, cost=cost, engine=engine)
            return cost.seconds["validate"], cost.images_evaluated

        def validation(loader: Loader, threat: ThreatModel, batches: int) -> float:
            run = partial(validate, loader, threat, current.engine)
            return pace(run, batches, recorded=current.engine.records).of(len(loader.index))

        train(1)
        training = pace(train, 3, recorded=current.training_engine.records)
        seconds = training.of(len(setup.weights.index))
        validation(setup.validation, current.selection, 1)
        seconds += validation(setup.validation, current.selection, 2) / config.selection.every
        if current.guard is not None:
            attacks = current.guard.attacks(current.threat)
            checked = sum(validation(setup.guard, attack, 2) for attack in attacks)
            seconds += checked / config.guard.every
        test = 0.0
        if setup.test is not None:
            engine = current.test_engine()
            final = partial(validate, setup.test, config.final_threat(), engine)
            test = pace(final, 1, recorded=engine.records).of(len(setup.test.index))
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            tensors, state = current.state()
            run.save_tensors(Path(folder) / "checkpoint", tensors, "checkpoint", {"state": state})
            seconds += time.perf_counter() - started
        plain = setup.architecture.build(genotype)
        return {
            "epochs": config.epochs,
            "parameters": sum(p.numel() for p in plain.parameters()),
            "macs": multiply_adds(plain, setup.source.train.shape),
            "peak_memory_mb": run.peak_memory_mb(setup.device),
            "seconds_setup": seconds_setup,
            "seconds_per_epoch": seconds,
            "seconds_test": test,
            "seconds_total": seconds_setup + config.epochs * seconds + test,
            "device": config.device,
            "threads": torch.get_num_threads(),
        }


# --- the command ----------------------------------------------------------------------------


def _parsed(arguments: Sequence[str], base: RetrainConfig) -> _Command:
    return tyro.cli(
        _Command,
        default=_Command(config=base),
        args=list(arguments),
        prog="python -m fastbandit.retrain",
        description="Train the network of a genotype from scratch, adversarially. "
        "ABANDIT_MNIST_NORMAL_1 is a published one to begin with: with nothing else said it is "
        "trained on the embedded digits, minutes on a CPU.",
    )


def parse(arguments: Sequence[str]) -> _Command:
    """Options and configuration: defaults < preset < run folder < file < flags.

    Raises:
        ValueError: an unknown preset, setting or value. (tyro ends the process with status 2 and a
            message of its own where a flag cannot be parsed at all.)
    """
    preset = _cli.take_option(arguments, "preset")
    file = _cli.take_option(arguments, "config")
    settings = {} if file is None else _cli.read_config_file(file)
    # The run folder gives defaults, so it is looked for before they are known.
    where = _parsed(arguments, RetrainConfig()).config.genotype or settings.get("genotype", "")
    of_run = _settings_of(str(where))
    if preset is None and of_run.get("name") in PRESETS:
        preset = of_run["name"]
    base = RetrainConfig()
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"--preset: expected one of {', '.join(PRESETS)}, got {preset!r}")
        base = _cli.merge(base, PRESETS[preset], f"preset {preset}")
    base = _cli.merge(base, of_run, f"{where}/config.yaml")
    base = _cli.merge(base, settings, f"--config {file}")
    return _parsed(arguments, base)


def _print_dry_run(result: dict[str, Any]) -> None:
    print(f"network            {result['parameters']:,} parameters, {result['macs']:,} MACs")
    print(f"epochs             {result['epochs']}")
    print(f"peak memory        {result['peak_memory_mb']:.0f} MiB")
    print(f"seconds per epoch  {result['seconds_per_epoch']:.2f}")
    print(
        f"all of it          about {result['seconds_total'] / 60:.1f} minutes on "
        f"{result['device']}, {result['threads']} CPU threads"
    )


def _print_summary(path: Path, summary: dict[str, Any]) -> None:
    cost = summary["cost"]
    print(
        f"retraining finished: {cost['epochs']} epochs in {cost['seconds_total'] / 60:.1f} "
        f"minutes, {cost['images_per_second']:.0f} images/s in training, "
        f"peak memory {cost['peak_memory_mb']:.0f} MiB"
    )
    print(
        f"network: {summary['parameters']:,} parameters, {summary['macs']:,} MACs "
        f"({2 * summary['macs']:,} FLOPs); genotype {summary['genotype_hash'][:12]}"
    )
    for name in ("best", "last"):
        found = summary[name]
        print(
            f"{name}, epoch {found['epoch']:<4} validation  clean "
            f"{100 * found['clean_accuracy']:.2f} %  robust "
            f"{100 * found['robust_accuracy']:.2f} %  (n = {found['n']})  {path / found['file']}"
        )
    test = summary["test"]
    print(f"validation attack: {summary['best']['attack']}")
    if test is not None:
        print(
            f"best, test                   clean {100 * test['clean_accuracy']:.2f} %  robust "
            f"{100 * test['robust_accuracy']:.2f} %  (n = {test['n']})"
        )
        print(f"test attack: {test['attack']}")
    for fired in summary["overfitting"]:
        print(f"catastrophic overfitting in epoch {fired['epoch']}: on with {fired['attack']}")
    print(f"run folder: {path}")


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    options, config = command.options, command.config
    out, genotype = options.out, None
    if options.resume is not None:
        folder = Path(options.resume)
        stored = _cli.merge(RetrainConfig(), RunFolder.read_config(folder), f"{folder}/config.yaml")
        config, out = _cli.resumed_config(config, stored, options.resume, out), options.resume
        # Killed before it was stored: then it is where it was found.
        if (folder / "genotype.json").is_file():
            genotype = Genotype.load(plain_file(folder / "genotype.json"))
    # What needs no run needs no other process either.
    if launched() and os.environ["RANK"] != "0" and (options.print_config or options.dry_run):
        return 0
    if options.print_config:
        import yaml

        resolved, _ = _with_genotype(config.resolve(), genotype)
        print(yaml.safe_dump(_cli.to_plain(resolved), sort_keys=False), end="")
        return 0
    if options.dry_run:
        result = dry_run(config, genotype=genotype)
        if options.json:
            print(json.dumps(result))
        else:
            _print_dry_run(result)
        return 0
    call = partial(
        retrain, config, out, force=options.force, progress=Progress(), genotype=genotype
    )
    if not launched():
        path, summary = call()
    else:
        kind = torch.device(config.resolve().device).type
        with Group.join(kind, timeout=options.peer_timeout) as group:
            path, summary = call(group=group)
            if group.rank:
                return 0
    if options.json:
        print(json.dumps({"run": str(path), **summary}))
    else:
        _print_summary(path, summary)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    return _cli.guard("retrain", lambda: _run(given), speaks=first_to_speak)


if __name__ == "__main__":
    raise SystemExit(main())
