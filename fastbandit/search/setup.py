"""What a search is built from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastbandit.data import DataSource, ImageSet, Loader, load
from fastbandit.distributed import Group, synchronise_batchnorm
from fastbandit.nn.supernet import Supernet
from fastbandit.operations import OperationOptions
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.training import sgd, split_data, training_loader
from fastbandit.search.config import SearchConfig

__all__ = ["Setup", "build"]


@dataclass
class Setup:
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


def build(
    config: SearchConfig, group: Group | None = None, source: DataSource | None = None
) -> Setup:
    device = torch.device(config.device) if group is None else group.device
    source = load(config.data) if source is None else source
    parts = split_data(source, config)
    train = parts.train.to(device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    trained = partial(training_loader, train, parts.weights, config, memory_format=layout)

    def evaluated(images: ImageSet, index: Tensor) -> Loader:
        return Loader(
            images,
            index,
            batch_size=config.evaluation_batch_size,
            device=device,
            memory_format=layout,
        )

    # The initial weights come from the run's own seed, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        supernet = Supernet(
            config.search_space(),
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
        test_loader = evaluated(parts.test.to(device), parts.test_index)
    return Setup(
        config,
        device,
        source,
        parts.splits,
        supernet,
        sgd(supernet, config, device),
        weights=trained("order", device),
        statistics=trained("statistics", device),
        validation=evaluated(train, parts.validation),
        guard=evaluated(train, parts.guard),
        test=test_loader,
    )
