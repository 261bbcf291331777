"""``python -m fastbandit.search``: the anti-bandit search for a robust architecture.

Algorithm 8 of *Binary Neural Networks* (Zhang, Xu et al.), that is ABanditNAS (Chen et al.,
"Anti-Bandit Neural Architecture Search for Model Defense", ECCV 2020): sample one operation for
every edge, train that path adversarially for one epoch, credit the bandit with its validation
accuracy, and after K * T samples abandon on every edge the arm with the smallest upper bound,
until one is left.
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
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from fastbandit import _cli, _final, retrain, run, space
from fastbandit._cli import ConfigError
from fastbandit._final import EDGES_PER_NODE, Networks
from fastbandit._graphs import Choice, Graphs
from fastbandit._progress import Progress
from fastbandit._running import (
    OutOfMemoryError,
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
from fastbandit.bandit import POLICIES, AntiBandit, replay
from fastbandit.data import Augment, DataSource, ImageSet, Loader, load
from fastbandit.distributed import Group, Team, first_to_speak, launched, synchronise_batchnorm
from fastbandit.genotype import Genotype
from fastbandit.nn.supernet import Supernet
from fastbandit.operations import OperationOptions
from fastbandit.overfitting import MOST_STEPS, GuardConfig, OverfittingGuard, Verdict, stronger
from fastbandit.report import write_report
from fastbandit.run import RunError, RunFolder, derive_seed
from fastbandit.threat import ThreatModel
from fastbandit.training import (
    Cost,
    Engine,
    Evaluation,
    Precision,
    TrainingResult,
    cosine,
    evaluate,
    reestimate_batchnorm,
    reset_batchnorm,
    train_epoch,
)

__all__ = ["PRESETS", "OutOfMemoryError", "SearchConfig", "dry_run", "main", "search"]

# A path that is evaluated without having been trained last gets its batch-norm statistics from
# this many training batches.
_STATISTICS_BATCHES = 8
# Fewer for the paths that are only evaluated during the search, which are meant to be cheap.
_FEW_STATISTICS_BATCHES = 4


@dataclass(frozen=True)
class AttackConfig:
    """The adversary inside the search: one gradient step from a random start, as in Algorithm 8."""

    epsilon: str = "0.2"
    """radius in the L-infinity norm, for images in [0, 1]; write 8/255 as 8/255"""
    steps: int = 1
    """gradient steps: 1 is FGSM, k is PGD-k, 0 searches for clean accuracy"""
    step_size: str | None = None
    """step along the gradient's sign; default 1.25 epsilon for one step, 2.5 epsilon / steps"""
    random_start: bool = True
    """start uniformly in the ball"""
    clip: Literal["image", "none"] = "image"
    """keep x + delta in [0, 1] (image), or not (none: the algorithm as printed)"""
    bn_mode: Literal["train", "eval"] = "train"
    """batch norm while attacking in training; the attack of the reward always uses eval"""


@dataclass(frozen=True)
class BanditConfig:
    """The bandit on every edge (Eqs. 4.9 to 4.13)."""

    policy: str = "printed"
    """how arms are sampled and abandoned: printed (the paper's rule), random (the baseline), ucb1,
    thompson, successive-halving, detrended, ridge or ridge-thompson; see docs/study.md"""
    rate: float = 0.7
    """lambda, the weight of the new accuracy in an arm's running performance"""
    rounds: int = 3
    """T: an arm is abandoned on every edge after K * T samples, K the arms left"""
    bonus: float = 1.0
    """factor on the confidence radius sqrt(2 ln N / n); 1 as printed"""
    scale: float = 1.0
    """factor on the accuracies that are credited, which are in [0, 1]; 100 makes them percent"""
    evaluations_per_epoch: int = 0
    """R: for each path trained in the search phase, so many more are drawn, evaluated with the
    shared weights and credited; they do not count in K * T. 0 as printed"""


@dataclass(frozen=True)
class FinalConfig:
    """What follows the last pruning, and the attack that measures it (PGD, eval mode)."""

    steps: int = 20
    """gradient steps"""
    step_size: str | None = "0.02"
    """step along the gradient's sign; None: 2.5 epsilon / steps"""
    tune_epochs: int = 3
    """epochs that the found path is trained for with the shared weights after the last pruning,
    which leaves a path that was never trained; 0: none, the algorithm as printed"""
    network_epochs: int = 6
    """epochs of training from scratch, for the found network and for each random one; 0: none, and
    the search ends with the accuracy of shared weights, which does not judge an architecture"""
    random_networks: int = 1
    """random networks of the found one's size that are trained from scratch beside it"""
    reference: bool = True
    """train a random network of any size from scratch before the search: the first result, and
    what the search has to beat"""


@dataclass(frozen=True)
class SearchConfig:
    """Everything that decides the result of a search. Its hash is the run's id."""

    name: str = "digits"
    """part of the run folder's name"""
    data: str = "digits"
    """'digits' (embedded) or a path: IDX, CIFAR-10 or image folder, .npz file, parquet"""
    space: str = "robust9-light"
    """search space: general7, robust8 to robust11, or one of their -light twins"""
    seed: int = 0
    """decides everything random: weights, split, order, attacks, bandit"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    threads: int = 0
    """CPU threads, 0: as torch chooses; exact repetition needs the same number"""
    deterministic: bool | None = None
    """deterministic algorithms only; default: yes on a CPU, no on a GPU"""
    init_channels: int = 8
    """C, the channels of the first cell"""
    denoise: Literal["dot", "gaussian", "mean", "median"] = "dot"
    """the non-local mean of the denoising block"""
    gabor: Literal["pixels", "released"] = "pixels"
    """parameterisation of the Gabor filters: ours, in pixels, or that of the released code"""
    edges_per_node: Literal["all", "1", "2"] = "all"
    """incoming edges each node keeps in the genotype: all (the text), or those of largest m"""
    reward: Literal["auto", "robust", "clean", "mix"] = "auto"
    """validation accuracy that is credited; auto: robust if the search is adversarial"""
    train_portion: float = 0.5
    """share of the training images that train the weights; the rest gives the reward"""
    train_limit: int | None = None
    """use only so many training images (a stratified choice)"""
    test_limit: int | None = None
    """use only so many test images (a stratified choice)"""
    batch_size: int = 64
    """images in a mini-batch"""
    evaluation_batch_size: int = 256
    """images in a batch of validation and test; larger is faster on small images"""
    learning_rate: float = 0.025
    """of SGD at the start; a cosine over the search"""
    learning_rate_min: float = 0.0125
    """of SGD at the end; with 0 the last paths, each new, hardly adapt to the shared weights"""
    momentum: float = 0.9
    """of SGD"""
    weight_decay: float = 3e-4
    """of SGD"""
    grad_clip: float | None = 5.0
    """largest 2-norm of the gradient"""
    crop_padding: int = 0
    """random crop after zero padding by so many pixels"""
    flip: bool = False
    """random horizontal flip"""
    cutout_length: int = 0
    """side of the square that is cut out at random, in pixels"""
    precision: Precision = "float32"
    """of convolutions and matrix products; bfloat16 leaves weights, statistics and loss float32"""
    graphs: Choice = "auto"
    """CUDA graphs: a path's step is recorded once and replayed; auto: where that is possible"""
    channels_last: bool = True
    """memory layout of images and weights; the kernels of this package are made for it"""
    parallel: Literal["data", "paths"] = "data"
    """with several processes (torchrun): data divides each batch of the one path, paths trains a
    path on each process and averages gradients; the number of processes is not a setting"""
    sync_batchnorm: bool = False
    """with several processes: batch statistics over all of them, not over each one's images"""
    attack: AttackConfig = field(default_factory=AttackConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    # Less often than in retraining: an epoch of a search is short. 2.2 % of the time on digits.
    guard: GuardConfig = field(default_factory=lambda: GuardConfig(every=5))

    def __post_init__(self) -> None:
        _cli.keep_plain_numbers(self)
        space.get(self.space)
        if self.bandit.policy not in POLICIES:
            raise ConfigError(
                f"bandit.policy: expected one of {', '.join(sorted(POLICIES))}, "
                f"got {self.bandit.policy!r}"
            )
        checks = (
            ("seed", self.seed, 0 <= self.seed < 2**63, "a whole number in [0, 2^63)"),
            ("threads", self.threads, self.threads >= 0, "0 or more"),
            (
                "init_channels",
                self.init_channels,
                self.init_channels >= 2 and self.init_channels % 2 == 0,
                "an even number >= 2",
            ),
            (
                "train_portion",
                self.train_portion,
                0 < self.train_portion < 1,
                "a share between 0 and 1",
            ),
            ("batch_size", self.batch_size, self.batch_size >= 2, "2 or more"),
            (
                "evaluation_batch_size",
                self.evaluation_batch_size,
                self.evaluation_batch_size >= 1,
                "1 or more",
            ),
            (
                "learning_rate",
                self.learning_rate,
                math.isfinite(self.learning_rate) and self.learning_rate > 0,
                "a positive number",
            ),
            (
                "learning_rate_min",
                self.learning_rate_min,
                0 <= self.learning_rate_min <= self.learning_rate,
                f"0 to learning_rate ({self.learning_rate})",
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
            ("crop_padding", self.crop_padding, self.crop_padding >= 0, "0 or more"),
            ("cutout_length", self.cutout_length, self.cutout_length >= 0, "0 or more"),
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
            (
                "bandit.scale",
                self.bandit.scale,
                math.isfinite(self.bandit.scale) and self.bandit.scale > 0,
                "a positive number",
            ),
            (
                "bandit.evaluations_per_epoch",
                self.bandit.evaluations_per_epoch,
                self.bandit.evaluations_per_epoch >= 0,
                "0 or more",
            ),
            *(
                (f"final.{name}", value, value >= 0, "0 or more")
                for name, value in (
                    ("tune_epochs", self.final.tune_epochs),
                    ("network_epochs", self.final.network_epochs),
                    ("random_networks", self.final.random_networks),
                )
            ),
        )
        for name, value, good, expected in checks:
            if not good:
                raise ConfigError(f"{name}: expected {expected}, got {value!r}")
        if self.sync_batchnorm and self.parallel == "paths":
            raise ConfigError(
                "sync_batchnorm: expected no with parallel paths, where each process computes "
                "another path and there is nothing to share; got yes"
            )
        self.guard.check()
        self.training_threat()
        self.final_threat()
        if self.final.network_epochs:
            _final.retrain_config(self, _final.FOUND)
        self._bandit(1, 2)

    def _bandit(self, rows: int, arms: int) -> AntiBandit:
        return AntiBandit(
            rows,
            arms,
            policy=self.bandit.policy,
            rate=self.bandit.rate,
            rounds=self.bandit.rounds,
            bonus=self.bandit.bonus,
            scale=self.bandit.scale,
            seed=derive_seed(self.seed, "bandit"),
        )

    def make_bandit(self) -> AntiBandit:
        """The bandit of this search: a row for each edge of each cell, an arm an operation."""
        found = space.get(self.space)
        return self._bandit(found.rows, len(found.operations))

    def training_threat(self) -> ThreatModel:
        """The adversary of the training step."""
        clip = self.attack.clip == "image"
        return ThreatModel(
            epsilon=self.attack.epsilon,
            lower=0.0 if clip else None,
            upper=1.0 if clip else None,
            step_size=self.attack.step_size,
            steps=self.attack.steps,
            random_start=self.attack.random_start,
            bn_mode=self.attack.bn_mode,
        )

    def reward_threat(self) -> ThreatModel:
        """The training step's attack in eval mode; FGSM where the search is a clean one."""
        return dataclasses.replace(
            self.training_threat(), bn_mode="eval", steps=max(1, self.attack.steps)
        )

    def final_threat(self) -> ThreatModel:
        """PGD for the figures at the end; it always respects the image's bounds."""
        return ThreatModel(
            epsilon=self.attack.epsilon,
            step_size=self.final.step_size,
            steps=self.final.steps,
            random_start=True,
            bn_mode="eval",
        )

    def resolve(self) -> SearchConfig:
        """The same configuration with every ``auto`` replaced by what it means here."""
        device, deterministic = resolve_device(self.device, self.deterministic)
        reward = self.reward
        if reward == "auto":
            reward = "robust" if self.training_threat().attacks else "clean"
        return dataclasses.replace(self, device=device, reward=reward, deterministic=deterministic)


# What each preset changes. Learning rates, batches and radii are those of the paper's authors as
# far as they are known. The digits are ours: so small a set gives few steps in an epoch, and with
# batches of 64 instead of 128 and a floor under the learning rate the shared weights reached 60 to
# 74 % clean and 30 to 38 % robust accuracy late in a search, instead of 20 % and 10 %.
PRESETS: dict[str, dict[str, Any]] = {
    # Minutes on two cores: a third of the epochs of the printed T, on half of the training images.
    "digits": {"train_limit": 2000, "bandit": {"rounds": 1}, "final": {"network_epochs": 10}},
    "digits-full": {"final": {"network_epochs": 30}},
    "smoke": {
        "name": "smoke",
        "init_channels": 4,
        "train_limit": 256,
        "test_limit": 256,
        "batch_size": 64,
        "bandit": {"rounds": 1},
        "final": {"steps": 5, "step_size": "0.05", "tune_epochs": 1, "network_epochs": 6},
    },
    "mnist": {
        "name": "mnist",
        "data": "mnist",
        "space": "robust9",
        "init_channels": 16,
        "batch_size": 512,
        "evaluation_batch_size": 512,
        "learning_rate": 0.025,
        "learning_rate_min": 0.0,
        "attack": {"epsilon": "0.3"},
        "final": {"steps": 40, "step_size": "0.01", "network_epochs": 5},
    },
    "cifar10": {
        "name": "cifar10",
        "data": "cifar10",
        "space": "robust9",
        "init_channels": 16,
        "batch_size": 512,
        "evaluation_batch_size": 512,
        "learning_rate": 0.1,
        "learning_rate_min": 0.0,
        "crop_padding": 4,
        "flip": True,
        "cutout_length": 16,
        "attack": {"epsilon": "8/255"},
        "final": {"steps": 20, "step_size": "2/255", "network_epochs": 10},
    },
}


@dataclass(frozen=True)
class Options(_cli.CommonOptions):
    """What to do with the configuration; none of it changes a result."""

    preset: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """settings to start from: digits (the default where no --data is given), digits-full, smoke,
    mnist, cifar10"""
    out: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """run folder; default: an unfinished run of this configuration below runs/, else a new one"""
    resume: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """go on with the run in this folder, with the configuration stored there"""
    force: bool = False
    """replace a finished run, or one of another configuration, in --out"""
    peer_timeout: float = 600.0
    """seconds to wait for another process of the run before it counts as gone"""
    dry_run: bool = False
    """measure the widest path, print memory and time that the search will take, and stop"""


@dataclass(frozen=True)
class _Command:
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    config: Annotated[SearchConfig, tyro.conf.arg(name="")] = field(default_factory=SearchConfig)


# --- the search -----------------------------------------------------------------------------


@dataclass
class _Setup:
    """What is built from the configuration alone, the same at every start."""

    config: SearchConfig
    device: torch.device
    source: DataSource
    splits: dict[str, Any]
    supernet: Supernet
    optimizer: torch.optim.SGD
    weights: Loader
    statistics: Loader
    validation: Loader
    guard: Loader
    test: Loader | None


def _build(
    config: SearchConfig, group: Group | None = None, source: DataSource | None = None
) -> _Setup:
    device = torch.device(config.device) if group is None else group.device
    source = load(config.data) if source is None else source
    parts = divide(source, config)
    train = parts.train.to(device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def loader(images: ImageSet, index: Tensor, purpose: str, shuffle: bool) -> Loader:
        return Loader(
            images,
            index,
            batch_size=config.batch_size if shuffle else config.evaluation_batch_size,
            device=device,
            augment=Augment(
                crop_padding=config.crop_padding,
                flip=config.flip,
                cutout_length=config.cutout_length,
            )
            if shuffle
            else None,
            seed=derive_seed(config.seed, purpose),
            shuffle=shuffle,
            # A last batch of one image has no batch statistics on 1 x 1 maps.
            drop_last=shuffle and len(index) % config.batch_size == 1,
            memory_format=layout,
        )

    # The initial weights come from the run's own seed, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        supernet = Supernet(
            space.get(config.space),
            in_channels=train.images.shape[1],
            classes=source.classes,
            channels=config.init_channels,
            mean=parts.mean,
            std=parts.std,
            options=OperationOptions.of(config),
        )
    # Channels-last is the faster layout for the depthwise and the dense convolutions alike; what
    # the stem returns has the layout of its weights, and the rest follows.
    supernet.to(device).to(memory_format=layout)  # type: ignore[call-overload]
    if group is not None and config.sync_batchnorm:
        synchronise_batchnorm(supernet, group)
    test_loader = None
    if parts.test is not None and parts.test_index is not None:
        test_loader = loader(parts.test.to(device), parts.test_index, "test", False)
    return _Setup(
        config,
        device,
        source,
        parts.splits,
        supernet,
        sgd(supernet, config, device),
        weights=loader(train, parts.weights, "order", True),
        statistics=loader(train, parts.weights, "statistics", True),
        validation=loader(train, parts.validation, "validation", False),
        guard=loader(train, parts.guard, "guard", False),
        test=test_loader,
    )


class _Folder(RunFolder):
    """The folder of a search, with the runs of the networks trained from scratch in it."""

    TREES = (_final.FOLDER,)


class _Search:
    """A search in progress: its state, one epoch, and how the state goes to disk and back.

    Args:
        folder: where files go; None for a process that writes none.
        group: all processes of the run; None where there is one.
    """

    def __init__(self, setup: _Setup, folder: RunFolder | None, group: Group | None = None) -> None:
        self.setup, self.folder, self.config = setup, folder, setup.config
        self.group = group
        self.supernet = setup.supernet
        self.space = space.get(self.config.space)
        self.bandit = self.config.make_bandit()
        self.cost = Cost()
        self.engine = Engine(
            self.config.precision,
            Graphs(self.config.graphs, setup.device, processes=1 if group is None else group.size),
        )
        self.training_threat = self.config.training_threat()
        self.reward_threat = self.config.reward_threat()
        self.guard: OverfittingGuard | None = None
        if self.config.guard.enabled and self.training_threat.attacks:
            self.guard = OverfittingGuard(
                setup.guard,
                seed=derive_seed(self.config.seed, "attack", "guard"),
                steps=self.config.guard.steps,
            )
        # Each time that catastrophic overfitting was found.
        self.overfitting: list[dict[str, Any]] = []
        self.round = 0
        # Epochs of the found path after the last pruning.
        self.tuned = 0
        self.peak_memory = 0.0
        self.last: Evaluation | None = None

    # State on disk.

    def _momenta(self) -> dict[str, Tensor]:
        state = self.setup.optimizer.state
        return {
            name: state[parameter]["momentum_buffer"]
            for name, parameter in self.supernet.named_parameters()
            if state.get(parameter, {}).get("momentum_buffer") is not None
        }

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that :meth:`restore` needs."""
        bandit = self.bandit.state_dict()
        tensors = {f"model.{k}": v for k, v in self.supernet.state_dict().items()}
        tensors |= {f"momentum.{k}": v for k, v in self._momenta().items()}
        tensors |= {f"bandit.{k}": v for k, v in bandit.items() if isinstance(v, Tensor)}
        state = {
            "round": self.round,
            "tuned": self.tuned,
            "cost": self.cost.state_dict(),
            "peak_memory_mb": self.peak_memory,
            "overfitting": self.overfitting,
            "bandit": {k: v for k, v in bandit.items() if not isinstance(v, Tensor)},
        }
        return tensors, state

    def save(self) -> None:
        if self.folder is not None:
            self.folder.save_checkpoint(*self.state())

    def append(self, name: str, *values: dict[str, Any]) -> None:
        if self.folder is not None:
            self.folder.append(name, *values)

    def share(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Give every process the first one's state; returns its ``facts``."""
        assert self.group is not None
        tensors, state = self.state()
        found, tensors = self.group.broadcast({"facts": facts, "state": state}, tensors)
        if self.group.rank:
            self.restore(tensors, found["state"])
        facts = found["facts"]
        return facts

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "bandit": {}}
        for name, tensor in tensors.items():
            group, _, rest = name.partition(".")
            parts[group][rest] = tensor
        try:
            self.bandit.load_state_dict({**state["bandit"], **parts["bandit"]})
            self.supernet.load_state_dict(parts["model"])
        except (ValueError, RuntimeError) as error:
            raise run.CheckpointError(
                f"the checkpoint does not fit this search: {str(error).splitlines()[0]}"
            ) from None
        named = dict(self.supernet.named_parameters())
        for name, buffer in parts["momentum"].items():
            # In the layout of the weight, which a file does not keep: the fused step asks for it.
            parameter = named[name]
            momentum = torch.empty_like(parameter, requires_grad=False).copy_(buffer)
            self.setup.optimizer.state[parameter]["momentum_buffer"] = momentum
        self.cost.load_state_dict(state["cost"])
        self.round = state["round"]
        self.tuned = state.get("tuned", 0)
        self.overfitting = state.get("overfitting", [])
        self.training_threat = self.config.training_threat()
        self.reward_threat = self.config.reward_threat()
        for _ in self.overfitting:
            self._strengthen()
        self.peak_memory = state["peak_memory_mb"]

    # One sample of Algorithm 8.

    def start_line(self) -> dict[str, Any]:
        """The first line of the bandit's log: what it takes to replay the rest."""
        config, found = self.config, self.space
        line: dict[str, Any] = {
            "event": "start",
            "space": config.space,
            "operations": list(found.operations),
            "edges": [found.edge_name(row) for row in range(found.rows)],
            "policy": config.bandit.policy,
            "rate": config.bandit.rate,
            "rounds": config.bandit.rounds,
            "bonus": config.bandit.bonus,
            "scale": config.bandit.scale,
            "seed": derive_seed(config.seed, "bandit"),
        }
        if config.bandit.evaluations_per_epoch:
            line["evaluations_per_epoch"] = config.bandit.evaluations_per_epoch
        return line

    def reward_of(self, evaluation: Evaluation) -> float:
        return {
            "robust": evaluation.robust_accuracy,
            "clean": evaluation.clean_accuracy,
            "mix": 0.5 * (evaluation.robust_accuracy + evaluation.clean_accuracy),
        }[self.config.reward]

    @property
    def abreast(self) -> int:
        """Paths that are trained at a time."""
        paths = self.group is not None and self.config.parallel == "paths"
        return self.group.size if paths and self.group is not None else 1

    def team(self, paths: int) -> Team | None:
        """The processes that share this one's path when ``paths`` are computed at a time."""
        return None if self.group is None else Team(self.group, paths)

    def use_path(self, choices: Sequence[Tensor], team: Team | None) -> dict[str, Any]:
        """Select this process's path of ``choices``; returns what bounds the work to it."""
        mine = 0 if team is None else team.path
        parameters = []
        for choice in choices:
            self.supernet.set_path(choice)
            parameters.append(list(self.supernet.path_parameters()))
        self.supernet.set_path(choices[mine])
        # The optimiser's state is kept by parameter, so momentum of the other arms stays. What
        # another process's path uses is updated here too: all hold the same weights.
        updated = parameters[0] if team is None else team.use(parameters)
        self.setup.optimizer.param_groups[0]["params"] = updated
        return {
            "modules": list(self.supernet.path_modules()),
            "parameters": parameters[mine],
            "team": team,
            "engine": self.engine,
        }

    def draw(self, paths: int, *, trained: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Paths from the bandit and the probability of each of their arms, [rows] each."""
        choices, probabilities = [], []
        for _ in range(paths):
            law = self.bandit.probabilities()
            choice = self.bandit.sample(trained=trained, ahead=True)
            choices.append(choice)
            probabilities.append(law.gather(1, choice.unsqueeze(1)).squeeze(1))
        if self.group is not None:
            # Every process draws the same from the same state; if not, nothing after it is right.
            self.group.check_same("the path drawn", torch.stack(choices))
        return choices, probabilities

    def accounting(self, team: Team | None) -> AbstractContextManager[None]:
        """What the processes compute in this context enters the ledger of each, counted once."""
        return accounting(self.cost, team)

    def validate(self, path: dict[str, Any], number: int) -> Evaluation:
        """Accuracy of the path on the validation images, for the reward.

        The random starts are those of the epoch, so the paths of one epoch meet the same attack.
        """
        return evaluate(
            self.supernet,
            self.setup.validation,
            self.reward_threat,
            seed=derive_seed(self.config.seed, "attack", "validation"),
            offset=number,
            cost=self.cost,
            **path,
        )

    def _strengthen(self) -> None:
        self.training_threat = stronger(self.training_threat)
        # The reward's attack is the training step's.
        self.reward_threat = dataclasses.replace(self.training_threat, bn_mode="eval")

    def check(self, number: int, paths: int, path: dict[str, Any]) -> Verdict | None:
        """Look for catastrophic overfitting where it is time to; None where it is not."""
        every = self.config.guard.every
        if self.guard is None or (number + paths) // every == number // every:
            return None
        with self.accounting(path["team"]):
            found = self.guard.measure(self.supernet, self.training_threat, cost=self.cost, **path)
        return self.guard.judge(*(_of_all_paths(path["team"], one) for one in found))

    def overfitted(self, number: int, verdict: Verdict) -> dict[str, Any]:
        """Train against a stronger attack from now on; returns the line for the bandit's log."""
        self._strengthen()
        line = {
            "event": "attack",
            "sample": self.bandit.samples,
            "epoch": number,
            "trained": verdict.trained,
            "strong": verdict.strong,
            "steps": self.training_threat.steps,
            "attack": self.training_threat.describe(),
        }
        self.overfitting.append(line)
        return line

    @contextmanager
    def noting_overfitting(self, progress: Progress) -> Iterator[None]:
        """Show what the guard finds within the context."""
        before = len(self.overfitting)
        yield
        for line in self.overfitting[before:]:
            progress.note(
                f"catastrophic overfitting in epoch {line['epoch']}: accuracy "
                f"{100 * line['trained']:.1f} % under the training attack, "
                f"{100 * line['strong']:.1f} % under a stronger one; on with {line['attack']}"
            )

    def credit(
        self, choice: Tensor, probability: Tensor, evaluation: Evaluation, *, trained: bool
    ) -> dict[str, Any]:
        """Credit a path with its reward; returns the line for the bandit's log."""
        reward = self.reward_of(evaluation)
        line: dict[str, Any] = {
            "event": "sample",
            "sample": self.bandit.samples,
            "phase": self.bandit.phase,
            "choice": choice.tolist(),
            "probability": probability.tolist(),
            "clean_accuracy": evaluation.clean_accuracy,
            "robust_accuracy": evaluation.robust_accuracy,
            "reward": reward,
        }
        if not trained:
            line["trained"] = False
        self.bandit.credit(choice, reward, trained=trained)
        return line

    def evaluate_only(self, number: int, paths: int) -> list[dict[str, Any]]:
        """Draw paths, evaluate them with the weights as they are, credit them; their lines."""
        choices, probabilities = self.draw(paths, trained=False)
        team = self.team(paths)
        path = self.use_path(choices, team)
        with self.accounting(team):
            self.reestimate(path, _FEW_STATISTICS_BATCHES)
            evaluation = self.validate(path, number)
        found = _of_all_paths(team, evaluation)
        return [
            self.credit(*each, trained=False)
            for each in zip(choices, probabilities, found, strict=True)
        ]

    def reestimate(self, path: dict[str, Any], batches: int) -> None:
        """Batch-norm statistics for a path that was not trained last."""
        reestimate_batchnorm(
            self.supernet,
            self.setup.statistics,
            self.training_threat,
            count=batches,
            seed=derive_seed(self.config.seed, "attack", "statistics"),
            cost=self.cost,
            **path,
        )

    def epoch(self) -> dict[str, Any]:
        """Sample, train, validate, credit, perhaps prune; log and save. Returns the metrics.

        With ``parallel paths`` that is one epoch of several paths, numbered one after the other:
        as many as there are processes, or as are left of the round or of the initial pass.
        """
        bandit, config = self.bandit, self.config
        started, accounted = time.perf_counter(), sum(self.cost.seconds.values())
        number, phase, arms = bandit.trained, bandit.phase, bandit.arms_left
        steps = self.training_threat.steps
        choices, probabilities = self.draw(min(self.abreast, bandit.room), trained=True)
        paths = len(choices)
        team = self.team(paths)
        mine = number if team is None else number + team.path
        path = self.use_path(choices, team)
        rate = cosine(number, bandit.total_samples, config.learning_rate, config.learning_rate_min)
        trained, evaluation, verdict, lines = self.train_path(path, number, mine, paths, rate)
        results = [trained]
        if team is not None:
            values = team.collect([trained.loss, trained.accuracy, trained.images])
            results = [
                dataclasses.replace(trained, loss=loss, accuracy=accuracy, images=int(images))
                for loss, accuracy, images in values
            ]
        evaluations = _of_all_paths(team, evaluation)
        self.last = evaluations[-1]
        credited = [
            self.credit(*each, trained=True)
            for each in zip(choices, probabilities, evaluations, strict=True)
        ]
        rewards = [line["reward"] for line in credited]
        lines += credited
        # Before the arms are judged, so that the judgement has them too.
        rest = config.bandit.evaluations_per_epoch * paths if phase == "search" else 0
        while rest:
            lines += self.evaluate_only(number, min(self.abreast, rest))
            rest -= min(self.abreast, rest)
        while bandit.due:
            lines += self.prune()
        if bandit.finished:
            lines.append(
                {"event": "end", "sample": bandit.samples, "choice": bandit.final().tolist()}
            )
        seconds = time.perf_counter() - started
        self.cost.add_seconds("other", seconds - (sum(self.cost.seconds.values()) - accounted))
        self.peak_memory = max(self.peak_memory, run.peak_memory_mb(self.setup.device))
        images = sum(result.images for result in results)
        metrics = [
            {
                "epoch": number + i,
                "phase": phase,
                "arms": arms,
                "samples": bandit.samples,
                "loss": result.loss,
                "train_accuracy": result.accuracy,
                "clean_accuracy": found.clean_accuracy,
                "robust_accuracy": found.robust_accuracy,
                "reward": reward,
                "attack_steps": steps,
                "overfitting": None if verdict is None else verdict.to_dict(),
                "learning_rate": rate,
                # The paths were trained at the same time: each has its share of it.
                "seconds_train": trained.seconds / paths,
                "seconds_validate": evaluation.seconds / paths,
                "seconds_total": seconds / paths,
                "images_per_second": images / trained.seconds,
                "peak_memory_mb": self.peak_memory,
            }
            for i, (result, found, reward) in enumerate(
                zip(results, evaluations, rewards, strict=True)
            )
        ]
        self.append("bandit.jsonl", *lines)
        self.append("metrics.jsonl", *metrics)
        self.save()
        return metrics[-1]

    def train_path(
        self, path: dict[str, Any], number: int, mine: int, paths: int, rate: float
    ) -> tuple[TrainingResult, Evaluation, Verdict | None, list[dict[str, Any]]]:
        """One epoch of this process's path, epoch ``mine`` of the ``paths`` from ``number`` on.

        Returns:
            The training, the validation, what the guard found where it looked, and its lines for
            the bandit's log.
        """
        self.setup.optimizer.param_groups[0]["lr"] = rate
        reset_batchnorm(path["modules"])
        with self.accounting(path["team"]):
            trained = train_epoch(
                self.supernet,
                self.setup.weights,
                mine,
                self.setup.optimizer,
                self.training_threat,
                seed=derive_seed(self.config.seed, "attack", "train"),
                cost=self.cost,
                grad_clip=self.config.grad_clip,
                **path,
            )
            evaluation = self.validate(path, mine)
        verdict = self.check(number, paths, path)
        lines = []
        if verdict is not None and verdict.overfitted and self.training_threat.steps < MOST_STEPS:
            lines.append(self.overfitted(number, verdict))
            # A path is not credited with an accuracy that the overfitting has made up.
            with self.accounting(path["team"]):
                evaluation = self.validate(path, mine)
        return trained, evaluation, verdict, lines

    def tune(self) -> dict[str, Any]:
        """Train the found path for one more epoch; log and save. Returns the metrics.

        The last pruning leaves a path that was never trained as a whole: its accuracy would say
        nothing. The learning rate falls from that of the search's beginning to 0.
        """
        config, tuning = self.config, self.config.final.tune_epochs
        started, accounted = time.perf_counter(), sum(self.cost.seconds.values())
        number, steps = self.bandit.trained + self.tuned, self.training_threat.steps
        path = self.use_path([self.bandit.final()], self.team(1))
        rate = cosine(self.tuned, tuning, config.learning_rate)
        # The bandit's log has ended; a stronger attack is in the metrics and in the summary.
        trained, evaluation, verdict, _ = self.train_path(path, number, number, 1, rate)
        self.tuned += 1
        seconds = time.perf_counter() - started
        self.cost.add_seconds("other", seconds - (sum(self.cost.seconds.values()) - accounted))
        self.peak_memory = max(self.peak_memory, run.peak_memory_mb(self.setup.device))
        metrics = {
            "epoch": number,
            "phase": "tuning",
            "arms": self.bandit.arms_left,
            "samples": self.bandit.samples,
            "loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "clean_accuracy": evaluation.clean_accuracy,
            "robust_accuracy": evaluation.robust_accuracy,
            "attack_steps": steps,
            "overfitting": None if verdict is None else verdict.to_dict(),
            "learning_rate": rate,
            "seconds_train": trained.seconds,
            "seconds_validate": evaluation.seconds,
            "seconds_total": seconds,
            "images_per_second": trained.images / trained.seconds,
            "peak_memory_mb": self.peak_memory,
        }
        self.append("metrics.jsonl", metrics)
        self.save()
        return metrics

    def prune(self) -> list[dict[str, Any]]:
        """Abandon one arm on every edge; returns the lines that say which and why."""
        bandit = self.bandit
        lower, upper = (bound.tolist() for bound in bandit.bounds())
        mean, count = bandit.mean.tolist(), bandit.count.tolist()
        score = bandit.score().tolist()
        abandoned = bandit.prune().tolist()
        self.round += 1
        lines = []
        for row, arm in enumerate(abandoned):
            if arm < 0:
                continue
            lines.append(
                {
                    "event": "abandon",
                    "sample": bandit.samples,
                    "round": self.round,
                    "row": row,
                    "cell": self.space.edge_name(row).partition(":")[0],
                    "edge": self.space.edge_name(row),
                    "arm": arm,
                    "operation": self.space.operations[arm],
                    "mean": mean[row][arm],
                    "count": count[row][arm],
                    "lower": lower[row][arm],
                    "upper": upper[row][arm],
                    "score": score[row][arm],
                    "total": sum(count[row]),
                    "arms_left": bandit.arms_left,
                }
            )
        self.append(
            "genotypes.jsonl",
            {
                "sample": bandit.samples,
                "arms_left": bandit.arms_left,
                "choice": bandit.final().tolist(),
                "genotype": self.genotype().to_dict(),
            },
        )
        return lines

    def genotype(self) -> Genotype:
        """The best arm of every edge so far; at the end the only one."""
        return Genotype.from_choices(
            self.space,
            self.bandit.final().tolist(),
            mean=self.bandit.score().tolist(),
            edges_per_node=EDGES_PER_NODE[self.config.edges_per_node],
            options=OperationOptions.of(self.config),
            macro={"layers": self.space.cell_types, "channels": self.config.init_channels},
            search={
                "run_id": self.folder_id,
                "seed": self.config.seed,
                "samples": self.bandit.samples,
                "policy": self.config.bandit.policy,
                "data": self.setup.source.name,
                "threat": self.reward_threat.to_dict(),
            },
        )

    @property
    def folder_id(self) -> str:
        return run.run_id(_cli.to_plain(self.config))

    def finish(self, networks: Networks) -> dict[str, Any]:
        """Check that the log explains the result, measure the found path, train the found network
        and random ones from scratch, write the last files."""
        bandit, config, folder = self.bandit, self.config, self.folder
        if folder is not None:
            explained = replay(folder.lines("bandit.jsonl")).final()
            if not torch.equal(explained, bandit.final()):
                raise RunError(
                    f"{folder.path}: bandit.jsonl does not explain the genotype found; "
                    "it was changed by another hand"
                )
        team = self.team(1)
        path = self.use_path([bandit.final()], team)
        if not self.tuned:
            with self.accounting(team):
                self.reestimate(path, _STATISTICS_BATCHES)

        def measure(name: str, loader: Loader, threat: ThreatModel) -> dict[str, Any]:
            with self.accounting(team):
                found = evaluate(
                    self.supernet,
                    loader,
                    threat,
                    seed=derive_seed(config.seed, "attack", "final", name),
                    cost=self.cost,
                    **path,
                )
            return {
                "split": name,
                "n": found.images,
                "clean_accuracy": found.clean_accuracy,
                "robust_accuracy": found.robust_accuracy,
                "attack": threat.describe(),
            }

        threat = config.final_threat()
        final = measure("validation", self.setup.validation, threat)
        test = None if self.setup.test is None else measure("test", self.setup.test, threat)
        genotype = self.genotype()
        if folder is not None:
            genotype.save(folder.path / "genotype.json")
            run.save_tensors(
                folder.path / "weights.safetensors",
                dict(self.supernet.state_dict()),
                "supernet",
                {"run_id": self.folder_id, "genotype": genotype.to_dict()},
            )
        networks.train_found(genotype)
        if folder is None:
            return self.told_summary(None)
        self.peak_memory = max(self.peak_memory, run.peak_memory_mb(self.setup.device))
        cost = self.cost
        summary = {
            "status": "finished",
            "run_id": self.folder_id,
            "name": config.name,
            "genotype": "genotype.json",
            "genotype_hash": genotype.hash,
            "data": {
                "name": self.setup.source.name,
                "description": self.setup.source.description,
                "weights": len(self.setup.splits["weights"]),
                "validation": len(self.setup.splits["validation"]),
                "test": len(self.setup.splits["test"]),
                "classes": self.setup.source.classes,
            },
            "selection": "the last arm on every edge; nothing is chosen by the test images",
            "threat": config.training_threat().to_dict(),
            "overfitting": self.overfitting,
            "reward": config.reward,
            "networks": networks.rows,
            "chance": _final.chance(self.setup.source, config),
            "final": final,
            "test": test,
            "cost": {
                "epochs": bandit.trained,
                "epochs_tuning": self.tuned,
                "paths_only_evaluated": bandit.samples - bandit.trained,
                "seconds_total": sum(cost.seconds.values()),
                **{f"seconds_{phase}": value for phase, value in cost.seconds.items()},
                "images_per_second": cost.images_trained / cost.seconds["train"],
                "images_trained": cost.images_trained,
                "images_evaluated": cost.images_evaluated,
                "forward_passes": cost.forward_passes,
                "backward_passes": cost.backward_passes,
                "peak_memory_mb": self.peak_memory,
                "device": config.device,
                "graphs": self.engine.records,
                "threads": torch.get_num_threads(),
                "processes": 1 if self.group is None else self.group.size,
            },
            "versions": {"torch": torch.__version__, "fastbandit": run.__version__},
        }
        # The summary is what makes a run finished, so it comes last; the report shows it.
        write_report(folder.path, summary=summary)
        folder.write_json("summary.json", summary)
        return self.told_summary(summary)

    def told_summary(self, summary: dict[str, Any] | None) -> dict[str, Any]:
        """The summary of the process that has written it, on every process, once it is there."""
        if self.group is not None:
            summary, _ = self.group.broadcast(summary, {})
        assert summary is not None
        return summary


def _of_all_paths(team: Team | None, mine: Evaluation) -> list[Evaluation]:
    """The evaluation of every path that was computed at the same time, on every process."""
    if team is None:
        return [mine]
    found = team.collect([mine.clean_correct, mine.robust_correct, mine.images])
    return [
        Evaluation(int(clean), int(robust), int(images), mine.seconds)
        for clean, robust, images in found
    ]


def search(
    config: SearchConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    progress: Progress | None = None,
    group: Group | None = None,
    source: DataSource | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Run a search to its end, or go on with one that was interrupted.

    Args:
        config: the settings; see :class:`SearchConfig`.
        out: run folder; None: an unfinished run of the same configuration below ``root``, else a
            new folder there.
        force: replace what a finished or a different run left in ``out``.
        progress: where progress is shown; None shows none.
        group: the processes that run this search together, each of them calling this function;
            None: this one alone. Only the first reads and writes files, and shows progress.
        source: the images, for instance :func:`fastbandit.data.load` of a torch Dataset; None:
            those that ``config.data`` names. To go on with a run, give the same images again:
            their digest is stored and compared.

    Returns:
        The run folder and its summary; of a finished run of the same configuration in ``out``
        those that are stored, unless ``force`` is given.

    Raises:
        OutOfMemoryError: there is not enough memory; the run goes on from its last epoch.
        ValueError: settings, data, run folder or checkpoint cannot be used; the message says why.
        OSError: a file could not be written; the run goes on from its last checkpoint.
    """
    config = config.resolve()
    plain = _cli.to_plain(config)
    progress = progress or Progress.silent()
    check_group_device(config.device, group)
    # Before there is a run folder: what cannot be is said and leaves nothing behind.
    Graphs(config.graphs, torch.device(config.device), processes=1 if group is None else group.size)
    enough = partial(memory_enough_for, config.batch_size, config.evaluation_batch_size)
    with torch_settings(config.threads, bool(config.deterministic)), ExitStack() as stack:
        started = time.perf_counter()
        setup = _build(config, group, source)
        folder = None
        if group is None or group.rank == 0:
            if out is not None:
                path = Path(out)
            else:
                unfinished = RunFolder.find_unfinished(Path(root), plain)
                path = unfinished or RunFolder.fresh_path(Path(root), config.name)
            folder = stack.enter_context(_Folder.open(path, plain, force=force))
        else:
            progress = Progress.silent()
        if (done := finished_before(folder, group, progress, setup.splits)) is not None:
            return done
        current = _Search(setup, folder, group)
        graphs = current.engine.graphs
        if graphs is not None and graphs.reason and setup.device.type == "cuda":
            progress.note(f"no CUDA graphs: {graphs.reason}")
        resumed = False
        if folder is not None:
            resumed = folder.load_checkpoint(current.restore)
            check_same(folder, "split.json", setup.splits)
            environment = run.environment(setup.device)
            environment["processes"] = 1 if group is None else group.size
            if resumed:
                note_changes(progress, folder.read_json("env.json"), environment)
            else:
                folder.write_json("env.json", environment)
                folder.append("bandit.jsonl", current.start_line())
                current.cost.add_seconds("setup", time.perf_counter() - started)
                current.save()
        if group is not None:
            digest = derive_seed(0, json.dumps(setup.splits))
            group.check_same("the data", torch.tensor(digest))
            facts = current.share({"path": str(folder.path) if folder else ""})
            path = Path(facts["path"])
        networks = Networks(config, path, setup.source, progress, group)
        networks.train_reference()
        bandit = current.bandit
        with progress.running(
            path, config.space, current.space.rows, bandit, resumed=resumed
        ) as show:
            while not bandit.finished:
                with enough(f"in epoch {bandit.trained}"), current.noting_overfitting(progress):
                    metrics = current.epoch()
                show(metrics)
        tuning = config.final.tune_epochs
        if current.tuned < tuning:
            with progress.training(
                path, "the path found, with the shared weights", tuning, current.tuned,
                resumed=resumed, what="tuning",
            ) as show:  # fmt: skip
                while current.tuned < tuning:
                    with (
                        enough(f"in tuning epoch {current.tuned}"),
                        current.noting_overfitting(progress),
                    ):
                        metrics = current.tune()
                    show({**metrics, "epoch": current.tuned - 1})
        with enough("when the found path was measured"):
            return path, current.finish(networks)


def dry_run(config: SearchConfig) -> dict[str, Any]:
    """What the search will cost, measured on a few steps of real paths. Writes nothing lasting.

    The paths measured are those of the initial pass, in which every edge tries every arm once: the
    mean of their times is that of paths drawn uniformly. Momentum of all weights is allocated, as
    it is towards the end of a search.

    Returns:
        ``epochs``; ``seconds_per_epoch`` (mean, with validation, paths that are only evaluated and
        the checkpoint), ``seconds_per_epoch_widest``, ``seconds_setup``, ``seconds_tuning`` (the
        epochs after the last pruning), ``seconds_final`` (the attack on the found path),
        ``networks`` that are trained from scratch, ``seconds_network`` (for each of them) and
        ``seconds_total`` of all; ``peak_memory_mb`` in MiB on those paths
        and ``peak_memory_mb_widest`` on the widest, which a search is unlikely to meet. On a CPU
        memory is the process's, so it is right in a process that did nothing before.

    Raises:
        OutOfMemoryError: not even this fits.
    """
    config = config.resolve()
    enough = partial(memory_enough_for, config.batch_size, config.evaluation_batch_size)
    with torch_settings(config.threads, bool(config.deterministic)), enough("in the dry run"):
        started = time.perf_counter()
        setup = _build(config)
        seconds_setup = time.perf_counter() - started
        current = _Search(setup, None)
        for parameter in setup.supernet.parameters():
            setup.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        # The first steps of a process pay for what is loaded and planned once.
        bandit = config.make_bandit()
        paths = [bandit.sample(ahead=True) for _ in range(bandit.arms)]
        _measure(current, paths[0])
        found = [_measure(current, choice) for choice in paths]
        mean = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
        save = _seconds_to_save(current)
        peak = run.peak_memory_mb(setup.device)
        widest = _measure(current, torch.as_tensor(setup.supernet.widest_path()))
        peak_widest = run.peak_memory_mb(setup.device)
        evaluations = config.bandit.evaluations_per_epoch
        # None in the initial pass.
        share = (bandit.total_samples - bandit.arms) / bandit.total_samples

        def epoch(seconds: dict[str, float]) -> float:
            only_evaluated = seconds["statistics"] + seconds["validate"]
            return seconds["train"] + seconds["validate"] + evaluations * share * only_evaluated

        per_epoch = epoch(mean) + save
        final = config.final
        tuning = final.tune_epochs * (mean["train"] + mean["validate"] + save)
        count, seconds_network = 0, 0.0
        if final.network_epochs:
            count = 1 + final.random_networks + final.reference
            seconds_network = retrain.dry_run(
                _final.retrain_config(config, _final.REFERENCE),
                source=setup.source,
                genotype=_final.reference_genotype(config),
            )["seconds_total"]
        return {
            "space": config.space,
            "epochs": bandit.total_samples,
            "peak_memory_mb": peak,
            "peak_memory_mb_widest": peak_widest,
            "seconds_setup": seconds_setup,
            "seconds_per_epoch": per_epoch,
            "seconds_per_epoch_widest": epoch(widest) + save,
            "seconds_tuning": tuning,
            "seconds_final": mean["final"],
            "networks": count,
            "seconds_network": seconds_network,
            "seconds_total": seconds_setup
            + bandit.total_samples * per_epoch
            + tuning
            + mean["final"]
            + count * seconds_network,
            "parameters": sum(p.numel() for p in setup.supernet.parameters()),
            "device": config.device,
            "threads": torch.get_num_threads(),
        }


def _measure(current: _Search, choice: Tensor) -> dict[str, float]:
    """Seconds that each part of a search takes with this path, from a few batches."""
    config, setup = current.config, current.setup
    path = current.use_path([choice], None)
    optimizer, model = setup.optimizer, setup.supernet
    # Learning rate 0: the real step, which changes nothing.
    optimizer.param_groups[0]["lr"] = 0.0
    threat = current.training_threat

    def train(batches: int) -> tuple[float, int]:
        few, cost = setup.weights.first(batches), Cost()
        train_epoch(
            model, few, 0, optimizer, threat, seed=0, cost=cost, grad_clip=config.grad_clip, **path
        )
        return cost.seconds["train"], cost.images_trained

    def validate(threat: ThreatModel, batches: int) -> tuple[float, int]:
        few, cost = setup.validation.first(batches), Cost()
        evaluate(model, few, threat, seed=0, cost=cost, **path)
        return cost.seconds["validate"], cost.images_evaluated

    recorded = current.engine.records
    reset_batchnorm(path["modules"])
    train(1)
    training = pace(train, 3, recorded=recorded)
    # An evaluation is two forward passes and the steps of its attack.
    without = dataclasses.replace(current.reward_threat, steps=0)
    validate(without, 1)
    clean = pace(partial(validate, without), 2, recorded=recorded).per_image
    reward = pace(partial(validate, current.reward_threat), 3, recorded=recorded)
    step = max((reward.per_image - 2 * clean) / current.reward_threat.steps, clean)
    final = 2 * clean + step * config.final.steps
    checked = 0.0
    if current.guard is not None:
        attacks = current.guard.attacks(threat)
        checked = sum(2 * clean + step * attack.steps for attack in attacks)
    cost = Cost()
    reestimate_batchnorm(model, setup.statistics, threat, count=2, seed=0, cost=cost, **path)
    batches = min(2, len(setup.statistics))
    test = 0 if setup.test is None else len(setup.test.index)
    return {
        "train": training.of(len(setup.weights.index)),
        "validate": reward.of(len(setup.validation.index))
        + checked * len(setup.guard.index) / config.guard.every,
        "statistics": cost.seconds["statistics"]
        * min(_FEW_STATISTICS_BATCHES, len(setup.statistics))
        / batches,
        "final": final * (len(setup.validation.index) + test),
    }


def _seconds_to_save(current: _Search) -> float:
    """Seconds that one checkpoint takes, in a folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        tensors, state = current.state()
        run.save_tensors(Path(folder) / "checkpoint", tensors, "checkpoint", {"state": state})
        return time.perf_counter() - started


# --- the command ----------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> _Command:
    """Options and configuration: defaults < preset < file < flags.

    Raises:
        ValueError: an unknown preset, setting or value. (tyro ends the process with status 2 and a
            message of its own where a flag cannot be parsed at all.)
    """
    base = _cli.base_config(SearchConfig(), PRESETS, arguments)
    # Of images of one's own nothing is left out unasked.
    given = ("preset", "config", "resume", "data")
    if all(_cli.take_option(arguments, name) is None for name in given):
        base = _cli.merge(base, PRESETS["digits"], "preset digits")
    return tyro.cli(
        _Command,
        default=_Command(config=base),
        args=list(arguments),
        prog="python -m fastbandit.search",
        description="Anti-bandit search (ABanditNAS) for an architecture that stays accurate under "
        "adversarial attack. With no argument: the embedded digits, minutes on a CPU.",
    )


def _print_dry_run(result: dict[str, Any]) -> None:
    minutes = result["seconds_total"] / 60
    print(f"space {result['space']}: {result['parameters']:,} parameters in the supernet")
    print(f"epochs               {result['epochs']}")
    print(
        f"peak memory          {result['peak_memory_mb']:.0f} MiB "
        f"(widest path {result['peak_memory_mb_widest']:.0f})"
    )
    print(
        f"seconds per epoch    {result['seconds_per_epoch']:.2f} "
        f"(widest path {result['seconds_per_epoch_widest']:.2f})"
    )
    if result["networks"]:
        print(
            f"trained from scratch {result['networks']} networks, "
            f"{result['seconds_network']:.0f} seconds each"
        )
    print(
        f"whole command        about {minutes:.1f} minutes on {result['device']}, "
        f"{result['threads']} CPU threads"
    )


def _network_table(summary: dict[str, Any]) -> list[str]:
    """The networks trained from scratch, a line each, and what they are compared with."""
    rows = summary["networks"]
    if not rows:
        return []
    first = rows[0]
    lines = [
        f"{'trained from scratch, ' + str(first['epochs']) + ' epochs each':<34}"
        f"{'parameters':>12}{'clean':>10}{'robust':>10}   {first['split']} images, "
        f"n = {first['n']}"
    ]
    for row in sorted(rows, key=lambda row: row["name"] == _final.REFERENCE):
        lines.append(
            f"  {_final.network_name(row['name']):<32}{row['parameters']:>12,}"
            f"{100 * row['clean_accuracy']:>8.2f} %{100 * row['robust_accuracy']:>8.2f} %"
        )
    chance = f"{100 * summary['chance']:>8.2f} %"
    lines.append(f"  {'chance (the most frequent class)':<32}{'':>12}{chance}{chance}")
    return lines


def _print_summary(path: Path, summary: dict[str, Any]) -> None:
    cost, final, test = summary["cost"], summary["final"], summary["test"]
    networks = sum(row["seconds_total"] for row in summary["networks"])
    trained = f", {networks / 60:.1f} minutes for the networks" if networks else ""
    print(
        f"search finished: {cost['epochs']} epochs in {cost['seconds_total'] / 60:.1f} minutes"
        f"{trained}, {cost['images_per_second']:.0f} images/s in training, "
        f"peak memory {cost['peak_memory_mb']:.0f} MiB"
    )
    for line in _network_table(summary):
        print(line)
    if summary["networks"]:
        print("  (one training of each: a difference of a few points may be chance)")
    print("with the supernet's shared weights, which do not judge an architecture:")
    for found in (final, test):
        if found is not None:
            print(
                f"  found path, {found['split']:<10} clean {100 * found['clean_accuracy']:.2f} %  "
                f"robust {100 * found['robust_accuracy']:.2f} %  (n = {found['n']})"
            )
    print(f"attack: {final['attack']}")
    print(f"genotype {summary['genotype_hash'][:12]}: {path / 'genotype.json'}")
    print(f"report: {path / 'report.html'}")
    print(f"run folder: {path}")


def _run(arguments: Sequence[str]) -> int:
    command = parse(arguments)
    options, config = command.options, command.config
    out = options.out
    if options.resume is not None:
        folder = Path(options.resume)
        stored = _cli.merge(SearchConfig(), RunFolder.read_config(folder), f"{folder}/config.yaml")
        config, out = _cli.resumed_config(config, stored, options.resume, out), options.resume
    # What needs no run needs no other process either.
    if launched() and os.environ["RANK"] != "0" and (options.print_config or options.dry_run):
        return 0
    if options.print_config:
        import yaml

        print(yaml.safe_dump(_cli.to_plain(config.resolve()), sort_keys=False), end="")
        return 0
    if options.dry_run:
        result = dry_run(config)
        if options.json:
            print(json.dumps(result))
        else:
            _print_dry_run(result)
        return 0
    if not launched():
        path, summary = search(config, out, force=options.force, progress=Progress())
    else:
        kind = torch.device(config.resolve().device).type
        with Group.join(kind, timeout=options.peer_timeout) as group:
            path, summary = search(
                config, out, force=options.force, progress=Progress(), group=group
            )
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
    return _cli.guard("search", lambda: _run(given), speaks=first_to_speak)


if __name__ == "__main__":
    raise SystemExit(main())
