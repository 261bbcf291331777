"""The adversarial trial of Algorithm 8: a path is trained against an attack and scored under it."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastbandit.bandit import log
from fastbandit.distributed import Team
from fastbandit.runs.cost import accounting
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.session import Session
from fastbandit.runs.training import overfitting_guard
from fastbandit.search.setup import Setup
from fastbandit.search.trial import Path, PathResult, TrialResult
from fastbandit.training import (
    Cost,
    Evaluation,
    evaluate,
    reestimate_batchnorm,
    reset_batchnorm,
    train_epoch,
)
from fastbandit.training.overfitting import MOST_STEPS, Verdict, stronger

__all__ = ["FEW_STATISTICS_BATCHES", "Adversarial"]

# A path that is evaluated without having been trained last gets its batch-norm statistics from
# this many training batches.
_STATISTICS_BATCHES = 8
#: Fewer for the paths that are only evaluated during the search, which are meant to be cheap.
FEW_STATISTICS_BATCHES = 4


class Adversarial:
    """Trains paths adversarially; the score is the validation accuracy under the same attack.

    A guard looks for catastrophic overfitting now and then. Where it finds it, training and reward
    go on with a stronger attack.
    """

    @property
    def paths_at_a_time(self) -> int:
        return 1

    @property
    def tunes(self) -> bool:
        return True

    def __init__(self, setup: Setup, session: Session, cost: Cost) -> None:
        self.setup, self.session, self.cost = setup, session, cost
        self.config, self.supernet = setup.config, setup.supernet
        self.threat = self.config.training_threat()
        self.reward_threat = self.config.reward_threat()
        self.guard = overfitting_guard(self.config, self.threat, setup.guard)
        # Each time that catastrophic overfitting was found: lines of the bandit's log.
        self.overfitting: list[dict[str, Any]] = []

    def describe(self) -> dict[str, Any]:
        return {"threat": self.reward_threat.to_dict()}

    def summary(self) -> dict[str, Any]:
        return {
            "threat": self.config.training_threat().to_dict(),
            "overfitting": self.overfitting,
            "reward": self.config.reward,
        }

    def state(self) -> dict[str, Any]:
        return {"overfitting": self.overfitting}

    def restore(self, state: dict[str, Any]) -> None:
        self.overfitting = state.get("overfitting", [])
        self.threat = self.config.training_threat()
        self.reward_threat = self.config.reward_threat()
        for _ in self.overfitting:
            self._strengthen()

    # One path.

    def prepare(self, done: int) -> dict[str, Any] | None:
        return None

    def train(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        """Train this process's path, epoch ``number + path.place``, and validate it."""
        config, team, sample = self.config, path.team, number + path.place
        steps = self.threat.steps
        self.setup.optimizer.param_groups[0]["lr"] = rate
        reset_batchnorm(path.modules)
        with accounting(self.cost, team):
            trained = train_epoch(
                self.supernet,
                self.setup.weights,
                sample,
                self.setup.optimizer,
                self.threat,
                seed=derive_seed(config.seed, "attack", "train"),
                cost=self.cost,
                grad_clip=config.grad_clip,
                **path.scope,
            )
            evaluation = self._validate(path, sample)
        verdict, events = self._check(path, number), []
        if verdict is not None and verdict.overfitted and self.threat.steps < MOST_STEPS:
            events.append(self._overfitted(number, verdict, samples))
            # A path is not credited with an accuracy that the overfitting has made up.
            with accounting(self.cost, team):
                evaluation = self._validate(path, sample)
        figures = [[trained.loss, trained.accuracy, trained.images]]
        if team is not None:
            figures = [list(values) for values in team.collect(figures[0])]
        images = sum(int(count) for _, _, count in figures)
        results = [
            self._result(each, loss=loss, train_accuracy=accuracy)
            for (loss, accuracy, _), each in zip(
                figures, _of_all_paths(team, evaluation), strict=True
            )
        ]
        metrics = {
            "attack_steps": steps,
            "overfitting": None if verdict is None else verdict.to_dict(),
            "learning_rate": rate,
            # The paths were trained at the same time: each has its share of it.
            "seconds_train": trained.seconds / path.paths,
            "seconds_validate": evaluation.seconds / path.paths,
            "images_per_second": images / trained.seconds,
        }
        return TrialResult(results, metrics, events)

    def tune(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        return self.train(path, number, rate, samples)

    def evaluate(self, path: Path, number: int) -> list[PathResult]:
        with accounting(self.cost, path.team):
            self._reestimate(path, FEW_STATISTICS_BATCHES)
            evaluation = self._validate(path, number)
        return [self._result(each) for each in _of_all_paths(path.team, evaluation)]

    def measure(self, path: Path, *, trained: bool) -> dict[str, Any]:
        """Accuracy on the validation and the test images under the final attack."""
        config, threat = self.config, self.config.final_threat()
        if not trained:
            with accounting(self.cost, path.team):
                self._reestimate(path, _STATISTICS_BATCHES)
        measured: dict[str, Any] = {}
        loaders = {"final": self.setup.validation, "test": self.setup.test}
        for name, loader in loaders.items():
            split = "validation" if name == "final" else name
            if loader is None:
                measured[name] = None
                continue
            with accounting(self.cost, path.team):
                evaluation = evaluate(
                    self.supernet,
                    loader,
                    threat,
                    seed=derive_seed(config.seed, "attack", "final", split),
                    cost=self.cost,
                    **path.scope,
                )
            measured[name] = {
                "split": split,
                "n": evaluation.images,
                "clean_accuracy": evaluation.clean_accuracy,
                "robust_accuracy": evaluation.robust_accuracy,
                "attack": threat.describe(),
            }
        return measured

    def _result(self, evaluation: Evaluation, **training: Any) -> PathResult:
        accuracies = {
            "clean_accuracy": evaluation.clean_accuracy,
            "robust_accuracy": evaluation.robust_accuracy,
        }
        score = {
            "robust": evaluation.robust_accuracy,
            "clean": evaluation.clean_accuracy,
            "mix": 0.5 * (evaluation.robust_accuracy + evaluation.clean_accuracy),
        }[self.config.reward]
        return PathResult(score, accuracies, {**training, **accuracies})

    def _validate(self, path: Path, number: int) -> Evaluation:
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
            **path.scope,
        )

    def _reestimate(self, path: Path, batches: int) -> None:
        """Batch-norm statistics for a path that was not trained last."""
        reestimate_batchnorm(
            self.supernet,
            self.setup.statistics,
            self.threat,
            count=batches,
            seed=derive_seed(self.config.seed, "attack", "statistics"),
            cost=self.cost,
            **path.scope,
        )

    # Catastrophic overfitting.

    def _strengthen(self) -> None:
        self.threat = stronger(self.threat)
        # The reward's attack is the training step's.
        self.reward_threat = dataclasses.replace(self.threat, bn_mode="eval")

    def _check(self, path: Path, number: int) -> Verdict | None:
        """Look for catastrophic overfitting where it is time to; None where it is not."""
        every = self.config.guard.every
        if self.guard is None or (number + path.paths) // every == number // every:
            return None
        with accounting(self.cost, path.team):
            evaluations = self.guard.measure(
                self.supernet, self.threat, cost=self.cost, **path.scope
            )
        return self.guard.judge(*(_of_all_paths(path.team, one) for one in evaluations))

    def _overfitted(self, number: int, verdict: Verdict, samples: int) -> dict[str, Any]:
        """Train against a stronger attack from now on; returns the line for the bandit's log."""
        self._strengthen()
        line = log.AttackChanged(
            sample=samples,
            epoch=number,
            trained=verdict.trained,
            strong=verdict.strong,
            steps=self.threat.steps,
            attack=self.threat.describe(),
        ).to_line()
        self.overfitting.append(line)
        self.session.progress.note(
            f"catastrophic overfitting in epoch {number + 1}: accuracy "
            f"{100 * verdict.trained:.1f} % under the training attack, "
            f"{100 * verdict.strong:.1f} % under a stronger one; on with {line['attack']}"
        )
        return line


def _of_all_paths(team: Team | None, evaluation: Evaluation) -> list[Evaluation]:
    """The evaluation of every path that was computed at the same time, on every process."""
    if team is None:
        return [evaluation]
    counts = team.collect([evaluation.clean_correct, evaluation.robust_correct, evaluation.images])
    return [
        Evaluation(int(clean), int(robust), int(images), evaluation.seconds)
        for clean, robust, images in counts
    ]
