"""The settings of a search, and its presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastbandit import space as spaces
from fastbandit.bandit import POLICIES, AntiBandit, BanditSettings
from fastbandit.bandit.budget import SizeBudget
from fastbandit.childparent import ChildParent
from fastbandit.config import (
    BELONGS,
    LATER,
    POSITIVE,
    SEED,
    SHARE,
    ConfigError,
    Radius,
    Range,
    at_least,
)
from fastbandit.latency import Conditions
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.session import resolve_device
from fastbandit.runs.training import TrainingConfig
from fastbandit.search.alone import AloneConfig, SupernetConfig, check_alone
from fastbandit.search.binary import BinaryConfig, BinarySettings, CpConfig, check_binary
from fastbandit.space import SearchSpace
from fastbandit.threat import ThreatModel
from fastbandit.training.overfitting import GuardConfig

if TYPE_CHECKING:
    from fastbandit.data import DataSource
    from fastbandit.search.sizes import Budget, Sizes

__all__ = ["PRESETS", "AttackConfig", "FinalConfig", "SearchConfig", "TimingConfig"]


@dataclass(frozen=True)
class AttackConfig:
    """The adversary inside the search: one gradient step from a random start, as in Algorithm 8."""

    epsilon: Radius = "0.2"
    """radius in the L-infinity norm, for images in [0, 1]; write 8/255 as 8/255"""
    steps: int = 1
    """gradient steps: 1 is FGSM, k is PGD-k, 0 searches for clean accuracy"""
    step_size: Radius | None = None
    """step along the gradient's sign; default 1.25 epsilon for one step, 2.5 epsilon / steps"""
    random_start: bool = True
    """start uniformly in the ball"""
    clip: Literal["image", "none"] = "image"
    """keep x + delta in [0, 1] (image), or not (none: the algorithm as printed)"""
    bn_mode: Literal["train", "eval"] = "train"
    """batch norm while attacking in training; the attack of the reward always uses eval"""


@dataclass(frozen=True)
class FinalConfig:
    """What follows the last pruning, and the attack that measures it (PGD, eval mode)."""

    steps: int = 20
    """gradient steps"""
    step_size: Radius | None = "0.02"
    """step along the gradient's sign; None: 2.5 epsilon / steps"""
    tune_epochs: Annotated[int, at_least(0)] = 3
    """epochs that the found path is trained for with the shared weights after the last pruning,
    which leaves a path that was never trained; 0: none, the algorithm as printed"""
    network_epochs: Annotated[int, at_least(0)] = 6
    """epochs of training from scratch, for the found network and for each random one; 0: none, and
    the search ends with the accuracy of shared weights, which does not judge an architecture"""
    random_networks: Annotated[int, at_least(0)] = 1
    """random networks of the found one's size that are trained from scratch beside it"""
    tournament: Annotated[int, at_least(0), LATER] = 0
    """candidates that are trained alone, in rungs, after the search: the path found and others that
    the bandit prefers, random ones, and those of a model that has learnt from the first; the best
    of them is the network found; 0: none, and the last path is"""
    rungs: Annotated[tuple[int, ...], LATER] = (3, 9)
    """epochs of each rung of the tournament, each with a schedule of its own"""
    keep: Annotated[float, SHARE, LATER] = 0.25
    """share of a rung's candidates that enters the next one"""
    from_bandit: Annotated[float, Range("a share from 0 to 1", least=0, most=1), LATER] = 0.25
    """share of the candidates that the bandit proposes, one at least"""
    from_model: Annotated[float, Range("a share from 0 to 1", least=0, most=1), LATER] = 0.25
    """share that the model of the first rung's results proposes; the others are drawn at random"""
    train_portion: Annotated[float, SHARE, LATER] = 0.75
    """share of the training images that trains the candidates; the others judge them"""
    reference: bool = True
    """train a random network of any size from scratch before the search: the first result, and
    what the search has to beat"""


@dataclass(frozen=True)
class TimingConfig:
    """How latency is measured, for a budget of it."""

    batch_size: Annotated[int, at_least(1)] = 1
    """images at a time"""
    threads: Annotated[int, at_least(1)] = 1
    """CPU threads"""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ...: where the networks are to run, whatever device the search has"""
    table: tuple[str, ...] = ()
    """the measured times, a line for each operation at each place of a network; empty: those of
    this machine, which are measured once and kept. A run's config.yaml holds them"""

    def conditions(self) -> Conditions:
        """How the table is measured."""
        return Conditions(self.batch_size, self.threads, self.device)


_CP, _BINARY, _TIMING = CpConfig(), BinaryConfig(), TimingConfig()
_SUPERNET, _ALONE = SupernetConfig(), AloneConfig()


@dataclass(frozen=True)
class SearchConfig(BinarySettings, TrainingConfig):
    """Everything that decides the result of a search. Its hash is the run's id."""

    seed: Annotated[int, SEED] = 0
    """decides everything random: weights, split, order, attacks, bandit"""
    learning_rate: Annotated[float, POSITIVE] = 0.025
    """learning rate of SGD at the start; a cosine over the search"""
    weight_decay: Annotated[float, at_least(0)] = 3e-4
    """weight decay of SGD"""
    train_portion: Annotated[float, SHARE] = 0.5
    """share of the training images that train the weights; the rest gives the reward"""
    # Less often than in retraining: an epoch of a search is short.
    guard: GuardConfig = field(default_factory=lambda: GuardConfig(every=5))
    space: str = "robust9-light"
    """search space: general7, robust8 to robust11, or one of their -light twins; of 1-bit networks:
    binary8, binary7, binary8-dense"""
    layers: Annotated[int, Range("a whole number from 1 to 26", least=1, most=26), LATER] = 6
    """V, the cells of the supernet, each of a type of its own; in a space of 1-bit networks normal
    and reduction cells"""
    init_channels: Annotated[int, Range("an even number >= 2", least=2, multiple_of=2)] = 8
    """C, the channels of the first cell"""
    denoise: Literal["dot", "gaussian", "mean", "median"] = "dot"
    """the non-local mean of the denoising block"""
    gabor: Literal["pixels", "released"] = "pixels"
    """parameterisation of the Gabor filters: ours, in pixels, or that of the released code"""
    edges_per_node: Literal["all", "1", "2"] = "all"
    """incoming edges each node keeps in the genotype: all (the text), or those of largest m"""
    reward: Literal["auto", "robust", "clean", "mix"] = "auto"
    """validation accuracy that is credited; auto: robust if the search is adversarial"""
    rewards: Annotated[Literal["shared", "alone"], LATER] = "shared"
    """what scores a path: shared weights, or its network trained alone for a few epochs"""
    learning_rate_min: Annotated[float, at_least(0)] = 0.0125
    """learning rate at the end; with 0 the last paths, each new, hardly adapt to the shared
    weights"""
    channels_last: bool = True
    """memory layout of images and weights; the kernels of this package are made for it"""
    parallel: Literal["data", "paths"] = "data"
    """with several processes (torchrun): data divides each batch of the one path, paths trains a
    path on each process and averages gradients; the number of processes is not a setting"""
    parameters: Annotated[str | None, LATER] = None
    """budget of parameters, LOW:HIGH, such as 40k:60k, :60k or 1.5M:; every path that the bandit
    draws, the network found and every random network is within it"""
    macs: Annotated[str | None, LATER] = None
    """the same for multiply-adds of one image; a search has one budget of the three"""
    latency: Annotated[str | None, LATER] = None
    """the same for milliseconds on this machine, such as 1.5:2.5 or :4, of a network in evaluation
    mode; of paths they are added up from a measured table"""
    timing: Annotated[TimingConfig, LATER] = _TIMING
    attack: AttackConfig = field(default_factory=AttackConfig)
    bandit: BanditSettings = field(default_factory=BanditSettings)
    final: FinalConfig = field(default_factory=FinalConfig)
    supernet: Annotated[SupernetConfig, LATER] = _SUPERNET
    alone: Annotated[AloneConfig, LATER] = _ALONE
    algorithm: Annotated[Literal["anti-bandit", "cp-nas"], LATER] = "anti-bandit"
    """what draws paths and abandons arms: the bandit of --bandit.policy, or Algorithm 9 (CP-NAS,
    for a space of 1-bit networks), which has no bandit"""
    cp: Annotated[CpConfig, LATER] = _CP
    binary: Annotated[BinaryConfig, LATER] = _BINARY

    def search_space(self) -> SearchSpace:
        """The space that is searched: a row for each edge of each cell."""
        if self.space in spaces.BINARY_SPACES:
            return spaces.get(self.space, cells=self.layers)
        return spaces.get(self.space, cell_types=self.layers)

    def check(self) -> None:
        self.search_space()
        if self.learning_rate_min > self.learning_rate:
            raise ConfigError(
                f"learning_rate_min: expected 0 to learning_rate ({self.learning_rate}), "
                f"got {self.learning_rate_min}"
            )
        if self.sync_batchnorm and self.parallel == "paths":
            raise ConfigError(
                "sync_batchnorm: expected no with parallel paths, where each process computes "
                "another path and there is nothing to share; got yes"
            )
        try:
            self.bandit.check("bandit.")
            self.budget()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        mixed = POLICIES[self.bandit.policy].mixed_initial_pass
        if self.bandit.mixes and not mixed and not self.bandit.evaluations_per_epoch:
            raise ConfigError(
                f"bandit.mixes: expected 0 with {self.bandit.policy}, which gives every arm a "
                "sample first, where no paths are only evaluated (bandit.evaluations_per_epoch 0); "
                f"got {self.bandit.mixes!r}"
            )
        if self.budgeted and self.edges_per_node != "all":
            raise ConfigError(
                f"{self.budgeted}: expected edges_per_node all, since the size of a path is that "
                f"of all its edges; got {self.edges_per_node}"
            )
        self.training_threat()
        self.final_threat()
        check_binary(self)
        check_alone(self)
        if self.final.network_epochs:
            # What a retraining would refuse is refused before the search.
            from fastbandit.search.networks import FOUND, retrain_config

            retrain_config(self, FOUND)

    @property
    def budgeted(self) -> str:
        """What the budget is one of: ``parameters``, ``macs``, ``latency``, or an empty string."""
        if self.parameters is not None:
            return "parameters"
        return "macs" if self.macs else "latency" if self.latency is not None else ""

    def budget(self) -> Budget | None:
        """The budget of sizes; None where there is none.

        Raises:
            ConfigError: two of them.
            ValueError: another text than LOW:HIGH.
        """
        from fastbandit.search.sizes import Budget

        every = {"parameters": self.parameters, "macs": self.macs, "latency": self.latency}
        given = {name: text for name, text in every.items() if text is not None}
        budgets = [Budget.parse(text, name) for name, text in given.items()]
        if len(budgets) > 1:
            raise ConfigError(
                f"{', '.join(given)}: expected a budget of one of them, got "
                f"{' and '.join(map(repr, given.values()))}"
            )
        return budgets[0] if budgets else None

    def size_budget(self, source: DataSource | None = None) -> SizeBudget | None:
        """The budget with the sizes of this space; None where there is none.

        Args:
            source: the images of the search; None: those that ``data`` names, which are loaded.

        Raises:
            ConfigError: no network of the space is within the budget.
        """
        budget = self.budget()
        if budget is None:
            return None
        from fastbandit.search.sizes import Sizes

        try:
            return _size_budget(Sizes.of_search(self, source), self.budgeted, budget.ends())
        except ConfigError:
            raise
        except ValueError as error:
            unit = " nanoseconds" if self.budgeted == "latency" else ""
            raise ConfigError(f"{self.budgeted}: {error}{unit}") from None

    def make_bandit(self, source: DataSource | None = None) -> AntiBandit | ChildParent:
        """The bandit of this search: a row for each edge of each cell, an arm an operation.

        Args:
            source: the images of the search, which decide sizes; None: those that ``data`` names.
        """
        searched = self.search_space()
        seed = derive_seed(self.seed, "bandit")
        if self.algorithm == "cp-nas":
            return ChildParent(searched.rows, searched.arms, self.cp.settings(), seed=seed)
        constraints = self._row_constraints(source)
        return AntiBandit(
            searched.rows, len(searched.operations), self.bandit, seed=seed, **constraints
        )

    def _row_constraints(self, source: DataSource | None) -> dict[str, Any]:
        """Stages and sizes, where the budget or the policy needs them."""
        uses = POLICIES[self.bandit.policy].uses_rows
        budget = self.size_budget(source)
        if budget is None and not uses:
            return {}
        from fastbandit.search.sizes import Sizes, stages

        constraints: dict[str, Any] = {"groups": stages(self.search_space())} if uses else {}
        if budget is not None:
            return {
                **constraints,
                "costs": budget.costs,
                "base_cost": budget.base,
                "budget": budget.ends,
            }
        sizes = Sizes.of_search(self, source)
        return {**constraints, "costs": sizes.parameters, "base_cost": sizes.base_parameters}

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


@cache
def _size_budget(sizes: Sizes, kind: str, ends: tuple[float, float]) -> SizeBudget:
    """Made once: thousands of paths are drawn within it."""
    return SizeBudget(sizes.costs(kind), sizes.base(kind), ends)


# What each preset changes. Learning rates, batches and radii are those of the paper's authors as
# far as they are known. The digits are ours: so small a set gives few steps in an epoch, hence
# small batches and a floor under the learning rate (docs/decisions.md#search-on-digits).
#: What was shown to find better networks than chance (docs/compare.md), and level with the best of
#: as many random networks as cost the same. SearchConfig() is the printed algorithm.
RECOMMENDED: dict[str, dict[str, Any]] = {
    "bandit": {"policy": "hierarchical", "mixes": 0.5},
    "final": {"tournament": 16},
}


def _recommended(**settings: Any) -> dict[str, Any]:
    sections = {
        name: {**section, **settings.pop(name, {})} for name, section in RECOMMENDED.items()
    }
    return {**settings, **sections}


PRESETS: dict[str, dict[str, Any]] = {
    # The search of the comparison on the digits, and networks trained from scratch after it.
    "digits": _recommended(
        layers=2,
        parameters="17k:23k",
        train_limit=2400,
        attack={"epsilon": "0.1"},
        bandit={"rounds": 1},
        final={"step_size": "0.01", "train_portion": 0.5, "network_epochs": 10},
    ),
    "digits-full": _recommended(name="digits-full", final={"network_epochs": 30}),
    "smoke": {
        "name": "smoke",
        "init_channels": 4,
        "train_limit": 256,
        "test_limit": 256,
        "batch_size": 64,
        "bandit": {"rounds": 1},
        "final": {"steps": 5, "step_size": "0.05", "tune_epochs": 1, "network_epochs": 6},
    },
    "mnist": _recommended(
        name="mnist",
        data="mnist",
        space="robust9",
        init_channels=16,
        batch_size=512,
        evaluation_batch_size=512,
        learning_rate=0.025,
        learning_rate_min=0.0,
        attack={"epsilon": "0.3"},
        final={"steps": 40, "step_size": "0.01", "network_epochs": 5},
    ),
    "cifar10": _recommended(
        name="cifar10",
        data="cifar10",
        space="robust9",
        init_channels=16,
        batch_size=512,
        evaluation_batch_size=512,
        learning_rate=0.1,
        learning_rate_min=0.0,
        crop_padding=4,
        flip=True,
        cutout_length=16,
        attack={"epsilon": "8/255"},
        final={"steps": 20, "step_size": "2/255", "network_epochs": 10},
    ),
    # T = 1: 35 paths, each 1-bit and in full precision, and clean.
    "digits-binary": {
        "name": "digits-binary",
        "algorithm": "cp-nas",
        "space": "binary8",
        "init_channels": 16,
        # Few images: with 1,600 the 35 paths alone take ten minutes of two cores.
        "train_limit": 640,
        "test_limit": 500,
        "attack": {"steps": 0},
        "cp": {"rounds": 1},
        "final": {"network_epochs": 8},
    },
    # The same under attack: both networks are trained by FGSM, and robust accuracies are scored.
    "digits-binary-robust": {
        "name": "digits-binary-robust",
        "algorithm": "cp-nas",
        "space": "binary8",
        "init_channels": 16,
        "train_limit": 1600,
        "attack": {"epsilon": "0.1", "steps": 1},
        "cp": {"rounds": 1},
        "final": {"network_epochs": 8},
    },
    "mnist-binary": {
        "name": "mnist-binary",
        "data": "mnist",
        "algorithm": "cp-nas",
        "space": "binary8",
        "init_channels": 16,
        "batch_size": 512,
        "evaluation_batch_size": 512,
        "learning_rate": 0.025,
        "learning_rate_min": 0.0,
        "attack": {"epsilon": "0.3", "steps": 0},
        "final": {"steps": 40, "step_size": "0.01", "network_epochs": 5},
    },
}

SearchConfig.presets = PRESETS
# A preset's budget is one of its space and its width, and there is one budget.
BELONGS[SearchConfig] = tuple(
    ("parameters", owner) for owner in ("space", "layers", "init_channels", "macs", "latency")
)
