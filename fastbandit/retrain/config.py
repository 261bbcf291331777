"""The settings of a retraining, and its presets."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from fastbandit.config import LATER, POSITIVE, SEED, SHARE, ConfigError, Radius, Range, at_least
from fastbandit.genotype import Genotype
from fastbandit.models import Architecture
from fastbandit.retrain.binary import BinaryConfig
from fastbandit.runs.session import resolve_device
from fastbandit.runs.training import TrainingConfig
from fastbandit.threat import ThreatModel
from fastbandit.training.objectives import Adversarial, Free, Trades

__all__ = ["PRESETS", "AttackConfig", "FinalConfig", "RetrainConfig", "SelectionConfig"]

# Steps of the training attack where --attack.steps is not given.
STEPS = {"fgsm": 1, "pgd": 7, "free": 1, "trades": 10, "clean": 0}
# Part of training in which the rate rises, where --warmup is not given: Wong et al. peak at 2/5.
WARMUP = {"cyclic": 0.4, "cosine": 0.0, "multistep": 0.0}


@dataclass(frozen=True)
class AttackConfig:
    """The adversary that the network is trained against."""

    epsilon: Radius = "0.2"
    """radius in the L-infinity norm, for images in [0, 1]; write 8/255 as 8/255"""
    steps: int | None = None
    """gradient steps; default 1 for fgsm and free, 7 for pgd, 10 for trades"""
    step_size: Radius | None = None
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

    steps: Annotated[int, at_least(1)] = 10
    """gradient steps"""
    step_size: Radius | None = None
    """step along the gradient's sign; None: 2.5 epsilon / steps"""
    every: Annotated[int, at_least(1)] = 1
    """epochs between two looks; the last epoch is always looked at"""


@dataclass(frozen=True)
class FinalConfig:
    """The attack (PGD, eval mode) on the test images, at the end."""

    steps: Annotated[int, at_least(1)] = 20
    """gradient steps"""
    step_size: Radius | None = "0.02"
    """step along the gradient's sign; None: 2.5 epsilon / steps"""


_BINARY = BinaryConfig()


@dataclass(frozen=True)
class RetrainConfig(TrainingConfig):
    """Everything that decides the result of a retraining. Its hash is the run's id."""

    data: str = "digits"
    """'digits' (embedded) or a path: IDX, CIFAR-10 or image folder, .npz file, parquet; default:
    as in the search's run folder, where one is given"""
    seed: Annotated[int, SEED] = 0
    """decides everything random: weights, split, order, augmentation, attacks, dropped paths"""
    learning_rate: Annotated[float, POSITIVE] = 0.1
    """learning rate of SGD at the peak of the schedule"""
    train_portion: Annotated[float, SHARE] = 0.9
    """share of the training images that train the weights; the rest chooses the best epoch"""
    genotype: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="GENOTYPE|RUN|NAME")] = ""
    """a genotype file, the folder of a search (runs/latest: of the newest) or the name of a
    published genotype"""
    genotype_hash: str | None = None
    """what the genotype must be; filled in from the file"""
    init_channels: Annotated[int | None, at_least(1)] = 16
    """C, the channels of the first cell; None: as in the genotype, or 16"""
    layers: Annotated[int | None, at_least(1)] = 6
    """V, the cells of the network; None: as in the genotype, or 6"""
    denoise_blocks: bool | None = None
    """hand-placed denoising blocks after three of the cells; default: as in the genotype"""
    method: Literal["fgsm", "pgd", "free", "trades", "clean"] = "fgsm"
    """fgsm: one step from a random start; pgd: several; free: every batch several times, the
    perturbation moved by the same backward pass; trades; clean: no adversary"""
    replays: Annotated[int, at_least(1)] = 4
    """free: steps on each batch; an epoch is still one pass over the images"""
    beta: Annotated[float, at_least(0)] = 6.0
    """trades: weight of the divergence"""
    epochs: Annotated[int, at_least(1)] = 30
    """passes over the training images"""
    schedule: Literal["cyclic", "cosine", "multistep"] = "cyclic"
    """learning rate of each step: cyclic (straight up to the peak and down to 0), cosine (down to
    0), multistep (a tenth after 1/2 and again after 3/4 of training)"""
    warmup: Annotated[float | None, Range("a share from 0 to 1", least=0, most=1)] = None
    """share of training in which the rate rises from 0; default 0.4 for cyclic, 0 for the rest"""
    ema_decay: Annotated[float, Range("a number in [0, 1)", least=0, below=1)] = 0.0
    """exponential moving average of the weights, which is then what is validated and kept; the
    factor for each step, such as 0.999; 0: none"""
    auxiliary: bool = False
    """an auxiliary classifier at two thirds of the cells, in training"""
    auxiliary_weight: Annotated[
        float,
        Range("a positive number (--no-auxiliary switches it off)", above=0, below=math.inf),
    ] = 0.4
    """weight of its loss"""
    drop_path_prob: Annotated[float, Range("a number in [0, 1)", least=0, below=1)] = 0.0
    """chance that an operation is dropped for one image, growing linearly from 0 to this"""
    attack: AttackConfig = field(default_factory=AttackConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    binary: Annotated[BinaryConfig, LATER] = _BINARY

    def check(self) -> None:
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
        if self.binary.steps == 2 and self.epochs < 2:
            raise ConfigError(f"binary.steps: expected 1 with {self.epochs} epoch, got 2")
        if self.binary.steps == 1 and self.binary.first != BinaryConfig().first:
            raise ConfigError(
                f"binary.first: expected its default with binary.steps 1, got {self.binary.first}"
            )
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
            steps=STEPS[self.method] if self.attack.steps is None else self.attack.steps,
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
        warmup = WARMUP[self.schedule] if self.warmup is None else self.warmup
        if progress < warmup:
            return self.learning_rate * progress / warmup
        if self.schedule == "multistep":
            return self.learning_rate * 0.1 ** ((progress >= 0.5) + (progress >= 0.75))
        done = (progress - warmup) / (1.0 - warmup)
        if self.schedule == "cosine":
            return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * done))
        return self.learning_rate * (1.0 - done)

    def rate_at(self, epochs: float) -> float:
        """Learning rate after that many epochs, whole or not; each step has the whole schedule."""
        first = self.binary.epochs_of_first(self.epochs)
        if epochs < first:
            return self.rate(epochs / first)
        return self.rate(min((epochs - first) / (self.epochs - first), 1.0))

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
        warmup = WARMUP[self.schedule] if self.warmup is None else self.warmup
        return dataclasses.replace(
            self, device=device, deterministic=deterministic, attack=attack, warmup=warmup
        )


# What each preset changes. Why: docs/retrain.md. The guard costs little in all
# (docs/decisions.md#guard-cost).
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

RetrainConfig.presets = PRESETS
