"""What a retraining is built from."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastbandit.data import DataSource, Loader, load_data
from fastbandit.distributed import Group, synchronise_batchnorm
from fastbandit.genotype import Genotype
from fastbandit.models import Architecture
from fastbandit.nn.network import Network
from fastbandit.retrain.binary import check_has_bits
from fastbandit.retrain.config import RetrainConfig
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.training import sgd, split_data, training_loader

__all__ = ["Setup", "build"]


@dataclass
class Setup:
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


def build(
    config: RetrainConfig,
    genotype: Genotype,
    group: Group | None = None,
    source: DataSource | None = None,
) -> Setup:
    device = torch.device(config.device) if group is None else group.device
    source = load_data(config, source)
    parts = split_data(source, config)
    train = parts.train.to(device)
    evaluated = partial(Loader, batch_size=config.evaluation_batch_size, device=device)
    architecture = config.architecture(genotype, train.images.shape[1], source.classes)
    # The initial weights come from the run's own seed, whatever was drawn before.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "weights"))
        network = architecture.build(
            genotype, mean=parts.mean, std=parts.std, auxiliary=config.auxiliary
        )
    check_has_bits(config, network)
    # Channels-last is the faster layout for the depthwise and the dense convolutions alike.
    network.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if group is not None and config.sync_batchnorm:
        synchronise_batchnorm(network, group)
    return Setup(
        config,
        genotype,
        architecture,
        device,
        source,
        parts.splits,
        network,
        sgd(network, config, device),
        weights=training_loader(train, parts.weights, config, "order", device),
        validation=evaluated(train, parts.validation),
        guard=evaluated(train, parts.guard),
        test=None
        if parts.test is None or parts.test_index is None
        else evaluated(parts.test, parts.test_index),
    )
