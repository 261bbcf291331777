"""Trials whose reward does not come from one epoch of a path: a supernet first, or networks alone.

In Algorithm 8 a path is credited with its accuracy after one epoch with weights that it shares with
all others. Where those weights have learnt too little to rank paths, the reward is noise. Two other
ways to a reward are here:

- the shared weights are trained first, one path a batch, every operation of an edge as often as any
  other (Guo et al., "Single Path One-Shot Neural Architecture Search with Uniform Sampling", ECCV
  2020; Chu et al., "FairNAS", ICCV 2021), and paths are then only evaluated;
- the network of a path is trained alone for a few epochs.

Whether the first can be trusted is measured: some networks are trained alone, and the rank
correlation of their accuracy with the reward decides how the search goes on.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbandit._statistics import rank_correlation
from fastbandit.runs.cost import COUNTS, EpochTimer
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.processes import Workers
from fastbandit.runs.session import Session
from fastbandit.search.adversarial import FEW_STATISTICS_BATCHES, Adversarial
from fastbandit.search.networks import FOLDER, finished_network, random_choice
from fastbandit.search.setup import Setup
from fastbandit.search.tournament import (
    ALONE,
    MIXES,
    Piece,
    alone_settings,
    genotype_of,
    reward_of,
    train_alone,
)
from fastbandit.search.trial import Path, PathResult, TrialResult
from fastbandit.training import Cost, Engine, train_paths
from fastbandit.training.overfitting import MOST_STEPS

__all__ = ["Prepared"]


class Prepared(Adversarial):
    """The trial of a search with ``supernet.epochs`` or with ``rewards: alone``.

    Args:
        workers: train several networks at a time.
    """

    def __init__(self, setup: Setup, session: Session, cost: Cost, workers: Workers) -> None:
        super().__init__(setup, session, cost)
        self.workers = workers
        self.engine = Engine(self.config.precision)
        # The same for all trainings, so that each process gets it once.
        self.unseen = dataclasses.replace(setup.source, test=None)
        # What the check of the reward found; None before it.
        self.checked: dict[str, Any] | None = None

    @property
    def alone(self) -> bool:
        """Whether a path is credited with the accuracy of its network trained alone."""
        if self.config.rewards == "alone":
            return True
        return self.checked is not None and not self.checked["trusted"]

    @property
    def tunes(self) -> bool:
        """Without shared weights that were trained there is nothing to tune."""
        return not self.alone

    @property
    def paths_at_a_time(self) -> int:
        return self.config.alone.paths if self.alone else 1

    def state(self) -> dict[str, Any]:
        return {**super().state(), "reward_check": self.checked}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.checked = state["reward_check"]

    def summary(self) -> dict[str, Any]:
        return {
            **super().summary(),
            "rewards": "alone" if self.alone else "supernet",
            "supernet_epochs": self.config.supernet.epochs,
            "reward_check": self.checked,
        }

    # Before the first path.

    def prepare(self, done: int) -> dict[str, Any] | None:
        supernet = self.config.supernet
        if self.config.rewards == "alone":
            return None
        if done < supernet.epochs:
            return self._train_supernet(done)
        if supernet.check and self.checked is None:
            return self._check_reward()
        return None

    def _train_supernet(self, number: int) -> dict[str, Any]:
        """One epoch of the shared weights, one path a batch."""
        config, timer, steps = self.config, EpochTimer(self.cost), self.threat.steps
        batches, epochs = len(self.setup.weights), config.supernet.epochs
        warm = config.supernet.warmup * epochs * batches

        def learning_rate(step: int) -> float:
            done = number * batches + step
            if done < warm:
                return config.learning_rate * min((done + 1) / warm, 1.0)
            share = (done - warm) / max(epochs * batches - warm, 1)
            low, high = config.learning_rate_min, config.learning_rate
            return low + (high - low) * 0.5 * (1.0 + math.cos(math.pi * share))

        trained = train_paths(
            self.supernet,
            self.setup.weights,
            number,
            self.setup.optimizer,
            self.threat,
            paths=self._balanced(number * batches),
            seed=derive_seed(config.seed, "attack", "train"),
            cost=self.cost,
            grad_clip=config.grad_clip,
            learning_rate=learning_rate,
            engine=self.engine,
        )
        events = self._guarded(number)
        return {
            "events": events,
            "phase": "supernet",
            "loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "clean_accuracy": None,
            "robust_accuracy": None,
            "attack_steps": steps,
            "learning_rate": self.setup.optimizer.param_groups[0]["lr"],
            "seconds_train": trained.seconds,
            "seconds_total": timer.stop(),
            "images_per_second": trained.images / trained.seconds,
        }

    def _guarded(self, number: int) -> list[dict[str, Any]]:
        """Look for catastrophic overfitting where it is time to, on the path trained last; lines
        for the bandit's log."""
        chosen = self.supernet.path
        if self.guard is None or chosen is None or (number + 1) % self.config.guard.every:
            return []
        path = self._path(torch.tensor(chosen))
        self._reestimate(path, FEW_STATISTICS_BATCHES)
        verdict = self._check(path, number)
        if verdict is None or not verdict.overfitted or self.threat.steps >= MOST_STEPS:
            return []
        return [self._overfitted(number, verdict, 0)]

    def _path(self, choice: Tensor) -> Path:
        """The supernet set to a choice."""
        self.supernet.set_path(choice)
        modules, parameters = self.supernet.path_modules(), self.supernet.path_parameters()
        return Path([choice], list(modules), list(parameters), None, self.engine)

    def _balanced(self, first: int) -> Iterator[Tensor]:
        """Paths of the batches from number ``first`` on: every arm of a row is in one of each K."""
        searched = self.config.search_space()
        rows, arms = searched.rows, searched.arms
        batch = first
        while True:
            block, place = divmod(batch, arms)
            generator = torch.Generator().manual_seed(
                derive_seed(self.config.seed, "supernet", block)
            )
            orders = torch.rand(rows, arms, generator=generator).argsort(1)
            yield orders[:, place]
            batch += 1

    def _check_reward(self) -> dict[str, Any]:
        """Train some networks alone and compare their accuracy with the reward of their paths."""
        config, started = self.config, time.perf_counter()
        choices = [
            random_choice(config, "reward check", number, source=self.setup.source, mixes=MIXES)
            for number in range(config.supernet.check)
        ]
        rewards = []
        for choice in choices:
            rewards.append(self.evaluate(self._path(choice), 0)[0].score)
        trainings = self._judge(choices, "check", "check of the reward")
        scores = [reward_of(config, one) for one in trainings]
        rho, low, high = rank_correlation(rewards, scores)
        trusted = rho >= config.supernet.threshold
        self.checked = {
            "networks": len(choices),
            "epochs": config.alone.epochs,
            "rewards": rewards,
            "alone": scores,
            "rank_correlation": None if math.isnan(rho) else rho,
            "low": low,
            "high": high,
            "threshold": config.supernet.threshold,
            "trusted": trusted,
        }
        self.session.progress.line(
            f"check of the reward: rank correlation of shared weights with {len(choices)} networks "
            f"trained alone {rho:.2f} [{low:.2f}, {high:.2f}], threshold "
            f"{config.supernet.threshold:g}: "
            + (
                "paths are credited with the accuracy of shared weights"
                if trusted
                else "the shared weights do not rank networks, so paths are credited with the "
                "accuracy of their networks trained alone"
            )
        )
        return {
            "phase": "check",
            "loss": None,
            "clean_accuracy": None,
            "robust_accuracy": None,
            "seconds_total": time.perf_counter() - started,
        }

    # One path.

    def _judge(self, choices: Sequence[Tensor], *purpose: str | int) -> list[dict[str, Any]]:
        """The figures of the choices' networks trained alone; what it costs enters the ledger."""
        config, session = self.config, self.session
        settings = alone_settings(config, config.alone.epochs, "alone", str(purpose[0]))
        folder = session.path / FOLDER / ALONE / "-".join(map(str, purpose))
        # What was there before is in the last checkpoint.
        for other in folder.parent.glob("*"):
            if other != folder:
                shutil.rmtree(other)
        pieces = [
            Piece(settings, genotype_of(config, choice.tolist()), folder / f"{number:03}")
            for number, choice in enumerate(choices)
        ]
        # Those that an earlier process brought to their end; it is gone, and its ledger with it.
        finished = [finished_network(one.folder, settings, one.genotype) for one in pieces]
        seconds = sum(one["cost"]["seconds_total"] for one in finished if one is not None)
        started = time.perf_counter()
        trainings: list[dict[str, Any]] = [{} for _ in pieces]
        train_alone(pieces, self.unseen, self.workers, trainings.__setitem__)
        for one in trainings:
            for name in COUNTS:
                setattr(self.cost, name, getattr(self.cost, name) + one[name])
        self.cost.add_seconds("train", seconds + time.perf_counter() - started)
        return trainings

    def train(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        """Score the paths; with ``alone`` their networks are trained from scratch first."""
        started = time.perf_counter()
        if self.alone:
            trainings = self._judge(path.choices, "path", number)
            results = [self._of(one) for one in trainings]
            images = sum(one["images_trained"] for one in trainings)
            seconds = time.perf_counter() - started
            metrics = {
                "seconds_train": seconds / len(trainings),
                "images_per_second": images / seconds,
            }
            return TrialResult(results, metrics, [])
        return TrialResult(self.evaluate(path, number), {}, [])

    def tune(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        return super().train(path, number, rate, samples)

    def _of(self, training: dict[str, Any]) -> PathResult:
        accuracies = {name: training[name] for name in ("clean_accuracy", "robust_accuracy")}
        return PathResult(reward_of(self.config, training), accuracies, dict(accuracies))

    def measure(self, path: Path, *, trained: bool) -> dict[str, Any]:
        """With ``alone`` the figures of the path's network after its training alone, on the
        validation images; the test images wait for the network found."""
        if not self.alone:
            return super().measure(path, trained=trained)
        training = self._judge(path.choices, "found")[0]
        settings = alone_settings(self.config, self.config.alone.epochs, "alone", "found")
        return {
            "final": {
                "split": "validation",
                "n": training["n"],
                "clean_accuracy": training["clean_accuracy"],
                "robust_accuracy": training["robust_accuracy"],
                "attack": settings.selection_threat().describe(),
            },
            "test": None,
        }
