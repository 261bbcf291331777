"""The trial of CP-NAS: a path is trained 1-bit and in full precision, and scored by both.

Zhang, Xu et al., "Binary Neural Networks", section 4.3, Algorithm 9. The parent is trained first;
both see the same batches and the same random starts. Where the text is silent: both share weights
over the paths, as in the anti-bandit search; the parent has the search's SGD, the child Adam
without weight decay, after each step of which the latents are clamped to [-1, 1]; batch-norm
statistics are those of the path, as ever.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastbandit.bandit import log
from fastbandit.childparent import score
from fastbandit.nn.binary import clamp_latents, latents, use_full_precision
from fastbandit.nn.supernet import Supernet
from fastbandit.runs.cost import accounting
from fastbandit.runs.environment import derive_seed
from fastbandit.runs.session import Session
from fastbandit.runs.tensors import CheckpointError
from fastbandit.runs.training import load_momenta, momenta, sgd
from fastbandit.search.adversarial import FEW_STATISTICS_BATCHES, Adversarial
from fastbandit.search.masking import Masking, Transfer, attack, evaluating, masking, worst_case
from fastbandit.search.setup import Setup
from fastbandit.search.sizes import relative_latencies
from fastbandit.search.trial import Path, PathResult, TrialResult
from fastbandit.training import (
    Cost,
    Engine,
    Evaluation,
    TrainingResult,
    evaluate,
    reestimate_batchnorm,
    reset_batchnorm,
    train_epoch,
)
from fastbandit.training.overfitting import MOST_STEPS

__all__ = ["ChildParentTrial"]

_ADAM = ("exp_avg", "exp_avg_sq", "step")


class ChildParentTrial(Adversarial):
    """Trains parent and child of a path; the score is z of Eq. 4.15.

    The supernet of the search is the child. The parent's weights are a supernet of their own, or
    with ``cp.weights latent`` the child's latents.
    """

    def __init__(self, setup: Setup, session: Session, cost: Cost) -> None:
        super().__init__(setup, session, cost)
        config, child = self.config, setup.supernet
        self.optimizer = torch.optim.Adam(
            child.parameters(), lr=config.cp.learning_rate, foreach=True
        )
        self.parent: Supernet | None = None
        self.parent_optimizer = setup.optimizer
        if config.cp.parent:
            self.parent = child
            if config.cp.weights == "separate":
                # The same initial weights: what differs is what is computed with them.
                self.parent = copy.deepcopy(child)
                use_full_precision(self.parent, True)
                self.parent_optimizer = sgd(self.parent, config, setup.device)
        self._latencies: tuple[float, Tensor] | None = None
        if config.cp.latency_weight:
            self._latencies = relative_latencies(config, setup.source)
        #: Each time that the reward was found to be masked: lines of the bandit's log.
        self.masking: list[dict[str, Any]] = []
        # Steps are not recorded: a recorded one is made for one network and plain SGD.
        self.engine = Engine(config.precision)

    # --- state ----------------------------------------------------------------------------------

    @property
    def _separate(self) -> Supernet | None:
        return None if self.parent is self.supernet else self.parent

    def tensors(self) -> dict[str, Tensor]:
        """Weights and momentum of the parent, and what Adam keeps of the child."""
        tensors: dict[str, Tensor] = {}
        if self._separate is not None:
            tensors |= {f"model.{k}": v for k, v in self._separate.state_dict().items()}
            kept = momenta(self._separate, self.parent_optimizer)
            tensors |= {f"momentum.{k}": v for k, v in kept.items()}
        for name, parameter in self.supernet.named_parameters():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{key}.{name}": state[key] for key in _ADAM if key in state}
        return tensors

    def restore_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`tensors`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "adam": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        if self._separate is not None:
            self._separate.load_state_dict(parts["model"])
            load_momenta(self._separate, self.parent_optimizer, parts["momentum"])
        elif parts["model"]:
            raise CheckpointError("the checkpoint has a parent, this search has none of its own")
        for name, parameter in self.supernet.named_parameters():
            names = {key: f"{key}.{name}" for key in _ADAM}
            if any(one not in parts["adam"] for one in names.values()):
                self.optimizer.state.pop(parameter, None)
                continue
            moments = {key: parts["adam"][one] for key, one in names.items()}
            # The layout of the weight, which a file does not keep.
            state = {
                key: torch.empty_like(parameter, requires_grad=False).copy_(moments[key])
                for key in _ADAM[:2]
            }
            self.optimizer.state[parameter] = {**state, "step": moments["step"].clone()}

    def describe(self) -> dict[str, Any]:
        cp = self.config.cp
        said: dict[str, Any] = {"algorithm": self.config.algorithm, "parent": cp.parent}
        if cp.parent:
            said |= {"beta": cp.beta, "gap": cp.gap, "weights": cp.weights}
        if cp.latency_weight:
            said["latency_weight"] = cp.latency_weight
        return {**super().describe(), "child_parent": said}

    def summary(self) -> dict[str, Any]:
        told = {"child_parent": self.describe()["child_parent"], "masking": self.masking}
        return {**super().summary(), **told}

    def state(self) -> dict[str, Any]:
        return {**super().state(), "masking": self.masking}

    def restore(self, state: dict[str, Any]) -> None:
        super().restore(state)
        self.masking = state.get("masking", [])

    # --- one path -------------------------------------------------------------------------------

    def train(self, path: Path, number: int, rate: float, samples: int) -> TrialResult:
        """Train the parent and the child of the path for one epoch each, and validate both."""
        config, steps = self.config, self.threat.steps
        with accounting(self.cost, None):
            parent = self._train_parent(path, number, rate)
            self._use_child(path)
            for group in self.optimizer.param_groups:
                group["lr"] = config.cp.learning_rate * rate / config.learning_rate
            weights = [w for w in latents(self.supernet) if any(w is p for p in path.parameters)]
            trained = self._epoch(
                self.supernet, path, number, self.optimizer, lambda: clamp_latents(weights)
            )
            evaluation = self._validate(path, number)
        verdict, events = self._check(path, number), []
        if verdict is not None and verdict.overfitted and self.threat.steps < MOST_STEPS:
            events.append(self._overfitted(number, verdict, samples))
            with accounting(self.cost, None):
                evaluation = self._validate(path, number)
                if parent is not None:
                    parent = (parent[0], self._validate_parent(path, number))
        masked = self._look_for_masking(path, number)
        if masked is not None and masked.masked:
            events.append(self._masked(number, masked, samples))
            with accounting(self.cost, None):
                evaluation = self._validate(path, number)
        figures: dict[str, Any] = {"loss": trained.loss, "train_accuracy": trained.accuracy}
        if parent is not None:
            figures |= {"parent_loss": parent[0].loss, "parent_train_accuracy": parent[0].accuracy}
        result = self._scored(path, evaluation, None if parent is None else parent[1], **figures)
        both = [trained] if parent is None else [trained, parent[0]]
        seconds = sum(one.seconds for one in both)
        metrics = {
            "attack_steps": steps,
            "overfitting": None if verdict is None else verdict.to_dict(),
            "masking": None if masked is None else masked.to_dict(),
            "learning_rate": rate,
            "seconds_train": seconds,
            "seconds_validate": evaluation.seconds + (0.0 if parent is None else parent[1].seconds),
            "images_per_second": sum(one.images for one in both) / seconds,
        }
        return TrialResult([result], metrics, events)

    def evaluate(self, path: Path, number: int) -> list[PathResult]:
        with accounting(self.cost, None):
            parent = None
            if self.parent is not None:
                model, scope = self._parent_scope(path)
                self._statistics(model, scope, FEW_STATISTICS_BATCHES)
                parent = self._validate_parent(path, number)
            self._use_child(path)
            self._reestimate(path, FEW_STATISTICS_BATCHES)
            evaluation = self._validate(path, number)
        return [self._scored(path, evaluation, parent)]

    def measure(self, path: Path, *, trained: bool) -> dict[str, Any]:
        """Accuracies of the child, and under ``parent`` those of the parent."""
        measured: dict[str, Any] = {}
        if self.parent is not None:
            model, scope = self._parent_scope(path)
            child = self.supernet
            # Statistics are those of the network that was last trained on the path.
            if not trained or self._separate is None:
                with accounting(self.cost, None):
                    self._statistics(model, scope, FEW_STATISTICS_BATCHES)
            self.supernet = model
            try:
                parent = Path(
                    path.choices, scope["modules"], scope["parameters"], None, self.engine
                )
                measured["parent"] = super().measure(parent, trained=True)
            finally:
                self.supernet = child
        self._use_child(path)
        latent = self.parent is not None and self._separate is None
        return {**super().measure(path, trained=trained and not latent), **measured}

    # --- inside ---------------------------------------------------------------------------------

    def _use_child(self, path: Path) -> None:
        use_full_precision(self.supernet, False)
        self.optimizer.param_groups[0]["params"] = path.parameters

    def _parent_scope(self, path: Path) -> tuple[Supernet, dict[str, Any]]:
        """The parent, set to the path, and what bounds a training or an evaluation to it."""
        assert self.parent is not None
        if self._separate is None:
            use_full_precision(self.supernet, True)
        else:
            self.parent.set_path(path.choices[0])
        modules = list(self.parent.path_modules())
        parameters = list(self.parent.path_parameters())
        self.parent_optimizer.param_groups[0]["params"] = parameters
        scope = {"modules": modules, "parameters": parameters, "engine": self.engine}
        return self.parent, scope

    def _train_parent(
        self, path: Path, number: int, rate: float
    ) -> tuple[TrainingResult, Evaluation] | None:
        if self.parent is None:
            return None
        model, scope = self._parent_scope(path)
        self.parent_optimizer.param_groups[0]["lr"] = rate
        parent = Path(path.choices, scope["modules"], scope["parameters"], None, self.engine)
        after = None
        if self._separate is None:
            weights = [w for w in latents(model) if any(w is p for p in parent.parameters)]

            def after() -> None:
                clamp_latents(weights)

        trained = self._epoch(model, parent, number, self.parent_optimizer, after)
        return trained, self._validate_parent(path, number)

    def _epoch(
        self,
        model: nn.Module,
        path: Path,
        number: int,
        optimizer: torch.optim.Optimizer,
        after_step: Any,
    ) -> TrainingResult:
        reset_batchnorm(path.modules)
        return train_epoch(
            model,
            self.setup.weights,
            number,
            optimizer,
            self.threat,
            seed=derive_seed(self.config.seed, "attack", "train"),
            cost=self.cost,
            grad_clip=self.config.grad_clip,
            modules=path.modules,
            parameters=path.parameters,
            after_step=after_step,
            engine=self.engine,
        )

    def _validate_parent(self, path: Path, number: int) -> Evaluation:
        model, scope = self._parent_scope(path)
        return evaluate(
            model,
            self.setup.validation,
            self.reward_threat,
            seed=derive_seed(self.config.seed, "attack", "validation"),
            offset=number,
            cost=self.cost,
            **scope,
        )

    # Masking (see fastbandit.search.masking).

    def _validate(self, path: Path, number: int) -> Evaluation:
        """As ever; under the worst case of several runs once the reward was found to be masked."""
        if not self.masking:
            return super()._validate(path, number)
        return worst_case(
            self.supernet,
            self.setup.validation,
            self.reward_threat,
            seed=derive_seed(self.config.seed, "attack", "masking", str(number)),
            cost=self.cost,
            modules=path.modules,
            transfer=None if self._separate is None else self._transfer(path),
        )

    def _transfer(self, path: Path) -> Transfer:
        """Images that the parent of the path makes."""
        model, scope = self._parent_scope(path)
        threat = self.reward_threat

        def made(x: Tensor, y: Tensor, ids: Tensor) -> Tensor:
            with evaluating(scope["modules"]):
                return attack(model, threat, x, y, ids, restarts=1, seed=self.config.seed)

        return made

    def _look_for_masking(self, path: Path, number: int) -> Masking | None:
        """Whether the attack of the reward overstates the path; None where it is not asked."""
        every = self.config.guard.every
        due = self.guard is not None and (number + 1) % every == 0 and not self.masking
        if not due:
            return None
        seed = derive_seed(self.config.seed, "attack", "masking")
        with accounting(self.cost, None):
            rewarded = evaluate(
                self.supernet, self.setup.guard, self.reward_threat, seed=seed, cost=self.cost,
                **path.scope,
            )  # fmt: skip
            return masking(
                self.supernet, self.setup.guard, self.reward_threat, rewarded.robust_accuracy,
                seed=seed, cost=self.cost, modules=path.modules,
            )  # fmt: skip

    def _masked(self, number: int, found: Masking, samples: int) -> dict[str, Any]:
        """Reward the worst case from now on; returns the line for the bandit's log."""
        line = log.RewardChanged(
            sample=samples,
            epoch=number,
            rewarded=found.rewarded,
            restarts=found.restarts,
            queries=found.queries,
        ).to_line()
        self.masking.append(line)
        self.session.progress.note(
            f"masked reward in epoch {number + 1}: accuracy {100 * found.rewarded:.1f} % under its "
            f"attack, {100 * found.restarts:.1f} % under random starts through several surrogates, "
            f"{100 * found.queries:.1f} % under queries; on with the worst case of several runs"
        )
        return line

    def _statistics(self, model: nn.Module, scope: dict[str, Any], batches: int) -> None:
        reestimate_batchnorm(
            model,
            self.setup.statistics,
            self.threat,
            count=batches,
            seed=derive_seed(self.config.seed, "attack", "statistics"),
            cost=self.cost,
            **scope,
        )

    def _penalty(self, path: Path) -> float:
        """What the latency of the path takes off its score."""
        if self._latencies is None:
            return 0.0
        base, edges = self._latencies
        (choice,) = path.choices
        own = edges.gather(1, choice.cpu().unsqueeze(1)).sum()
        return self.config.cp.latency_weight * (base + float(own))

    def _scored(
        self, path: Path, child: Evaluation, parent: Evaluation | None, **training: Any
    ) -> PathResult:
        """z, with what it is made of."""
        result = self._result(child, **training)
        own, cp = result.score, self.config.cp
        theirs = own if parent is None else self._result(parent).score
        logged, metrics = dict(result.log), {**result.metrics, "child_accuracy": own}
        if parent is not None:
            metrics |= {
                "parent_accuracy": theirs,
                "parent_clean_accuracy": parent.clean_accuracy,
                "parent_robust_accuracy": parent.robust_accuracy,
            }
        if self.config.algorithm == "cp-nas":
            logged |= {"child_accuracy": own, "parent_accuracy": theirs}
        z, penalty = score(own, theirs, beta=cp.beta, gap=cp.gap), self._penalty(path)
        if self._latencies is not None:
            logged["penalty"] = metrics["latency_penalty"] = penalty
        return PathResult(z - penalty, logged, metrics)
