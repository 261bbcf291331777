"""What a search ends with: networks trained from scratch, which is how an architecture is judged.

The found network and random networks of its size are trained alike, by the code of
``python -m fastbandit.retrain`` with a short schedule, and measured on the same test images under
the same attack. Another random network, of any size, is trained before the search begins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fastbandit._files import FileError
from fastbandit.config import to_plain
from fastbandit.data import DataSource
from fastbandit.genotype import Genotype
from fastbandit.nn.operations import make
from fastbandit.operations import OperationOptions
from fastbandit.retrain.config import AttackConfig, FinalConfig, RetrainConfig
from fastbandit.retrain.loop import retrain
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.session import Session
from fastbandit.runs.tensors import RunError
from fastbandit.space import reduction_cells

if TYPE_CHECKING:
    from fastbandit.search.config import SearchConfig

__all__ = [
    "EDGES_PER_NODE",
    "FOLDER",
    "FOUND",
    "REFERENCE",
    "Networks",
    "chance",
    "finished_network",
    "network_name",
    "network_row",
    "random_genotype",
    "reference_genotype",
    "retrain_config",
    "same_size",
]

EDGES_PER_NODE: dict[str, Literal["all", 1, 2]] = {"all": "all", "1": 1, "2": 2}

#: The folder of a search that holds a retraining run for each network trained from scratch.
FOLDER = "networks"
#: Names of those runs: the found network, and the random one that is trained before the search.
#: Random networks of the found one's size are ``random-1``, ``random-2``, ...
FOUND, REFERENCE = "found", "reference"

# Of so many random networks the one nearest in size is taken.
_DRAWS = 256


def network_name(name: str) -> str:
    """A network's name in words."""
    if name == FOUND:
        return "found network"
    if name == REFERENCE:
        return "random network, any size"
    return "random network, same size"


def random_genotype(config: SearchConfig, *purpose: str | int) -> Genotype:
    """A network of the search's space, every operation with the same probability.

    Args:
        purpose: decides the draw, together with ``config.seed``.
    """
    searched = config.search_space()
    generator = torch.Generator().manual_seed(derive_seed(config.seed, *purpose))
    shape = (searched.rows, searched.arms)
    choice = torch.randint(searched.arms, (searched.rows,), generator=generator)
    return Genotype.from_choices(
        searched,
        choice.tolist(),
        # Only the rank of the edges is used, where a node keeps one or two: a random one.
        mean=torch.rand(shape, generator=generator).tolist(),
        edges_per_node=EDGES_PER_NODE[config.edges_per_node],
        options=OperationOptions.of(config),
        macro={"layers": searched.cell_types, "channels": config.init_channels},
    )


def reference_genotype(config: SearchConfig) -> Genotype:
    """The network of the space that is trained before the search."""
    return random_genotype(config, "random network", 0)


class _EdgeSizes:
    """Parameters of all edges of a genotype; those of one operation are counted once."""

    def __init__(self, config: SearchConfig) -> None:
        self.channels = config.init_channels
        self.options = OperationOptions.of(config)
        self.known: dict[tuple[str, int, int], int] = {}

    def of(self, genotype: Genotype) -> int:
        total, channels = 0, self.channels
        reductions = reduction_cells(len(genotype.cells))
        for index, cell in enumerate(genotype.cells):
            stride = 2 if index in reductions else 1
            channels *= stride
            for edges in cell.nodes:
                for edge in edges:
                    key = (edge.op, channels, stride if edge.source == 0 else 1)
                    if key not in self.known:
                        operation = make(*key, options=self.options)
                        self.known[key] = sum(p.numel() for p in operation.parameters())
                    total += self.known[key]
        return total


def same_size(genotype: Genotype, config: SearchConfig, number: int) -> Genotype:
    """A random network with nearly as many parameters as that of ``genotype``.

    Of 256 networks drawn uniformly from the space it is the one nearest in size; ``genotype``
    itself does not count.
    """
    sizes = _EdgeSizes(config)
    wanted = sizes.of(genotype)
    drawn = [
        random_genotype(config, "random network of the same size", number, draw)
        for draw in range(_DRAWS)
    ]
    others = [one for one in drawn if one.hash != genotype.hash] or drawn
    return min(others, key=lambda one: abs(sizes.of(one) - wanted))


def retrain_config(config: SearchConfig, name: str) -> RetrainConfig:
    """The short schedule with which a search trains its networks from scratch.

    Data, adversary, batches and width are the search's; the learning rate is a retraining's.
    """
    final, attack = config.final, config.attack
    default = RetrainConfig()
    steps = attack.steps if config.training_threat().attacks else 0
    method: Literal["fgsm", "pgd", "clean"] = (
        "clean" if steps == 0 else "fgsm" if steps == 1 else "pgd"
    )
    return replace(
        default,
        name=f"{config.name}-{name}",
        data=config.data,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        deterministic=config.deterministic,
        init_channels=config.init_channels,
        layers=config.search_space().cell_types,
        method=method,
        epochs=final.network_epochs,
        batch_size=config.batch_size,
        evaluation_batch_size=config.evaluation_batch_size,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        grad_clip=config.grad_clip,
        train_limit=config.train_limit,
        test_limit=config.test_limit,
        crop_padding=config.crop_padding,
        flip=config.flip,
        cutout_length=config.cutout_length,
        precision=config.precision,
        graphs=config.graphs,
        sync_batchnorm=config.sync_batchnorm,
        attack=AttackConfig(
            epsilon=attack.epsilon,
            steps=steps,
            step_size=attack.step_size,
            random_start=attack.random_start,
            clip=attack.clip,
            bn_mode=attack.bn_mode,
        ),
        # Where the rate falls to 0 the last epoch is the best one, and a look at each would take
        # a quarter of so short a training.
        selection=replace(default.selection, every=final.network_epochs),
        final=FinalConfig(steps=final.steps, step_size=final.step_size),
        guard=replace(config.guard, every=min(config.guard.every, default.guard.every)),
    )


def chance(source: DataSource, config: SearchConfig) -> float:
    """Accuracy, clean and robust alike, of always answering the most frequent class.

    On the test images, or on the training images where there are none.
    """
    images = source.train if source.test is None else source.test
    limit = config.train_limit if source.test is None else config.test_limit
    labels = images.labels[images.limit_index(limit or len(images))]
    return torch.bincount(labels.cpu()).max().item() / len(labels)


class Networks:
    """The networks of a search that are trained from scratch, each a retraining run of its own.

    Args:
        session: the search.
        source: the images of the search.
    """

    def __init__(self, session: Session, source: DataSource) -> None:
        self.session, self.source = session, source
        self.config: SearchConfig = session.config
        #: What is said of each, in the order in which they were trained.
        self.rows: list[dict[str, Any]] = []

    def train_reference(self) -> None:
        """The random network before the search, if there is to be one."""
        if self.config.final.reference and self.config.final.network_epochs:
            self._train(REFERENCE, reference_genotype(self.config))

    def train_found(self, found: Genotype) -> None:
        """The found network and random ones of its size, if there are to be any."""
        if not self.config.final.network_epochs:
            return
        self._train(FOUND, found)
        for number in range(1, self.config.final.random_networks + 1):
            self._train(f"random-{number}", same_size(found, self.config, number))

    def _train(self, name: str, genotype: Genotype) -> None:
        config, session = retrain_config(self.config, name), self.session
        path, summary = session.path / FOLDER / name, None
        if session.is_main:
            summary = finished_network(path, config, genotype)
        summary = session.broadcast(summary)
        fresh = summary is None
        if summary is None:
            _, summary = retrain(
                config,
                path,
                # What another configuration left there is none of this run's.
                force=True,
                progress=session.progress,
                group=session.group,
                source=self.source,
                genotype=genotype,
            )
        row = network_row(name, summary)
        if fresh:
            session.progress.line(
                f"{network_name(name)}, trained from scratch: {row['parameters']:,} parameters, "
                f"{row['split']} images clean {100 * row['clean_accuracy']:.1f} %, robust "
                f"{100 * row['robust_accuracy']:.1f} % (chance "
                f"{100 * chance(self.source, self.config):.1f} %)"
            )
        self.rows.append(row)


def finished_network(path: Path, config: RetrainConfig, genotype: Genotype) -> dict[str, Any] | None:
    """The summary of the run there if it is finished and of this configuration."""
    if not (path / "summary.json").is_file():
        return None
    wanted = to_plain(replace(config.resolve(), genotype_hash=genotype.hash))
    try:
        # What cannot be read is trained again.
        return RunFolder(path).result() if RunFolder.read_config(path) == wanted else None
    except (RunError, FileError):
        return None


def network_row(name: str, summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a search says of one of its networks."""
    measured = summary["test"] or summary["best"]
    return {
        "name": name,
        "folder": f"{FOLDER}/{name}",
        "genotype_hash": summary["genotype_hash"],
        "parameters": summary["parameters"],
        "macs": summary["macs"],
        "epochs": summary["cost"]["epochs"],
        "split": measured["split"],
        "n": measured["n"],
        "clean_accuracy": measured["clean_accuracy"],
        "robust_accuracy": measured["robust_accuracy"],
        "attack": measured["attack"],
        "overfitting": summary["overfitting"],
        "seconds_total": summary["cost"]["seconds_total"],
        "seconds_train": summary["cost"]["seconds_train"],
        "images_trained": summary["cost"]["images_trained"],
        "forward_passes": summary["cost"]["forward_passes"],
        "backward_passes": summary["cost"]["backward_passes"],
        "peak_memory_mb": summary["cost"]["peak_memory_mb"],
    }
