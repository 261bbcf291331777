"""The training of a network from scratch: one epoch, and how its state goes to disk and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbandit._version import __version__
from fastbandit.callbacks import Callback
from fastbandit.data import DataSource
from fastbandit.distributed import Group, Team
from fastbandit.genotype import Genotype
from fastbandit.models import BEST, LAST, multiply_adds, write_card
from fastbandit.nn.binary import clamp_latents, latents
from fastbandit.operations import without_defaults
from fastbandit.retrain.binary import kernel_loss_of, step_of, use_step
from fastbandit.retrain.config import RetrainConfig
from fastbandit.retrain.genotypes import check_genotype, with_genotype
from fastbandit.retrain.model_file import Record, selection_rule, write_model
from fastbandit.retrain.setup import Setup, build
from fastbandit.runs.cost import EpochTimer, accounting, cost_summary, phase
from fastbandit.runs.environment import derive_seed, peak_memory_mb
from fastbandit.runs.folder import RunFiles, RunFolder
from fastbandit.runs.progress import Progress, accuracies
from fastbandit.runs.session import Session, check_group_device, torch_settings
from fastbandit.runs.tensors import CheckpointError
from fastbandit.runs.training import load_momenta, momenta, overfitting_guard
from fastbandit.training import Cost, Engine, Evaluation, Graphs, evaluate, train_epoch
from fastbandit.training.averaging import WeightAverage
from fastbandit.training.overfitting import MOST_STEPS, Verdict, stronger

__all__ = ["FILES", "Retraining", "retrain"]

#: What a retraining writes.
FILES = RunFiles("retrain")


class Retraining:
    """A retraining in progress: its state, one epoch, and how the state goes to disk and back.

    Args:
        session: where files go, and the processes of the run.
    """

    def __init__(self, setup: Setup, session: Session) -> None:
        self.setup, self.session, self.config = setup, session, setup.config
        group = session.group
        self.team = None if group is None else Team(group, 1)
        self.network = setup.network
        self.latents = list(latents(self.network))
        self.engine = Engine(
            self.config.precision,
            Graphs(self.config.graphs, setup.device, processes=session.processes),
        )
        # What is dropped is drawn anew in every step, by a generator that a replay would not move.
        self.training_engine = self.engine
        if self.config.drop_path_prob:
            self.training_engine = Engine(self.config.precision)
        self.average = (
            WeightAverage(self.network, self.config.ema_decay) if self.config.ema_decay else None
        )
        self.cost = Cost()
        self.threat = self.config.training_threat()
        self.selection = self.config.selection_threat()
        self.guard = overfitting_guard(self.config, self.threat, setup.guard)
        self.epoch = 0
        self.peak_memory = 0.0
        # Each time that catastrophic overfitting was found.
        self.overfitting: list[dict[str, Any]] = []
        self.best: Record | None = None
        self.last: Record | None = None
        self.best_weights: dict[str, Tensor] = {}
        # The state at the last check that found nothing wrong.
        self.good: dict[str, Tensor] = {}
        self.good_epoch = -1
        if self.guard is not None:
            self.keep_good(-1)

    @property
    def no_graphs(self) -> str | None:
        """Why training steps are not recorded; None where they are."""
        config = self.config
        if self.engine.graphs is not None and self.engine.graphs.reason:
            return self.engine.graphs.reason
        if config.drop_path_prob:
            return "dropped paths are drawn anew in every step"
        if kernel_loss_of(config, self.network) is not None:
            return "the kernel-level loss watches the forward pass"
        if not config.objective(self.threat).recordable:
            return f"a mini-batch of method {config.method} has several steps"
        return None

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs

    @property
    def evaluated(self) -> torch.nn.Module:
        """The network whose accuracy counts: the average where there is one."""
        return self.network if self.average is None else self.average.network

    # State on disk.

    def _learning(self) -> dict[str, Tensor]:
        """Weights, momentum and average: what training goes on from."""
        tensors = {f"model.{k}": v for k, v in self.network.state_dict().items()}
        buffers = momenta(self.network, self.setup.optimizer)
        tensors |= {f"momentum.{k}": v for k, v in buffers.items()}
        if self.average is not None:
            average = self.average.network.state_dict()
            tensors |= {f"average.{k}": v for k, v in average.items()}
        return tensors

    def _learn_from(self, tensors: dict[str, Tensor]) -> None:
        """Undo what happened since :meth:`_learning`."""
        parts = _parts(tensors, "model", "momentum", "average")
        try:
            self.network.load_state_dict(parts["model"])
            if self.average is not None:
                self.average.network.load_state_dict(parts["average"])
        except RuntimeError as error:
            raise CheckpointError(
                f"the checkpoint does not fit this network: {str(error).splitlines()[0]}"
            ) from None
        load_momenta(self.network, self.setup.optimizer, parts["momentum"])

    def keep_good(self, epoch: int) -> None:
        self.good = {name: tensor.clone() for name, tensor in self._learning().items()}
        self.good_epoch = epoch

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and plain values: all that :meth:`restore` needs."""
        tensors = {f"now.{k}": v for k, v in self._learning().items()}
        tensors |= {f"good.{k}": v for k, v in self.good.items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()}
        state = {
            "epoch": self.epoch,
            "cost": self.cost.state_dict(),
            "peak_memory_mb": self.peak_memory,
            "average_steps": 0 if self.average is None else self.average.steps,
            "good_epoch": self.good_epoch,
            "overfitting": self.overfitting,
            "best": None if self.best is None else dataclasses.asdict(self.best),
            "last": None if self.last is None else dataclasses.asdict(self.last),
        }
        return tensors, state

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        parts = _parts(tensors, "now", "good", "best")
        self._learn_from(parts["now"])
        device = self.setup.device
        self.good = {name: tensor.to(device) for name, tensor in parts["good"].items()}
        self.best_weights = {name: tensor.to(device) for name, tensor in parts["best"].items()}
        self.epoch, self.good_epoch = state["epoch"], state["good_epoch"]
        self.cost.load_state_dict(state["cost"])
        self.peak_memory = state["peak_memory_mb"]
        if self.average is not None:
            self.average.steps = state["average_steps"]
        # "fired" in checkpoints of before version 0.2.
        self.overfitting = state["overfitting"] if "overfitting" in state else state["fired"]
        self.threat = self.config.training_threat()
        for _ in self.overfitting:
            self.threat = stronger(self.threat)
        self.best, self.last = (
            None if state[name] is None else Record(**state[name]) for name in ("best", "last")
        )

    # One epoch.

    @contextmanager
    def _dropping_paths(self) -> Iterator[None]:
        """Paths are dropped by torch's own generator, which starts anew in every epoch."""
        config, device = self.config, self.setup.device
        self.network.drop_path_prob = config.drop_path_prob * self.epoch / config.epochs
        group = self.session.group
        rank = 0 if group is None else group.rank
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed(config.seed, "drop path", self.epoch, rank))
            yield

    def _rate(self, updates: int, step: int) -> float:
        """Learning rate of that step of this epoch."""
        done = self.epoch + step / (len(self.setup.weights) * updates)
        return self.config.rate_at(done)

    @property
    def _after_step(self) -> Callable[[], None] | None:
        """What follows each step of the optimiser, if anything."""
        average = self.average
        if not self.latents:
            return None if average is None else average.update

        def after() -> None:
            # Beyond 1 a weight whose sign is used has no gradient any more.
            clamp_latents(self.latents)
            if average is not None:
                average.update()

        return after

    def _use_step(self) -> None:
        """Before an epoch: 1-bit or real weights; the second of two steps begins anew."""
        average = self.average
        use_step(self.config, self.epoch, self.network, self.evaluated)
        if 0 < self.epoch == self.config.binary.epochs_of_first(self.config.epochs):
            load_momenta(self.network, self.setup.optimizer, {})
            if average is not None:
                average.restart()

    def train(self, batches: Any = None) -> Any:
        """One epoch of training."""
        setup, config = self.setup, self.config
        objective = config.objective(self.threat)
        objective.kernel_loss = kernel_loss_of(config, self.network)
        if self.team is not None:
            self.team.use([list(self.network.parameters())])
        with self._dropping_paths():
            result = train_epoch(
                self.network,
                setup.weights if batches is None else batches,
                self.epoch,
                setup.optimizer,
                self.threat,
                seed=derive_seed(config.seed, "attack", "train"),
                cost=self.cost,
                grad_clip=config.grad_clip,
                team=self.team,
                objective=objective,
                learning_rate=partial(self._rate, objective.updates),
                after_step=self._after_step,
                engine=self.training_engine,
            )
        if self.team is not None and self.average is not None:
            self.team.average_batchnorm(self.average.network.modules())
        return result

    def check(self) -> Verdict:
        """Look for catastrophic overfitting; its cost is a phase of its own in the ledger."""
        assert self.guard is not None
        with phase(self.cost, "guard"):
            trained, strong = self.guard.measure(
                self.network, self.threat, cost=self.cost, team=self.team, engine=self.engine
            )
        return self.guard.judge([trained], [strong])

    def guarded(self) -> tuple[dict[str, Any] | None, str | None]:
        """Check what this epoch did and undo it if it has to be; a line for the log, and a note."""
        if self.guard is None or (self.epoch + 1) % self.config.guard.every:
            return None, None
        verdict = self.check()
        line: dict[str, Any] = {"steps": self.threat.steps, **verdict.to_dict()}
        if not verdict.overfitted:
            self.keep_good(self.epoch)
            return line, None
        self._learn_from(self.good)
        back = (
            f"back to epoch {self.good_epoch + 1}"
            if self.good_epoch >= 0
            else "back to the beginning"
        )
        message = (
            f"catastrophic overfitting in epoch {self.epoch + 1}: accuracy "
            f"{100 * verdict.trained:.1f} % under the training attack, "
            f"{100 * verdict.strong:.1f} % under a stronger one; {back}"
        )
        line["back_to"] = self.good_epoch
        if self.threat.steps < MOST_STEPS:
            self.threat = stronger(self.threat)
            self.overfitting.append(
                {
                    "epoch": self.epoch,
                    "back_to": self.good_epoch,
                    "trained": verdict.trained,
                    "strong": verdict.strong,
                    "attack": self.threat.describe(),
                }
            )
            message += f", and on with {self.threat.describe()}"
        return line, message

    def validate(self) -> Evaluation:
        """Accuracy on the validation images; every epoch meets the same random starts."""
        return evaluate(
            self.evaluated,
            self.setup.validation,
            self.selection,
            seed=derive_seed(self.config.seed, "attack", "validation"),
            cost=self.cost,
            team=self.team,
            engine=self.engine,
        )

    def run_epoch(self) -> tuple[dict[str, Any], str | None]:
        """Train, check, validate, log and save. Returns the metrics, and a note if there is one."""
        config, number = self.config, self.epoch
        self._use_step()
        timer = EpochTimer(self.cost)
        with accounting(self.cost, self.team):
            steps = self.threat.steps
            trained = self.train()
            checked, note = self.guarded()
            scores = None
            if (number + 1) % config.selection.every == 0 or number + 1 == config.epochs:
                scores = self.validate()
        improved = False
        if scores is not None:
            self.last = Record(number, scores.clean_correct, scores.robust_correct, scores.images)
            # A network with real weights is not the one that is wanted.
            improved = step_of(config, number) == 2 and self.last.better_than(self.best)
            if improved:
                self.best = self.last
                weights = self.evaluated.state_dict()
                self.best_weights = {k: v.detach().clone() for k, v in weights.items()}
        self.epoch += 1
        seconds = timer.stop()
        self.peak_memory = max(self.peak_memory, peak_memory_mb(self.setup.device))
        metrics = {
            "epoch": number,
            "loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "clean_accuracy": None if scores is None else scores.clean_accuracy,
            "robust_accuracy": None if scores is None else scores.robust_accuracy,
            "best": improved,
            "attack_steps": steps,
            "overfitting": checked,
            "learning_rate": self.setup.optimizer.param_groups[0]["lr"],
            "seconds_train": trained.seconds,
            "seconds_validate": 0.0 if scores is None else scores.seconds,
            "seconds_total": seconds,
            "images_per_second": trained.images / trained.seconds,
            "peak_memory_mb": self.peak_memory,
        }
        if config.binary.steps == 2:
            metrics["binary_step"] = step_of(config, number)
        self.session.append("metrics.jsonl", metrics)
        self.session.save(self)
        if improved:
            # Early, so that a long run has something to show; it is written again at the end.
            self.write_model(BEST)
        return metrics, note

    # The end.

    def write_model(self, name: str) -> None:
        """Write one of the two model files."""
        if self.session.folder is None:
            return
        record = self.best if name == BEST else self.last
        assert record is not None
        write_model(
            self.session.folder.path / name,
            self.setup,
            self.best_weights if name == BEST else self.evaluated.state_dict(),
            record,
            self.selection,
            self.session.run_id,
        )

    def test_engine(self) -> Engine:
        """In float32 whatever the precision of the training, but recorded where that is."""
        return Engine(graphs=self.engine.graphs)

    def test(self) -> dict[str, Any] | None:
        """Accuracy of the best weights on the test images."""
        setup, config = self.setup, self.config
        if setup.test is None:
            return None
        network = setup.architecture.build(setup.genotype)
        kept = {k: v for k, v in self.best_weights.items() if not k.startswith("auxiliary.")}
        network.load_state_dict(kept)
        network.to(setup.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        threat = config.final_threat()
        with accounting(self.cost, self.team), phase(self.cost, "test"):
            evaluation = evaluate(
                network,
                setup.test,
                threat,
                seed=derive_seed(config.seed, "attack", "final", "test"),
                cost=self.cost,
                team=self.team,
                engine=self.test_engine(),
            )
        return {
            "split": "test",
            "n": evaluation.images,
            "clean_accuracy": evaluation.clean_accuracy,
            "robust_accuracy": evaluation.robust_accuracy,
            "attack": threat.describe(),
            "of": "best",
        }

    def finish(self) -> dict[str, Any]:
        """Measure the best weights on the test images and write the last files."""
        setup, config, session = self.setup, self.config, self.session
        test = self.test()
        if session.folder is None:
            return session.finish(None)
        assert self.best is not None
        assert self.last is not None
        for name in (BEST, LAST):
            self.write_model(name)
            write_card(session.folder.path / name)
        self.peak_memory = max(self.peak_memory, peak_memory_mb(setup.device))
        source, plain = setup.source, setup.architecture.build(setup.genotype)
        summary = {
            "status": "finished",
            "command": "retrain",
            "run_id": self.session.run_id,
            "name": config.name,
            "genotype": "genotype.json",
            "genotype_name": setup.genotype.name,
            "genotype_hash": setup.genotype.hash,
            "architecture": without_defaults(dataclasses.asdict(setup.architecture)),
            "parameters": sum(p.numel() for p in plain.parameters()),
            "macs": multiply_adds(plain, source.train.shape),
            "method": config.method,
            "threat": config.training_threat().to_dict(),
            "data": {
                "name": source.name,
                "description": source.description,
                "n": len(setup.splits["weights"]),
                "weights": len(setup.splits["weights"]),
                "validation": len(setup.splits["validation"]),
                "test": len(setup.splits["test"]),
                "classes": source.classes,
            },
            "selection": selection_rule(setup),
            "overfitting": self.overfitting,
            "best": self.best.facts(self.selection, BEST),
            "last": self.last.facts(self.selection, LAST),
            "test": test,
            "cost": cost_summary(
                self.cost,
                self.peak_memory,
                config.device,
                session.group,
                epochs=config.epochs,
            )
            | {"precision": config.precision, "graphs": self.no_graphs is None},
            "versions": {"torch": torch.__version__, "fastbandit": __version__},
        }
        return session.finish(summary)


def _parts(tensors: dict[str, Tensor], *names: str) -> dict[str, dict[str, Tensor]]:
    """The tensors named ``<name>.<rest>`` by name and rest."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for full, tensor in tensors.items():
        part, _, rest = full.partition(".")
        parts[part][rest] = tensor
    return parts


def retrain(
    config: RetrainConfig,
    out: str | Path | None = None,
    *,
    root: str | Path = "runs",
    force: bool = False,
    progress: Progress | None = None,
    group: Group | None = None,
    source: DataSource | None = None,
    genotype: Genotype | None = None,
    callbacks: Sequence[Callback] = (),
) -> tuple[Path, dict[str, Any]]:
    """Train the network of a genotype to the end, or go on with a run that was interrupted.

    Args:
        config: the settings; see :class:`RetrainConfig`.
        out: run folder; None: an unfinished run of the same configuration below ``root``, else a
            new folder there.
        force: replace what a finished or a different run left in ``out``.
        progress: where progress is shown; None shows none.
        group: the processes that train together, each of them calling this function; None: this
            one alone. Only the first reads and writes files, and shows progress.
        source: the images, for instance :func:`fastbandit.data.load` of a torch Dataset; None:
            those that ``config.data`` names. To go on with a run, give the same images again:
            their digest is stored and compared.
        genotype: the architecture; None: that which ``config.genotype`` names.
        callbacks: are told of the epochs (:mod:`fastbandit.callbacks`).

    Returns:
        The run folder and its summary; of a finished run of the same configuration in ``out``
        those that are stored, unless ``force`` is given.

    Raises:
        OutOfMemoryError: there is not enough memory; the run goes on from its last epoch.
        ValueError: settings, genotype, data, run folder or checkpoint cannot be used; the message
            says why.
        OSError: a file could not be written; the run goes on from its last checkpoint.
    """
    config, genotype = with_genotype(config.resolve(), genotype)
    session = Session(config, group=group, callbacks=callbacks)
    check_group_device(config.device, group)
    # Before there is a run folder: what cannot be is said and leaves nothing behind.
    Graphs(config.graphs, torch.device(config.device), processes=session.processes)
    with torch_settings(config.threads, bool(config.deterministic)):
        setup = build(config, genotype, group, source)
        with session.open(
            FILES, out, root=root, name=f"{config.name}-retrain", force=force, progress=progress
        ):
            if session.folder is not None:
                check_genotype(session.folder, genotype)
            done = session.finished(setup.splits)
            return session.path, _train(setup, session) if done is None else done


def run_job(
    config: RetrainConfig, out: str | None, force: bool, genotype: Genotype | None
) -> dict[str, Any]:
    """:func:`retrain`, as a call of another process."""
    path, summary = retrain(config, out, force=force, genotype=genotype)
    return {"run": str(path), "result": summary}


def _train(setup: Setup, session: Session) -> dict[str, Any]:
    config, genotype, progress = setup.config, setup.genotype, session.progress
    current = Retraining(setup, session)
    if setup.device.type == "cuda" and (reason := current.no_graphs):
        progress.note(f"no CUDA graphs in training: {reason}")

    def begin(folder: RunFolder, seconds: float) -> None:
        genotype.save(folder.path / "genotype.json")
        current.cost.add_seconds("setup", seconds)

    resumed = session.resume(current, device=setup.device, splits=setup.splits, begin=begin)
    begins = f"goes on after epoch {current.epoch}" if resumed and current.epoch else "begins"
    with progress.steps(
        f"retraining {begins}: {config.method}, {genotype.name or genotype.hash[:12]}, "
        f"{setup.architecture.cells} cells, C = {setup.architecture.channels}, "
        f"{config.epochs} epochs; run folder {session.path}",
        config.epochs,
        current.epoch,
    ) as update:
        while not current.finished:
            with session.oom_hint(f"in epoch {current.epoch + 1}"):
                metrics, note = current.run_epoch()
            if note is not None:
                progress.note(note)
            update(current.epoch, f"epoch {current.epoch}/{config.epochs}  {accuracies(metrics)}")
    with session.oom_hint("when the test images were attacked"):
        return current.finish()
