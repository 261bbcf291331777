"""What the commands that train have in common: settings, images by use, optimiser."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fastbandit.config import LATER, POSITIVE, SEED, SHARE, Config, ConfigError, Range, at_least
from fastbandit.data import Augment, DataSource, ImageSet, Loader, split, statistics
from fastbandit.runs.environment import derive_seed
from fastbandit.threat import ThreatModel
from fastbandit.training import Precision
from fastbandit.training.cuda_graphs import Choice
from fastbandit.training.overfitting import GuardConfig, OverfittingGuard

__all__ = [
    "FREE",
    "DataSplit",
    "TrainingConfig",
    "load_momenta",
    "momenta",
    "overfitting_guard",
    "sgd",
    "split_data",
    "training_loader",
]


#: Settings of training to which the state of a run does not belong: a run that is forked may have
#: others.
FREE = (
    *("name", "device", "threads", "deterministic", "batch_size", "evaluation_batch_size"),
    *("learning_rate", "momentum", "weight_decay", "grad_clip", "crop_padding", "flip"),
    *("cutout_length", "precision", "graphs", "guard", "final"),
)


@dataclass(frozen=True)
class TrainingConfig(Config):
    """The settings that the search and the retraining have in common."""

    name: str = "digits"
    """part of the run folder's name"""
    data: str = "digits"
    """'digits' (embedded) or a path: IDX, CIFAR-10 or image folder, .npz file, parquet"""
    image_size: Annotated[int | None, at_least(1), LATER] = None
    """bring all images to N x N pixels: resized, antialiased, and cut to the middle"""
    image_color: Annotated[Literal["rgb", "grey"] | None, LATER] = None
    """make all images rgb or grey"""
    seed: Annotated[int, SEED] = 0
    """decides everything random: weights, split, order, augmentation, attacks, bandit"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU if there is one"""
    threads: Annotated[int, at_least(0)] = 0
    """CPU threads, 0: as torch chooses; exact repetition needs the same number"""
    deterministic: bool | None = None
    """deterministic algorithms only; default: yes on a CPU, no on a GPU"""
    batch_size: Annotated[int, at_least(2)] = 64
    """images in a mini-batch"""
    evaluation_batch_size: Annotated[int, at_least(1)] = 256
    """images in a batch of validation and test; larger is faster on small images"""
    learning_rate: Annotated[float, POSITIVE] = 0.1
    """learning rate of SGD at its largest"""
    momentum: Annotated[float, Range("a number in [0, 1)", least=0, below=1)] = 0.9
    """momentum of SGD"""
    weight_decay: Annotated[float, at_least(0)] = 5e-4
    """weight decay of SGD"""
    grad_clip: Annotated[float | None, Range("a positive number", above=0)] = 5.0
    """clip the gradient to this 2-norm"""
    train_portion: Annotated[float, SHARE] = 0.9
    """share of the training images that train the weights; the rest is for validation"""
    train_limit: Annotated[int | None, at_least(4)] = None
    """use at most N training images, class-balanced"""
    test_limit: Annotated[int | None, at_least(1)] = None
    """use at most N test images, class-balanced"""
    crop_padding: Annotated[int, at_least(0)] = 0
    """pad with N zero pixels on each side and crop at random"""
    flip: bool = False
    """flip horizontally at random"""
    cutout_length: Annotated[int, at_least(0)] = 0
    """cut out a square of N x N pixels at random"""
    precision: Precision = "float32"
    """precision of convolutions and matrix products; with bfloat16 weights, statistics, logits and
    loss stay float32"""
    graphs: Choice = "auto"
    """CUDA graphs: record a step once and replay it; auto: where that is possible"""
    sync_batchnorm: bool = False
    """with several processes: take batch statistics over all of them"""
    guard: GuardConfig = field(default_factory=GuardConfig)

    def augment(self) -> Augment:
        """The augmentation of training images."""
        return Augment(self.crop_padding, self.flip, self.cutout_length)


@dataclass(frozen=True)
class DataSplit:
    """The images of a run by what they are for.

    Every index holds positions in the whole set, so that the stored split names images for good.
    """

    train: ImageSet
    weights: Tensor
    validation: Tensor
    guard: Tensor
    """images of the validation part, some of every class and always the same"""
    test: ImageSet | None
    test_index: Tensor | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, Any]
    """what a run folder stores of it"""


def split_data(source: DataSource, config: TrainingConfig) -> DataSplit:
    """The images of ``source`` by what they are for.

    Raises:
        ConfigError: fewer than two images are left to train on.
    """
    train, test = source.train, source.test
    kept = train.limit_index(config.train_limit or len(train))
    weights, validation = (
        kept[part]
        for part in split(
            train.labels[kept], config.train_portion, derive_seed(config.seed, "split")
        )
    )
    if len(weights) < 2:
        raise ConfigError(
            f"train_portion: expected at least 2 images to train on, got {len(weights)}"
        )
    test_index = None
    if test is not None:
        test_index = test.limit_index(config.test_limit or len(test))
    mean, std = statistics(train.images[weights])
    return DataSplit(
        train,
        weights,
        validation,
        validation[train.subset(validation).limit_index(config.guard.images)],
        test,
        test_index,
        mean,
        std,
        splits={
            "data": source.name,
            "digest": source.digest,
            "weights": weights.tolist(),
            "validation": validation.tolist(),
            "test": [] if test_index is None else test_index.tolist(),
        },
    )


def sgd(network: nn.Module, config: TrainingConfig, device: torch.device) -> torch.optim.SGD:
    """The optimiser of all weights."""
    return torch.optim.SGD(
        network.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        # One launch for all weights, which also takes the learning rate of a graph from the device.
        # On a CPU it is four times as slow as one operation for all weights at a time.
        fused=device.type == "cuda",
        foreach=device.type != "cuda",
    )


def training_loader(
    images: ImageSet,
    index: Tensor,
    config: TrainingConfig,
    purpose: str,
    device: torch.device,
    **options: Any,
) -> Loader:
    """Shuffled, augmented batches of the images at ``index``.

    Args:
        purpose: decides the order, together with the seed.
        options: further arguments of :class:`~fastbandit.data.Loader`.
    """
    return Loader(
        images,
        index,
        batch_size=config.batch_size,
        device=device,
        augment=config.augment(),
        seed=derive_seed(config.seed, purpose),
        shuffle=True,
        # A last batch of one image has no batch statistics on 1 x 1 maps.
        drop_last=len(index) % config.batch_size == 1,
        **options,
    )


def overfitting_guard(
    config: TrainingConfig, threat: ThreatModel, images: Loader
) -> OverfittingGuard | None:
    """The guard of a training against ``threat``; None where it is off or nothing attacks."""
    if not config.guard.enabled or not threat.attacks:
        return None
    seed = derive_seed(config.seed, "attack", "guard")
    return OverfittingGuard(images, seed=seed, steps=config.guard.steps)


def momenta(network: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """The momentum of each weight that has one, by name."""
    buffers = {}
    for name, parameter in network.named_parameters():
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        if buffer is not None:
            buffers[name] = buffer
    return buffers


def load_momenta(
    network: nn.Module, optimizer: torch.optim.SGD, buffers: dict[str, Tensor]
) -> None:
    """Undo what happened to the momentum since :func:`momenta`.

    A buffer that is there is kept, since a recorded step writes to its memory. A new one has the
    layout of the weight, which a file does not keep and the fused step asks for. Without an entry
    the momentum is what it was before the first step, zero.
    """
    for name, parameter in network.named_parameters():
        state, buffer = optimizer.state.get(parameter, {}), buffers.get(name)
        if state.get("momentum_buffer") is None:
            if buffer is None:
                continue
            state = optimizer.state[parameter]
            state["momentum_buffer"] = torch.empty_like(parameter, requires_grad=False)
        if buffer is None:
            state["momentum_buffer"].zero_()
        else:
            state["momentum_buffer"].copy_(buffer)
