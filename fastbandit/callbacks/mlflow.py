"""MLflow."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastbandit._files import FileError, read_json, write_atomic
from fastbandit.callbacks.base import Callback, RunInfo, flat, numbers, shown_epoch

__all__ = ["MLflow"]

#: In the run folder: which run of the tracking server this is.
FILE = "mlflow.json"
#: Of the settings so many are sent at a time, and so many letters of each: the server's limits.
_AT_A_TIME, _LETTERS = 100, 500


class MLflow(Callback):
    """Sends settings, metrics and the files of the result to MLflow; needs ``pip install mlflow``
    (or ``mlflow-skinny``).

    A run that goes on after an interruption goes on in the same run of MLflow.

    Args:
        experiment: name of the experiment, made if it is not there.
        tracking_uri: where to; None: where MLflow itself would (``MLFLOW_TRACKING_URI``, else a
            file or folder in the current one).

    Raises:
        ImportError: MLflow is not installed.
    """

    def __init__(self, experiment: str = "fastbandit", tracking_uri: str | None = None) -> None:
        from mlflow.tracking import MlflowClient

        self.experiment = experiment
        self._client = MlflowClient(tracking_uri)
        self._run = ""

    def on_start(self, run: RunInfo) -> None:
        client, path = self._client, run.path / FILE
        if run.epoch and path.is_file():
            stored = read_json(path)
            self._run = str(stored.get("run_id")) if isinstance(stored, dict) else ""
            if not self._run:
                raise FileError(f"{path}: expected the name of a run of MLflow, got none")
            client.update_run(self._run, status="RUNNING")
            return
        experiment = client.get_experiment_by_name(self.experiment)
        number = (
            experiment.experiment_id if experiment else client.create_experiment(self.experiment)
        )
        tags = {"command": run.command, "run_folder": str(run.path), "run_id": run.run_id}
        self._run = client.create_run(number, run_name=run.path.name, tags=tags).info.run_id
        write_atomic(path, f'{{"run_id": "{self._run}"}}\n')
        from mlflow.entities import Param

        params = [Param(k, str(v)[:_LETTERS]) for k, v in flat(run.config).items()]
        for first in range(0, len(params), _AT_A_TIME):
            client.log_batch(self._run, params=params[first : first + _AT_A_TIME])

    def on_epoch(self, run: RunInfo, metrics: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric

        now, step = int(1000 * time.time()), shown_epoch(metrics)
        values = [Metric(name, value, now, step) for name, value in numbers(metrics).items()]
        self._client.log_batch(self._run, metrics=values)

    def on_end(self, run: RunInfo, summary: Mapping[str, Any]) -> None:
        for name in ("genotype.json", "summary.json"):
            if (run.path / name).is_file():
                self._client.log_artifact(self._run, str(run.path / name))
        self._client.set_terminated(self._run, "FINISHED")

    def on_error(self, run: RunInfo, error: BaseException) -> None:
        if self._run:
            killed = isinstance(error, KeyboardInterrupt)
            self._client.set_terminated(self._run, "KILLED" if killed else "FAILED")
