"""What a search ends with: networks trained from scratch, which is how an architecture is judged.

The found network and random networks of its size are trained alike, by the code of
``python -m fastbandit.retrain`` with a short schedule, and measured on the same test images under
the same attack. Another random network, of any size, is trained before the search begins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from fastbandit._files import FileError
from fastbandit.bandit.budget import ATTEMPTS, SizeBudget
from fastbandit.bandit.mixes import random_mix
from fastbandit.config import to_plain
from fastbandit.data import DataSource
from fastbandit.genotype import Genotype
from fastbandit.operations import OperationOptions
from fastbandit.retrain.config import AttackConfig, FinalConfig, RetrainConfig
from fastbandit.retrain.loop import retrain
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.folder import RunFolder
from fastbandit.runs.session import Session
from fastbandit.runs.tensors import RunError
from fastbandit.search.sizes import Sizes, edge_parameters, edges_of, measured

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
    "random_choice",
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
# Networks whose parameters differ by no larger share are of one size.
_NEAR = 0.03


def network_name(name: str) -> str:
    """A network's name in words."""
    if name == FOUND:
        return "found network"
    if name == REFERENCE:
        return "random network, any size"
    return "random network, same size"


def random_choice(
    config: SearchConfig,
    *purpose: str | int,
    source: DataSource | None = None,
    mixes: float | None = None,
) -> Tensor:
    """A path of the search's space within its budget, if it has one; int64 [rows].

    Every operation has the same probability on each edge; a budget tilts that as it does the draws
    of the bandit (:mod:`fastbandit.bandit.budget`).

    Args:
        purpose: decides the draw, together with ``config.seed``.
        source: the images of the search, whose shape decides sizes; None: those that
            ``config.data`` names. Of use with a budget only.
        mixes: concentration of a Dirichlet law from which the path gets shares of the operations of
            its own (:func:`fastbandit.bandit.random_mix`); None: the same share of each.

    Raises:
        ValueError: a budget that no network of the space meets.
    """
    return _random_choice(config, purpose, source, mixes)[0]


def _random_choice(
    config: SearchConfig,
    purpose: Sequence[str | int],
    source: DataSource | None,
    mixes: float | None,
) -> tuple[Tensor, Tensor]:
    """The choice, and a random rank of every arm, [rows, arms]."""
    searched = config.search_space()
    generator = torch.Generator().manual_seed(derive_seed(config.seed, *purpose))
    shape = (searched.rows, searched.arms)
    if mixes is None:
        choice = torch.randint(searched.arms, (searched.rows,), generator=generator)
    else:
        choice = random_mix(*shape, mixes, generator)
    rank = torch.rand(shape, generator=generator)
    budget = config.size_budget(source)
    if budget is not None and not bool(budget.holds(choice)):
        uniform = torch.rand((searched.rows, ATTEMPTS), generator=generator, dtype=torch.float64)
        alive = torch.ones(shape, dtype=torch.bool)
        # Shares as in the mix that was drawn; every arm has some.
        probabilities = torch.bincount(choice, minlength=searched.arms).double() / searched.rows
        if mixes is None:
            probabilities = torch.full_like(probabilities, 1 / searched.arms)
        choice = budget.draw(probabilities.expand(shape), alive, uniform)
    return choice, rank


def random_genotype(
    config: SearchConfig,
    *purpose: str | int,
    source: DataSource | None = None,
    mixes: float | None = None,
) -> Genotype:
    """The network of :func:`random_choice`, whose arguments and errors are the same."""
    searched = config.search_space()
    choice, rank = _random_choice(config, purpose, source, mixes)
    return Genotype.from_choices(
        searched,
        choice.tolist(),
        # Only the rank of the edges is used, where a node keeps one or two: a random one.
        mean=rank.tolist(),
        edges_per_node=EDGES_PER_NODE[config.edges_per_node],
        options=OperationOptions.of(config),
        macro={"layers": searched.cells, "channels": config.init_channels},
    )


def reference_genotype(config: SearchConfig, source: DataSource | None = None) -> Genotype:
    """The network of the space that is trained before the search; see :func:`random_genotype`."""
    return random_genotype(config, "random network", 0, source=source)


def same_size(
    genotype: Genotype, config: SearchConfig, number: int, source: DataSource | None = None
) -> Genotype:
    """A random network with nearly as many parameters as that of ``genotype``.

    Of 256 networks drawn by :func:`random_genotype`, within the budget if there is one, it is the
    one nearest in size. Where even that differs by more than 3 %, as for the largest networks of a
    space, it is drawn anew with probabilities of the operations that are tilted by their sizes
    (:mod:`fastbandit.bandit.budget`), unless a node keeps only some of its edges. ``genotype``
    itself does not count.
    """
    searched = config.search_space()
    table = edge_parameters(searched, config.init_channels, OperationOptions.of(config))
    wanted = edges_of(genotype, searched, table)
    purpose = ("random network of the same size", number)
    drawn = [random_genotype(config, *purpose, draw, source=source) for draw in range(_DRAWS)]
    others = [one for one in drawn if one.hash != genotype.hash] or drawn
    nearest = min(others, key=lambda one: abs(edges_of(one, searched, table) - wanted))
    sizes = Sizes.of_search(config, source)
    exact = sizes.of(genotype).parameters
    if abs(edges_of(nearest, searched, table) - wanted) <= _NEAR * exact or (
        config.edges_per_node != "all"
    ):
        return nearest
    ends = (exact * (1 - _NEAR), exact * (1 + _NEAR))
    near = SizeBudget(sizes.parameters, sizes.base_parameters, ends)
    budget = config.size_budget(source)
    probabilities = torch.full(
        (searched.rows, searched.arms), 1 / searched.arms, dtype=torch.float64
    )
    alive = torch.ones_like(probabilities, dtype=torch.bool)
    for draw in range(_DRAWS):
        generator = torch.Generator().manual_seed(
            derive_seed(config.seed, *purpose, "tilted", draw)
        )
        uniform = torch.rand((searched.rows, ATTEMPTS), generator=generator, dtype=torch.float64)
        choice = near.draw(probabilities, alive, uniform)
        candidate = Genotype.from_choices(
            searched,
            choice.tolist(),
            options=OperationOptions.of(config),
            macro={"layers": searched.cells, "channels": config.init_channels},
        )
        if candidate.hash != genotype.hash and (budget is None or bool(budget.holds(choice))):
            return candidate
    return nearest


def retrain_config(config: SearchConfig, name: str, epochs: int | None = None) -> RetrainConfig:
    """The short schedule with which a search trains its networks from scratch.

    Data, adversary, batches and width are the search's; the learning rate is a retraining's.
    """
    final, attack = config.final, config.attack
    length = final.network_epochs if epochs is None else epochs
    default = RetrainConfig()
    steps = attack.steps if config.training_threat().attacks else 0
    method: Literal["fgsm", "pgd", "clean"] = (
        "clean" if steps == 0 else "fgsm" if steps == 1 else "pgd"
    )
    return replace(
        default,
        name=f"{config.name}-{name}",
        data=config.data,
        image_size=config.image_size,
        image_color=config.image_color,
        seed=config.seed,
        device=config.device,
        threads=config.threads,
        deterministic=config.deterministic,
        init_channels=config.init_channels,
        layers=config.search_space().cells,
        method=method,
        epochs=length,
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
        selection=replace(default.selection, every=length),
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
            self._train(REFERENCE, reference_genotype(self.config, self.source))

    def train_found(self, genotype: Genotype) -> None:
        """The found network and random ones of its size, if there are to be any."""
        if not self.config.final.network_epochs:
            return
        self._train(FOUND, genotype)
        for number in range(1, self.config.final.random_networks + 1):
            other = same_size(genotype, self.config, number, self.source)
            self._train(f"random-{number}", other)

    def _train(self, name: str, genotype: Genotype) -> None:
        config, session = retrain_config(self.config, name), self.session
        path, summary = session.path / FOLDER / name, None
        if session.is_main:
            summary = finished_network(path, config, genotype)
        summary = session.broadcast(summary)
        fresh = summary is None
        # Before it is trained: nothing else of this search computes now.
        latency = session.broadcast(measured(self.config, self.source, [genotype])[0])
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
        row = network_row(name, summary) | latency
        if fresh:
            session.progress.line(
                f"{network_name(name)}, trained from scratch: {row['parameters']:,} parameters, "
                f"{latency_words(row)}{row['split']} images clean "
                f"{100 * row['clean_accuracy']:.1f} %, robust "
                f"{100 * row['robust_accuracy']:.1f} % (chance "
                f"{100 * chance(self.source, self.config):.1f} %)"
            )
        self.rows.append(row)


def finished_network(
    path: Path, config: RetrainConfig, genotype: Genotype
) -> dict[str, Any] | None:
    """The summary of the run there if it is finished and of this configuration.

    What cannot be read is none: it is trained again.
    """
    wanted = to_plain(replace(config.resolve(), genotype_hash=genotype.hash))
    try:
        return RunFolder(path).stored(wanted)
    except (RunError, FileError):
        return None


def latency_words(row: Mapping[str, Any]) -> str:
    """The latency of a network, with a comma behind it; nothing where none was measured."""
    if "latency_ms" not in row:
        return ""
    return f"{row['latency_ms']:.3g} ms (table {row['latency_table_ms']:.3g}), "


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
