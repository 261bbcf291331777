"""The loop of Algorithm 8: sample a path, train it, credit the bandit, abandon arms.

Who trains and scores a path is a :class:`~fastbandit.search.trial.Trial`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastbandit.bandit import log
from fastbandit.distributed import Team
from fastbandit.genotype import Genotype
from fastbandit.operations import OperationOptions
from fastbandit.runs.cost import EpochTimer
from fastbandit.runs.environment import peak_memory_mb
from fastbandit.runs.session import (
    Session,
)
from fastbandit.runs.tensors import CheckpointError
from fastbandit.runs.training import load_momenta, momenta
from fastbandit.search.adversarial import Adversarial
from fastbandit.search.binary import credit, start_line
from fastbandit.search.networks import EDGES_PER_NODE
from fastbandit.search.setup import Setup
from fastbandit.search.trial import Path, PathResult, Trial, TrialResult
from fastbandit.training import Cost, Engine, Graphs, cosine

__all__ = ["MakeTrial", "SearchRun"]

#: Makes the trial of a search.
MakeTrial = Callable[[Setup, Session, Cost], Trial]


class SearchRun:
    """A search in progress: its state, one epoch, and how the state goes to disk and back.

    Args:
        session: where files go, and the processes of the run.
        trial: makes what trains and scores a path.
    """

    def __init__(
        self,
        setup: Setup,
        session: Session,
        trial: MakeTrial = Adversarial,
    ) -> None:
        self.setup, self.session, self.config = setup, session, setup.config
        self.group = session.group
        self.supernet = setup.supernet
        self.space = self.config.search_space()
        self.bandit = self.config.make_bandit(setup.source)
        self.cost = Cost()
        self.engine = Engine(
            self.config.precision,
            Graphs(self.config.graphs, setup.device, processes=session.processes),
        )
        self.trial = trial(setup, session, self.cost)
        # Epochs before the first path, and of the found path after the last pruning.
        self.prepared = self.tuned = 0
        self.peak_memory = 0.0

    # State on disk.

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that :meth:`restore` needs."""
        bandit = self.bandit.state_dict()
        tensors = {f"model.{k}": v for k, v in self.supernet.state_dict().items()}
        buffers = momenta(self.supernet, self.setup.optimizer)
        tensors |= {f"momentum.{k}": v for k, v in buffers.items()}
        tensors |= {f"bandit.{k}": v for k, v in bandit.items() if isinstance(v, Tensor)}
        # A trial with weights of its own says so.
        own = getattr(self.trial, "tensors", None)
        tensors |= {f"trial.{k}": v for k, v in own().items()} if own is not None else {}
        state = {
            "tuned": self.tuned,
            **({"prepared": self.prepared} if self.prepared else {}),
            "cost": self.cost.state_dict(),
            "peak_memory_mb": self.peak_memory,
            **self.trial.state(),
            "bandit": {k: v for k, v in bandit.items() if not isinstance(v, Tensor)},
        }
        return tensors, state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Go on from a state."""
        parts: dict[str, dict[str, Tensor]] = {
            part: {} for part in ("model", "momentum", "bandit", "trial")
        }
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        try:
            self.bandit.load_state_dict({**state["bandit"], **parts["bandit"]})
            self.supernet.load_state_dict(parts["model"])
            if hasattr(self.trial, "restore_tensors"):
                self.trial.restore_tensors(parts["trial"])
        except (ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the checkpoint does not fit this search: {str(error).splitlines()[0]}"
            ) from None
        load_momenta(self.supernet, self.setup.optimizer, parts["momentum"])
        self.cost.load_state_dict(state["cost"])
        self.tuned, self.prepared = state.get("tuned", 0), state.get("prepared", 0)
        self.trial.restore(state)
        self.peak_memory = state["peak_memory_mb"]

    # What comes before the first path.

    def prepare(self) -> dict[str, Any] | None:
        """One step of the trial's preparation; logs and saves. Returns its metrics, or None where
        nothing is left to do."""
        prepared = self.trial.prepare(self.prepared)
        if prepared is None:
            return None
        self.peak_memory = max(self.peak_memory, peak_memory_mb(self.setup.device))
        self.session.append("bandit.jsonl", *prepared.pop("events", ()))
        if prepared["phase"] == "supernet":
            metrics = {
                "epoch": self.prepared,
                "arms": self.bandit.arms_left,
                "samples": self.bandit.samples,
                **prepared,
                "peak_memory_mb": self.peak_memory,
            }
            self.prepared += 1
            self.session.append("metrics.jsonl", metrics)
        self.session.save(self)
        return prepared

    # One sample of Algorithm 8.

    @property
    def paths_per_epoch(self) -> int:
        """Paths that are trained at a time."""
        paths = self.group is not None and self.config.parallel == "paths"
        return self.group.size if paths and self.group is not None else self.trial.paths_at_a_time

    def team(self, paths: int) -> Team | None:
        """The processes that share this one's path when ``paths`` are computed at a time."""
        return None if self.group is None else Team(self.group, paths)

    def use_path(self, choices: Sequence[Tensor], team: Team | None) -> Path:
        """Set the supernet to this process's path of ``choices``."""
        place = 0 if team is None else team.path
        parameters = []
        for choice in choices:
            self.supernet.set_path(choice)
            parameters.append(list(self.supernet.path_parameters()))
        self.supernet.set_path(choices[place])
        # The optimiser's state is kept by parameter, so momentum of the other arms stays. What
        # another process's path uses is updated here too: all hold the same weights.
        updated = parameters[0] if team is None else team.use(parameters)
        self.setup.optimizer.param_groups[0]["params"] = updated
        modules = list(self.supernet.path_modules())
        return Path(list(choices), modules, parameters[place], team, self.engine)

    def draw(self, paths: int, *, trained: bool) -> tuple[list[Tensor], list[Tensor]]:
        """Paths from the bandit and the probability of each of their arms, [rows] each."""
        choices, probabilities = [], []
        for _ in range(paths):
            distribution = self.bandit.probabilities(trained=trained)
            choice = self.bandit.sample(trained=trained, ahead=True)
            choices.append(choice)
            probabilities.append(distribution.gather(1, choice.unsqueeze(1)).squeeze(1))
        if self.group is not None:
            # Every process draws the same from the same state; if not, nothing after it is right.
            self.group.check_same("the path drawn", torch.stack(choices))
        return choices, probabilities

    def credit(
        self, choice: Tensor, probability: Tensor, result: PathResult, *, trained: bool
    ) -> dict[str, Any]:
        """Credit a path with its score; returns the line for the bandit's log."""
        return credit(self.bandit, choice, probability, result, trained=trained).to_line()

    def epoch(self) -> dict[str, Any]:
        """Sample, train, validate, credit, perhaps prune; log and save. Returns the metrics.

        With ``parallel paths`` that is one epoch of several paths, numbered one after the other:
        as many as there are processes, or as are left of the round or of the initial pass.
        """
        bandit, config = self.bandit, self.config
        timer = EpochTimer(self.cost)
        number, phase, arms = bandit.trained, bandit.phase, bandit.arms_left
        choices, probabilities = self.draw(min(self.paths_per_epoch, bandit.room), trained=True)
        paths = len(choices)
        path = self.use_path(choices, self.team(paths))
        learning_rate = cosine(
            number, bandit.total_samples, config.learning_rate, config.learning_rate_min
        )
        trained = self.trial.train(path, number, learning_rate, bandit.samples)
        lines = list(trained.events)
        lines += [
            self.credit(*each, trained=True)
            for each in zip(choices, probabilities, trained.paths, strict=True)
        ]
        # Before the arms are judged, so that the judgement has them too.
        remaining = config.bandit.evaluations_per_epoch * paths if phase == "search" else 0
        while remaining:
            few = min(self.paths_per_epoch, remaining)
            lines += self.evaluate_only(number, few)
            remaining -= few
        while bandit.due:
            lines += self.prune()
        if bandit.finished:
            end = log.End(sample=bandit.samples, choice=bandit.final().tolist())
            lines.append(end.to_line())
        self.session.append("bandit.jsonl", *lines)
        return self._end_epoch(timer, trained, number, phase, arms)

    def evaluate_only(self, number: int, paths: int) -> list[dict[str, Any]]:
        """Draw paths, evaluate them with the weights as they are, credit them; their lines."""
        choices, probabilities = self.draw(paths, trained=False)
        results = self.trial.evaluate(self.use_path(choices, self.team(paths)), number)
        return [
            self.credit(*each, trained=False)
            for each in zip(choices, probabilities, results, strict=True)
        ]

    def tune(self) -> dict[str, Any]:
        """Train the found path for one more epoch; log and save. Returns the metrics.

        The last pruning leaves a path that was never trained as a whole: its accuracy would say
        nothing. The learning rate falls from that of the search's beginning to 0.
        """
        config, bandit = self.config, self.bandit
        timer, number = EpochTimer(self.cost), bandit.trained + self.tuned
        path = self.use_path([bandit.final()], self.team(1))
        learning_rate = cosine(self.tuned, config.final.tune_epochs, config.learning_rate)
        # The bandit's log has ended; a stronger attack is in the metrics and in the summary.
        trained = self.trial.tune(path, number, learning_rate, bandit.samples)
        self.tuned += 1
        return self._end_epoch(timer, trained, number, "tuning", bandit.arms_left)

    def _end_epoch(
        self, timer: EpochTimer, trained: TrialResult, number: int, phase: str, arms: int
    ) -> dict[str, Any]:
        """Write the metrics of an epoch and a checkpoint; returns the metrics of its last path."""
        seconds = timer.stop()
        self.peak_memory = max(self.peak_memory, peak_memory_mb(self.setup.device))
        metrics = [
            {
                "epoch": self.prepared + number + i,
                "phase": phase,
                "arms": arms,
                "samples": self.bandit.samples,
                **result.metrics,
                **({} if phase == "tuning" else {"reward": result.score}),
                **trained.metrics,
                "seconds_total": seconds / len(trained.paths),
                "peak_memory_mb": self.peak_memory,
            }
            for i, result in enumerate(trained.paths)
        ]
        self.session.append("metrics.jsonl", *metrics)
        self.session.save(self)
        return metrics[-1]

    def prune(self) -> list[dict[str, Any]]:
        """Abandon one arm on every edge; returns the lines that say which and why."""
        bandit = self.bandit
        edges, operations = self.space.edge_names, self.space.operations
        # Both algorithms have what is read here.
        abandoned = log.prune(bandit, edges, operations)
        lines = [line.to_line() for line in abandoned]
        self.session.append(
            "genotypes.jsonl",
            {
                "sample": bandit.samples,
                "arms_left": bandit.arms_left,
                "choice": bandit.final().tolist(),
                "genotype": self.genotype().to_dict(),
            },
        )
        return lines

    def start_line(self) -> dict[str, Any]:
        """The first line of the bandit's log: what it takes to replay the rest."""
        return start_line(self.config, self.bandit).to_line()

    def genotype(self, choice: Sequence[int] | None = None) -> Genotype:
        """The network of a choice; None: of the best arm of every edge so far, the only one at the
        end."""
        return Genotype.from_choices(
            self.space,
            self.bandit.final().tolist() if choice is None else choice,
            mean=self.bandit.score().tolist(),
            edges_per_node=EDGES_PER_NODE[self.config.edges_per_node],
            options=OperationOptions.of(self.config),
            macro={"layers": self.space.cells, "channels": self.config.init_channels},
            search={
                "run_id": self.session.run_id,
                "seed": self.config.seed,
                "samples": self.bandit.samples,
                "policy": "cp-nas"
                if self.config.algorithm == "cp-nas"
                else self.config.bandit.policy,
                "data": self.setup.source.name,
                **self.trial.describe(),
            },
        )
